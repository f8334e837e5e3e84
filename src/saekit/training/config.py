"""What to train: one small frozen value per architecture, validated when it is made.

Fields that are None are filled in from the run (its width and its length) by `saekit.training.defaults.resolve`; the
rule is stated at each field. Coefficients and bandwidths refer to *scaled* rows: with ``scaling="centered"`` (the
default) rows are multiplied by one number so that their mean distance from the initial `b_dec` is ``sqrt(d_in)``, about
1 per dimension, and the same coefficients fit any model, wherever the mean of its rows is.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import KW_ONLY, dataclass, fields
from typing import TYPE_CHECKING, Any, ClassVar

from ..errors import ConfigError
from ..settings import is_number, is_whole, suggest_keywords

BIASES = ("geometric-median", "mean", "zero")
SCALINGS = ("centered", "scalar", "none")
SKIPS = (None, "zero", "least-squares")
CONTROLS = (None, "untrained", "frozen-decoder", "frozen-encoder", "soft-frozen-decoder")
ENCODER_LENGTH = 0.2
"""Default length of initial encoder rows where the largest pre-activations are kept: FVU and dead latents on rows of
models, and latents on a known dictionary, are better than with 1 (`benchmarks/rates.py`, `benchmarks/truth.py`)."""
ENCODER_KEPT = ("untrained", "frozen-encoder")
"""Controls that leave the encoder as it is at first."""


@dataclass(frozen=True)
class Config:
    """Fields that every architecture has. Use one of the architectures; this class holds what they share."""

    n_latents: int
    """Number of latents."""
    _: KW_ONLY
    lr: float | None = None
    """Peak learning rate of Adam [by `saekit.training.defaults.default_lr`: about 9e-3 with 1024 latents, 16 of them
    per row, 512 rows per step and 1000 steps; less with more latents, more steps, smaller batches, or wide rows in
    large batches, and more with fewer latents]."""
    betas: tuple[float, float] = (0.9, 0.999)
    """Decay of Adam's first and second moments per step, each in [0, 1) [0.9, 0.999]."""
    warmup_steps: int | None = None
    """Steps over which the learning rate (and a sparsity coefficient) rises from 0 [5% of the steps, 10% where the
    largest pre-activations are kept, at most 1000]."""
    decay_fraction: float = 0.35
    """Last fraction of the steps, in which the learning rate falls linearly to 0 [0.35]."""
    clip: float | None = 1.0
    """Maximum L2 norm of the gradient of all parameters together; None for no clipping [1.0]."""
    dead_after_rows: int | None = None
    """Rows without firing after which a latent is dead [2% of the rows of the run, at least 8 batches, at most
    10,000,000 rows]."""
    bias: str = "geometric-median"
    """Initial `b_dec`: ``geometric-median`` or ``mean`` of the first 100,000 rows, or ``zero``. Of a transcoder what is
    subtracted from the rows before the encoder, for good; its `b_dec` begins at the mean of the targets, or at zero
    [geometric-median]."""
    scaling: str = "centered"
    """``centered``: rows multiplied by one number, stored in the SAE, so that their mean distance from the initial
    `b_dec` is ``sqrt(d_in)``; ``scalar``: so that their mean norm is; ``none``: rows as they are [centered]."""
    control: str | None = None
    """Parameters that are not trained: ``untrained``: none is; ``frozen-decoder``, ``frozen-encoder``: all but the
    initial `W_dec` (`W_enc`), with biases and thresholds, so that a sparsity target can be met. A frozen decoder is
    random with the covariance of the rows, the stronger baseline. ``soft-frozen-decoder``: everything is trained, but
    decoder rows keep a cosine of at least 0.8 with those random ones (2602.14111) [everything trained]."""

    mutual: float = 0.0
    """Weight of mutual feature regularization (2411.01220), as a fraction of the variance of the rows: the seeds of
    this configuration that are trained together pull each other's decoder rows closer, so an SAE then depends on which
    seeds are in the same call; 0 for none [0]."""
    aligned: bool = False
    """Whether every latent's encoder row (of `Gated`, that of its gate) keeps a product of 1 with its decoder row
    (after 2605.18629) [false]."""
    l2: float = 0.0
    """Weight of the mean squared length of encoder and decoder rows (after 2603.04198), as a fraction of the variance
    of the rows; 0 for none [0]."""
    orthogonal: float = 0.0
    """Weight of OrtSAE's penalty on decoder rows that are close to another one (2509.22033), as a fraction of the
    variance of the rows; 0 for none [0]."""
    orthogonal_chunk: int = 8192
    """Number of decoder rows that are compared with each other, chosen at random in every step [8192]."""
    subspace: float | None = None
    """Fraction of the dimensions of the rows, by variance, in which initial decoder and encoder rows lie (2508.16929)
    [all dimensions]."""
    skip: str | None = None
    """Initial value of a linear path of a transcoder around the latents (2501.18823): ``zero``, or ``least-squares``,
    the best affine map of the first 100,000 rows to their targets, of which the latents then explain the rest
    [no such path]."""

    arch: ClassVar[str] = ""

    def __post_init__(self) -> None:
        if not self.arch:
            raise ConfigError(
                "`Config` holds shared fields only; make one of the architectures, for example "
                "TopK(n_latents=1024, k=16)."
            )
        for each in fields(self):
            if isinstance(getattr(self, each.name), list):  # as TOML and JSON give them; tuples can be hashed
                object.__setattr__(self, each.name, tuple(getattr(self, each.name)))
            if each.name in _RULES:
                valid, what = _RULES[each.name]
                self._must(each.name, valid(getattr(self, each.name)), what)
        self._check_needs()
        self._check()
        self._check_penalties()

    def _check_needs(self) -> None:
        """Refuse what would change nothing: values of fields that are about another one, which is left out."""
        for name, about in _NEEDS.items():
            if not hasattr(self, name) or getattr(self, about) or getattr(self, name) == getattr(type(self), name):
                continue
            raise ConfigError(
                f"`{type(self).__name__}.{name}` is about `{about}`, which is {getattr(self, about)!r}, and would "
                f"change nothing; got {name}={getattr(self, name)!r}. Give `{about}` as well, or leave it out."
            )

    def _check(self) -> None:
        """Refuse combinations of fields that cannot work; raises `ConfigError`."""

    def _check_penalties(self) -> None:
        """Refuse penalties and constraints where they mean nothing, or contradict each other."""
        wanted = [name for name in ("aligned", "l2", "orthogonal", "incoherence") if getattr(self, name, None)]
        if not wanted:
            return
        name = f"{type(self).__name__}.{wanted[0]}"
        if self.control is not None:
            raise ConfigError(f"`{name}` moves weights, which control={self.control!r} holds. Drop one of the two.")
        if self.arch in ("relu", "p-anneal"):
            raise ConfigError(
                f"`{name}` needs decoder rows of length 1, which {type(self).__name__} does not keep. "
                "Take another architecture."
            )
        if self.aligned and self.l2:
            raise ConfigError(
                f"`{name}` fixes the product of encoder and decoder rows, which `l2` shrinks; got both. Drop one."
            )

    def _must(self, name: str, valid: bool, what: str) -> None:
        if not valid:
            raise ConfigError(f"`{type(self).__name__}.{name}` must be {what}; got {getattr(self, name)!r}.")

    def _check_k(self, k: int) -> None:
        if k > self.n_latents:
            raise ConfigError(
                f"`{type(self).__name__}.k` must be at most n_latents={self.n_latents}; got k={k}. "
                "Lower k or widen the SAE."
            )

    def _check_k_start(self, k: int, k_start: int | None) -> None:
        if k_start is not None and not k <= k_start <= self.n_latents:
            self._must("k_start", False, f"from k={k} to n_latents={self.n_latents}")

    def _check_target(self, target_l0: float) -> None:
        self._must(
            "target_l0",
            is_number(target_l0) and 0 < target_l0 <= self.n_latents,
            f"a positive number of latents per row, at most n_latents={self.n_latents}",
        )

    def _check_increasing(self, name: str, values: tuple[int, ...], end: str, last: int) -> None:
        increasing = all(is_whole(v) for v in values) and all(a < b for a, b in zip((0, *values), values))
        if not values or not increasing or values[-1] != last:
            raise ConfigError(
                f"`{type(self).__name__}.{name}` must increase and end at {end}={last}; got {list(values)}. "
                f"Drop repeats and anything above, and add {last} at the end."
            )

    def _check_weights(self, weights: tuple[float, ...] | None, count: int, what: str) -> None:
        if weights is not None:
            valid = len(weights) == count and all(is_number(w) and w >= 0 for w in weights) and sum(weights) > 0
            self._must("weights", valid, f"one number from 0 up for each of the {count} {what}, not all 0")


