"""Settings of comparisons, of orphans and of consensus SAEs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from ..errors import ConfigError
from ..matching.settings import THRESHOLD
from ..measure.settings import RowSettings, TextSettings
from ..settings import check_whole, is_number, suggest_keywords

MAX_ROWS = 32_768
"""Maximum number of rows that activations are correlated over by default."""


@suggest_keywords
@dataclass(frozen=True, kw_only=True)
class ComparisonSettings(RowSettings):
    """When latents count as shared, and what they are compared with."""

    CALLER: ClassVar[str] = "compare"

    threshold: float = THRESHOLD
    """Cosine that counts as the same direction, -1 to 1 [0.7]."""
    strict: bool = True
    """Whether cosines must exceed the threshold or may equal it [exceed]."""
    controls: bool = True
    """Whether to match random dictionaries of the same shape, and the first pair with permuted coordinates, too [yes].
    It costs as much as two more pairs."""
    max_rows: int | None = MAX_ROWS
    """Maximum number of rows that activations are compared on [32768]."""
    seed: int = 0
    """Random seed of the random dictionaries [0]."""

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_threshold(self.CALLER, self.threshold)


@suggest_keywords
@dataclass(frozen=True, kw_only=True)
class SourceSettings:
    """When a latent of a crosscoder counts as specific to a source, and how many rows are seen."""

    error_limit: float = 0.2
    """Maximum nu of the error, above which the other source has the direction too, unreconstructed [0.2]."""
    reconstruction_limit: float = 0.5
    """Maximum nu of the reconstruction, above which other latents write the direction there [0.5]."""
    max_rows: int | None = None
    """Maximum number of rows [all]."""
    batch_rows: int = 4096
    """Rows per batch; changes no result beyond rounding [4096]."""

    def __post_init__(self) -> None:
        check_whole("compare_sources", max_rows=self.max_rows, batch_rows=self.batch_rows)
        for name in ("error_limit", "reconstruction_limit"):
            if not (is_number(getattr(self, name)) and getattr(self, name) >= 0):
                raise ConfigError(f"compare_sources: `{name}` must be a number from 0; got {getattr(self, name)!r}.")


@suggest_keywords
@dataclass(frozen=True, kw_only=True)
class FunctionSettings:
    """How it is tested in a language model whether matched latents do the same; on rows it needs no setting."""

    tokens: int = 8192
    """Tokens for the cross-entropies, and those among which a latent's top tokens are [8192]."""
    latents: int = 32
    """Maximum number of latents of a pair of SAEs whose fingerprints are taken; half of them shared, if possible
    [32]."""
    tops: int = 12
    """Maximum number of tokens at which a latent is ablated: those at which it fires most [12]."""
    context: int = 64
    """Maximum number of tokens that the model reads at once for fingerprints [64]."""
    pairs: int = 3
    """Maximum number of pairs of SAEs that are tested in the model [3]."""
    text: str = "text"
    """Name of the text column [text]."""
    seed: int = 0
    """Random seed of the exchanged partners and of the choice of latents [0]."""

    def __post_init__(self) -> None:
        check_whole("compare", least=2, tops=self.tops, context=self.context)
        check_whole("compare", least=1, tokens=self.tokens, latents=self.latents, pairs=self.pairs)
        check_whole("compare", least=0, seed=self.seed)


@suggest_keywords
@dataclass(frozen=True, kw_only=True)
class OrphanSettings(TextSettings):
    """What orphans are measured on."""

    CALLER: ClassVar[str] = "orphans"

    seed: int = 0
    """Random seed of the matching by frequency and of the random subspaces [0]."""
    ranks: Sequence[int] | None = None
    """Dimensions of the subspaces that latents span [an eighth, a quarter and a half of d_out]."""


@suggest_keywords
@dataclass(frozen=True, kw_only=True)
class ConsensusSettings(RowSettings):
    """Which latents a consensus SAE pools, and what it is filled up and refitted with."""

    CALLER: ClassVar[str] = "consensus"

    size: int | None = None
    """Latents of the result [without fill as many as there are concepts, with it as many as the widest parent has]."""
    min_seeds: int = 2
    """Minimum number of seeds that have a concept, for it to be pooled [2]."""
    fill: bool = True
    """Whether to fill up with the latents of highest energy that fewer seeds have [yes]."""
    threshold: float = THRESHOLD
    """Cosine of decoder rows above which a latent counts as one that is taken already, and is not filled in; where the
    comparison is made here, also its threshold [0.7]."""
    refit: int = 0
    """Rows to train on from there, with the parents' configuration [0]. Means of directions are not yet an SAE that
    works together: a tenth of the parents' training mends most of it."""
    config: Mapping[str, Any] | None = None
    """Training settings of the refit that differ from the parents', such as ``{"lr": 1e-3}`` [none]."""
    max_rows: int | None = None
    """Maximum number of rows for the energies [all]."""
    seed: int = 0
    """Random seed of the order of rows in the refit [0]."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_whole(self.CALLER, least=1, size=self.size)
        check_whole(self.CALLER, least=0, refit=self.refit)
        check_whole(self.CALLER, least=2, min_seeds=self.min_seeds)
        _check_threshold(self.CALLER, self.threshold)


def _check_threshold(where: str, threshold: float) -> None:
    if not (is_number(threshold) and -1 <= threshold <= 1):
        raise ConfigError(f"{where}: `threshold` is a cosine and must be -1 to 1; got {threshold}. The usual is 0.7.")
