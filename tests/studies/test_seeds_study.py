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
        sweeps = (
            {"base", "width", "sparsity"} if "beside" in model else {"base", "width", "sparsity", "length", "layer"}
        )
        assert sweeps <= set(base["sweeps"])
        assert base["seeds"] == model["law_seeds"]
        for each in cells:
            assert each["k"] <= each["latents"]
            study["run"].config_of(each, each["rows"])  # every configuration is valid
        found = {"cells": [each | {"m": each["seeds"]} for each in cells]}
        for sweep, by in (("width", "latents"), ("sparsity", "k"), ("length", "rows"), ("layer", "layer")):
            wanted = model.get({"layer": "layers"}.get(sweep, sweep), [])
            assert [each[by] for each in study["verdicts"].swept(found, name, sweep, by)] == wanted


def test_a_second_data_set_has_the_base_of_the_first(study):
    models = study["run"].settings(STUDY / "config.toml", quick=False)["models"]
    beside = {name: model["beside"] for name, model in models.items() if "beside" in model}
    assert set(beside.values()) == set(models) - set(beside)
    for name, other in beside.items():
        for key in ("model", "captured", "base", "batch_rows", "width", "sparsity"):
            assert models[name][key] == models[other][key]
        assert models[name]["data"] != models[other]["data"]


def test_what_is_kept_is_what_a_run_would_have_written(study, monkeypatch, tmp_path):
    run = study["run"]
    found = run.read_json(STUDY / "results.json")
    kept = run.Study(run.settings(STUDY / "config.toml", quick=False), tmp_path)
    kept.restore(found)
    assert kept.results() | {"claims": found["claims"]} == found
    monkeypatch.setattr(kept, "_cell", lambda cell: pytest.fail(f"made again: {cell['id']}"))
    kept.cells()


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


def test_other_data_are_compared_as_seeds_are(study):
    """Two data sets, three seeds: .5 within, .3 across, .4 across where the first weights are the same."""
    verdicts, noise = study["verdicts"], {0: 0.001, 1: -0.001, 2: 0.0}

    def pair(i, j):
        return 0.5 if i // 3 == j // 3 else 0.4 if i % 3 == j % 3 else 0.3

    across = {"m": 6, "pairs": {"shared": [pair(i, j) for i, j in combinations(range(6), 2)]}, "beside": "a"}
    means = [verdicts.across_data(across, "shared", pairs)([0, 1, 2]) for pairs in verdicts.ACROSS]
    assert means == pytest.approx([0.5, 0.3, 0.4])

    def listed(level):
        cells = [
            cell({seed: at + each for seed, each in noise.items()}, model=model, sweeps=["base"])
            for model, at in (("a", 0.5), ("b", level))
        ]
        found = {"cells": cells, "orphans": {}, "across": {"b": across}}
        return {each["claim"]: each["verdict"] for each in verdicts.claims(found)}

    assert listed(0.5)["overlap is of the same size on other data"] == "reproduced"
    assert listed(0.6)["overlap is of the same size on other data"] == "refuted"
    assert listed(0.5)["SAEs of two data sets share less than seeds of one"] == "reproduced"
    assert listed(0.5)["the same first weights: SAEs of two data sets share more"] == "reproduced"


def test_mlps_are_compared_with_the_residual_stream_of_their_block(study):
    cells = [
        cell({0: 0.1 + more, 1: 0.12 + more, 2: 0.11 + more}, layer=layer, sweeps=sweeps, fvu=[0.1])
        for layer, more, sweeps in ((2, 0.0, ["base", "layer"]), (0, 0.5, ["layer"]), ("2.mlp", 0.3, ["layer"]))
    ]
    listed = [each for each in study["verdicts"].claims({"cells": cells, "orphans": {}}) if each["key"] == "site"]
    assert [each["verdict"] for each in listed] == ["reproduced"] * 2
    assert [each["estimate"]["value"] for each in listed] == pytest.approx([0.3] * 2)


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


@pytest.fixture
def stabilizers(study, monkeypatch):
    """The module of the page of stabilizers."""
    monkeypatch.syspath_prepend(STUDY)
    return loaded("stabilizers_page", monkeypatch)


def loaded(name: str, monkeypatch):
    spec = importlib.util.spec_from_file_location(name, STUDY / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, name, module)
    spec.loader.exec_module(module)
    return module


def steady(method: str, shared: float, fvu: float, m: int = 6) -> dict:
    """A cell of stabilizers, whose pairs differ a little."""
    pairs = [shared + 0.001 * (i + j) for i, j in combinations(range(m), 2)]
    names = ("shared", "pw_mcc", "recovered")
    return {"m": m, "place": "a", "method": method, "pairs": dict.fromkeys(names, pairs), "fvu": [fvu] * m}


def test_stabilizers_are_compared_at_the_fvu_that_they_have(stabilizers):
    cells = {each["method"]: each for each in (
        steady("TopK, 96 latents", 0.4, 0.3), steady("TopK", 0.2, 0.2, m=8), steady("L2 .01", 0.32, 0.25),
        steady("frozen decoder", 0.0, 0.5),
    )}  # fmt: skip
    listed = stabilizers.Claims()
    for method in ("L2 .01", "frozen decoder"):
        stabilizers.of_method(listed, cells, "a", method)
    values = {(each["key"], each["claim"]): round(each["estimate"]["value"], 6) for each in listed.listed}
    # at equal L0 it shares .12 more; half-way between two widths TopK shares .3, .02 less
    assert values["shared", "L2 .01"] == pytest.approx(0.12, abs=0.002)  # TopK's first six of eight seeds
    assert values["equal FVU", "L2 .01"] == 0.02
    assert ("shared", "frozen decoder") in values
    assert ("equal FVU", "frozen decoder") not in values  # no width is that bad


