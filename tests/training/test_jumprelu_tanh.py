"""JumpReLU after Anthropic: its gradient by the formulas, written out in float64, and what the schedule does."""

from __future__ import annotations

import pytest
import torch

from fixtures.learners import D, N, new, rows, run
from saekit import train
from saekit.errors import ConfigError
from saekit.training.architectures import TANH_THRESHOLD
from saekit.training.config import JumpReLU
from saekit.training.losses import Context, jumprelu_loss
from saekit.training.settings import TrainSettings


def double(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("target", [None, 3.0])
def test_gradients_of_all_parameters(target):
    """``dz/dpre = H + (theta / eps) K``, ``dz/dtheta = -(theta / eps) K``, K the band around the threshold."""
    eps, scale, weight, below = 0.8, 4.0, 0.02, 0.003
    config = JumpReLU(N, target_l0=target, tanh=weight, tanh_scale=scale, pre_activation=below, bandwidth=eps)
    p = {name: t.double() for name, t in new(config).parameters.items()}
    p["log_threshold"] = 0.3 * double(N, seed=4) - 0.5
    x, center = torch.cat(rows(1)).double() - 0.5, p["b_dec"] - 0.1
    leaves = {name: t.clone().requires_grad_() for name, t in p.items()}
    state = {"coefficient": torch.tensor(weight, dtype=torch.float64), "distance": torch.tensor(0.0)}
    context = Context(config=config, center=center, state=state, step=9, total_steps=40, warmup_steps=20)
    outcome = jumprelu_loss(leaves, x, context)
    found = dict(zip(leaves, torch.autograd.grad(outcome.loss, list(leaves.values()))))

    n, offset, theta = len(x), 0.1, p["log_threshold"].exp()
    weight *= 10 / 40 if target is None else 10 / 20
    V = (x - x.mean(0)).square().sum(1).mean()
    pre = (x - offset) @ p["W_enc"].T + p["b_enc"]
    fires, near = (pre > theta).double(), ((pre - theta).abs() < eps / 2).double()
    z = pre * fires
    residual = z @ p["W_dec"] + offset - x
    soft, short = (scale * z).tanh(), (theta - pre).clamp(min=0)
    parts = {
        "reconstruction": residual.square().sum(1).mean(),
        "sparsity": weight * V * soft.sum(1).mean(),
        "pre_activation": below * V * short.sum(1).mean(),
    }
    d_hat = 2 * residual / n
    d_z = d_hat @ p["W_dec"].T + weight * V / n * scale * (1 - soft**2)
    silent = (short > 0).double() * below * V / n
    d_pre = d_z * (fires + theta / eps * near) - silent
    d_theta = -(d_z * theta / eps * near).sum(0) + silent.sum(0)
    expected = {
        "W_dec": z.T @ d_hat,
        "W_enc": d_pre.T @ (x - offset),
        "b_enc": d_pre.sum(0),
        "b_dec": d_hat.sum(0) - d_pre.sum(0) @ p["W_enc"],
        "log_threshold": d_theta * theta,
    }
    assert 0 < float(near.mean()) < 1
    for name, value in parts.items():
        torch.testing.assert_close(outcome.parts[name], value, check_dtype=False)
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value)
    assert ("coefficient" in outcome.updates) is (target is not None)


def test_the_penalty_rises_over_the_whole_run_and_latents_become_few():
    learner = new(JumpReLU(N, tanh=0.2, lr=0.02, bandwidth=0.5), steps=60)
    torch.testing.assert_close(learner.parameters["log_threshold"].exp(), torch.full((N,), TANH_THRESHOLD))
    found = run(learner, rows(60))
    l0 = [float(each.fired) / each.rows for each in found]
    assert l0[0] == pytest.approx(N / 16, rel=0.2)
    assert l0[-1] < 0.7 * l0[0]
    each = [float(s.parts["sparsity"]) for s in found]
    assert each[0] < 0.1 * max(each)


def test_the_weight_is_adjusted_to_the_target():
    weights, reached = {}, {}
    for target in (1, 3):
        learner = new(JumpReLU(N, target_l0=target, tanh=0.02, lr=0.01, bandwidth=0.5), steps=100)
        found = run(learner, rows(100))
        reached[target] = sum(float(each.fired) for each in found[-20:]) / 20 / found[0].rows
        weights[target] = float(learner.state["coefficient"])
    assert weights[1] > 1.5 * weights[3]
    assert reached[1] < 0.8 * reached[3] < 3.2


def test_latents_that_never_fire_come_back_by_the_penalty_below_the_threshold():
    found = {}
    for weight in (0.0, 0.05):
        config = JumpReLU(N, target_l0=3, pre_activation=weight, aux_coefficient=0, dead_after_rows=100, lr=0.1)
        learner = new(config)
        learner.parameters["b_enc"][:6] -= 9
        run(learner, rows(40))
        found[weight] = int((learner.rows_since_fired[:6] > 300).sum())
    assert found[0.0] == 6
    assert found[0.05] < 3


@pytest.mark.parametrize("config", [
    JumpReLU(N, tanh=0.02, pre_activation=1e-3, bandwidth=0.5, dead_after_rows=100),
    JumpReLU(N, target_l0=3, tanh=0.02, bandwidth=0.5, dead_after_rows=100),
])  # fmt: skip
def test_resumed_exactly_and_alone_as_together(config, tmp_path):
    data, settings = torch.cat(rows(12)), TrainSettings(batch_rows=64, checkpoint_every=4, log_every=1)
    options = {"tokens": 768, "settings": settings, "progress": False}
    whole = train([config, JumpReLU(N, target_l0=3)], data, seeds=[0, 1], **options)

    def stop(record):
        if record["step"] == 6:
            raise KeyError

    with pytest.raises(KeyError):
        train(config, data, seeds=[1], **options, out=tmp_path, callbacks=[stop])
    (again,) = train(config, data, seeds=[1], **options, out=tmp_path, resume=True)
    assert all(torch.equal(t, again.tensors()[name]) for name, t in whole[1].tensors().items())
    assert again.rule.name == "jumprelu"
    assert again.d_in == D


@pytest.mark.parametrize(
    "settings, match",
    [
        ({}, r"`JumpReLU.target_l0` must be given without `tanh`; got None"),
        ({"target_l0": 3, "tanh": 0.1, "density": 1.0}, r"`JumpReLU.density` must not be given with `tanh`"),
        (
            {"target_l0": 3, "tanh": 0.1, "sparsity": 100},
            r"`JumpReLU.sparsity` must not be given with `tanh`.*=100 and",
        ),
        ({"target_l0": 3, "tanh": -1}, r"`JumpReLU.tanh` must be 0 or a positive number; got -1"),
        ({"target_l0": 3, "tanh": True}, r"`JumpReLU.tanh` must be"),
        ({"target_l0": 3, "tanh": 0.1, "tanh_scale": 0}, r"`JumpReLU.tanh_scale` must be a positive number; got 0"),
        ({"target_l0": 3, "pre_activation": float("nan")}, r"`JumpReLU.pre_activation` must be 0 or a positive"),
        ({"target_l0": 30, "tanh": 0.1}, r"`JumpReLU.target_l0` must be a positive number of latents per row"),
    ],
)
def test_refused(settings, match):
    with pytest.raises(ConfigError, match=match):
        JumpReLU(N, **settings)
