"""The fast step behind the seam of `saekit.training.step`: sparse products of `saekit.kernels`, no dense gradient.

Each architecture has one function here. It finds the (row, latent) pairs that matter by a product in few bits with a
bound and multiplies them again in fp32, differentiates the loss of `saekit.training.losses` for these pairs alone,
and hands the gradient of each latent to one pass of projection, clipping and Adam. What it returns is what `plain_step`
returns, up to the rounding of sums. A step whose codes are dense (a penalty that has not yet had its effect) is left to
`plain_step`; which of the two runs depends on the weights and rows of that step only.

``s.kernel`` is `saekit.kernels.cpu.ops` or `saekit.kernels.cuda.ops`: the same functions, on numpy arrays or on
tensors of the device, and ``s.kernel.array`` is the library of these numbers. On a GPU a number stays a tensor there,
so that a step need not wait for it.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

from .. import kernels
from . import sparse_autograd
from .architectures import ARCHITECTURES
from .config import (
    BatchTopK,
    Config,
    Gated,
    HierarchicalTopK,
    JumpReLU,
    Matryoshka,
    ReLU,
    Revived,
    TopK,
    has_signs,
    hierarchical_levels,
    k_now,
    matryoshka_selection,
    matryoshka_sizes,
    matryoshka_weights,
)
from .incoherence import measure_incoherence, probes
from .initialization import level_of
from .learner import Learner
from .losses import Context, controlled, k_of, k_together, part_norms, tanh_warmth, threshold_updates
from .penalties import constrain, has_penalties, penalize
from .step import ADAM_EPS, STEPS, Statistics, context_of, learning_rate, plain_step, resample, resamples_now

Numbers = Any
"""Numbers of the kernel's library: a numpy array or a tensor."""

Pairs = kernels.Pairs[Any]
Fit = kernels.Fit[Any]
C = TypeVar("C", bound=Config, covariant=True)

DENSE = 1 / 4
"""Fraction of the latents that one row may have above their level; beyond that sparse products cost more than a dense
one, and the step is left to `plain_step`."""

MAX_DECODED = 6
"""Maximum sum of the levels of a hierarchical SAE, in multiples of k: every level is decoded by itself here; with more
of them the step is left to `plain_step`, which decodes each latent once."""

GUESSES = (0.95, 0.75)
"""Levels for the selection over a batch that are tried, as multiples of the last batch's smallest code: batches differ
little, so the first is nearly always low enough; a lower one only finds more candidates."""

SAMPLED_GUESSES = (0.9, 0.6)
"""Levels that are tried next, as multiples of the level that `SAMPLED_ROWS` rows of the batch would have: a sample is
less certain than the last batch."""

SAMPLED_ROWS = 256
"""Maximum number of evenly spaced rows of the batch in that sample. Unit: rows."""


def default_step(device: torch.device) -> str:
    """Return the name of the step that a run on this device uses when none is asked for."""
    return "plain" if kernels.step_kernels(device) is None else "fused"


def fuses(learner: Learner) -> bool:
    """Return whether this learner's step has a fast path here.

    It is no transcoder, everything is trained, the device has the kernels, and the latents are enough to pay for them.
    """
    config = learner.config
    free = config.control in (None, "soft-frozen-decoder")
    simple = type(config) in _PATHS and free and not getattr(config, "multi_topk", 0) and not learner.is_transcoder
    k = getattr(config, "k", None) or getattr(config, "target_l0", None) or 1
    return simple and kernels.step_pays(learner.parameters, k)


@dataclass(frozen=True)
class _State(Generic[C]):
    """One step of a learner, ready for the kernels."""

    kernel: kernels.StepKernels[Any]
    config: C
    p: dict[str, Tensor]
    u: Tensor
    """Scaled and centred rows ``[n, d]``."""
    offset: Tensor
    encoder: kernels.Encoder
    context: Context[C]
    aux: kernels.AuxK


