"""Labelled texts, split once before anything is fitted."""

from __future__ import annotations

import hashlib
import json
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ..errors import ConfigError, DataError, listed
from ..inputs.texts import Texts, read_texts
from .arms import outer_folds

TEST_SPLIT = "test"
"""Value of a split column that marks test rows."""

FEW_TEST_ROWS = 50
"""Classes with fewer test rows than this are warned about."""


@dataclass(frozen=True, eq=False)
class Labelled:
    """Texts with their classes, and which rows judge.

    Parameters
    ----------
    texts
        ``[n]`` texts.
    y
        ``int64 [n]`` class codes.
    classes
        Name of each code, sorted.
    groups
        ``[n]`` group codes, or None.
    parts
        Training and test rows: one pair for a locked test set, one per fold for nested cross-validation.
    about
        Where the rows come from, JSON-able.
    warnings
        What a reader must know.
    """

    texts: tuple[str, ...] = field(repr=False)
    y: np.ndarray
    classes: tuple[str, ...]
    groups: np.ndarray | None
    parts: tuple[tuple[np.ndarray, np.ndarray], ...]
    about: dict[str, Any]
    warnings: tuple[str, ...]

    @property
    def test(self) -> np.ndarray:
        """Test rows of all parts, one after another."""
        return np.concatenate([test for _, test in self.parts])

    @property
    def fold_of_test(self) -> np.ndarray:
        """The part of each row in `test`."""
        return np.repeat(np.arange(len(self.parts)), [len(test) for _, test in self.parts])

    def counts(self) -> dict[str, list[int]]:
        """Rows of each class in train (of the first part) and test (of all)."""
        train = np.bincount(self.y[self.parts[0][0]], minlength=len(self.classes))
        test = np.bincount(self.y[self.test], minlength=len(self.classes))
        return {name: [int(train[c]), int(test[c])] for c, name in enumerate(self.classes)}

    def digest(self) -> str:
        """SHA-256 over texts, classes, groups and parts."""
        found = hashlib.sha256(json.dumps([self.about["digest"], self.classes]).encode())
        for array in (self.y, self.groups, *(rows for part in self.parts for rows in part)):
            found.update(b"-" if array is None else np.ascontiguousarray(array, np.int64).tobytes())
        return "sha256:" + found.hexdigest()


def read_labelled(
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
    seed: int = 0,
) -> Labelled:
    """Read labelled texts and decide which rows judge.

    Parameters
    ----------
    data, text
        As for `read_texts`.
    label
        Column of the classes.
    group
        Column of what must not be torn apart: author, template, pair, source.
    split_column
        Column that says which rows are test rows: those where it is `test_split`.
    test_split
        See `split_column`.
    test_share
        Share of the rows that judge where no split is given: drawn by `seed`, stratified by class, groups kept whole.
    folds
        Nested cross-validation with this many folds instead of one locked test set.
    limit, train_rows, test_rows
        Most rows in all, in train and in test: drawn by `seed`, stratified by class, or whole groups.
    min_rows
        Leave out the classes with fewer rows (with groups: fewer groups; where a split is given: of the training rows),
        and say so. None: keep all classes, and refuse those that cannot be learned or judged.
    seed
        Of the draws.

    Raises
    ------
    DataError
        Missing labels, one class, a class with one row, groups on both sides of a given split, classes in test that
        train lacks.
    ConfigError
        A setting out of range, a split column without test rows.
    """
    _check(
        test_share=test_share, folds=folds, limit=limit, train_rows=train_rows, test_rows=test_rows, min_rows=min_rows
    )
    if folds is not None and split_column is not None:
        raise ConfigError("classify: at most one of `folds` and `split_column` may be given; got both.")
    wanted = list(dict.fromkeys(name for name in (label, group, split_column) if name is not None))
    texts = read_texts(data, text=text, columns=wanted)
    warnings = []
    if texts.info["n_empty"]:
        warnings.append(f"{texts.info['n_empty']:,} rows without text were left out")
    names = _labels(texts, label)
    groups = None if group is None else _codes(texts, group)
    marks = None if split_column is None else np.array([str(v) == test_split for v in texts.column(split_column)])
    rows = np.arange(len(texts))
    if min_rows is not None:
        rows, dropped = _without_rare(names, groups, marks, min_rows)
        warnings += dropped
    classes, y = _classes(names, rows)
    if marks is not None:
        _check_split(texts, str(split_column), test_split, marks[rows], _of(groups, rows), y, classes)
    if limit is not None and limit < len(rows):
        rows = np.sort(draw_rows(rows, limit, y, _of(groups, rows), seed))
        classes, y = _classes(names, rows, f" of the {limit} that `limit` leaves")
    full = np.full(len(texts), -1)
    full[rows] = y
    parts = _parts(rows, full, groups, marks, test_share, folds, seed, classes)
    if train_rows is not None:
        parts = [
            (np.sort(draw_rows(train, train_rows, full[train], _of(groups, train), seed)), t) for train, t in parts
        ]
    if test_rows is not None:
        parts = [(train, np.sort(draw_rows(t, test_rows, full[t], _of(groups, t), seed))) for train, t in parts]
    used = np.unique(np.concatenate([rows for part in parts for rows in part]))
    place = np.full(len(texts), -1)
    place[used] = np.arange(len(used))
    classes, y = _classes(names, used)
    kept = tuple(texts.texts[i] for i in used)
    found = Labelled(
        kept, y, classes, _of(groups, used), tuple((place[train], place[test]) for train, test in parts),
        {
            **{key: texts.info[key] for key in ("kind", "name", "split", "digest") if key in texts.info},
            "text": text, "label": label, "group": group, "split_column": split_column, "n_rows_read": len(texts),
            "n_train": int(np.mean([len(train) for train, _ in parts])), "n_test": sum(len(t) for _, t in parts),
            "folds": folds,
        },
        (),
    )  # fmt: skip
    warnings += _look(found)
    return Labelled(**{**found.__dict__, "warnings": tuple(warnings)})


