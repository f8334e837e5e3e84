"""What to train: one small frozen value per architecture, validated when it is made.

Fields that are None are filled in from the run (its width and its length) by `saekit.training.learner.resolve`; the
rule is stated at each field. Row norms, coefficients and bandwidths refer to *scaled* rows: with ``scaling="scalar"``
(the default) rows are multiplied by one number so that their mean length is ``sqrt(d_in)``, about 1 per dimension, and
the same coefficients fit any model.
"""

from __future__ import annotations

import math
from dataclasses import KW_ONLY, dataclass
from typing import Any, ClassVar

from ..errors import ConfigError

BIASES = ("geometric-median", "mean", "zero")
SCALINGS = ("scalar", "none")
CONTROLS = (None, "untrained", "frozen-decoder", "frozen-encoder")


@dataclass(frozen=True)
class Config:
    """Fields that every architecture has. Use one of the architectures; this class only holds what they share."""

    n_latents: int
    """Number of latents of the SAE."""
    _: KW_ONLY
    lr: float | None = None
    """Peak learning rate of Adam. None: ``2e-4 * sqrt(2**14 / n_latents)``. Unit: none (Adam's steps are in units of
    the weights)."""
    betas: tuple[float, float] = (0.9, 0.999)
    """Decay of Adam's first and second moments per step, each in [0, 1)."""
    warmup_steps: int | None = None
    """Steps over which the learning rate (and a sparsity coefficient) rises from 0. None: min(1000, 5% of the
    steps)."""
    decay_fraction: float = 0.2
    """Last part of the run in which the learning rate falls linearly to 0. Unit: fraction of the steps."""
    clip: float | None = 1.0
    """Largest allowed L2 norm of the gradient of all parameters together; None for no clipping."""
    dead_after_rows: int | None = None
    """A latent is dead when it has not fired for this many rows. None: min(10,000,000, 20% of the rows of the run).
    Unit: rows."""
    bias: str = "geometric-median"
    """Start of `b_dec`: ``geometric-median``, ``mean`` (both of the first 100,000 rows, or what there is) or
    ``zero``."""
    scaling: str = "scalar"
    """``scalar``: multiply rows by one number so that their mean norm is ``sqrt(d_in)``; it is stored in the SAE.
    ``none``: as they are."""
    control: str | None = None
    """None trains everything. ``untrained`` keeps the initial value. ``frozen-decoder`` (``frozen-encoder``) keeps
    the initial `W_dec`
    (`W_enc`) and trains the rest; biases and thresholds stay trainable so that a sparsity target can be met."""

    mutual: float = 0.0
    """Weight of mutual feature regularization: seeds of this configuration that are trained together pull each other's
    decoder rows closer (`saekit.training.mutual_regularization`), so an SAE then depends on which seeds run beside
    it. 0 switches it off. Unit: fraction of the variance of the rows, when no latent has a counterpart."""

    arch: ClassVar[str] = ""

    def __post_init__(self) -> None:
        _check_common(self)
        _check_specific(self)


@dataclass(frozen=True, kw_only=True)
class _Revived(Config):
    """Fields of architectures that revive dead latents with the auxiliary loss AuxK."""

    aux_coefficient: float = 1 / 32
    """Weight of AuxK: dead latents explain what the SAE leaves over. 0 switches it off. Unit: fraction of the
    reconstruction loss."""
    k_aux: int | None = None
    """Dead latents per row in AuxK. None: d_in / 2, at most `n_latents`. Unit: latents per row."""


@dataclass(frozen=True, kw_only=True)
class TopK(_Revived):
    """Keep the `k` largest pre-activations of each row (Gao et al., 2406.04093)."""

    k: int
    """Latents per row."""
    multi_topk: float = 0.0
    """Weight of a second reconstruction from ``4 * k`` latents (Multi-TopK; the paper uses 1/8). 0 switches it off.
    Unit: fraction of
    the reconstruction loss."""
    arch: ClassVar[str] = "topk"


