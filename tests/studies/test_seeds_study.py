"""The study of seeds: its plan trains nothing twice, and its verdicts are what the intervals say."""

from __future__ import annotations

import importlib.util
import sys
from itertools import combinations
from pathlib import Path

import pytest

STUDY = Path(__file__).resolve().parents[2] / "studies" / "seeds"


@pytest.fixture(scope="module")
def study():
    """The two modules of the study: ``run`` and ``verdicts``."""
    found = {}
    for name in ("verdicts", "run"):
        spec = importlib.util.spec_from_file_location(name, STUDY / f"{name}.py")
        found[name] = importlib.util.module_from_spec(spec)
        sys.modules[name] = found[name]  # run imports verdicts by its name
        spec.loader.exec_module(found[name])
    yield found
    for name in found:
        del sys.modules[name]


def cell(shared: dict[int, float], **facts) -> dict:
    """A cell whose pair (i, j) shares the mean of what i and j are given."""
    m = len(shared)
    pairs = [(shared[i] + shared[j]) / 2 for i, j in combinations(range(m), 2)]
    names = ("shared", "equal", "cosine_decoder", "cosine_encoder", "max_cosine")
    return {"m": m, "pairs": dict.fromkeys(names, pairs), "model": "a", "sweeps": ["width"], **facts}


@pytest.mark.parametrize("quick", [True, False])
def test_every_cell_once_and_in_all_its_sweeps(study, quick):
    config = study["run"].settings(STUDY / "config.toml", quick)
    for name, model in config["models"].items():
        cells = study["run"].plan(name, model, config["seeds"])
        assert len({each["id"] for each in cells}) == len(cells)
        [base] = [each for each in cells if "base" in each["sweeps"]]
        assert {"base", "width", "sparsity", "length", "layer"} <= set(base["sweeps"])
        assert base["seeds"] == model["law_seeds"]
        for each in cells:
            assert each["k"] <= each["latents"]
            study["run"].config_of(each)  # every configuration is valid
        found = {"cells": [each | {"m": each["seeds"]} for each in cells]}
        for sweep, by in (("width", "latents"), ("sparsity", "k"), ("length", "rows"), ("layer", "layer")):
            assert [each[by] for each in study["verdicts"].swept(found, name, sweep, by)] == sorted(
                model[{"layer": "layers"}.get(sweep, sweep)]
            )


def test_slopes_and_verdicts(study):
    verdicts = study["verdicts"]
    noise = {0: 0.01, 1: -0.01, 2: 0.0, 3: 0.005}
    falling = [
        cell({seed: 0.5 - 0.1 * step + each for seed, each in noise.items()}, latents=2**step) for step in range(4)
    ]
    slope = verdicts.slope(falling, [each["latents"] for each in falling], "shared")
    assert slope["value"] == pytest.approx(-0.1)
    assert slope["low"] == pytest.approx(-0.1)  # the noise is that of the seeds, the same in all cells
    assert verdicts.verdict(slope, -1) == "reproduced"
    assert verdicts.verdict(slope, 1) == "refuted"
    assert verdicts.verdict({"value": 0.0, "low": -0.1, "high": 0.1}, 1) == "undecided"
    assert verdicts.verdict({"value": 0.65, "low": 0.6, "high": 0.7}, -1, 0.5) == "refuted"
    assert verdicts.verdict({"value": 0.5, "low": 0.495, "high": 0.506}, -1, 0.5) == "no difference"
    assert verdicts.verdict(None, 1) == verdicts.verdict({"value": 1.0, "low": None, "high": None}, 1) == "undecided"
    mean = verdicts.jackknife(lambda seeds: verdicts.mean_of(falling[0], "shared", seeds), 4)
    assert mean["low"] < mean["value"] < mean["high"]
    assert verdicts.jackknife(lambda seeds: 1.0, 2)["low"] is None


def test_a_trend_is_mixed_where_a_step_goes_the_other_way(study):
    verdicts = study["verdicts"]
    noise = {0: 0.01, 1: -0.01, 2: 0.0}

    def outcome(levels):
        cells = [cell({s: v + e for s, e in noise.items()}, latents=2**i) for i, v in enumerate(levels)]
        estimate, is_mixed = verdicts.trend(cells, "latents", "shared", -1)
        return "mixed" if is_mixed else verdicts.verdict(estimate, -1)

    assert outcome([0.5, 0.4, 0.3]) == "reproduced"
    assert outcome([0.3, 0.4, 0.5]) == "refuted"
    assert outcome([0.5, 0.6, 0.1]) == "mixed"
    assert outcome([0.5, 0.499, 0.498]) == "no difference"  # it falls, by less than the margin


