"""How rows are split into training and test rows: one locked test set, folds, samples of rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from ..errors import ConfigError, InputError, listed
from ..randomness import hashed_key
from .settings import Split

Part = tuple[np.ndarray, np.ndarray]
"""Training and test rows."""

_HEAVY = 3.0  # cost of a group that has much of a part to itself, compared with that of missing as many rows
_ORDERS = 16  # in which groups are dealt out, with up to a thousand groups


@dataclass(frozen=True, eq=False)
class Columns:
    """The columns that a split is made from."""

    keys: list[str]
    """Texts; of images, the first one's name with these pixels."""
    units: list[str]
    """Names of the groups; without groups, the keys."""
    labels: list[str]
    value: np.ndarray
    is_test: np.ndarray | None
    index: np.ndarray
    """Row in the data."""
    values: tuple[str, ...]
    what: str
    """What units are called: ``rows`` or ``groups``."""

    def pick(self, rows: np.ndarray) -> Columns:
        """Return some of the rows."""
        return replace(
            self,
            keys=[self.keys[row] for row in rows],
            units=[self.units[row] for row in rows],
            labels=[self.labels[row] for row in rows],
            value=self.value[rows],
            is_test=None if self.is_test is None else self.is_test[rows],
            index=self.index[rows],
        )


def codes_of(names: Sequence[str]) -> np.ndarray:
    """Return the index of each name among all, sorted."""
    code = {name: index for index, name in enumerate(sorted(set(names)))}
    return np.array([code[name] for name in names], np.int64)


def check_folds(
    y: np.ndarray, units: np.ndarray | None, folds: int, reason: str, names: Sequence[str] | None = None
) -> None:
    """Refuse folds that a class cannot fill.

    Parameters
    ----------
    y
        ``[n]`` class codes.
    units
        ``[n]`` codes of what stays in one fold; None: every row is alone.
    folds, reason
        Number of folds, and what needs that many, for messages.
    names
        Names of the classes, for messages.

    Raises
    ------
    InputError
        A class has fewer rows (or groups) than there are folds.
    """
    if len(y) < folds:
        raise InputError(f"there must be at least {folds} training rows: {reason}; there are {len(y)}. Give more rows.")
    codes, counts = np.unique(y, return_counts=True)
    what = "rows"
    if units is not None:
        pairs = np.unique(np.stack([y, codes_of(units.tolist())]), axis=1)
        codes, counts = np.unique(pairs[0], return_counts=True)
        what = "groups (rows that stay together)"
    if counts.min() < folds:
        few = [int(code) for code, count in zip(codes, counts) if count < folds]
        shown = few if names is None else [names[code] for code in few]
        raise InputError(
            f"every class must have at least {folds} {what}: {reason}; {listed(shown)} "
            f"{'has' if len(few) == 1 else 'have'} fewer. Give more {what.partition(' ')[0]} of "
            f"{'it' if len(few) == 1 else 'them'}, or leave out the classes that are rare (--min-rows N)."
        )


INNER = "one for each of the {} folds of the training rows that choose hyperparameters (budget.inner)"
OUTER = "one for each of the {} folds (--folds)"
SIDES = "one for each side of the split, training and test"


def split_rows(table: Columns, split: Split) -> list[Part]:
    """Training and test rows: given, drawn, or one pair per fold."""
    every = np.arange(len(table.labels))
    if table.is_test is not None:
        train, test = every[~table.is_test], every[table.is_test]
        if not len(train) or not len(test):
            raise ConfigError("`max_rows` leaves no training or no test rows; raise it.")
        return [(train, test)]
    if split.folds is not None:
        if len(table.values) == 1:
            units = codes_of(table.units)
            alone = table.what == "rows" and units.max() + 1 == len(units)
            names = sorted(set(table.labels))
            check_folds(codes_of(table.labels), None if alone else units, split.folds, OUTER.format(split.folds), names)
        fold = _drawn_folds(table, split)
        return [(every[fold != part], every[fold == part]) for part in range(split.folds)]
    is_test = _drawn_folds(table, split) == 0
    return [(every[~is_test], every[is_test])]


