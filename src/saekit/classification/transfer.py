"""Train on one, test on another: languages, domains, models, seeds, in full matrices with controls.

`transfer` takes a column of the data (language, domain) and trains on each of its values, tests on each of the others.
`transfer_features` takes several SAEs instead: a classifier that learned on the latents of one reads those of another,
put into its order by matching. Everything is judged on the same held-out rows, so what is lost is a paired difference.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from ..errors import ConfigError, DataError, ShapeError, did_you_mean, listed
from ..files import write_bytes
from ..inputs.images import Images, read_images
from ..inputs.texts import read_texts
from ..matching.matching import match_latents
from ..measure.bootstrap import LEVEL, Estimate
from ..measure.paired_scores import MARGIN, PairedBootstrap, Predictions, Scores, score, verdict
from ..measure.results import Measured
from ..models.language import LanguageModel
from ..models.loading import load_language_model, load_vision_model
from ..models.vision import VisionModel
from ..provenance import facts_of_sae, library_versions, place_of, release
from ..randomness import hashed_key, random_order
from ..rows.capture_images import pool_images
from ..rows.pooling import DENSE_POOLS, Ask, check_pool, pool_texts
from ..rows.settings import PoolingSettings
from ..sae.model import SAE
from ..sae.naming import named_saes
from .transfer_result import Cell, Transfer, Value, Way, cell_sentence, loss, near_chance, way_sentence

if TYPE_CHECKING:
    from .arms import Arm, Budget

ARMS = ("sae", "binarized", "dense", "last", "words", "pixels", "majority")
"""Ways to classify that `transfer` knows; ``words`` of texts, ``pixels`` of images, ``last`` of texts."""

FEATURE_ARMS = ("sae", "binarized", "random", "dense", "majority")
"""Ways to classify that `transfer_features` knows; ``random``: the latents of the other SAE in random order."""

DRAWS = 1000
"""Resamples of the test rows by default."""

PIXEL_COMPONENTS = 64
"""Principal components of the pixels in the arm of pixels."""

PIXEL_SIDE = 16
"""Images are made grey and at most this wide and high for the arm of pixels."""

FEW_TEST = 50
"""Test rows of a class below which a note says that intervals are rough (20 for groups). Unit: rows."""

FEW_GROUPS = 20
"""The same for groups."""

PROFILE_ROWS = 4096
"""Most documents that latents are correlated over when they are matched by documents."""

VERDICT_METRICS = ("auto", "macro_f1", "auc")
"""What the verdict against dense states looks at."""

SKEWED = 0.4
"""With two classes, of which one has a smaller share of the test rows than this, ``auto`` means AUC: macro-F1 then
mostly tells how often a weak classifier says the larger class."""

LEAST_TEST = 2
"""Rows (or groups) of a class that must judge, at least."""

Progress = Callable[[str, int, int | None], None]


# ---------------------------------------------------------------------------------------------------------- the calls


def transfer(
    data: Any,
    *,
    model: str | os.PathLike[str] | LanguageModel | VisionModel,
    sae: Any = (),
    across: str | None = None,
    text: str = "text",
    label: str = "label",
    group: str | None = None,
    values: Sequence[Any] | None = None,
    rows: int | None = None,
    split: str | None = None,
    layer: int | None = None,
    hook: str | None = None,
    pool: str = "sum",
    arms: Sequence[str] | None = None,
    test_share: float = 0.25,
    folds: int | None = None,
    budget: Budget | None = None,
    margin: float = MARGIN,
    metric: str = "auto",
    draws: int = DRAWS,
    seed: int = 0,
    max_tokens: int | None = None,
    prompt: str | None = None,
    cache: str | os.PathLike[str] | None = None,
    out: str | os.PathLike[str] | None = None,
    progress: Progress | None = None,
) -> Transfer:
    """Train classifiers on each value of a column (a language, a domain) and test them on every other.

    Off the diagonal nothing of the tested value is seen in training (zero-shot). On the diagonal the same test rows are
    judged by a classifier of their own value; the drop is the paired difference of the two.

    Parameters
    ----------
    data
        Labelled texts, as `saekit.read_texts` takes them; or `Images` (for a loaded vision model, whatever
        `saekit.read_images` takes).
    model
        The model that reads them.
    sae
        One SAE of the model, or several: values, or paths.
    across
        Column of the values. None: no transfer, one value with all rows: plain classification.
    text, label, group
        Columns. Rows of one group (template, author, document) are never on both sides of the split, in whatever
        values they are. Without groups, equal texts are kept together.
    values
        Values of the column to use, in this order; None: all, sorted.
    rows
        Most rows of each value, drawn by `seed` (whole groups).
    split
        Split of a hub data set.
    layer, hook
        Where the rows come from; None: what the SAE's provenance says.
    pool
        Pooling over tokens, the same for latents and dense states: ``sum``, ``mean``, ``max``, … For those that dense
        states do not have (``count``, ``top5``), these are averaged.
    arms
        Which of `ARMS`; None: all that there are for the data.
    test_share
        Share of the rows of each value and class that judge.
    folds
        Cross-fitting instead: every row is judged, by classifiers that learned on the other folds.
    budget
        What every arm may spend on its settings, within the training rows; see `saekit.classification.arms.Budget`.
    margin
        Differences below this count as none.
    metric
        What the verdict against dense states looks at: ``"macro_f1"``, ``"auc"``, or ``"auto"``: macro-F1, but AUC for
        two classes of which one has less than `SKEWED` of the test rows.
    draws
        Resamples of the test rows.
    seed
        Of the split, the folds and the resamples.
    max_tokens, cache
        Longest text, and a folder for pooled features; see `saekit.rows.pooling.pool_texts`.
    prompt
        Text beside the image, of a vision-language model; None: the image alone.
    out
        Folder for finished fits: an interrupted run that is called again goes on from there.
    progress
        Called as ``progress(stage, done, total)`` with the stages ``"features"`` and ``"fits"``.

    Returns
    -------
    Transfer

    Raises
    ------
    ConfigError
        A setting is unknown or out of range.
    DataError
        A column or label is missing, a value has one class only or lacks one, there are too few rows or groups.
    ShapeError
        An SAE is for rows of another width.
    """
    _check(test_share, folds, draws, margin, rows, metric)
    named = named_saes(sae, "transfer") if not (isinstance(sae, list | tuple) and not sae) else []
    if isinstance(model, VisionModel):
        data = read_images(data, split=split)
    labelled = _read(data, text, label, group, across, values, rows, split, seed)
    _check_pool(pool)
    looks = labelled.images is not None
    if prompt is not None and not looks:
        raise ConfigError("transfer: `prompt` is what a vision-language model reads beside an image; these are texts.")
    wanted = _wanted(arms, ARMS, looks, bool(named))
    places = _places(named, layer, hook, needed=any(arm in wanted for arm in ("sae", "binarized", "dense", "last")))
    fold = labelled.split(test_share, folds, seed)
    labelled.check(fold, _inner(budget), folds)
    reader: Any = load_vision_model(model) if looks else load_language_model(model)  # type: ignore[arg-type]
    _check_widths(named, reader, places)
    dense_pool = pool if pool in DENSE_POOLS else "mean"
    asks = [Ask((pool,), each, None, place) for (_, each), place in zip(named, places)]
    distinct = list(dict.fromkeys(places))
    kinds = tuple(dict.fromkeys([dense_pool, *(["last"] if "last" in wanted else [])]))
    if {"dense", "last"} & set(wanted):
        asks += [Ask(kinds, None, None, place) for place in distinct]
    pooled = _pool(reader, labelled, asks, max_tokens, cache, progress, prompt) if asks else []
    lines: list[_Line] = []
    for at, (name, _) in enumerate(named):
        about = {"hook": places[at]}
        own = f" {name}" if len(named) > 1 else ""
        X = pooled[at][pool]
        for arm, kind, steps in (("sae", "full", ()), ("binarized", "binarized", ("binarize",))):
            if arm in wanted:
                lines.append(_line(f"{arm}{own}", kind, X, steps=steps, source=name, pool=pool, about=about))
    for at, place in enumerate(distinct):
        own = f" {place}" if len(distinct) > 1 else ""
        for arm, kind, name in (("dense", "dense", dense_pool), ("last", "last", "last")):
            if arm in wanted:
                X = pooled[len(named) + at][name]
                lines.append(_line(f"{arm}{own}", kind, X, source="dense", pool=name, about={"hook": place}))
    if "words" in wanted:
        lines.append(_line("words", "words", labelled.texts, features="texts", steps=("words",), source="words"))
    if "pixels" in wanted:
        X = _pixels(labelled.images)
        lines.append(_line("pixels", "pca", X, steps=("pca",), k=min(PIXEL_COMPONENTS, X.shape[1]), source="pixels"))
    if "majority" in wanted:
        lines.append(_line("majority", "majority", np.zeros((len(labelled.y), 1), np.float32), probe="majority"))
    settings = {
        "text": text, "label": label, "group": group, "across": across, "pool": pool, "dense_pool": dense_pool,
        "hooks": distinct, "arms": list(wanted), "values": labelled.values, "rows": rows, "max_tokens": max_tokens,
        **({} if prompt is None else {"prompt": prompt}),
    }  # fmt: skip
    problem = _Problem(
        across or "data", labelled.values, [labelled.rows_of(i) for i in range(len(labelled.values))], labelled.y,
        labelled.classes, labelled.groups if group is not None else None, labelled.together, fold, labelled.key_of(),
        [{} for _ in labelled.values],
    )  # fmt: skip
    identity = _Identity(
        settings=settings, data=labelled.about, model=reader.info, saes=_facts(named), notes=labelled.notes
    )
    how = _How(folds, test_share, budget, margin, metric, draws, seed)
    return _run(problem, lines, identity, how, out, progress)


def held_out(
    data: Any,
    *,
    across: str | None = None,
    text: str = "text",
    label: str = "label",
    group: str | None = None,
    values: Sequence[Any] | None = None,
    rows: int | None = None,
    split: str | None = None,
    test_share: float = 0.25,
    folds: int | None = None,
    seed: int = 0,
) -> np.ndarray:
    """Rows that an SAE should not be trained on, if `transfer` is to judge it on texts that it has not seen.

    Parameters
    ----------
    data, across, text, label, group, values, rows, split, test_share, folds, seed
        As they are given to `transfer` (or `transfer_features`).

    Returns
    -------
    numpy.ndarray
        ``bool [n_rows]``, for the rows as `saekit.read_texts` or `saekit.read_images` gives them: True where a row
        judges, or shares its group or its text with one that does. With `folds` every row that is used judges.

    Raises
    ------
    ConfigError, DataError
        As `transfer`.

    Examples
    --------
    ::

        texts = sk.read_texts("hate.csv.gz")
        seen = held_out("hate.csv.gz", across="lang", group="templ_id")
        rows = sk.capture(model, [text for text, out in zip(texts, seen) if not out], layer=4)
    """
    _check(test_share, folds, 0, 0.0, rows)
    labelled = _read(data, text, label, group, across, values, rows, split, seed)
    judged = labelled.split(test_share, folds, seed) >= 0
    names = {labelled.keys[g] for g in labelled.groups[judged]}
    if labelled.images is not None:
        own = _column(data, group, "group") if group is not None else _image_keys(data)
        return np.array([each in names for each in own])
    table = read_texts(data, text=text, split=split, columns=[] if group is None else [group])
    texts = {labelled.texts[i] for i in np.flatnonzero(judged)}
    own = _column(table, group, "group") if group is not None else list(table.texts)
    return np.array([name in names or each in texts for name, each in zip(own, table.texts)])


def transfer_features(
    data: Any,
    *,
    saes: Sequence[SAE | str | os.PathLike[str]],
    model: str | os.PathLike[str] | LanguageModel,
    to_model: str | os.PathLike[str] | LanguageModel | None = None,
    by: str = "decoder",
    threshold: float | None = None,
    text: str = "text",
    label: str = "label",
    group: str | None = None,
    rows: int | None = None,
    split: str | None = None,
    layer: int | None = None,
    hook: str | None = None,
    pool: str = "sum",
    arms: Sequence[str] | None = None,
    test_share: float = 0.25,
    folds: int | None = None,
    budget: Budget | None = None,
    margin: float = MARGIN,
    metric: str = "auto",
    draws: int = DRAWS,
    seed: int = 0,
    max_tokens: int | None = None,
    cache: str | os.PathLike[str] | None = None,
    out: str | os.PathLike[str] | None = None,
    progress: Progress | None = None,
) -> Transfer:
    """Train a classifier on the latents of one SAE and let it read those of another, put into its order by matching.

    Each latent of the first gets the column of its partner in the second; one without a partner gets zeros. The
    diagonal is every SAE with itself. Controls: the same classifier with the other's latents in random order, and
    dense states through the same protocol (for SAEs of one hook the rows are the same, so nothing can be lost).

    Parameters
    ----------
    data, text, label, group, rows, split
        Labelled texts; see `transfer`.
    saes
        Two SAEs or more.
    model
        The model of the SAEs.
    to_model
        The model of all SAEs but the first, where it is another.
    by
        How latents are matched: ``"decoder"``, cosine of decoder rows (both SAEs write rows of one width); or
        ``"documents"``, correlation of pooled codes over the training rows (any two SAEs, labels not used).
    threshold
        Pairs with a cosine (or correlation) below this count as unmatched; None: all count.
    layer, hook, pool, arms, test_share, folds, budget, margin, metric, draws, seed, max_tokens, cache, out, progress
        See `transfer`; `arms` are some of `FEATURE_ARMS`.

    Returns
    -------
    Transfer
        With ``across="sae"``; ``values[i].about["matched"]`` tells, for each other SAE, the mean cosine of the pairs
        and how many there are.

    Raises
    ------
    ConfigError, DataError
        As `transfer`; fewer than two SAEs.
    ShapeError
        Decoder rows of different widths: match by documents.
    """
    _check(test_share, folds, draws, margin, rows, metric)
    if by not in ("decoder", "documents"):
        raise ConfigError(f"`by` must be `decoder` or `documents`; got {by!r}.")
    if threshold is not None and not -1 <= threshold <= 1:
        raise ConfigError(f"`threshold` is a cosine and must be -1 to 1; got {threshold}.")
    if isinstance(saes, SAE | str | os.PathLike) or len(saes) < 2:
        raise ConfigError("transfer: at least two SAEs must be given; got one. Name the other (--to).")
    named = named_saes(saes, "transfer")
    _check_pool(pool)
    wanted = _wanted(arms, FEATURE_ARMS, False, True)
    if by == "decoder" and len({each.d_out for _, each in named}) > 1:
        raise ShapeError(
            f"SAEs matched by their decoders must write rows of one width; they write {[s.d_out for _, s in named]}. "
            "Match them by documents (by='documents')."
        )
    labelled = _read(data, text, label, group, None, None, rows, split, seed)
    if labelled.images is not None:
        raise ConfigError("features are transferred between SAEs on texts; got images. Use `transfer` for them.")
    places = _places(named, layer, hook, needed=True)
    fold = labelled.split(test_share, folds, seed)
    labelled.check(fold, _inner(budget), folds)
    first = load_language_model(model)
    second = first if to_model is None else load_language_model(to_model)
    models = [first, *[second] * (len(named) - 1)]
    dense_pool = pool if pool in DENSE_POOLS else "mean"
    pooled: list[dict[str, Any]] = [{} for _ in named]
    for lm in dict.fromkeys(models):
        mine = [i for i, other in enumerate(models) if other is lm]
        _check_widths([named[i] for i in mine], lm, [places[i] for i in mine])
        asks = [Ask((pool,), named[i][1], None, places[i]) for i in mine]
        asks += [Ask((dense_pool,), None, None, places[i]) for i in mine] if "dense" in wanted else []
        found = _pool(lm, labelled, asks, max_tokens, cache, progress)
        for at, i in enumerate(mine):
            pooled[i] = {"sae": found[at][pool]}
            if "dense" in wanted:
                pooled[i]["dense"] = found[len(mine) + at][dense_pool]
    train = np.flatnonzero(fold != 0) if folds is None else np.arange(len(fold))
    partners, matched = _partners(named, [each["sae"] for each in pooled], train, by, threshold)
    shuffled = [
        [_shuffled(partners[i][j], other.n_latents, seed, i, j) for j, (_, other) in enumerate(named)]
        for i in range(len(named))
    ]
    codes = [each["sae"] for each in pooled]

    def mapped(table: list[list[np.ndarray]]) -> Callable[[int, int], Any]:
        return lambda i, j: codes[j] if i == j else _in_order(codes[j], table[i][j])

    names = " | ".join(name for name, _ in named)
    lines = []
    for arm, kind, steps, table in (
        ("sae", "full", (), partners),
        ("binarized", "binarized", ("binarize",), partners),
        ("random", "full", (), shuffled),
    ):
        if arm in wanted:
            line = _line(
                arm, kind, None, steps=steps, source=names, pool=pool, family="control" if arm == "random" else ""
            )
            lines.append(replace(line, rows=mapped(table)))
    notes = list(labelled.notes)
    if "dense" in wanted:
        states = [each["dense"] for each in pooled]
        if len({x.shape[1] for x in states}) > 1:
            notes.append("no dense arm: the hidden states of the models differ in width")
        else:
            line = _line("dense", "dense", None, source="dense", pool=dense_pool)
            lines.append(replace(line, rows=lambda i, j: states[j]))
    if "majority" in wanted:
        lines.append(_line("majority", "majority", np.zeros((len(labelled.y), 1), np.float32), probe="majority"))
    about = [
        {"model": lm.name, "hook": place, "matched": {named[j][0]: matched[i][j] for j in matched[i]}}
        for i, (lm, place) in enumerate(zip(models, places))
    ]
    everything = np.arange(len(labelled.y))
    problem = _Problem(
        "sae", [name for name, _ in named], [everything] * len(named), labelled.y, labelled.classes,
        labelled.groups if group is not None else None, labelled.together, fold,
        labelled.key_of(), about,
    )  # fmt: skip
    settings = {
        "text": text, "label": label, "group": group, "across": "sae", "pool": pool, "dense_pool": dense_pool,
        "hooks": places, "arms": [line.arm.name for line in lines], "rows": rows, "max_tokens": max_tokens,
        "matched_by": by, "threshold": threshold, "to_model": second.info if second is not first else None,
    }  # fmt: skip
    identity = _Identity(settings=settings, data=labelled.about, model=first.info, saes=_facts(named), notes=notes)
    return _run(problem, lines, identity, _How(folds, test_share, budget, margin, metric, draws, seed), out, progress)


def _check(
    test_share: float, folds: int | None, draws: int, margin: float, rows: int | None, metric: str = "auto"
) -> None:
    if not 0 < test_share < 1:
        raise ConfigError(f"transfer: `test_share` must lie between 0 and 1; got {test_share}.")
    least = {"folds": (folds, 2), "draws": (draws, 0), "rows": (rows, 1)}
    for name, (value, smallest) in least.items():
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < smallest):
            raise ConfigError(f"transfer: `{name}` must be a whole number from {smallest}; got {value!r}.")
    if not margin >= 0:
        raise ConfigError(f"transfer: `margin` must be a difference from 0; got {margin}.")
    if metric not in VERDICT_METRICS:
        raise ConfigError(
            f"transfer: `metric` must be one of {listed(VERDICT_METRICS)}; got `{metric}`. "
            f"{did_you_mean(metric, VERDICT_METRICS)}"
        )


def _check_pool(pool: str) -> None:
    check_pool(pool)


def _wanted(arms: Sequence[str] | None, known: Sequence[str], looks: bool, has_sae: bool) -> list[str]:
    """The arms asked for, in the order of the table; those that the data cannot have refused or, unasked, left out."""
    impossible = {"words": looks, "last": looks, "pixels": not looks, "sae": not has_sae, "binarized": not has_sae}
    if arms is None:
        return [arm for arm in known if not impossible.get(arm, False)]
    asked = [arms] if isinstance(arms, str) else list(arms)
    for arm in asked:
        if arm not in known:
            raise ConfigError(
                f"transfer: an arm must be one of {listed(known, 12)}; got `{arm}`. {did_you_mean(arm, known)}"
            )
        if impossible.get(arm, False):
            what = "an SAE" if arm in ("sae", "binarized") else "images" if arm == "pixels" else "texts"
            raise ConfigError(f"transfer: the arm `{arm}` needs {what}; there is none. Leave it out, or give {what}.")
    if not asked:
        raise ConfigError(f"transfer: at least one arm must be given, of {listed(known, 12)}; got none.")
    return [arm for arm in known if arm in asked]


def _places(named: list[tuple[str, SAE]], layer: int | None, hook: str | None, *, needed: bool) -> list[str]:
    """Hook of each SAE; of the dense states alone where there is none."""
    if named:
        return [place_of(sae, layer=layer, hook=hook, where="transfer", name=f"`{name}`") for name, sae in named]
    is_given = layer is not None or hook is not None
    return [place_of(layer=layer, hook=hook, where="transfer")] if needed or is_given else []


def _check_widths(named: Sequence[tuple[str, SAE]], reader: Any, places: Sequence[str]) -> None:
    """Refuse SAEs of another width before the model runs; hooks inside a block may have another width."""
    for (name, sae), place in zip(named, places):
        if place.startswith("layers.") and place.count(".") == 1 and sae.d_in != reader.d_model:
            raise ShapeError(
                f"`{name}` must be for rows of the model's width, {reader.d_model}; it is for {sae.d_in}. Was it "
                f"trained on another model than `{reader.name}`?"
            )


def _pool(
    reader: Any,
    labelled: _Labelled,
    asks: Sequence[Ask],
    max_tokens: int | None,
    cache: str | os.PathLike[str] | None,
    progress: Progress | None,
    prompt: str | None = None,
) -> list[dict[str, Any]]:

    def tick(stage: str, done: int, total: int | None = None, note: str = "") -> None:
        if progress is not None:
            progress("features", done, total)

    if labelled.images is not None:
        return pool_images(reader, labelled.images, asks, settings=PoolingSettings(prompt=prompt), progress=tick)
    return pool_texts(reader, labelled.texts, asks, max_tokens=max_tokens, cache=cache, progress=tick)


def _pixels(images: Images | None) -> np.ndarray:
    """Grey pixels ``[n, side * side]``, shrunk to the same small square."""
    assert images is not None
    largest = max(images[0].size)
    side = min(PIXEL_SIDE, largest)
    return np.stack([np.asarray(image.convert("L").resize((side, side)), np.float32).ravel() / 255 for image in images])


def _facts(named: list[tuple[str, SAE]]) -> list[dict[str, Any]]:
    return [{"name": name, **facts_of_sae(sae)} for name, sae in named]


def _inner(budget: Budget | None) -> int:
    return 3 if budget is None else budget.inner


# ---------------------------------------------------------------------------------------------------------- the data


@dataclass(frozen=True, eq=False)
class _Labelled:
    """Labelled texts or images with the values that they belong to."""

    texts: list[str]
    images: Images | None
    y: np.ndarray
    classes: list[str]
    values: list[str]
    value: np.ndarray
    """Place of each row's value in `values`."""
    groups: np.ndarray
    """Group of each row; a row's own text where none was given."""
    keys: list[str]
    """Name of each group, by which it is drawn: the same whatever else is in the data."""
    together: np.ndarray | None
    """Groups as inner folds must keep them; None where every row is its own."""
    about: dict[str, Any]
    notes: list[str]
    what: str
    """``groups`` or ``rows``: what is counted."""

    def key_of(self) -> list[str]:
        """Name of the group of each row."""
        return [self.keys[g] for g in self.groups]

    def rows_of(self, value: int) -> np.ndarray:
        """Rows of a value."""
        return np.flatnonzero(self.value == value)

    def split(self, test_share: float, folds: int | None, seed: int) -> np.ndarray:
        """Fold of each row, ``int64 [n]``; without folds 0 for the rows that judge and -1 for the others.

        Groups that hold the same values and classes are one stratum; each is dealt out in an order computed from the
        seed and the names of the groups alone.
        """
        members: list[set[tuple[int, int]]] = [set() for _ in self.keys]
        for g, v, c in zip(self.groups.tolist(), self.value.tolist(), self.y.tolist()):
            members[g].add((v, c))
        strata: dict[tuple[tuple[str, int], ...], list[int]] = {}
        for g, signs in enumerate(members):
            strata.setdefault(tuple(sorted((self.values[v], c) for v, c in signs)), []).append(g)
        of_group = np.full(len(self.keys), -1)
        for mine in strata.values():
            mine.sort(key=lambda g: hashed_key("split", seed, self.keys[g]))
            # where the first one falls is drawn as well, or small strata would all be rounded the same way
            start = hashed_key("start", seed, self.keys[mine[0]]) / 2**128
            if folds is not None:
                of_group[mine] = (np.arange(len(mine)) + int(start * folds)) % folds
            else:
                place = np.arange(len(mine)) + start / test_share
                of_group[mine] = np.where(np.floor((place + 1) * test_share) > np.floor(place * test_share), 0, -1)
        return of_group[self.groups]

    def check(self, fold: np.ndarray, inner: int, folds: int | None) -> None:
        """Refuse values that cannot be learned or judged.

        Raises
        ------
        DataError
            One class, another set of classes, too few rows or groups on either side.
        """
        column = self.about["across"]
        for v, name in enumerate(self.values):
            rows = self.rows_of(v)
            where = f"`{name}` of column `{column}`" if column is not None else "the data"
            missing = [label for c, label in enumerate(self.classes) if not (self.y[rows] == c).any()]
            if len(self.classes) - len(missing) < 2:
                only = next(label for label in self.classes if label not in missing)
                raise DataError(
                    f"{where} must have at least two classes; all its {len(rows)} rows are `{only}`. Leave it out "
                    "(values=…), or check the label column."
                )
            if missing:
                raise DataError(
                    f"{where} must have every class, or nothing can be said about them there; it lacks "
                    f"{listed(missing)}. Leave the value out (values=…), or the rows of these classes."
                )
            for c, label in enumerate(self.classes):
                mine = rows[self.y[rows] == c]
                judged = len(np.unique(self.groups[mine[fold[mine] >= 0]]))
                parts = range(folds) if folds is not None else [0]
                learned = min(len(np.unique(self.groups[mine[fold[mine] != part]])) for part in parts)
                if judged < LEAST_TEST or learned < inner:
                    raise DataError(
                        f"{where}: class `{label}` must have at least {LEAST_TEST} {self.what} to judge and {inner} to "
                        f"learn from; it has {judged} and {learned}. Give more rows, fewer inner folds, or leave it "
                        "out (values=…)."
                    )


