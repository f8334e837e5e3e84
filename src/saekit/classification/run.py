"""Classify texts by SAE features, beside everything that they must beat.

Texts are read and split once; one pass of the model serves every SAE, layer and pooling; every arm is a *cell* that is
fitted for itself, and kept in a file of its own where a folder is given: a run that was cut off goes on where it was.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..errors import ConfigError, DataError, FormatError, did_you_mean, listed
from ..files import digest_bytes, write_bytes
from ..measure.bootstrap import LEVEL
from ..measure.controls import untrained_like
from ..measure.paired_scores import (
    DRAWS,
    MARGIN,
    PairedBootstrap,
    Predictions,
    Scores,
    chance_interval,
    corrected_t,
    holm,
    score,
    verdict,
)
from ..measure.results import Measured
from ..models.deferred import defer_model
from ..models.language import LanguageModel
from ..models.loading import load_language_model
from ..provenance import library_versions, place_of, release
from ..rows.capture import capture
from ..rows.pooling import DENSE_POOLS, Ask, check_pool, pool_texts
from ..rows.tokens import tokenize
from ..sae.model import SAE
from ..sae.naming import named_saes
from ..sae.rules import TopKRule
from .arms import CONTROL_KS, KINDS, KS, Arm, Budget, Fitted, check_folds, fit_arm, predict_arm
from .labelled import TEST_SPLIT, Labelled, draw_rows, read_labelled
from .result import ArmScore, Classification, LowData

POOLS = ("sum", "max")
"""Poolings of the codes by default."""

SAMPLE_TOKENS = 4096
"""Tokens of training texts that the random and untrained dictionaries are centred on."""

CELLS = "cells"
"""Folder of the cells within the output folder."""

FEATURES = "features"
"""Folder of pooled features within the output folder."""

SPREAD_LEVEL = 0.05
"""Level of the warning that shuffled labels were not at chance, after Holm's correction."""

_CELL_VERSION = 1

Progress = Callable[..., None]
"""Called as ``progress(stage, done, total, note)``."""


@dataclass(frozen=True, eq=False)
class _Origin:
    """Where a matrix comes from: hidden states, an SAE, or a dictionary made as its control."""

    name: str
    kind: str  # dense, sae, frozen, random, untrained
    hook: str
    sae: SAE | None
    recipe: str
    about: dict[str, Any]


@dataclass(frozen=True, eq=False)
class Cell:
    """One arm on one training set: what a grid is made of.

    Parameters
    ----------
    arm
        What is fitted.
    n_train
        Training rows, where they are fewer than all; None for all.
    key
        Digest of everything that its result depends on.
    """

    arm: Arm
    n_train: int | None
    key: str

    @property
    def name(self) -> str:
        """What lists call it."""
        return self.arm.name if self.n_train is None else f"{self.arm.name}, {self.n_train} rows"

    @property
    def file(self) -> str:
        """Name of its file."""
        return f"{re.sub('[^a-zA-Z0-9]+', '-', self.name).strip('-').lower()[:60]}-{self.key[7:19]}.safetensors"


@dataclass(frozen=True, eq=False)
class Plan:
    """A classification with everything checked and nothing computed.

    Examples
    --------
    ::

        plan = plan_classification("builtin", saes, "reviews.csv", label="stars", out="out")
        [cell.name for cell in plan.missing()]
        result = plan.run()
    """

    name: str
    model: Any
    data: Labelled
    origins: dict[str, _Origin] = field(repr=False)
    cells: tuple[Cell, ...] = field(repr=False)
    budget: Budget
    settings: dict[str, Any]
    out: Path | None
    cache: Path | None

    def missing(self) -> list[Cell]:
        """Cells that have no file yet; all of them without a folder."""
        return [cell for cell in self.cells if _read_cell(self, cell) is None]

    def run(self, progress: Progress | None = None) -> Classification:
        """Compute what is missing, and judge the arms.

        Raises
        ------
        DataError
            Texts without tokens, activations that are NaN, folds that a class cannot fill.
        """
        return _run(self, progress or _silent)

    def difference(self, first: str, second: str, metric: str = "macro_f1") -> Measured:
        """One arm minus another on the same test rows, over the same resamples; both must have been computed.

        Raises
        ------
        ConfigError
            There is no such arm, or its cell has no file yet.
        """
        found = []
        for name in (first, second):
            cell = next((cell for cell in self.cells if cell.name == name), None)
            if cell is None:
                names = [cell.name for cell in self.cells]
                raise ConfigError(f"there is no arm `{name}` in this plan. {did_you_mean(name, names)}")
            computed = _read_cell(self, cell)
            if computed is None:
                raise ConfigError(f"`{name}` has not been computed in this folder; run the plan first.")
            found.append(score(Predictions(computed.probabilities), _bootstrap(self), (metric,)))
        return found[0].difference(found[1], metric)