def _drawn_folds(table: Columns, split: Split) -> np.ndarray:
    """Return the fold of each row; without folds 0 for test rows and -1 for training rows.

    Given groups of one value, which may be of any size, are dealt out so that every fold has as many rows of each class
    as can be. Otherwise units (texts; or groups of several values, translations of one text say) that hold the same
    values and classes are one stratum; each is dealt out in an order computed from the seed and the names of the units
    alone, so neither other values nor the order of the rows change it.
    """
    if table.what == "groups" and len(table.values) == 1:
        return _balanced_folds(table, split)
    classes = codes_of(table.labels).tolist()
    members: dict[str, set[tuple[str, int]]] = {}
    for unit, v, c in zip(table.units, table.value.tolist(), classes):
        members.setdefault(unit, set()).add((table.values[v], c))
    rank = {unit: hashed_key("split", split.seed, unit) for unit in members}
    strata: dict[tuple[tuple[str, int], ...], list[str]] = {}
    for unit in sorted(members, key=lambda unit: rank[unit]):
        strata.setdefault(tuple(sorted(members[unit])), []).append(unit)
    fold: dict[str, int] = {}
    for mine in strata.values():
        # where the first one falls is drawn as well, or small strata would all be rounded the same way
        start = hashed_key("start", split.seed, mine[0]) / 2**128
        fold |= dict(zip(mine, _dealt(len(mine), start, split).tolist()))
    if split.folds is None and len(table.values) == 1:
        _both_sides(fold, members, rank)
    return np.array([fold[unit] for unit in table.units])


def _dealt(n_units: int, start: float, split: Split) -> np.ndarray:
    """Return the fold of each unit of a stratum, dealt out in turn from a fraction of one turn on."""
    if split.folds is not None:
        return (np.arange(n_units) + int(start * split.folds)) % split.folds
    at = np.arange(n_units) + start / split.test_share
    is_test = np.floor((at + 1) * split.test_share) > np.floor(at * split.test_share)
    return np.where(is_test, 0, -1)


def _balanced_folds(table: Columns, split: Split) -> np.ndarray:
    """Return the fold of each row of groups of any size; without folds 0 for test rows and -1 for training rows."""
    y, names = codes_of(table.labels), sorted(set(table.labels))
    reason = SIDES if split.folds is None else OUTER.format(split.folds)
    check_folds(y, codes_of(table.units), split.folds or 2, reason, names)
    fractions = (
        np.array([split.test_share, 1 - split.test_share])
        if split.folds is None
        else np.full(split.folds, 1 / split.folds)
    )
    fold = balanced_folds(table.units, y, fractions, split.seed)
    return fold if split.folds is not None else np.where(fold == 0, 0, -1)


def balanced_folds(units: Sequence[Any] | np.ndarray, y: np.ndarray, fractions: np.ndarray, seed: int) -> np.ndarray:
    """Return the part of each row, groups kept whole; see `dealt_groups`.

    Parameters
    ----------
    units
        ``[n]`` names (or codes) of the groups.
    y
        ``[n]`` class codes.
    fractions, seed
        As for `dealt_groups`.
    """
    names = [str(unit) for unit in units]
    codes = codes_of(names)
    counts = np.zeros((int(codes.max()) + 1, int(y.max()) + 1))
    np.add.at(counts, (codes, y), 1)
    counts = counts[:, counts.any(0)]  # classes without rows weigh nothing
    return dealt_groups(sorted(set(names)), counts, fractions, seed)[codes]


