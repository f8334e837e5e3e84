"""Differentiable dense codes, a block of rows at a time: no array of all rows by all latents is made.

The terms of a loss of dense codes are sums over rows. So one pass does: the codes of a block give its part of the
reconstruction, that the gradient of these codes, and that a part of the gradients of the weights, which are added up.
A function of such sums that is none itself (JumpReLU's term of L0) is differentiated by them afterwards.
"""

from __future__ import annotations

from collections.abc import Callable, Container
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .. import kernels
from .mesh import Mesh, least_over_latents, over_latents

BLOCK_PART = 2
"""An array of a block takes at most one part in so many of what `saekit.kernels` allows for one: on a CPU the memory of
larger arrays goes back to the system and is paged in again, for each (a tenth of a step of 16,384 latents, d 768)."""

CACHED_BYTES = 2 * 2**20
"""Size of such an array on a CPU where enough rows fit into it: it stays in the caches (half of the time of a step of
2,048 latents, d 64)."""

LEAST_ROWS = 256
"""Rows that are enough for products at full speed, on a CPU: each block reads all weights and changes their gradients.
In bf16, where products take half of the time, twice as many."""

ERRORS = ("reconstruction", "gate")
WEIGHTS = ("base", "W_enc", "bias", "W_dec")
Tensors = dict[str, Tensor]


@dataclass(frozen=True)
class Coded:
    """What is made of the pre-activations of some rows; nothing here has a gradient."""

    codes: Tensor
    """``[rows, n_latents]``."""
    slopes: Callable[..., tuple[Tensor, Tensors]]
    """From the gradients of the errors by `codes` (and by `gate`), which it may change, the gradient of all terms by
    pre-activations ``[rows, n_latents]`` and by what else the codes depend on, by name."""
    gate: Tensor | None = None
    """Codes of a second reconstruction, from which the decoder and what is there without codes do not learn."""
    terms: Tensors = field(default_factory=dict)
    """Further terms of the loss: sums over the rows and this rank's latents."""
    sums: Tensors = field(default_factory=dict)
    """What else is summed over the rows."""


@dataclass(frozen=True)
class Reconstructed:
    """A loss of dense codes, and what it is made of."""

    loss: Tensor
    """All terms together, with their gradient."""
    terms: Tensors
    """``reconstruction`` and ``gate``, each ``mean over rows of ||goal - x_hat||^2``, and the further terms: of all
    latents, without gradient."""
    residual: Tensor
    """``goal - x_hat`` ``[n, d_out]``."""
    sums: Tensors
    """What else was summed, of this rank's latents."""


def reconstruct(
    code: Callable[..., Coded],
    x: Tensor,
    goal: Tensor,
    base: Tensor,
    weights: tuple[Tensor, Tensor, Tensor],
    of_latents: Tensors,
    mesh: Mesh,
) -> Reconstructed:
    """Reconstruct rows from dense codes.

    Parameters
    ----------
    code
        ``code(pre, **of_latents)`` of the pre-activations ``[rows, n_latents]`` of some rows, which it may change.
    x, goal
        Rows ``[n, d]``, and what their codes must give ``[n, d_out]``; they receive no gradient.
    base
        What is there without codes, ``[d_out]`` or ``[n, d_out]``.
    weights
        Encoder and bias, of which pre-activations are made, and decoder: ``[n_latents, d]``, ``[n_latents]`` and
        ``[n_latents, d_out]``.
    of_latents
        What else `code` needs by name, ``[n_latents]`` each.
    mesh
        The ranks that compute it together.
    """
    inputs = dict(zip(WEIGHTS, (base, *weights))) | of_latents
    learnt = {name: each for name, each in inputs.items() if torch.is_grad_enabled() and each.requires_grad}
    values = {name: each.detach() for name, each in inputs.items()}
    residual, terms, sums, gradients = torch.empty_like(goal), Tensors(), Tensors(), Tensors()
    if torch.is_autocast_enabled(x.device.type):  # once, not for every block
        low = torch.get_autocast_dtype(x.device.type)
        values |= {name: values[name].to(low) for name in ("W_enc", "W_dec")}
    size = least_over_latents(mesh, block_rows_of(values["W_enc"], values["bias"]), x.device)
    with torch.no_grad():
        for start in range(0, max(len(x), 1), size):
            rows = slice(start, start + size)
            own = values if base.ndim == 1 else values | {"base": values["base"][rows]}
            residual[rows], found, more = _add_block(code, x[rows], goal[rows], len(x), own, learnt, gradients, mesh)
            _add(terms, found)
            _add(sums, more)
        if "base" in learnt:
            gradients["base"] = _slope(residual, len(x)).sum_to_size(base.shape)
        further = [name for name in terms if name not in ERRORS]
        if further and mesh.latent_size > 1:  # in one message
            whole = over_latents(mesh, torch.stack([terms[name] for name in further]))
            terms |= dict(zip(further, whole.unbind()))
        loss = torch.stack(list(terms.values())).sum()
    if learnt:
        loss = _Known.apply(loss, [gradients[name] for name in learnt], *learnt.values())
    return Reconstructed(loss, terms, residual, sums)