def test_claims_of_a_page_are_decided_together_and_over_all_models(study):
    verdicts = study["verdicts"]

    def listed(half, n, model="a"):
        estimate = {"value": 0.05, "low": 0.05 - half, "high": 0.05 + half, "seeds": 5}
        claim = verdicts.Claim(verdicts.claim_of(estimate, 1))
        return [{"claim": str(at), "model": model, "verdict": None, "judged": claim} for at in range(n)]

    assert [each["verdict"] for each in verdicts.decided(listed(0.035, 1))] == ["reproduced"]
    assert {each["verdict"] for each in verdicts.decided(listed(0.035, 30))} == {"undecided"}
    two = verdicts.decided(listed(0.01, 1) + listed(0.5, 1, "b"))
    assert {each["over_models"] for each in two} == {"reproduced in 1 of 2, undecided in 1 of 2"}
    assert "judged" not in two[0]


def test_stored_offsets_are_decided_by_todays_rule(study):
    """Nine seeds do not tell an offset from none, whatever a fit at its bound says."""
    zero = {"value": 0.0, "low": 0.0, "high": 0.0, "unit": ""}
    numbers = {"error": 0.0, "plain_error": 0.0, "held_out": 0.0, "plain_held_out": 0.0, "verdict": "no offset"}
    base = cell(dict.fromkeys(range(9), 0.5), law={"offset": zero, **numbers}, sweeps=["base"])
    [law] = [each for each in study["verdicts"].claims({"cells": [base], "orphans": {}}) if each["key"] == "law"]
    assert law["verdict"] == "undecided"
    assert law["estimate"]["low"] is None


def test_dead_latents_can_be_left_out_of_a_share(study):
    verdicts = study["verdicts"]
    dead = [0.5, 0.0, 0.25]
    one = cell({0: 0.3, 1: 0.3, 2: 0.3}, dead_fraction=dead)
    table = verdicts.table_of(one, "shared" + verdicts.LIVE)
    assert table[0, 1] == table[1, 0] == pytest.approx(0.3 / 0.75)
    assert table[1, 2] == pytest.approx(0.3 / 0.875)
    alive = cell({0: 0.3, 1: 0.3, 2: 0.3}, dead_fraction=[0.0] * 3)
    assert verdicts.mean_of(alive, "shared" + verdicts.LIVE, [0, 1, 2]) == verdicts.mean_of(alive, "shared", [0, 1, 2])


def test_sparsity_must_match_for_a_verdict_on_architectures(study):
    same = {0: 0.1, 1: 0.12, 2: 0.11}
    cells = [
        cell({seed: base + each for seed, each in same.items()}, arch=arch, l0=[l0], sweeps=["architecture"])
        for arch, base, l0 in (("topk", 0.0, 16), ("relu", 0.5, 16.5), ("gated", 0.5, 30))
    ]
    found = {
        each["claim"].split()[0]: each
        for each in study["verdicts"].claims({"cells": cells, "orphans": {}})
        if each["key"] == "architecture"
    }
    assert found["relu"]["verdict"] == "reproduced"
    assert found["gated"]["verdict"] == "undecided"
    assert "not matched" in found["gated"]["what"]


def test_stabilizers_are_compared_at_the_fvu_that_they_have(study, monkeypatch):
    monkeypatch.syspath_prepend(STUDY)
    spec = importlib.util.spec_from_file_location("stabilizers_page", STUDY / "stabilizers_page.py")
    pages = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(pages)

    def made(method: str, shared: float, fvu: float) -> dict:
        pairs = [shared + 0.001 * (i + j) for i, j in combinations(range(6), 2)]
        names = ("shared", "pw_mcc", "recovered")
        return {"m": 6, "place": "a", "method": method, "pairs": dict.fromkeys(names, pairs), "fvu": [fvu] * 6}

    cells = {each["method"]: each for each in (
        made("TopK, 96 latents", 0.4, 0.3), made("TopK", 0.2, 0.2), made("L2 .01", 0.32, 0.25)
    )}  # fmt: skip
    listed = []
    pages._of_method(lambda *each: listed.append(each), cells, "a", "L2 .01", "")
    values = {claim: round(estimate["value"], 6) for claim, _, _, estimate, _ in listed}
    # at equal L0 it shares .12 more; half-way between two widths TopK shares .3, .02 less
    assert values["L2 .01 raises shared, at equal L0"] == 0.12
    assert values["L2 .01 raises shared, at equal L0 and equal FVU"] == 0.02
    assert pages._family("L2 .01 raises shared, at equal L0") == pages._family("aligned raises shared, at equal L0")