def classify(
    model: str | os.PathLike[str] | LanguageModel,
    saes: SAE | str | os.PathLike[str] | Sequence[SAE | str | os.PathLike[str]],
    data: Any,
    *,
    progress: Progress | None = None,
    **settings: Any,
) -> Classification:
    """Classify texts by SAE features, beside the arms that they must beat; parameters as `plan_classification`.

    Examples
    --------
    ::

        result = sk.classify("builtin", saes, "banking77.csv", label="label", split_column="split")
        result                                  # a table in a notebook
        result.arm(result.best_sae).difference  # to the best dense arm

    Raises
    ------
    ConfigError, DataError, ShapeError, ModelError
        See `plan_classification` and `Plan.run`.
    """
    return plan_classification(model, saes, data, **settings).run(progress)


def plan_classification(
    model: str | os.PathLike[str] | LanguageModel,
    saes: SAE | str | os.PathLike[str] | Sequence[SAE | str | os.PathLike[str]],
    data: Any,
    *,
    text: str = "text",
    label: str = "label",
    group: str | None = None,
    split_column: str | None = None,
    test_split: str = TEST_SPLIT,
    test_share: float = 0.25,
    folds: int | None = None,
    limit: int | None = None,
    train_rows: int | None = None,
    test_rows: int | None = None,
    min_rows: int | None = None,
    train_sizes: Sequence[int] = (),
    layer: int | None = None,
    hook: str | None = None,
    pools: Sequence[str] = POOLS,
    arms: Sequence[str] | None = None,
    ks: Sequence[int] = KS,
    control_ks: Sequence[int] = CONTROL_KS,
    select_by: str = "mean_difference",
    budget: Budget | Mapping[str, Any] | None = None,
    margin: float = MARGIN,
    draws: int = DRAWS,
    shuffles: int = 1,
    max_tokens: int | None = None,
    seed: int = 0,
    name: str | None = None,
    out: str | os.PathLike[str] | None = None,
    cache: str | os.PathLike[str] | None = None,
) -> Plan:
    """Everything that `classify` will do, checked before anything is computed.

    Parameters
    ----------
    model, saes
        The language model, and SAEs of its hooks: values, or paths that `SAE.load` takes. SAEs whose provenance says
        that their decoder or encoder was frozen become controls.
    data, text, label, group, split_column, test_split, test_share, folds, limit, train_rows, test_rows, min_rows
        See `read_labelled`.
    train_sizes
        Numbers of training rows for the low-data curves.
    layer, hook
        Where SAEs belong that do not say so themselves.
    pools
        Poolings over the tokens of a text; see `saekit.rows.pooling.POOLS`.
    arms
        Kinds of arms, names in `KINDS`; None: all.
    ks, control_ks
        Numbers of latents (and of principal components, of the dense states under the first of `pools`); of the
        costlier controls.
    select_by
        How latents are ranked: by the labels of the training rows, as `SelectLatents` does; or by numbers that are
        stored with every SAE (``"stability"``, ``"energy"``, …). Controls that have none are ranked by mean difference.
    budget
        What every arm may spend on its settings.
    margin
        Differences of macro-F1 smaller than this count as none.
    draws
        Resamples of the test rows behind every interval.
    shuffles
        How often each arm is fitted to permuted labels, judged by permuted labels; 0 for no such control.
    max_tokens
        Read this many tokens of a text at most.
    seed
        Of splits, folds, shuffles, random dictionaries and resamples.
    name
        What tables over several data sets call this result; by default the name of the data.
    out
        Folder for cells and features; what is there is not computed again.
    cache
        Another folder for features, which several classifications can share; by default ``features`` in `out`.

    Raises
    ------
    ConfigError
        An unknown arm or pooling, a setting out of range, SAEs that do not say where they belong.
    DataError
        See `read_labelled`; a class that cannot fill the inner folds.
    """
    given = budget if isinstance(budget, Budget) else Budget(**{"seed": seed, **_known_budget(budget or {})})
    kinds = _kinds(arms)
    ks, control_ks = _whole("ks", ks), _whole("control_ks", control_ks)
    sizes = _whole("train_sizes", train_sizes) if train_sizes else ()
    for pool in pools:
        check_pool(pool)
    pools = tuple(dict.fromkeys(pools))
    if not pools:
        raise ConfigError("classify: `pools` must name at least one pooling; got none.")
    for setting, value in (("draws", draws), ("shuffles", shuffles)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 0:
            raise ConfigError(f"classify: `{setting}` must be a whole number from 0; got {value!r}.")
    if folds is not None and sizes:
        raise ConfigError("classify: low-data curves (train_sizes) need one locked test set; leave out `folds`.")
    verdict(Measured(0.0), margin)
    named = named_saes(saes, "classify")
    origins = _origins(named, layer, hook, kinds, seed)
    _check_ranking(select_by, origins)
    labelled = read_labelled(
        data, text=text, label=label, group=group, split_column=split_column, test_split=test_split,
        test_share=test_share, folds=folds, limit=limit, train_rows=train_rows, test_rows=test_rows, min_rows=min_rows,
        seed=seed,
    )  # fmt: skip
    for train, _ in labelled.parts:
        groups = None if labelled.groups is None else labelled.groups[train]
        check_folds(labelled.y[train], groups, given.inner, "inner", labelled.classes)
    wanted = _arms(origins, kinds, pools, ks, control_ks, select_by)
    digest = defer_model(model).digest
    common = [_CELL_VERSION, digest, labelled.digest(), asdict(given), shuffles, max_tokens, seed]
    cells = [_cell(arm, None, origins, common) for arm in wanted]
    for size in sizes:
        if size >= len(labelled.parts[0][0]):
            raise ConfigError(
                f"classify: `train_sizes` must be smaller than the training set of {len(labelled.parts[0][0])} rows; "
                f"got {size}."
            )
        _check_size(labelled, size, given, seed)
        cells += [_cell(arm, size, origins, common) for arm in wanted if _has_low_data(arm, control_ks)]
    settings: dict[str, Any] = {
        "split": "given" if split_column else "nested" if folds else "drawn", "test_share": test_share, "folds": folds,
        "pools": list(pools), "arms": kinds, "ks": list(ks), "control_ks": list(control_ks), "select_by": select_by,
        "budget": {key: list(v) if isinstance(v, tuple) else v for key, v in asdict(given).items()},
        "margin": margin, "shuffles": shuffles, "train_sizes": list(sizes), "max_tokens": max_tokens, "seed": seed,
        "limit": limit, "train_rows": train_rows, "test_rows": test_rows, "min_rows": min_rows,
        "p_values": "corrected t over folds" if folds else "paired bootstrap",
        "intervals": {
            "level": LEVEL, "draws": draws, "unit": "rows" if group is None else "groups",
            "method": "basic bootstrap of the test set, stratified by class, paired between arms; nothing is refitted",
        },
    }  # fmt: skip
    title = name or re.sub(r"(\.[a-z]+)+$", "", str(labelled.about.get("name", "data")))
    folder = None if out is None else Path(out)
    shared = Path(cache) if cache is not None else None if folder is None else folder / FEATURES
    return Plan(title, model, labelled, origins, tuple(cells), given, settings, folder, shared)


def _check_ranking(by: str, origins: Mapping[str, _Origin]) -> None:
    from ..estimators.select import SCORES

    if by in SCORES:
        return
    for origin in origins.values():
        stored = list(origin.sae.scores) if origin.sae is not None else []
        if origin.kind == "sae" and by not in stored:
            there = f"are stored {listed(stored, 12)}" if stored else "none are stored"
            raise ConfigError(
                f"classify: `select_by` must be one of {listed(SCORES, 12)}, or numbers stored with every SAE; got "
                f"`{by}`, and with `{origin.name}` {there}. "
                f"{did_you_mean(by, [*SCORES, *stored])}"
            )


def _ranking(by: str, origin: _Origin) -> dict[str, Any]:
    """How the latents of an origin are ranked: by name, and by what is stored with its SAE."""
    from ..estimators.select import SCORES

    if by in SCORES:
        return {"by": by}
    if origin.sae is None or origin.kind not in ("sae", "frozen") or by not in origin.sae.scores:
        return {"by": "mean_difference"}
    stored = origin.sae.scores[by].double().cpu().numpy()
    lowest = np.nanmin(stored, initial=0.0) - 1  # latents without a number, dead ones, come last
    return {"by": by, "scores": tuple(np.where(np.isfinite(stored), stored, lowest).tolist())}


_LOW_DATA = ("majority", "words", "last", "dense", "pca", "full", "binarized", "sparse")
"""Kinds of arms of the low-data curves (PCA and k-sparse ones at the control ks)."""


def _has_low_data(arm: Arm, control_ks: Sequence[int]) -> bool:
    return arm.kind in _LOW_DATA and (arm.k is None or arm.k in control_ks)


def _check_size(data: Labelled, size: int, budget: Budget, seed: int) -> None:
    """Refuse a number of training rows that leaves a class too few for the inner folds."""
    train = data.parts[0][0]
    groups = None if data.groups is None else data.groups[train]
    rows = draw_rows(train, size, data.y[train], groups, seed)
    try:
        check_folds(
            data.y[rows], None if data.groups is None else data.groups[rows], budget.inner, "inner", data.classes
        )
        missing = sorted(set(data.classes) - {data.classes[c] for c in data.y[rows]})
    except DataError as error:
        raise ConfigError(f"classify: `train_sizes` of {size} rows are too few: {error}") from None
    if missing:
        raise ConfigError(f"classify: `train_sizes` of {size} rows hold no row of {listed(missing)}; use more.")


def _silent(*_: Any, **__: Any) -> None:
    """No progress."""


def _known_budget(given: Mapping[str, Any]) -> dict[str, Any]:
    known = list(Budget.__dataclass_fields__)
    for key in given:
        if key not in known:
            raise ConfigError(f"classify: `budget` has no setting `{key}`. {did_you_mean(key, known)}")
    return dict(given)


def _kinds(arms: Sequence[str] | None) -> list[str]:
    if arms is None:
        return list(KINDS)
    for arm in arms:
        if arm not in KINDS:
            raise ConfigError(f"classify: `arms` must name kinds of arms; got `{arm}`. {did_you_mean(arm, KINDS)}")
    if not arms:
        raise ConfigError("classify: `arms` must name at least one kind; got none.")
    return [kind for kind in KINDS if kind in arms]


def _whole(name: str, values: Sequence[int]) -> tuple[int, ...]:
    values = tuple(values)
    if not values or any(isinstance(v, bool) or not isinstance(v, int) or v < 1 for v in values):
        raise ConfigError(f"classify: `{name}` must be whole numbers from 1; got {list(values)}.")
    return tuple(sorted(set(values)))


# -------------------------------------------------------------------------------------------------- sources and arms


def _origins(
    named: Sequence[tuple[str, SAE]], layer: int | None, hook: str | None, kinds: Sequence[str], seed: int
) -> dict[str, _Origin]:
    """Hidden states of every hook, the SAEs, and their random and untrained twins."""
    places = {name: place_of(sae, layer=layer, hook=hook, where="classify", name=f"`{name}`") for name, sae in named}
    hooks = list(dict.fromkeys(places.values()))
    single = len(named) == 1
    found: dict[str, _Origin] = {}
    for place in hooks:
        dense = "dense" if len(hooks) == 1 else f"dense {place}"
        found[dense] = _Origin(dense, "dense", place, None, "states", {"hook": place})
    for name, sae in named:
        place, digest = places[name], sae.digest()
        config = sae.provenance.get("config")
        control = str((config if isinstance(config, dict) else {}).get("control") or "")
        about = {"hook": place, "n_latents": sae.n_latents, "rule": sae.rule.name, "sae": name}
        kind = "frozen" if control.startswith("frozen") else "sae"
        if kind == "frozen" and "frozen" not in kinds:
            continue
        found[name] = _Origin(name, kind, place, sae, digest, {**about, **({"control": control} if control else {})})
        if kind == "frozen":
            continue
        for twin in ("random", "untrained"):
            if twin in kinds:
                label = twin if single else f"{twin} {name}"
                found[label] = _Origin(label, twin, place, sae, f"{twin} {digest} {seed}", about)
    if not any(origin.kind == "sae" for origin in found.values()):
        raise ConfigError("classify: at least one SAE that is no control must be given; got none.")
    return found


def dense_pools(pools: Sequence[str]) -> tuple[str, ...]:
    """Poolings of the hidden states that stand beside poolings of codes; counts have the mean beside them."""
    return tuple(dict.fromkeys(pool if pool in DENSE_POOLS else "mean" for pool in pools))


def _arms(
    origins: Mapping[str, _Origin],
    kinds: Sequence[str],
    pools: Sequence[str],
    ks: Sequence[int],
    control_ks: Sequence[int],
    by: str,
) -> list[Arm]:
    """All arms, in the order of tables."""
    arms: list[Arm] = []

    def add(kind: str, name: str, **settings: Any) -> None:
        if kind in kinds:
            arms.append(Arm(name, kind, **settings))

    add("majority", "majority", features="texts", probe="majority")
    add("words", "TF-IDF", features="texts", steps=("words",))
    for origin in origins.values():
        if origin.kind == "dense":
            _dense_arms(add, origin, pools, ks, control_ks)
    for origin in origins.values():
        if origin.kind in ("random", "untrained", "frozen"):
            for pool in pools:
                here = _at(origin, pool)
                add(origin.kind, f"{origin.name} {pool}", **here)
                for k in control_ks:
                    add(
                        origin.kind,
                        f"{origin.name} {pool} k={k}",
                        **here,
                        steps=("select",),
                        k=k,
                        **_ranking(by, origin),
                    )
    many = sum(origin.kind == "sae" for origin in origins.values()) > 1
    for origin in origins.values():
        if origin.kind != "sae":
            continue
        label = origin.name if many else "SAE"
        for pool in pools:
            here, name = _at(origin, pool), f"{label} {pool}"
            sparse = [k for k in ks if k < (origin.sae.n_latents if origin.sae is not None else 0)]
            for k in (k for k in control_ks if k in sparse):
                add("matched", f"{name} matched k={k}", **here, steps=("match",), k=k, **_ranking(by, origin))
            for k in sparse:
                add("sparse", f"{name} k={k}", **here, steps=("select",), k=k, **_ranking(by, origin))
            add("tree", f"{name} tree", **here, probe="tree")
            add("binarized-tree", f"{name} binarized tree", **here, steps=("binarize",), probe="tree")
            add("binarized", f"{name} binarized", **here, steps=("binarize",))
            add("full", f"{name}", **here)
    return arms


def _at(origin: _Origin, pool: str) -> dict[str, Any]:
    return {"features": f"{origin.name}|{pool}", "source": origin.name, "pool": pool, "about": origin.about}


def _dense_arms(
    add: Callable[..., None], origin: _Origin, pools: Sequence[str], ks: Sequence[int], control_ks: Sequence[int]
) -> None:
    twins = dense_pools(pools)
    if "last" not in twins:
        add("last", f"{origin.name} last", **_at(origin, "last"))
    for pool in twins:
        here = _at(origin, pool)
        add("last" if pool == "last" else "dense", f"{origin.name} {pool}", **here)
        add("dense-tree", f"{origin.name} {pool} tree", **here, probe="tree")
        add("difference", f"{origin.name} {pool} class means", **here, steps=("means",))
    here = _at(origin, twins[0])  # one pooling for the reduced arms: the first
    for k in ks:
        add("pca", f"{origin.name} {twins[0]} PCA {k}", **here, steps=("pca",), k=k)
    for k in control_ks:
        add("svd", f"{origin.name} {twins[0]} SVD {k}", **here, steps=("svd",), k=k)
        add("ica", f"{origin.name} {twins[0]} ICA {k}", **here, steps=("ica",), k=k)


def _cell(arm: Arm, size: int | None, origins: Mapping[str, _Origin], common: Sequence[Any]) -> Cell:
    origin = origins.get(arm.source)
    recipe = [arm.to_json(), size, None if origin is None else [origin.recipe, origin.hook], *common]
    return Cell(arm, size, digest_bytes(json.dumps(recipe, sort_keys=True, default=str).encode()))


# ---------------------------------------------------------------------------------------------------------- the cells


@dataclass(frozen=True, eq=False)
class _Computed:
    """What a cell holds: predictions of the test rows, and what is to be told about the fit."""

    probabilities: np.ndarray
    shuffled: np.ndarray
    facts: dict[str, Any]


def _read_cell(plan: Plan, cell: Cell) -> _Computed | None:
    if plan.out is None:
        return None
    path = plan.out / CELLS / cell.file
    if not path.is_file():
        return None
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "numpy") as file:
            about = json.loads(file.metadata()["cell"])
            tensors = {name: file.get_tensor(name) for name in ("probabilities", "shuffled")}
    except (SafetensorError, KeyError, TypeError, json.JSONDecodeError) as error:
        raise FormatError(f"`{path}` must be a cell of `saekit classify`; {error}. Delete it, and run again.") from None
    if about.get("key") != cell.key:
        return None
    return _Computed(tensors["probabilities"], tensors["shuffled"], about["facts"])


