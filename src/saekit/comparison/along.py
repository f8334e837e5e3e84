"""Whether seeds come to share more as they are trained: the snapshots of a run, compared like its SAEs."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from ..errors import ConfigError
from ..measure.results import Measured
from ..places import Warned
from ..progress import shows_progress
from ..sae.model import SAE
from ..settings import Progress, suggest_keywords
from ..training.run_folder import SNAPSHOTS
from .intervals import OverPairs
from .result import AlongPoint, Comparison
from .run import compare, counting_pairs
from .settings import ComparisonSettings

LEAST_RISE = 0.02
"""Rise of the shared fraction over the last doubling of the rows from which seeds are not trained to the end."""


@suggest_keywords
@shows_progress
def along(
    paths: Sequence[str | os.PathLike[str]],
    comparison: Comparison,
    *,
    settings: ComparisonSettings = ComparisonSettings(),
    progress: Progress | None = None,
) -> Comparison:
    """Return a comparison of the SAEs of a run with what its snapshots shared before, and a warning if it still rises.

    The chance level is that of the comparison: it depends on the shape of the SAEs alone.

    Parameters
    ----------
    paths
        Folders of the SAEs that were compared, in that order: all of one run, trained with
        ``TrainSettings(snapshots=4)``, say.
    comparison
        What `compare` found about them.
    settings
        The threshold; as for the comparison.
    progress
        As for `compare`.

    Returns
    -------
    Comparison
        ``.along``: a point per snapshot, the last one of the finished SAEs; ``.shared_rise``: how much the last
        doubling of the rows added.

    Raises
    ------
    ConfigError
        Fewer than two SAEs, SAEs that are not of one run, or a run that kept no snapshots.
    """
    plain = replace(settings, controls=False)
    found = []
    for folder in snapshots_of(paths):
        saes = [SAE.load(folder / Path(os.fspath(path)).name) for path in paths]
        found.append(compare(saes, settings=plain, progress=progress))
    found.append(comparison)
    points = [_point(each) for each in found]
    halves = [each for each, point in zip(found, points) if 2 * point.rows_seen <= points[-1].rows_seen]
    rise = _rise(halves[-1], comparison) if halves else None
    told: list[Warned] = []
    if rise is not None:
        run = Path(os.fspath(paths[0])).parent
        told = _warning(rise, comparison, run) or _partners_warning(_rise(halves[-1], comparison, "equal"), run)
    return replace(comparison, along=points, shared_rise=rise, warnings=[*comparison.warnings, *told])


def _point(found: Comparison) -> AlongPoint:
    seen = int(found.saes[0].sae["provenance"]["rows_seen"])
    return AlongPoint(seen, found.shared, found.equal, found.mean_cosine)


def snapshots_of(paths: Sequence[str | os.PathLike[str]]) -> list[Path]:
    """Return the folders of the snapshots of a run, the first first.

    Raises
    ------
    ConfigError
        Fewer than two SAEs, SAEs that are not of one run, or a run that kept no snapshots.
    """
    if len(paths) < 2:
        raise ConfigError(
            f"along: at least two SAEs of a run must be given, so that there is something to share; got {len(paths)}. "
            "Train it with two seeds (--seeds 0,1)."
        )
    folders = {Path(os.fspath(path)).parent for path in paths}
    if len(folders) > 1:
        raise ConfigError(
            f"along: the SAEs must be of one run; they lie in {len(folders)} folders. Give the folder of a run."
        )
    run = folders.pop()
    names = [Path(os.fspath(path)).name for path in paths]
    found = [
        folder
        for folder in sorted((run / SNAPSHOTS).glob("step-*"))
        if all((folder / name / "sae.json").is_file() for name in names)
    ]
    if not found:
        raise ConfigError(
            f"along: `{run}` must hold snapshots of its SAEs; it holds none. Train with --snapshots 4 "
            "(TrainSettings(snapshots=4)), which keeps them at a half, a quarter, … of the rows."
        )
    return found


def _rise(before: Comparison, now: Comparison, name: str = "shared") -> Measured:
    """Return how much more is shared (or another fraction of pairs), mean over pairs, with its interval."""
    at = counting_pairs(now.pairs)
    each = [_difference(getattr(now.pairs[index], name), getattr(before.pairs[index], name)) for index in at]
    order = [(i, j) for i in range(len(now.saes)) for j in range(i + 1, len(now.saes))]
    return OverPairs([order[index] for index in at], len(now.saes)).mean(each, least=-1.0)


def _difference(now: Measured, before: Measured) -> Measured:
    """Return a difference of fractions with Newcombe's interval from those of both."""
    value = now.value - before.value
    if now.low is None or now.high is None or before.low is None or before.high is None:
        return Measured(value, None, None, "fraction", "no interval: one side has none")
    low = value - math.hypot(now.value - now.low, before.value - before.high)
    high = value + math.hypot(now.value - now.high, before.value - before.low)
    return Measured(value, low, high, "fraction", "interval over latents")


def _warning(rise: Measured, comparison: Comparison, run: Path) -> list[Warned]:
    if rise.value < LEAST_RISE:
        return []
    if rise.low is None or rise.low <= 0:
        message = (
            f"the last doubling of the rows raised the shared fraction by {rise}, to {comparison.shared.value:.3g}, in "
            f"`{run}`: whether it has levelled off is not known. Train longer, or more seeds"
        )
        return [Warned("shared_may_rise", message)]
    message = (
        f"undertrained: the last doubling of the rows still raised the shared fraction by {rise}, to "
        f"{comparison.shared.value:.3g}, in `{run}`. What seeds share is not known before it levels off: train longer"
    )
    return [Warned("shared_still_rises", message)]


def _partners_warning(rise: Measured, run: Path) -> list[Warned]:
    """Warn where nothing is shared yet, but more and more latents have one partner in decoder and encoder."""
    if rise.value < LEAST_RISE or rise.low is None or rise.low <= 0:
        return []
    message = (
        f"undertrained: the shared fraction does not rise, but the last doubling of the rows raised the fraction of "
        f"latents whose partners are equal by {rise}, in `{run}`. What seeds share is not known yet: train longer"
    )
    return [Warned("partners_still_rise", message)]
