"""Settings that every measurement of SAEs on rows and on a language model shares."""

from __future__ import annotations

from dataclasses import dataclass

from ..settings import check_whole, suggest_keywords

CE_TOKENS = 32_768
"""Tokens that cross-entropies are measured on by default."""


@suggest_keywords
@dataclass(frozen=True, kw_only=True)
class MeasureSettings:
    """On how many rows and tokens SAEs are measured, and how sure the numbers are.

    Raises
    ------
    ConfigError
        A number that is not whole, or out of range.
    """

    layer: int | None = None
    """Layer that the SAEs belong to [what their provenance says]."""
    hook: str | None = None
    """Module that the SAEs belong to, instead of a layer [what their provenance says]."""
    text: str = "text"
    """Name of the text column [text]."""
    max_rows: int | None = None
    """Maximum number of rows [all rows given, or 131,072 of a model]."""
    tokens: int = CE_TOKENS
    """Tokens for the cross-entropies, rounded up to a whole context; 0 for none [32768]."""
    batch_rows: int = 4096
    """Rows at a time; changes no result beyond rounding [4096]."""
    draws: int = 1000
    """Resamples of documents behind each interval; 0 for no intervals [1000]."""
    seed: int = 0
    """Random seed of the resamples and of whatever else is random [0]."""

    def __post_init__(self) -> None:
        where = type(self).__name__
        check_whole(where, max_rows=self.max_rows, batch_rows=self.batch_rows)
        check_whole(where, least=0, tokens=self.tokens, draws=self.draws)
