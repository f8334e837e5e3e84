"""Jobs computed and kept: the predictions of every fitted arm, one file each, so that a cut-off run goes on."""

from __future__ import annotations

import functools
import itertools
import json
import math
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import ConfigError, FormatError
from ..files import dump_json, locked_folder, parse_json, seal, unsealed, write_bytes
from ..grid import Cell, Sharing, compute_cells, waiting_claim
from ..inputs.labelled import Labelled
from ..provenance import library_versions
from ..ranks import ALONE, Ranks, agreed, alone
from ..rows.pooling_cache import digest_arrays
from ..settings import Progress
from .arms import Arm
from .features import View, take
from .fit import Fitted, fit_arm, predict_arm
from .plan import Job, Plan

FITS = "fits"
"""Folder of the fits within the output folder."""


@dataclass(frozen=True, eq=False)
class StoredFit:
    """What the classifiers of a job said about test rows, and what is to be told about their fit."""

    probabilities: list[np.ndarray]
    """For each value ``float32 [n_test, n_classes]``."""
    shuffled: np.ndarray
    """``float32 [shuffles, n_test, n_classes]`` after learning permuted labels."""
    facts: dict[str, Any]
    """chosen (per fold), inner, options (per fold), selected, stability, converged, notes, seconds."""
    labels: list[np.ndarray]
    """For each fold ``[n_options, n_train]``: what the inner folds said about the training rows (class codes ``int32``,
    or ranks ``float32`` where they choose by AUC), of the arm and of those that a search could have chosen instead; no
    options for arms that choose nothing."""
    rivals: list[np.ndarray]
    """For each fold ``float32 [n_options - 1, n_test, n_classes]``: what those said about its own test rows."""


def run_jobs(
    plan: Plan,
    read: Callable[[Sequence[Arm], Progress], View],
    progress: Progress,
    sharing: Sharing | None = None,
    ranks: Ranks = ALONE,
) -> dict[str, StoredFit]:
    """Return the fits of all jobs by their keys; those that the output folder lacks are computed.

    Several ranks read the matrices together; rank 0 fits, and has the result.

    Parameters
    ----------
    plan
        What to fit.
    read
        Computes the matrices of some arms; called when a fit is missing.
    progress
        Called with the stage ``arms``.
    sharing
        How other processes help, see `saekit.grid`; None: this call has the output folder for itself.
    ranks
        The ranks that take part.

    Raises
    ------
    BusyError
        Another call fits into the output folder and shares nothing.
    ConfigError
        Without an output folder nothing can be shared; or another process has other settings.
    """
    if sharing is not None:
        return _run_shared(plan, read, progress, sharing)
    found: dict[str, StoredFit | None] = {}
    with ExitStack() as stack:

        def begin() -> list[int]:
            """Hold the folder, and return which jobs have no fit there."""
            if plan.out is not None:
                stack.enter_context(locked_folder(plan.out))
            found.update({job.key: read_fit(plan, job) for job in plan.jobs})
            return [number for number, job in enumerate(plan.jobs) if found[job.key] is None]

        missing = [plan.jobs[number] for number in agreed(ranks, begin)]
        view = read([job.arm for job in missing], progress) if missing else None
        if view is not None and ranks.rank == 0:
            with alone():
                _fit(plan, missing, view, progress, found)
    return {key: fit for key, fit in found.items() if fit is not None}


def _fit(
    plan: Plan, missing: Sequence[Job], view: View, progress: Progress, found: dict[str, StoredFit | None]
) -> None:
    """Compute and keep the fits of some jobs."""
    for done, job in enumerate(missing):
        damaged = plan.out is not None and (plan.out / FITS / job.file).is_file()
        progress("arms", done, len(missing), f"{job.name} (again: its file was damaged)" if damaged else job.name)
        computed = compute(plan, job, view)
        _write_fit(plan, job, computed)
        found[job.key] = computed
    progress("arms", len(missing), len(missing), "")