def _check(**settings: Any) -> None:
    share = settings.pop("test_share")
    if not 0 < share < 1:
        raise ConfigError(f"classify: `test_share` must lie between 0 and 1; got {share}.")
    for name, value in settings.items():
        least = 2 if name == "folds" else 1
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < least):
            raise ConfigError(f"classify: `{name}` must be a whole number from {least}; got {value!r}.")


def _is_missing(value: Any) -> bool:
    return (
        value is None
        or (isinstance(value, float) and math.isnan(value))
        or (isinstance(value, str) and not value.strip())
    )


def _labels(texts: Texts, label: str) -> list[str]:
    values = texts.column(label)
    missing = [row for row, value in enumerate(values) if _is_missing(value)]
    if missing:
        raise DataError(
            f"every row must have a label in column `{label}`; {len(missing)} of {len(values)} have none or NaN: rows "
            f"{listed(missing)}. Remove these rows, or name another column."
        )
    return [str(value) for value in values]


def _codes(texts: Texts, group: str) -> np.ndarray:
    values = texts.column(group)
    missing = [row for row, value in enumerate(values) if _is_missing(value)]
    if missing:
        raise DataError(
            f"every row must have a group in column `{group}`; {len(missing)} of {len(values)} have none: rows "
            f"{listed(missing)}. Remove these rows, or give each a group of its own."
        )
    return np.unique([str(value) for value in values], return_inverse=True)[1].ravel()


def _without_rare(
    names: Sequence[str], groups: np.ndarray | None, marks: np.ndarray | None, min_rows: int
) -> tuple[np.ndarray, list[str]]:
    """Rows of the classes that are not rare, and a note on the others."""
    units: dict[str, set[int]] = {name: set() for name in names}
    for row, name in enumerate(names):
        if marks is None or not marks[row]:
            units[name].add(row if groups is None else int(groups[row]))
    rare = sorted(name for name, found in units.items() if len(found) < min_rows)
    rows = np.array([row for row, name in enumerate(names) if len(units[name]) >= min_rows], np.int64)
    if len(units) - len(rare) < 2:
        raise DataError(
            f"there must be at least two classes with {min_rows} {'rows' if groups is None else 'groups'} (min_rows); "
            f"there are {len(units) - len(rare)} of {len(units)}. Ask for fewer."
        )
    if not rare:
        return rows, []
    what = f"{'training ' if marks is not None else ''}{'rows' if groups is None else 'groups'}"
    return rows, [
        f"{len(rare)} of {len(units)} classes have fewer than {min_rows} {what} and were left out, "
        f"{len(names) - len(rows):,} of {len(names):,} rows: {listed(rare)}"
    ]


def _classes(names: Sequence[str], rows: np.ndarray, which: str = "") -> tuple[tuple[str, ...], np.ndarray]:
    """Sorted class names and codes of these rows; refused where there is nothing to tell apart."""
    mine = [names[row] for row in rows]
    counts = Counter(mine)
    if len(counts) < 2:
        raise DataError(
            f"there must be at least two classes; all {len(mine)} rows{which} are `{mine[0]}`. "
            f"{'Raise it' if which else 'Check --label'}."
        )
    single = sorted(name for name, count in counts.items() if count < 2)
    if single:
        raise DataError(
            f"every class must have at least 2 rows{which}, one to learn from and one to judge by; {listed(single)} "
            f"{'has' if len(single) == 1 else 'have'} 1. "
            f"{'Raise it, or leave' if which else 'Leave'} out the classes that are rare (--min-rows N), or merge them."
        )
    classes = tuple(sorted(counts))
    code = {name: place for place, name in enumerate(classes)}
    return classes, np.array([code[name] for name in mine], np.int64)


def _of(groups: np.ndarray | None, rows: np.ndarray) -> np.ndarray | None:
    return None if groups is None else groups[rows]