def _read(
    data: Any,
    text: str,
    label: str,
    group: str | None,
    across: str | None,
    values: Sequence[Any] | None,
    rows: int | None,
    split: str | None,
    seed: int,
) -> _Labelled:
    if across == label:
        raise ConfigError(
            f"`across` must be another column than the label, or each value has one class; both are `{label}`."
        )
    wanted = [name for name in (label, group, across) if name is not None]
    images: Images | None = None
    table: Any
    if isinstance(data, Images):
        images = table = data
        keys = _image_keys(data)
    else:
        table = read_texts(data, text=text, split=split, columns=list(dict.fromkeys(wanted)))
        keys = list(table.texts)
    columns = {name: _column(table, name, what) for name, what in
               zip((label, group, across), ("label", "group", "value")) if name is not None}  # fmt: skip
    kept = np.arange(len(keys))
    every = sorted(set(columns[across])) if across is not None else ["all"]
    names = every if values is None else [str(value) for value in values]
    for name in names:
        if name not in every:
            raise DataError(f"column `{across}` must hold the value `{name}`; {did_you_mean(name, every)}")
    if len(set(names)) < len(names):
        raise ConfigError(f"`values` must differ; got {names}.")
    if across is not None:
        if len(names) < 2:
            raise DataError(
                f"column `{across}` must have at least two values to transfer between; it has {listed(names)}. Check "
                "--across."
            )
        kept = np.array([i for i in kept if columns[across][i] in set(names)], np.int64)
    value = np.array([names.index(columns[across][i]) if across is not None else 0 for i in kept])
    # equal texts would be known from training
    own = [columns[group][i] if group is not None else f"{keys[i]}" for i in kept]
    if rows is not None:
        few = _few(value, own, rows, len(names), seed)
        kept, value, own = kept[few], value[few], [own[i] for i in few]
    labels = [columns[label][i] for i in kept]
    classes = sorted(set(labels))
    if len(classes) < 2:
        raise DataError(
            f"labels must be of at least two classes; all {len(labels)} rows are `{classes[0]}`. Check --label."
        )
    unique = sorted(set(own))
    number = {name: i for i, name in enumerate(unique)}
    groups = np.array([number[name] for name in own])
    shown = [keys[i] for i in kept]
    notes = []
    empty = 0 if images is not None else int(table.info["n_empty"])
    if empty:
        notes.append(f"{empty:,} rows without text were left out")
    twice = len(shown) - len(set(shown))
    if twice:
        together = "together with their group" if group is not None else "on one side of the split"
        notes.append(f"{twice:,} {'texts' if images is None else 'images'} occur before; they are kept {together}")
    about = {
        **{key: table.info[key] for key in ("kind", "name", "split", "digest") if key in table.info},
        "across": across,
        "n_rows": len(kept),
    }
    return _Labelled(
        texts=shown if images is None else [],
        images=None if images is None else images.pick(kept),
        y=np.array([classes.index(each) for each in labels]),
        classes=classes,
        values=names,
        value=value,
        groups=groups,
        keys=unique,
        together=groups if group is not None or len(unique) < len(own) else None,
        about=about,
        notes=notes,
        what="groups" if group is not None else "rows",
    )


