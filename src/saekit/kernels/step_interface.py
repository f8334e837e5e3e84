"""What a fused training step is made of, on either device: the one interface of `cpu.ops` and `cuda.ops`.

A step hands arrays from one kernel to the next. On a CPU they are numpy arrays, which numba's loops take; on a CUDA
device they are tensors. `Array` stands for either. Rows, weights and gradients of rows are tensors on both.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, NamedTuple, Protocol, TypeAlias, TypeVar

import numpy as np
from torch import Tensor

Array = TypeVar("Array", np.ndarray, Tensor)

Scalar: TypeAlias = Any
"""One number: a float or a numpy scalar on a CPU, a tensor without axes on a GPU, where reading it would wait."""

Revived: TypeAlias = tuple[Tensor, Tensor, Tensor, Tensor]
"""Latents ``[m]`` int64, and a gradient of their decoder rows ``[m, d]``, encoder rows and biases ``[m]``."""


@dataclass(frozen=True, eq=False)
class Encoder:
    """An encoder at one step: what it subtracts from rows is a part of the bias."""

    W: Tensor
    bias: Tensor
    """``b_enc - W_enc @ offset``, ``[n_latents]``."""
    rounded: Any
    """The device's own copy of `W` in fewer bits; nobody else looks into it."""


@dataclass(frozen=True, eq=False)
class Pairs(Generic[Array]):
    """(row, latent) pairs, row by row."""

    offsets: Array
    """``[n_rows + 1]`` int64."""
    latents: Array
    """``[n_pairs]`` int64."""
    values: Array
    """Pre-activations or codes, ``[n_pairs]`` float32."""

    def where(self, kept: Array) -> Pairs[Array]:
        """Return the pairs that `kept` ``[n_pairs]`` bool marks."""
        if not len(kept):
            return self
        ends = kept.cumsum(0)
        # What is kept before pair c; the index -1 of the first pair is multiplied by 0.
        offsets = ends[self.offsets - 1] * (self.offsets > 0)
        return Pairs(offsets, self.latents[kept], self.values[kept])


@dataclass(frozen=True, eq=False)
class Fit(Generic[Array]):
    """A reconstruction, differentiated."""

    error: Scalar
    """Sum over rows of ``||x - x_hat||^2``, added in float64."""
    gradient: Tensor
    """Gradient of the loss by ``x_hat``, ``[n, d]``."""
    slopes: Array
    """``gradient . W_dec[latent]`` of each pair: the gradient of its code."""
    columns: Array
    """``gradient`` summed over rows, ``[d]``."""


@dataclass(frozen=True, eq=False)
class Terms(Generic[Array]):
    """What the gradient of the weights is a sum of: a term for each pair that counts."""

    pairs: Pairs[Array]
    """With more rows than there are, rows r + n, r + 2 n, ... are row r again."""
    wanted: Array
    """Which pairs count, ``[n_pairs]`` bool."""
    codes: Array
    """Factor of the decoder's gradient, ``[n_pairs]``."""
    slopes: Array
    """Gradient of the pre-activations, ``[n_pairs]``."""
    gradient: Tensor
    """Gradient of the loss by the reconstruction, ``[n, d]``, or ``[m * n, d]`` for m reconstructions."""
    sections: Sequence[int] = ()
    """Edges of groups of latents, each of which takes the next n rows of `gradient`."""


@dataclass(frozen=True, eq=False)
class Gradients(Generic[Array]):
    """The gradient of all weights with a latent axis."""

    of_enc: Array
    of_dec: Array
    """Before projection."""
    of_bias: Array
    along: Array
    """``of_dec[j] . W_dec[j]``, ``[n_latents]``: what projection removes."""
    squares: Array
    """``|of_dec[j]|^2 + |of_enc[j]|^2``, ``[n_latents]``."""
    of_offset: Array
    """What the bias passes on to the offset, ``[d]``."""
    counts: Array
    """Pairs of each latent, ``[n_latents]``."""
    written: Array | None = None
    """Latents whose rows of `of_enc` and `of_dec` are there, ``[n_latents]`` bool; those of the others are 0, and what
    the memory of these holds is undefined (see `StepKernels.filled`). None: all are."""


class AdamFactors(NamedTuple):
    """Numbers of one Adam update, see `Adam.factors`."""

    memory_m: float
    memory_v: float
    rate: float
    root: float
    eps: float


@dataclass(frozen=True)
class Adam:
    """How one step moves the weights: projection, clipping, Adam."""

    lr: float
    """Learning rate of this step."""
    step: int
    """Number of this step, from 1."""
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    clip: float | None = None
    """Maximum L2 norm of the gradient of all weights together; None for no clipping."""
    unit: bool = False
    """Whether decoder rows keep length 1."""
    rates: Mapping[str, float] = field(default_factory=dict)
    """Multiples of the learning rate, by weight."""

    def factors(self, weight: str) -> AdamFactors:
        """Return ``1 - beta1, 1 - beta2, lr / (1 - beta1^t), 1 / sqrt(1 - beta2^t), eps`` for a weight."""
        root = (1 - self.beta2**self.step) ** -0.5
        rate = self.lr / (1 - self.beta1**self.step) * self.rates.get(weight, 1.0)
        return AdamFactors(1 - self.beta1, 1 - self.beta2, rate, root, self.eps)


