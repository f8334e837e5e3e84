"""Several ranks: every verb that is split does what one process does, and all of them end when one does."""

from __future__ import annotations

import inspect
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import saekit
from saekit import ranks
from saekit.errors import ConfigError

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="ranks are forked")


@pytest.fixture(scope="module")
def launch(tmp_path_factory):
    """The one launch that all tests look at: its folder, what the jobs found, and what was told on stderr."""
    folder = tmp_path_factory.mktemp("ranks")
    tests = Path(__file__).parent
    paths = os.pathsep.join([str(tests), str(tests.parent / "src"), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "TMPDIR": str(folder)}
    script = str(Path(__file__).with_name("rank_verbs.py"))
    done = subprocess.run(
        [sys.executable, script, str(folder)], env=environment, capture_output=True, text=True, timeout=400
    )
    assert done.returncode == 0, done.stderr
    return folder, json.loads((folder / "found.json").read_text()), done.stderr


@pytest.fixture(scope="module")
def found(launch):
    return launch[1]


def test_every_verb_gives_on_two_ranks_what_it_gives_alone_bit_for_bit(found):
    [alone] = found["one"]
    assert "value" in alone, alone
    for each in found["two"]:
        assert "value" in each, each
        assert each["value"].keys() == alone["value"].keys()
        for name, value in alone["value"].items():
            assert each["value"][name] == value, name


def test_both_ranks_measured_something(found):
    assert found["one"][0]["value"]["evaluate rows"]["n_rows"] == 700
    assert set(found["one"][0]["value"]["evaluate a crosscoder"]["entries"][0]["sources"]) == {"base", "tuned"}
    assert found["one"][0]["value"]["evaluate a model"]["language_model"]["n_tokens"] >= 300


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("settings", "evaluate: all ranks must have the same settings, rows and versions; on rank 1 `settings.seed`"),
        ("rows", "on rank 1 `rows[0].digest` is"),
        ("sae", "on rank 1 `saes."),
        ("texts", "capture: all ranks must have the same settings, rows and versions; on rank 1 `rows.layers.1."),
        ("latents", "explain: all ranks must have the same settings, rows and versions; on rank 1 `settings.latents"),
        ("verb", "all ranks must be called for the same; rank 1 was called for train"),
        ("no rows", "evaluate: rows or a language model with texts must be given"),
    ],
)
def test_ranks_that_were_started_for_different_things_are_refused(found, name, message):
    for each in found["refused"]:
        error, said = each["value"][name]
        assert error == "ConfigError", said
        assert message in said


def test_only_rank_0_prints_and_writes(launch):
    folder, found, _ = launch
    first, other = (each["value"]["evaluate"] for each in found["commands"])
    assert (first[0], other[0]) == (0, 0)
    assert "1,500 rows" in first[1]
    assert other[1:] == ["", ""]
    assert [path.name for path in (folder / "evaluated").iterdir()] == ["evaluation.json"]
    first, other = (each["value"]["capture"] for each in found["commands"])
    assert (first[0], other[0]) == (0, 0), other
    assert "n_rows" in first[1]
    assert other[1:] == ["", ""]


@pytest.mark.parametrize("name", ["compare", "show"])
def test_a_command_that_is_not_split_is_refused_on_every_rank(found, name):
    for each in found["commands"]:
        status, out, err = each["value"][name]
        assert (status, out) == (2, "")
        assert f"{name}: one process must do this, because its work is not split over ranks; got WORLD_SIZE=2" in err


def test_a_full_disk_on_rank_0_ends_all_and_leaves_no_file(launch):
    folder, found, _ = launch
    (status, _, err), (other, _, told) = (each["value"] for each in found["full disk"])
    assert (status, other) == (1, 1)
    assert "No space left on device" in err
    assert "rank 0 of 2 has ended with an error: OSError: [Errno 28] No space left on device" in told
    assert not list((folder / "full").glob("*.json"))