@dataclass(frozen=True, kw_only=True)
class Revived(Config):
    """Fields of architectures that revive dead latents with the auxiliary loss AuxK (2406.04093)."""

    aux_coefficient: float = 1 / 32
    """Weight of AuxK, in which dead latents explain the residual, as a fraction of the variance of the rows; 0 for none
    [1/32]."""
    k_aux: int | None = None
    """Dead latents per row in AuxK [d_in / 2, at most n_latents]."""


@dataclass(frozen=True, kw_only=True)
class Selecting(Revived):
    """Fields of architectures that keep the `k` largest pre-activations."""

    if TYPE_CHECKING:
        k: int  # a field of each of them, which says there what it counts
    encoder_length: float | None = None
    """Length of the initial encoder rows, which point where the decoder rows do [0.2; 1 where something else sets
    it]."""
    # Rows of length 1 overshoot while codes are as long as k of them, and latents die of it: benchmarks/rates.py.

    def _check_penalties(self) -> None:
        super()._check_penalties()
        fixed = encoder_fixed(self)
        if fixed and self.encoder_length is not None:
            raise ConfigError(
                f"`{type(self).__name__}.encoder_length` would change nothing with `{fixed}`, which sets how long "
                f"encoder rows are; got encoder_length={self.encoder_length:g}. Drop one of the two."
            )


