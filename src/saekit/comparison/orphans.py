"""What latents are that no other seed finds: how they differ from shared ones, what they carry, what they span."""

from __future__ import annotations

import os
from collections.abc import Sequence

import numpy as np

from ..errors import ConfigError, DataError
from ..measure.fidelity import SplicedModel, place_warnings
from ..measure.intervals import LEVEL
from ..measure.reconstruction import measure_saes
from ..measure.settings import MeasureSettings
from ..models.language import LanguageModel
from ..places import warnings_between
from ..progress import shows_progress
from ..provenance import library_versions, release
from ..ranks import refuse_unsplit
from ..rows.opening import Rows, facts_of, source_for
from ..sae.naming import Given, common_width, given_saes, named_saes
from ..settings import Progress, suggest_keywords
from .ablation import ablation_costs, variants
from .orphan_properties import (
    FREQUENCY_STEP,
    MIN_LATENTS,
    Kinds,
    compare_properties,
    frequency_matched,
    measure_latents,
)
from .orphans_result import Orphans
from .pairs import Named
from .result import Comparison
from .run import compare
from .settings import ComparisonSettings, OrphanSettings
from .subspaces import spans


@suggest_keywords
@shows_progress
def orphans(
    saes: Given | Sequence[Given],
    rows: Rows,
    *,
    comparison: Comparison | None = None,
    model: str | os.PathLike[str] | LanguageModel | None = None,
    data: object = None,
    settings: OrphanSettings = OrphanSettings(),
    progress: Progress | None = None,
) -> Orphans:
    """Measure how latents that no other seed finds differ from those that another finds.

    Parameters
    ----------
    saes
        Two SAEs or more of one hook, differing in their seeds: values or paths.
    rows
        Rows to measure on: a source, an array ``[n, d_in]``, or a path. Rows that know their tokens and documents give
        scores of interpretability too.
    comparison
        What `compare` found about these SAEs, in this order; None: it is made here.
    model, data
        A language model and texts, for what ablating latents does to its cross-entropy; see `evaluate`.
    settings
        How many rows and tokens, which ranks of subspaces.
    progress
        Called as ``progress(stage, done, total)`` [shown on stderr; ``False``: none].

    Returns
    -------
    Orphans
        Properties with their AUC, plain and among latents of equal frequency; costs of ablation; spans.

    Raises
    ------
    ConfigError
        Fewer than two SAEs, a comparison of others, or a setting out of range.
    DataError
        No rows, or no SAE has at least two orphans and two shared latents.
    ShapeError
        Rows of another width.
    """
    refuse_unsplit("orphans")
    saes = given_saes(saes)
    if len(saes) < 2:
        raise ConfigError("orphans: at least two SAEs must be given; an orphan is what no other has.")
    named = named_saes(saes, "orphans")
    values = [sae for _, sae in named]
    common_width(named, "orphans")
    source = source_for(values[0], rows, "orphans")
    if comparison is None:
        comparison = compare(values, settings=ComparisonSettings(controls=False), progress=progress)
    _check(named, comparison, settings.ranks)
    shared = [np.asarray(each.stability) > 0 for each in comparison.saes]
    enough = _with_enough_of_both(shared)
    latents = measure_latents(values, source, settings, progress)
    generator = np.random.default_rng(settings.seed)
    kinds = Kinds(
        shared,
        {at: frequency_matched(latents.properties[at]["frequency"], shared[at], generator) for at in enough},
    )
    spliced = None
    if model is not None:
        spliced = SplicedModel.of(model, data, values, source, settings, "orphans")
    costs = ablation_costs(
        measure_saes(
            variants(values, kinds),
            source,
            spliced=spliced,
            settings=MeasureSettings(max_rows=settings.max_rows, batch_rows=settings.batch_rows, intervals=False),
            progress=progress,
        ),
        kinds,
    )
    return Orphans(
        saekit=release(),
        versions=library_versions(model is not None),
        settings={
            "threshold": comparison.settings["threshold"],
            "strict": comparison.settings["strict"],
            "orphan": "no other SAE has it",
            "shared": "at least one other SAE has it",
            "equal_frequency": f"within classes of 2^{FREQUENCY_STEP}, as many of each",
            "rows": settings.max_rows,
            "batch_rows": settings.batch_rows,
            "seed": settings.seed,
            "intervals": {"level": LEVEL, "over": "SAEs (Student's t), latents of one kind where there are two"},
        },
        rows=facts_of(source),
        n_rows=latents.n_rows,
        language_model=costs.language_model,
        names=[name for name, _ in named],
        digests=[each.sae["digest"] for each in comparison.saes],
        n_orphans=[int((~each).sum()) for each in shared],
        n_shared=[int(each.sum()) for each in shared],
        properties=compare_properties(latents.properties, kinds),
        silenced=costs.groups,
        fvu_difference=costs.differences.get("fvu"),
        ce_difference=costs.differences.get("ce"),
        spans=spans(values, shared, settings.ranks, latents.components, settings.seed),
        warnings=warnings_between(named) + place_warnings(named, source, spliced),
    )


def _check(named: Named, comparison: Comparison, ranks: Sequence[int] | None) -> None:
    found = [each.sae["digest"] for each in comparison.saes]
    if found != [sae.digest() for _, sae in named]:
        raise ConfigError(
            f"orphans: `comparison` must be of these {len(named)} SAEs, in this order; it is of "
            f"{', '.join(each.name for each in comparison.saes)}. Compare them again."
        )
    d = named[0][1].d_out
    if ranks is not None and (not ranks or any(not 1 <= rank < d for rank in ranks)):
        raise ConfigError(f"orphans: `ranks` must lie within 1..{d - 1}, below the width of the rows; got {ranks!r}.")


def _with_enough_of_both(shared: Sequence[np.ndarray]) -> list[int]:
    """Return the indices of the SAEs that have enough orphans and enough shared latents."""
    counts = [(int((~each).sum()), int(each.sum())) for each in shared]
    enough = [at for at, both in enumerate(counts) if min(both) >= MIN_LATENTS]
    if not enough:
        raise DataError(
            f"orphans: an SAE needs at least {MIN_LATENTS} orphans and {MIN_LATENTS} shared latents; they have "
            f"{counts} (orphans, shared). Train longer, or move the threshold of the comparison."
        )
    return enough
