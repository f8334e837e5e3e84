"""Training losses: pure functions of parameters and rows.

Every loss is called as ``loss(parameters, x, context) -> Outcome``. Rows come scaled and centred (``x = u - centre``
with the centre that `b_dec` was initialized with), which changes nothing in exact arithmetic and keeps large means out
of the products. In these coordinates the decoder bias is ``offset = b_dec - centre`` and::

    pre   = (x - offset) @ W_enc.T + b_enc
    x_hat = codes @ W_dec + offset

A transcoder gives another row y instead, scaled and centred by itself, from which its `offset` is counted::

    pre   = x @ W_enc.T + b_enc
    y_hat = codes @ W_dec + offset [+ x @ W_skip]

and y and y_hat take the place of x and x_hat in every term below.

The squared error is summed over dimensions and averaged over rows. Auxiliary terms are in units of the variance V of
what must be given (summed over dimensions, a constant for the gradient), so that their weights do not depend on the
data.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .config import (
    BatchTopK,
    Config,
    Gated,
    HierarchicalTopK,
    JumpReLU,
    Matryoshka,
    PAnneal,
    Penalized,
    ReLU,
    Revived,
    TopK,
    hierarchical_levels,
    k_now,
    matryoshka_selection,
    matryoshka_sizes,
    matryoshka_weights,
)
from .dense_autograd import Coded, Reconstructed, reconstruct
from .incoherence import WIDER as TOGETHER
from .incoherence import incoherence, probes
from .mesh import ALONE, Mesh, entering, over_latents, over_rows, ranks, smallest_of_largest
from .sparse_autograd import (
    Pairs,
    PreActivations,
    at_least,
    choose_batchtopk,
    choose_topk,
    decode_pairs,
    encode_pairs,
)

CONTROLLER_GAIN = 0.02
"""How fast a penalty's coefficient follows L0: in a step its logarithm moves by `gain` times the expected
``log(L0 / target)``. An L0 that stays twice too high doubles the coefficient in 50 steps; L0 itself answers over some
hundred, so a larger gain would overshoot, and a smaller one would take more than a short run has."""
CONTROLLER_LEAD = 10.0
"""How far ahead L0 is expected: this many times its distance from its own running mean (which lags by about 10 steps),
so that the coefficient stops before L0 arrives."""
WIDER = 4
"""Multi-TopK: the second reconstruction has this many times k latents (2406.04093)."""
COEFFICIENTS = (1e-6, 1e6)
"""Minimum and maximum of an adjusted coefficient: a target out of reach must not let it overflow or vanish."""

Tensors = dict[str, Tensor]
C = TypeVar("C", bound=Config, covariant=True)


@dataclass(frozen=True)
class Context(Generic[C]):
    """What a loss needs besides parameters and rows."""

    config: C
    """The architecture's configuration."""
    center: Tensor
    """Vector that was subtracted from the scaled rows, of a transcoder from the scaled targets, ``[d_out]``."""
    target: Tensor | None = None
    """Scaled and centred rows that a transcoder must give, ``[n, d_out]``; None: the rows that it reads."""
    state: Tensors = field(default_factory=dict)
    """Running values of the architecture: threshold, coefficient, ..."""
    dead: Tensor | None = None
    """Latents that count as dead, ``[n_latents]`` bool; None when none can be."""
    k_aux: int = 0
    """Dead latents per row in AuxK."""
    step: int = 0
    """Steps done before this one."""
    total_steps: int = 1
    """Steps of the whole run."""
    warmup_steps: int = 0
    """Steps over which a penalty rises."""
    threshold_start: int = 0
    """Step from which the BatchTopK threshold is averaged."""
    threshold_decay: float = 0.999
    """Decay of that average per step."""
    sizes: tuple[int, ...] | None = None
    """Prefix lengths drawn for this step; None for the fixed ones."""
    seed: int = 0
    """Random seed of the learner."""
    mesh: Mesh = ALONE
    """The ranks that compute the loss together: parameters and rows are this rank's, terms of the loss are means over
    its rows and sums over all latents."""

    @property
    def warmth(self) -> float:
        """Factor of a penalty: rises linearly from 0 to 1 over the warm-up, then stays."""
        return min(1.0, (self.step + 1) / self.warmup_steps) if self.warmup_steps else 1.0


@dataclass(frozen=True)
class Outcome:
    """Result of a loss. Sums run over the rows of the batch; nothing here was read back from the device."""

    loss: Tensor
    """Scalar to differentiate."""
    residual: Tensor
    """``x - x_hat`` ``[n, d_out]``, detached."""
    fired: Tensor
    """Rows in which each latent fired, ``[n_latents]`` float (whole numbers)."""
    parts: Tensors
    """Named terms of the loss (weighted as in the loss) and other scalars to log, detached."""
    updates: Tensors = field(default_factory=dict)
    """New running values."""