def encoder_fixed(config: Selecting) -> str | None:
    """Return the name of the field that says how long encoder rows are, if one does."""
    return "aligned" if config.aligned else "control" if config.control in ENCODER_KEPT else None


def encoder_length(config: Selecting) -> float:
    """Return the length of the initial encoder rows, the default filled in."""
    if encoder_fixed(config):
        return 1.0
    return ENCODER_LENGTH if config.encoder_length is None else config.encoder_length


@suggest_keywords
@dataclass(frozen=True, kw_only=True)
class TopK(Selecting):
    """Keep the `k` largest pre-activations of each row (Gao et al., 2406.04093)."""

    k: int
    """Latents per row."""
    multi_topk: float = 0.0
    """Weight of a second reconstruction from ``4 * k`` latents (Multi-TopK; the paper uses 1/8), as a fraction of the
    reconstruction loss; 0 for none [0]."""
    k_start: int | None = None
    """Latents per row in the first step, from where they fall linearly to `k` (Llama Scope, 2410.20526) [k]."""
    k_fraction: float = 0.1
    """Fraction of the steps after which `k` is reached, with `k_start` [0.1]."""
    sign: str = "positive"
    """``positive``: codes are not negative; ``magnitude``: the `k` largest by magnitude, each with its sign (AbsTopK,
    2510.00404) [positive]."""
    incoherence: float = 0.0
    """Weight of iSAE's penalty on decoder rows that are large in the same row of data and not orthogonal, with
    sign = magnitude (2605.31245, which takes 0.1), as a fraction of the variance of the rows; 0 for none [0]."""
    arch: ClassVar[str] = "topk"

    def _check(self) -> None:
        self._check_k(self.k)
        self._check_k_start(self.k, self.k_start)
        if self.incoherence and self.sign != "magnitude":
            raise ConfigError(
                f"`TopK.incoherence` is iSAE's, whose codes have a sign; got sign={self.sign!r}. Add sign='magnitude', "
                "or take `orthogonal`, which suits any codes."
            )


