"""How many latents per row: chosen from SAEs that are trained on a part of the rows, one for each number tried."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..errors import ConfigError, DataError
from ..files import check_path, read_json
from ..measure.decoder_projection import projections
from ..measure.reconstruction import SAMPLE_ROWS
from ..progress import shows_progress
from ..provenance import library_versions, release
from ..rows.opening import Rows, source_of
from ..rows.source import Source
from ..sae.model import SAE
from ..settings import Progress, differences, suggest_keywords
from ..training.architectures import config_to_dict
from ..training.config import BatchTopK, Config, HierarchicalTopK, Matryoshka, TopK
from ..training.defaults import default_batch_rows
from ..training.loop import train
from ..training.settings import TrainSettings
from .k_choice import KChoice, KPoint, decide, with_means
from .settings import LEAST_KS, KChoiceSettings

FILE = "k_choice.json"
"""Name of the result in the folder of a run."""

FOLDER = "k_choice"
"""Folder, in that of the run, of the SAEs that it was chosen from."""

TRIED = 8
"""Number of values of k that are tried by default."""

WITH_K = (TopK, BatchTopK, HierarchicalTopK, Matryoshka)
"""Configurations whose sparsity is a k."""


def default_ks(n_latents: int, d_in: int) -> tuple[int, ...]:
    """Return up to 8 values of k, evenly on a log scale, from 2 to half of the latents or of the width of the rows.

    >>> default_ks(1024, 192), default_ks(16, 24)
    ((2, 3, 6, 11, 18, 32, 55, 96), (2, 3, 4, 5, 7, 8))
    """
    most = max(min(n_latents // 2, d_in // 2), 2)
    return tuple(sorted({round(2 * (most / 2) ** (each / (TRIED - 1))) for each in range(TRIED)}))


@suggest_keywords
@shows_progress
def choose_k(
    config: Config,
    rows: Rows,
    *,
    tokens: int | None = None,
    out: str | os.PathLike[str] | None = None,
    resume: bool = False,
    settings: KChoiceSettings = KChoiceSettings(),
    train_settings: TrainSettings = TrainSettings(),
    progress: Progress | None = None,
) -> KChoice:
    """Choose the number of latents per row from SAEs with several, trained on a part of the rows.

    The number is `decoder_projection` (after 2508.16560; `saekit.measure.decoder_projection` has the formula): of SAEs
    of one width on the same rows it is lowest where k is right. All SAEs are trained in one pass over the first rows of
    the run and compared on up to 4,096 rows in another order. That is work on top of the run, which itself is the one
    with that k given. Where the curve does not decide, `k` is None, and `why` says so.

    Parameters
    ----------
    config
        What is to be trained; its own `k` counts for nothing.
    rows, tokens
        As in `train`: the rows of the whole run.
    out
        Folder of the run: the result goes to ``k_choice.json`` there, the SAEs that it was chosen from to ``k_choice``.
    resume
        Go on where an interrupted choice stopped, with the same result; one that is finished is read back.
    settings
        Which k, on what part of the rows, with how many seeds.
    train_settings
        As in `train`.
    progress
        As in `train`.

    Raises
    ------
    ConfigError
        The architecture has no k, a value of k that cannot be, too few values to try, too few rows, or `out` holds
        another choice.

    Examples
    --------
    ::

        choice = choose_k(TopK(n_latents=1024, k=16), rows)
        saes = sk.train(TopK(n_latents=1024, k=choice.decided), rows)
    """
    source = source_of(rows)
    total = tokens if tokens is not None else source.n_rows
    _check(config, source, total)
    assert total is not None
    ks = settings.ks or _enough(default_ks(config.n_latents, source.d_in), config.n_latents, source.d_in)
    configs: list[Config] = [replace(config, k=k) for k in ks]  # type: ignore[call-arg]
    used = math.ceil(settings.share * total)
    batch_rows = train_settings.batch_rows or default_batch_rows(used)
    if used < batch_rows:
        raise ConfigError(
            f"choose_k: `share` of the {total:,} rows must be at least a batch of {batch_rows}; "
            f"{settings.share:g} are {used:,} rows. Train on more rows, or give a larger share or a smaller batch_rows."
        )
    facts = {
        "ks": list(ks),
        "share": settings.share,
        "seeds": settings.seeds,
        "rows": total,
        "data_seed": train_settings.data_seed,
        "batch_rows": batch_rows,
        "precision": train_settings.precision,
    }
    known = {name: value for name, value in config_to_dict(config).items() if name != "k"}
    file = None if out is None else check_path(out) / FILE
    if resume and file is not None and file.is_file():
        return _read_back(file, facts, known, source)
    saes = train(
        configs,
        source,
        seeds=list(range(settings.seeds)),
        tokens=used,
        out=None if out is None else check_path(out) / FOLDER,
        resume=resume,
        settings=replace(train_settings, snapshots=0),
        progress=progress,
    )
    points = with_means(_points(ks, saes, source, train_settings.data_seed))
    k, near, why = decide(points)
    choice = KChoice(
        saekit=release(),
        versions=library_versions(False),
        settings=facts,
        config=known,
        rows=dict(source.info),
        rows_used=used,
        points=points,
        k=k,
        near=near,
        why=why,
    )
    if file is not None:
        choice.save(file)
    return choice


def _enough(ks: tuple[int, ...], n_latents: int, d_in: int) -> tuple[int, ...]:
    """Return values of k that make a curve; raises `ConfigError` for fewer than three."""
    if len(ks) < LEAST_KS:
        raise ConfigError(
            f"choose_k: `n_latents` and the width of the rows must leave three or more k to try, from 2 to half of the "
            f"smaller; got {n_latents} latents and rows of width {d_in}. Give `k` (--k 1, say), or the values to try "
            "(`ks`)."
        )
    return ks


def _check(config: Config, source: Source, total: int | None) -> None:
    if not isinstance(config, WITH_K):
        raise ConfigError(
            f"choose_k: the architecture must have a k ({', '.join(each.arch for each in WITH_K)}); "
            f"got {type(config).__name__}. Choose it with one of them."
        )
    if source.info.get("d_out") is not None:
        raise ConfigError(
            "choose_k: the rows must have no targets: decoder rows of a transcoder lie among other rows. Give `k`."
        )
    if total is None:
        raise ConfigError("choose_k: `tokens` must be given for rows without end. Give the rows of the whole run.")
    if int(os.environ.get("WORLD_SIZE") or 1) > 1:
        raise ConfigError("choose_k: it is done by one process; choose first, then train on several with that k.")


def _read_back(file: Path, facts: dict[str, Any], known: dict[str, Any], source: Source) -> KChoice:
    """Return a finished choice; raises `ConfigError` where it is another one."""
    found = KChoice.from_json(read_json(file), os.fspath(file))
    then = {**found.settings, "config": found.config, "rows_digest": found.rows.get("digest")}
    now = {**facts, "config": json.loads(json.dumps(known)), "rows_digest": source.info.get("digest")}
    different = differences(then, now)
    if different:
        raise ConfigError(
            f"choose_k: a resumed choice must have the settings that it began with; {different}. Repeat the old "
            "settings or give another folder."
        )
    return found


def _points(ks: Sequence[int], saes: Sequence[SAE], source: Source, data_seed: int) -> list[KPoint]:
    """Return the curve, from rows in another order than those of the training."""
    count = SAMPLE_ROWS if source.n_rows is None else min(SAMPLE_ROWS, source.n_rows)
    x = next(iter(source.batches(count, seed=data_seed + 1))).x
    found = projections(saes, x, intervals=False)
    if any(math.isnan(each.value) for each in found):
        raise DataError("choose_k: rows must differ for their projections to say anything; these are all the same.")
    each = len(saes) // len(ks)
    points = []
    for at, k in enumerate(ks):
        own = slice(at * each, (at + 1) * each)
        fvu = [sae.provenance["metrics"]["fvu"] for sae in saes[own]]
        points.append(KPoint(k, [e.value for e in found[own]], fvu))
    return points