def squared_error(x: Tensor, x_hat: Tensor) -> Tensor:
    """Return ``mean over rows of ||x - x_hat||^2`` (summed over dimensions)."""
    return (x - x_hat).pow(2).sum() / len(x)


def variance(x: Tensor, mesh: Mesh = ALONE) -> Tensor:
    """Return ``mean over rows of ||x - mean(x)||^2`` (summed over dimensions), detached, at least 1e-12."""
    x = x.detach()
    return over_rows(mesh, (x - over_rows(mesh, x.mean(0))).pow(2).sum() / len(x)).clamp(min=1e-12)


# ---------------------------------------------------------------- the top-k family


def topk_loss(p: Tensors, x: Tensor, context: Context[TopK]) -> Outcome:
    """Return the loss of TopK: ``error(k) + multi_topk * error(4k) + aux_coefficient * AuxK``.

    With `incoherence`, ``incoherence * V * R`` is added; see `saekit.training.incoherence`.
    """
    c = context.config
    affine = _affine(p, x, context)
    goal, base, bias = affine.goal, affine.base, affine.bias
    k = k_now(c, context.step, context.total_steps)
    k_wide = min(WIDER * k, c.n_latents) if c.multi_topk else k
    k_compared = k_together(c, k)
    largest = _choose(x, p["W_enc"], bias, max(k_wide, k_compared), context.mesh, c.sign)
    values, pairs = largest.part(0, k)
    x_hat = _decode(p, x, bias, (values, pairs), context.mesh) + base
    terms = {"reconstruction": squared_error(goal, x_hat)}
    if c.multi_topk:
        wide = _decode(p, x, bias, largest.part(0, k_wide), context.mesh)
        terms["multi_topk"] = c.multi_topk * squared_error(goal, wide + base)
    if c.incoherence:
        u, compared = largest.probed(probes(len(x), k_compared, context.seed, context.step, context.mesh))
        coherent = incoherence(p["W_dec"], compared, u, k_compared, context.mesh)
        terms["incoherence"] = c.incoherence * variance(goal, context.mesh) * coherent
    residual = (goal - x_hat).detach()
    terms |= _aux_term(p, x, bias, residual, context)
    return _outcome(terms, residual, pairs.fired(values))


def k_together(c: TopK, k: int) -> int:
    """Return how many latents of a row are compared by `incoherence`; 0 without it."""
    return min(TOGETHER * k, c.n_latents) if c.incoherence else 0


def hierarchical_loss(p: Tensors, x: Tensor, context: Context[HierarchicalTopK]) -> Outcome:
    """Return the loss of HierarchicalTopK: ``sum_l c_l * error(l) + aux_coefficient * AuxK``.

    ``x_hat`` of level l comes from the l largest.

    A level adds the latents between the one before and itself to that one's reconstruction, so all levels together
    decode every chosen latent once.
    """
    c = context.config
    levels = hierarchical_levels(c)
    weights = c.weights or (1 / len(levels),) * len(levels)
    affine = _affine(p, x, context)
    goal, base, bias = affine.goal, affine.base, affine.bias
    largest = _choose(x, p["W_enc"], bias, c.k, context.mesh)
    x_hat, error, fired = base, x.new_zeros(()), torch.zeros_like(bias)
    for start, level, weight in zip((0, *levels), levels, weights):
        ring = largest.part(start, level)
        x_hat = _decode(p, x, bias, ring, context.mesh) + x_hat
        error = error + weight * squared_error(goal, x_hat)
        fired = fired + ring[1].fired(ring[0])
    terms = {"reconstruction": error}
    residual = (goal - x_hat).detach()
    terms |= _aux_term(p, x, bias, residual, context)
    return _outcome(terms, residual, fired.detach())


def batchtopk_loss(p: Tensors, x: Tensor, context: Context[BatchTopK]) -> Outcome:
    """Return the loss of BatchTopK: ``error + aux_coefficient * AuxK`` with ``k * rows`` codes in the batch.

    In a crosscoder the ``k * rows`` largest of ``z_j sum_m |d_j^m|`` are kept, d_j^m the part of latent j's decoder row
    that writes source m (2504.02922); AuxK chooses by z_j. The norms are constants for the gradient.
    """
    c = context.config
    affine = _affine(p, x, context)
    goal, base, bias = affine.goal, affine.base, affine.bias
    norms = None if c.parts is None else part_norms(p["W_dec"], c.parts)
    pre = PreActivations(x, p["W_enc"], bias, norms)
    values, pairs, smallest = _choose_over_batch(pre, k_now(c, context.step, context.total_steps), context)
    values = values if norms is None else values / norms[pairs.indices]
    x_hat = _decode(p, x, bias, (values, pairs), context.mesh) + base
    terms = {"reconstruction": squared_error(goal, x_hat)}
    residual = (goal - x_hat).detach()
    terms |= _aux_term(p, x, bias, residual, context)
    return _outcome(terms, residual, pairs.fired(values), threshold_updates(context, smallest))


