"""Mutual feature regularization."""

from __future__ import annotations

import importlib

import pytest
import torch

from saekit import compare
from saekit.comparison.settings import ComparisonSettings
from saekit.errors import ConfigError
from saekit.rows.synthetic import SyntheticRows
from saekit.training.config import ReLU, TopK
from saekit.training.loop import train
from saekit.training.mutual_regularization import pull
from saekit.training.settings import TrainSettings


@pytest.fixture(scope="module")
def rows() -> SyntheticRows:
    return SyntheticRows(d_in=16, n_features=48, n_rows=8192, l0=3, mean=1.0)


def test_the_gradient_is_that_of_the_penalty(monkeypatch):
    monkeypatch.setattr(importlib.import_module("saekit.training.mutual_regularization"), "BLOCK_ROWS", 4)
    g = torch.Generator().manual_seed(0)
    W = torch.randn(10, 6, generator=g, dtype=torch.float64).requires_grad_()
    others = [torch.randn(10, 6, generator=g, dtype=torch.float64) for _ in range(3)]
    best = [
        (torch.nn.functional.normalize(W, dim=1) @ torch.nn.functional.normalize(other, dim=1).T).max(1).values.mean()
        for other in others
    ]
    expected = 0.3 * 6 * (1 - torch.stack(best).mean())
    [gradient] = torch.autograd.grad(expected, W)
    penalty, found = pull(W.detach(), others, 0.3)
    torch.testing.assert_close(penalty, expected.detach())
    torch.testing.assert_close(found, gradient)
    assert float(pull(W.detach(), [W.detach()], 1.0)[0]) == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("kind", ["topk", "relu"])
def test_seeds_agree_more(kind, rows):
    def of(mutual: float):
        config = (
            TopK(48, k=3, lr=1e-2, mutual=mutual) if kind == "topk" else ReLU(48, target_l0=3, lr=1e-2, mutual=mutual)
        )
        return train(config, rows, seeds=[0, 1, 2], settings=TrainSettings(batch_rows=256), tokens=20_480)

    plain, tied = of(0.0), of(0.5)
    with_it, without = (
        compare(saes, settings=ComparisonSettings(controls=False)).mean_cosine.value for saes in (tied, plain)
    )
    assert with_it > without + 0.05
    assert tied[0].provenance["config"]["mutual"] == 0.5


def test_other_configurations_do_not_notice(rows):
    free, tied = TopK(24, k=3), TopK(24, k=3, mutual=0.2)
    together = train([free, tied], rows, seeds=[0, 1], settings=TrainSettings(batch_rows=256), tokens=4096)
    alone = train(free, rows, seeds=[1], settings=TrainSettings(batch_rows=256, step="plain"), tokens=4096)
    assert torch.equal(together[1].W_dec, alone[0].W_dec)
    assert not torch.equal(together[2].W_dec, together[0].W_dec)


def test_resumed_exactly(rows, tmp_path):
    config = TopK(24, k=3, mutual=0.2)
    settings = TrainSettings(batch_rows=256, checkpoint_every=4, log_every=1)
    options = {"seeds": [0, 1], "tokens": 4096, "settings": settings}
    whole = train(config, rows, **options, out=tmp_path / "a")
    assert (tmp_path / "a" / "topk-24-k3-mutual0.2-seed1").is_dir()

    class Stopped(Exception):
        pass

    def stop(record):
        assert "mutual" in record
        if record["step"] == 10:
            raise Stopped

    with pytest.raises(Stopped):
        train(config, rows, **options, out=tmp_path / "b", callbacks=[stop])
    resumed = train(config, rows, **options, out=tmp_path / "b", resume=True)
    for one, other in zip(whole, resumed, strict=True):
        assert torch.equal(one.W_dec, other.W_dec)


def test_what_makes_no_sense(rows):
    with pytest.raises(ConfigError, match=r"`TopK.mutual` must be 0 or a positive number; got -1"):
        TopK(24, k=3, mutual=-1)
    with pytest.raises(ConfigError, match="needs at least two; got"):
        train(TopK(24, k=3, mutual=0.1), rows, seeds=[0])
    for control in ("untrained", "frozen-decoder"):
        with pytest.raises(ConfigError, match="`mutual` moves the decoder, which control="):
            train(TopK(24, k=3, mutual=0.1, control=control), rows, seeds=[0, 1])
    with pytest.raises(ConfigError, match="`mutual` needs step='plain'; got step='fused'"):
        train(TopK(24, k=3, mutual=0.1), rows, seeds=[0, 1], settings=TrainSettings(step="fused"))