def _write_cell(plan: Plan, cell: Cell, computed: _Computed) -> None:
    if plan.out is None:
        return
    from safetensors.numpy import save

    about = json.dumps({"key": cell.key, "name": cell.name, "facts": computed.facts}, allow_nan=False)
    tensors = {"probabilities": computed.probabilities, "shuffled": computed.shuffled}
    write_bytes(plan.out / CELLS / cell.file, save(tensors, metadata={"cell": about}))


def shuffled_labels(data: Labelled, seed: int) -> np.ndarray:
    """Class codes permuted within training and test rows: what no feature can know.

    Labels of test rows are permuted as well: with true ones, a classifier that learned noise along a direction that
    matters would be off chance by luck in either direction, more than the test rows can tell.
    """
    generator = np.random.Generator(np.random.PCG64([seed, 29]))
    y = data.y.copy()
    blocks = [data.parts[0][0], data.parts[0][1]] if len(data.parts) == 1 else [test for _, test in data.parts]
    for rows in blocks:
        y[rows] = generator.permutation(y[rows])
    return y


def _compute(plan: Plan, cell: Cell, X: Any) -> _Computed:
    """Fit one cell: on every part, then on permuted labels with the settings that were chosen."""
    data, n_classes = plan.data, len(plan.data.classes)
    fits: list[Fitted] = []
    probabilities = []
    parts = [(_train_rows(plan, cell, train), test) for train, test in data.parts]
    for train, test in parts:
        groups = None if data.groups is None else data.groups[train]
        fits.append(fit_arm(cell.arm, _rows(X, train), data.y[train], groups=groups, budget=plan.budget))
        probabilities.append(predict_arm(fits[-1], _rows(X, test), n_classes).probabilities)
    shuffled = []
    for shuffle in range(plan.settings["shuffles"] if cell.n_train is None else 0):
        y = shuffled_labels(data, plan.settings["seed"] + shuffle)
        guesses = []
        for (train, test), fitted in zip(parts, fits):
            noise = fit_arm(cell.arm, _rows(X, train), y[train], budget=plan.budget, chosen=fitted.chosen)
            guesses.append(predict_arm(noise, _rows(X, test), n_classes).probabilities)
        shuffled.append(np.concatenate(guesses))
    inner = [fitted.inner_score for fitted in fits]
    stability = [fitted.stability for fitted in fits if fitted.stability is not None]
    facts = {
        "chosen": [fitted.chosen for fitted in fits],
        "inner": None if any(math.isnan(each) for each in inner) else float(np.mean(inner)),
        "selected": list(fits[0].selected or ()),
        "stability": {k: float(np.mean([each[k] for each in stability])) for k in stability[0]} if stability else None,
        "converged": all(fitted.converged for fitted in fits),
        "notes": list(dict.fromkeys(note for fitted in fits for note in fitted.notes)),
        "seconds": round(sum(fitted.seconds for fitted in fits), 2),
    }
    empty = np.zeros((0, len(data.test), n_classes), np.float32)
    return _Computed(np.concatenate(probabilities), np.stack(shuffled) if shuffled else empty, facts)