def part_norms(W_dec: Tensor, widths: tuple[int, ...]) -> Tensor:
    """Return ``sum_m |d_j^m|`` of each latent ``[n_latents]``, at least 1e-12; d_j^m has width ``widths[m]``."""
    norms = torch.stack([part.norm(dim=1) for part in W_dec.detach().float().split(widths, dim=1)])
    return norms.sum(0).clamp(min=1e-12)


def matryoshka_loss(p: Tensors, x: Tensor, context: Context[Matryoshka]) -> Outcome:
    """Return the loss of Matryoshka: ``sum_g c_g * error_g + aux_coefficient * AuxK``, with AuxK of the full size.

    With `detached`, error_g has a gradient only for the latents that size g adds to the next smaller one, and for
    `b_dec` only that of the smallest; with `aux_per_size`, AuxK is a sum over sizes, see `_aux_of_sizes`.
    """
    c = context.config
    sizes = context.sizes or matryoshka_sizes(c)
    weights = matryoshka_weights(c, len(sizes))
    affine = _affine(p, x, context)
    goal, bias = affine.goal, affine.bias
    if c.detached:
        bias = _bias_of_the_smallest(p, affine, context, context.mesh.prefix_of(sizes[0], len(bias)))
    truncated = matryoshka_selection(c) == "truncated"
    pre = PreActivations(x, p["W_enc"], bias) if c.over == "batchtopk" else None

    def own(size: int) -> int:
        return context.mesh.prefix_of(size, len(bias))

    def select(size: int) -> tuple[Tensor, Pairs, Tensor | None]:
        k, end = k_of(c, size), own(size)
        if pre is None:
            values, pairs = _choose(x, p["W_enc"][:end], bias[:end], k, context.mesh).part(0, k)
            return values, Pairs(pairs.offsets, pairs.indices, len(bias)), None
        values, pairs, smallest = _choose_over_batch(pre.prefix(end), k, context)
        return values, Pairs(pairs.offsets, pairs.indices, len(bias)), smallest

    values, pairs, smallest = select(c.n_latents)
    chosen = [(values, pairs)]
    for size in sizes[:-1]:
        if truncated:  # a value of 0 adds nothing and gets no gradient
            chosen.append((values * (pairs.indices < own(size)), pairs))
        else:
            kept, kept_pairs, _ = select(size)
            chosen.append((kept, kept_pairs))
    starts = [own(size) for size in (*sizes[-2:-1], *(0, *sizes[:-2])[: len(sizes) - 1])] if c.detached else None
    x_hat = _decode_sizes(p, x, bias, chosen, starts, context.mesh) + _bases(affine, len(chosen), c.detached)
    residuals = (goal - x_hat).detach()
    residual = residuals[0]
    errors = (goal - x_hat).pow(2).sum((1, 2)) / len(x)
    weighted = [weight * each for weight, each in zip((weights[-1], *weights[:-1]), errors.unbind())]
    terms = {"reconstruction": torch.stack(weighted).sum()}
    if c.aux_per_size:
        terms |= _aux_of_sizes(p, x, bias, (*residuals[1:], residual), sizes, context)
    else:
        terms |= _aux_term(p, x, bias, residual, context)
    updates = {} if smallest is None else threshold_updates(context, smallest)
    return _outcome(terms, residual, pairs.fired(values), updates)


def _decode_sizes(
    p: Tensors, x: Tensor, bias: Tensor, chosen: list[tuple[Tensor, Pairs]], starts: list[int] | None, mesh: Mesh
) -> Tensor:
    """Return what each size adds to the decoder bias, ``[sizes, n, d_out]``.

    With `starts` codes of latents before it have no gradient, for each size.
    """
    # All sizes as one batch of rows: one sort by latent and one gradient of each matrix serve them all.
    many = x.repeat(len(chosen), 1)
    if not starts:
        return _decode(p, many, bias, _stacked(chosen), mesh).view(len(chosen), len(x), -1)
    inner = [(values * (pairs.indices < start), pairs) for (values, pairs), start in zip(chosen, starts)]
    added = [(values * (pairs.indices >= start), pairs) for (values, pairs), start in zip(chosen, starts)]
    values, pairs = _stacked(inner)
    held = over_latents(mesh, decode_pairs(values.detach(), p["W_dec"].detach(), pairs))
    return (held + _decode(p, many, bias, _stacked(added), mesh)).view(len(chosen), len(x), -1)


def _bases(affine: _Affine, count: int, detached: bool) -> Tensor:
    """Return what is there without codes for each size, the full one first, as it broadcasts to ``[sizes, n, d_out]``;
    with `detached` only that of the smallest has a gradient.
    """
    base = affine.base
    each = [base.detach() if detached and count > 1 and index != 1 else base for index in range(count)]
    return torch.stack(each).view(count, -1, base.shape[-1])


