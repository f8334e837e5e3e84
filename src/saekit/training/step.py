"""The step of a learner in plain torch: loss, gradient, projection, clipping, Adam, unit decoder rows, dead latents.

The step is one seam, ``step(learner, x) -> Statistics``, of a transcoder ``step(learner, x, target)``: rows in,
statistics out, nothing read back from the device. Whatever has this signature (a fused kernel, a learner spread over
devices) can take the place of `plain_step`; see `STEPS`.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from torch.optim.adam import adam

from ..kernels import with_one_torch_thread
from .architectures import ARCHITECTURES
from .config import BatchTopK, Config, Matryoshka, TopK, has_signs
from .initialization import LEAST_NORM, unit_rows
from .learner import Learner, ResolvedConfig, latent_parameters
from .losses import Context, Outcome, variance
from .mesh import gathered, norm_of, over_latents, over_rows, reduce_gradients, sum_over_rows
from .mutual_regularization import pull
from .penalties import constrain, has_penalties, penalize

ADAM_EPS = 1e-8
"""PyTorch's default. The 6.25e-10 of 2406.04093 is for rows of norm 1; here they have norm ``sqrt(d_in)``."""
RESAMPLE_UNTIL = 0.6
"""Fraction of the run after which dead latents are no longer resampled: the last ones need the rest of the run to
settle, and the decay of the learning rate must not find them fresh."""
RESAMPLE_ENCODER = 0.2
"""Encoder norm of a resampled latent, small so that it does not disturb the others at once (Bricken et al. 2023). Unit:
mean encoder norm of the latents that are alive."""
CLIP_EPS = 1e-6
"""Keeps the clipping factor finite where the gradient is 0; the value of `torch.nn.utils.clip_grad_norm_`."""
SMALL = 2**28
"""Largest product of rows and encoder in a step that torch does on one thread: a second one saves about a tenth of its
time on an idle machine, and costs several times it where another process runs (``benchmarks/README.md``). Unit:
multiply-adds."""


@dataclass(frozen=True)
class Statistics:
    """Report of one step: scalars on the learner's device. Divide sums by `rows`."""

    rows: int
    """Rows of the batch."""
    loss: Tensor
    """Loss (mean over rows) times rows."""
    error: Tensor
    """Sum over rows of ``||x - x_hat||^2`` in the units of the rows."""
    fired: Tensor
    """Number of codes that are not zero in the batch."""
    dead: Tensor
    """Latents that have not fired for `dead_after_rows` rows, after this step."""
    grad_norm: Tensor
    """L2 norm of the gradient before clipping, times rows."""
    finite: Tensor
    """Whether loss and gradient were finite."""
    parts: dict[str, Tensor]
    """Terms of the loss and other scalars to log, times rows."""
    own_finite: Tensor | None = None
    """Whether the part of the loss that this rank computed was finite; None for one process."""


class Step(Protocol):
    """A step of a learner, as `plain_step`."""

    def __call__(self, learner: Learner, x: Tensor, target: Tensor | None = None) -> Statistics:
        """Change the learner in place; return what to log."""
        ...


def small_on_one_thread(step: Step) -> Step:
    """Return a step in which torch has one thread where the step is small; the loops of our kernels have all."""

    @functools.wraps(step)
    def sized(learner: Learner, x: Tensor, target: Tensor | None = None) -> Statistics:
        small = len(x) * learner.parameters["W_enc"].numel() <= SMALL
        if small and x.device.type == "cpu" and learner.mesh.size == 1:
            return with_one_torch_thread(lambda: step(learner, x, target))
        return step(learner, x, target)

    return sized


def learning_rate(resolved: ResolvedConfig, step: int) -> float:
    """Return the rate after `step` steps: linear warm-up from 0, constant, linear decay to 0 at the end."""
    rate = resolved.lr
    if resolved.warmup_steps:
        rate *= min(1.0, (step + 1) / resolved.warmup_steps)
    if resolved.decay_steps:
        rate *= min(1.0, (resolved.total_steps - step) / resolved.decay_steps)
    return rate


