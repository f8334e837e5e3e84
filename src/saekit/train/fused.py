"""The fast step behind the seam of `saekit.train.learner`: sparse products of `saekit.kernels.cpu`, no dense gradient.

Each architecture has one function here. It finds the (row, latent) pairs that matter by a bf16 product with a bound and
multiplies them again in fp32, differentiates the objective of `saekit.train.objective` for these pairs alone, and hands
the gradient of each latent to one pass of projection, clipping and Adam. What it returns is what `plain_step` returns,
up to the rounding of sums. A step whose codes are dense (a penalty that has not yet had its effect) is left to
`plain_step`; which of the two runs depends on the weights and rows of that step only.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from .. import kernels
from .architectures import ARCHITECTURES
from .config import (
    BatchTopK,
    Gated,
    HierarchicalTopK,
    JumpReLU,
    Matryoshka,
    Relu,
    TopK,
    hierarchical_levels,
    matryoshka_selection,
    matryoshka_sizes,
)
from .learner import (
    ADAM_EPS,
    STEPS,
    Learner,
    Statistics,
    _context,
    _resample,
    _resamples_now,
    learning_rate,
    plain_step,
)
from .objective import Context, _controlled, _k_of, threshold_updates

if TYPE_CHECKING:
    from ..kernels.cpu import Encoder, Fit, Gradients, Pairs

DENSE = 1 / 4
"""Share of the latents that one row may have above their level; beyond that a step is left to `plain_step`."""

MOST_DECODED = 6
"""Times k that the levels of a hierarchical SAE may sum to; with more levels the step is left to `plain_step`."""

GUESSES = (0.95, 0.75)
"""Levels for the selection over a batch that are tried, as multiples of the last batch's smallest code."""


def default_step(device: torch.device) -> str:
    """The name of the step that a run on this device uses when none is asked for."""
    return "fused" if device.type == "cpu" and kernels.fast_here() else "plain"


def fuses(learner: Learner) -> bool:
    """Whether this learner's step has a fast path here: everything trained, on the CPU, enough latents to pay."""
    config = learner.config
    simple = type(config) in _PATHS and config.control is None and not getattr(config, "multi_topk", 0)
    k = getattr(config, "k", None) or config.target_l0 or 1
    return simple and kernels.topk_step_runs(learner.parameters, k)


@dataclass(frozen=True)
class _State:
    """What the functions below start from."""

    config: Any
    p: dict[str, Tensor]
    u: Tensor
    """Scaled and centred rows ``[n, d]``."""
    offset: Tensor
    encoder: Encoder
    context: Context
    settings: kernels.TopKSettings


@dataclass(frozen=True)
class _Found:
    """What they return."""

    fit: Fit
    """The reconstruction of the full size."""
    gradients: Gradients
    others: dict[str, np.ndarray]
    """Gradient of `b_dec` and of weights that not every architecture has."""
    fired: np.ndarray
    """Rows in which each latent fired, ``[n_latents]``."""
    parts: dict[str, float]
    """Terms of the loss, means over rows."""
    scalars: dict[str, Tensor] = field(default_factory=dict)
    """Further numbers to log."""
    updates: dict[str, Tensor] = field(default_factory=dict)
    """New running values."""


