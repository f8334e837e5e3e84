"""A learner: one SAE in training, and the step that advances it.

The step is one seam, ``step(learner, x) -> Statistics``: rows in, statistics out, nothing read back from the device.
Whatever
has this signature (a fused kernel, a learner spread over devices) can take the place of `plain_step`; see `STEPS`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from typing import Any

import torch
from torch import Tensor
from torch.optim.adam import adam

from .. import kernels
from ..sae.model import SAE
from .architectures import ARCHITECTURES, scaling_of
from .config import Matryoshka
from .initialization import first_weights
from .losses import Context, Outcome
from .mutual_regularization import pull

GENERATORS = ("init", "data", "resample")
"""Named random streams of a learner: first weights; sizes drawn during training; rows that dead latents are pointed
at."""

ADAM_EPS = 1e-8
RESAMPLE_UNTIL = 0.6
"""Fraction of the run after which dead latents are no longer resampled."""
RESAMPLE_ENCODER = 0.2
"""Encoder norm of a resampled latent. Unit: mean encoder norm of the latents that are alive."""


@dataclass(frozen=True)
class Settings:
    """A configuration's open values, filled in for one run; see `resolve`."""

    total_steps: int
    batch_rows: int
    lr: float
    warmup_steps: int
    decay_steps: int
    dead_after_rows: int
    k_aux: int
    threshold_start: int
    threshold_decay: float
    precision: str