@small_on_one_thread
def plain_step(learner: Learner, x: Tensor, target: Tensor | None = None) -> Statistics:
    """Do one step in plain torch: loss, gradient, clipping, Adam, unit decoder rows, counters.

    Pre-activations and dense codes are made a block of rows at a time: see `sparse_autograd` and `dense_autograd`.

    Parameters
    ----------
    learner
        Changed in place.
    x
        Rows ``[n, d_in]`` on the learner's device, in their own units; not changed.
    target
        What a transcoder must give for them, ``[n, d_out]``.
    """
    u = x if learner.scale is None else x * learner.scale
    centred, goal = u - learner.center, learner.goal(target)
    outcome, gradients = _differentiate(learner, centred, goal)
    loss, parts = outcome.loss.detach(), outcome.parts
    if learner.peers:
        others = [peer.parameters["W_dec"] for peer in learner.peers]
        penalty, gradient = pull(learner.parameters["W_dec"], others, learner.config.mutual, has_signs(learner.config))
        gradients["W_dec"] = gradients["W_dec"] + gradient
        loss, parts = loss + penalty, {**parts, "mutual": penalty}
    mesh, n_rows = learner.mesh, len(x) * learner.mesh.data_size
    own_finite = None if mesh.size == 1 else torch.isfinite(loss)
    error, fired = outcome.residual.pow(2).sum(), sum_over_rows(mesh, outcome.fired)
    if mesh.data_size > 1:
        own = over_rows(mesh, torch.stack([loss, error, *(each.to(loss) for each in parts.values())]))
        loss, error, parts = own[0], own[1] * mesh.data_size, dict(zip(parts, own[2:]))
    reduce_gradients(mesh, gradients)
    if has_penalties(learner.config):
        terms = penalize(learner, variance(u if goal is None else goal, mesh), gradients)
        loss, parts = loss + sum(terms.values()), {**parts, **terms}
    norm = _update(learner, gradients)
    learner.state |= outcome.updates
    learner.rows_since_fired = torch.where(fired > 0, 0, learner.rows_since_fired + n_rows)
    learner.step += 1
    if resamples_now(learner):
        read = None if goal is None else gathered(mesh, centred, "data")
        resample(learner, gathered(mesh, outcome.residual, "data"), read)
    constrain(learner)
    dead = (learner.rows_since_fired >= learner.resolved.dead_after_rows).sum()
    if mesh.latent_size > 1:
        total = over_latents(mesh, torch.stack([fired.sum().double(), dead.double()]))
        fired, dead = total[:1].to(fired), total[1].long()
    return Statistics(
        rows=n_rows,
        loss=loss * n_rows,
        error=error if learner.output_scale is None else error / learner.output_scale**2,
        fired=fired.sum(),
        dead=dead,
        grad_norm=norm * n_rows,
        finite=torch.isfinite(loss) & torch.isfinite(norm),
        parts={name: value * n_rows for name, value in parts.items()},
        own_finite=own_finite,
    )


STEPS: dict[str, Step] = {"plain": plain_step}
"""Steps by name; `saekit.training.fused` adds its own."""


def frozen_parameters(config: Config) -> set[str] | None:
    """Return the names of the parameters that `control` keeps as they are; None for all."""
    frozen = {"frozen-decoder": {"W_dec"}, "frozen-encoder": {"W_enc"}}
    return None if config.control == "untrained" else frozen.get(config.control or "", set())


def context_of(learner: Learner, goal: Tensor | None = None) -> Context[Config]:
    """Return what the loss of the learner's next step needs besides parameters and rows; `goal` of a transcoder."""
    config, resolved = learner.config, learner.resolved
    # No latent can be dead before that many rows: known without asking the device.
    can_be_dead = learner.rows_seen >= resolved.dead_after_rows
    return Context(
        config=config,
        center=learner.center if learner.target_center is None else learner.target_center,
        target=goal,
        state=learner.state,
        dead=learner.rows_since_fired >= resolved.dead_after_rows if can_be_dead else None,
        k_aux=resolved.k_aux,
        step=learner.step,
        total_steps=resolved.total_steps,
        warmup_steps=resolved.warmup_steps,
        threshold_start=max(resolved.threshold_start, _annealed_until(config, resolved.total_steps)),
        threshold_decay=resolved.threshold_decay,
        mesh=learner.mesh,
        seed=learner.seed,
        sizes=_draw_sizes(config, learner.generators["data"])
        if isinstance(config, Matryoshka) and config.sampled
        else None,
    )


def _annealed_until(config: Config, total_steps: int) -> int:
    """Return the steps until `k` is reached, before which no threshold over the batch is averaged."""
    is_annealed = isinstance(config, TopK | BatchTopK) and config.k_start is not None
    return round(config.k_fraction * total_steps) if is_annealed else 0  # type: ignore[attr-defined]


def resamples_now(learner: Learner) -> bool:
    """Return whether dead latents are resampled after this step.

    They are whenever another `dead_after_rows` rows have gone by, so that a resampled latent has a whole window to fire
    in, in the first part of the run.
    """
    resolved = learner.resolved
    if not getattr(learner.config, "resample", False) or learner.config.control is not None:
        return False
    if learner.step > RESAMPLE_UNTIL * resolved.total_steps:
        return False
    before = learner.rows_seen - resolved.batch_rows
    return learner.rows_seen // resolved.dead_after_rows > before // resolved.dead_after_rows