def fused_step(learner: Learner, x: Tensor) -> Statistics:
    """One step without a dense gradient, where there is such a path; `plain_step` otherwise.

    The codes are those of the fp32 product whatever the precision of the run. Weights agree with `plain_step` up to the
    rounding of sums.

    Parameters
    ----------
    learner
        Changed in place.
    x
        Rows ``[n, d_in]`` on the learner's device, in their own units; not changed.
    """
    if not fuses(learner) or not len(x):
        return plain_step(learner, x)
    from ..kernels import cpu

    config, settings, p = learner.config, learner.settings, learner.parameters
    u = cpu.centered(x, learner.scale, learner.center)
    offset = p["b_dec"] - learner.center
    draws = learner.generators["data"].get_state()
    context = _context(learner)
    k = getattr(config, "k", 1)
    aux = kernels.TopKSettings(k, config.clip, settings.k_aux, getattr(config, "aux_coefficient", 0.0))
    state = _State(config, p, u, offset, cpu.encoder_at(p["W_enc"], p["b_enc"], offset), context, aux)
    found = _PATHS[type(config)](state)
    if found is None:
        learner.generators["data"].set_state(draws)  # what was drawn for this step is drawn again
        return plain_step(learner, x)
    row = ARCHITECTURES[config.arch]
    beta1, beta2 = config.betas
    adam = kernels.Adam(learning_rate(settings, learner.step), learner.step + 1, beta1, beta2, ADAM_EPS)
    length = cpu.descend(
        p, learner.first_moments, learner.second_moments, found.gradients, found.others, adam,
        clip=config.clip, unit=row.unit_decoder, rates=row.rates,
    )  # fmt: skip
    learner.state |= found.updates
    fired = torch.from_numpy(found.fired)
    learner.rows_since_fired = torch.where(fired > 0, 0, learner.rows_since_fired + len(x))
    learner.step += 1
    if _resamples_now(learner):
        _resample(learner, found.fit.gradient * (-len(x) / 2))
    parts = {name: torch.tensor(value * len(x), dtype=torch.float32) for name, value in found.parts.items()}
    loss = torch.stack(list(parts.values())).sum()
    error, norm = torch.tensor(found.fit.error), torch.tensor(length)
    return Statistics(
        rows=len(x),
        loss=loss,
        error=error if learner.scale is None else error / learner.scale**2,
        fired=torch.tensor(float(found.fired.sum())),
        dead=(learner.rows_since_fired >= settings.dead_after_rows).sum(),
        grad_norm=norm * len(x),
        finite=torch.isfinite(loss) & torch.isfinite(norm),
        parts=parts | {name: value * len(x) for name, value in found.scalars.items()},
    )


STEPS["fused"] = fused_step


# ---------------------------------------------------------------- the top-k family


def _topk(s: _State) -> _Found:
    from ..kernels import cpu

    return _selected(s, cpu.topk_pairs(s.u, s.encoder, s.config.k))


def _batchtopk(s: _State) -> _Found | None:
    chosen = _choose_batch(s)
    return None if chosen is None else _selected(s, *chosen)


def _selected(s: _State, pairs: Pairs, smallest: float | None = None) -> _Found:
    """Codes that are what was chosen, and AuxK."""
    from ..kernels import cpu

    fit = cpu.reconstruct(s.u, pairs, pairs.values, s.p["W_dec"], s.offset)
    aux, revived = cpu.revive(s.u, fit, s.encoder, s.p["W_dec"], s.context.dead, s.settings)
    g = cpu.gradients(
        s.u, s.offset, s.p, pairs, pairs.values > 0, pairs.values, fit.slopes, fit.gradient, revived=revived
    )
    parts = _with_aux({"reconstruction": fit.error / len(s.u)}, aux, s)
    return _Found(fit, g, {"b_dec": fit.columns + g.of_offset}, g.counts, parts, updates=_threshold(s, smallest))


def _choose_batch(s: _State) -> tuple[Pairs, float] | None:
    """The ``k * rows`` largest pre-activations of the batch (all that equal the smallest of them), and the smallest."""
    from ..kernels import cpu

    count = s.config.k * len(s.u)
    n_latents = len(s.p["b_enc"])
    for share in GUESSES:
        level = share * float(s.context.state["last_smallest"])
        if not 0 < level < float("inf"):
            return None
        pairs = cpu.pairs_above(s.u, s.encoder, torch.full((n_latents,), level), _room(s))
        if pairs is None:
            return None
        more = len(pairs.values) - count
        if more >= 0:
            edge = np.partition(pairs.values, more)[more]
            return pairs.where(pairs.values >= edge), float(edge)
    return None


