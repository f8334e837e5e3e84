"""Crosscoders: selection and gradients against dense references, planted latents, files, resuming, refusals."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from fixtures.row_checks import whole
from saekit import SAE, ArrayRows, BatchTopK, TopK, TrainSettings, evaluate, prune, rank, train, untrained
from saekit.errors import ConfigError, DataError, ShapeError
from saekit.rows.joined import JoinedRows, join_rows, with_equal_parts
from saekit.sizes.settings import PruneSettings
from saekit.training.losses import Context, batchtopk_loss, part_norms

SMALL = TrainSettings(batch_rows=128)


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def joined() -> JoinedRows:
    codes = randn(3000, 12).relu()
    return join_rows({"base": codes @ randn(12, 6, seed=1), "tuned": 20 + 5 * codes @ randn(12, 10, seed=2)})


def context(config: BatchTopK, d: int, k: int = 0) -> Context:
    state = {"threshold": torch.tensor(0.0), "threshold_steps": torch.tensor(0.0), "last_smallest": torch.tensor(0.0)}
    return Context(config, torch.zeros(d), state=state, k_aux=k)


def parameters(n: int, d: int) -> dict[str, torch.Tensor]:
    W = randn(n, d, seed=3)
    W = W / W.norm(dim=1, keepdim=True)
    return {
        "W_enc": randn(n, d, seed=4) / d**0.5,
        "b_enc": 0.1 * randn(n, seed=5),
        "W_dec": W,
        "b_dec": randn(d, seed=6),
    }


def test_loss_and_gradients_are_those_of_a_dense_reference():
    config = BatchTopK(40, k=4, parts=(5, 7), aux_coefficient=0.0)
    p, x = parameters(40, 12), randn(60, 12, seed=7)
    leaves = {name: t.clone().requires_grad_() for name, t in p.items()}
    outcome = batchtopk_loss(leaves, x, context(config, 12))
    found = torch.autograd.grad(outcome.loss, list(leaves.values()))
    dense = {name: t.double().clone().requires_grad_() for name, t in p.items()}
    pre = ((x.double() - dense["b_dec"]) @ dense["W_enc"].T + dense["b_enc"]).relu()
    norms = dense["W_dec"][:, :5].norm(dim=1) + dense["W_dec"][:, 5:].norm(dim=1)
    scores = (pre * norms).detach()
    kept = scores >= scores.flatten().topk(4 * 60).values.min()
    loss = (x - (pre * kept) @ dense["W_dec"] - dense["b_dec"]).square().sum() / 60
    assert outcome.loss.item() == pytest.approx(loss.item(), rel=1e-5)
    assert bool((kept != (pre >= pre.flatten().topk(4 * 60).values.min())).any())  # the norms matter
    for mine, theirs in zip(found, torch.autograd.grad(loss, list(dense.values()))):
        torch.testing.assert_close(mine.double(), theirs, atol=1e-4, rtol=1e-4)


def test_the_norms_are_those_of_the_parts():
    W = torch.tensor([[3.0, 4.0, 0.0], [0.0, 0.0, 2.0], [0.6, 0.0, 0.8]])
    torch.testing.assert_close(part_norms(W, (2, 1)), torch.tensor([5.0, 2.0, 1.4]))


def test_each_part_is_centred_and_weighs_the_same(joined):
    scaled = next(with_equal_parts(joined).batches(3000)).x
    torch.testing.assert_close(scaled.mean(0), torch.zeros(16), atol=1e-4, rtol=0)
    for part in scaled.split((6, 10), 1):
        assert float(part.square().sum(1).mean()) == pytest.approx(8, rel=1e-4)
    plain = ArrayRows(randn(20, 3))
    assert with_equal_parts(plain) is plain


def test_codes_of_raw_rows_fire_as_often_as_in_training_and_files_keep_them(joined, tmp_path):
    [sae] = train(BatchTopK(24, k=3), joined, tokens=30_000, settings=SMALL, out=tmp_path)
    codes = sae.encode(whole(joined).x)
    assert codes.l0() == pytest.approx(3, rel=0.15)
    assert [part["name"] for part in sae.provenance["parts"]] == ["base", "tuned"]
    error = (sae.reconstruct(whole(joined).x) - whole(joined).x).split((6, 10), 1)
    for part, left in zip(whole(joined).x.split((6, 10), 1), error):  # both are reconstructed, whatever their length
        assert float(left.square().sum() / (part - part.mean(0)).square().sum()) < 0.35
    read = SAE.load(tmp_path / "batchtopk-24-k3-seed0")
    assert torch.equal(read.encode(whole(joined).x).values, codes.values)
    thresholds = read.rule.tensors()["threshold"] * part_norms(read.W_dec, (6, 10))
    torch.testing.assert_close(thresholds, thresholds[:1].expand(24))


def test_scale_and_offset_of_a_source_change_nothing(joined):
    base, tuned = whole(joined).x.split((6, 10), 1)
    other = join_rows({"base": 100 * base - 7, "tuned": tuned})
    [one], [two] = (train(BatchTopK(24, k=3), rows, tokens=5_000, settings=SMALL) for rows in (joined, other))
    torch.testing.assert_close(one.W_dec, two.W_dec, atol=2e-3, rtol=0)


def test_alone_equals_together_and_resumed(joined, tmp_path):
    configs = [BatchTopK(24, k=3), BatchTopK(16, k=2)]
    together = train(configs, joined, seeds=[0, 1], tokens=5_000, settings=SMALL)
    [alone] = train(configs[1], joined, seeds=1, tokens=5_000, settings=SMALL)
    assert alone.digest() == together[3].digest()
    settings = dataclasses.replace(SMALL, checkpoint_every=10, log_every=5)

    def stops(record):
        if record["step"] >= 20:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(configs, joined, seeds=[0, 1], tokens=5_000, settings=settings, out=tmp_path, callbacks=[stops])
    resumed = train(configs, joined, seeds=[0, 1], tokens=5_000, settings=settings, out=tmp_path, resume=True)
    assert [sae.digest() for sae in resumed] == [sae.digest() for sae in together]


def test_it_is_evaluated_like_an_sae_with_its_baseline(joined):
    [sae] = train(BatchTopK(24, k=3), joined, tokens=5_000, settings=SMALL)
    result = evaluate(sae, joined)
    assert result.metrics.fvu.value < result.controls["untrained"].metrics.fvu.value
    first = untrained(BatchTopK(24, k=3), joined, settings=SMALL)
    assert first.scaling.kind == "standardize"
    assert first.encode(whole(joined).x).l0() > 0


def test_smaller_crosscoders_keep_their_sources_and_are_ranked_in_scaled_rows(joined):
    [sae] = train(BatchTopK(24, k=3), joined, tokens=10_000, settings=SMALL)
    loud = join_rows({"base": whole(joined).x[:, :6], "tuned": 1000 * whole(joined).x[:, 6:]})
    scale = torch.cat([sae.scaling.scale[:6], sae.scaling.scale[6:] / 1000])
    mean = torch.cat([sae.scaling.mean[:6], sae.scaling.mean[6:] * 1000])
    provenance = {"parts": sae.provenance["parts"]}  # not the variance of the rows, which differs
    same = sae.replace(scaling=dataclasses.replace(sae.scaling, scale=scale, mean=mean), provenance=provenance)
    for by in ("energy", "weighted_energy", "loss", "forward", "backward"):
        one, other = (rank(each, rows, by=by) for each, rows in ((sae, joined), (same, loud)))
        torch.testing.assert_close(one.W_dec, other.W_dec)  # how loud a source is changes no order
    for small in [
        *prune(sae, joined, sizes=[8, 16], by="loss", settings=PruneSettings(refit=True)),
        sae.take(3),
        sae.take(torch.tensor([4, 1])),
    ]:
        assert small.provenance["parts"] == sae.provenance["parts"]
    for verb in (lambda rows: rank(sae, rows, by="energy"), lambda rows: prune(sae, rows, sizes=[8], by="energy")):
        with pytest.raises(ConfigError, match="the rows must be joined ones of the sources"):
            verb(join_rows({"tuned": whole(joined).x[:, :6], "base": whole(joined).x[:, 6:]}))


def test_what_cannot_be_a_crosscoder_is_refused(joined):
    base, tuned = whole(joined).x.split((6, 10), 1)
    tokens = torch.arange(3000)
    for sources, error, said in (
        ({"a": base}, ConfigError, "two sources or more"),
        ({"a": base, "b": base}, ConfigError, "the same rows"),
        ({"a": base, "b": tuned[:-1]}, ShapeError, "`b` 2,999"),
        ({"a": ArrayRows(base, tokens), "b": ArrayRows(tuned, tokens.flip(0))}, DataError, "the same tokenizer"),
        ({"a": ArrayRows(base, tokens), "b": tuned}, ConfigError, "only one of"),
        ({"a": ArrayRows(base, target=tuned), "b": tuned}, ConfigError, "without targets"),
        ({"a": joined, "b": tuned}, ConfigError, "rows of one place"),
        ({"a": base, "b": tuned.clone().fill_(torch.nan)}, DataError, "not finite"),
    ):
        with pytest.raises(error, match=said):
            join_rows(sources)
    with pytest.raises(ConfigError, match="must be a BatchTopK"):
        train(TopK(8, k=2), joined)
    with pytest.raises(ConfigError, match="widths of the rows"):
        train(BatchTopK(8, k=2, parts=(8, 8)), joined)
    with pytest.raises(ConfigError, match="rows of several sources"):
        train(BatchTopK(8, k=2, parts=(3, 3)), base)
    with pytest.raises(ConfigError, match="two or more whole numbers"):
        BatchTopK(8, k=2, parts=(3,))
    with pytest.raises(DataError, match="`b` are all the same"):
        train(BatchTopK(8, k=2), join_rows({"a": base, "b": torch.ones(3000, 2)}))