@dataclass(frozen=True)
class _Found:
    """What the functions below find out: the reconstruction, the gradients, what to log."""

    fit: Fit
    """The reconstruction of the full size."""
    gradients: kernels.Gradients[Any]
    others: dict[str, Numbers]
    """Gradient of `b_dec` and of weights that not every architecture has."""
    fired: Numbers
    """Rows in which each latent fired, ``[n_latents]``."""
    parts: dict[str, Any]
    """Terms of the loss, means over rows."""
    scalars: dict[str, Tensor] = field(default_factory=dict)
    """Further numbers to log."""
    updates: dict[str, Tensor] = field(default_factory=dict)
    """New running values."""
    of_dec: Tensor | None = None
    """A further gradient of decoder rows, ``[n_latents, d]``."""
    of_all: Tensor | None = None
    """A further gradient of every encoder row, ``[d]``."""


def fused_step(learner: Learner, x: Tensor, target: Tensor | None = None) -> Statistics:
    """Do one step without a dense gradient, where there is such a path; `plain_step` otherwise.

    The codes are those of the fp32 product whatever the precision of the run. Weights agree with `plain_step` up to the
    rounding of sums.

    Parameters
    ----------
    learner
        Changed in place.
    x
        Rows ``[n, d_in]`` on the learner's device, in their own units; not changed.
    target
        What a transcoder must give for them; its step is the plain one.
    """
    if not fuses(learner) or not len(x):
        return plain_step(learner, x, target)
    kernel = kernels.step_kernels(learner.device)
    assert kernel is not None  # `fuses` has asked
    config, resolved, p = learner.config, learner.resolved, learner.parameters
    u = kernel.centered(x, learner.scale, learner.center)
    offset = p["b_dec"] - learner.center
    draws = learner.generators["data"].get_state()
    context = context_of(learner)
    aux = kernels.AuxK(resolved.k_aux, getattr(config, "aux_coefficient", 0.0), has_signs(config))
    state = _State(
        kernel=kernel,
        config=config,
        p=p,
        u=u,
        offset=offset,
        encoder=kernel.encoder_at(p["W_enc"], p["b_enc"], offset, u),
        context=context,
        aux=aux,
    )
    found = _PATHS[type(config)](state)
    if found is None:
        learner.generators["data"].set_state(draws)  # what was drawn for this step is drawn again
        return plain_step(learner, x)
    if has_penalties(config) or found.of_dec is not None or found.of_all is not None:
        found = _penalized(learner, state, found)
    row = ARCHITECTURES[config.arch]
    beta1, beta2 = config.betas
    adam = kernels.Adam(
        lr=learning_rate(resolved, learner.step),
        step=learner.step + 1,
        beta1=beta1,
        beta2=beta2,
        eps=ADAM_EPS,
        clip=config.clip,
        unit=row.unit_decoder,
        rates=row.rates,
    )
    length = kernel.descend(p, learner.first_moments, learner.second_moments, found.gradients, found.others, adam)
    learner.state |= found.updates
    fired = kernel.tensor(found.fired)
    learner.rows_since_fired = torch.where(fired > 0, 0, learner.rows_since_fired + len(x))
    learner.step += 1
    if resamples_now(learner):  # the fit's gradient is -2 / n times the residual
        resample(learner, found.fit.gradient * (-len(x) / 2))
    constrain(learner)

    def scalar(value: Any) -> Tensor:
        return torch.as_tensor(value, device=x.device)

    parts = {name: scalar(value * len(x)).float() for name, value in found.parts.items()}
    loss = torch.stack(list(parts.values())).sum()
    error, norm = scalar(found.fit.error), scalar(length)
    return Statistics(
        rows=len(x),
        loss=loss,
        error=error if learner.scale is None else error / learner.scale**2,
        fired=fired.sum().float(),
        dead=(learner.rows_since_fired >= resolved.dead_after_rows).sum(),
        grad_norm=norm * len(x),
        finite=torch.isfinite(loss) & torch.isfinite(norm),
        parts=parts | {name: value * len(x) for name, value in found.scalars.items()},
    )


def _penalized(learner: Learner, s: _State[Config], found: _Found) -> _Found:
    """Return what was found with the gradients of `saekit.training.penalties` added, in the same memory."""
    g, W = s.kernel.filled(found.gradients), learner.parameters["W_dec"]
    of_enc, of_dec = s.kernel.tensor(g.of_enc), s.kernel.tensor(g.of_dec)
    if found.of_dec is not None:
        of_dec.add_(found.of_dec)
    if found.of_all is not None:
        of_enc.add_(found.of_all)
    variance = torch.as_tensor(s.kernel.variance(s.u), device=W.device, dtype=W.dtype)
    terms = penalize(learner, variance, {"W_enc": of_enc, "W_dec": of_dec})
    squares = of_enc.square().sum(1) + of_dec.square().sum(1)
    gradients = replace(
        g,
        along=s.kernel.numbers((of_dec * W).sum(1)),
        squares=s.kernel.numbers(squares.to(s.kernel.tensor(g.squares).dtype)),
    )
    return replace(found, gradients=gradients, parts={**found.parts, **terms})


