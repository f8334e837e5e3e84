"""The studies behind ``saekit prune`` and ``saekit progressive``: rank on half of the rows, measure on the rest."""

from __future__ import annotations

import functools
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import ConfigError
from ..files import SAVE_WAIT, locked_folder, open_file, remove_file
from ..inputs.texts import read_texts
from ..measure.fidelity import CHARACTERS_PER_TOKEN
from ..progress import shows_progress
from ..provenance import place_of
from ..rows.origin import Origin, OriginSettings, find_rows
from ..rows.split import halves, text_halves
from ..sae.model import SAE
from ..settings import Progress, part_of, suggest_keywords
from ..store.address import sae_paths
from .attribution import ATTRIBUTIONS, attribution
from .families import name_saes
from .progressive import ProgressivePlan, compare_sizes, plan_progressive
from .prune import check_sizes, check_ties, prune
from .ranking import ORDERS, check_order, rank
from .result import Progressive, SizeCurve
from .settings import (
    AttributionSettings,
    ProgressiveSettings,
    ProgressiveStudySettings,
    PruneSettings,
    PruningStudySettings,
    SizeSettings,
)
from .size_curve import measure_sizes

CURVE = "sizes.json"
"""Name of the file of the curve."""


@dataclass(frozen=True)
class Pruning:
    """An SAE in order of importance, its small versions, and the metrics of every size."""

    ranked: SAE
    """All latents in order; its file says what each prefix is worth."""
    saes: list[SAE]
    """One ordinary SAE per size."""
    curve: SizeCurve
    """Measured on rows that the latents were not ranked on."""

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write ``progressive/`` (the ranked SAE), ``<size>/`` for every size, and ``sizes.json`` into a folder."""
        with locked_folder(folder, wait=SAVE_WAIT) as place:
            remove_file(place / CURVE)  # an older one would describe other SAEs from the next line on
            self.ranked.save(place / "progressive")
            for each in self.saes:
                each.save(place / str(each.n_latents))
            self.curve.save(place / CURVE)  # last: what it says is there

    def to_json(self, folder: str | os.PathLike[str]) -> dict[str, Any]:
        """Return what was written into `folder` and measured, as plain JSON."""
        folder = Path(folder)
        return {
            "out": str(folder),
            "progressive": str(folder / "progressive"),
            "saes": [str(folder / str(each.n_latents)) for each in self.saes],
            "by": self.ranked.provenance.get("latent_order", "unsorted"),
            "ranking": self.ranked.provenance.get("ranking", {}),
            "curve": self.curve.to_json(),
            "warnings": [each.to_json() for each in self.curve.warnings],
        }


@suggest_keywords
@shows_progress
def study_pruning(
    sae: SAE | str | os.PathLike[str],
    rows: Any = None,
    *,
    sizes: Sequence[int],
    by: str | Tensor = "energy",
    model: Any = None,
    data: Any = None,
    settings: PruningStudySettings = PruningStudySettings(),
    progress: Progress | None = None,
) -> Pruning:
    """Rank the latents of an SAE, prune it to several sizes, and measure every size.

    Latents are ranked on every second document of the rows, and measured on the others.

    Parameters
    ----------
    sae
        An SAE, or where it lies.
    rows
        A source of rows; see `saekit.rows.origin.find_rows`.
    sizes
        Numbers of latents to keep, increasing.
    by
        What the latents are ranked by, as for `rank`; or a gradient attribution (``"attribution"``,
        ``"cross_entropy"``, taken on every second text); or the path of a .npy file with a number per latent.
    model, data
        A language model and texts, for the rows where none are given and for the cross-entropies.
    settings
        As for `prune` and `measure_sizes`, and where the rows come from.
    progress
        Called as ``progress(stage, done, total)`` [shown on stderr; ``False``: none].

    Returns
    -------
    Pruning

    Raises
    ------
    ConfigError
        Nothing says where the rows come from; sizes or settings as `prune` refuses them.
    """
    path = "" if isinstance(sae, SAE) else os.fspath(sae)
    sae = sae if isinstance(sae, SAE) else SAE.load(sae)
    sizes, by = check_sizes(sae, sizes, "prune"), _order(sae, by)
    if isinstance(by, str) and by in sae.scores and by not in ORDERS:  # known before any row is read
        check_ties(rank(sae, None, by=by), sizes, "prune")
    origin = find_rows(
        sae, rows, model=model, data=data, path=path, settings=part_of(settings, OriginSettings), progress=progress
    )
    ranked_on, measured_on = halves(origin.rows)
    if isinstance(by, str) and by.replace("-", "_") in ATTRIBUTIONS:
        sae, origin = _with_gradients(sae, origin, settings.text, progress)
    ranked = rank(sae, ranked_on, by=by, batch_rows=settings.batch_rows, seed=settings.seed, progress=progress)
    check_ties(ranked, sizes, "prune")
    how = part_of(settings, PruneSettings)
    small = prune(ranked, ranked_on, by="unsorted", sizes=sizes, settings=how, progress=progress)
    measured = functools.partial(
        measure_sizes,
        rows=measured_on,
        model=origin.model,
        data=origin.data,
        settings=part_of(settings, SizeSettings, tokens=origin.ce_tokens, selection="before"),
        progress=progress,
    )
    name = Path(path).name or "SAE"
    prefixes = measured(ranked, sizes=sorted({*sizes, sae.n_latents}), name=name)
    are_prefixes = how == replace(how, refit=False, recalibrate=False, selection="before")
    curve = prefixes if are_prefixes else measured(small, name=f"{name}, pruned")
    return Pruning(prefixes.write_into(ranked), small, curve)


def _with_gradients(sae: SAE, origin: Origin, text: str, progress: Progress | None) -> tuple[SAE, Origin]:
    """Return the SAE with its attributions on every second text, and the origin with the other texts."""
    if origin.model is None:
        raise ConfigError("`model` and `data` must be given: `attribution` is a gradient of a language model.")
    characters = 2 * origin.ce_tokens * CHARACTERS_PER_TOKEN
    ranked_on, measured_on = text_halves(read_texts(origin.data, text=text, columns=(), characters=characters))
    found = attribution(
        sae,
        origin.model,
        ranked_on,
        hook=place_of(sae, origin.rows.info, where="prune"),
        tokens=origin.ce_tokens,
        settings=AttributionSettings(text=text, target=origin.rows.info.get("hook_out") if sae.is_transcoder else None),
        progress=progress,
    )
    scores = {name: score for name, score in found.scores.items() if name != "frequency"}
    return sae.with_scores(**scores), replace(origin, data=measured_on)


def _order(sae: SAE, by: str | Tensor) -> str | Tensor:
    """Return the name of an order, or the scores in a file."""
    if not isinstance(by, str):
        return by
    if not by.endswith(".npy"):
        check_order(sae, by, "prune", also=ATTRIBUTIONS)
        return by
    try:
        with open_file(by) as stream:
            return torch.from_numpy(np.load(stream, allow_pickle=False))
    except (OSError, ValueError, TypeError, EOFError) as error:
        raise ConfigError(
            f"`by` must name a .npy file of a number per latent; `{by}` cannot be read: {error}"
        ) from None


@suggest_keywords
@shows_progress
def study_progressive(
    saes: Sequence[SAE | str | os.PathLike[str]] | SAE | str | os.PathLike[str],
    rows: Any = None,
    *,
    sizes: Sequence[int] | None = None,
    model: Any = None,
    data: Any = None,
    settings: ProgressiveStudySettings = ProgressiveStudySettings(),
    progress: Progress | None = None,
) -> Progressive:
    """Compare the ways of getting small SAEs, ranking on every second document and measuring on the others.

    Parameters
    ----------
    saes
        The folder of a training run, or several SAEs.
    rows
        A source of rows; see `saekit.rows.origin.find_rows`.
    sizes, model, data, settings, progress
        As for `progressive`; the settings also say where the rows come from.

    Returns
    -------
    Progressive

    Raises
    ------
    ConfigError
        Nothing says where the rows come from; or as `progressive`.
    """
    return compare_sizes(
        plan_study(saes, rows, sizes=sizes, model=model, data=data, settings=settings, progress=progress)
    )


def plan_study(
    saes: Sequence[SAE | str | os.PathLike[str]] | SAE | str | os.PathLike[str],
    rows: Any = None,
    *,
    sizes: Sequence[int] | None = None,
    model: Any = None,
    data: Any = None,
    settings: ProgressiveStudySettings = ProgressiveStudySettings(),
    progress: Progress | None = None,
) -> ProgressivePlan:
    """Return what `study_progressive` will measure, checked; see there."""
    given = [saes] if isinstance(saes, SAE | str | os.PathLike) else list(saes)
    named = name_saes(given)
    paths = [path for each in given if not isinstance(each, SAE) for path in sae_paths(each)]
    origin = find_rows(
        next(iter(named.values())),
        rows,
        model=model,
        data=data,
        path=paths[0] if paths else "",
        settings=part_of(settings, OriginSettings),
        progress=progress,
    )
    ranked_on, measured_on = halves(origin.rows)
    return plan_progressive(
        named,
        measured_on,
        fit=ranked_on,
        sizes=sizes,
        model=origin.model,
        data=origin.data,
        settings=part_of(settings, ProgressiveSettings, tokens=origin.ce_tokens),
        progress=progress,
    )
