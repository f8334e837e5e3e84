"""Cells over a shared folder: real processes that work together, die, sleep, are interrupted, or do not belong."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from saekit.errors import ConfigError, SaekitError, StorageError
from saekit.files import write_json
from saekit.grid import CLAIMS, Cell, Sharing, check_part, compute_cells

WORKER = """
import os, signal, sys, time
from pathlib import Path
from saekit.files import write_json
from saekit.grid import Cell, Sharing, compute_cells

signal.signal(signal.SIGINT, signal.default_int_handler)
folder, n, seconds, lease = Path(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3]), float(sys.argv[4])

def compute(name):
    with open(folder / "log", "a") as log:
        log.write(f"{name} {os.getpid()}\\n")
    time.sleep(seconds)
    return {"name": name, "square": int(name) ** 2}

cells = [
    Cell(str(i), (folder / f"{i}.json").exists, lambda i=i: compute(str(i)),
         lambda found, i=i: write_json(folder / f"{i}.json", found))
    for i in range(n)
]
print(compute_cells(folder, cells, facts={"seed": 0}, sharing=Sharing(lease=lease)), flush=True)
"""


class Team:
    """Worker processes over one folder; whatever happens, none outlives the test."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.all = folder, []

    def start(self, n: int, seconds: float, lease: float = 60.0) -> subprocess.Popen[str]:
        arguments = [sys.executable, "-c", WORKER, str(self.folder), str(n), str(seconds), str(lease)]
        source = str(Path(__file__).parents[1] / "src")
        process = subprocess.Popen(
            arguments,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": source},
        )
        self.all.append(process)
        return process

    def begun(self) -> list[list[str]]:
        """Name and process of every cell that was begun."""
        log = self.folder / "log"
        return [line.split() for line in log.read_text().splitlines()] if log.exists() else []

    def wait_for(self, condition: Callable[[], bool]) -> None:
        until = time.monotonic() + 60
        while not condition():
            assert time.monotonic() < until, "it took too long"
            time.sleep(0.01)


@pytest.fixture
def team(tmp_path: Path) -> Iterator[Team]:
    found = Team(tmp_path)
    yield found
    for process in found.all:
        if process.poll() is None:
            process.send_signal(signal.SIGCONT)
            process.kill()
        process.communicate()


def results(folder: Path) -> dict[str, int]:
    return {path.stem: json.loads(path.read_text())["square"] for path in sorted(folder.glob("*.json"))}


def test_two_processes_share_a_grid_and_do_nothing_twice(team: Team) -> None:
    workers = [team.start(12, 0.05) for _ in range(2)]
    counts = [int(worker.communicate(timeout=60)[0]) for worker in workers]
    assert sum(counts) == 12
    assert sorted(int(name) for name, _ in team.begun()) == list(range(12))
    assert results(team.folder) == {str(i): i**2 for i in range(12)}
    assert not (team.folder / CLAIMS).exists()


def test_the_cell_of_a_killed_process_is_done_once_more(team: Team) -> None:
    killed = team.start(2, 60)
    team.wait_for(lambda: len(team.begun()) == 1)
    killed.kill()
    killed.communicate()
    assert team.start(2, 0, lease=60).communicate(timeout=60)[0] == "2\n"  # at once: the process is known to be dead
    assert [name for name, _ in team.begun()] == ["0", "0", "1"]
    assert results(team.folder) == {"0": 0, "1": 1}
    assert not (team.folder / CLAIMS).exists()


def test_the_claim_of_a_machine_that_is_silent_expires(team: Team) -> None:
    silent = team.start(1, 0.5, lease=1.5)
    team.wait_for(lambda: len(team.begun()) == 1)
    silent.send_signal(signal.SIGSTOP)
    other = team.start(1, 0, lease=1.5)
    assert other.communicate(timeout=60)[0] == "1\n"
    assert len(team.begun()) == 2
    silent.send_signal(signal.SIGCONT)  # it came back, and finds its work done
    silent.communicate(timeout=60)
    assert silent.returncode == 0
    assert results(team.folder) == {"0": 0}


def test_ctrl_c_gives_the_claim_back(team: Team) -> None:
    stopped = team.start(1, 60)
    team.wait_for(lambda: len(team.begun()) == 1)
    stopped.send_signal(signal.SIGINT)
    stopped.communicate(timeout=60)
    assert stopped.returncode != 0
    assert [path.name for path in (team.folder / CLAIMS).iterdir()] == ["grid.json"]
    assert results(team.folder) == {}
    assert team.start(1, 0).communicate(timeout=60)[0] == "1\n"


# ---------------------------------------------------------------- in one process


def cells(folder: Path, n: int, compute: Callable[[int], object] = lambda i: i) -> list[Cell[object]]:
    def cell(i: int) -> Cell[object]:
        path = folder / f"{i}.json"
        return Cell(f"cell {i}", path.exists, lambda: compute(i), lambda found: write_json(path, found))

    return [cell(i) for i in range(n)]