@suggest_keywords
@dataclass(frozen=True, kw_only=True)
class HierarchicalTopK(Selecting):
    """One SAE for many k: the `k` largest pre-activations of each row, of which every prefix reconstructs (2505.24473).

    Loss: ``sum_l weights[l] * ||x - x_hat_l||^2`` over the levels l, with ``x_hat_l`` from the l largest; AuxK on the
    full k. Afterwards any k up to the largest can be used: ``sae.with_k(8)``.
    """

    k: int
    """Latents per row at the last level."""
    levels: tuple[int, ...] | None = None
    """Latents per row at each level, increasing, the last equal to `k`; the paper takes all of 1..k, and a level costs
    one sum of rows [powers of two up to k, and k]."""
    weights: tuple[float, ...] | None = None
    """Weight of each level, as a fraction of the reconstruction loss [equal]."""
    arch: ClassVar[str] = "hierarchical-topk"

    def _check(self) -> None:
        self._check_k(self.k)
        levels = hierarchical_levels(self)
        self._check_increasing("levels", levels, "k", self.k)
        self._check_weights(self.weights, len(levels), "levels")


@suggest_keywords
@dataclass(frozen=True, kw_only=True)
class BatchTopK(Selecting):
    """Keep the ``k * rows`` largest pre-activations of a batch in training; one threshold for every row afterwards
    (2412.06410).
    """

    k: int
    """Mean latents per row."""
    k_start: int | None = None
    """Mean latents per row in the first step, from where they fall linearly to `k` (Llama Scope, 2410.20526) [k]."""
    k_fraction: float = 0.1
    """Fraction of the steps after which `k` is reached, with `k_start` [0.1]."""
    parts: tuple[int, ...] | None = None
    """Widths of the sources that lie side by side in a row, of a crosscoder (2504.02922); the rows say so themselves
    (`join_rows`). The largest are then those of code times ``sum_m |d_m|``, d_m the part of the decoder row
    that writes source m [rows of one source]."""
    arch: ClassVar[str] = "batchtopk"

    def _check(self) -> None:
        self._check_k(self.k)
        self._check_k_start(self.k, self.k_start)


@suggest_keywords
@dataclass(frozen=True, kw_only=True)
class JumpReLU(Revived):
    """A threshold per latent, trained by straight-through estimators towards a given L0 (Rajamanoharan et al.,
    2407.14435).

    Loss: squared error + ``sparsity * V * (L0 / target_l0 - 1)**2`` with V the variance of the batch (summed over
    dimensions), so that the coefficient needs no tuning to the data. With `tanh` the form of Anthropic (January 2025):
    ``tanh * V * mean over rows of sum_j tanh(tanh_scale * code_j)`` instead of the L0 term, and the kernel of the
    thresholds passes gradient to all parameters.
    """

    target_l0: float | None = None
    """Mean latents per row to reach; with `tanh` its weight is adjusted in every step [with `tanh` none: the weight
    rises from 0 over the whole run]."""
    sparsity: float = 4.0
    """Weight of the L0 term, as a fraction of the variance of the rows when L0 is twice its target; not with `tanh`
    [4.0]."""
    tanh: float = 0.0
    """Weight of the tanh penalty for each latent of a row instead of the L0 term, with `target_l0` its initial value,
    as a fraction of the variance of the rows; 0 for the L0 term [0]."""
    tanh_scale: float = 4.0
    """Steepness of the tanh penalty, per unit of codes of scaled rows [4.0]."""
    pre_activation: float = 0.0
    """Weight of the penalty ``max(0, threshold - pre)``, summed over latents, which pulls those that do not fire
    towards it (Anthropic, January 2025), as a fraction of the variance of the rows; 0 for none [0]."""
    # FVU / dead latents at 0.1, 1 and 2: .092 / 54%, .084 / 2.9%, .086 / .1% (stories260K, 1,024 latents, target 16,
    # 400,000 rows, lr 3e-3, dead after 2% of the rows).
    bandwidth: float = 2.0
    """Width of the rectangular kernel that gives the thresholds their gradient, in pre-activations of scaled rows. A
    narrow one reaches few rows, and thresholds that are too high stay there: their latents die [2.0]."""
    density: float = 0.0
    """Weight of the penalty on dense latents, ``sum_j p_j^2 / density_at / target_l0`` with p_j the fraction of the
    rows on which latent j fires (after Gemma Scope 2), as a fraction of the variance of the rows; not
    with `tanh`; 0 for none [0]."""
    density_at: float = 0.1
    """Fraction of the rows from which a latent counts as dense, with `density` [0.1]."""
    arch: ClassVar[str] = "jumprelu"

    def _check(self) -> None:
        for name in ("sparsity", "density"):
            if self.tanh and getattr(self, name) != getattr(type(self), name):
                raise ConfigError(
                    f"`JumpReLU.{name}` must not be given with `tanh`, whose penalty stands for the terms of L0 and of "
                    f"dense latents; got {name}={getattr(self, name):g} and tanh={self.tanh:g}. Leave out one of them."
                )
        if self.target_l0 is not None:
            self._check_target(self.target_l0)
        elif not self.tanh:
            raise ConfigError(
                "`JumpReLU.target_l0` must be given without `tanh`; got None. Add the mean latents per row, "
                "target_l0=16 say."
            )