def _matryoshka(s: _State) -> _Found | None:
    """Every size reconstructs by itself; a latent's gradient sums those of the sizes that it is a part of."""
    from ..kernels import cpu

    config: Matryoshka = s.config
    sizes = s.context.sizes or matryoshka_sizes(config)
    weights = config.weights or (1 / len(sizes),) * len(sizes)
    W_dec, n = s.p["W_dec"], len(s.u)
    smallest = None
    truncated = matryoshka_selection(config) == "truncated"
    if config.over == "batchtopk":
        chosen = _choose_batch(s) if truncated else None
        if chosen is None:
            return None
        pairs, smallest = chosen
    else:
        pairs = cpu.topk_pairs(s.u, s.encoder, config.k)
    error, stack = 0.0, cpu.buffer("gradients of sizes", (len(sizes) * n, s.u.shape[1]))
    columns = np.zeros(s.u.shape[1], np.float32)
    sets: list[Pairs] = []
    slopes: list[np.ndarray] = []
    whole: Fit | None = None
    for index in reversed(range(len(sizes))):
        size, weight = sizes[index], weights[index]
        if size == config.latents:
            own = pairs
        elif truncated:
            own = pairs.where(pairs.latents < size)
        else:
            own = cpu.topk_pairs(s.u, cpu.prefix(s.encoder, size), _k_of(config, size))
        fit = cpu.reconstruct(s.u, own, own.values, W_dec, s.offset, weight, name=str(index))
        whole = whole or fit
        error += weight * fit.error / n
        columns += fit.columns
        place = stack[index * n : (index + 1) * n]
        if truncated and size < config.latents:
            torch.add(stack[(index + 1) * n : (index + 2) * n], fit.gradient, out=place)
            slopes[0][pairs.latents < size] += fit.slopes
        else:
            place.copy_(fit.gradient)
            sets.insert(0, own)
            slopes.insert(0, fit.slopes)
    full = _unweighted(s, whole, weights[-1], pairs)
    aux, revived = cpu.revive(s.u, full, s.encoder, W_dec, s.context.dead, s.settings)
    joined = cpu.join(sets)
    g = cpu.gradients(
        s.u, s.offset, s.p, joined, joined.values > 0, joined.values, np.concatenate(slopes), stack,
        revived=revived, sections=sizes[:-1] if truncated else (),
    )  # fmt: skip
    fired = np.bincount(pairs.latents[pairs.values > 0], minlength=config.latents)
    parts = _with_aux({"reconstruction": error}, aux, s)
    return _Found(full, g, {"b_dec": columns + g.of_offset}, fired, parts, updates=_threshold(s, smallest))


def _hierarchical(s: _State) -> _Found | None:
    """Every level reconstructs from the first of each row's pairs; a pair's gradient sums those of its levels."""
    from ..kernels import cpu

    c: HierarchicalTopK = s.config
    levels = hierarchical_levels(c)
    if sum(levels) > MOST_DECODED * c.k:
        return None
    weights = c.weights or (1 / len(levels),) * len(levels)
    W_dec, n = s.p["W_dec"], len(s.u)
    pairs = cpu.topk_pairs(s.u, s.encoder, c.k)
    values, latents = pairs.values.reshape(n, c.k), pairs.latents.reshape(n, c.k)
    slopes = np.zeros((n, c.k), np.float32)
    error, columns = 0.0, np.zeros(s.u.shape[1], np.float32)
    stack = cpu.buffer("gradients of sizes", (len(levels) * n, s.u.shape[1]))
    rings: list[Pairs] = []
    ring_slopes: list[np.ndarray] = []
    whole: Fit | None = None
    for index in reversed(range(len(levels))):
        level, weight = levels[index], weights[index]
        own = cpu.even_pairs(values[:, :level], latents[:, :level])
        fit = cpu.reconstruct(s.u, own, own.values, W_dec, s.offset, weight, name=str(index))
        whole = whole or fit
        error += weight * fit.error / n
        columns += fit.columns
        slopes[:, :level] += fit.slopes.reshape(n, level)
        place = stack[index * n : (index + 1) * n]
        if index + 1 < len(levels):
            torch.add(stack[(index + 1) * n : (index + 2) * n], fit.gradient, out=place)
        else:
            place.copy_(fit.gradient)
    for start, level in itertools.pairwise((0, *levels)):  # what a level adds goes with the gradients from it on
        rings.append(cpu.even_pairs(values[:, start:level], latents[:, start:level]))
        ring_slopes.append(slopes[:, start:level].ravel())
    full = _unweighted(s, whole, weights[-1], pairs)
    aux, revived = cpu.revive(s.u, full, s.encoder, W_dec, s.context.dead, s.settings)
    joined = cpu.join(rings)
    g = cpu.gradients(
        s.u, s.offset, s.p, joined, joined.values > 0, joined.values, np.concatenate(ring_slopes), stack,
        revived=revived,
    )  # fmt: skip
    parts = _with_aux({"reconstruction": error}, aux, s)
    return _Found(full, g, {"b_dec": columns + g.of_offset}, g.counts, parts)


