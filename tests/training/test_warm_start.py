"""Training that starts from a given SAE."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from saekit.errors import ConfigError
from saekit.rows.synthetic import SyntheticRows
from saekit.sae.model import SAE
from saekit.sae.rules import TopKRule
from saekit.sae.scaling import Scaling
from saekit.training.config import BatchTopK, Gated, JumpReLU, Matryoshka, ReLU, TopK
from saekit.training.loop import train
from saekit.training.settings import TrainSettings

CONFIGS = [
    TopK(24, k=4), ReLU(24, target_l0=4), JumpReLU(24, target_l0=4), Gated(24, target_l0=4), Matryoshka(24, k=4),
]  # fmt: skip


@pytest.fixture(scope="module")
def rows() -> SyntheticRows:
    return SyntheticRows(d_in=12, n_features=24, n_rows=4096, l0=3, mean=1.0)


def frozen(config):
    """The same configuration, of which nothing is trained."""
    import dataclasses

    return dataclasses.replace(config, control="untrained")


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config.arch)
def test_the_start_is_the_sae_given(config, rows):
    [sae] = train(config, rows, seeds=[1], settings=TrainSettings(batch_rows=256))
    x = next(iter(rows.batches(500))).x
    [again] = train(frozen(config), rows, seeds=[5], settings=TrainSettings(batch_rows=256, data_seed=3), start=sae)
    torch.testing.assert_close(again.reconstruct(x), sae.reconstruct(x), rtol=1e-4, atol=1e-4)
    assert again.provenance["start"] == sae.digest()
    assert "start" not in sae.provenance


def test_biases_and_norms_of_another_form_are_folded_in(rows):
    config = JumpReLU(24, target_l0=4)
    [sae] = train(config, rows, settings=TrainSettings(batch_rows=256))
    g = torch.Generator().manual_seed(0)
    norms = torch.rand(24, generator=g) + 0.5
    other = sae.replace(
        b_pre=torch.randn(12, generator=g), scaling=Scaling("scalar", scale=torch.tensor(0.7)),
        W_dec=sae.W_dec * norms[:, None],
    )  # fmt: skip
    x = next(iter(rows.batches(500))).x
    for start in (other, other.replace(b_pre=None)):
        [again] = train(frozen(config), rows, settings=TrainSettings(batch_rows=256), start=start)
        torch.testing.assert_close(again.reconstruct(x), start.reconstruct(x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("step", ["plain", "fused"])
def test_going_on_lowers_the_error(rows, step):
    config = TopK(24, k=4, lr=1e-2)
    [short] = train(config, rows, settings=TrainSettings(batch_rows=256, step=step), tokens=2048)
    [more, other] = train(
        config, rows, settings=TrainSettings(batch_rows=256, step=step), tokens=4096, seeds=[0, 1], start=[short, short]
    )
    x = next(iter(rows.batches(4096))).x

    def error(sae: SAE) -> float:
        return float((sae.reconstruct(x) - x).square().sum())

    assert error(more) < error(short)
    assert torch.equal(more.W_dec, other.W_dec)  # TopK draws nothing: the start decides
    [fresh] = train(config, rows, settings=TrainSettings(batch_rows=256, step=step), tokens=4096)
    assert error(more) < error(fresh)


def test_resumed_from_a_given_start(rows, tmp_path):
    [sae] = train(TopK(24, k=4), rows, settings=TrainSettings(batch_rows=256))
    whole = train(
        TopK(24, k=4), rows, settings=TrainSettings(batch_rows=256, checkpoint_every=4), start=sae, out=tmp_path / "a"
    )

    class Stopped(Exception):
        pass

    def stop(record):
        if record["step"] == 9:
            raise Stopped

    settings = TrainSettings(batch_rows=256, checkpoint_every=4, log_every=1)
    options = {"start": sae, "out": tmp_path / "b", "settings": settings}
    with pytest.raises(Stopped):
        train(TopK(24, k=4), rows, **options, callbacks=[stop])
    [resumed] = train(TopK(24, k=4), rows, **options, resume=True)
    assert torch.equal(resumed.W_dec, whole[0].W_dec)
    with pytest.raises(ConfigError, match="start"):
        train(TopK(24, k=4), rows, **(options | {"start": resumed}), resume=True)


def test_what_is_refused(rows):
    [sae] = train(TopK(24, k=4), rows, settings=TrainSettings(batch_rows=256))
    for config, start, message in (
        (TopK(16, k=4), sae, "must have n_latents=16 on rows of width 12; it has 24 on 12"),
        (JumpReLU(24, target_l0=4), sae, "the rule that JumpReLU ends with, jumprelu; it has topk"),
        (BatchTopK(24, k=4), sae, "the rule that BatchTopK ends with, jumprelu"),
        (TopK(24, k=4), sae.replace(W_skip=torch.zeros(12, 12)), "it has a skip path"),
        (TopK(24, k=4), sae.replace(scaling=Scaling("layer_norm")), "it has layer_norm scaling"),
        (TopK(24, k=4), sae.replace(provenance={"hook": "a", "hook_out": "b"}), "it is a transcoder"),
        (
            TopK(24, k=4),
            sae.replace(rule=TopKRule(4, sign="magnitude")),
            "sign that the configuration trains, 'positive'",
        ),
        (TopK(24, k=4), [sae, sae], "one for each of the 1 learners; got 2"),
        *((TopK(24, k=4), path, "must be SAEs; got") for path in ("", "sae", Path("sae"), ["sae"])),
    ):
        with pytest.raises(ConfigError, match=message):
            train(config, rows, settings=TrainSettings(batch_rows=256), start=start)