def test_a_full_disk_leaves_a_capture_that_goes_on(found):
    first, other = (each["value"] for each in found["full disk of rows"])
    assert first["first"] == ["OSError", "[Errno 28] No space left on device"]
    assert other["first"][0] == "RankError"
    assert "rank 0 of 2 has ended with an error: OSError" in other["first"][1]
    assert first["left"][0] == "FormatError"
    assert "was not finished" in first["left"][1]
    for each in found["rows again"]:
        assert each["value"]["again"][1:] == each["value"]["whole"][1:]


def test_nan_on_one_rank_ends_the_other_which_says_where_and_why(found):
    first, other = found["nan"]
    assert (first["error"], other["error"]) == ("RankError", "DataError")
    assert "rank 1 of 2 has ended with an error: DataError: `x_hat` must be finite" in first["message"]


def test_a_killed_rank_ends_the_other_within_a_minute(found):
    first, other = found["killed"]
    assert (first["error"], other["error"]) == ("RankError", "killed")
    assert "rank 0 of 2 gets no answer from another" in first["message"]
    assert first["seconds"] < 60


def test_a_rank_that_is_frozen_is_missed(launch):
    _, found, told = launch
    assert "rank 1 of 2 has given no sign of life for 2 s" in str(found["frozen"][0].get("message")) + told


def test_a_rank_that_does_nothing_is_missed_and_named(launch):
    _, found, told = launch
    said = str(found["idle"][0].get("message")) + told
    assert "no rank has worked for 2 s: all wait for rank 1 of 2, which is alive and does nothing" in said


def test_a_long_step_is_not_taken_for_a_hang(found):
    assert found["busy"][0].keys() == found["busy"][1].keys() == {"value", "seconds"}
    assert found["busy"][0]["seconds"] > 2.5


UNSPLIT = ["compare", "orphans", "rank", "prune", "measure_sizes", "progressive", "transfer", "effects", "steer"]


@pytest.mark.parametrize("name", UNSPLIT)
def test_a_verb_that_is_not_split_is_refused_before_it_looks_at_anything(monkeypatch, name):
    """Unless one rank calls it by itself: then what is wrong with the call is told."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    verb = getattr(saekit, name)
    given = [each for each in inspect.signature(verb).parameters.values() if each.default is each.empty]
    positional = [7 for each in given if each.kind is not each.KEYWORD_ONLY]
    named = {each.name: 7 for each in given if each.kind is each.KEYWORD_ONLY}
    with pytest.raises(ConfigError, match=f"{name}: one process must do this, because its work is not split"):
        verb(*positional, **named)
    with ranks.alone(), pytest.raises(Exception, match=r"^(?!.*one process must)"):
        verb(*positional, **named)


def test_without_ranks_nothing_is_refused_and_parts_come_as_they_are(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    ranks.refuse("compare")
    assert list(ranks.in_order(ranks.ALONE, [(0, "a"), (1, "b")])) == ["a", "b"]
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match="compare: one process must do this"):
        ranks.refuse("compare")


def test_shown_words_of_a_silent_and_of_an_idle_rank(monkeypatch):
    watch = ranks._Watch.__new__(ranks._Watch)
    signs = [ranks._Sign() for _ in range(3)]
    now = signs[0].changed
    assert watch._missed(signs, now) == ""
    for number, sign in enumerate(signs):
        sign.see(f"1 0.0 1 {7 - number % 2}", now)
    assert watch._missed(signs, now + ranks.SILENT - 1) == ""
    signs[0].see("2 9.0 1 7", now + ranks.SILENT)
    assert "rank 1 of 3 has given no sign of life" in watch._missed(signs, now + ranks.SILENT + 1)
    late = now + ranks.SILENT + 1
    for sign in signs:
        sign.see("3 9.0 1 7", late)
    assert watch._missed(signs, late) == ""
    for sign in signs:  # alive, but none used the processor since
        sign.see("9 9.01 1 7", late + ranks.IDLE + 1)
    assert "no rank has worked" in watch._missed(signs, late + ranks.IDLE + 1)
    signs[2].see("10 9.01 0 7", late + ranks.IDLE + 1)  # one waits for something outside
    assert watch._missed(signs, late + ranks.IDLE + 1) == ""