@pytest.mark.parametrize(
    ("facts", "said"),
    [({"seed": 1, "sizes": [4]}, "agree on `seed`"), ({"seed": 0}, "agree on `sizes`"),
     ({"seed": 0, "sizes": [4], "more": 1}, "agree on `more`")],
)  # fmt: skip
def test_a_process_with_other_settings_is_refused(tmp_path: Path, facts: dict[str, object], said: str) -> None:
    def meanwhile(i: int) -> int:
        with pytest.raises(ConfigError, match=said):
            compute_cells(tmp_path, cells(tmp_path, 1, lambda _: pytest.fail("computed")), facts=facts)
        return i

    assert compute_cells(tmp_path, cells(tmp_path, 1, meanwhile), facts={"seed": 0, "sizes": (4,)}) == 1


def test_another_version_and_other_cells_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def meanwhile(i: int) -> int:
        with pytest.raises(ConfigError, match="agree on `cells`"):
            compute_cells(tmp_path, cells(tmp_path, 2), facts={})
        with monkeypatch.context() as patch:
            patch.setattr("saekit.grid.__version__", "9.9")
            with pytest.raises(ConfigError, match=r"agree on `saekit`; .* has '.*', and this process '9\.9'"):
                compute_cells(tmp_path, cells(tmp_path, 1), facts={})
        with pytest.raises(ConfigError, match="agree on how long a claim holds"):
            compute_cells(tmp_path, cells(tmp_path, 1), facts={}, sharing=Sharing(lease=7.0))
        return i

    assert compute_cells(tmp_path, cells(tmp_path, 1, meanwhile), facts={}) == 1
    assert compute_cells(tmp_path, cells(tmp_path, 2), facts={"other": 1}) == 1  # later, the folder is free


@pytest.mark.parametrize("sharing", [Sharing(), Sharing(part=(0, 1))])
def test_a_result_that_is_not_found_again_ends_the_work(tmp_path: Path, sharing: Sharing) -> None:
    computed: list[int] = []

    def compute() -> int:
        computed.append(1)
        assert len(computed) < 5, "computed again and again"
        return 1

    lost = Cell("lost", lambda: False, compute, lambda found: None)
    with pytest.raises(StorageError, match="the result of `lost` must be there once it is stored"):
        compute_cells(tmp_path, [lost], facts={}, sharing=sharing)
    assert len(computed) == 1
    assert not list(tmp_path.rglob("*.claim"))


def test_an_error_gives_the_claim_back(tmp_path: Path) -> None:
    def wrong(_: int) -> None:
        raise ValueError("no such thing")

    for _ in range(4):  # an error is no death
        with pytest.raises(ValueError, match="no such thing"):
            compute_cells(tmp_path, cells(tmp_path, 1, wrong), facts={})
        assert [path.name for path in (tmp_path / CLAIMS).iterdir()] == ["grid.json"]
    assert compute_cells(tmp_path, cells(tmp_path, 1), facts={}) == 1


def test_a_cell_over_which_three_processes_died_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(_: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("saekit.grid.remove_file", lambda path: None)  # nobody cleans up after the dead
    for _ in range(3):
        with pytest.raises(KeyboardInterrupt):
            compute_cells(tmp_path, cells(tmp_path, 1, interrupted), facts={})
    with pytest.raises(StorageError, match="`cell 0` must be computed by a process that lives; 3 died over it"):
        compute_cells(tmp_path, cells(tmp_path, 1, interrupted), facts={})


def test_the_parts_of_an_array_job_are_the_grid(tmp_path: Path) -> None:
    done: list[int] = []
    for i in range(3):
        part = Sharing(part=check_part(f"{i}/3", "--part"))
        mine = cells(tmp_path, 7, lambda i: done.append(i) or i)
        assert compute_cells(tmp_path, mine, facts={}, sharing=part) == [3, 2, 2][i]
    assert done == [0, 3, 6, 1, 4, 2, 5]
    assert compute_cells(tmp_path, cells(tmp_path, 7), facts={}) == 0
    assert not (tmp_path / CLAIMS).exists()


@pytest.mark.parametrize("text", ["3/3", "4/3", "-1/3", "1", "", "a/b", "0/0", "1/2/3", "1.0/2", "٣/٤"])
def test_a_part_that_there_is_not_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="--part must be `i/n` with i from 0 to n - 1"):
        check_part(text, "--part")


def test_a_folder_that_is_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(SaekitError, match="Not a directory"):
        compute_cells(tmp_path / "file", cells(tmp_path, 1), facts={})


@pytest.mark.parametrize("data", ["[]", "{", "null"])
def test_a_damaged_agreement_is_refused(tmp_path: Path, data: str) -> None:
    (tmp_path / CLAIMS).mkdir()
    (tmp_path / CLAIMS / "grid.json").write_text(data)
    with pytest.raises((ConfigError, ValueError), match=r"grid\.json"):
        compute_cells(tmp_path, cells(tmp_path, 1), facts={})