def _image_keys(images: Images) -> list[str]:
    """The id of each image, or of the first one with the same pixels."""
    first: dict[str, str] = {}
    keys = []
    for i, name in enumerate(images.ids):
        image = images[i]
        content = hashlib.sha256(f"{image.mode} {image.size}".encode() + image.tobytes()).hexdigest()
        keys.append(first.setdefault(content, name))
    return keys


def _column(table: Any, name: str, what: str) -> list[str]:
    """A column as text; rows without a value are refused."""
    found = table.column(name)
    missing = [i for i, each in enumerate(found) if each is None or each != each or str(each).strip() == ""]
    if missing:
        raise DataError(
            f"every row must have a {what} in column `{name}`; {len(missing)} of {len(found)} have none: rows "
            f"{listed(missing, 8)}. Remove these rows."
        )
    return [str(each) for each in found]


def _few(value: np.ndarray, groups: Sequence[str], rows: int, n_values: int, seed: int) -> np.ndarray:
    """Rows of whole groups until each value has `rows`, the groups in an order computed from their names."""
    order = sorted(range(len(value)), key=lambda i: (hashed_key("rows", seed, groups[i]), i))
    counts = np.zeros(n_values, np.int64)
    kept = []
    for i in order:
        if counts[value[i]] < rows:
            counts[value[i]] += 1
            kept.append(i)
    return np.sort(np.array(kept))


