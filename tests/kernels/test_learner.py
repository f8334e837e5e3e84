"""The fused step behind the trainer's seam: the same learner, up to the rounding of sums."""

from __future__ import annotations

import copy
import dataclasses
import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

from saekit import SAE, SyntheticRows, kernels
from saekit.training.config import BatchTopK, JumpReLU, PAnneal, TopK
from saekit.training.defaults import resolve
from saekit.training.fused import fused_step, fuses
from saekit.training.learner import Learner, initialize_learner, permute, restore, tensors_of
from saekit.training.loop import train
from saekit.training.settings import TrainSettings
from saekit.training.step import plain_step

pytestmark = pytest.mark.usefixtures("fast")

D, N, B = 24, 640, 128
CONFIG = TopK(N, k=6, dead_after_rows=3 * B, lr=1e-3)


def rows(steps: int, seed: int = 0) -> list[Tensor]:
    stream = torch.Generator().manual_seed(seed)
    basis = torch.randn(40, D, generator=stream)
    codes = torch.rand(steps * B, 40, generator=stream) * (torch.rand(steps * B, 40, generator=stream) < 0.1)
    return list((codes @ basis + 0.5).split(B))


def new(config: TopK = CONFIG, *, seed: int = 0, scale: float | None = 2.0) -> Learner:
    x = torch.cat(rows(4))
    resolved = resolve(config, D, 40, B)
    factor = None if scale is None else torch.tensor(scale)
    return initialize_learner(config, seed, resolved, bias=x.mean(0), scale=factor, sample=x, device="cpu")


def same(a: Learner, b: Learner) -> bool:
    left, right = tensors_of(a), tensors_of(b)
    return left.keys() == right.keys() and a.step == b.step and all(torch.equal(left[k], right[k]) for k in left)


@pytest.mark.parametrize("scale", [None, 2.0])
@pytest.mark.parametrize("clip", [None, 0.5, 1.0])
def test_equals_the_plain_step_over_ten_steps_with_revival(scale: float | None, clip: float | None) -> None:
    config = dataclasses.replace(CONFIG, clip=clip)
    fast, plain = new(config, scale=scale), new(config, scale=scale)
    revived = 0
    for x in rows(10):
        mine, other = fused_step(fast, x), plain_step(plain, x)
        assert mine.parts.keys() == other.parts.keys()
        revived += "aux" in mine.parts
        for name in ("loss", "error", "fired", "dead", "grad_norm"):
            torch.testing.assert_close(
                getattr(mine, name), getattr(other, name), rtol=1e-4, atol=1e-4, check_dtype=False
            )
        for name, value in mine.parts.items():
            torch.testing.assert_close(value, other.parts[name], rtol=1e-4, atol=1e-4)
        assert bool(mine.finite)
        assert mine.rows == B
    assert revived >= 5
    for name, t in tensors_of(fast).items():
        torch.testing.assert_close(t, tensors_of(plain)[name], rtol=1e-3, atol=2e-5, msg=lambda m, n=name: f"{n}: {m}")


def test_what_is_fused() -> None:
    assert fuses(new())
    for config in (
        dataclasses.replace(CONFIG, multi_topk=0.1),
        dataclasses.replace(CONFIG, control="frozen-decoder"),
        dataclasses.replace(CONFIG, control="untrained"),
        PAnneal(N, target_l0=6.0),
    ):
        learner, twin = new(config), new(config)
        assert not fuses(learner)
        [x] = rows(1)
        fused_step(learner, x)
        plain_step(twin, x)
        assert same(learner, twin)
    with kernels.using("plain"):
        assert not fuses(new())


def test_state_round_trip_continues_bitwise() -> None:
    batches = rows(16)
    a = new()
    for x in batches[:8]:
        fused_step(a, x)
    b = new(seed=99)
    restore(b, {name: t.clone() for name, t in tensors_of(a).items()}, a.step)
    for x in batches[8:]:
        fused_step(a, x)
        fused_step(b, x)
    assert same(a, b)


def test_permute_then_step_equals_step_then_permute() -> None:
    order = torch.randperm(N, generator=torch.Generator().manual_seed(5))
    batches = rows(12)
    a = new()
    for x in batches[:6]:
        fused_step(a, x)
    b = permute(a, order)
    for x in batches[6:]:
        fused_step(a, x)
        fused_step(b, x)
    for name, t in tensors_of(permute(a, order)).items():
        torch.testing.assert_close(tensors_of(b)[name], t, rtol=1e-3, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")


def test_a_copied_learner_is_independent() -> None:
    a = new()
    b = copy.deepcopy(dataclasses.replace(a, generators={}))
    before = {name: t.clone() for name, t in b.parameters.items()}
    fused_step(a, rows(1)[0])
    assert all(torch.equal(t, b.parameters[name]) for name, t in before.items())


class Interrupted(Exception):
    """Stands for a crash at a known place."""


def bitwise(a: SAE, b: SAE) -> bool:
    left, right = a.tensors(), b.tensors()
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


SOURCE = {"d_in": 16, "n_features": 40, "l0": 4.0, "n_rows": 4000, "mean": 1.0}
RUN = {"settings": TrainSettings(batch_rows=128, log_every=5, checkpoint_every=7)}


def test_a_run_uses_the_fused_step_and_says_so(tmp_path: Path) -> None:
    train(TopK(600, k=4), SyntheticRows(**SOURCE), out=tmp_path / "fast", **RUN)
    assert json.loads((tmp_path / "fast" / "run.json").read_text())["request"]["step"] == "fused"
    with kernels.using("plain"):
        train(TopK(600, k=4), SyntheticRows(**SOURCE), out=tmp_path / "plain", **RUN)
    assert json.loads((tmp_path / "plain" / "run.json").read_text())["request"]["step"] == "plain"


def test_together_equals_alone_bitwise() -> None:
    configs = [TopK(600, k=4, dead_after_rows=600), JumpReLU(700, target_l0=3.0), BatchTopK(600, k=4)]
    together = train(configs, SyntheticRows(**SOURCE), seeds=[0, 7], settings=TrainSettings(batch_rows=128))
    for index, config in enumerate(configs[:2]):
        [alone] = train(config, SyntheticRows(**SOURCE), seeds=[7], settings=TrainSettings(batch_rows=128))
        assert bitwise(alone, together[2 * index + 1])
        assert not bitwise(alone, together[2 * index])


def test_resume_equals_uninterrupted_bitwise(tmp_path: Path) -> None:
    def stop(stage: str, done: int, total: int | None = None, note: str = "") -> None:
        if done >= 17 * 128:
            raise Interrupted

    config = TopK(600, k=4, dead_after_rows=600)
    whole = train(config, SyntheticRows(**SOURCE), seeds=[0, 1], out=tmp_path / "whole", **RUN)
    with pytest.raises(Interrupted):
        train(config, SyntheticRows(**SOURCE), seeds=[0, 1], out=tmp_path / "cut", progress=stop, **RUN)
    resumed = train(config, SyntheticRows(**SOURCE), seeds=[0, 1], out=tmp_path / "cut", resume=True, **RUN)
    assert all(bitwise(a, b) for a, b in zip(whole, resumed))