def _bias_of_the_smallest(p: Tensors, affine: _Affine, context: Context[Config], first: int) -> Tensor:
    """Return the encoder's bias, whose part for `b_dec` has a gradient for the first latents alone."""
    if context.target is not None:  # a transcoder's encoder does not subtract it
        return affine.bias
    offset = (p["b_dec"] - context.center).detach()
    return torch.cat([affine.bias[:first], (p["b_enc"] - p["W_enc"] @ offset)[first:]])


def _aux_of_sizes(
    p: Tensors,
    x: Tensor,
    bias: Tensor,
    residuals: Sequence[Tensor],
    sizes: Sequence[int],
    context: Context[Matryoshka],
) -> Tensors:
    """Return ``aux_coefficient * V * sum_g min(1, dead_g / k_aux) * AuxK_g`` when some latent can be dead.

    dead_g are the dead latents that size g adds to the next smaller one; in AuxK_g they explain the residual of g.
    """
    c, dead, mesh = context.config, context.dead, context.mesh
    if not c.aux_coefficient or dead is None or not context.k_aux:
        return {}
    total, place = x.new_zeros(()), torch.arange(len(dead), device=dead.device)
    for start, size, residual in zip((0, *sizes), sizes, residuals):
        own = dead & (place >= mesh.prefix_of(start, len(dead))) & (place < mesh.prefix_of(size, len(dead)))
        share = (over_latents(mesh, own.sum().to(x)) / context.k_aux).clamp(max=1)
        total = total + share * aux_loss(p, x, bias, residual, dead=own, k_aux=context.k_aux, mesh=mesh)
    goal = x if context.target is None else context.target
    return {"aux": c.aux_coefficient * variance(goal, mesh) * total}


def _stacked(chosen: list[tuple[Tensor, Pairs]]) -> tuple[Tensor, Pairs]:
    """Return several choices for the same rows as one choice for as many copies of the rows."""
    if len(chosen) == 1:
        return chosen[0]
    offsets, end = [chosen[0][1].offsets[:1]], 0
    for values, pairs in chosen:
        offsets.append(pairs.offsets[1:] + end)
        end += len(values)
    indices = torch.cat([pairs.indices for _, pairs in chosen])
    return torch.cat([values for values, _ in chosen]), Pairs(torch.cat(offsets), indices, chosen[0][1].n_latents)


def aux_loss(
    p: Tensors,
    x: Tensor,
    bias: Tensor,
    residual: Tensor,
    *,
    dead: Tensor,
    k_aux: int,
    mesh: Mesh = ALONE,
    sign: str = "positive",
) -> Tensor:
    """Return AuxK: the fraction of the residual that dead latents leave unexplained.

    It is ``||e - e_hat||^2 / ||e - mean(e)||^2``. ``e`` is the residual, detached; ``e_hat`` is decoded from the
    `k_aux` largest pre-activations (after ReLU) of dead latents, without decoder bias. The gradient reaches the encoder
    and the decoder of the dead latents chosen.

    Parameters
    ----------
    p
        Parameters with ``W_enc`` and ``W_dec`` ``[n_latents, d]``.
    x, bias
        Centred rows ``[n, d]`` and encoder bias ``[n_latents]``.
    residual
        ``x - x_hat`` ``[n, d]``.
    dead
        ``[n_latents]`` bool.
    k_aux
        Dead latents per row; fewer when fewer are dead.
    mesh
        The ranks that compute it together.
    sign
        ``magnitude``: of codes with a sign, the largest by magnitude, without ReLU.
    """
    e = residual.detach()
    W_enc, n_latents = p["W_enc"], len(bias)
    if mesh.latent_size > 1 or sign == "magnitude":
        largest = _choose_dead(x, W_enc.detach(), bias.detach(), dead, k_aux, mesh, sign)
        values, pairs = largest.part(0, k_aux)
        e_hat = over_latents(mesh, decode_pairs(encode_pairs(W_enc, bias, x, values, pairs), p["W_dec"], pairs))
        fraction = squared_error(e, e_hat) / variance(e, mesh)
        return torch.where(over_latents(mesh, dead.float().sum()) > 0, fraction, torch.zeros_like(fraction))
    if dead.device.type == "cpu":  # counting costs nothing here, and the product shrinks to the dead latents
        which = dead.nonzero()[:, 0]
        if not len(which):
            return x.new_zeros(())
        values, local = choose_topk(x, W_enc.detach()[which], bias.detach()[which], min(k_aux, len(which)))
        indices = which[local]
    else:
        values, indices = choose_topk(x, W_enc, bias.detach().masked_fill(~dead, -torch.inf), min(k_aux, n_latents))
    pairs = Pairs.even(indices, n_latents)
    e_hat = decode_pairs(encode_pairs(W_enc, bias, x, values.reshape(-1), pairs), p["W_dec"], pairs)
    fraction = squared_error(e, e_hat) / variance(e, mesh)
    return torch.where(dead.any(), fraction, torch.zeros_like(fraction))