def _unweighted(s: _State, whole: Fit | None, weight: float, pairs: Pairs) -> Fit:
    """The reconstruction of all pairs without the weight that it has among others."""
    from ..kernels import cpu

    assert whole is not None
    if not weight:  # it has no part in the loss; its residual is still what dead latents explain
        return cpu.reconstruct(s.u, pairs, pairs.values, s.p["W_dec"], s.offset)
    return cpu.Fit(whole.error, whole.gradient / weight, whole.slopes, whole.columns)


def _threshold(s: _State, smallest: float | None) -> dict[str, Tensor]:
    return {} if smallest is None else threshold_updates(s.context, torch.tensor(smallest))


def _with_aux(parts: dict[str, float], aux: float | None, s: _State) -> dict[str, float]:
    if s.config.aux_coefficient and s.context.dead is not None and s.context.k_aux:
        parts["aux"] = aux or 0.0
    return parts


def _sums(latents: np.ndarray, weights: np.ndarray, n_latents: int) -> np.ndarray:
    """Sum of the weights of each latent's pairs, ``[n_latents]`` float64."""
    return np.bincount(latents, weights, n_latents).astype(np.float64, copy=False)


def _room(s: _State) -> int:
    n_latents = len(s.p["b_enc"])
    return max(min(n_latents, 64), int(n_latents * DENSE))


# ---------------------------------------------------------------- thresholds and penalties


def _jumprelu(s: _State) -> _Found | None:
    """Pairs within the band around the threshold count too: they move it."""
    from ..kernels import cpu

    c: JumpReLU = s.config
    n, n_latents = len(s.u), c.latents
    threshold = s.p["log_threshold"].exp()
    # A little below the band, so that rounding does not cut its edge.
    pairs = cpu.pairs_above(s.u, s.encoder, threshold * (1 - 1e-6) - c.bandwidth / 2 * (1 + 1e-5), _room(s))
    if pairs is None:
        return None
    theta = threshold.numpy()
    own = theta[pairs.latents]
    fires = pairs.values > own
    near = np.abs(pairs.values - own) < np.float32(c.bandwidth / 2)
    codes = np.where(fires, pairs.values, np.float32(0))
    fit = cpu.reconstruct(s.u, pairs, codes, s.p["W_dec"], s.offset)
    aux, revived = cpu.revive(s.u, fit, s.encoder, s.p["W_dec"], s.context.dead, s.settings)
    g = cpu.gradients(s.u, s.offset, s.p, pairs, fires, codes, fit.slopes, fit.gradient, revived=revived)
    away = fires.sum() / n / c.target_l0 - 1
    weight = s.context.warmth * c.sparsity * cpu.variance(s.u)
    pressure = 2 * weight * away / c.target_l0 / n  # gradient of the loss by one more code
    latents = pairs.latents[near]
    by_codes = _sums(latents, fit.slopes[near], n_latents)
    by_count = pressure * np.bincount(latents, minlength=n_latents)
    of_threshold = -(theta * by_codes + by_count) / c.bandwidth
    others = {"b_dec": fit.columns + g.of_offset, "log_threshold": of_threshold * theta}
    parts = _with_aux({"reconstruction": fit.error / n, "sparsity": weight * away**2}, aux, s)
    return _Found(fit, g, others, g.counts, parts)


