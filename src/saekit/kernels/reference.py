"""Plain torch kernels: the definition that every faster path is held to, and the fallback everywhere."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

BLOCK_BYTES = 32 * 2**20
"""Upper bound in bytes for one dense block of pre-activations; no dense ``[rows, n_latents]`` array is larger."""


def block_rows_for(n_latents: int, *, bytes_per_value: int = 4) -> int:
    """Rows of one block, so that a dense ``[rows, n_latents]`` block stays within `BLOCK_BYTES` (at least 1)."""
    return max(1, BLOCK_BYTES // (n_latents * bytes_per_value))


def topk_encode(
    x: Tensor, W_enc: Tensor, b_enc: Tensor, k: int, *, rank: Tensor | None = None, block_rows: int | None = None
) -> tuple[Tensor, Tensor]:
    """The `k` largest pre-activations of each row: ``pre = x @ W_enc.T + b_enc``, then ReLU on those kept.

    Parameters
    ----------
    x
        Centred rows, ``[n, d_in]``.
    W_enc, b_enc
        Encoder, ``[n_latents, d_in]`` and ``[n_latents]``.
    k
        Latents kept per row, 1 to n_latents.
    rank
        Positive weights ``[n_latents]``: chosen by ``pre * rank``, the codes stay ``pre``. None: by ``pre``.
    block_rows
        Rows per dense block; None picks `block_rows_for`.

    Returns
    -------
    values : Tensor ``[n, k]``
        Codes, zero where the pre-activation kept was not positive (such a latent has not fired).
    indices : Tensor ``[n, k]`` int64
        Latent of each value; the order within a row is descending in the ranked value.
    """
    block_rows = block_rows or block_rows_for(W_enc.shape[0])
    values = x.new_empty((x.shape[0], k))
    indices = torch.empty((x.shape[0], k), dtype=torch.int64, device=x.device)
    for start in range(0, x.shape[0], block_rows):
        rows = slice(start, start + block_rows)
        pre = torch.addmm(b_enc, x[rows], W_enc.T)  # [block, n_latents]
        if rank is None:
            top = pre.topk(k, dim=-1)
            values[rows], indices[rows] = top.values, top.indices
        else:
            chosen = (pre * rank).topk(k, dim=-1).indices
            values[rows], indices[rows] = pre.gather(1, chosen), chosen
    return values.relu_(), indices


def threshold_encode(
    x: Tensor, W_enc: Tensor, b_enc: Tensor, threshold: Tensor | None, *, block_rows: int | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """All pre-activations above a threshold: ``pre = x @ W_enc.T + b_enc`` where ``pre > max(threshold, 0)``.

    Parameters
    ----------
    x
        Centred rows, ``[n, d_in]``.
    W_enc, b_enc
        Encoder, ``[n_latents, d_in]`` and ``[n_latents]``.
    threshold
        ``[n_latents]``; None for 0, which is ReLU.
    block_rows
        Rows per dense block; None picks `block_rows_for`.

    Returns
    -------
    offsets, indices, values : Tensor
        Compressed sparse rows: ``[n + 1]`` int64, ``[nnz]`` int64, ``[nnz]``.
    """
    counts, indices, values = [], [], []
    for block in x.split(block_rows or block_rows_for(W_enc.shape[0])) if len(x) else (x,):
        pre = torch.addmm(b_enc, block, W_enc.T).relu()
        if threshold is not None:
            pre = pre * (pre > threshold)
        rows, latents = pre.nonzero(as_tuple=True)
        counts.append(torch.bincount(rows, minlength=len(block)))
        indices.append(latents)
        values.append(pre[rows, latents])
    offsets = torch.cat([counts[0].new_zeros(1), torch.cat(counts).cumsum(0)])
    return offsets, torch.cat(indices), torch.cat(values)


def csr_decode(offsets: Tensor, indices: Tensor, values: Tensor, W_dec: Tensor) -> Tensor:
    """Sum of decoder rows weighted by codes, ``[n, d_out]``: row r sums over ``offsets[r]:offsets[r + 1]``.

    Parameters
    ----------
    offsets, indices, values
        Compressed sparse rows: ``[n + 1]`` int64, ``[nnz]`` int64, ``[nnz]``.
    W_dec
        Decoder, ``[n_latents, d_out]``; the codes are taken in its dtype.
    """
    if not len(indices):
        return W_dec.new_zeros((len(offsets) - 1, W_dec.shape[1]))
    weights = values.to(W_dec.dtype)
    return F.embedding_bag(indices, W_dec, offsets, mode="sum", per_sample_weights=weights, include_last_offset=True)


def sparse_decode(values: Tensor, indices: Tensor, W_dec: Tensor) -> Tensor:
    """`csr_decode` for an even number of codes per row: values and indices ``[n, k]``; returns ``[n, d_out]``."""
    return F.embedding_bag(indices, W_dec, mode="sum", per_sample_weights=values.to(W_dec.dtype))


# ---------------------------------------------------------------- the training step of a TopK SAE


@dataclass(frozen=True)
class TopKSettings:
    """What a step of a TopK SAE computes."""

    k: int
    """Latents per row."""
    clip: float | None = 1.0
    """Largest L2 norm of the gradient of all weights together; None for no clipping."""
    k_aux: int = 0
    """Dead latents per row in AuxK; 0 switches it off."""
    aux_coefficient: float = 1 / 32
    """Weight of AuxK in units of the variance of the rows; 0 switches it off."""
    exact: bool = True
    """Latents are those of the fp32 product; False allows a low-precision choice."""


@dataclass(frozen=True)
class Adam:
    """Adam's numbers for one step."""

    lr: float
    """Learning rate of this step."""
    step: int
    """Number of this step, from 1."""
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8

    def factors(self) -> tuple[float, float, float, float, float]:
        """``1 - beta1, 1 - beta2, lr / (1 - beta1^t), 1 / sqrt(1 - beta2^t), eps``: all that the update needs."""
        root = (1 - self.beta2**self.step) ** -0.5
        return 1 - self.beta1, 1 - self.beta2, self.lr / (1 - self.beta1**self.step), root, self.eps


