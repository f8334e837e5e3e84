"""The result of a transfer: every way to classify, trained on one and tested on another, as plain data."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

from ..errors import ConfigError, FormatError, did_you_mean
from ..measure.intervals import no_intervals
from ..measure.results import Measured
from ..measure.tables import html_table
from ..settings import brief
from .arm_results import ArmsResult, ComparedArm

CHANCE = ("above chance", "at chance", "below chance", "unknown")
"""Where the interval of an AUC lies, compared with 0.5; corrected for the cells of an arm (Holm)."""

LOSSES = {"better": "lost", "worse": "gained", "equivalent": "kept", "undecided": "undecided"}
"""Verdict of the drop from the in-domain classifier at the margin, corrected for the cells of an arm (Holm)."""

VERDICTS = ("native", *LOSSES.values())
"""The same; ``native`` on the diagonal."""

MATRICES = ("macro_f1", "auc", "drop", "drop_auc", "minus_dense")


@dataclass(frozen=True)
class Value:
    """One of the things that are transferred between: a language, a domain, an SAE."""

    __repr__ = brief

    name: str
    n_train: int
    """Rows that classifiers of it learn from (of the first fold)."""
    n_test: int
    """Number of test rows."""
    n_groups: int | None
    """Number of test groups, or None without groups."""
    classes: dict[str, list[int | None]]
    """Rows of each class in train (of the first fold; None in files of schema 1 to 3) and in test."""
    about: dict[str, Any]
    """What else is known: model, hook, SAE."""
    effective: float | None = None
    """How many test groups (or rows) of equal size would tell as much; None in files of earlier versions."""


@dataclass(frozen=True)
class Cell:
    """One classifier, trained on one value and tested on another."""

    __repr__ = brief

    arm: str
    train: str
    test: str
    macro_f1: Measured
    auc: Measured
    drop: Measured
    """Macro-F1 of the classifier trained on `test` itself, minus this one's, over the same test rows; 0 on the
    diagonal."""
    drop_auc: Measured
    """The same of AUC."""
    minus_dense: Measured | None
    """Macro-F1 minus that of the dense arm trained and tested alike; None for the dense arm itself or without one."""
    chance: str
    """One of `CHANCE`."""
    verdict: str
    """One of `VERDICTS`."""
    sentence: str
    """The same in words."""
    chosen: list[dict[str, Any]]
    """Settings that the inner cross-validation chose on the training rows, per outer fold."""
    notes: list[str]
    """What a reader must know about the fit."""


@dataclass(frozen=True, kw_only=True)
class ArmTransfer(ComparedArm):
    """One way to classify, over the whole matrix; with one value the same numbers as `ArmScore`."""

    __repr__ = brief

    transferred: Measured | None
    """Macro-F1, mean over all other cells; None with one value."""
    transferred_auc: Measured | None
    drop: Measured | None
    """Mean drop of macro-F1."""
    n_cells: int
    """Number of cells off the diagonal."""
    n_above: int
    """Number of them whose AUC is above chance."""
    n_at: int
    """Number of cells that cannot be told from chance."""
    n_below: int
    """Number of cells below chance: what was learned points the other way."""
    sentence: str
    """The same in words."""


@dataclass(frozen=True, repr=False)
class Transfer(ArmsResult):
    """Classifiers trained on one language, domain or SAE, tested on all the others.

    Everything is tested on held-out rows, the same rows for all that are compared.

    Examples
    --------
    ::

        result = sk.transfer(sae, model="minilm", data="hate.csv.gz", across="lang", split=sk.Split(group="templ_id"))
        result.cell("sae", "english", "german").auc
        result.matrix("sae", "macro_f1")
        print(result.arms[0].sentence)
    """

    KIND: ClassVar[str] = "transfer"
    SCHEMA: ClassVar[int] = 5
    PARTS: ClassVar[tuple[str, ...]] = ("arms", "cells", "values")

    across: str
    """What the values are: a column, or ``sae``."""
    values: list[Value]
    arms: list[ArmTransfer]
    cells: list[Cell]
    """One per arm, training value and test value, in this order."""

    @classmethod
    def migrate(cls, plain: dict[str, Any]) -> dict[str, Any]:
        """Return a file of an older schema in the layout of this one.

        In schema 1 arms were ways with other names; up to schema 3 classes were named without their training rows, and
        cells told the settings of the first fold only; up to schema 4 some warnings were texts in `notes`.
        """
        if plain.get("schema") not in (1, 2, 3, 4):
            return plain
        plain = dict(plain)
        plain["warnings"] = plain.pop("notes") + plain.get("warnings", [])
        if plain["schema"] == 4:
            return plain
        if "ways" in plain:
            ways = plain.pop("ways")
            plain["arms"] = [migrated(way) for way in ways]
            plain["best_dense"] = next((way["name"] for way in ways if way["kind"] == "dense"), None)
        plain["values"] = [
            {**value, "classes": {name: [None, n] for name, n in value["classes"].items()}} for value in plain["values"]
        ]
        tested = [value["classes"] for value in plain["values"]]
        plain["classes"] = {name: [None, sum(each[name][1] for each in tested)] for name in plain["classes"]}
        plain["cells"] = [{**cell, "chosen": [cell["chosen"]]} for cell in plain["cells"]]
        return plain

    def check(self) -> None:
        """Refuse what contradicts itself; raises `FormatError`."""
        names = [value.name for value in self.values]
        expected = [(arm.name, a, b) for arm in self.arms for a in names for b in names]
        if not names or [(cell.arm, cell.train, cell.test) for cell in self.cells] != expected:
            raise FormatError(
                f"a saved transfer of {len(names)} values and {len(self.arms)} arms must hold {len(expected)} "
                f"cells in order; it holds {len(self.cells)}. The file was altered."
            )

    # ------------------------------------------------------------------ parts

    def cell(self, arm: str, train: str, test: str) -> Cell:
        """Return the cell of an arm, trained on `train` and tested on `test`.

        Raises
        ------
        ConfigError
            There is no such arm or value.
        """
        name_of_arm = self.arm(arm).name
        names = [value.name for value in self.values]
        for name in (train, test):
            if name not in names:
                raise ConfigError(f"`{name}` must be a value of `{self.across}`. {did_you_mean(name, names)}")
        return next(c for c in self.cells if (c.arm, c.train, c.test) == (name_of_arm, train, test))

    def matrix(self, arm: str, name: str = "macro_f1") -> list[list[float | None]]:
        """Values of one number for an arm: a row per training value, a column per test value.

        Raises
        ------
        ConfigError
            There is no such arm or number.
        """
        if name not in MATRICES:
            raise ConfigError(f"a matrix must be of a known number; got `{name}`. {did_you_mean(name, MATRICES)}")
        name_of_arm = self.arm(arm).name
        found = [getattr(cell, name) for cell in self.cells if cell.arm == name_of_arm]
        numbers = [None if each is None or math.isnan(each.value) else each.value for each in found]
        n = len(self.values)
        return [numbers[row * n : (row + 1) * n] for row in range(n)]

    # ------------------------------------------------------------------ tables

    def table(self) -> list[list[str]]:
        """Return one line per arm, headings first."""
        several = len(self.values) > 1
        native, moved = ("native F1", list(_MOVED)) if several else ("macro-F1", ["AUC"])
        gap = f"{'AUC' if self.verdict_metric == 'auc' else 'F1'} − dense"
        return [["", native, *moved, gap, "verdict"], *(self._line(arm, several) for arm in self.arms)]

    def _line(self, arm: ArmTransfer, several: bool) -> list[str]:
        moved = [read(arm) for read in _MOVED.values()] if several else [str(arm.auc)]
        gap = arm.auc_difference if self.verdict_metric == "auc" else arm.difference
        return [arm.name, str(arm.macro_f1), *moved, str(gap) if gap.is_defined else "–", arm.verdict or "–"]

    def matrix_table(self, arm: str, name: str = "macro_f1") -> list[list[str]]:
        """One matrix as text: rows trained on, columns tested on. With ``auc``, ``*`` marks cells not at chance."""
        names, name_of_arm = [value.name for value in self.values], self.arm(arm).name
        told = iter(cell.chance in CHANCE[::2] and name == "auc" for cell in self.cells if cell.arm == name_of_arm)
        lines = [["train ↓ test →", *names]]
        for train, numbers in zip(names, self.matrix(arm, name)):
            shown = ["–" if number is None else f"{number:.2f}" for number in numbers]
            lines.append([train, *(text + "*" * next(told) for text in shown)])
        return lines

    def sentences(self, arm: str | None = None) -> list[str]:
        """Describe every cell off the diagonal in words, for one arm or for all."""
        wanted = None if arm is None else self.arm(arm).name
        return [cell.sentence for cell in self.cells if cell.train != cell.test and wanted in (None, cell.arm)]

    def caption(self) -> str:
        """One line under the table."""
        settings = self.settings
        judged = sum(value.n_test for value in self.values)
        matrix = f"{len(self.values)} × {len(self.values)} by `{self.across}`, " if len(self.values) > 1 else ""
        about = no_intervals(cell.macro_f1 for cell in self.cells)
        about = about or f"{settings['level']:.0%} intervals over {self._units()}"
        return (
            f"{matrix}{judged:,} test rows that no classifier has seen; {about}; "
            f"margin {settings['margin']:g} {'AUC' if self.verdict_metric == 'auc' else 'macro-F1'}"
        )

    def _units(self) -> str:
        """Return what the intervals are over, with the number that a value has at least."""
        unit = "groups" if any(value.n_groups for value in self.values) else "rows"
        known = [(value.effective, value.n_groups or value.n_test) for value in self.values if value.effective]
        if not known:
            return unit
        effective, n = min(known)
        least = "at least " if len(self.values) > 1 else ""
        equal = "" if effective > 0.95 * n else f" (which tell as much as {effective:.1f} equal ones)"
        return f"{least}{n:,} test {unit}{equal}"

    def _repr_html_(self) -> str:
        parts = [html_table(self.table(), self.footer())]
        shown = self.shown_arm
        if len(self.values) > 1:
            caption = f"Macro-F1 of `{shown}`: trained on the row, tested on the column."
            parts.append(html_table(self.matrix_table(shown), caption))
        return "".join(parts)

    @property
    def shown_arm(self) -> str:
        """The arm whose matrix stands for all: all latents of the first SAE."""
        ranked = sorted(self.arms, key=lambda arm: (arm.family != "sae", arm.kind != "full"))
        return ranked[0].name


def migrated(way: dict[str, Any]) -> dict[str, Any]:
    """Return an arm of a transfer file of schema 1 in the layout of this one."""
    none = {"value": None, "low": None, "high": None, "unit": "", "reason": "no other dense arm to compare with"}
    arm = {_RENAMED.get(key, key): value for key, value in way.items()}
    for key in ("difference", "auc_difference"):
        arm[key] = none if arm[key] is None else arm[key]
    return {**arm, "verdict": arm["verdict"] or ""}


_RENAMED = {
    "native": "macro_f1", "native_auc": "auc", "minus_dense": "difference", "minus_dense_auc": "auc_difference",
    "against_dense": "verdict",
}  # fmt: skip


_MOVED: dict[str, Callable[[ArmTransfer], str]] = {
    "transferred F1": lambda arm: _text(arm.transferred),
    "drop": lambda arm: _text(arm.drop),
    "transferred AUC": lambda arm: _text(arm.transferred_auc),
    "above chance": lambda arm: f"{arm.n_above} of {arm.n_cells}",
}


def _text(measured: Measured | None) -> str:
    return "–" if measured is None else str(measured)


def near_chance(auc: Measured, found: str | None = None) -> str:
    """Tell where an AUC lies, compared with 0.5: one of `CHANCE`.

    Parameters
    ----------
    auc
        The AUC.
    found
        Verdict of its difference from 0.5 within a family; None: of the interval alone.

    >>> near_chance(Measured(0.53, 0.49, 0.57)), near_chance(Measured(0.6, 0.55, 0.65))
    ('at chance', 'above chance')
    """
    if not auc.is_defined or auc.low is None or auc.high is None:
        return "unknown"
    if found is None:
        found = "better" if auc.low > 0.5 else "worse" if auc.high < 0.5 else "undecided"
    return {"better": "above chance", "worse": "below chance"}.get(found, "at chance")


def cell_sentence(cell: Cell) -> str:
    """Describe a cell in words."""
    where = f"`{cell.arm}` trained on {cell.train}"
    if cell.train == cell.test:
        return f"{where}, tested on unseen rows of it: macro-F1 {cell.macro_f1:.2f}, AUC {cell.auc:.2f}."
    chance = {
        "above chance": f"above chance (AUC {cell.auc:.2f})",
        "at chance": f"at chance: AUC {cell.auc:.2f} is not told apart from 0.5",
        "below chance": f"below chance (AUC {cell.auc:.2f}): what it learned points the other way",
        "unknown": f"AUC {cell.auc:.2f}, no interval",
    }[cell.chance]
    drop = {
        "lost": f"{cell.drop:.2f} macro-F1 lost against training on {cell.test} itself",
        "kept": f"as good as training on {cell.test} itself",
        "gained": f"better than training on {cell.test} itself (drop {cell.drop:.2f})",
        "undecided": f"drop from training on {cell.test} itself undecided ({cell.drop:.2f})",
    }[cell.verdict]
    return f"{where}, tested on {cell.test}: macro-F1 {cell.macro_f1:.2f}, {chance}; {drop}."


def arm_sentence(arm: ArmTransfer, across: str, metric: str = "macro_f1", *, is_baseline: bool = False) -> str:
    """Return an arm in words; the baseline is not compared with itself."""
    dense = ""
    minus, unit = (arm.auc_difference, "AUC") if metric == "auc" else (arm.difference, "macro-F1")
    if minus.is_defined and not is_baseline:
        words = {
            "better": "better than", "worse": "worse than", "equivalent": "as good as",
            "undecided": "not told apart from",
        }  # fmt: skip
        dense = f"; {words[arm.verdict or 'undecided']} dense states ({minus:.3f} {unit})"
    if arm.transferred is None or arm.drop is None:
        return f"`{arm.name}`: macro-F1 {arm.macro_f1:.2f}, AUC {arm.auc:.2f}{dense}."
    counts = [
        (arm.n_above, "above chance"), (arm.n_at, "at chance"), (arm.n_below, "below chance"),
    ]  # fmt: skip
    told = ", ".join(f"{count} {what}" for count, what in counts if count) or "none judged"
    return (
        f"`{arm.name}`: macro-F1 {arm.macro_f1:.2f} on the {across} trained on, {arm.transferred:.2f} on another "
        f"(drop {arm.drop:.2f}); of {arm.n_cells} pairs of different {across}s {told}{dense}."
    )