def _train_rows(plan: Plan, cell: Cell, train: np.ndarray) -> np.ndarray:
    if cell.n_train is None:
        return train
    data = plan.data
    groups = None if data.groups is None else data.groups[train]
    return np.sort(draw_rows(train, cell.n_train, data.y[train], groups, plan.settings["seed"]))


def _rows(X: Any, rows: np.ndarray) -> Any:
    return [X[row] for row in rows] if isinstance(X, tuple | list) else X[rows]


def _run(plan: Plan, progress: Progress) -> Classification:
    found = {cell.key: _read_cell(plan, cell) for cell in plan.cells}
    missing = [cell for cell in plan.cells if found[cell.key] is None]
    if missing:
        X = _features(plan, [cell.arm for cell in missing], progress)
        for place, cell in enumerate(missing):
            progress("arms", place, len(missing), cell.name)
            computed = _compute(plan, cell, X[cell.arm.features])
            _write_cell(plan, cell, computed)
            found[cell.key] = computed
        progress("arms", len(missing), len(missing), "")
    return _judge(plan, {key: each for key, each in found.items() if each is not None}, progress)


def _features(plan: Plan, arms: Sequence[Arm], progress: Progress) -> dict[str, Any]:
    """Every matrix that the arms read, from one pass over the texts."""
    wanted: dict[str, list[str]] = {}
    for arm in arms:
        if arm.source and arm.pool not in wanted.setdefault(arm.source, []):
            wanted[arm.source].append(arm.pool)
    X: dict[str, Any] = {"texts": plan.data.texts}
    if not wanted:
        return X
    lm = load_language_model(plan.model)
    _check_tokens(lm, plan.data.texts)
    asks = {
        name: Ask(tuple(pools), sae=_twin(plan, plan.origins[name], lm), hook=plan.origins[name].hook)
        for name, pools in wanted.items()
    }
    pooled = pool_texts(
        lm, plan.data.texts, list(asks.values()), max_tokens=plan.settings["max_tokens"], cache=plan.cache,
        progress=progress,
    )  # fmt: skip
    for name, matrices in zip(asks, pooled):
        X |= {f"{name}|{pool}": matrix for pool, matrix in matrices.items()}
    return X