@dataclass(frozen=True, kw_only=True)
class Penalized(Config):
    """Fields of architectures that are sparse because of a penalty on the size of the codes."""

    l1: float = 2.0
    """Coefficient of the penalty, with `target_l0` its initial value, in squared scaled length per scaled length
    [2.0]."""
    target_l0: float | None = None
    """Mean latents per row to reach: the coefficient is adjusted in every step, and logged [coefficient kept]."""
    resample: bool = True
    """Whether dead latents are pointed at rows that are reconstructed badly, every `dead_after_rows` rows in the first
    60% of the run [true]."""

    def _check(self) -> None:
        if self.target_l0 is not None:
            self._check_target(self.target_l0)
            self._must("l1", self.l1 > 0, "positive with `target_l0`, since the coefficient is adjusted by factors")


@suggest_keywords
@dataclass(frozen=True, kw_only=True)
class ReLU(Penalized):
    """ReLU codes, L1 penalty on each code times the norm of its decoder row."""

    arch: ClassVar[str] = "relu"


@suggest_keywords
@dataclass(frozen=True, kw_only=True)
class Gated(Penalized):
    """One part decides whether a latent fires, another how strongly (Rajamanoharan et al., 2404.16014)."""

    arch: ClassVar[str] = "gated"


@suggest_keywords
@dataclass(frozen=True, kw_only=True)
class PAnneal(Penalized):
    """ReLU codes with penalty ``sum (code * norm)**p``; p falls from 1 to `p_end` (Karvonen et al., 2408.00113)."""

    p_end: float = 0.2
    """Last exponent, in (0, 1] [0.2]."""
    p_start_fraction: float = 0.2
    """Fraction of the steps after which p begins to fall [0.2]."""
    p_updates: int = 10
    """Number of changes of p; at each the coefficient is rescaled so that the penalty stays the same [10]."""
    arch: ClassVar[str] = "p-anneal"


