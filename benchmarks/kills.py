"""Kill every command that writes at every write event, and let processes save and load one SAE at the same time.

Each command is run once undisturbed; then, for every event, it is killed right before it, called again (train with
``--resume``), and every file must equal those of the undisturbed run: nothing lost, nothing else, no litter. ::

    python benchmarks/kills.py                         # every event; a quarter of an hour on two cores
    python benchmarks/kills.py --sample 20 train       # twenty events of one command
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # forks of a process with threads do not work
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("MPLBACKEND", "Agg")

import argparse
import dataclasses
import json
import random
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

from fixtures.kills import commands, contend, try_kills


def main() -> None:
    """Run what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("only", nargs="*", help="names of commands [all]")
    parser.add_argument("--sample", type=int, help="events per command [every one]")
    parser.add_argument("--seed", type=int, default=0, help="random seed of the sample [0]")
    parser.add_argument("--seconds", type=float, default=60, help="seconds of saving and loading at once [60]")
    parser.add_argument("--json", action="store_true", help="print JSON")
    asked = parser.parse_args()
    results: dict[str, Any] = {"kills": [], "contention": None}
    print_line = (lambda *_: None) if asked.json else _print_line
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        (place / "inputs").mkdir()
        print_line("command", "events", "kills", "losses", "seconds")
        for number, command in enumerate(commands(place / "inputs")):
            if not asked.only or command.name in asked.only:
                work = place / str(number)
                work.mkdir()
                found = try_kills(command, work, chooser(asked.sample, asked.seed))
                results["kills"].append(dataclasses.asdict(found))
                print_line(found.command, found.n_events, found.n_kills, len(found.losses), f"{found.seconds:.0f}")
                for each in [*found.losses, *(f"written past the events: {name}" for name in found.bypassed)]:
                    print_line(f"    {each}")
        if asked.seconds:
            together = contend(place / "sae", asked.seconds)
            results["contention"] = dataclasses.asdict(together)
            print_line(f"{together.saves} saves, {together.loads} loads at once, {len(together.problems)} failed")
            for each in together.problems[:10]:
                print_line(f"    {each}")
    if asked.json:
        print(json.dumps(results))


def chooser(sample: int | None, seed: int) -> Callable[[int], Sequence[int]]:
    """Return what chooses events: all, or a sample of them."""

    def choose(n: int) -> Sequence[int]:
        everything = range(n + 1)
        return everything if sample is None else sorted(random.Random(seed).sample(everything, min(sample, n + 1)))

    return choose


def _print_line(name: str, *numbers: Any) -> None:
    print(name.ljust(20), *(str(each).rjust(8) for each in numbers), flush=True)


if __name__ == "__main__":
    main()