def _choose_dead(x: Tensor, W_enc: Tensor, bias: Tensor, dead: Tensor, k: int, mesh: Mesh, sign: str) -> _Largest:
    """Return the `k` largest dead latents of each row."""
    if sign != "magnitude":
        return _choose(x, W_enc, bias.masked_fill(~dead, -torch.inf), k, mesh)
    which = dead.nonzero()[:, 0]  # no bias keeps a latent away from both ends
    found = _choose(x, W_enc[which], bias[which], k, mesh, sign)
    return replace(found, indices=which[found.indices], n_latents=len(bias))


def threshold_updates(context: Context[Config], smallest: Tensor) -> Tensors:
    """Return the running mean of the smallest kept activation: the first as it is, then an exponential average."""
    threshold, seen = context.state["threshold"], context.state["threshold_steps"]
    if context.step < context.threshold_start:
        return {"last_smallest": smallest}
    decay = context.threshold_decay
    averaged = torch.where(seen > 0, decay * threshold + (1 - decay) * smallest, smallest)
    return {"last_smallest": smallest, "threshold": averaged, "threshold_steps": seen + 1}


def k_of(c: Matryoshka, size: int) -> int:
    """Return the latents per row that a prefix of `size` latents keeps."""
    k = max(1, round(c.k * size / c.n_latents)) if matryoshka_selection(c) == "scaled" else c.k
    return min(k, size)


@dataclass(frozen=True)
class _Affine:
    """What is there without codes."""

    goal: Tensor
    """What must be given, ``[n, d_out]``."""
    base: Tensor
    """What is given without any code: ``[d_out]``, or ``[n, d_out]`` with a skip path."""
    shift: Tensor
    """What b_dec adds to pre-activations, ``[n_latents]``: ``-W_enc @ offset``, so that the gradient of the encoder's
    subtraction is one small product; 0 of a transcoder."""
    bias: Tensor
    """``b_enc + shift``."""


def _affine(p: Tensors, x: Tensor, context: Context[Config]) -> _Affine:
    """Return what is there without codes of rows ``[n, d]``."""
    with torch.autocast(p["W_enc"].device.type, enabled=False):
        offset = p["b_dec"] - context.center
        if context.target is None:
            shift = -(p["W_enc"] @ entering(context.mesh, offset))
            return _Affine(x, offset, shift, p["b_enc"] + shift)
        base = offset + x @ p["W_skip"] if "W_skip" in p else offset
        return _Affine(context.target, base, torch.zeros_like(p["b_enc"]), p["b_enc"])


@dataclass(frozen=True)
class _Largest:
    """The largest pre-activations of each row, after ReLU, the largest first; of this rank's latents. Of codes with a
    sign the largest by magnitude, without ReLU.
    """

    values: Tensor
    indices: Tensor
    ranks: Tensor | None
    """Their ranks among those of all latents; None where these are all."""
    n_latents: int

    def part(self, first: int, last: int) -> tuple[Tensor, Pairs]:
        """Return the pairs of rank `first` to `last`; with several shards also others, with a value of 0."""
        if self.ranks is None:
            return self.values[:, first:last].reshape(-1), Pairs.even(self.indices[:, first:last], self.n_latents)
        values = self.values * ((self.ranks >= first) & (self.ranks < last))
        return values.reshape(-1), Pairs.even(self.indices, self.n_latents)

    def probed(self, u: Tensor) -> tuple[Tensor, Pairs]:
        """Return the pairs of as many ranks as `u` ``[n, m]`` has columns, and for each its number in `u`."""
        width, u = u.shape[1], u.to(self.values.device)
        if self.ranks is None:
            return u.reshape(-1), Pairs.even(self.indices[:, :width], self.n_latents)
        own = u.gather(1, self.ranks.clamp(max=width - 1)) * (self.ranks < width)
        return own.reshape(-1), Pairs.even(self.indices, self.n_latents)


def _choose(x: Tensor, W_enc: Tensor, bias: Tensor, k: int, mesh: Mesh, sign: str = "positive") -> _Largest:
    """Return the `k` largest of each row."""
    if not len(bias):  # none of this rank's latents is in the prefix
        values = torch.zeros(len(x), 0, device=x.device)
        indices = values.long()
    else:
        values, indices = choose_topk(x, W_enc, bias, min(k, len(bias)), sign)
    return _Largest(values, indices, ranks(mesh, values.abs() if sign == "magnitude" else values, k), len(bias))


