"""Settings of ranking, pruning and measuring sizes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ..errors import ConfigError
from ..measure.settings import MeasureSettings
from ..rows.origin import OriginSettings
from ..settings import check_fraction, check_whole, is_whole, suggest_keywords

SELECTIONS = ("before", "after")

AT = ("reconstruction", "activation")

RANKINGS = ("energy", "frequency", "unsorted", "random")
"""Rankings by which `progressive` prunes the vanilla SAEs by default."""


@suggest_keywords
@dataclass(frozen=True, kw_only=True)
class AttributionSettings:
    """How gradients are attributed to latents."""

    text: str = "text"
    """Name of the text column [text]."""
    target: str | None = None
    """Module whose rows a transcoder predicts [the one of its provenance]."""
    at: str = "reconstruction"
    """Where the gradient is taken [reconstruction]: the rows of the SAE are put into the model, which is where its
    prefixes will be used; `activation` leaves the model's own rows (the SAE's error is added back)."""
    context: int | None = None
    """Maximum number of tokens that the model reads at once [as capture]."""
    special: bool = True
    """Whether tokens that the tokenizer adds (BOS) pass through unchanged, as capture skips them [yes]."""
    batch_tokens: int = 4096
    """Tokens per forward pass; changes no score beyond rounding [4096]."""

    def __post_init__(self) -> None:
        if self.at not in AT:
            raise ConfigError(f"attribution: `at` must be 'reconstruction' or 'activation'; got {self.at!r}.")
        check_whole("attribution", batch_tokens=self.batch_tokens, context=self.context)


LEAST_KS = 3
"""Fewest values of k with one inside the curve."""


@suggest_keywords
@dataclass(frozen=True, kw_only=True)
class KChoiceSettings:
    """How a number of latents per row is chosen."""

    ks: tuple[int, ...] | None = None
    """Values of k to try, increasing, three or more [8, evenly on a log scale, from 2 to half of the width or of the
    latents]."""
    share: float = 0.1
    """Fraction of the rows of the run that the SAEs of the choice are trained on, before the run itself [0.1]."""
    seeds: int = 2
    """Number of SAEs for each k, whose spread says whether the curve decides [2]."""

    def __post_init__(self) -> None:
        check_fraction("choose_k", share=self.share)
        check_whole("choose_k", least=2, seeds=self.seeds)
        if self.ks is not None:
            object.__setattr__(self, "ks", tuple(self.ks))
            increasing = all(is_whole(k) for k in self.ks) and all(a < b for a, b in zip((0, *self.ks), self.ks))
            if len(self.ks) < LEAST_KS or not increasing:
                raise ConfigError(
                    f"choose_k: `ks` must be three or more whole numbers from 1 that increase; got {list(self.ks)}."
                )


@suggest_keywords
@dataclass(frozen=True, kw_only=True)
class PruneSettings:
    """How an SAE is pruned."""

    selection: str = "before"
    """Whether latents are cut `before` or `after` TopK selects [before]."""
    refit: bool = False
    """Refit each decoder by least squares [no]."""
    recalibrate: bool = False
    """Lower the thresholds until as many latents fire as in the whole SAE [no]."""
    max_rows: int | None = None
    """Maximum number of rows [all]."""
    batch_rows: int = 4096
    """Rows per batch; changes no result beyond rounding [4096]."""
    seed: int = 0
    """Random seed of the random order [0]."""

    def __post_init__(self) -> None:
        _check_selection("prune", self.selection)
        check_whole("prune", max_rows=self.max_rows, batch_rows=self.batch_rows)


@suggest_keywords
@dataclass(frozen=True, kw_only=True)
class PrefixSettings(MeasureSettings):
    """What is measured of prefixes of an SAE."""

    sample_rows: int = 512
    """Rows that are compared pairwise for rsa, cka and cka_codes; 0 leaves these out [512]."""
    latents: bool = False
    """Measure the latents too: interpretability, description length, parents [no]."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not is_whole(self.sample_rows) or self.sample_rows < 0 or 0 < self.sample_rows < 4:
            raise ConfigError(f"{self.CALLER}: `sample_rows` must be 0 or at least 4; got {self.sample_rows}.")


@suggest_keywords
@dataclass(frozen=True, kw_only=True)
class SizeSettings(PrefixSettings):
    """How prefixes of an SAE are measured."""

    CALLER: ClassVar[str] = "measure_sizes"

    selection: str = "before"
    """Whether latents are cut `before` or `after` TopK selects [before]."""

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_selection(self.CALLER, self.selection)


@suggest_keywords
@dataclass(frozen=True, kw_only=True)
class ProgressiveSettings(PrefixSettings):
    """How pruned, nested and separately trained SAEs are compared."""

    CALLER: ClassVar[str] = "progressive"

    by: tuple[str, ...] = RANKINGS
    """Rankings by which the vanilla SAEs are pruned [energy,frequency,unsorted,random]."""
    latents: bool = True
    """Measure the latents too: interpretability, description length, parents, overlap of seeds [yes]."""

    def __post_init__(self) -> None:
        super().__post_init__()
        by = (self.by,) if isinstance(self.by, str) else self.by
        object.__setattr__(self, "by", tuple(each.replace("-", "_") for each in by))


@suggest_keywords
@dataclass(frozen=True, kw_only=True)
class PruningStudySettings(OriginSettings, SizeSettings, PruneSettings):
    """How an SAE is ranked, pruned and measured at every size."""


@suggest_keywords
@dataclass(frozen=True, kw_only=True)
class ProgressiveStudySettings(OriginSettings, ProgressiveSettings):
    """How the small SAEs of a training run are compared."""

    ce_tokens: int = 8192
    """Maximum number of tokens for the cross-entropies, measured for every SAE and size [8192]."""


def _check_selection(where: str, selection: str) -> None:
    if selection not in SELECTIONS:
        raise ConfigError(f"{where}: `selection` must be 'before' or 'after'; got {selection!r}.")