@suggest_keywords
@dataclass(frozen=True, kw_only=True)
class Matryoshka(Selecting):
    """Nested sizes: every prefix of the latents reconstructs by itself (2503.17547, 2505.00190).

    Loss: ``sum_g weights[g] * ||x - x_hat_g||^2`` over the sizes g, and AuxK on the largest.
    """

    k: int
    """Latents per row at the largest size."""
    sizes: tuple[int, ...] | None = None
    """Prefix lengths in latents, increasing, the last equal to `n_latents` [an eighth, a quarter, a half, all]."""
    weights: tuple[float, ...] | None = None
    """Weight c_g of each size, as a fraction of the reconstruction loss [equal]."""
    balance: float | None = None
    """Weight of each size as a multiple of that of the next larger one, instead of `weights`: small values favour the
    full size, against hedging (2505.11756; .75 is their best) [equal]."""
    sampled: int = 0
    """Number of sizes drawn in every step (log-uniform from n_latents / 64 up, and `n_latents` itself), instead of
    fixed `sizes`; 0 for none [0]."""
    over: str = "topk"
    """``topk``: selection per row; ``batchtopk``: over the batch, with one threshold afterwards [topk]."""
    k_per_size: str | None = None
    """How a prefix of length g selects: ``fixed``: `k` among its own latents, what ``sae.take(g)`` does with a TopK
    SAE; ``scaled``: ``max(1, round(k * g / n_latents))`` among its own; ``truncated``: the selection of the full size,
    cut [fixed over topk; truncated over batchtopk, where one threshold serves all sizes]."""
    detached: bool = False
    """Whether the loss of a size moves only the latents that the next smaller size lacks, and that of the smallest
    `b_dec`: the first latents train as an SAE of their size does (after 2505.11756) [false]."""
    aux_per_size: bool = False
    """Whether dead latents explain the residual of the smallest size that has them, instead of the full one's: AuxK for
    each size, with weight ``min(1, dead / k_aux)`` [false]."""
    arch: ClassVar[str] = "matryoshka"

    def _check(self) -> None:
        self._check_k(self.k)
        given = [name for name in ("sizes", "weights", "balance") if getattr(self, name) is not None]
        if self.sampled and given:
            raise ConfigError(
                f"`Matryoshka.sampled` draws the sizes and weighs them equally; got `{given[0]}` as well. "
                "Drop one of the two."
            )
        if self.balance is not None and self.weights is not None:
            raise ConfigError("`Matryoshka.balance` stands for `weights`; got both. Drop one of the two.")
        sizes = matryoshka_sizes(self)
        self._check_increasing("sizes", sizes, "n_latents", self.n_latents)
        if self.detached and not self.sampled and len(sizes) == 1:
            raise ConfigError("`Matryoshka.detached` must have two or more `sizes`; with one it changes nothing.")
        self._check_weights(self.weights, len(sizes), "sizes")


