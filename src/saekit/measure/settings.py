"""Settings that measurements share: how many rows, which model and texts, which margin."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ..rows.settings import CE_TOKENS as CE_TOKENS
from ..settings import check_whole, suggest_keywords

MARGIN = 0.01
"""Differences of macro-F1 or AUC smaller than this count as none, by default."""


@suggest_keywords
@dataclass(frozen=True, kw_only=True)
class RowSettings:
    """How many rows are seen.

    Raises
    ------
    ConfigError
        A number that is not whole, or out of range.
    """

    CALLER: ClassVar[str] = "measure"
    """Function that messages name."""

    max_rows: int | None = None
    """Maximum number of rows [all]."""
    batch_rows: int = 4096
    """Rows per batch; changes no result beyond rounding [4096]."""
    seed: int = 0
    """Random seed [0]."""

    def __post_init__(self) -> None:
        check_whole(self.CALLER, max_rows=self.max_rows, batch_rows=self.batch_rows)
        check_whole(self.CALLER, least=0, seed=self.seed)


@suggest_keywords
@dataclass(frozen=True, kw_only=True)
class TextSettings(RowSettings):
    """How many rows are seen, and on which texts a language model's cross-entropy is measured."""

    layer: int | None = None
    """Layer that the SAEs belong to [the one of their provenance]."""
    hook: str | None = None
    """Module that the SAEs belong to, instead of a layer [the one of their provenance]."""
    target: str | None = None
    """Module whose rows a transcoder predicts [the one of its provenance]."""
    text: str = "text"
    """Name of the text column [text]."""
    tokens: int = CE_TOKENS
    """Tokens for the cross-entropies, rounded up to a whole context; 0 for none [32768]."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_whole(self.CALLER, least=0, tokens=self.tokens)


@suggest_keywords
@dataclass(frozen=True, kw_only=True)
class MeasureSettings(TextSettings):
    """How many rows and texts SAEs are measured on, and whether with intervals."""

    intervals: bool = True
    """Whether to compute confidence intervals, by leaving out documents in turn [true]."""