def block_rows_of(W: Tensor, bias: Tensor) -> int:
    """Return how many rows of codes of latents ``[n_latents, d]`` are made at once."""
    n_latents, size = max(len(W), 1), bias.element_size()
    most = kernels.block_rows_for(n_latents, W.device, bytes_per_value=BLOCK_PART * size)
    if W.device.type != "cpu":
        return most
    return min(most, max(LEAST_ROWS * size // W.element_size(), CACHED_BYTES // (n_latents * size)))


def _add_block(
    code: Callable[..., Coded],
    x: Tensor,
    goal: Tensor,
    n_rows: int,
    own: Tensors,
    learnt: Container[str],
    gradients: Tensors,
    mesh: Mesh,
) -> tuple[Tensor, Tensors, Tensors]:
    """Add the gradients that some of `n_rows` rows give; return their residual, and their part of terms and sums."""
    base, W_enc, bias, W_dec = (own[name] for name in WEIGHTS)
    pre = torch.addmm(bias, x, W_enc.T).to(bias.dtype)  # not in bf16
    coded = code(pre, **{name: each for name, each in own.items() if name not in WEIGHTS})
    terms, slopes, residuals = dict(coded.terms), [], {}
    for name, codes in zip(ERRORS, (coded.codes, coded.gate)):
        if codes is None:
            continue
        residuals[name] = goal - (over_latents(mesh, codes @ W_dec) + base)
        terms[name] = residuals[name].square().sum() / n_rows
        if learnt:
            slope = _slope(residuals[name], n_rows)
            slopes.append((slope @ W_dec.T).to(codes.dtype))
            if "W_dec" in learnt and name == ERRORS[0]:
                _add_product(gradients, "W_dec", codes, slope)
    if learnt:
        of_pre, found = coded.slopes(*slopes)
        if "W_enc" in learnt:
            _add_product(gradients, "W_enc", of_pre, x)
        found["bias"] = of_pre.sum(0)
        _add(gradients, {name: each for name, each in found.items() if name in learnt})
    return residuals[ERRORS[0]], terms, coded.sums


def _slope(residual: Tensor, n_rows: int) -> Tensor:
    """Return the gradient of ``sum of residual ** 2 / n_rows`` by what was subtracted."""
    return (residual * -2).div_(n_rows)


def _add(total: Tensors, more: Tensors) -> None:
    for name, each in more.items():
        total[name] = total[name].add_(each) if name in total else each


def _add_product(total: Tensors, name: str, a: Tensor, b: Tensor) -> None:
    """Add ``a.T @ b``."""
    if name in total and not torch.is_autocast_enabled(a.device.type):  # which knows no product in place
        total[name].addmm_(a.T, b)
    else:
        _add(total, {name: (a.T @ b).to(a.dtype)})


class _Known(torch.autograd.Function):
    """A scalar whose gradients are known; they are given away, so once."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, gradients: list[Tensor], *inputs: Tensor) -> Tensor:
        ctx.gradients = gradients
        return value.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        gradients, ctx.gradients = ctx.gradients, None
        if gradients is None:
            raise RuntimeError("a loss of dense codes can be differentiated once; compute it again")
        torch._foreach_mul_(gradients, grad)
        return None, None, *gradients