def _choose_over_batch(pre: PreActivations, k: int, context: Context[Any]) -> tuple[Tensor, Pairs, Tensor]:
    """Return the ``k * rows`` largest of the whole batch, and the smallest of them; see `choose_batchtopk`."""
    mesh = context.mesh
    count = k * len(pre.x) * mesh.data_size  # of all ranks: so many may be this one's
    values, pairs, smallest = choose_batchtopk(pre, count, context.state["last_smallest"])
    if mesh.size == 1:
        return values, pairs, smallest
    smallest = smallest_of_largest(mesh, values, count)
    return *at_least(values, pairs, smallest), smallest


def _decode(p: Tensors, x: Tensor, bias: Tensor, chosen: tuple[Tensor, Pairs], mesh: Mesh) -> Tensor:
    """Return what the chosen pairs add to the decoder bias, with gradient for encoder and decoder."""
    values, pairs = chosen
    return over_latents(mesh, decode_pairs(encode_pairs(p["W_enc"], bias, x, values, pairs), p["W_dec"], pairs))


def _aux_term(p: Tensors, x: Tensor, bias: Tensor, residual: Tensor, context: Context[Revived]) -> Tensors:
    """Return the term ``aux_coefficient * V * AuxK`` when some latent can be dead."""
    coefficient = context.config.aux_coefficient
    if not coefficient or context.dead is None or not context.k_aux:
        return {}
    sign = getattr(context.config, "sign", "positive")
    aux = aux_loss(p, x, bias, residual, dead=context.dead, k_aux=context.k_aux, mesh=context.mesh, sign=sign)
    goal = x if context.target is None else context.target
    return {"aux": coefficient * variance(goal, context.mesh) * aux}


def _outcome(
    terms: Tensors,
    residual: Tensor,
    fired: Tensor,
    updates: Tensors | None = None,
    made: Reconstructed | None = None,
    **scalars: Tensor,
) -> Outcome:
    """Return the outcome of terms, and of those of dense codes."""
    losses = [*([] if made is None else [made.loss]), *terms.values()]
    parts = ({} if made is None else made.terms) | {name: value.detach() for name, value in terms.items()} | scalars
    return Outcome(torch.stack(losses).sum(), residual, fired, parts, updates or {})


def _reconstruct(
    code: Callable[..., Coded], p: Tensors, x: Tensor, affine: _Affine, of_latents: Tensors, mesh: Mesh
) -> Reconstructed:
    """Return what `reconstruct` does with the parameters of an SAE."""
    weights = p["W_enc"], affine.bias, p["W_dec"]
    return reconstruct(code, x, affine.goal, affine.base, weights, of_latents, mesh)


# ---------------------------------------------------------------- thresholds


class _Frequencies(torch.autograd.Function):
    """``mean over rows of H(pre - threshold)``: only the threshold gets a gradient."""

    @staticmethod
    def forward(ctx: Any, threshold: Tensor, above: Tensor, near: Tensor, width: float) -> Tensor:
        ctx.save_for_backward(near)
        ctx.width = width
        return above

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (near,) = ctx.saved_tensors
        return -(grad * near) / ctx.width, None, None, None


def jumprelu_loss(p: Tensors, x: Tensor, context: Context[JumpReLU]) -> Outcome:
    """Return the loss of JumpReLU: ``error + sparsity * V * (L0 / target - 1)^2 + aux_coefficient * AuxK``.

    With `density`, ``density * V * sum_j p_j^2 / density_at / target`` is added, p_j the frequency of latent j. With
    `tanh`, ``tanh * V * mean sum_j tanh(tanh_scale * code_j)`` stands for both terms, with `pre_activation`
    ``pre_activation * V * mean sum_j max(0, threshold_j - pre_j)`` is added.
    """
    c, n_rows = context.config, len(x)
    affine = _affine(p, x, context)
    V = variance(affine.goal, context.mesh)
    coefficient = context.state["coefficient"] if c.tanh else None

    def code(pre: Tensor, threshold: Tensor) -> Coded:
        above, near = pre > threshold, (pre - threshold).abs_() < c.bandwidth / 2
        codes, terms, sums = pre * above, {}, {"fired": above.sum(0).to(pre)}
        if coefficient is None:
            sums["near"] = near.sum(0).to(pre)
        else:
            pressure = tanh_warmth(context) * coefficient * V / n_rows
            soft = (c.tanh_scale * codes).tanh_()
            terms["sparsity"] = pressure * soft.sum()
        if c.pre_activation:
            pull = c.pre_activation * V / n_rows
            terms["pre_activation"] = pull * (threshold - pre).relu_().sum()

        def slopes(of_codes: Tensor) -> tuple[Tensor, Tensors]:
            if coefficient is not None:
                of_codes += (1 - soft.square()).mul_(pressure * c.tanh_scale)
            moved = (of_codes * near).mul_(threshold / c.bandwidth)
            of_pre, of_threshold = of_codes.mul_(above), -moved.sum(0)
            if coefficient is not None:
                of_pre += moved
            if c.pre_activation:
                short = pre < threshold
                of_pre -= pull * short
                of_threshold += pull * short.sum(0)
            return of_pre, {"threshold": of_threshold}

        return Coded(codes, slopes, terms=terms, sums=sums)

    threshold = p["log_threshold"].exp()
    made = _reconstruct(code, p, x, affine, {"threshold": threshold}, context.mesh)
    fired, terms = made.sums["fired"], _aux_term(p, x, affine.bias, made.residual, context)
    if coefficient is not None:
        updates = controlled(context, coefficient, fired, n_rows)
        return _outcome(terms, made.residual, fired, updates, made, coefficient=coefficient)
    frequencies = _Frequencies.apply(threshold, fired / n_rows, made.sums["near"] / n_rows, c.bandwidth)
    return _outcome(_of_frequencies(frequencies, V, context) | terms, made.residual, fired, made=made)