def _check_tokens(lm: LanguageModel, texts: Sequence[str]) -> None:
    """Refuse texts without tokens before the model runs."""
    contexts = tokenize(lm.tokenizer, list(texts), context=lm.context)
    counts = np.bincount(contexts.document[contexts.position >= 0], minlength=len(texts))
    without = np.flatnonzero(counts == 0)
    if len(without):
        shown = listed([repr(texts[int(row)])[:40] for row in without], 3)
        raise DataError(
            f"every text must have at least one token of `{lm.name}`; {len(without)} have none: {shown}. Remove them."
        )


def _twin(plan: Plan, origin: _Origin, lm: LanguageModel) -> SAE | None:
    """The SAE of an origin: itself, or a dictionary of its shape that learned nothing."""
    if origin.sae is None or origin.kind not in ("random", "untrained"):
        return origin.sae
    seed = plan.settings["seed"]
    train = plan.data.parts[0][0]
    sample = [plan.data.texts[row] for row in train[np.argsort(_mixed(train, seed))][:SAMPLE_TOKENS]]
    rows = next(iter(capture(lm, sample, hook=origin.hook, tokens=SAMPLE_TOKENS).batches(SAMPLE_TOKENS))).x
    sae = origin.sae
    with torch.no_grad():
        l0 = float(sae.encode(rows.to(sae.device, sae.dtype)).l0())
    if origin.kind == "untrained":
        return untrained_like(sae, rows.mean(0), rows, l0, seed)
    return random_projection(sae, max(1, round(l0)), seed)


