"""Settings of an evaluation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ..errors import ConfigError
from ..measure.settings import MeasureSettings
from ..settings import check_whole, suggest_keywords

LEAST_HEDGING_ROWS = 256
"""Minimum number of rows that an SAE is trained on with for its hedging degree: the smallest default batch."""

MODEL_ROWS = 131_072
"""Rows by default when they are made by a language model."""


@suggest_keywords
@dataclass(frozen=True, kw_only=True)
class EvaluationSettings(MeasureSettings):
    """What is measured, on how many rows and tokens, with how many resamples."""

    CALLER: ClassVar[str] = "evaluate"

    max_rows: int | None = None
    """Maximum number of rows [all rows given; from a model as many as `tokens`, or 131072]."""
    tokens: int | None = None  # type: ignore[assignment]  # filled in before anything is measured
    """Tokens that the model reads, for the cross-entropies (rounded up to a whole context) and for the rows that it
    makes; 0 for no cross-entropies [32768, and 131072 rows]."""
    seed: int = 0
    """Random seed of the untrained SAE and of the resamples [0]."""
    truth: bool = False
    """Whether to compare the SAEs with the dictionary of synthetic rows, which is known [no]."""
    pursuit_rows: int = 0
    """Maximum number of rows on which codes are compared with those that matching pursuit finds for the same decoder;
    0 for none [0]."""
    hedging_rows: int = 0
    """Number of rows on which each SAE is trained on twice, as it is and with new latents, for its hedging degree
    (2505.11756); half as many as it was trained on, say; 0 for none [0]."""
    controls: bool = True
    """Whether to measure the untrained SAE, the frozen-decoder SAE where there is one, and PCA [yes]."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_whole(self.CALLER, least=0, pursuit_rows=self.pursuit_rows, hedging_rows=self.hedging_rows)
        if 0 < self.hedging_rows < LEAST_HEDGING_ROWS:
            raise ConfigError(
                f"evaluate: `hedging_rows` must be 0, or at least the {LEAST_HEDGING_ROWS} rows of a step; got "
                f"{self.hedging_rows}. Half of the rows that the SAE was trained on is right."
            )