def tanh_warmth(context: Context[JumpReLU]) -> float:
    """Return the factor of the tanh penalty: without a target it rises over the whole run."""
    return (context.step + 1) / max(context.total_steps, 1) if context.config.target_l0 is None else context.warmth


def _of_frequencies(own: Tensor, V: Tensor, context: Context[JumpReLU]) -> Tensors:
    """Return the terms of L0 and of dense latents, of the frequencies on this rank's rows."""
    c = context.config
    assert c.target_l0 is not None  # required with these terms
    frequencies = over_rows(context.mesh, own)
    l0 = over_latents(context.mesh, frequencies.sum())
    terms = {"sparsity": context.warmth * c.sparsity * V * (l0 / c.target_l0 - 1).pow(2)}
    if c.density:
        weight = context.warmth * c.density * V / (c.density_at * c.target_l0)
        terms["density"] = weight * over_latents(context.mesh, frequencies.pow(2).sum())
    return terms


# ---------------------------------------------------------------- penalties


def relu_loss(p: Tensors, x: Tensor, context: Context[ReLU]) -> Outcome:
    """Return the loss of ReLU: ``error + l1 * mean over rows of sum_j codes_j * ||W_dec[j]||``."""
    affine = _affine(p, x, context)
    coefficient = context.state["coefficient"]
    pressure = context.warmth * coefficient / len(x)

    def code(pre: Tensor, norms: Tensor) -> Coded:
        codes = pre.relu_()
        totals = codes.sum(0)

        def slopes(of_codes: Tensor) -> tuple[Tensor, Tensors]:
            return of_codes.add_(pressure * norms).mul_(codes > 0), {"norms": pressure * totals}

        terms, sums = {"sparsity": pressure * (totals * norms).sum()}, {"fired": _count(codes)}
        return Coded(codes, slopes, terms=terms, sums=sums)

    made = _reconstruct(code, p, x, affine, {"norms": p["W_dec"].norm(dim=1)}, context.mesh)
    fired = made.sums["fired"]
    updates = controlled(context, coefficient, fired, len(x))
    return _outcome({}, made.residual, fired, updates, made, coefficient=coefficient)


def gated_loss(p: Tensors, x: Tensor, context: Context[Gated]) -> Outcome:
    """Return the loss of Gated: ``error + l1 * mean sum_j relu(gate_j) * ||W_dec[j]|| + ||x - x_hat(relu(gate))||^2``.

    The decoder is frozen in the last term, so that the gate is trained by it and the decoder is not.
    ``W_enc`` and ``b_enc`` are the gate's; the magnitude is ``relu(exp(r_mag) * g + b_mag)`` with
    ``g = (x - offset) @ W_enc.T``.
    """
    affine = _affine(p, x, context)
    coefficient = context.state["coefficient"]
    pressure = context.warmth * coefficient / len(x)

    def code(pre: Tensor, b_enc: Tensor, gain: Tensor, b_mag: Tensor, norms: Tensor) -> Coded:
        gate = (pre + b_enc).relu_()
        codes = (gain * pre).add_(b_mag).relu_().mul_(gate > 0)
        totals = gate.sum(0)

        def slopes(of_codes: Tensor, of_gate: Tensor) -> tuple[Tensor, Tensors]:
            of_magnitude, of_gate = of_codes.mul_(codes > 0), of_gate.add_(pressure * norms).mul_(gate > 0)
            found = {"b_enc": of_gate.sum(0), "b_mag": of_magnitude.sum(0), "norms": pressure * totals}
            found["gain"] = (of_magnitude * pre).sum(0)
            return of_gate.addcmul_(of_magnitude, gain), found

        terms, sums = {"sparsity": pressure * (totals * norms).sum()}, {"fired": _count(codes)}
        return Coded(codes, slopes, gate, terms, sums)

    of_latents = {"b_enc": p["b_enc"], "gain": p["r_mag"].exp(), "b_mag": p["b_mag"]}
    of_latents["norms"] = p["W_dec"].norm(dim=1)
    made = _reconstruct(code, p, x, replace(affine, bias=affine.shift), of_latents, context.mesh)
    fired = made.sums["fired"]
    updates = controlled(context, coefficient, fired, len(x))
    return _outcome({}, made.residual, fired, updates, made, coefficient=coefficient)