def dealt_groups(names: Sequence[str], counts: np.ndarray, fractions: np.ndarray, seed: int) -> np.ndarray:
    """Return the part of each group, so that every part has about its fraction of the rows of every class.

    Groups are dealt out one at a time, mostly the large ones first, each to where rows of its classes are missing most.
    That is done in several orders; the one that comes closest counts. A group that is larger than a part tends to be in
    the larger part, the training rows.

    Parameters
    ----------
    names
        Names of the groups: the orders are computed from these and the seed alone.
    counts
        ``float64 [n_groups, n_classes]`` rows.
    fractions
        ``float64 [n_parts]`` what every part should have; they sum to 1.
    seed
        Random seed.
    """
    size = np.log(counts.sum(1))
    wanted = fractions[:, None] * np.concatenate([counts.sum(0), [counts.sum()]])
    rows = np.concatenate([counts, counts.sum(1, keepdims=True)], axis=1)
    weight = 1 / wanted
    weight[:, -1] *= counts.shape[1]  # all rows together count as much as the classes
    heavy = _HEAVY * np.square(rows[:, -1:]) * weight[:, -1]
    best: tuple[tuple[int, float], np.ndarray] | None = None
    for order in range(max(1, min(_ORDERS, _ORDERS * 1000 // len(names)))):
        noise = np.array([hashed_key("split", seed + order * 1_000_003, name) for name in names], dtype=float) / 2**128
        placed, missing = np.empty(len(names), np.int64), wanted.copy()
        for group in np.argsort(-(size + noise), kind="stable"):
            # what the squared distance to the wanted rows, relative to these, gains in every part
            gain = ((2 * missing - rows[group]) * rows[group] * weight).sum(1) - heavy[group]
            part = int(gain.argmax())
            placed[group] = part
            missing[part] -= rows[group]
        empty = int((missing[:, :-1] >= wanted[:, :-1]).sum())
        distance = (np.square(missing) * weight).sum() + heavy[np.arange(len(names)), placed].sum()
        found = (empty, float(distance))
        if best is None or found < best[0]:
            best = (found, placed)
    assert best is not None
    return best[1]


def _both_sides(fold: dict[str, int], members: dict[str, set[tuple[str, int]]], rank: dict[str, int]) -> None:
    """Move a group of each class that small strata have put on one side; one of a single group is trained on."""
    of_class: dict[tuple[str, int], list[str]] = {}
    for unit in sorted(members, key=lambda unit: rank[unit]):
        for each in members[unit]:
            of_class.setdefault(each, []).append(unit)
    for _, mine in sorted(of_class.items()):
        n_test = sum(fold[unit] == 0 for unit in mine)
        if n_test == len(mine):
            fold[mine[-1]] = -1
        elif n_test == 0 and len(mine) > 1:
            fold[mine[0]] = 0


def draw_by_value(table: Columns, rows: np.ndarray, wanted: int, seed: int) -> np.ndarray:
    """Return `wanted` of these rows of each value."""
    is_grouped = table.what == "groups"
    # between values only the names of groups count, so that the same ones are drawn from each
    y = np.zeros(len(table.labels)) if is_grouped and len(table.values) > 1 else codes_of(table.labels)
    drawn = []
    for v in range(len(table.values)):
        mine = rows[table.value[rows] == v]
        keys = [table.units[row] for row in mine]
        drawn.append(mine[draw_rows(keys, y[mine], wanted, is_grouped=is_grouped, seed=seed)])
    return np.sort(np.concatenate(drawn))


def draw_rows(keys: Sequence[str], y: np.ndarray, wanted: int, *, is_grouped: bool, seed: int) -> np.ndarray:
    """Return the indices of some rows: the same fraction of every class, or whole groups until there are enough.

    Parameters
    ----------
    keys
        ``[n]`` names of the rows or of their groups; their order is computed from these and the seed alone.
    y
        ``[n]`` classes.
    wanted
        Number of rows; all where there are no more. More rows of the same seed hold the fewer ones.
    is_grouped
        Whether `keys` name groups; then the same fraction of the groups is drawn that hold a class, the rarest one of
        each group.
    seed
        Random seed.
    """
    if wanted >= len(keys):
        return np.arange(len(keys))
    names = list(dict.fromkeys(keys)) if is_grouped else list(keys)
    number = {name: index for index, name in enumerate(names)}
    of_row = np.array([number[key] for key in keys]) if is_grouped else np.arange(len(keys))
    hashed = [hashed_key("rows", seed, name) for name in names]
    order = np.array(sorted(range(len(names)), key=lambda index: (hashed[index], index)))
    stratum = _rarest_class(of_row, y, len(names))
    rank = np.empty(len(names))
    for c in np.unique(stratum):
        mine = order[stratum[order] == c]
        rank[mine] = (np.arange(len(mine)) + 0.5) / len(mine)
    place = np.empty(len(names), np.int64)
    place[order[np.argsort(rank[order], kind="stable")]] = np.arange(len(names))
    return np.sort(np.argsort(place[of_row], kind="stable")[:wanted])


def _rarest_class(group: np.ndarray, y: np.ndarray, n_groups: int) -> np.ndarray:
    """Return for each group the class of its rows that the fewest groups have."""
    pairs = np.unique(np.stack([group, y.astype(np.int64)]), axis=1)
    counts = np.bincount(pairs[1])
    rarest = np.full(n_groups, -1)
    for index, c in sorted(pairs.T.tolist(), key=lambda pair: -counts[pair[1]]):
        rarest[index] = c
    return rarest
