"""The pages of the studies follow from their stored numbers, by today's rule, and begin with their caveats."""

from __future__ import annotations

import importlib.util
import json
import math
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest

from saekit.files import read_json
from saekit.measure.results import Measured
from saekit.measure.verdicts import Stored
from saekit.places import without_local_paths

STUDIES = Path(__file__).parents[2] / "studies"


def script(path: str) -> Any:
    """Return a script of a study as a module."""
    file = STUDIES / path
    spec = importlib.util.spec_from_file_location(path.replace("/", "_").removesuffix(".py"), file)
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    sys.path.insert(0, str(file.parent))  # as when it is run: it may import what lies beside it
    try:
        spec.loader.exec_module(module)
    finally:
        sys.path.remove(str(file.parent))
    return module


def same(stored: Any, found: Any) -> bool:
    """Return whether two results agree: numbers up to the rounding of sums, which processors order differently."""
    if isinstance(stored, dict):
        return stored.keys() == found.keys() and all(same(each, found[name]) for name, each in stored.items())
    if isinstance(stored, list | tuple):
        return len(stored) == len(found) and all(map(same, stored, found))
    if isinstance(stored, float):
        return math.isclose(stored, found, rel_tol=1e-9, abs_tol=1e-12)
    return bool(stored == found)


STORED = [*STUDIES.rglob("*.json"), *(STUDIES.parent / "benchmarks").glob("*.json")]


@pytest.mark.parametrize("path", STORED, ids=lambda path: str(path.relative_to(STUDIES.parent)))
def test_stored_numbers_name_no_folder_of_the_machine_that_made_them(path):
    value = json.loads(path.read_text(encoding="utf-8"))
    assert json.dumps(without_local_paths(value)) == json.dumps(value)


@pytest.fixture(scope="module")
def transfer() -> Any:
    return script("transfer/run.py")


def test_the_page_of_transfer_follows_from_its_stored_numbers(transfer):
    kept = transfer.loaded()
    page = (STUDIES / "transfer" / "README.md").read_text(encoding="utf-8")
    assert transfer.page(kept["results"], kept["seconds"]) == page


def test_the_page_of_seeds_follows_from_its_stored_numbers():
    verdicts = script("seeds/verdicts.py")
    found = read_json(STUDIES / "seeds" / "results.json")
    assert same(found["claims"], verdicts.claims(found))
    assert verdicts.page(found) == (STUDIES / "seeds" / "README.md").read_text(encoding="utf-8")


def test_the_page_of_stabilizers_follows_from_its_stored_numbers(monkeypatch):
    monkeypatch.syspath_prepend(STUDIES / "seeds")
    pages = script("seeds/stabilizers_page.py")
    found = read_json(STUDIES / "seeds" / "stabilizers.json")
    assert same(found["claims"], pages.claims(found))
    text = (STUDIES / "seeds" / "stabilizers.md").read_text(encoding="utf-8")
    assert pages.page(found) == text
    assert -1 < text.index("**Before you read on") < text.index("|")


def test_the_page_of_sizes_follows_from_its_stored_numbers(tmp_path):
    page = script("progressive/page.py")
    page.write(sorted((STUDIES / "progressive" / "results").glob("*.json")), tmp_path / "README.md")
    expected = (STUDIES / "progressive" / "README.md").read_text(encoding="utf-8")
    assert (tmp_path / "README.md").read_text(encoding="utf-8") == expected


def test_the_page_of_classify_follows_from_its_stored_numbers(monkeypatch):
    monkeypatch.syspath_prepend(STUDIES / "classify")
    run = script("classify/run.py")
    config = tomllib.loads((STUDIES / "classify" / "config.toml").read_text(encoding="utf-8"))
    assert run.page(config, STUDIES / "classify") == (STUDIES / "classify" / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("study", ["classify", "progressive", "seeds", "transfer"])
def test_caveats_come_before_numbers(study):
    text = (STUDIES / study / "README.md").read_text(encoding="utf-8")
    assert -1 < text.index("**Before you read on") < text.index("|")


def test_numbers_of_which_only_their_own_intervals_are_stored_differ_by_no_more_than_both(transfer):
    one, other = Stored(Measured(0.9, 0.88, 0.92), 30), Stored(Measured(0.85, 0.82, 0.88), 20)
    gap = one.minus(other)
    assert (gap.difference.value, gap.difference.low, gap.difference.high) == pytest.approx((0.05, 0.0, 0.1))
    assert gap.degrees == 20
    assert one.minus(Stored(Measured(0.5))).difference.low is None
    assert math.isinf(transfer.stored({"value": 1.0, "low": 0.9, "high": 1.0, "unit": ""}, {"values": []}).degrees)