def _mixed(rows: np.ndarray, seed: int) -> np.ndarray:
    return np.random.Generator(np.random.PCG64([seed, 5])).random(len(rows))


def random_projection(sae: SAE, k: int, seed: int) -> SAE:
    """Random unit directions and the k largest positive projections on them: no bias, no scaling, nothing learned.

    Parameters
    ----------
    sae
        Whose width and number of latents to take.
    k
        Latents per row.
    seed
        Of the directions.
    """
    generator = torch.Generator().manual_seed(seed)
    W = torch.randn(sae.n_latents, sae.d_in, generator=generator)
    W = (W / W.norm(dim=1, keepdim=True)).to(sae.device, sae.dtype)
    return SAE(
        W_enc=W, b_enc=torch.zeros_like(sae.b_enc), W_dec=W, b_dec=W.new_zeros(sae.d_in), rule=TopKRule(k),
        provenance={key: sae.provenance[key] for key in ("model", "hook", "layer") if key in sae.provenance},
    )  # fmt: skip


# ---------------------------------------------------------------------------------------------------------- the verdict


def _judge(plan: Plan, found: Mapping[str, _Computed], progress: Progress) -> Classification:
    data, settings = plan.data, plan.settings
    test, draws, seed = data.test, settings["intervals"]["draws"], settings["seed"]
    bootstrap = _bootstrap(plan)
    noise = [
        PairedBootstrap.over(
            shuffled_labels(data, seed + each)[test], folds=data.fold_of_test, draws=draws, seed=seed + 1 + each
        )
        for each in range(settings["shuffles"])
    ]
    scores: dict[str, Scores] = {}
    chance: dict[str, Measured] = {}
    for place, cell in enumerate(plan.cells):
        progress("scores", place, len(plan.cells), "")
        scores[cell.key] = score(Predictions(found[cell.key].probabilities), bootstrap)
        if cell.n_train is None and noise:
            guesses = [Predictions(each) for each in found[cell.key].shuffled]
            chance[cell.key] = chance_interval([score(g, b, ("auc",)) for g, b in zip(guesses, noise)])
    progress("scores", len(plan.cells), len(plan.cells), "")
    main = [cell for cell in plan.cells if cell.n_train is None]
    best = {
        "dense": _best(main, found, ("last", "dense", "dense-tree")),
        "sae": _best(main, found, ("full", "binarized", "sparse", "tree", "binarized-tree")),
        "control": _best(main, found, ("random", "untrained", "frozen")),
    }
    base = None if best["dense"] is None else scores[best["dense"].key]
    control = None if best["control"] is None else scores[best["control"].key]
    p_values = [
        math.nan
        if base is None or best["dense"] is None or cell is best["dense"]
        else scores[cell.key].p_value(base)
        if settings["folds"] is None
        else _over_folds(data, found[cell.key], found[best["dense"].key])
        for cell in main
    ]
    arms = [
        _arm_score(
            cell, found[cell.key], scores[cell.key], base, control, chance.get(cell.key), p, q, settings["margin"]
        )
        for cell, p, q in zip(main, p_values, holm(p_values))
    ]
    return Classification(
        saekit=release(),
        versions={**library_versions(True), **_more_versions()},
        name=plan.name,
        settings=settings,
        data=data.about,
        model=_model(plan.model),
        saes=[
            {**origin.about, "name": origin.name, "digest": origin.recipe, "provenance": origin.sae.provenance}
            for origin in plan.origins.values()
            if origin.sae is not None and origin.kind in ("sae", "frozen")
        ],
        classes=data.counts(),
        best_dense=None if best["dense"] is None else best["dense"].arm.name,
        best_sae=None if best["sae"] is None else best["sae"].arm.name,
        best_control=None if best["control"] is None else best["control"].arm.name,
        floor=_floor(arms, None if best["dense"] is None else best["dense"].arm.name),
        arms=arms,
        low_data=_low_data(plan, found, scores),
        warnings=[*data.warnings, *_warnings(arms, settings["pools"])],
    )