STEPS["fused"] = fused_step


# ---------------------------------------------------------------- the top-k family


def _topk(s: _State[TopK]) -> _Found | None:
    k = k_now(s.config, s.context.step, s.context.total_steps)
    if k > _room(s) and k > s.config.k:
        return None
    if s.config.sign == "magnitude":
        return _abstopk(s, k)
    return _selected(s, s.kernel.topk_pairs(s.u, s.encoder, k))


def _abstopk(s: _State[TopK], k: int) -> _Found:
    """Codes with a sign, and iSAE's regularizer, which compares more latents than fire."""
    c, width = s.config, k_together(s.config, k)
    pairs = kernels.magnitude_pairs(s.kernel, s.u, s.encoder, max(k, width))
    if not width:
        return _selected(s, pairs)
    n = len(s.u)
    values, latents = pairs.values.reshape(n, width), pairs.latents.reshape(n, width)
    found = _selected(s, s.kernel.even_pairs(values[:, :k], latents[:, :k]))
    u = probes(n, width, s.context.seed, s.context.step).to(s.u.device).view(-1)
    together = sparse_autograd.Pairs.even(s.kernel.tensor(pairs.latents).view(n, width), c.n_latents)
    value, gradient = measure_incoherence(s.p["W_dec"], together, u, width)
    weight = c.incoherence * s.kernel.variance(s.u)
    parts = {**found.parts, "incoherence": weight * s.kernel.number(value)}
    return replace(found, parts=parts, of_dec=weight * gradient)


def _batchtopk(s: _State[BatchTopK]) -> _Found | None:
    """In a crosscoder the largest are those of value times what its decoder row writes; see `batchtopk_loss`."""
    c = s.config
    worth = None if c.parts is None else part_norms(s.p["W_dec"], c.parts)
    chosen = _choose_batch(s, [(c.n_latents, k_now(c, s.context.step, s.context.total_steps))], worth)
    return None if chosen is None else _selected(s, chosen[0][0], chosen[1])


def _selected(s: _State[Revived], pairs: Pairs, smallest: Numbers = None) -> _Found:
    """Differentiate codes that equal the chosen pre-activations, and AuxK."""
    fit = s.kernel.reconstruct(s.u, pairs, pairs.values, s.p["W_dec"], s.offset)
    aux, revived = _revive(s, fit)
    terms = kernels.Terms(pairs, pairs.values != 0, pairs.values, fit.slopes, fit.gradient)
    g = s.kernel.gradients(s.u, s.offset, s.p, terms, revived=revived)
    parts = _with_aux({"reconstruction": fit.error / len(s.u)}, aux, s)
    return _Found(fit, g, {"b_dec": fit.columns + g.of_offset}, g.counts, parts, updates=_threshold(s, smallest))


def _choose_batch(
    s: _State[Config], prefixes: Sequence[tuple[int, int]], worth: Tensor | None = None
) -> tuple[list[Pairs], Numbers] | None:
    """Choose for each ``(size, k)`` the ``k * rows`` largest pre-activations of the batch in the first `size` latents.

    With `worth` ``[n_latents]`` they are multiplied by it before they are compared. All that equal the smallest of them
    are kept. Returns the pairs of each prefix, and the smallest value of the last one. None when they are not all
    positive or a row has too many.
    """
    n = len(s.u)
    factors = None if worth is None else s.kernel.numbers(worth)
    for levels in _levels(s, prefixes, worth):
        if not all(0 < level < float("inf") for level in levels):
            continue
        lowest = torch.empty_like(s.p["b_enc"])
        for (size, _), level in sorted(zip(prefixes, levels), key=lambda each: -each[1]):
            lowest[:size] = level  # the lowest one last: a latent has to reach that of any prefix it is a part of
        if worth is not None:
            lowest /= worth
        pairs = s.kernel.pairs_above(s.u, s.encoder, lowest, _room(s))
        if pairs is None:  # some row has many; with a lower level more
            return None
        chosen, edge = [], None
        scores = pairs.values if factors is None else pairs.values * factors[pairs.latents]
        for (size, k), level in zip(prefixes, levels):
            among = (pairs.latents < size) & (scores > level)
            if int(among.sum()) < k * n:
                break
            edge = s.kernel.smallest_of_largest(scores[among], k * n)
            chosen.append(pairs.where(among & (scores >= edge)))
        else:
            return chosen, edge
    return None