@dataclass(frozen=True, kw_only=True)
class HierarchicalTopK(_Revived):
    """One SAE for many k: the `k` largest pre-activations of each row, of which every prefix reconstructs (2505.24473).

    Loss: ``sum_l weights[l] * ||x - x_hat_l||^2`` over the levels l, with ``x_hat_l`` from the l largest; AuxK on the
    full k. Afterwards any k up to the largest can be used: ``sae.with_k(8)``.
    """

    k: int
    """Latents per row at the last level."""
    levels: tuple[int, ...] | None = None
    """Latents per row at each level, increasing, the last equal to `k`. None: powers of two up to `k`, and `k`. (The
    paper takes all of 1..k; a level costs one sum of rows.) Unit: latents per row."""
    weights: tuple[float, ...] | None = None
    """Weight of each level; None for ``1 / number of levels`` each. Unit: fraction of the reconstruction loss."""
    arch: ClassVar[str] = "hierarchical-topk"


@dataclass(frozen=True, kw_only=True)
class BatchTopK(_Revived):
    """Keep the ``k * rows`` largest pre-activations of a batch in training; one threshold for every row afterwards
    (2412.06410).
    """

    k: int
    """Mean latents per row."""
    arch: ClassVar[str] = "batchtopk"


@dataclass(frozen=True, kw_only=True)
class JumpReLU(_Revived):
    """A threshold per latent, trained by straight-through estimators towards a given L0 (Rajamanoharan et al.,
    2407.14435).

    Loss: squared error + ``sparsity * V * (L0 / target_l0 - 1)**2`` with V the variance of the batch (summed over
    dimensions), so that the coefficient needs no tuning to the data.
    """

    target_l0: float
    """Mean latents per row to reach."""
    sparsity: float = 4.0
    """Weight of the L0 term. Unit: fraction of the variance of the rows, when L0 is twice its target."""
    bandwidth: float = 0.1
    """Width of the rectangular kernel that gives the thresholds their gradient. Unit: pre-activations of scaled
    rows."""
    arch: ClassVar[str] = "jumprelu"


@dataclass(frozen=True, kw_only=True)
class _Penalized(Config):
    """Fields of architectures that are sparse because of a penalty on the size of the codes."""

    l1: float = 2.0
    """Coefficient of the penalty; with `target_l0`, its first value. Unit: squared scaled length per scaled length."""
    target_l0: float | None = None
    """Mean latents per row to reach: the coefficient is adjusted in every step (and logged). None keeps the
    coefficient."""
    resample: bool = True
    """Point dead latents at rows that are reconstructed badly, every `dead_after_rows` rows in the first 60% of the
    run."""


@dataclass(frozen=True, kw_only=True)
class ReLU(_Penalized):
    """ReLU codes, L1 penalty on each code times the norm of its decoder row."""

    arch: ClassVar[str] = "relu"


@dataclass(frozen=True, kw_only=True)
class Gated(_Penalized):
    """One part decides whether a latent fires, another how strongly (Rajamanoharan et al., 2404.16014)."""

    arch: ClassVar[str] = "gated"


@dataclass(frozen=True, kw_only=True)
class PAnneal(_Penalized):
    """ReLU codes with penalty ``sum (code * norm)**p``; p falls from 1 to `p_end` (Karvonen et al., 2408.00113)."""

    p_end: float = 0.2
    """Last exponent, in (0, 1]."""
    p_start_fraction: float = 0.2
    """Part of the run after which p begins to fall. Unit: fraction of the steps."""
    p_updates: int = 10
    """Number of times p changes. At each change the coefficient is rescaled so that the penalty stays the same."""
    arch: ClassVar[str] = "p-anneal"


@dataclass(frozen=True, kw_only=True)
class Matryoshka(_Revived):
    """Nested sizes: every prefix of the latents reconstructs by itself (2503.17547, 2505.00190).

    Loss: ``sum_g weights[g] * ||x - x_hat_g||^2`` over the sizes g, and AuxK on the largest.
    """

    k: int
    """Latents per row at the largest size."""
    sizes: tuple[int, ...] | None = None
    """Prefix lengths, increasing, the last equal to `n_latents`. None: an eighth, a quarter, a half, all. Unit:
    latents."""
    weights: tuple[float, ...] | None = None
    """Weight c_g of each size; None for ``1 / number of sizes`` each. Unit: fraction of the reconstruction loss."""
    sampled: int = 0
    """Draw this many sizes anew in every step (log-uniform from n_latents / 64 up, besides `n_latents` itself)
    instead of fixed `sizes`."""
    over: str = "topk"
    """``topk``: selection per row; ``batchtopk``: over the batch, with one threshold afterwards."""
    k_per_size: str | None = None
    """How a prefix of length g selects. ``fixed``: `k` among its own latents, what ``sae.take(g)`` does with a TopK
    SAE. ``scaled``:
    ``max(1, round(k * g / n_latents))`` among its own. ``truncated``: the selection of the full size, cut. None:
    ``fixed`` over
    topk, ``truncated`` over batchtopk (there one threshold serves all sizes)."""
    arch: ClassVar[str] = "matryoshka"


