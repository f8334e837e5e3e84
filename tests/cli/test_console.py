"""What is printed fits the screen, is rounded, and moves no cursor."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from saekit.cli import console
from saekit.measure.results import Measured
from saekit.places import Warned

WIDE = [
    ["", "fvu", "l0", "dead", "ce", "recovered (zero)"],
    ["matryoshka-1024-k16-seed0", "0.7350 [0.7332, 0.7352]", "15.2 [15.1, 15.3]", "0 [0, 0]", "3.17 [2.9, 3.4]",
     "0.930 [0.923, 0.940]"],
]  # fmt: skip
PAIRS = [
    ["", "shared", "equal", "PW-MCC", "cosine enc", "max cosine"],
    ["topk-1024-k16-seed0 | topk-1024-k16-seed1", "0.00879 [0.005, 0.017]", "0.000977 [0.000, 0.006]",
     "0.2230 [0.2211, 0.2249]", "0.2230 [0.2211, 0.2249]", "0.2230 [0.2211, 0.2249]"],
]  # fmt: skip
LONG = "shared: decoder and encoder partners agree, both cosines > 0.7; 95% intervals over latents of the one pair " * 2


class Result:
    warnings = (Warned("other_hook", "trained on rows of another hook, which is a long story " * 3),)
    entries = (
        SimpleNamespace(
            metrics={name: Measured(0.5) for name in ("fvu", "l0", "dead_fraction", "ce_sae", "ce_recovered_zero")}
        ),
    )

    def __init__(self, lines):
        self.lines = lines

    def table(self, names=()):
        return [list(line) for line in self.lines]

    predictors = {"alignment_self": Measured(0.5)}  # noqa: RUF012

    def __getattr__(self, name):
        """Every table that a result may have besides is wide too."""
        if not name.endswith("_table"):
            raise AttributeError(name)
        return self.table

    def caption(self):
        return LONG


@pytest.fixture(params=[80, 100])
def width(request, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setenv("COLUMNS", str(request.param))
        yield request.param


@pytest.mark.parametrize(
    ("show", "lines"),
    [(console.print_evaluation, WIDE), (console.print_comparison, PAIRS), (console.print_orphans, PAIRS)],
)
def test_tables_and_footers_fit_the_screen(width, capsys, show, lines):
    show(Result(lines))
    out = capsys.readouterr().out
    assert max(map(len, out.splitlines())) <= width
    assert lines[1][0] in out
    assert " ".join(out.split()).endswith(" ".join(f"{LONG} {Result.warnings[0]}".split()))


def test_intervals_are_left_out_from_the_right_and_then_columns(width):
    assert console.fitted(PAIRS, 400) == PAIRS
    found = console.fitted(PAIRS, 100)
    assert found[1][-1] == "0.223"
    kept = console.fitted(PAIRS, 130, keep=["max cosine"])
    assert kept[1][-1] == "0.2230 [0.2211, 0.2249]"
    assert kept[1][-2] == "0.223"
    assert console.fitted(PAIRS, 59) == [["", "shared"], [PAIRS[1][0], "0.00879"]]


def test_without_a_screen_a_page_is_100_columns_wide(monkeypatch, capsys):
    with monkeypatch.context() as patch:
        patch.delenv("COLUMNS", raising=False)
        console.print_evaluation(Result(WIDE))
    assert max(map(len, capsys.readouterr().out.splitlines())) <= 100


def test_numbers_are_rounded_and_texts_move_no_cursor(capsys):
    console.print_facts(
        {"fvu": 0.8245675570674595, "rows": 16384, "d": 8.0, "betas": [0.9, 0.999], "none": None, "lr": 1e-4,
         "provenance": {"data\x1b[2J": "a\x1b[31mb\x07"}}
    )  # fmt: skip
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert lines == [["fvu", "0.8246"], ["rows", "16384"], ["d", "8"], ["betas", "0.9,", "0.999"], ["lr", "0.0001"],
                     ["provenance:"], ["data?[2J", "a?[31mb?"]]  # fmt: skip
    console.print_table([["", "x"], ["a\x1b[31m", "1"]])
    console.print_text("b\x1b[31m")
    assert "\x1b" not in capsys.readouterr().out


def test_a_curve_fits_the_screen(width, capsys):
    metrics = {name: {"value": 0.123456} for name in ("fvu", "l0", "ce_sae", "ce_recovered_zero", "rsa")}
    console.print_curve([{"latents": 1024, "metrics": metrics}, {"latents": 16, "metrics": {}}])
    assert max(map(len, capsys.readouterr().out.splitlines())) <= width