def _run_shared(
    plan: Plan, read: Callable[[Sequence[Arm], Progress], View], progress: Progress, sharing: Sharing
) -> dict[str, StoredFit]:
    """Compute the fits together with other processes; one of them reads the features, the others find them."""
    if plan.out is None:
        raise ConfigError("classify: workers share fits in an output folder; none is given. Give --out (`out`).")
    out, missing = plan.out, missing_jobs(plan)

    @functools.cache
    def view() -> View:
        with waiting_claim(out, "features", sharing):
            return read([job.arm for job in missing], progress)

    cells = [
        Cell(
            name=job.key,
            is_done=functools.partial(_is_there, plan, job),
            compute=functools.partial(_computed, plan, job, view),
            store=functools.partial(_write_fit, plan, job),
        )
        for job in plan.jobs
    ]
    facts = {"versions": library_versions(True), **plan.settings}
    compute_cells(out, cells, facts=facts, sharing=sharing, progress=progress)
    found = {job.key: read_fit(plan, job) for job in plan.jobs}
    return {key: fit for key, fit in found.items() if fit is not None}


def _is_there(plan: Plan, job: Job) -> bool:
    return read_fit(plan, job) is not None


def _computed(plan: Plan, job: Job, view: Callable[[], View]) -> StoredFit:
    return compute(plan, job, view())


def missing_jobs(plan: Plan) -> list[Job]:
    """Return the jobs that have no file yet; all of them without a folder."""
    return [job for job in plan.jobs if read_fit(plan, job) is None]


def read_fit(plan: Plan, job: Job) -> StoredFit | None:
    """Return the fit of a job from its file; None where there is none, or a damaged one."""
    if plan.out is None:
        return None
    from safetensors import SafetensorError, safe_open

    path = plan.out / FITS / job.file
    if not path.is_file():
        return None
    try:
        with safe_open(path, "numpy") as file:
            about = unsealed(parse_json(file.metadata()["fit"], path), path, since=1)
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        if about["key"] != job.key or about["content"] != digest_arrays(tensors):
            return None
        parts = range(len(plan.parts[job.value]))
        return StoredFit(
            [tensors[f"value{j}"] for j in range(len(plan.values))], tensors["shuffled"], about["facts"],
            [tensors[f"labels{part}"] for part in parts], [tensors[f"rivals{part}"] for part in parts],
        )  # fmt: skip
    except (SafetensorError, OSError, FormatError, KeyError, TypeError):
        return None  # cut off or altered: fitted again


def _write_fit(plan: Plan, job: Job, fit: StoredFit) -> Path | None:
    if plan.out is None:
        return None
    from safetensors.numpy import save

    tensors = {f"value{j}": each for j, each in enumerate(fit.probabilities)} | {"shuffled": fit.shuffled}
    tensors |= {f"labels{part}": each for part, each in enumerate(fit.labels)}
    tensors |= {f"rivals{part}": each for part, each in enumerate(fit.rivals)}
    facts = {"schema": 1, "key": job.key, "name": job.name, "facts": fit.facts}
    about = dump_json(seal({**facts, "content": digest_arrays(tensors)}))
    path = plan.out / FITS / job.file
    write_bytes(path, save(tensors, metadata={"fit": about}))
    return path


def compute(plan: Plan, job: Job, view: View) -> StoredFit:
    """Fit a job on every part and predict the test rows of every value; then on permuted labels."""
    data, own = plan.data, view(job.arm, job.value, job.value)
    trains = plan.train_rows(job)
    fits = []
    said: list[list[np.ndarray]] = [[] for _ in plan.values]
    rivals = []
    for part, train in enumerate(trains):
        together = None if data.together is None else data.together[train]
        fits.append(
            fit_arm(
                job.arm, take(own, train), data.y[train], groups=together, budget=plan.budget, metric=plan.chosen_by
            )
        )
        mine = plan.parts[job.value][part][1]
        rivals.append(_rivals(fits[-1], take(own, mine), len(mine), len(data.classes)))
        for j, parts in enumerate(plan.parts):
            test = parts[part][1]
            X = take(view(job.arm, job.value, j), test)
            said[j].append(predict_arm(fits[-1], X, len(data.classes)).probabilities)
    n_shuffles = plan.shuffles if job.n_train is None else 0
    shuffled = [_shuffled(plan, job, own, fits, each) for each in range(n_shuffles)]
    empty = np.zeros((0, len(plan.test(job.value)), len(data.classes)), np.float32)
    return StoredFit(
        [np.concatenate(each) for each in said], np.stack(shuffled) if shuffled else empty, _facts(fits),
        [_labels(fitted, len(train)) for fitted, train in zip(fits, trains)], rivals,
    )  # fmt: skip