def matryoshka_sizes(config: Matryoshka) -> tuple[int, ...]:
    """Return the fixed sizes of a Matryoshka configuration, defaults filled in."""
    if config.sizes is not None:
        return config.sizes
    return tuple(sorted({max(1, config.n_latents // part) for part in (8, 4, 2, 1)}))


def matryoshka_weights(config: Matryoshka, count: int) -> tuple[float, ...]:
    """Return the weights of `count` sizes, defaults filled in, the largest size last; those of `balance` add up to 1.

    >>> [round(w, 3) for w in matryoshka_weights(Matryoshka(8, k=2, sizes=(2, 4, 8), balance=0.5), 3)]
    [0.143, 0.286, 0.571]
    """
    if config.weights is not None:
        return config.weights
    if config.balance is None:
        return (1 / count,) * count
    each = [config.balance**power for power in range(count)]
    return tuple(weight / sum(each) for weight in reversed(each))


def k_now(config: TopK | BatchTopK, step: int, total_steps: int) -> int:
    """Return the latents per row in the step after `step` steps: from `k_start` linearly to `k`.

    >>> [k_now(TopK(64, k=8, k_start=32, k_fraction=0.5), step, 8) for step in range(6)]
    [32, 26, 20, 14, 8, 8]
    """
    start, length = config.k_start, round(config.k_fraction * total_steps)
    if start is None or step >= length:
        return config.k
    return round(start + (config.k - start) * step / length)


def has_signs(config: Config) -> bool:
    """Return whether codes have a sign, so that a latent and its negative are the same."""
    return isinstance(config, TopK) and config.sign == "magnitude"


def hierarchical_levels(config: HierarchicalTopK) -> tuple[int, ...]:
    """Return the levels of a hierarchical configuration, defaults filled in."""
    if config.levels is not None:
        return config.levels
    return tuple(sorted({*(2**power for power in range(config.k.bit_length())), config.k}))


def matryoshka_selection(config: Matryoshka) -> str:
    """Return ``fixed``, ``scaled`` or ``truncated``, the default filled in."""
    return config.k_per_size or ("fixed" if config.over == "topk" else "truncated")


_NEEDS: dict[str, str] = {
    "orthogonal_chunk": "orthogonal",
    "k_fraction": "k_start",
    "tanh_scale": "tanh",
    "density_at": "density",
    "k_aux": "aux_coefficient",
    "aux_per_size": "aux_coefficient",
}
"""Fields that are about another one, by its name: without that one they change nothing."""

Rule = tuple[Callable[[Any], bool], str]
"""What must hold for a value, as a function and in words."""


def _whole(least: int, words: str) -> Rule:
    return lambda value: is_whole(value) and value >= least, words


def _number(valid: Callable[[float], bool], words: str) -> Rule:
    return lambda value: is_number(value) and valid(value), words


def _or_none(rule: Rule) -> Rule:
    valid, words = rule
    return lambda value: value is None or valid(value), f"{words} or None"


def _one_of(*options: str | None) -> Rule:
    return lambda value: value in options, f"one of {', '.join(map(repr, options))}"


def _are_betas(value: Any) -> bool:
    return isinstance(value, tuple) and len(value) == 2 and all(is_number(beta) and 0 <= beta < 1 for beta in value)


def _are_parts(value: Any) -> bool:
    return value is None or (
        isinstance(value, tuple) and len(value) > 1 and all(is_whole(each) and each >= 1 for each in value)
    )


_FROM_0: Rule = _number(lambda value: value >= 0, "0 or a positive number")
_BOOL: Rule = (lambda value: isinstance(value, bool), "True or False")
_FROM_1: Rule = _whole(1, "a whole number of at least 1")
_POSITIVE: Rule = _number(lambda value: value > 0, "a positive number")

_RULES: dict[str, Rule] = {
    "n_latents": _FROM_1,
    "lr": _or_none(_POSITIVE),
    "betas": (_are_betas, "two numbers in [0, 1)"),
    "warmup_steps": _or_none(_whole(0, "a whole number of steps from 0")),
    "decay_fraction": _number(lambda value: 0 <= value <= 1, "a number in [0, 1]"),
    "clip": _or_none(_POSITIVE),
    "encoder_length": _or_none(_POSITIVE),
    "dead_after_rows": _or_none(_whole(1, "a positive whole number of rows")),
    "bias": _one_of(*BIASES),
    "scaling": _one_of(*SCALINGS),
    "control": _one_of(*CONTROLS),
    "mutual": _FROM_0,
    "aligned": _BOOL,
    "l2": _FROM_0,
    "orthogonal": _FROM_0,
    "orthogonal_chunk": _whole(2, "a whole number of at least 2"),
    "subspace": _or_none(_number(lambda value: 0 < value <= 1, "a number in (0, 1]")),
    "skip": _one_of(*SKIPS),
    "k_start": _or_none(_FROM_1),
    "parts": (_are_parts, "two or more whole numbers from 1, or None"),
    "k_fraction": _number(lambda value: 0 < value <= 1, "a number in (0, 1]"),
    "density": _FROM_0,
    "density_at": _number(lambda value: 0 < value <= 1, "a number in (0, 1]"),
    "balance": _or_none(_FROM_0),
    "k": _FROM_1,
    "aux_coefficient": _FROM_0,
    "k_aux": _or_none(_FROM_1),
    "multi_topk": _FROM_0,
    "sign": _one_of("positive", "magnitude"),
    "incoherence": _FROM_0,
    "bandwidth": _POSITIVE,
    "tanh": _FROM_0,
    "tanh_scale": _POSITIVE,
    "pre_activation": _FROM_0,
    "sparsity": _FROM_0,
    "l1": _FROM_0,
    "resample": _BOOL,
    "p_end": _number(lambda value: 0 < value <= 1, "a number in (0, 1]"),
    "p_start_fraction": _number(lambda value: 0 <= value < 1, "a number in [0, 1)"),
    "p_updates": _FROM_1,
    "sampled": _whole(0, "0 or a positive whole number"),
    "over": _one_of("topk", "batchtopk"),
    "detached": _BOOL,
    "aux_per_size": _BOOL,
    "k_per_size": _one_of(None, "fixed", "scaled", "truncated"),
}
"""What must hold for the fields, whichever architecture has them."""