def _over_folds(data: Labelled, one: _Computed, other: _Computed) -> float:
    """P-value of no difference of macro-F1 over the folds: their training rows overlap, which resamples do not know."""
    gaps, end = [], 0
    for _, test in data.parts:
        rows = slice(end, end + len(test))
        rest = PairedBootstrap.over(data.y[test], draws=0)
        first, second = (score(Predictions(each.probabilities[rows]), rest, ("macro_f1",)) for each in (one, other))
        gaps.append(first["macro_f1"].value - second["macro_f1"].value)
        end = rows.stop
    train, judged = (float(np.mean([len(part[side]) for part in data.parts])) for side in (0, 1))
    return corrected_t(gaps, round(train), round(judged))[1]


def _bootstrap(plan: Plan) -> PairedBootstrap:
    """The resamples of the test rows that all arms share."""
    data, settings = plan.data, plan.settings
    groups = None if data.groups is None else data.groups[data.test]
    return PairedBootstrap.over(
        data.y[data.test], groups=groups, folds=data.fold_of_test, draws=settings["intervals"]["draws"],
        seed=settings["seed"],
    )  # fmt: skip


def _best(cells: Sequence[Cell], found: Mapping[str, _Computed], kinds: Sequence[str]) -> Cell | None:
    """The cell of these kinds with the highest inner macro-F1, the first of equals."""
    mine = [cell for cell in cells if cell.arm.kind in kinds and found[cell.key].facts["inner"] is not None]
    return max(mine, key=lambda cell: found[cell.key].facts["inner"], default=None)