def test_a_width_of_fewer_seeds_gives_those_it_has(stabilizers):
    cells = {each["method"]: each for each in (
        steady("TopK, 96 latents", 0.4, 0.3, m=3), steady("TopK", 0.2, 0.2, m=9), steady("aligned", 0.32, 0.25, m=9),
    )}  # fmt: skip
    listed = stabilizers.Claims()
    stabilizers.of_method(listed, cells, "a", "aligned")
    found = {each["key"]: each["estimate"] for each in listed.listed}
    assert {each["seeds"] for each in found.values()} == {9}
    assert found["equal FVU"]["value"] == pytest.approx(0.32 + 0.008 - (0.4 + 0.002 + 0.2 + 0.008) / 2)
    assert found["equal FVU"]["high"] > found["equal FVU"]["value"]


def test_the_seeds_that_would_decide_are_those_whose_interval_does(stabilizers):
    estimate = {"value": 0.03, "low": 0.0, "high": 0.06, "seeds": 8}
    effects, seeds, needed = stabilizers._needed(estimate, 1).split("; ")
    error, level = 0.03 / stabilizers.student(7), 1 - 0.05 / stabilizers.LOOKS
    half = stabilizers.student(7, level) * error
    assert (effects, seeds) == (f"{0.03 - half:.3f} to {0.03 + half:.3f}", "8 seeds")
    halves = [stabilizers.student(n - 1, level) * error * (8 / n) ** 0.5 for n in (int(needed) - 1, int(needed))]
    assert halves[1] < 0.02 < halves[0]  # from there on the whole interval lies beyond the margin .01
    assert stabilizers._needed(estimate, 10).split("; ")[2] > needed  # a family asks for more
    assert "over 1,000" in stabilizers._needed(estimate | {"value": 0.0101}, 1)


def test_kept_cells_are_made_no_second_time(stabilizers, monkeypatch, tmp_path):
    run = loaded("stabilizers", monkeypatch)
    spec = run.Study(tmp_path, quick=False).digest("synthetic", "TopK")
    stored = {"cells": [
        {"spec": spec, **steady("TopK", 0.2, 0.2, m=5), "place": "synthetic"},
        {"spec": "of other settings", **steady("L2 .01", 0.2, 0.2, m=5), "place": "synthetic"},
    ]}  # fmt: skip
    study, made = run.Study(tmp_path, False, stored), []
    monkeypatch.setattr(run.Study, "trained", lambda self, place, method, seeds: made.append((method, seeds)) or [])

    def measured(self, place, method, paths):
        return steady(method, 0.3, 0.2, m=7) | {"place": place}

    monkeypatch.setattr(run.Study, "measured", measured)
    for method, seeds in (("TopK", 5), ("L2 .01", 5), ("TopK", 7)):
        study.cell("synthetic", method, seeds)
    assert made == [("L2 .01", 5), ("TopK", 7)]
    assert {cell["method"]: cell["m"] for cell in study.cells()} == {"TopK": 7, "L2 .01": 7}


def test_that_there_is_no_difference_can_be_claimed(stabilizers):
    listed = stabilizers.Claims()
    for place, value in (("a", 0.001), ("b", 0.3), ("c", -0.3), ("d", 0.02)):
        half = 0.05 if place == "d" else 0.0005
        estimate = {"value": value, "low": value - half, "high": value + half, "seeds": 6}
        listed.add("random", "score", place, estimate, says="none")
    words = {each["model"]: each["verdict"] for each in listed.decided()}
    assert words == {"a": "reproduced", "b": "refuted", "c": "refuted", "d": "undecided"}


def test_random_weights_are_a_family_of_their_own(stabilizers):
    listed = stabilizers.Claims()
    estimate = {"value": 0.05, "low": 0.025, "high": 0.075, "seeds": 6}
    for place in ("a", *(f"{name}, random weights" for name in "bcdefgh")):
        listed.add("shared", "L2 .01", place, estimate)
    words = [each["verdict"] for each in listed.decided()]
    assert words == ["reproduced"] + ["undecided"] * 7


def test_more_seeds_train_only_those_that_are_not_there(stabilizers, monkeypatch, tmp_path):
    run = loaded("stabilizers", monkeypatch)
    calls = []

    def chunk(self, place, method, folder, seeds):
        calls.append(seeds)
        return [folder / "run" / f"sae-seed{seed}" for seed in seeds]

    monkeypatch.setattr(run.Study, "chunk", chunk)
    study = run.Study(tmp_path, quick=False)
    first = study.trained("synthetic", "TopK", 3)
    assert study.trained("synthetic", "TopK", 3) == first
    assert study.trained("synthetic", "TopK", 5)[:3] == first
    assert calls == [[0, 1, 2], [3, 4]]
    assert len(set(study.trained("synthetic", "TopK", 5))) == 5
    assert study.trained("synthetic", "L2 .01", 2) != first[:2]
    calls.clear()  # seeds that pull each other are trained in one call
    for seeds in (3, 5, 3):
        study.trained("synthetic", "mutual .1, together", seeds)
    assert calls == [[0, 1, 2], [0, 1, 2, 3, 4]]


def test_every_cell_of_the_queue_can_be_made_and_shown(stabilizers, monkeypatch):
    run = loaded("stabilizers", monkeypatch)
    for places, methods, seeds in run.QUEUE:
        assert set(places) <= set(run.PLACES)
        assert seeds >= 3
        for method in methods:
            run.METHODS[method].config(8)  # a valid configuration
    assert set(stabilizers.PAPER) | set(stabilizers.BUDGETS) | set(stabilizers.WIDTHS) <= set(run.METHODS)