def matryoshka_sizes(config: Matryoshka) -> tuple[int, ...]:
    """The fixed sizes of a Matryoshka configuration, defaults filled in."""
    if config.sizes is not None:
        return config.sizes
    return tuple(sorted({max(1, config.n_latents // part) for part in (8, 4, 2, 1)}))


def hierarchical_levels(config: HierarchicalTopK) -> tuple[int, ...]:
    """The levels of a hierarchical configuration, defaults filled in."""
    if config.levels is not None:
        return config.levels
    return tuple(sorted({*(2**power for power in range(config.k.bit_length())), config.k}))


def matryoshka_selection(config: Matryoshka) -> str:
    """``fixed``, ``scaled`` or ``truncated``, the default filled in."""
    return config.k_per_size or ("fixed" if config.over == "topk" else "truncated")


def is_whole(value: Any) -> bool:
    """Whether a value is a whole number and not a bool."""
    return isinstance(value, int) and not isinstance(value, bool)


def is_number(value: Any) -> bool:
    """Whether a value is a finite real number and not a bool."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _check_common(c: Config) -> None:
    if not c.arch:
        raise ConfigError(
            "`Config` holds shared fields only; make one of the architectures, for example TopK(n_latents=1024, k=16)."
        )
    _must(c, "n_latents", is_whole(c.n_latents) and c.n_latents >= 1, "a whole number of at least 1")
    _must(c, "lr", c.lr is None or (is_number(c.lr) and c.lr > 0), "a positive number or None")
    _freeze_sequence(c, "betas")
    valid = isinstance(c.betas, tuple) and len(c.betas) == 2 and all(is_number(b) and 0 <= b < 1 for b in c.betas)
    _must(c, "betas", valid, "two numbers in [0, 1)")
    _must(
        c,
        "warmup_steps",
        c.warmup_steps is None or (is_whole(c.warmup_steps) and c.warmup_steps >= 0),
        "a whole number of steps from 0, or None",
    )
    _must(c, "decay_fraction", is_number(c.decay_fraction) and 0 <= c.decay_fraction <= 1, "a number in [0, 1]")
    _must(c, "clip", c.clip is None or (is_number(c.clip) and c.clip > 0), "a positive number or None")
    _must(
        c,
        "dead_after_rows",
        c.dead_after_rows is None or (is_whole(c.dead_after_rows) and c.dead_after_rows >= 1),
        "a positive whole number of rows, or None",
    )
    _must(c, "mutual", is_number(c.mutual) and c.mutual >= 0, "0 or a positive number")
    for name, options in (("bias", BIASES), ("scaling", SCALINGS), ("control", CONTROLS)):
        _one_of(c, name, options)


def _check_specific(c: Any) -> None:
    """Checks by field, so that every architecture that has the field gets them."""
    if _has(c, "k"):
        _must(c, "k", is_whole(c.k) and c.k >= 1, "a whole number of at least 1")
        if c.k > c.n_latents:
            raise ConfigError(
                f"`{type(c).__name__}.k` must be at most n_latents={c.n_latents}; got k={c.k}. "
                "Lower k or widen the SAE."
            )
    if _has(c, "aux_coefficient"):
        _must(c, "aux_coefficient", is_number(c.aux_coefficient) and c.aux_coefficient >= 0, "0 or a positive number")
        _must(
            c, "k_aux", c.k_aux is None or (is_whole(c.k_aux) and c.k_aux >= 1), "a whole number of at least 1, or None"
        )
    if _has(c, "multi_topk"):
        _must(c, "multi_topk", is_number(c.multi_topk) and c.multi_topk >= 0, "0 or a positive number")
    if _has(c, "target_l0") and not (c.target_l0 is None and _has(c, "l1")):
        _must(
            c,
            "target_l0",
            is_number(c.target_l0) and 0 < c.target_l0 <= c.n_latents,
            f"a positive number of latents per row, at most n_latents={c.n_latents}",
        )
    if _has(c, "bandwidth"):
        _must(c, "bandwidth", is_number(c.bandwidth) and c.bandwidth > 0, "a positive number")
        _must(c, "sparsity", is_number(c.sparsity) and c.sparsity >= 0, "0 or a positive number")
    if _has(c, "l1"):
        _must(c, "l1", is_number(c.l1) and c.l1 >= 0, "0 or a positive number")
        if c.target_l0 is not None:
            _must(c, "l1", c.l1 > 0, "positive when `target_l0` is given, since the coefficient is adjusted by factors")
        _must(c, "resample", isinstance(c.resample, bool), "True or False")
    if _has(c, "p_end"):
        _must(c, "p_end", is_number(c.p_end) and 0 < c.p_end <= 1, "a number in (0, 1]")
        _must(
            c, "p_start_fraction", is_number(c.p_start_fraction) and 0 <= c.p_start_fraction < 1, "a number in [0, 1)"
        )
        _must(c, "p_updates", is_whole(c.p_updates) and c.p_updates >= 1, "a whole number of at least 1")
    if _has(c, "sizes"):
        _check_sizes(c)
    if _has(c, "levels"):
        _check_levels(c)


def _check_sizes(c: Matryoshka) -> None:
    _freeze_sequence(c, "sizes")
    _freeze_sequence(c, "weights")
    _one_of(c, "over", ("topk", "batchtopk"))
    _one_of(c, "k_per_size", (None, "fixed", "scaled", "truncated"))
    _must(c, "sampled", is_whole(c.sampled) and c.sampled >= 0, "0 or a positive whole number")
    if c.sampled and (c.sizes is not None or c.weights is not None):
        raise ConfigError(
            "`Matryoshka.sampled` draws the sizes and weighs them equally; got `sizes` or `weights` beside it. "
            "Drop one of the two."
        )
    sizes = matryoshka_sizes(c)
    increasing = all(is_whole(s) for s in sizes) and all(a < b for a, b in zip((0, *sizes), sizes))
    if not sizes or not increasing or sizes[-1] != c.n_latents:
        raise ConfigError(
            f"`Matryoshka.sizes` must increase and end at n_latents={c.n_latents}; got {list(sizes)}. "
            "Drop repeats and anything above, and add the full size at the end."
        )
    _check_weights(c, len(sizes), "sizes")


def _check_levels(c: HierarchicalTopK) -> None:
    _freeze_sequence(c, "levels")
    _freeze_sequence(c, "weights")
    levels = hierarchical_levels(c)
    increasing = all(is_whole(level) for level in levels) and all(a < b for a, b in zip((0, *levels), levels))
    if not levels or not increasing or levels[-1] != c.k:
        raise ConfigError(
            f"`HierarchicalTopK.levels` must increase and end at k={c.k}; got {list(levels)}. "
            "Drop repeats and anything above, and add k at the end."
        )
    _check_weights(c, len(levels), "levels")


def _check_weights(c: Any, count: int, what: str) -> None:
    if c.weights is not None:
        valid = len(c.weights) == count and all(is_number(w) and w >= 0 for w in c.weights) and sum(c.weights) > 0
        _must(c, "weights", valid, f"one number from 0 up for each of the {count} {what}, not all 0")


def _has(config: Any, name: str) -> bool:
    return name in type(config).__dataclass_fields__


def _freeze_sequence(config: Any, name: str) -> None:
    """Lists (as TOML and JSON give them) become tuples."""
    value = getattr(config, name)
    if isinstance(value, list):
        object.__setattr__(config, name, tuple(value))


def _must(config: Any, name: str, valid: bool, what: str) -> None:
    if not valid:
        raise ConfigError(f"`{type(config).__name__}.{name}` must be {what}; got {getattr(config, name)!r}.")


def _one_of(config: Any, name: str, options: tuple[Any, ...]) -> None:
    value = getattr(config, name)
    if value not in options:
        shown = ", ".join(repr(option) for option in options)
        raise ConfigError(f"`{type(config).__name__}.{name}` must be one of {shown}; got {value!r}.")