def _levels(
    s: _State[Config], prefixes: Sequence[tuple[int, int]], worth: Tensor | None = None
) -> Iterator[list[float]]:
    """Yield guesses below the smallest value that will be kept of each prefix."""
    if len(prefixes) == 1:
        last = float(s.context.state["last_smallest"])
        yield from ([factor * last] for factor in GUESSES)
    sample, W, bias = s.u[:: -(-len(s.u) // SAMPLED_ROWS)], s.p["W_enc"], s.encoder.bias
    if worth is not None:
        W, bias = W * worth[:, None], bias * worth
    levels = [float(level_of(sample, W[:size], bias[:size], k)) for size, k in prefixes]
    yield from ([factor * level for level in levels] for factor in SAMPLED_GUESSES)


def _choose_sizes(s: _State[Matryoshka], sizes: tuple[int, ...], truncated: bool) -> tuple[list[Pairs], Numbers] | None:
    """Choose the pairs of each size; also the smallest value of a selection over the batch (None over rows)."""
    prefixes = [(size, k_of(s.config, size)) for size in (sizes[-1:] if truncated else sizes)]
    if s.config.over == "batchtopk":
        selected = _choose_batch(s, prefixes)
        if selected is None:
            return None
        chosen, smallest = selected
    else:
        chosen, smallest = s.kernel.topk_pairs_of_prefixes(s.u, s.encoder, prefixes), None
    if truncated:
        pairs = chosen[-1]
        chosen = [*(pairs.where(pairs.latents < size) for size in sizes[:-1]), pairs]
    return chosen, smallest


@dataclass(frozen=True)
class _Sizes:
    """The reconstructions of all sizes, the smallest first, and the pairs whose terms their gradients are sums of."""

    chosen: list[Pairs]
    fits: list[Fit]
    """With the weights of the sizes."""
    stack: Tensor
    """Gradients by the reconstructions, one size after the other; with `truncated` each with those of larger sizes."""
    sets: list[Pairs]
    slopes: list[Numbers]
    starts: list[int]
    """First latent of each set that has a gradient."""


def _fit_sizes(s: _State[Matryoshka], sizes: Sequence[int], weights: Sequence[float], chosen: list[Pairs]) -> _Sizes:
    """Reconstruct from each size."""
    c, n = s.config, len(s.u)
    truncated, last = matryoshka_selection(c) == "truncated", len(sizes) - 1
    found = _Sizes(chosen, [], s.kernel.room_for(s.u, len(sizes)), [], [], [])
    for index in reversed(range(len(sizes))):
        size, own = sizes[index], chosen[index]
        fit = s.kernel.reconstruct(
            s.u, own, own.values, s.p["W_dec"], s.offset, weight=weights[index], name=str(index)
        )  # fmt: skip
        found.fits.insert(0, fit)
        place = found.stack[index * n : (index + 1) * n]
        if truncated and index < last:
            # The same pairs as the size above: their gradients are those of all sizes from this one on.
            inner = chosen[-1].latents < size
            if c.detached:  # of this one alone
                place.copy_(fit.gradient)
                found.slopes[0][inner] = fit.slopes
            else:
                torch.add(found.stack[(index + 1) * n : (index + 2) * n], fit.gradient, out=place)
                found.slopes[0][inner] += fit.slopes
        else:
            place.copy_(fit.gradient)
            found.sets.insert(0, own)
            found.slopes.insert(0, fit.slopes)
            found.starts.insert(0, sizes[index - 1] if c.detached and index and not truncated else 0)
    return found


def _matryoshka(s: _State[Matryoshka]) -> _Found | None:
    """Every size reconstructs by itself; a latent's gradient sums those of the sizes that it is a part of."""
    config, W_enc = s.config, s.p["W_enc"]
    sizes = s.context.sizes or matryoshka_sizes(config)
    weights = matryoshka_weights(config, len(sizes))
    truncated = matryoshka_selection(config) == "truncated"
    selected = _choose_sizes(s, sizes, truncated)
    if selected is None:
        return None
    chosen, smallest = selected
    found = _fit_sizes(s, sizes, weights, chosen)
    pairs = chosen[-1]
    full = _unweighted(s, found.fits[-1], weights[-1], pairs)
    aux, revived = _revive_sizes(s, sizes, weights, found) if config.aux_per_size else _revive(s, full)
    joined = s.kernel.join(found.sets)
    wanted = joined.values > 0
    if any(found.starts):
        added = [own.latents >= start for own, start in zip(found.sets, found.starts)]
        wanted = wanted & s.kernel.array.concatenate(added)
    terms = kernels.Terms(
        joined, wanted, joined.values, s.kernel.array.concatenate(found.slopes), found.stack,
        sections=sizes[:-1] if truncated else (),
    )  # fmt: skip
    g = s.kernel.gradients(s.u, s.offset, s.p, terms, revived=revived)
    columns, of_offset = sum(fit.columns for fit in found.fits), g.of_offset
    if config.detached:  # b_dec learns from the smallest size alone
        first = sizes[0]
        columns = found.fits[0].columns
        of_offset = -(g.of_bias[:first] @ s.kernel.numbers(W_enc[:first]))
    fired = s.kernel.counts_of(pairs.latents[pairs.values > 0], config.n_latents)
    error = sum(weight * fit.error for weight, fit in zip(weights, found.fits)) / len(s.u)
    parts = _with_aux({"reconstruction": error}, aux, s)
    return _Found(full, g, {"b_dec": columns + of_offset}, fired, parts, updates=_threshold(s, smallest))


def _revive_sizes(
    s: _State[Matryoshka], sizes: Sequence[int], weights: Sequence[float], found: _Sizes
) -> tuple[Any, kernels.Revived | None]:
    """AuxK of each size: the dead latents that it adds explain its residual."""
    dead, total, revived = s.context.dead, 0.0, []
    if dead is None:
        return None, None
    place = torch.arange(len(dead), device=dead.device)
    for index, (start, size) in enumerate(zip((0, *sizes), sizes)):
        own = dead & (place >= start) & (place < size)
        share = min(1.0, int(own.sum()) / max(s.aux.k, 1))
        fit = _unweighted(s, found.fits[index], weights[index], found.chosen[index])
        settings = replace(s.aux, coefficient=s.aux.coefficient * share)
        aux, more = kernels.revive(s.kernel, s.u, fit, s.encoder, s.p["W_dec"], own, settings)
        if aux is not None and more is not None:
            total = total + aux
            revived.append(tuple(t.clone() for t in more))  # the next size uses the memory again
    if not revived:
        return None, None
    which, of_dec, of_enc, of_bias = (torch.cat(parts) for parts in zip(*revived))
    return total, (which, of_dec, of_enc, of_bias)


def _hierarchical(s: _State[HierarchicalTopK]) -> _Found | None:
    """Every level reconstructs from the first of each row's pairs; a pair's gradient sums those of its levels."""
    c = s.config
    levels = hierarchical_levels(c)
    if sum(levels) > MAX_DECODED * c.k:
        return None
    weights = c.weights or (1 / len(levels),) * len(levels)
    W_dec, n = s.p["W_dec"], len(s.u)
    pairs = s.kernel.topk_pairs(s.u, s.encoder, c.k)
    values, latents = pairs.values.reshape(n, c.k), pairs.latents.reshape(n, c.k)
    slopes = s.kernel.array.zeros_like(values)
    error, columns, stack = 0.0, 0.0, s.kernel.room_for(s.u, len(levels))
    rings: list[Pairs] = []
    ring_slopes: list[Numbers] = []
    whole: Fit | None = None
    for index in reversed(range(len(levels))):
        level, weight = levels[index], weights[index]
        own = s.kernel.even_pairs(values[:, :level], latents[:, :level])
        fit = s.kernel.reconstruct(s.u, own, own.values, W_dec, s.offset, weight=weight, name=str(index))
        whole = whole or fit
        error = error + weight * fit.error / n
        columns = columns + fit.columns
        slopes[:, :level] += fit.slopes.reshape(n, level)
        place = stack[index * n : (index + 1) * n]
        if index + 1 < len(levels):
            torch.add(stack[(index + 1) * n : (index + 2) * n], fit.gradient, out=place)
        else:
            place.copy_(fit.gradient)
    for start, level in itertools.pairwise((0, *levels)):  # what a level adds goes with the gradients from it on
        rings.append(s.kernel.even_pairs(values[:, start:level], latents[:, start:level]))
        ring_slopes.append(slopes[:, start:level].ravel())
    assert whole is not None  # there is at least one
    full = _unweighted(s, whole, weights[-1], pairs)
    aux, revived = _revive(s, full)
    joined = s.kernel.join(rings)
    terms = kernels.Terms(joined, joined.values > 0, joined.values, s.kernel.array.concatenate(ring_slopes), stack)
    g = s.kernel.gradients(s.u, s.offset, s.p, terms, revived=revived)
    parts = _with_aux({"reconstruction": error}, aux, s)
    return _Found(full, g, {"b_dec": columns + g.of_offset}, g.counts, parts)


def _unweighted(s: _State[Config], whole: Fit, weight: float, pairs: Pairs) -> Fit:
    """Return the reconstruction of all pairs without the weight that it has among others."""
    if not weight:  # it has no part in the loss; its residual is still what dead latents explain
        return s.kernel.reconstruct(s.u, pairs, pairs.values, s.p["W_dec"], s.offset)
    return kernels.Fit(whole.error, whole.gradient / weight, whole.slopes, whole.columns)


def _threshold(s: _State[Config], smallest: Numbers) -> dict[str, Tensor]:
    return {} if smallest is None else threshold_updates(s.context, torch.as_tensor(smallest, device=s.u.device))


def _revive(s: _State[Config], fit: Fit) -> tuple[Any, kernels.Revived | None]:
    return kernels.revive(s.kernel, s.u, fit, s.encoder, s.p["W_dec"], s.context.dead, s.aux)


def _with_aux(parts: dict[str, Any], aux: float | None, s: _State[Revived]) -> dict[str, Any]:
    if s.config.aux_coefficient and s.context.dead is not None and s.context.k_aux:
        parts["aux"] = 0.0 if aux is None else aux
    return parts


def _float32(s: _State[Config], values: Numbers) -> Numbers:
    return s.kernel.array.asarray(values, dtype=s.kernel.array.float32)


def _room(s: _State[Config]) -> int:
    """Return the maximum number of pairs of a row."""
    n_latents = len(s.p["b_enc"])
    return max(min(n_latents, 64), int(n_latents * DENSE))


# ---------------------------------------------------------------- thresholds and penalties


@dataclass(frozen=True)
class _Band:
    """Pairs that fire or are within the band around their threshold, and which."""

    pairs: Pairs
    theta: Numbers
    """Thresholds, ``[n_latents]``."""
    own: Numbers
    """That of each pair."""
    fires: Numbers
    near: Numbers
    codes: Numbers
    V: Any
    """Variance of the rows."""


def _jumprelu(s: _State[JumpReLU]) -> _Found | None:
    """Pairs within the band around the threshold count too: they move it, and with `tanh` all other parameters."""
    c, n = s.config, len(s.u)
    threshold = s.p["log_threshold"].exp()
    # A little below the band, so that rounding does not cut its edge.
    pairs = s.kernel.pairs_above(s.u, s.encoder, threshold * (1 - 1e-6) - c.bandwidth / 2 * (1 + 1e-5), _room(s))
    if pairs is None:
        return None
    theta = s.kernel.numbers(threshold)
    own = theta[pairs.latents]
    fires, near = pairs.values > own, abs(pairs.values - own) < c.bandwidth / 2
    codes = s.kernel.array.where(fires, pairs.values, 0.0)
    band = _Band(pairs, theta, own, fires, near, codes, s.kernel.variance(s.u))
    fit = s.kernel.reconstruct(s.u, pairs, codes, s.p["W_dec"], s.offset)
    aux, revived = _revive(s, fit)
    sparse = _tanh_penalty(s, band, fit) if c.tanh else _l0_penalty(s, band, fit)
    slopes, of_threshold, common = sparse.slopes, sparse.of_threshold, {}
    fired = s.kernel.counts_of(pairs.latents[fires], c.n_latents)
    parts = {"reconstruction": fit.error / n, **sparse.parts}
    if c.pre_activation:
        weight = c.pre_activation * band.V
        slopes = slopes + s.kernel.array.where(fires, weight / n, 0.0)
        of_threshold = of_threshold + weight * (1 - fired / n)
        parts["pre_activation"] = weight * _distance_below(s, band)
        common = {"of_all": -weight * (s.u.mean(0) - s.offset), "of_all_biases": -weight}
    wanted = fires | near if c.tanh else fires
    terms = kernels.Terms(pairs, wanted, codes, _float32(s, slopes), fit.gradient)
    g = s.kernel.gradients(s.u, s.offset, s.p, terms, revived=revived)
    others = {"b_dec": fit.columns + g.of_offset, "log_threshold": of_threshold * theta}
    if common:
        others["b_enc"] = _float32(s, g.of_bias + common["of_all_biases"])
        others["b_dec"] = others["b_dec"] - common["of_all_biases"] * s.kernel.numbers(s.p["W_enc"].sum(0))
    parts = _with_aux(parts, aux, s)
    return _Found(fit, g, others, fired, parts, sparse.scalars, sparse.updates(fired), of_all=common.get("of_all"))


@dataclass(frozen=True)
class _Sparse:
    """What keeps codes few, differentiated together with the reconstruction."""

    slopes: Numbers
    """Gradient of the pre-activation of each pair."""
    of_threshold: Numbers
    """Gradient of the thresholds, ``[n_latents]``."""
    parts: dict[str, Any]
    scalars: dict[str, Tensor] = field(default_factory=dict)
    updates: Callable[[Numbers], dict[str, Tensor]] = lambda fired: {}


def _l0_penalty(s: _State[JumpReLU], band: _Band, fit: Fit) -> _Sparse:
    """Differentiate the term of L0 and that of dense latents: they move the thresholds alone."""
    c, n = s.config, len(s.u)
    assert c.target_l0 is not None  # required with these terms
    away = band.fires.sum() / n / c.target_l0 - 1
    weight = s.context.warmth * c.sparsity * band.V
    pressure = 2 * weight * away / c.target_l0 / n  # gradient of the loss by one more code
    latents = band.pairs.latents[band.near]
    by_codes = s.kernel.sums_of(latents, fit.slopes[band.near], c.n_latents)
    frequencies = s.kernel.counts_of(band.pairs.latents[band.fires], c.n_latents) / n
    dense = s.context.warmth * c.density * band.V / (c.density_at * c.target_l0)
    by_count = (pressure + 2 * dense * frequencies / n) * s.kernel.counts_of(latents, c.n_latents)
    parts = {"sparsity": weight * away**2}
    if c.density:
        parts["density"] = dense * (frequencies**2).sum()
    return _Sparse(fit.slopes, -(band.theta * by_codes + by_count) / c.bandwidth, parts)


def _tanh_penalty(s: _State[JumpReLU], band: _Band, fit: Fit) -> _Sparse:
    """Differentiate the tanh penalty; within the band every parameter gets a gradient."""
    c, n = s.config, len(s.u)
    coefficient = s.context.state["coefficient"]
    weight = tanh_warmth(s.context) * s.kernel.number(coefficient) * band.V / n
    soft = s.kernel.array.tanh(c.tanh_scale * band.codes)
    of_codes = fit.slopes + weight * c.tanh_scale * (1 - soft**2)
    moved = s.kernel.array.where(band.near, band.own / c.bandwidth, 0.0) * of_codes
    slopes = s.kernel.array.where(band.fires, of_codes, 0.0) + moved
    return _Sparse(
        slopes=slopes,
        of_threshold=-s.kernel.sums_of(band.pairs.latents, moved, c.n_latents),
        parts={"sparsity": weight * soft.sum()},
        scalars={"coefficient": coefficient},
        updates=lambda fired: controlled(s.context, coefficient, s.kernel.tensor(fired), n),
    )


def _distance_below(s: _State[JumpReLU], band: _Band) -> Any:
    """Return ``mean over rows of sum_j max(0, threshold_j - pre_j)``: over all pairs, less those that fire."""
    theta, pairs = s.kernel.tensor(band.theta), band.pairs
    everything = theta.sum() - s.p["W_enc"].sum(0) @ s.u.mean(0) - s.encoder.bias.sum()
    of_fired = (band.own - pairs.values)[band.fires].sum() / len(s.u)
    return s.kernel.number(everything) - of_fired


def _relu(s: _State[ReLU]) -> _Found | None:
    n = len(s.u)
    pairs = s.kernel.pairs_above(s.u, s.encoder, torch.zeros_like(s.p["b_enc"]), _room(s))
    if pairs is None:
        return None
    coefficient = s.context.state["coefficient"]
    pressure = s.context.warmth * s.kernel.number(coefficient) / n
    norms = s.kernel.row_norms(s.p["W_dec"])
    own = norms[pairs.latents]
    fit = s.kernel.reconstruct(s.u, pairs, pairs.values, s.p["W_dec"], s.offset)
    totals = s.kernel.sums_of(pairs.latents, pairs.values, s.config.n_latents)
    where = s.kernel.array.where
    stretch = _float32(s, where(norms > 0, pressure * totals / where(norms > 0, norms, 1.0), 0.0))
    everything = pairs.latents >= 0
    terms = kernels.Terms(pairs, everything, pairs.values, fit.slopes + pressure * own, fit.gradient)
    g = s.kernel.gradients(s.u, s.offset, s.p, terms, stretch=stretch)
    parts = {"reconstruction": fit.error / n, "sparsity": pressure * (totals * norms).sum()}
    updates = controlled(s.context, coefficient, s.kernel.tensor(g.counts), n)
    others = {"b_dec": fit.columns + g.of_offset}
    return _Found(fit, g, others, g.counts, parts, scalars={"coefficient": coefficient}, updates=updates)


def _gated(s: _State[Gated]) -> _Found | None:
    """Two reconstructions of the same pairs; the gate's sees a decoder that does not move."""
    n, n_latents = len(s.u), s.config.n_latents
    pairs = s.kernel.pairs_above(s.u, s.encoder, torch.zeros_like(s.p["b_enc"]), _room(s))
    if pairs is None:
        return None
    at = pairs.latents
    product = pairs.values - s.kernel.numbers(s.p["b_enc"])[at]
    gain = s.kernel.numbers(s.p["r_mag"].exp())[at]
    magnitude = gain * product + s.kernel.numbers(s.p["b_mag"])[at]
    codes = magnitude.clip(0)
    coefficient = s.context.state["coefficient"]
    pressure = s.context.warmth * s.kernel.number(coefficient) / n
    norms = s.kernel.row_norms(s.p["W_dec"])
    fit = s.kernel.reconstruct(s.u, pairs, codes, s.p["W_dec"], s.offset)
    gate = s.kernel.reconstruct(s.u, pairs, pairs.values, s.p["W_dec"], s.offset, name="gate")
    of_magnitude = s.kernel.array.where(magnitude > 0, fit.slopes, 0.0)
    of_gate = gate.slopes + pressure * norms[at]
    everything = at >= 0
    # The penalty only pulls along decoder rows, which keep their length: it is projected out.
    terms = kernels.Terms(pairs, everything, codes, of_magnitude * gain + of_gate, fit.gradient)
    g = s.kernel.gradients(s.u, s.offset, s.p, terms)
    others = {
        "b_enc": _float32(s, s.kernel.sums_of(at, of_gate, n_latents)),
        "b_dec": fit.columns + g.of_offset,
        "r_mag": s.kernel.sums_of(at, of_magnitude * gain * product, n_latents),
        "b_mag": s.kernel.sums_of(at, of_magnitude, n_latents),
    }
    fired = s.kernel.counts_of(at[codes > 0], n_latents)
    sparsity = pressure * (s.kernel.sums_of(at, pairs.values, n_latents) * norms).sum()
    parts = {"reconstruction": fit.error / n, "sparsity": sparsity, "gate": gate.error / n}
    updates = controlled(s.context, coefficient, s.kernel.tensor(fired), n)
    return _Found(fit, g, others, fired, parts, scalars={"coefficient": coefficient}, updates=updates)


_PATHS: dict[type, Callable[[_State[Any]], _Found | None]] = {
    TopK: _topk,
    BatchTopK: _batchtopk,
    Matryoshka: _matryoshka,
    HierarchicalTopK: _hierarchical,
    JumpReLU: _jumprelu,
    ReLU: _relu,
    Gated: _gated,
}
"""The function of each architecture that has one."""
