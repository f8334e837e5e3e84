"""What a classification or a transfer will fit, checked before anything is computed."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import ConfigError, DataError, listed
from ..files import check_path, digest_bytes
from ..inputs.images import Images, read_images
from ..inputs.labelled import Labelled, check_values, read_labelled
from ..inputs.settings import Split
from ..inputs.split import INNER, Part, check_folds, draw_rows
from ..measure.intervals import LEVEL
from ..models.vision import VisionModel
from ..rows.pooling import check_pool
from .arms import Arm, Origin, arms_of, check_ranking, dense_pools
from .features import ModelLike, Named, Reader, origins_of
from .settings import ACROSS_KINDS, KINDS, POOLS, Budget, ClassifierSettings, checked_kinds

FEATURES = "features"
"""Folder of pooled features within the output folder."""

_VERSION = 5
SKEWED = 0.4
"""With two classes, of which one has a smaller fraction of the test rows, ``auto`` means AUC: macro-F1 then mostly
tells how often a weak classifier says the larger class."""

_BETWEEN_SAES = ("saes", "hooks", "matched_by", "threshold", "to_model")
"""Settings of a transfer between SAEs that its fits depend on."""
_NEED_SAE = ("random", "untrained", "frozen", "full", "binarized", "sparse", "matched", "tree", "binarized-tree")
_LOW_DATA = ("majority", "words", "last", "dense", "pca", "full", "binarized", "sparse")
"""Kinds of arms of the low-data curves (PCA and k-sparse ones at the control ks)."""


@dataclass(frozen=True, eq=False)
class Job:
    """One arm to fit on one training set."""

    arm: Arm
    value: int
    """Index of the value that it learns from."""
    n_train: int | None
    """Number of training rows, where they are fewer than all."""
    key: str
    """Digest of everything that its result depends on."""
    value_name: str = ""
    """Name of the value; empty where there is one only."""

    @property
    def name(self) -> str:
        """What lists call it."""
        rows = [] if self.n_train is None else [f"{self.n_train} rows"]
        return ", ".join([self.arm.name, *([self.value_name] if self.value_name else []), *rows])

    @property
    def file(self) -> str:
        """Name of its file."""
        return f"{re.sub('[^a-zA-Z0-9]+', '-', self.name).strip('-').lower()[:60]}-{self.key[7:19]}.safetensors"


@dataclass(frozen=True, eq=False)
class Plan:
    """What is fitted and how it is compared, with everything checked and nothing computed."""

    reader: Reader = field(repr=False)
    across: str
    values: tuple[str, ...]
    """What is trained on and tested on: values of a column, or SAEs."""
    parts: tuple[tuple[Part, ...], ...] = field(repr=False)
    """For each value its training and test rows, per fold."""
    origins: dict[str, Origin] = field(repr=False)
    jobs: tuple[Job, ...] = field(repr=False)
    split: Split
    how: ClassifierSettings
    budget: Budget
    settings: dict[str, Any]
    """What the result says about its settings."""
    out: Path | None

    @property
    def data(self) -> Labelled:
        """The labelled texts or images."""
        return self.reader.data

    @property
    def title(self) -> str:
        """What tables over several data sets call the result."""
        return self.how.name or re.sub(r"(\.[a-z]+)+$", "", str(self.data.about.get("name", "data")))

    @property
    def shuffles(self) -> int:
        """Number of label-permutation controls."""
        return int(self.settings["shuffles"])

    @property
    def rarer_fraction(self) -> float:
        """Fraction of the rarer of two classes among all test rows; 1 for more classes."""
        if len(self.data.classes) != 2:
            return 1.0
        rows = np.unique(np.concatenate([self.test(value) for value in range(len(self.values))]))
        fraction = float(self.data.y[rows].mean())
        return min(fraction, 1 - fraction)

    @property
    def metric(self) -> str:
        """What verdicts look at: ``macro_f1`` or ``auc``."""
        if self.how.metric != "auto":
            return self.how.metric
        return "auc" if self.rarer_fraction < SKEWED else "macro_f1"

    @property
    def chosen_by(self) -> str:
        """What the inner folds choose by: the metric of the verdicts; macro-F1 for more than two classes."""
        return self.metric if len(self.data.classes) == 2 else "macro_f1"

    def test(self, value: int) -> np.ndarray:
        """Return the test rows of a value, fold after fold."""
        return np.concatenate([test for _, test in self.parts[value]])

    def train_rows(self, job: Job) -> list[np.ndarray]:
        """Return the training rows of a job, per fold."""
        trains = [train for train, _ in self.parts[job.value]]
        return (
            trains if job.n_train is None else [few_rows(self.data, each, job.n_train, self.split) for each in trains]
        )


def few_rows(data: Labelled, train: np.ndarray, n: int, split: Split) -> np.ndarray:
    """Return `n` of the training rows."""
    keys = [data.keys[row] for row in train]
    return train[draw_rows(keys, data.y[train], n, is_grouped=data.groups is not None, seed=split.seed)]


def plan_classification(
    saes: Named,
    *,
    model: ModelLike,
    data: Any,
    across: str | None = None,
    split: Split = Split(),
    settings: ClassifierSettings = ClassifierSettings(),
    out: str | os.PathLike[str] | None = None,
) -> Plan:
    """Return what `classify` (or `transfer`, between the values of a column) will do.

    Parameters
    ----------
    saes
        SAEs with their names.
    model, data, across, split, settings, out
        See `saekit.transfer`.

    Raises
    ------
    ConfigError
        An unknown arm or pooling, a setting out of range, SAEs that do not say where they belong.
    DataError
        See `read_labelled`; a class that cannot fill the inner folds.
    """
    how, named = settings, list(saes)
    default = tuple(KINDS) if across is None else ACROSS_KINDS
    pools = checked_pools(how, POOLS if across is None else POOLS[:1])
    is_images = isinstance(data, Images) or isinstance(model, VisionModel)
    _check_possible(how, split, is_images)
    kinds = kinds_of(how, default, is_images, bool(named))
    origins = origins_of(named, kinds, split.seed, layer=how.layer, hook=how.hook)
    check_ranking(how.select_by, list(origins.values()))
    if is_images and not isinstance(data, Images):
        data = read_images(data, split=split.hub_split)
    labelled = read_labelled(data, across=across, split=split)
    if across is not None:
        check_values(labelled, how.budget.inner)
    check_inner(labelled, how.budget, *(train for train, _ in labelled.parts))
    said = {
        "split": "given" if split.split_column else "nested" if split.folds else "drawn", "arms": list(kinds),
        "pools": list(pools), "dense_pools": list(dense_pools(pools)), "ks": list(how.ks),
        "search_pools": list(how.search_pools), "probes": list(how.probes),
        "control_ks": list(how.control_ks), "select_by": how.select_by, "train_sizes": list(how.train_sizes),
    }  # fmt: skip
    without = "words" if is_images else "pixels"
    arms = [arm for arm in arms_of(list(origins.values()), kinds, pools, how) if arm.base_kind != without]
    reader = reader_of(model, labelled, how, out)
    return make_plan(reader, arms, origins, split=split, how=how, said=said, across=across, out=out)


def _check_possible(how: ClassifierSettings, split: Split, is_images: bool) -> None:
    """Refuse settings that contradict each other or the data."""
    if split.folds is not None and how.train_sizes:
        raise ConfigError("classify: low-data curves (train_sizes) need one locked test set; leave out `folds`.")
    if how.prompt is not None and not is_images:
        raise ConfigError("`prompt` is what a vision-language model reads beside an image; these are texts.")


def reader_of(model: ModelLike, data: Labelled, how: ClassifierSettings, out: str | os.PathLike[str] | None) -> Reader:
    """Return the model with its data, and the folder of its features."""
    shared = check_path(how.cache) if how.cache is not None else None if out is None else check_path(out) / FEATURES
    return Reader(model, data, how.max_tokens, how.prompt, shared)


def seeded(budget: Budget, split: Split) -> Budget:
    """Return the budget with the seed of the split where it has none."""
    return replace(budget, seed=split.seed) if budget.seed is None else budget


def make_plan(
    reader: Reader,
    arms: Sequence[Arm],
    origins: dict[str, Origin],
    *,
    split: Split,
    how: ClassifierSettings,
    said: dict[str, Any],
    across: str | None,
    out: str | os.PathLike[str] | None,
) -> Plan:
    """Return a plan of these arms between the values of the data (SAEs where ``said["values"]`` names them)."""
    data, budget = reader.data, seeded(how.budget, split)
    values, parts = _values_of(data, said.get("values"))
    shuffles = how.shuffles if how.shuffles is not None else int(len(values) == 1)
    settings = {
        **_told(split, how, budget), "across": across, "values": list(values), "shuffles": shuffles,
        "hooks": list(dict.fromkeys(origin.hook for origin in origins.values())), **said,
    }  # fmt: skip
    common = [
        _VERSION, reader.facts["digest"], data.digest(), asdict(budget), shuffles, how.max_tokens, how.prompt,
        split.seed, values, how.metric,
        [said.get(name) for name in _BETWEEN_SAES],
    ]  # fmt: skip
    for size in how.train_sizes if len(values) == 1 else ():
        _check_size(data, size, budget, split)
    jobs = [
        _job(arm, value, size, [origins.get(arm.source), *common], values)
        for arm, size in _sized(arms, how, len(values) == 1)
        for value in range(len(values))
    ]
    return Plan(
        reader, across or "data", values, parts, origins, tuple(jobs), split, how, budget, settings,
        None if out is None else check_path(out),
    )  # fmt: skip


def _values_of(data: Labelled, saes: Sequence[str] | None) -> tuple[tuple[str, ...], tuple[tuple[Part, ...], ...]]:
    """Return what is trained and tested on, with the rows of each; SAEs read the same rows."""
    if saes is not None:
        return tuple(saes), (data.parts_of(0),) * len(saes)
    return data.values, tuple(data.parts_of(value) for value in range(len(data.values)))


def _sized(arms: Sequence[Arm], how: ClassifierSettings, is_single: bool) -> list[tuple[Arm, int | None]]:
    """Return the arms, and those of the low-data curves with each number of training rows."""
    few = [arm for arm in arms if arm.kind in _LOW_DATA and (arm.k is None or arm.k in how.control_ks)]
    curves = [(arm, size) for size in how.train_sizes for arm in few] if is_single else []
    return [*((arm, None) for arm in arms), *curves]


def _told(split: Split, how: ClassifierSettings, budget: Budget) -> dict[str, Any]:
    """Return what a result says about how its rows were split, fitted and compared."""
    is_nested = split.folds is not None
    return {
        "text": split.text, "label": split.label, "group": split.group, "folds": split.folds,
        "test_share": None if is_nested else split.test_share,
        **{name: getattr(split, name) for name in ("max_rows", "train_rows", "test_rows", "min_rows", "seed")},
        "budget": json.loads(json.dumps(asdict(budget))), "margin": how.margin, "metric": how.metric,
        "max_tokens": how.max_tokens, **({} if how.prompt is None else {"prompt": how.prompt}),
        "level": LEVEL, "p_values": "corrected t over folds" if is_nested else "paired jackknife",
        "intervals": {
            "level": LEVEL, "unit": "rows" if split.group is None else "groups",
            "method": "jackknife of the test set, paired between arms, nothing refitted" if how.intervals else "none",
        },
    }  # fmt: skip


def _job(arm: Arm, value: int, size: int | None, rest: list[Any], values: Sequence[str]) -> Job:
    origin, *common = rest
    where = None if origin is None else [origin.recipe, origin.hook]
    recipe = json.dumps([arm.to_json(), value, size, where, *common], sort_keys=True, default=str)
    return Job(arm, value, size, digest_bytes(recipe.encode()), values[value] if len(values) > 1 else "")


def kinds_of(
    how: ClassifierSettings, default: Sequence[str], is_images: bool, has_sae: bool, known: Sequence[str] = tuple(KINDS)
) -> tuple[str, ...]:
    """Return the kinds of arms that are asked for; those that the data cannot have are refused or, unasked, left out.

    Raises
    ------
    ConfigError
        An arm that needs an SAE, texts or images where there are none.
    """
    lacking = dict.fromkeys(() if has_sae else _NEED_SAE, "an SAE")
    lacking |= {"words": "texts", "last": "texts"} if is_images else {"pixels": "images"}
    if how.arms is None:
        return tuple(kind for kind in KINDS if kind in default and kind not in lacking)
    for kind in how.arms:
        if kind in lacking and kind in known:
            what = lacking[kind]
            raise ConfigError(f"the arm `{kind}` needs {what}; there is none. Leave it out, or give {what}.")
    return checked_kinds(how.arms, known)


def checked_pools(how: ClassifierSettings, default: tuple[str, ...]) -> tuple[str, ...]:
    """Return the poolings that are asked for; unknown ones are refused."""
    for pool in how.pools or ():
        check_pool(pool)
    for pool in how.search_pools:
        for part in pool.split("+"):
            check_pool(part, dense=True)
    return how.pools or default


def check_inner(data: Labelled, budget: Budget, *trains: np.ndarray) -> None:
    """Refuse training rows that cannot fill the inner folds; see `check_folds`."""
    for train in trains:
        together = None if data.together is None else data.together[train]
        check_folds(data.y[train], together, budget.inner, INNER.format(budget.inner), data.classes)


def _check_size(data: Labelled, size: int, budget: Budget, split: Split) -> None:
    """Refuse a number of training rows that leaves a class too few for the inner folds."""
    train = data.parts[0][0]
    if size >= len(train):
        raise ConfigError(
            f"classify: `train_sizes` must be smaller than the training set of {len(train)} rows; got {size}."
        )
    rows = few_rows(data, train, size, split)
    try:
        check_inner(data, budget, rows)
    except DataError as error:
        raise ConfigError(f"classify: `train_sizes` of {size} rows are too few: {error}") from None
    missing = sorted(set(data.classes) - {data.classes[c] for c in data.y[rows]})
    if missing:
        raise ConfigError(f"classify: `train_sizes` of {size} rows hold no row of {listed(missing)}; use more.")