def _arm_score(
    cell: Cell,
    computed: _Computed,
    scores: Scores,
    base: Scores | None,
    control: Scores | None,
    chance: Measured | None,
    p: float,
    q: float,
    margin: float,
) -> ArmScore:
    arm, facts = cell.arm, computed.facts
    none = Measured(math.nan, None, None, "fraction", "no dense arm to compare with")
    unmade = Measured(math.nan, None, None, "fraction", "no random, untrained or frozen dictionary to compare with")
    difference = none if base is None else scores.difference(base)
    over_control = unmade if control is None else scores.difference(control)
    return ArmScore(
        name=arm.name, kind=arm.kind, family=arm.family, source=arm.source, pool=arm.pool, probe=arm.probe, k=arm.k,
        about=dict(arm.about),
        macro_f1=scores.measured("macro_f1"), auc=scores.measured("auc"),
        balanced_accuracy=scores.measured("balanced_accuracy"), accuracy=scores.measured("accuracy"),
        brier=scores.measured("brier"),
        difference=difference,
        auc_difference=none if base is None else scores.difference(base, "auc"),
        verdict="" if base is None else verdict(difference, margin),
        control_difference=over_control,
        control_verdict="" if control is None else verdict(over_control, margin),
        p=None if math.isnan(p) else p, p_holm=None if math.isnan(q) else q,
        inner=facts["inner"], shuffled_auc=chance, chosen=facts["chosen"], selected=facts["selected"],
        stability=facts["stability"], converged=facts["converged"], notes=facts["notes"], seconds=facts["seconds"],
    )  # fmt: skip


def _floor(arms: Sequence[ArmScore], best: str | None) -> Measured:
    """Half the width of the interval of a difference, in the median over the arms that learned something."""
    halves = [
        (arm.difference.high - arm.difference.low) / 2
        for arm in arms
        if arm.name != best
        and arm.family != "floor"
        and arm.difference.high is not None
        and arm.difference.low is not None
    ]
    if not halves:
        return Measured(math.nan, None, None, "macro-F1", "no difference with an interval")
    return Measured(float(np.median(halves)), None, None, "macro-F1", f"median over {len(halves)} arms")


def _low_data(plan: Plan, found: Mapping[str, _Computed], scores: Mapping[str, Scores]) -> list[LowData]:
    lines = []
    for size in plan.settings["train_sizes"]:
        cells = [cell for cell in plan.cells if cell.n_train == size]
        best = _best(cells, found, ("last", "dense"))
        for cell in cells:
            mine = scores[cell.key]
            none = Measured(math.nan, None, None, "fraction", "no dense arm to compare with")
            difference = none if best is None else mine.difference(scores[best.key])
            lines.append(
                LowData(cell.arm.name, cell.arm.kind, size, mine.measured("macro_f1"), mine.measured("auc"), difference)
            )
    return lines


def _warnings(arms: Sequence[ArmScore], pools: Sequence[str]) -> list[str]:
    found = []
    off = [arm for arm in arms if arm.shuffled_auc is not None]
    adjusted = holm([_p_of_chance(arm.shuffled_auc) for arm in off if arm.shuffled_auc is not None])
    leaky = [arm.name for arm, p in zip(off, adjusted) if p < SPREAD_LEVEL]
    if leaky:
        found.append(f"with shuffled labels these arms are not at chance, so something leaks: {listed(leaky)}")
    stuck = [arm.name for arm in arms if not arm.converged]
    if stuck:
        found.append(f"the fit of these arms did not converge: {listed(stuck)}")
    dead = [arm.name for arm in arms if any("are 0 in every training row" in note for note in arm.notes)]
    if dead:
        found.append(f"some selected columns never fire in training: {listed(dead)}")
    alone = [pool for pool in pools if pool not in DENSE_POOLS]
    if alone:
        found.append(f"hidden states have no pooling {listed(alone)}: these arms stand beside dense mean")
    return found


def _p_of_chance(auc: Measured) -> float:
    """Two-sided p-value of AUC = 0.5 from its interval, by the normal distribution."""
    if auc.low is None or auc.high is None:
        return math.nan
    gap, error = abs(auc.value - 0.5), (auc.high - auc.low) / (2 * 1.959964)
    return 1.0 if gap == 0 else math.erfc(gap / (error * math.sqrt(2))) if error > 0 else 0.0


def _more_versions() -> dict[str, str]:
    from importlib.metadata import version

    return {"scikit-learn": version("scikit-learn")}


def _model(model: Any) -> dict[str, Any]:
    origin = defer_model(model)
    name = model.name if isinstance(model, LanguageModel) else os.path.basename(os.fspath(model).rstrip("/"))
    return {"name": name, "digest": origin.digest}
