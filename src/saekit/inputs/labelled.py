"""Labelled texts or images, split once before anything is fitted."""

from __future__ import annotations

import hashlib
import json
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from ..errors import ConfigError, InputError, did_you_mean, listed
from .images import Images, read_images
from .settings import Split
from .split import Columns, Part, codes_of, draw_by_value, split_rows
from .texts import Texts, read_texts

FEW_TEST_ROWS = 50
"""Test rows of a class below which a warning says that its numbers are uncertain."""

FEW_TEST_GROUPS = 20
"""The same for groups."""

MIN_TEST_GROUPS = 2
"""Test rows (or groups) of a class that each of several values must have, at least."""


@dataclass(frozen=True, eq=False)
class Labelled:
    """Texts or images with their classes, and their split into training and test rows."""

    texts: tuple[str, ...] = field(repr=False)
    """``[n]`` texts; empty for images."""
    images: Images | None = field(repr=False)
    """``[n]`` images; None for texts."""
    y: np.ndarray
    """``int64 [n]`` class codes."""
    classes: tuple[str, ...]
    """Name of each code, sorted."""
    groups: np.ndarray | None
    """``[n]`` group codes; None where no group column was given."""
    together: np.ndarray | None
    """``[n]`` codes of rows that must stay on one side: groups, else equal texts; None where every row is alone."""
    keys: tuple[str, ...] = field(repr=False)
    """``[n]`` names of the groups (of the texts or images themselves, without groups)."""
    values: tuple[str, ...]
    """Values of the column `across`; ``("all",)`` without one."""
    value: np.ndarray
    """``[n]`` index into `values`."""
    parts: tuple[Part, ...]
    """Training and test rows: one pair for a locked test set, one per fold for nested cross-validation."""
    about: dict[str, Any]
    """Where the rows come from, plain JSON."""
    warnings: tuple[str, ...]
    """What a reader must know."""

    def __len__(self) -> int:
        return len(self.y)

    @property
    def test(self) -> np.ndarray:
        """Test rows of all parts, one after another."""
        return np.concatenate([test for _, test in self.parts])

    def parts_of(self, value: int) -> tuple[Part, ...]:
        """Return the training and test rows that belong to one value."""
        mine = self.value == value
        return tuple((train[mine[train]], test[mine[test]]) for train, test in self.parts)

    def counts(self, train: np.ndarray | None = None, test: np.ndarray | None = None) -> dict[str, list[int | None]]:
        """Return the number of rows of each class in train [those of the first part] and test [those of all]."""
        sides = (self.parts[0][0] if train is None else train, self.test if test is None else test)
        counts = [np.bincount(self.y[rows], minlength=len(self.classes)).tolist() for rows in sides]
        return {name: list(pair) for name, *pair in zip(self.classes, *counts)}

    def digest(self) -> str:
        """Return the SHA-256 over texts, classes, groups, values and parts."""
        found = hashlib.sha256(json.dumps([self.about["digest"], self.classes, self.values]).encode())
        for array in (self.y, self.groups, self.value, *(rows for part in self.parts for rows in part)):
            found.update(b"-" if array is None else np.ascontiguousarray(array, np.int64).tobytes())
        return "sha256:" + found.hexdigest()


def read_labelled(data: object, *, across: str | None = None, split: Split = Split()) -> Labelled:
    """Read labelled texts or images and split them.

    Parameters
    ----------
    data
        What `read_texts` takes; or `Images`.
    across
        Column of values (languages, domains) that are kept apart; None: one value with all rows.
    split
        Columns, and how rows are split.

    Raises
    ------
    DataError
        Missing labels, one class, a class with one row, groups on both sides of a given split, classes in test that
        train lacks.
    ConfigError
        A setting that the data contradicts: a split column without test rows, say.
    """
    if across == split.label:
        raise ConfigError(
            f"`across` must be another column than the label, or each value has one class; both are `{across}`."
        )
    table, about, warnings = _read(data, across, split)
    if split.min_rows is not None:
        table, dropped = _without_rare(table, split.min_rows)
        warnings += dropped
    if table.is_test is not None:
        _check_given(table, split)
    _check_classes(table.labels)
    if split.max_rows is not None:
        table = table.pick(draw_by_value(table, np.arange(len(table.labels)), split.max_rows, split.seed))
        if split.min_rows is not None:
            table, dropped = _without_rare(table, split.min_rows, f" of the {split.max_rows} that `max_rows` leaves")
            warnings += dropped
        _check_classes(table.labels, f" of the {split.max_rows} that `max_rows` leaves")
    parts = [
        (_at_most(split.train_rows, table, train, split.seed), _at_most(split.test_rows, table, test, split.seed))
        for train, test in split_rows(table, split)
    ]
    used = np.unique(np.concatenate([rows for part in parts for rows in part]))
    index = np.full(len(table.labels), -1)
    index[used] = np.arange(len(used))
    parts = [(index[train], index[test]) for train, test in parts]
    return _labelled(data, table.pick(used), parts, about, warnings)