def _options(fitted: Fitted) -> list[Fitted]:
    """Return what a fit chose and what it could have chosen; nothing where it chooses nothing."""
    return [] if fitted.labels is None else [fitted, *fitted.finalists]


def _labels(fitted: Fitted, n_train: int) -> np.ndarray:
    labels = [each.labels for each in _options(fitted) if each.labels is not None]
    found = np.stack(labels) if labels else np.zeros((0, n_train), np.int64)
    return found.astype(np.int32 if found.dtype == np.int64 else np.float32)


def _rivals(fitted: Fitted, X: Any, n_rows: int, n_classes: int) -> np.ndarray:
    """Return what the arms that a search could have chosen say about test rows."""
    found = [predict_arm(each, X, n_classes).probabilities for each in _options(fitted)[1:]]
    return np.stack(found) if found else np.zeros((0, n_rows, n_classes), np.float32)


def _shuffled(plan: Plan, job: Job, X: Any, fits: Sequence[Fitted], shuffle: int) -> np.ndarray:
    """Fit on permuted labels with the chosen hyperparameters; return the probabilities of the same fits."""
    data = plan.data
    y = shuffled_labels(data, plan.split.seed + shuffle)
    guesses = []
    for (_, test), train, fitted in zip(plan.parts[job.value], plan.train_rows(job), fits):
        noise = fit_arm(job.arm, take(X, train), y[train], budget=plan.budget, chosen=fitted.chosen)
        guesses.append(predict_arm(noise, take(X, test), len(data.classes)).probabilities)
    return np.concatenate(guesses)


def shuffled_labels(data: Labelled, seed: int) -> np.ndarray:
    """Return class codes permuted within training and test rows: what no feature can know.

    Labels of test rows are permuted as well: with true ones, a classifier that learned noise along a direction that
    matters would differ from chance in either direction, more than the test rows can tell.
    """
    generator = np.random.Generator(np.random.PCG64([seed, 29]))
    y = data.y.copy()
    blocks = data.parts[0] if len(data.parts) == 1 else [test for _, test in data.parts]
    for rows in blocks:
        y[rows] = generator.permutation(y[rows])
    return y


def _facts(fits: Sequence[Fitted]) -> dict[str, Any]:
    inner = float(np.mean([fitted.inner_score for fitted in fits]))
    return {
        "chosen": json.loads(json.dumps([fitted.chosen for fitted in fits], default=float)),
        "inner": None if math.isnan(inner) else inner,
        "options": [[_option(each) for each in _options(fitted)] for fitted in fits],
        "selected": list(fits[0].selected or ()),
        "stability": _mean_stability([fitted.stability for fitted in fits if fitted.stability is not None]),
        "converged": all(fitted.converged for fitted in fits),
        "notes": list(dict.fromkeys(itertools.chain(*(fitted.notes for fitted in fits)))),
        "seconds": round(sum(fitted.seconds for fitted in fits), 2),
    }


def _option(fitted: Fitted) -> dict[str, Any]:
    return {"arm": fitted.chosen.get("arm"), "inner": fitted.inner_score}


def _mean_stability(found: Sequence[dict[str, float]]) -> dict[str, float] | None:
    return {name: float(np.mean([each[name] for each in found])) for name in found[0]} if found else None