# ---------------------------------------------------------------------------------------------------------- matching


def _partners(
    named: list[tuple[str, SAE]], codes: list[Any], train: np.ndarray, by: str, threshold: float | None
) -> tuple[list[list[np.ndarray]], list[dict[int, dict[str, Any]]]]:
    """``partners[i][j][l]``: latent of SAE j that stands for latent l of SAE i, -1 for none; and how near pairs are."""
    n = len(named)
    partners = [[np.arange(sae.n_latents) for _ in named] for _, sae in named]
    about: list[dict[int, dict[str, Any]]] = [{} for _ in named]
    for i in range(n):
        for j in range(i + 1, n):
            sides = (named[i][1].W_dec, named[j][1].W_dec.to(named[i][1].device))
            if by == "documents":
                sides = (_profiles(codes[i], train), _profiles(codes[j], train))
            there = match_latents(*sides)
            for a, b, matching in ((i, j, there), (j, i, there.inverse())):
                partner = matching.partner.numpy().copy()
                if threshold is not None:
                    partner[~(matching.cosine.numpy() >= threshold)] = -1
                paired = partner >= 0
                partners[a][b] = partner
                cosine = matching.cosine.numpy()[paired]
                about[a][b] = {
                    "pairs": int(paired.sum()),
                    "unmatched": int((~paired).sum()),
                    "mean_cosine": float(cosine.mean()) if len(cosine) else None,
                }
    return partners, about


