"""Settings of a classification and of a transfer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from ..errors import ConfigError, did_you_mean
from ..measure.settings import MARGIN
from ..settings import check_choice, check_whole, is_number, is_whole, suggest_keywords

KINDS: dict[str, str] = {
    "majority": "the most frequent class, whatever the text",
    "strongest": "the strongest representation and probe of each family, searched within the training rows; families "
    "may let several vote",
    "words": "TF-IDF of words and word pairs",
    "pixels": "principal components of the grey pixels, of images",
    "last": "hidden state of the last token",
    "dense": "hidden states under every pooling the SAE uses",
    "dense-tree": "the same, shallow decision tree",
    "difference": "difference of class means of the pooled hidden states: one direction per class",
    "pca": "first k principal components of the pooled hidden states",
    "svd": "first k right singular vectors of the pooled hidden states",
    "ica": "k independent components of the pooled hidden states",
    "random": "random directions, TopK: the SAE's width and L0, nothing learned; between SAEs: random partners",
    "untrained": "the SAE before training: its width, rule and L0, centred at its bias",
    "frozen": "SAEs given that were trained with a frozen decoder or encoder",
    "full": "all latents",
    "binarized": "all latents, whether they exceed a threshold",
    "sparse": "the k latents that tell the classes apart best",
    "matched": "k random latents, as often active as the k best ones",
    "tree": "all latents, shallow decision tree",
    "binarized-tree": "all latents binarized, shallow decision tree",
}
"""Kinds of arms: what each classifies."""

ALIASES = {"sae": "full", "tfidf": "words"}
"""Other words for kinds of arms."""

ACROSS_KINDS = ("majority", "words", "pixels", "last", "dense", "full", "binarized")
"""Kinds of arms between the values of a column, by default."""

FEATURE_KINDS = ("majority", "dense", "random", "full", "binarized")
"""Kinds of arms between SAEs."""

POOLS = ("sum", "max")
"""Poolings over the tokens of a text by default."""

SEARCH_POOLS = ("last", "mean", "max", "min", "sum", "mean+max+min")
"""Poolings that the strongest arm of a family is searched among."""

PROBES = ("logistic", "balanced", "lda", "ridge", "svm")
"""Linear probes: logistic regression, the same with balanced classes, linear discriminant analysis with shrinkage, and
ridge and support vector classifiers with balanced classes."""

KS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)
"""Numbers of latents of the sparse arms."""

CONTROL_KS = (16, 64)
"""Numbers of latents or components at which the costlier controls are made."""

METRICS = ("auto", "macro_f1", "auc")
"""What verdicts look at."""


@suggest_keywords
@dataclass(frozen=True)
class Budget:
    """What every arm may spend on its hyperparameters, chosen by cross-validation within the training rows.

    Where the best value is strictly at an end of its grid, the grid grows there by its own ratio (trees: by its own
    difference), up to `widen` times at either end. Values are tried from the smallest; where two in a row have lower
    scores than the best one before them, larger ones are not tried. Among equal values the smallest is chosen.
    """

    C: tuple[float, ...] = (0.01, 0.1, 1.0, 10.0, 100.0)
    """Inverse strengths of the L2 penalty of the logistic regression and of the linear SVM, increasing [0.01, 0.1, 1,
    10, 100]."""
    alphas: tuple[float, ...] = (0.1, 1.0, 10.0, 100.0, 1000.0)
    """Penalties of the ridge classifier, increasing [0.1, 1, 10, 100, 1000]."""
    shrinkages: tuple[float, ...] = (0.01, 0.1, 0.3, 0.6)
    """Shrinkages of the covariance in linear discriminant analysis, increasing, up to 1 [0.01, 0.1, 0.3, 0.6]."""
    depths: tuple[int, ...] = (3, 5, 7, 9)
    """Depths of the decision tree, increasing [3, 5, 7, 9]."""
    widen: int = 4
    """Maximum number of values that a grid may grow by at either end [4]."""
    thresholds: tuple[float | str, ...] = (0.0, 1.0, "median")
    """Thresholds of the binarized arms: absolute, or `median` of a latent's positive values [0, 1, median]. The
    threshold is chosen first (at the middle C or depth), then C or depth."""
    screen_rows: int = 1500
    """Maximum number of training rows on which a search compares representations (poolings, components) [1500]."""
    keep: int | None = 2
    """Number of representations that a search goes on with; none keeps all [2]."""
    finalists: int = 8
    """Number of choices (a hyperparameter, in a search an arm with one or a vote of arms) that are fitted: the best,
    and those made most often when training rows are resampled [8]."""
    inner: int = 3
    """Number of folds of the inner cross-validation [3]."""
    max_iter: int = 1000
    """Maximum number of iterations of the logistic regression (L-BFGS) [1000]."""
    tolerance: float = 1e-4
    """Tolerance of the logistic regression [0.0001]."""
    seed: int | None = None
    """Random seed of the inner folds and of the arms [that of the split]."""

    def __post_init__(self) -> None:
        for name, (holds, what) in _GRIDS.items():
            given = getattr(self, name)
            values = tuple(given) if isinstance(given, list | tuple) else (given,)
            object.__setattr__(self, name, values)
            if not values or not all(map(holds, values)):
                raise ConfigError(f"budget: `{name}` must be {what}; got {given}.")
        for name in ("C", "alphas", "shrinkages", "depths"):
            values = getattr(self, name)
            if list(values) != sorted(set(values)):
                raise ConfigError(f"budget: `{name}` must be increasing; got {values}.")
        check_whole("budget", 0, widen=self.widen)
        check_whole("budget", 2, inner=self.inner)
        check_whole("budget", max_iter=self.max_iter, keep=self.keep, finalists=self.finalists)
        check_whole("budget", screen_rows=self.screen_rows)


_GRIDS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "C": (lambda c: is_number(c) and c > 0, "increasing positive numbers, at least one"),
    "alphas": (lambda a: is_number(a) and a > 0, "increasing positive numbers, at least one"),
    "shrinkages": (lambda s: is_number(s) and 0 < s <= 1, "increasing numbers above 0, up to 1, at least one"),
    "depths": (lambda depth: is_whole(depth) and depth > 0, "whole numbers from 1, at least one"),
    "thresholds": (lambda t: t == "median" or is_number(t), "numbers or `median`, at least one"),
}
"""Grids of hyperparameters: what each value must be."""


@suggest_keywords
@dataclass(frozen=True, kw_only=True)
class ClassifierSettings:
    """Which classifiers are compared, what they read, and how they are compared."""

    arms: tuple[str, ...] | None = None
    """Kinds of classifiers to compare: dense, sae, words, sparse, … [all]."""
    pools: tuple[str, ...] | None = None
    """Poolings over tokens: sum, mean, max, last, … [sum,max; between values or SAEs sum]."""
    search_pools: tuple[str, ...] = SEARCH_POOLS
    """Poolings searched for the strongest arm of a family, `a+b` both together [last,mean,max,min,sum,mean+max+min]."""
    probes: tuple[str, ...] = PROBES[:4]
    """Probes searched for it: logistic, balanced, lda, ridge, svm [logistic,balanced,lda,ridge]."""
    ks: tuple[int, ...] = KS
    """Numbers of latents, and of principal components [1,2,4,…,512]."""
    control_ks: tuple[int, ...] = CONTROL_KS
    """Numbers of latents or components of the costlier controls [16,64]."""
    select_by: str = "mean_difference"
    """Ranking of the latents: auc, l1, …, or numbers stored with every SAE, such as stability [mean_difference]."""
    layer: int | None = None
    """Layer of SAEs that do not name one [that of the SAE]."""
    hook: str | None = None
    """Hook of SAEs that do not name one [that of the SAE]."""
    max_tokens: int | None = None
    """Maximum number of tokens of a text that are read [all]."""
    prompt: str | None = None
    """Text around the image, of a vision-language model [the image alone]."""
    train_sizes: tuple[int, ...] = ()
    """Numbers of training rows of the low-data curves [none]."""
    shuffles: int | None = None
    """Number of label-permutation controls per classifier [1; between values or SAEs 0]."""
    margin: float = MARGIN
    """Equivalence margin of the verdicts, on macro-F1 or AUC [0.01]."""
    metric: str = "auto"
    """Metric of verdicts, and of choices for two classes: macro_f1, auc, or auto: AUC where one is rare [auto]."""
    intervals: bool = True
    """Whether to compute confidence intervals, by leaving out test rows or groups in turn [true]."""
    budget: Budget = field(default_factory=Budget)
    """What every classifier may spend on its hyperparameters."""
    save_arm: str | None = None
    """Name of the arm to keep as a classifier; `none` for no classifier [the best linear SAE arm]."""
    name: str | None = None
    """Name of the result in tables over several data sets [that of the data]."""
    cache: str | None = None
    """Folder for pooled features, which several classifications can share [features in the output folder]."""

    def __post_init__(self) -> None:
        if self.arms is not None:
            object.__setattr__(self, "arms", checked_kinds(self.arms))
        if self.pools is not None:
            pools = (self.pools,) if isinstance(self.pools, str) else tuple(dict.fromkeys(self.pools))
            if not pools:
                raise ConfigError("classify: `pools` must name at least one pooling; got none.")
            object.__setattr__(self, "pools", pools)
        for name in ("search_pools", "probes"):
            object.__setattr__(self, name, _words(name, getattr(self, name)))
        for probe in self.probes:
            check_choice("classify", PROBES, probes=probe)
        for name in ("ks", "control_ks", "train_sizes"):
            object.__setattr__(self, name, _whole_numbers(name, getattr(self, name), name == "train_sizes"))
        check_whole("classify", 0, shuffles=self.shuffles)
        check_whole("classify", max_tokens=self.max_tokens)
        check_choice("classify", METRICS, metric=self.metric)
        if not (is_number(self.margin) and self.margin >= 0):
            raise ConfigError(f"classify: `margin` must be a difference from 0; got {self.margin}.")


@suggest_keywords
@dataclass(frozen=True, kw_only=True)
class Matching:
    """How the latents of one SAE are matched to those of another."""

    by: str = "decoder"
    """Similarity of latents: decoder (cosine of decoder rows; SAEs of one width) or documents (correlation of pooled
    codes over training rows; labels are not used) [decoder]."""
    threshold: float | None = None
    """Minimum cosine or correlation of a pair; others count as unmatched [none]."""

    def __post_init__(self) -> None:
        check_choice("transfer", ("decoder", "documents"), by=self.by)
        if self.threshold is not None and not (is_number(self.threshold) and -1 <= self.threshold <= 1):
            raise ConfigError(f"`threshold` is a cosine and must be -1 to 1; got {self.threshold}.")


def checked_kinds(arms: str | Sequence[str], known: Sequence[str] = tuple(KINDS)) -> tuple[str, ...]:
    """Return kinds of arms in the order of tables, other words for them replaced.

    Raises
    ------
    ConfigError
        None, or one that is not among `known`.
    """
    given = [arms] if isinstance(arms, str) else list(arms)
    kinds = [ALIASES.get(arm, arm) for arm in given]
    for arm, kind in zip(given, kinds):
        if kind not in known:
            raise ConfigError(f"`arms` must name kinds of arms; got `{arm}`. {did_you_mean(arm, [*known, *ALIASES])}")
    if not kinds:
        raise ConfigError("`arms` must name at least one kind of arm; got none.")
    return tuple(kind for kind in KINDS if kind in kinds)


def _words(name: str, values: Sequence[str] | str) -> tuple[str, ...]:
    found = (values,) if isinstance(values, str) else tuple(dict.fromkeys(values))
    if not found or not all(isinstance(value, str) for value in found):
        raise ConfigError(f"classify: `{name}` must name at least one; got {list(found)}.")
    return found


def _whole_numbers(name: str, values: Sequence[int] | int, may_be_empty: bool) -> tuple[int, ...]:
    found = (values,) if isinstance(values, int) else tuple(values)
    if (not found and not may_be_empty) or any(not is_whole(v) or v < 1 for v in found):
        raise ConfigError(f"classify: `{name}` must be whole numbers from 1; got {list(found)}.")
    return tuple(sorted(set(found)))