@dataclass(frozen=True, eq=False)
class StepOutcome:
    """What a step reports."""

    error: float
    """Sum over rows of ``||x - x_hat||^2``."""
    aux: float | None
    """The weighted AuxK term of the loss (a mean over rows); None when it was not computed."""
    fired: Tensor
    """Rows in which each latent fired, ``[n_latents]`` int64."""
    n_fired: int
    """Positive codes in the batch."""
    grad_norm: float
    """L2 norm of the gradient (after projection, before clipping)."""


def topk_step(
    weights: dict[str, Tensor],
    first: dict[str, Tensor],
    second: dict[str, Tensor],
    x: Tensor,
    offset: Tensor,
    settings: TopKSettings,
    adam: Adam,
    dead: Tensor | None = None,
) -> StepOutcome:
    """One training step of a TopK SAE with unit decoder rows, by dense differentiation: a definition, not a tool.

    ::

        pre   = (x - offset) @ W_enc.T + b_enc          codes = relu of the k largest
        x_hat = codes @ W_dec + offset                  e = (x - x_hat).detach()
        e_hat = (relu of the k_aux largest pre among dead latents) @ W_dec
        loss  = mean ||x - x_hat||^2 + aux_coefficient * V(x) * (mean ||e - e_hat||^2) / V(e)

    with ``V(x) = mean ||x - mean x||^2``, a constant. Then: the part of each decoder row's gradient that is parallel
    to the row is removed, the whole gradient is scaled to length `clip` at most, Adam moves the weights, decoder rows
    get length 1.

    Parameters
    ----------
    weights, first, second
        ``W_enc, W_dec [n_latents, d]``, ``b_enc [n_latents]``, ``b_dec [d]`` and Adam's two moments of each, changed in
        place. Decoder rows have length 1.
    x
        Rows minus a constant centre, ``[n, d]``.
    offset
        ``b_dec`` minus that centre, ``[d]``.
    settings, adam
        Numbers of the step.
    dead
        Latents that count as dead, ``[n_latents]`` bool; None for none.
    """
    with torch.enable_grad():
        leaves = {name: t.detach().clone().requires_grad_() for name, t in weights.items()}
        moved = offset.detach() + (
            leaves["b_dec"] - leaves["b_dec"].detach()
        )  # the value of offset, the gradient of b_dec
        pre = (x - moved) @ leaves["W_enc"].T + leaves["b_enc"]

        def codes_of(scores: Tensor, k: int) -> Tensor:
            chosen = scores.detach().topk(k, dim=-1).indices
            return torch.zeros_like(pre).scatter(1, chosen, pre.gather(1, chosen).relu())

        codes = codes_of(pre, settings.k)
        x_hat = codes @ leaves["W_dec"] + moved
        loss = (x - x_hat).pow(2).sum() / len(x)
        aux = None
        n_dead = 0 if dead is None else int(dead.sum())
        if dead is not None and n_dead and settings.k_aux and settings.aux_coefficient:
            e = (x - x_hat).detach()
            revived = codes_of(pre.masked_fill(~dead, -torch.inf), min(settings.k_aux, n_dead))
            weight = settings.aux_coefficient * variance(x) / variance(e)
            aux = weight * (e - revived @ leaves["W_dec"]).pow(2).sum() / len(x)
        total = loss if aux is None else loss + aux
        gradients = dict(zip(leaves, torch.autograd.grad(total, list(leaves.values()))))
    W, g = weights["W_dec"], gradients["W_dec"]
    gradients["W_dec"] = g - (g * W).sum(1, keepdim=True) * W
    norm = torch.cat([gradient.flatten().double() for gradient in gradients.values()]).norm()
    factor = 1.0 if settings.clip is None else (settings.clip / (norm + 1e-6)).clamp(max=1.0)
    memory1, memory2, rate, root, eps = adam.factors()
    for name, gradient in gradients.items():
        gradient = (gradient * factor).float()
        first[name].lerp_(gradient, memory1)
        second[name].lerp_(gradient.square(), memory2)
        weights[name].sub_(rate * first[name] / (second[name].sqrt() * root + eps))
    W.div_(W.norm(dim=1, keepdim=True).clamp(min=1e-12))
    fired = (codes.detach() > 0).sum(0)
    return StepOutcome(
        error=float(loss.detach()) * len(x),
        aux=None if aux is None else float(aux.detach()),
        fired=fired,
        n_fired=int(fired.sum()),
        grad_norm=float(norm),
    )


def variance(x: Tensor) -> Tensor:
    """``mean over rows of ||x - mean(x)||^2``, at least 1e-12."""
    return ((x - x.mean(0)).pow(2).sum() / len(x)).clamp(min=1e-12)