def resolve(config: Any, d_in: int, total_steps: int, batch_rows: int, precision: str = "fp32") -> Settings:
    """Fill in what depends on the run.

    ============== ============================================================================================
    lr              ``2e-4 * sqrt(2**14 / latents)``
    warmup_steps    min(1000, 5% of the steps)
    dead_after_rows min(10,000,000, 20% of the rows of the run), at least one batch
    k_aux           d_in / 2, rounded, at least 1, at most `latents`
    threshold       averaged from step min(1000, half of the steps) with a memory of min(1000, 5% of the steps) steps
                    (a decay of 0.999 in runs of 20,000 steps and more)
    ============== ============================================================================================
    """
    rows = total_steps * batch_rows
    memory = min(1000.0, max(1.0, 0.05 * total_steps))
    warmup = config.warmup_steps if config.warmup_steps is not None else min(1000, round(0.05 * total_steps))
    dead_after = config.dead_after_rows or max(min(10_000_000, rows // 5), batch_rows)
    k_aux = getattr(config, "k_aux", None) or max(1, round(d_in / 2))
    return Settings(
        total_steps=total_steps,
        batch_rows=batch_rows,
        lr=config.lr or 2e-4 * (2**14 / config.n_latents) ** 0.5,
        warmup_steps=warmup,
        decay_steps=round(config.decay_fraction * total_steps),
        dead_after_rows=dead_after,
        k_aux=min(k_aux, config.n_latents),
        threshold_start=min(1000, total_steps // 2),
        threshold_decay=1 - 1 / memory,
        precision=precision,
    )


@dataclass
class Learner:
    """Everything that changes while one SAE is trained. Every tensor has the latent axis first, except biases of
    width d_in.
    """

    config: Any
    seed: int
    settings: Settings
    center: Tensor
    """Subtracted from scaled rows before the loss, ``[d_in]``: the first `b_dec`."""
    scale: Tensor | None
    """Factor ``[]`` from rows to scaled rows; None for none."""
    parameters: dict[str, Tensor]
    """fp32 master weights."""
    first_moments: dict[str, Tensor]
    """Adam's running mean of the gradient, by parameter."""
    second_moments: dict[str, Tensor]
    """Adam's running mean of the squared gradient, by parameter."""
    rows_since_fired: Tensor
    """Rows seen since each latent last fired, ``[n_latents]`` int64."""
    state: dict[str, Tensor]
    """Running values of the objective."""
    generators: dict[str, torch.Generator]
    step: int = 0
    """Steps done."""
    peers: list[Learner] = field(default_factory=list, repr=False, compare=False)
    """The other seeds, where `mutual` ties them together."""

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.center.device

    @property
    def rows_seen(self) -> int:
        """Rows of the steps done."""
        return self.step * self.settings.batch_rows


@dataclass(frozen=True)
class Statistics:
    """What one step reports: scalars on the learner's device. Divide sums by `rows`."""

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
    """Terms of the loss and other scalars of the objective, times rows."""


Step = Callable[[Learner, Tensor], Statistics]


def generator(seed: int, name: str) -> torch.Generator:
    """The random stream `name` of a seed; streams of neighbouring seeds are unrelated."""
    digest = hashlib.sha256(f"saekit.train {name} {seed}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "little"))


def start_learner(
    config: Any,
    seed: int,
    settings: Settings,
    *,
    bias: Tensor,
    scale: Tensor | None,
    sample: Tensor,
    device: torch.device | str,
) -> Learner:
    """A learner at step 0.

    Parameters
    ----------
    config
        Configuration of an architecture.
    seed
        Determines first weights and every later draw.
    settings
        From `resolve`.
    bias
        First `b_dec` in the units of the rows, ``[d_in]``.
    scale
        From `start_scale`.
    sample
        Some rows ``[n, d_in]`` in their own units, for first thresholds.
    device
        Where to train.
    """
    streams = {name: generator(seed, name) for name in GENERATORS}
    center = bias if scale is None else bias * scale
    parameters = first_weights(config.n_latents, len(bias), streams["init"])
    parameters["b_dec"] = center.clone()
    row = ARCHITECTURES[config.arch]
    scaled = sample if scale is None else sample * scale
    parameters |= row.extra(config, parameters, scaled - center)
    parameters = {name: kernels.moved_to_large_pages(t.to(device)) for name, t in parameters.items()}
    first, second = (
        {name: kernels.moved_to_large_pages(torch.zeros_like(t)) for name, t in parameters.items()} for _ in range(2)
    )
    state = {name: torch.tensor(value, dtype=torch.float32, device=device) for name, value in row.state(config).items()}
    return Learner(
        config=config,
        seed=seed,
        settings=settings,
        center=center.to(device),
        scale=None if scale is None else scale.to(device),
        parameters=parameters,
        first_moments=first,
        second_moments=second,
        rows_since_fired=torch.zeros(config.n_latents, dtype=torch.int64, device=device),
        state=state,
        generators=streams,
    )


def learning_rate(settings: Settings, step: int) -> float:
    """Rate in the step after `step` steps: linear warm-up from 0, constant, linear decay to 0 at the end."""
    rate = settings.lr
    if settings.warmup_steps:
        rate *= min(1.0, (step + 1) / settings.warmup_steps)
    if settings.decay_steps:
        rate *= min(1.0, (settings.total_steps - step) / settings.decay_steps)
    return rate


def plain_step(learner: Learner, x: Tensor) -> Statistics:
    """One step in plain torch: loss, gradient, clipping, Adam, unit decoder rows, counters.

    Parameters
    ----------
    learner
        Changed in place.
    x
        Rows ``[n, d_in]`` on the learner's device, in their own units; not changed.
    """
    settings = learner.settings
    u = x if learner.scale is None else x * learner.scale
    centered = u - learner.center
    outcome, gradients = _differentiate(learner, centered)
    loss, parts = outcome.loss.detach(), outcome.parts
    if learner.peers:
        others = [peer.parameters["W_dec"] for peer in learner.peers]
        penalty, gradient = pull(learner.parameters["W_dec"], others, learner.config.mutual)
        gradients["W_dec"] = gradients["W_dec"] + gradient
        loss, parts = loss + penalty, {**parts, "mutual": penalty}
    norm = _update(learner, gradients)
    learner.state |= outcome.updates
    fires = outcome.fired > 0
    learner.rows_since_fired = torch.where(fires, 0, learner.rows_since_fired + len(x))
    learner.step += 1
    if _resamples_now(learner):
        _resample(learner, outcome.residual)
    error = outcome.residual.pow(2).sum()
    return Statistics(
        rows=len(x),
        loss=loss * len(x),
        error=error if learner.scale is None else error / learner.scale**2,
        fired=outcome.fired.sum(),
        dead=(learner.rows_since_fired >= settings.dead_after_rows).sum(),
        grad_norm=norm * len(x),
        finite=torch.isfinite(loss) & torch.isfinite(norm),
        parts={name: value * len(x) for name, value in parts.items()},
    )


STEPS: dict[str, Step] = {"plain": plain_step}
"""Steps by name; `saekit.training.fused` adds its own."""


def trained_parameters(config: Any) -> set[str] | None:
    """Names that a control keeps fixed; None when nothing is trained at all."""
    return {"untrained": None, "frozen-decoder": {"W_dec"}, "frozen-encoder": {"W_enc"}, None: set()}[config.control]


def _differentiate(learner: Learner, x: Tensor) -> tuple[Outcome, dict[str, Tensor]]:
    """The objective's outcome and the gradient of each trained parameter."""
    fixed = trained_parameters(learner.config)
    loss_of = ARCHITECTURES[learner.config.arch].loss
    context = _context(learner)
    with (
        torch.set_grad_enabled(fixed is not None),
        torch.autocast(x.device.type, torch.bfloat16, enabled=learner.settings.precision == "bf16"),
    ):
        if fixed is None:
            return loss_of(learner.parameters, x, context), {}
        leaves = {n: t.detach().requires_grad_(n not in fixed) for n, t in learner.parameters.items()}
        outcome = loss_of(leaves, x, context)
    trained = [name for name in leaves if name not in fixed]
    gradients = torch.autograd.grad(
        outcome.loss, [leaves[name] for name in trained], allow_unused=True, materialize_grads=True
    )
    return outcome, dict(zip(trained, gradients))


def _context(learner: Learner) -> Context:
    config, settings = learner.config, learner.settings
    # No latent can be dead before that many rows: known without asking the device.
    can_be_dead = learner.rows_seen >= settings.dead_after_rows
    return Context(
        config=config,
        center=learner.center,
        state=learner.state,
        dead=learner.rows_since_fired >= settings.dead_after_rows if can_be_dead else None,
        k_aux=settings.k_aux,
        step=learner.step,
        total_steps=settings.total_steps,
        warmup_steps=settings.warmup_steps,
        threshold_start=settings.threshold_start,
        threshold_decay=settings.threshold_decay,
        sizes=_draw_sizes(config, learner.generators["data"]) if getattr(config, "sampled", 0) else None,
    )


def _draw_sizes(config: Matryoshka, stream: torch.Generator) -> tuple[int, ...]:
    """`sampled` prefix lengths, log-uniform between latents / 64 and latents, and the full size."""
    low = max(1.0, config.n_latents / 64)
    share = torch.rand(config.sampled, generator=stream, dtype=torch.float64)
    drawn = (low * (config.n_latents / low) ** share).long().clamp(1, config.n_latents - 1 or 1).tolist()
    return (*sorted(drawn), config.n_latents)


def _update(learner: Learner, gradients: dict[str, Tensor]) -> Tensor:
    """Projection, clipping, Adam, unit rows. Returns the norm of the gradient before clipping."""
    if not gradients:
        return torch.zeros((), device=learner.device)
    config, parameters = learner.config, learner.parameters
    unit = ARCHITECTURES[config.arch].unit_decoder and "W_dec" in gradients
    with torch.no_grad():
        if unit:  # what would only change the length of a decoder row is undone below; keep it out of the moments
            W, g = parameters["W_dec"], gradients["W_dec"]
            gradients["W_dec"] = torch.addcmul(g, (g * W).sum(1, keepdim=True), W, value=-1)
        names = list(gradients)
        values = [gradients[name] for name in names]
        norm = torch.nn.utils.get_total_norm(values)
        if config.clip is not None:
            factor = (config.clip / (norm + 1e-6)).clamp(max=1.0)
            torch._foreach_mul_(values, factor)
        rate = learning_rate(learner.settings, learner.step)
        rates = ARCHITECTURES[config.arch].rates
        for multiple in sorted({rates.get(name, 1.0) for name in names}):
            group = [name for name in names if rates.get(name, 1.0) == multiple]
            adam(
                [parameters[name] for name in group],
                [gradients[name] for name in group],
                [learner.first_moments[name] for name in group],
                [learner.second_moments[name] for name in group],
                [],
                [torch.tensor(float(learner.step), device=learner.device) for _ in group],
                fused=True,
                amsgrad=False,
                beta1=config.betas[0],
                beta2=config.betas[1],
                lr=rate * multiple,
                weight_decay=0.0,
                eps=ADAM_EPS,
                maximize=False,
            )
        if unit:
            W = parameters["W_dec"]
            W.div_(W.norm(dim=1, keepdim=True).clamp(min=1e-12))
    return norm


def _resamples_now(learner: Learner) -> bool:
    """Whether another `dead_after_rows` rows have gone by with this step, in the part of the run that resamples."""
    settings = learner.settings
    if not getattr(learner.config, "resample", False) or learner.config.control is not None:
        return False
    if learner.step > RESAMPLE_UNTIL * settings.total_steps:
        return False
    before = learner.rows_seen - settings.batch_rows
    return learner.rows_seen // settings.dead_after_rows > before // settings.dead_after_rows


def _resample(learner: Learner, residual: Tensor) -> None:
    """Point dead latents at badly reconstructed rows: direction of the residual, drawn with probability ~ its squared
    length.
    """
    dead = learner.rows_since_fired >= learner.settings.dead_after_rows
    p = learner.parameters
    chance = (
        residual.pow(2).sum(1).double().cumsum(0) if learner.device.type != "mps" else residual.pow(2).sum(1).cumsum(0)
    )
    drawn = torch.rand(len(dead), generator=learner.generators["resample"]).to(chance)
    rows = torch.searchsorted(chance, drawn * chance[-1]).clamp(max=len(residual) - 1)
    direction = residual[rows]
    direction = direction / direction.norm(dim=1, keepdim=True).clamp(min=1e-12)
    norms = p["W_enc"].norm(dim=1)
    alive = (norms * ~dead).sum() / (~dead).sum().clamp(min=1)
    fresh = {name: torch.zeros_like(t) for name, t in p.items()}
    fresh |= {"W_dec": direction, "W_enc": direction * alive * RESAMPLE_ENCODER}
    for name in latent_parameters(learner):
        mask = dead.view(-1, *[1] * (p[name].ndim - 1))
        p[name] = torch.where(mask, fresh[name], p[name])
        for moments in (learner.first_moments, learner.second_moments):
            moments[name] = torch.where(mask, 0.0, moments[name])
    learner.rows_since_fired = torch.where(dead, 0, learner.rows_since_fired)


def latent_parameters(learner: Learner) -> list[str]:
    """Names of the parameters with a latent axis: all but `b_dec`."""
    return [name for name in learner.parameters if name != "b_dec"]


def permute(learner: Learner, order: Tensor) -> Learner:
    """The same learner with new latent j = old latent ``order[j]``: parameters, both moments and the counter.

    The random streams are shared with the old learner; go on with one of the two only.
    """
    names = latent_parameters(learner)

    def move(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        return {name: t[order] if name in names else t.clone() for name, t in tensors.items()}

    values = {f.name: getattr(learner, f.name) for f in fields(learner)}
    values |= {name: move(values[name]) for name in ("parameters", "first_moments", "second_moments")}
    values |= {"rows_since_fired": learner.rows_since_fired[order], "state": dict(learner.state)}
    return Learner(**values)


def finish(learner: Learner, provenance: dict[str, Any]) -> SAE:
    """The learner as an SAE: the training rule frozen into one that works row by row."""
    row = ARCHITECTURES[learner.config.arch]
    parameters = {name: t.detach().clone() for name, t in learner.parameters.items()}
    scaling = scaling_of(learner.scale)
    return row.finish(learner.config, parameters, learner.state, {"scaling": scaling, "provenance": provenance})


def tensors_of(learner: Learner) -> dict[str, Tensor]:
    """Everything that a checkpoint must hold, by name."""
    groups = {
        "parameters": learner.parameters,
        "first": learner.first_moments,
        "second": learner.second_moments,
        "state": learner.state,
        "generator": {name: stream.get_state() for name, stream in learner.generators.items()},
        "": {"rows_since_fired": learner.rows_since_fired, "center": learner.center},
    }
    if learner.scale is not None:
        groups[""]["scale"] = learner.scale
    return {f"{group}.{name}".lstrip("."): t for group, tensors in groups.items() for name, t in tensors.items()}


def restore(learner: Learner, tensors: dict[str, Tensor], step: int) -> None:
    """Put back what `tensors_of` gave, in place."""

    def fresh(name: str) -> Tensor:
        # New memory: a file's bytes lie at any address, and sums over unaligned memory can round in another order.
        return tensors[name].to(learner.device, copy=True)

    def group(prefix: str, now: dict[str, Tensor]) -> dict[str, Tensor]:
        return {name: fresh(f"{prefix}.{name}") for name in now}  # in the same order: sums over parameters depend on it

    learner.parameters, learner.state = group("parameters", learner.parameters), group("state", learner.state)
    learner.first_moments = group("first", learner.first_moments)
    learner.second_moments = group("second", learner.second_moments)
    for name, stream in learner.generators.items():
        stream.set_state(tensors[f"generator.{name}"].cpu().clone())
    learner.rows_since_fired, learner.center = fresh("rows_since_fired"), fresh("center")
    learner.scale = fresh("scale") if "scale" in tensors else None
    learner.step = step