def _check_split(
    texts: Texts,
    column: str,
    test_split: str,
    marks: np.ndarray,
    groups: np.ndarray | None,
    y: np.ndarray,
    classes: Sequence[str],
) -> None:
    if not marks.any() or marks.all():
        values = sorted({str(value) for value in texts.column(column)})
        raise ConfigError(
            f"column `{column}` must mark some rows, not all, with `{test_split}`; its values are {listed(values)}. "
            "Name the value of the test rows (test_split)."
        )
    unseen = sorted({classes[c] for c in y[marks]} - {classes[c] for c in y[~marks]})
    if unseen:
        raise DataError(
            f"every class of the test rows must be in the training rows too; {listed(unseen)} are only in test. Leave "
            "these classes out (--min-rows N) or correct the split."
        )
    if groups is not None:
        both = np.intersect1d(groups[marks], groups[~marks])
        if len(both):
            raise DataError(
                f"a group must lie on one side of the split in column `{column}`; {len(both)} groups lie on both, so "
                "test rows would be known from training. Correct the split, or leave it out and let saekit draw one."
            )


def _parts(
    rows: np.ndarray,
    y: np.ndarray,
    groups: np.ndarray | None,
    marks: np.ndarray | None,
    test_share: float,
    folds: int | None,
    seed: int,
    names: Sequence[str],
) -> list[tuple[np.ndarray, np.ndarray]]:
    """Training and test rows, as places in all rows read."""
    if marks is not None:
        train, test = rows[~marks[rows]], rows[marks[rows]]
        if not len(train) or not len(test):
            raise ConfigError("classify: `limit` leaves no training or no test rows; raise it.")
        return [(train, test)]
    if folds is not None:
        return [
            (rows[train], rows[test]) for train, test in outer_folds(y[rows], _of(groups, rows), folds, seed, names)
        ]
    if groups is not None:
        n_folds = max(2, round(1 / test_share))
        train, test = outer_folds(y[rows], groups[rows], n_folds, seed, names)[0]
        return [(rows[train], rows[test])]
    wanted = max(len(np.unique(y[rows])), round(test_share * len(rows)))
    test = draw_rows(rows, wanted, y[rows], None, seed, every=True)
    return [(np.setdiff1d(rows, test), np.sort(test))]


def draw_rows(
    rows: np.ndarray, wanted: int, y: np.ndarray, groups: np.ndarray | None, seed: int, *, every: bool = False
) -> np.ndarray:
    """Some of the rows, by seed: the same share of every class, or whole groups until there are enough.

    Parameters
    ----------
    rows, y, groups
        Rows with their class codes and groups, all ``[n]``.
    wanted
        How many; all where there are no more.
    seed
        Of the draw. More rows wanted from the same seed hold the fewer ones.
    every
        Whether every class must be drawn from and left some.
    """
    if wanted >= len(rows):
        return rows
    generator = np.random.Generator(np.random.PCG64([seed, 17]))
    if groups is not None:
        order = generator.permutation(np.unique(groups))
        rank = np.empty(int(groups.max()) + 1, np.int64)
        rank[order] = np.arange(len(order))
        by_group = np.argsort(rank[groups], kind="stable")
        return rows[by_group[:wanted]]
    key = np.empty(len(rows))
    for c in np.unique(y):
        mine = np.flatnonzero(y == c)
        place = generator.permutation(len(mine))
        key[mine] = (place + (0.5 if not every else 0.0)) / len(mine)
        if every:
            key[mine[place == 0]] = -1.0
            key[mine[place == len(mine) - 1]] = 2.0
    return rows[np.argsort(key, kind="stable")[:wanted]]


def _look(data: Labelled) -> list[str]:
    """What a reader must know about the split."""
    found = []
    counts = data.counts()
    untested = [name for name, (_, test) in counts.items() if not test]
    unlearned = [name for name, (train, test) in counts.items() if test and not train]
    if unlearned:
        raise DataError(
            f"every class of the test rows must be in the training rows too; {listed(unlearned)} are only in test. "
            "Give more rows (train_rows, limit) or leave these classes out (--min-rows N)."
        )
    if len(counts) - len(untested) < 2:
        raise DataError(
            f"the test rows must be of at least two classes; all {len(data.test)} are "
            f"`{next(name for name in counts if name not in untested)}`. Correct the split, or give more rows."
        )
    if untested:
        found.append(f"classes without test rows do not count: {listed(untested)}")
    few = [name for name, (_, test) in counts.items() if 0 < test < FEW_TEST_ROWS]
    if few:
        found.append(
            f"{len(few)} of {len(counts)} classes have fewer than {FEW_TEST_ROWS} test rows ({listed(few, 3)}): their "
            "part of macro-F1 is uncertain"
        )
    twice = [0, 0]
    for train, test in data.parts:
        known = {data.texts[row] for row in train}
        twice[0] += sum(data.texts[row] in known for row in test)
        twice[1] += len(test)
    if twice[0]:
        found.append(f"{twice[0]:,} of {twice[1]:,} test texts are in the training rows word for word")
    return found