def _at_most(limit: int | None, table: Columns, rows: np.ndarray, seed: int) -> np.ndarray:
    return rows if limit is None else draw_by_value(table, rows, limit, seed)


def _labelled(data: object, table: Columns, parts: list[Part], about: dict[str, Any], warnings: list[str]) -> Labelled:
    classes = tuple(sorted(set(table.labels)))
    codes = codes_of(table.units)
    is_grouped = about["group"] is not None
    images = data.pick(table.index) if isinstance(data, Images) else None
    warnings = [*warnings, *_repeated(table.keys, "texts" if images is None else "images", about)]
    about |= {"n_rows": len(table.keys), "n_train": int(np.mean([len(train) for train, _ in parts]))}
    found = Labelled(
        texts=() if images is not None else tuple(table.keys),
        images=images,
        y=codes_of(table.labels),
        classes=classes,
        groups=codes if is_grouped else None,
        together=codes if is_grouped or codes.max() + 1 < len(codes) else None,
        keys=tuple(table.units),
        values=table.values,
        value=table.value,
        parts=tuple(parts),
        about={**about, "n_test": sum(len(test) for _, test in parts)},
        warnings=(),
    )
    _check_tested(found)
    return replace(found, warnings=(*warnings, *_doubts(found)))


def _repeated(keys: Sequence[str], what: str, about: dict[str, Any]) -> list[str]:
    """Return a note on texts or images that occur several times."""
    twice = len(keys) - len(set(keys))
    if not twice:
        return []
    kept = "together with their group" if about["group"] is not None else "on one side of the split"
    kept = "where the split puts them" if about["split_column"] is not None else kept
    return [f"{twice:,} {what} occur before; they are kept {kept}"]


# ------------------------------------------------------------------------------------------------------- the columns


def _read(data: object, across: str | None, split: Split) -> tuple[Columns, dict[str, Any], list[str]]:
    """Return the columns of the rows that have one of the values, where they come from, and what must be told."""
    table, keys, warnings = _read_entries(data, across, split)
    labels = column_of(table, split.label, "label")
    units = keys if split.group is None else column_of(table, split.group, "group")
    is_test = None
    if split.split_column is not None:
        is_test = np.array([str(each) == split.test_split for each in table.column(split.split_column)])
    values: tuple[str, ...] = ("all",)
    value = np.zeros(len(keys), np.int64)
    if across is not None:
        values, value = _values(column_of(table, across, "value"), across, split.values)
    all_rows = Columns(
        keys, units, labels, value, is_test, np.arange(len(keys)), values, "rows" if split.group is None else "groups"
    )
    origin = ("kind", "name", "path", "split", "digest")
    about: dict[str, Any] = {
        **{key: table.info[key] for key in origin if key in table.info},
        "text": split.text, "label": split.label, "group": split.group, "across": across,
        "split_column": split.split_column, "n_rows_read": len(keys), "folds": split.folds,
    }  # fmt: skip
    return all_rows.pick(np.flatnonzero(value >= 0)), about, warnings


def _read_entries(data: object, across: str | None, split: Split) -> tuple[Texts | Images, list[str], list[str]]:
    """Return the texts or images with the columns that are needed, the key of each, and what must be told."""
    if isinstance(data, Images):
        if split.text != "text":
            raise ConfigError(f"`text` names a column of texts, `{split.text}`; these are images. Leave it out.")
        return read_images(data, split=split.hub_split), image_keys(data), []
    names = (split.label, split.group, across, split.split_column)
    wanted = list(dict.fromkeys(name for name in names if name is not None))
    texts = read_texts(data, text=split.text, split=split.hub_split, columns=wanted)
    n_empty = texts.info["n_empty"]
    return texts, list(texts.texts), [f"{n_empty:,} rows without text were left out"] if n_empty else []


def _values(column: list[str], name: str, wanted: Sequence[str] | None) -> tuple[tuple[str, ...], np.ndarray]:
    """Return the values to transfer between, and the index of each row's value; -1 for the others."""
    every = sorted(set(column))
    names = tuple(every if wanted is None else wanted)
    for each in names:
        if each not in every:
            raise InputError(f"column `{name}` must hold the value `{each}`; {did_you_mean(each, every)}")
    if len(names) < 2:
        raise InputError(
            f"column `{name}` must have at least two values to transfer between; it has {listed(names)}. Check "
            "--across."
        )
    code = {each: index for index, each in enumerate(names)}
    return names, np.array([code.get(each, -1) for each in column])