def _relu(s: _State) -> _Found | None:
    from ..kernels import cpu

    n = len(s.u)
    pairs = cpu.pairs_above(s.u, s.encoder, torch.zeros(s.config.latents), _room(s))
    if pairs is None:
        return None
    coefficient = s.context.state["coefficient"]
    pressure = np.float32(s.context.warmth * float(coefficient) / n)
    norms = cpu.row_norms(s.p["W_dec"])
    own = norms[pairs.latents]
    fit = cpu.reconstruct(s.u, pairs, pairs.values, s.p["W_dec"], s.offset)
    totals = _sums(pairs.latents, pairs.values, s.config.latents)
    stretch = np.divide(pressure * totals, norms, out=np.zeros_like(totals), where=norms > 0).astype(np.float32)
    g = cpu.gradients(
        s.u, s.offset, s.p, pairs, np.ones(len(own), np.bool_), pairs.values, fit.slopes + pressure * own,
        fit.gradient, stretch=stretch,
    )  # fmt: skip
    parts = {"reconstruction": fit.error / n, "sparsity": float(pressure * (totals @ norms))}
    updates = _controlled(s.context, coefficient, torch.from_numpy(g.counts), n)
    return _Found(fit, g, {"b_dec": fit.columns + g.of_offset}, g.counts, parts, {"coefficient": coefficient}, updates)


def _gated(s: _State) -> _Found | None:
    """Two reconstructions of the same pairs; the gate's sees a decoder that does not move."""
    from ..kernels import cpu

    n, n_latents = len(s.u), s.config.latents
    pairs = cpu.pairs_above(s.u, s.encoder, torch.zeros(n_latents), _room(s))
    if pairs is None:
        return None
    at = pairs.latents
    product = pairs.values - s.p["b_enc"].numpy()[at]
    gain = s.p["r_mag"].exp().numpy()[at]
    magnitude = gain * product + s.p["b_mag"].numpy()[at]
    codes = np.maximum(magnitude, np.float32(0))
    coefficient = s.context.state["coefficient"]
    pressure = np.float32(s.context.warmth * float(coefficient) / n)
    norms = cpu.row_norms(s.p["W_dec"])
    fit = cpu.reconstruct(s.u, pairs, codes, s.p["W_dec"], s.offset)
    gate = cpu.reconstruct(s.u, pairs, pairs.values, s.p["W_dec"], s.offset, name="gate")
    of_magnitude = np.where(magnitude > 0, fit.slopes, np.float32(0))
    of_gate = gate.slopes + pressure * norms[at]
    everything = np.ones(len(at), np.bool_)
    # The penalty only pulls along decoder rows, which keep their length: it is projected out.
    g = cpu.gradients(s.u, s.offset, s.p, pairs, everything, codes, of_magnitude * gain + of_gate, fit.gradient)
    others = {
        "b_enc": _sums(at, of_gate, n_latents).astype(np.float32),
        "b_dec": fit.columns + g.of_offset,
        "r_mag": _sums(at, of_magnitude * gain * product, n_latents),
        "b_mag": _sums(at, of_magnitude, n_latents),
    }
    fired = np.bincount(at[codes > 0], minlength=n_latents)
    sparsity = float(pressure * (_sums(at, pairs.values, n_latents) @ norms))
    parts = {"reconstruction": fit.error / n, "sparsity": sparsity, "gate": gate.error / n}
    updates = _controlled(s.context, coefficient, torch.from_numpy(fired), n)
    return _Found(fit, g, others, fired, parts, {"coefficient": coefficient}, updates)


_PATHS: dict[type, Callable[[_State], _Found | None]] = {
    TopK: _topk,
    BatchTopK: _batchtopk,
    Matryoshka: _matryoshka,
    HierarchicalTopK: _hierarchical,
    JumpReLU: _jumprelu,
    Relu: _relu,
    Gated: _gated,
}