def resample(learner: Learner, residual: Tensor, read: Tensor | None = None) -> None:
    """Point dead latents at badly reconstructed rows: direction of the residual, drawn with probability ~ its squared
    length.

    Parameters
    ----------
    learner
        Changed in place.
    residual
        ``x - x_hat`` of the rows of the step ``[n, d_out]``.
    read
        Centred rows ``[n, d_in]`` that the encoder of a transcoder is pointed at; None: the residual.
    """
    dead = learner.rows_since_fired >= learner.resolved.dead_after_rows
    p = learner.parameters
    squares = residual.pow(2).sum(1)
    chance = (squares if learner.device.type == "mps" else squares.double()).cumsum(0)
    # One draw per latent, dead or not: what is drawn does not depend on how many are dead.
    drawn = torch.rand(learner.config.n_latents, generator=learner.generators["resample"]).to(chance)
    drawn = drawn[learner.mesh.latents_of(len(drawn))]
    rows = torch.searchsorted(chance, drawn * chance[-1]).clamp(max=len(residual) - 1)
    direction = unit_rows(residual[rows])
    encoded = direction if read is None else unit_rows(read[rows])
    norms = p["W_enc"].norm(dim=1)
    total = over_latents(learner.mesh, torch.stack([(norms * ~dead).sum(), (~dead).sum().to(norms)]))
    alive = total[0] / total[1].clamp(min=1)
    fresh = {name: torch.zeros_like(t) for name, t in p.items()}
    fresh |= {"W_dec": direction, "W_enc": encoded * alive * RESAMPLE_ENCODER}
    for name in latent_parameters(learner):
        mask = dead.view(-1, *[1] * (p[name].ndim - 1))
        p[name] = torch.where(mask, fresh[name], p[name])
        for moments in (learner.first_moments, learner.second_moments):  # they are about the old direction
            moments[name] = torch.where(mask, 0.0, moments[name])
    learner.rows_since_fired = torch.where(dead, 0, learner.rows_since_fired)


def _differentiate(learner: Learner, x: Tensor, goal: Tensor | None) -> tuple[Outcome, dict[str, Tensor]]:
    """Return the outcome of the loss and the gradient of each trained parameter."""
    frozen = frozen_parameters(learner.config)
    loss_of = ARCHITECTURES[learner.config.arch].loss
    context = context_of(learner, goal)
    with (
        torch.set_grad_enabled(frozen is not None),
        torch.autocast(x.device.type, torch.bfloat16, enabled=learner.resolved.precision == "bf16"),
    ):
        if frozen is None:
            return loss_of(learner.parameters, x, context), {}
        leaves = {n: t.detach().requires_grad_(n not in frozen) for n, t in learner.parameters.items()}
        outcome = loss_of(leaves, x, context)
    trained = [name for name in leaves if name not in frozen]
    gradients = torch.autograd.grad(
        outcome.loss, [leaves[name] for name in trained], allow_unused=True, materialize_grads=True
    )
    return outcome, dict(zip(trained, gradients))


def _draw_sizes(config: Matryoshka, stream: torch.Generator) -> tuple[int, ...]:
    """Draw `sampled` prefix lengths, log-uniform from n_latents / 64 to n_latents, and add the full size."""
    low = max(1.0, config.n_latents / 64)
    power = torch.rand(config.sampled, generator=stream, dtype=torch.float64)
    drawn = (low * (config.n_latents / low) ** power).long().clamp(1, config.n_latents - 1 or 1).tolist()
    return (*sorted(drawn), config.n_latents)


def _update(learner: Learner, gradients: dict[str, Tensor]) -> Tensor:
    """Project, clip, descend and normalize; return the norm of the gradient before clipping."""
    if not gradients:
        return torch.zeros((), device=learner.device)
    config, parameters = learner.config, learner.parameters
    unit = ARCHITECTURES[config.arch].unit_decoder and "W_dec" in gradients
    with torch.no_grad():
        if unit:  # what would only change the length of a decoder row is undone below; keep it out of the moments
            W, g = parameters["W_dec"], gradients["W_dec"]
            gradients["W_dec"] = torch.addcmul(g, (g * W).sum(1, keepdim=True), W, value=-1)
        values = list(gradients.values())
        norm = norm_of(learner.mesh, gradients)  # after the projection: clipping sees what the step will do
        if config.clip is not None:
            torch._foreach_mul_(values, (config.clip / (norm + CLIP_EPS)).clamp(max=1.0))
        _descend(learner, gradients)
        if unit:
            W = parameters["W_dec"]
            W.div_(W.norm(dim=1, keepdim=True).clamp(min=LEAST_NORM))
    return norm


def _descend(learner: Learner, gradients: dict[str, Tensor]) -> None:
    """Do one step of Adam, with the rates of the architecture."""
    rate = learning_rate(learner.resolved, learner.step)
    rates = ARCHITECTURES[learner.config.arch].rates
    for multiple in sorted({rates.get(name, 1.0) for name in gradients}):  # torch's Adam has one rate per call
        group = [name for name in gradients if rates.get(name, 1.0) == multiple]
        adam(
            params=[learner.parameters[name] for name in group],
            grads=[gradients[name] for name in group],
            exp_avgs=[learner.first_moments[name] for name in group],
            exp_avg_sqs=[learner.second_moments[name] for name in group],
            max_exp_avg_sqs=[],
            state_steps=[torch.tensor(float(learner.step), device=learner.device) for _ in group],
            fused=True,
            amsgrad=False,
            beta1=learner.config.betas[0],
            beta2=learner.config.betas[1],
            lr=rate * multiple,
            weight_decay=0.0,
            eps=ADAM_EPS,
            maximize=False,
        )