def column_of(table: Any, name: str, what: str) -> list[str]:
    """Return a column as text.

    Raises
    ------
    DataError
        Rows without a value.
    """
    values = table.column(name)
    missing = [row for row, value in enumerate(values) if _is_missing(value)]
    if missing:
        raise InputError(
            f"every row must have a {what} in column `{name}`; {len(missing)} of {len(values)} have none or NaN: rows "
            f"{listed(missing)}. Remove these rows, or name another column."
        )
    kinds = {str(value): type(value) for value in values}
    for row, value in enumerate(values):
        if kinds[str(value)] is not type(value):
            raise InputError(
                f"column `{name}` must tell a {what} from its text; row {row} has {value!r} ({type(value).__name__}), "
                f"another row the same as {kinds[str(value)].__name__}. Write all of them as text."
            )
    return [str(value) for value in values]


def _is_missing(value: object) -> bool:
    return (
        value is None
        or (isinstance(value, float) and math.isnan(value))
        or (isinstance(value, str) and not value.strip())
    )


def image_keys(images: Images) -> list[str]:
    """Return the name of each image, or of the first one with the same pixels."""
    first: dict[str, str] = {}
    keys = []
    for i, name in enumerate(images.ids):
        image = images[i]
        content = hashlib.sha256(f"{image.mode} {image.size}".encode() + image.tobytes()).hexdigest()
        keys.append(first.setdefault(content, name))
    return keys


# --------------------------------------------------------------------------------------------------------- refusals


def _without_rare(table: Columns, min_rows: int, which: str = "") -> tuple[Columns, list[str]]:
    """Return the rows of the classes that are not rare, and a note on the others."""
    counts = _training_units(table)
    rare = sorted(name for name, count in counts.items() if count < min_rows)
    if len(counts) - len(rare) < 2:
        raise InputError(
            f"there must be at least two classes with {min_rows} {table.what}{which} (min_rows); "
            f"there are {len(counts) - len(rare)} of {len(counts)}. Ask for fewer."
        )
    if not rare:
        return table, []
    rows = np.array([row for row, name in enumerate(table.labels) if counts[name] >= min_rows], np.int64)
    what = f"{'training ' if table.is_test is not None else ''}{table.what}"
    return table.pick(rows), [
        f"{len(rare)} of {len(counts)} classes have fewer than {min_rows} {what}{which} and were left out, "
        f"{len(table.labels) - len(rows):,} of {len(table.labels):,} rows: {listed(rare)}"
    ]


def _training_units(table: Columns) -> dict[str, int]:
    """Return for each class how many rows or groups it has that are not given as test rows."""
    units: dict[str, set[object]] = {name: set() for name in table.labels}
    for row, name in enumerate(table.labels):
        if table.is_test is None or not table.is_test[row]:
            units[name].add(row if table.what == "rows" else table.units[row])
    return {name: len(found) for name, found in units.items()}


def _check_classes(labels: Sequence[str], which: str = "") -> None:
    """Refuse rows of one class, and classes of one row."""
    counts = Counter(labels)
    if len(counts) < 2:
        raise InputError(
            f"labels must be of at least two classes; all {len(labels)} rows{which} are `{labels[0]}`. "
            f"{'Raise it' if which else 'Check --label'}."
        )
    single = sorted(name for name, count in counts.items() if count < 2)
    if single:
        raise InputError(
            f"every class must have at least 2 rows{which}, one to learn from and one to test on; {listed(single)} "
            f"{'has' if len(single) == 1 else 'have'} 1. "
            f"{'Raise it, or leave' if which else 'Leave'} out the classes that are rare (--min-rows N), or merge them."
        )


def _check_given(table: Columns, split: Split) -> None:
    """Refuse a given split that cannot be used."""
    is_test = table.is_test
    assert is_test is not None
    if not is_test.any() or is_test.all():
        raise ConfigError(
            f"column `{split.split_column}` must mark some rows, not all, with `{split.test_split}`; it marks "
            f"{int(is_test.sum())} of {len(is_test)}. Name the value of the test rows (test_split)."
        )
    labels, units = np.array(table.labels, object), np.array(table.units, object)
    unseen = sorted(set(labels[is_test]) - set(labels[~is_test]))
    if unseen:
        raise InputError(
            f"every class of the test rows must be in the training rows too; {listed(unseen)} are only in test. Leave "
            "these classes out (--min-rows N) or correct the split."
        )
    both = set(units[is_test]) & set(units[~is_test])
    if both and table.what == "groups":
        raise InputError(
            f"a group must lie on one side of the split in column `{split.split_column}`; {len(both)} groups lie "
            "on both, so test rows would be known from training. Correct the split, or leave it out and let saekit "
            "draw one."
        )