P_SMOOTH = 1e-3
"""``f**p`` is taken as ``(f + P_SMOOTH)**p - P_SMOOTH**p``: 0 at 0, equal to f at p = 1, with a bounded slope at 0
(that of ``f**p`` is infinite, and one code near 0 would outweigh all others in the clipped gradient)."""


def p_anneal_loss(p: Tensors, x: Tensor, context: Context[PAnneal]) -> Outcome:
    """Return the loss of P-anneal: ``error + coefficient * mean over rows of sum_j (codes_j * ||W_dec[j]||)^p``.

    When p falls, the coefficient is multiplied by the ratio of the two penalties (averaged over about 10 steps), so the
    pressure stays as it was.
    """
    c = context.config
    affine = _affine(p, x, context)
    index = p_index(c, context.step, context.total_steps)
    exponent, following = p_value(c, index), p_value(c, index + 1)
    coefficient = context.state["coefficient"]
    pressure = context.warmth * coefficient / len(x)

    def code(pre: Tensor, norms: Tensor) -> Coded:
        codes = pre.relu_()
        sizes = (codes * norms).add_(P_SMOOTH)
        powers = sizes.pow(exponent)
        penalties = torch.stack([p_penalty(powers, exponent), p_penalty(sizes.pow(following), following)])

        def slopes(of_codes: Tensor) -> tuple[Tensor, Tensors]:
            of_sizes = powers.div_(sizes).mul_(pressure * exponent)
            found = {"norms": (codes * of_sizes).sum(0)}
            return of_codes.addcmul_(of_sizes, norms).mul_(codes > 0), found

        sums = {"fired": _count(codes), "penalties": penalties / len(x)}
        return Coded(codes, slopes, terms={"sparsity": pressure * penalties[0]}, sums=sums)

    made = _reconstruct(code, p, x, affine, {"norms": p["W_dec"].norm(dim=1)}, context.mesh)
    fired = made.sums["fired"]
    updates = controlled(context, coefficient, fired, len(x))
    # Both penalties averaged over about 10 steps: one batch is too noisy to rescale a coefficient by.
    both = over_rows(context.mesh, over_latents(context.mesh, made.sums["penalties"]))
    recent = 0.9 * context.state["penalties"] + both
    if p_index(c, context.step + 1, context.total_steps) != index:
        updates["coefficient"] = updates.get("coefficient", coefficient) * recent[0] / recent[1].clamp(min=1e-12)
        recent = torch.zeros_like(recent)
    updates["penalties"] = recent
    exponent_now = torch.tensor(exponent, device=x.device)
    return _outcome({}, made.residual, fired, updates, made, coefficient=coefficient, p=exponent_now)


def p_penalty(powers: Tensor, p: float) -> Tensor:
    """Return the sum over rows of ``sum_j f_j ** p``, smoothed at 0 (`P_SMOOTH`), of ``(f_j + P_SMOOTH) ** p``."""
    return (powers - P_SMOOTH**p).sum()


def p_index(c: PAnneal, step: int, total_steps: int) -> int:
    """Return how many times p has changed before `step` (0 to `p_updates`)."""
    progress = step / max(total_steps, 1)
    fraction = (progress - c.p_start_fraction) / (1 - c.p_start_fraction)
    return min(max(math.floor((c.p_updates + 1) * fraction), 0), c.p_updates)


def p_value(c: PAnneal, index: int) -> float:
    """Return the exponent after `index` changes: from 1 to `p_end` in equal steps."""
    return 1 + (c.p_end - 1) * min(index, c.p_updates) / c.p_updates


def _count(codes: Tensor) -> Tensor:
    """Return the number of rows in which each latent fired, ``[n_latents]`` float."""
    return (codes > 0).sum(0).to(codes)


def controlled(
    context: Context[Penalized] | Context[JumpReLU], coefficient: Tensor, fired: Tensor, n_rows: int
) -> Tensors:
    """Return the coefficient after one step of the L0 controller; nothing when no L0 is asked for."""
    c = context.config
    if c.target_l0 is None:
        return {}
    l0 = over_rows(context.mesh, over_latents(context.mesh, fired.sum()) / n_rows)
    distance = (l0 / c.target_l0).clamp(min=1e-3).log()
    past = context.state["distance"] if context.step else distance
    # L0 answers with a delay of some hundred steps: steer by where it is going, not by where it is.
    ahead = (distance + CONTROLLER_LEAD * (distance - past)).clamp(-1, 1)
    factor = (CONTROLLER_GAIN * context.warmth * ahead).exp()
    return {
        "coefficient": (coefficient * factor).clamp(*COEFFICIENTS),
        "distance": past + 0.1 * (distance - past),
    }