def _profiles(codes: Any, train: np.ndarray) -> torch.Tensor:
    """Centred pooled codes, a row per latent: their cosine is the correlation over (a part of) the documents."""
    train = train[:: -(-len(train) // PROFILE_ROWS)]
    X = codes[train].toarray().T.astype(np.float32)
    return torch.from_numpy(X - X.mean(1, keepdims=True))


def _shuffled(partner: np.ndarray, n_other: int, seed: int, i: int, j: int) -> np.ndarray:
    """As many partners, drawn at random."""
    chosen = random_order(n_other, "partners", seed, i, j)
    result = np.full(len(partner), -1)
    paired = np.flatnonzero(partner >= 0)
    result[paired] = chosen[: len(paired)]
    return result


def _in_order(codes: Any, partner: np.ndarray) -> Any:
    """Columns of `codes` in the order of the other SAE's latents; zeros for latents without a partner."""
    import scipy.sparse

    mine = np.flatnonzero(partner >= 0)
    ones = np.ones(len(mine), codes.dtype)
    shape = (codes.shape[1], len(partner))
    return scipy.sparse.csr_matrix(codes @ scipy.sparse.csr_matrix((ones, (partner[mine], mine)), shape=shape))


# ---------------------------------------------------------------------------------------------------------- the matrix


@dataclass(frozen=True, eq=False)
class _Line:
    """An arm, and the rows that it reads: ``rows(i, j)`` of value j as the classifier of value i sees them."""

    arm: Arm
    family: str
    rows: Callable[[int, int], Any]


def _line(
    name: str,
    kind: str,
    X: Any,
    *,
    features: str = "rows",
    steps: Sequence[str] = (),
    k: int | None = None,
    source: str = "",
    pool: str = "",
    probe: str = "logistic",
    about: Mapping[str, Any] | None = None,
    family: str = "",
) -> _Line:
    from .arms import Arm

    arm = Arm(name, kind, features, probe, tuple(steps), k, source=source, pool=pool, about=dict(about or {}))
    return _Line(arm, family or arm.family, lambda i, j: X)


@dataclass(frozen=True, eq=False)
class _Problem:
    """What is trained and judged on what; `rows` of a value index the matrices of its lines."""

    across: str
    values: list[str]
    rows: list[np.ndarray]
    y: np.ndarray
    classes: list[str]
    groups: np.ndarray | None
    together: np.ndarray | None
    fold: np.ndarray
    keys: list[str]
    """Name of the group of each row."""
    about: list[dict[str, Any]]

    def judged(self, value: int) -> np.ndarray:
        """Rows of a value that judge."""
        rows = self.rows[value]
        return rows[self.fold[rows] >= 0]


@dataclass(frozen=True)
class _Identity:
    """What the result says about where it comes from."""

    settings: dict[str, Any]
    data: dict[str, Any]
    model: dict[str, Any]
    saes: list[dict[str, Any]]
    notes: list[str]


@dataclass(frozen=True)
class _How:
    folds: int | None
    test_share: float
    budget: Budget | None
    margin: float
    metric: str
    draws: int
    seed: int


@dataclass(frozen=True, eq=False)
class _Fit:
    """What the classifiers of one arm and training value said: per value the probabilities of its judged rows."""

    probabilities: list[np.ndarray]
    chosen: dict[str, Any]
    notes: list[str]


def _run(
    problem: _Problem,
    lines: Sequence[_Line],
    identity: _Identity,
    how: _How,
    out: str | os.PathLike[str] | None,
    progress: Progress | None,
) -> Transfer:
    from .arms import Budget

    budget = how.budget or Budget()
    settings = {
        **identity.settings, "test_share": how.test_share if how.folds is None else None, "folds": how.folds,
        "budget": json.loads(json.dumps(asdict(budget))), "margin": how.margin, "draws": how.draws, "seed": how.seed,
        "level": LEVEL,
    }  # fmt: skip
    metric = _verdict_metric(problem, how.metric)
    settings["metric"] = metric
    n = len(problem.values)
    bootstraps = [_bootstrap(problem, j, how) for j in range(n)]
    scores: dict[tuple[int, int, int], Scores] = {}
    fits: dict[tuple[int, int], _Fit] = {}
    learned = {name: value for name, value in settings.items() if name not in ("margin", "metric", "draws", "level")}
    rows = [problem.y, problem.fold, np.concatenate(problem.rows)]
    seen = [hashlib.sha256(np.ascontiguousarray(each, np.int64).tobytes()).hexdigest() for each in rows]
    saes = [each["digest"] for each in identity.saes]
    key = json.dumps([identity.data, identity.model, saes, learned, problem.values, problem.keys, seen, release()])
    total, done = len(lines) * n, 0
    for a, line in enumerate(lines):
        for i in range(n):
            fit = _fit(problem, line, i, budget, key, None if out is None else Path(out))
            fits[a, i] = fit
            for j in range(n):
                found = Predictions(fit.probabilities[j])
                scores[a, i, j] = score(found, bootstraps[j], ("macro_f1", "auc"))
            done += 1
            if progress is not None:
                progress("fits", done, total)
    dense = next((a for a, line in enumerate(lines) if line.arm.kind == "dense"), None)
    cells = [
        _cell(problem, lines, a, i, j, dense, scores, fits[a, i], how.margin)
        for a in range(len(lines))
        for i in range(n)
        for j in range(n)
    ]
    ways = [_way(problem, lines, a, dense, scores, cells, how.margin, metric) for a in range(len(lines))]
    return Transfer(
        saekit=release(),
        versions={**library_versions(True), "scikit-learn": _sklearn()},
        settings=settings,
        data=identity.data,
        model=identity.model,
        saes=identity.saes,
        across=problem.across,
        classes=problem.classes,
        values=[_value(problem, j, how) for j in range(n)],
        ways=ways,
        cells=cells,
        notes=[*identity.notes, *_few_judges(problem), *_why_auc(problem, how.metric, metric)],
    )


def _rarer_share(problem: _Problem) -> float:
    """Share of the rarer of two classes among all test rows; 1 for more classes."""
    if len(problem.classes) != 2:
        return 1.0
    rows = np.unique(np.concatenate([problem.judged(j) for j in range(len(problem.values))]))
    share = float(problem.y[rows].mean())
    return min(share, 1 - share)


def _verdict_metric(problem: _Problem, asked: str) -> str:
    if asked != "auto":
        return asked
    return "auc" if _rarer_share(problem) < SKEWED else "macro_f1"


def _why_auc(problem: _Problem, asked: str, metric: str) -> list[str]:
    if asked != "auto" or metric != "auc":
        return []
    return [
        f"the rarer class has {_rarer_share(problem):.0%} of the test rows: verdicts look at AUC, because macro-F1 "
        "depends on the threshold then (metric='macro_f1' to look at it all the same)"
    ]


def _few_judges(problem: _Problem) -> list[str]:
    """What there is too little of for narrow intervals."""
    few = []
    for j, name in enumerate(problem.values):
        rows = problem.judged(j)
        for c in range(len(problem.classes)):
            mine = rows[problem.y[rows] == c]
            groups = FEW_GROUPS if problem.groups is None else len(np.unique(problem.groups[mine]))
            if len(mine) < FEW_TEST or groups < FEW_GROUPS:
                few.append(name)
    names = list(dict.fromkeys(few))
    if not names:
        return []
    what = f"{FEW_TEST} test rows" if problem.groups is None else f"{FEW_TEST} test rows or {FEW_GROUPS} test groups"
    return [
        f"{len(names)} of {len(problem.values)} values have a class with fewer than {what}: intervals are rough there"
    ]


def _sklearn() -> str:
    from importlib.metadata import version

    return version("scikit-learn")


def _bootstrap(problem: _Problem, value: int, how: _How) -> PairedBootstrap:
    rows = problem.judged(value)
    groups = None if problem.groups is None else problem.groups[rows]
    # values of the same groups (translations of one text) are resampled alike, others independently
    names = json.dumps([[problem.keys[row], int(problem.y[row])] for row in rows])
    seed = hashed_key("resamples", how.seed, hashlib.sha256(names.encode()).hexdigest()) % 2**63
    folds = problem.fold[rows]
    return PairedBootstrap.over(problem.y[rows], groups=groups, folds=folds, draws=how.draws, seed=seed)


def _fit(problem: _Problem, line: _Line, value: int, budget: Budget, key: str, out: Path | None) -> _Fit:
    """Fit an arm on a value and predict the judged rows of all; from the folder when it was done before."""
    name = hashlib.sha256(
        json.dumps([key, line.arm.to_json(), line.family, problem.values[value]]).encode()
    ).hexdigest()
    path = None if out is None else out / "fits" / f"{name[:24]}.npz"
    if path is not None and path.is_file():
        found = _load(path, len(problem.values))
        if found is not None:
            return found
    fit = _fitted(problem, line, value, budget)
    if path is not None:
        stream = io.BytesIO()
        words = json.dumps({"chosen": fit.chosen, "notes": fit.notes}).encode()
        arrays = {f"p{j}": each for j, each in enumerate(fit.probabilities)}
        np.savez(stream, words=np.frombuffer(words, np.uint8), **arrays)  # type: ignore[arg-type]
        write_bytes(path, stream.getvalue())
    return fit


def _load(path: Path, n_values: int) -> _Fit | None:
    import zipfile

    try:
        with open(path, "rb") as stream:
            found = np.load(stream, allow_pickle=False)
            words = json.loads(found["words"].tobytes())
            return _Fit([found[f"p{j}"] for j in range(n_values)], words["chosen"], words["notes"])
    except (ValueError, KeyError, OSError, EOFError, zipfile.BadZipFile):
        return None  # damaged: fitted again


def _fitted(problem: _Problem, line: _Line, value: int, budget: Budget) -> _Fit:
    from .arms import fit_arm, predict_arm

    K = len(problem.classes)
    parts = sorted(set(problem.fold[problem.fold >= 0].tolist()))
    judged = [problem.judged(j) for j in range(len(problem.values))]
    probabilities = [np.zeros((len(rows), K), np.float32) for rows in judged]
    chosen: dict[str, Any] = {}
    notes: list[str] = []
    mine = problem.rows[value]
    for part in parts:
        train = mine[problem.fold[mine] != part]
        together = None if problem.together is None else problem.together[train]
        own = line.rows(value, value)
        fitted = fit_arm(line.arm, _take(own, train), problem.y[train], groups=together, budget=budget)
        for j, rows in enumerate(judged):
            here = problem.fold[rows] == part
            if here.any():
                seen = line.rows(value, j)
                probabilities[j][here] = predict_arm(fitted, _take(seen, rows[here]), K).probabilities
        if part == parts[0]:
            chosen = json.loads(json.dumps(fitted.chosen, default=float))
            notes = list(fitted.notes)
    return _Fit(probabilities, chosen, notes)


def _take(X: Any, rows: np.ndarray) -> Any:
    return [X[i] for i in rows] if isinstance(X, list) else X[rows]


def _value(problem: _Problem, j: int, how: _How) -> Value:
    rows, judged = problem.rows[j], problem.judged(j)
    first = 0 if how.folds is not None or (problem.fold[rows] == 0).any() else -1
    counts = np.bincount(problem.y[judged], minlength=len(problem.classes))
    return Value(
        name=problem.values[j],
        n_train=int((problem.fold[rows] != first).sum()),
        n_test=len(judged),
        n_groups=None if problem.groups is None else len(np.unique(problem.groups[judged])),
        classes={name: int(count) for name, count in zip(problem.classes, counts)},
        about=problem.about[j],
    )


def _cell(
    problem: _Problem,
    lines: Sequence[_Line],
    a: int,
    i: int,
    j: int,
    dense: int | None,
    scores: Mapping[tuple[int, int, int], Scores],
    fit: _Fit,
    margin: float,
) -> Cell:
    mine, native = scores[a, i, j], scores[a, j, j]
    drop = native.difference(mine)
    auc = mine.measured("auc")
    cell = Cell(
        arm=lines[a].arm.name,
        train=problem.values[i],
        test=problem.values[j],
        macro_f1=mine.measured("macro_f1"),
        auc=auc,
        drop=drop,
        drop_auc=native.difference(mine, "auc"),
        minus_dense=None if dense is None or a == dense else mine.difference(scores[dense, i, j]),
        chance=near_chance(auc),
        verdict="native" if i == j else loss(drop, margin),
        sentence="",
        chosen=fit.chosen,
        notes=fit.notes,
    )
    return replace(cell, sentence=cell_sentence(cell))


def _way(
    problem: _Problem,
    lines: Sequence[_Line],
    a: int,
    dense: int | None,
    scores: Mapping[tuple[int, int, int], Scores],
    cells: Sequence[Cell],
    margin: float,
    metric: str,
) -> Way:
    n = len(problem.values)
    diagonal = [(j, j) for j in range(n)]
    others = [(i, j) for i in range(n) for j in range(n) if i != j]

    def mean(places: list[tuple[int, int]], name: str, arm: int = a) -> Estimate:
        return _mean([scores[arm, i, j][name] for i, j in places])

    judged = others or diagonal

    def minus(name: str) -> Measured | None:
        if dense is None or a == dense:
            return None
        unit = "fraction" if name == "macro_f1" else "area"
        return mean(judged, name).minus(mean(judged, name, dense)).measured(unit, least=-1.0, most=1.0)

    mine = [cell for cell in cells if cell.arm == lines[a].arm.name and cell.train != cell.test]
    transferred = mean(others, "macro_f1") if others else None
    arm = lines[a].arm
    minus_dense, minus_dense_auc = minus("macro_f1"), minus("auc")
    decides = minus_dense_auc if metric == "auc" else minus_dense
    way = Way(
        name=arm.name,
        kind=arm.kind,
        family=lines[a].family,
        source=arm.source,
        pool=arm.pool,
        native=_measured(mean(diagonal, "macro_f1"), "fraction"),
        native_auc=_measured(mean(diagonal, "auc"), "area"),
        transferred=None if transferred is None else _measured(transferred, "fraction"),
        transferred_auc=_measured(mean(others, "auc"), "area") if others else None,
        drop=None if transferred is None else _drop(scores, a, others).measured("fraction", least=-1.0, most=1.0),
        minus_dense=minus_dense,
        minus_dense_auc=minus_dense_auc,
        against_dense=None if decides is None else verdict(decides, margin),
        n_cells=len(mine),
        n_above=sum(cell.chance == "above chance" for cell in mine),
        n_at=sum(cell.chance in ("at chance", "unknown") for cell in mine),
        n_below=sum(cell.chance == "below chance" for cell in mine),
        sentence="",
    )
    values = [_value_name(name) for name in problem.values]
    return replace(way, sentence=way_sentence(way, values, problem.across, metric))


def _value_name(name: str) -> Value:
    return Value(name, 0, 0, None, {}, {})


def _drop(scores: Mapping[tuple[int, int, int], Scores], a: int, others: list[tuple[int, int]]) -> Estimate:
    return _mean([scores[a, j, j]["macro_f1"].minus(scores[a, i, j]["macro_f1"]) for i, j in others])


def _mean(estimates: Sequence[Estimate]) -> Estimate:
    """Mean of estimates whose resamples belong together, draw by draw."""
    value = float(np.mean([each.value for each in estimates]))
    draws = [each.draws for each in estimates if each.draws is not None]
    if len(draws) < len(estimates):
        reason = next((each.reason for each in estimates if each.draws is None), None)
        return Estimate(value, None, reason or "no interval in some cell")
    shortest = min(len(each) for each in draws)
    return Estimate(value, np.mean([each[:shortest] for each in draws], axis=0))


def _measured(estimate: Estimate, unit: str) -> Measured:
    return estimate.measured(unit, least=0.0, most=1.0)
