"""Dense codes in blocks of rows: the gradients of the whole batch, whatever the block (`test_losses`: of autograd)."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from fixtures.learners import new, new_transcoder, rows, target_of
from saekit.kernels import reference
from saekit.training import dense_autograd
from saekit.training.config import Gated, JumpReLU, PAnneal, ReLU
from saekit.training.learner import tensors_of
from saekit.training.losses import relu_loss
from saekit.training.step import _differentiate, context_of, plain_step

JUMP = {"n_latents": 24, "target_l0": 3, "dead_after_rows": 64}
DENSE = [
    ReLU(24, dead_after_rows=64),
    ReLU(24, target_l0=3, clip=0.01, dead_after_rows=64),
    ReLU(24, control="frozen-decoder"),
    ReLU(24, control="frozen-encoder", target_l0=3),
    ReLU(24, control="untrained"),
    ReLU(24, skip="zero", target_l0=3),
    Gated(24, dead_after_rows=64),
    Gated(24, target_l0=3, clip=0.01, l2=0.1),
    Gated(24, target_l0=3, aligned=True),
    Gated(24, orthogonal=0.1, orthogonal_chunk=7),
    Gated(24, control="frozen-encoder"),
    Gated(24, skip="least-squares"),
    PAnneal(24, dead_after_rows=64, p_start_fraction=0.0),
    PAnneal(24, target_l0=3, p_start_fraction=0.0, p_updates=3),
    PAnneal(24, skip="zero"),
    JumpReLU(**JUMP),
    JumpReLU(**JUMP, density=0.5, k_aux=2, l2=0.1),
    JumpReLU(**JUMP, density=0.5, pre_activation=1e-2, clip=0.01),
    JumpReLU(**JUMP, tanh=0.02, pre_activation=1e-3, orthogonal=0.1),
    JumpReLU(24, tanh=0.02, aligned=True),
    JumpReLU(**JUMP, control="frozen-decoder"),
    JumpReLU(**JUMP, skip="zero"),
    JumpReLU(**JUMP, control="soft-frozen-decoder"),
]
NAMES = [f"{index} {config.arch}" for index, config in enumerate(DENSE)]


def after(config, steps, block, monkeypatch, dtype=torch.float64, batch=29, precision="fp32"):
    """Return a learner after some steps in blocks of so many rows, and what `plain_step` said."""
    monkeypatch.setattr(dense_autograd, "block_rows_of", lambda *_: block)
    learner = new_transcoder(config) if config.skip else new(config, batch=batch)
    learner.resolved = replace(learner.resolved, precision=precision)
    learner.parameters["b_enc"][::5] -= 10  # some must be dead
    for group in (learner.parameters, learner.first_moments, learner.second_moments, learner.state):
        group |= {key: t.to(dtype) for key, t in group.items()}
    names = ("center", "scale", "target_center", "target_scale", "anchor")
    for name in (each for each in names if getattr(learner, each) is not None):
        setattr(learner, name, getattr(learner, name).to(dtype))
    batches = ([x, target_of(x)] if config.skip else [x] for x in rows(steps, batch=batch))
    return learner, [plain_step(learner, *(each.to(dtype) for each in batch)) for batch in batches]


@pytest.mark.parametrize("config", DENSE, ids=NAMES)
@pytest.mark.parametrize("block", [1, 5, 28])
def test_gradients_and_everything_else_are_those_of_the_whole_batch(config, block, monkeypatch):
    """Of 29 rows, so that the last block is short; in the fourth step, when some latents are dead."""
    learner, _ = after(config, 3, 29, monkeypatch)
    x = rows(4, batch=29)[3].double()
    goal = learner.goal(target_of(x)) if config.skip else None
    centred = x * learner.scale - learner.center
    whole, gradients = _differentiate(learner, centred, goal)
    monkeypatch.setattr(dense_autograd, "block_rows_of", lambda *_: block)
    parts, found = _differentiate(learner, centred, goal)
    assert found.keys() == gradients.keys()
    pairs = [*((found[name], gradients[name]) for name in found), (parts.loss, whole.loss)]
    pairs += [
        (getattr(parts, group)[name], each)
        for group in ("parts", "updates")
        for name, each in getattr(whole, group).items()
    ]
    for ours, theirs in [*pairs, (parts.residual, whole.residual), (parts.fired, whole.fired)]:
        scale = max(float(theirs.detach().abs().max()), 1.0)
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12 * scale)
    assert found or config.control == "untrained"


@pytest.mark.parametrize("config", DENSE, ids=NAMES)
def test_ten_steps_end_as_those_of_the_whole_batch(config, monkeypatch):
    """With clipping, resampling, constraints and dead latents."""
    one, said = after(config, 10, 29, monkeypatch)
    other, said_in_blocks = after(config, 10, 3, monkeypatch)
    mine, theirs = tensors_of(one), tensors_of(other)
    for name, each in mine.items():
        torch.testing.assert_close(
            each, theirs[name], rtol=1e-9, atol=1e-9, msg=lambda text, name=name: f"{name}: {text}"
        )
    for a, b in zip(said, said_in_blocks):
        assert float(a.loss) == pytest.approx(float(b.loss), rel=1e-9)
        assert float(a.fired) == float(b.fired)
        assert float(a.dead) == float(b.dead)
    if isinstance(config, JumpReLU) and config.dead_after_rows == 64:
        assert float(said[-1].parts["aux"]) > 0


@pytest.mark.parametrize("config", DENSE, ids=NAMES)
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_in_float32_and_bf16_they_are_those_up_to_rounding(config, precision, monkeypatch):
    """Of one step: relative to the largest entry of a gradient, which moments after one step are a tenth of."""
    one, said = after(config, 1, 29, monkeypatch, torch.float32, precision=precision)
    other, said_in_blocks = after(config, 1, 3, monkeypatch, torch.float32, precision=precision)
    far = 1e-5 if precision == "fp32" else 0.03
    for name, each in one.first_moments.items():
        if each.any():
            assert float((each - other.first_moments[name]).abs().max()) <= far * float(each.abs().max()), name
    assert float(said[0].loss) == pytest.approx(float(said_in_blocks[0].loss), rel=far)


@pytest.mark.parametrize("config", [config for config in DENSE if config.control is None], ids=str)
@pytest.mark.parametrize("block", [3, 29])
def test_a_row_that_is_not_finite_is_told(config, block, monkeypatch):
    monkeypatch.setattr(dense_autograd, "block_rows_of", lambda *_: block)
    x = rows(1, batch=29)[0]
    x[17, 2] = float("nan")
    learner = new_transcoder(config) if config.skip else new(config, batch=29)
    assert not plain_step(learner, *([x, target_of(x)] if config.skip else [x])).finite


def test_blocks_stay_in_what_is_allowed_and_take_enough_rows_for_products(monkeypatch):
    monkeypatch.setattr(reference, "BLOCK_BYTES", 2**20)
    monkeypatch.setattr(dense_autograd, "CACHED_BYTES", 2**16)
    monkeypatch.setattr(dense_autograd, "LEAST_ROWS", 32)

    def rows_of(n, dtype=torch.float32):
        return dense_autograd.block_rows_of(torch.empty(n, 2, dtype=dtype), torch.empty(n))

    sizes = {n: rows_of(n) for n in (16, 2**10, 2**13, 2**20)}
    assert sizes == {16: 1024, 2**10: 32, 2**13: 16, 2**20: 1}
    assert rows_of(2**10, torch.bfloat16) == 64
    wide = torch.empty(2**13, 2, dtype=torch.float64)
    assert dense_autograd.block_rows_of(wide, wide[:, 0]) == 8
    wide = torch.empty(2**10, 2, device="meta")
    assert dense_autograd.block_rows_of(wide, wide[:, 0]) == 128  # no cache to stay in


def test_gradients_follow_the_loss_and_are_given_once():
    learner, found = new(ReLU(24)), []
    for factor in (1.0, 2.0):
        leaves = {name: t.detach().requires_grad_() for name, t in learner.parameters.items()}
        loss = relu_loss(leaves, rows(1)[0] - 0.5, context_of(learner)).loss
        found.append(torch.autograd.grad(factor * loss, list(leaves.values()), retain_graph=True))
    assert all(torch.equal(2 * one, two) and one.any() for one, two in zip(*found))
    with pytest.raises(RuntimeError, match="can be differentiated once"):
        torch.autograd.grad(loss, list(leaves.values()))