class StepKernels(Protocol[Array]):
    """The functions of `saekit.kernels.cpu.ops` and `saekit.kernels.cuda.ops`; both modules have all of them."""

    @property
    def array(self) -> Any:
        """The library that the arrays belong to: numpy or torch."""

    def number(self, value: Tensor) -> Scalar:
        """Return a running value to compute with."""

    def numbers(self, t: Tensor) -> Array:
        """Return a tensor to compute with, in the same memory."""

    def tensor(self, values: Array) -> Tensor:
        """Return the inverse of `numbers`."""

    def counts_of(self, latents: Array, n_latents: int) -> Array:
        """Return how often each latent occurs, ``[n_latents]`` int64."""

    def sums_of(self, latents: Array, weights: Array, n_latents: int) -> Array:
        """Return the sum of the weights of each latent's pairs, ``[n_latents]`` float64, in a fixed order."""

    def smallest_of_largest(self, values: Array, count: int) -> Scalar:
        """Return the smallest of the `count` largest values."""

    def room_for(self, x: Tensor, count: int) -> Tensor:
        """Return memory of undefined content for `count` sets of rows like `x`, one after the other."""

    def centered(self, x: Tensor, scale: Tensor | None, center: Tensor) -> Tensor:
        """Return ``x * scale - center``; the next call may use the same memory."""

    def variance(self, x: Tensor) -> Scalar:
        """Return ``mean over rows of ||x - mean(x)||^2``, at least 1e-12."""

    def row_norms(self, W: Tensor) -> Array:
        """Return the length of each row of ``W [n, d]``."""

    def encoder_at(self, W_enc: Tensor, b_enc: Tensor, offset: Tensor, x: Tensor) -> Encoder:
        """Return the encoder for rows like `x`, from which `offset` is yet to be subtracted."""

    def join(self, parts: Sequence[Pairs[Array]]) -> Pairs[Array]:
        """Return the pairs of several sets of rows, one set after the other."""

    def even_pairs(self, values: Array, latents: Array) -> Pairs[Array]:
        """Return as many pairs in every row, from ``[n, k]`` each."""

    def topk_pairs(self, x: Tensor, encoder: Encoder, k: int) -> Pairs[Array]:
        """Return the `k` largest of each row, after ReLU (0 where the pre-activation was not positive)."""

    def topk_pairs_of_prefixes(
        self, x: Tensor, encoder: Encoder, prefixes: Sequence[tuple[int, int]]
    ) -> list[Pairs[Array]]:
        """Return `topk_pairs` of the first `size` latents for each ``(size, k)``, from one product of all latents."""

    def topk_pairs_of_some(self, x: Tensor, W_enc: Tensor, bias: Tensor, k: int) -> Pairs[Array]:
        """Return the `k` largest of each row among some latents, after ReLU, in any order.

        An `Encoder` loses its copy.
        """

    def pairs_above(self, x: Tensor, encoder: Encoder, level: Tensor, room: int) -> Pairs[Array] | None:
        """Return all pre-activations above a level ``[n_latents]`` of any sign.

        None when a row has more than `room` of them, or when something is not finite.
        """

    def reconstruct(
        self,
        x: Tensor,
        pairs: Pairs[Array],
        codes: Array,
        W_dec: Tensor,
        offset: Tensor,
        weight: float = 1.0,
        name: str = "",
    ) -> Fit[Array]:
        """Decode the pairs and differentiate ``weight * mean over rows of ||x - x_hat||^2``.

        `name`: the result lies in memory that the next call with this name uses again.
        """

    def gradients(
        self,
        x: Tensor,
        offset: Tensor,
        weights: dict[str, Tensor],
        terms: Terms[Array],
        *,
        stretch: Array | None = None,
        revived: Revived | None = None,
        name: str = "",
    ) -> Gradients[Array]:
        """Sum each latent's terms: ``of_dec = sum code * gradient[row]``, ``of_enc = sum slope * (x[row] - offset)``.

        Parameters
        ----------
        x, offset, weights
            Centred rows ``[n, d]``, ``b_dec`` minus the centre ``[d]``, and at least ``W_enc`` and ``W_dec``.
        terms
            Pairs, their factors and the gradients that these multiply.
        stretch
            ``[n_latents]``; ``stretch[j] * W_dec[j]`` is added to `of_dec`.
        revived
            A further gradient of some latents.
        name
            The gradients lie in memory that the next call with this name uses again.
        """

    def filled(self, g: Gradients[Array]) -> Gradients[Array]:
        """Return a gradient with all its rows; they are written into its own memory."""

    def descend(
        self,
        weights: dict[str, Tensor],
        first: dict[str, Tensor],
        second: dict[str, Tensor],
        g: Gradients[Array],
        others: dict[str, Array],
        adam: Adam,
    ) -> Scalar:
        """Project, clip and apply Adam, all in place; return the length of the gradient.

        Parameters
        ----------
        weights, first, second
            Weights and Adam's moments of them.
        g
            Their gradient.
        others
            Gradients of further weights, `b_dec` among them; ``others["b_enc"]`` stands in for ``g.of_bias``.
        adam
            Settings of the step.
        """