def check_values(data: Labelled, inner: int) -> None:
    """Refuse values that nothing can be learned from or tested on.

    Parameters
    ----------
    data
        Rows of several values.
    inner
        Number of inner folds.

    Raises
    ------
    DataError
        One class, another set of classes, too few rows or groups on either side.
    """
    units = codes_of(data.keys)
    for v, name in enumerate(data.values):
        where = f"`{name}` of column `{data.about['across']}`"
        _check_classes_of_value(data, v, where)
        parts = data.parts_of(v)
        sides = [np.concatenate([test for _, test in parts]), *(train for train, _ in parts)]
        for c, label in enumerate(data.classes):
            tested, *learned = [len(np.unique(units[rows[data.y[rows] == c]])) for rows in sides]
            if tested < MIN_TEST_GROUPS or min(learned) < inner:
                raise InputError(
                    f"{where}: class `{label}` must have at least {MIN_TEST_GROUPS} test and {inner} training "
                    f"{'rows' if data.groups is None else 'groups'}; it has {tested} and {min(learned)}. Give more "
                    "rows, fewer inner folds, or leave it out (values=…)."
                )


def _check_classes_of_value(data: Labelled, value: int, where: str) -> None:
    of_value = data.y[data.value == value]
    missing = [label for c, label in enumerate(data.classes) if not (of_value == c).any()]
    if len(data.classes) - len(missing) < 2:
        only = next(label for label in data.classes if label not in missing)
        raise InputError(
            f"{where} must have at least two classes; all its {len(of_value)} rows are `{only}`. Leave it out "
            "(values=…), or check the label column."
        )
    if missing:
        raise InputError(
            f"{where} must have every class, or nothing can be said about them there; it lacks "
            f"{listed(missing)}. Leave the value out (values=…), or the rows of these classes."
        )


def _check_tested(data: Labelled) -> None:
    """Refuse test rows of one class, and of classes that the training rows lack."""
    counts = data.counts()
    tested = [name for name, (_, test) in counts.items() if test]
    unlearned = [name for name, (train, test) in counts.items() if test and not train]
    if unlearned:
        raise InputError(
            f"every class of the test rows must be in the training rows too; {listed(unlearned)} are only in test. "
            "Give more rows (train_rows, max_rows) or leave these classes out (--min-rows N)."
        )
    if len(tested) < 2:
        raise InputError(
            f"the test rows must be of at least two classes; all {len(data.test)} are `{''.join(tested)}`. Correct the "
            "split, or give more rows."
        )


def _doubts(data: Labelled) -> list[str]:
    """Return what a reader must know about the split."""
    return [*_untested(data), *_few_tested(data), *_known_texts(data)]


def _untested(data: Labelled) -> list[str]:
    untested = [name for name, (_, test) in data.counts().items() if not test]
    return [f"classes without test rows do not count: {listed(untested)}"] if untested else []


def _is_few(data: Labelled, rows: np.ndarray) -> bool:
    """Return whether the test rows of a class are few, or of few groups."""
    groups = FEW_TEST_GROUPS if data.groups is None else len(np.unique(data.groups[rows]))
    return 0 < len(rows) < FEW_TEST_ROWS or (len(rows) > 0 and groups < FEW_TEST_GROUPS)


def _few_tested(data: Labelled) -> list[str]:
    """Where there is too little for narrow intervals."""
    few = []
    for v, value in enumerate(data.values):
        test = np.concatenate([test for _, test in data.parts_of(v)])
        few += [(value, name) for c, name in enumerate(data.classes) if _is_few(data, test[data.y[test] == c])]
    if not few:
        return []
    least = f"{FEW_TEST_ROWS} test rows"
    if data.groups is not None:
        least += f" or {FEW_TEST_GROUPS} test groups"
    if len(data.values) == 1:
        names = [name for _, name in few]
        return [
            f"{len(few)} of {len(data.classes)} classes have fewer than {least} ({listed(names, 3)}): their part of "
            "macro-F1 is uncertain"
        ]
    n_values = len({value for value, _ in few})
    return [f"{n_values} of {len(data.values)} values have a class with fewer than {least}: intervals are rough there"]


def _known_texts(data: Labelled) -> list[str]:
    """Test texts that a given split, or groups, leave in the training rows as well."""
    twice, n_test = 0, 0
    if data.images is None:
        for train, test in data.parts:
            known = {data.texts[row] for row in train}
            twice += sum(data.texts[row] in known for row in test)
            n_test += len(test)
    return [f"{twice:,} of {n_test:,} test texts are in the training rows word for word"] if twice else []
