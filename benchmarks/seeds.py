"""Several seeds in one pass over the rows, beside as many separate runs.

``python benchmarks/seeds.py`` trains from the built-in language model (the rows are computed while training) and from
rows in memory (nothing to share but the reading); ``--quick`` a few steps of each. Runs alternate: together, apart.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent / "contestants"))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "src"))

import arena

ABOUT = """## Seeds in one pass

`train(config, rows, seeds=[0, ...])` beside one run for each seed: the whole call is timed, start and language model
included. "streamed" computes the rows from the built-in language model while it trains; "in memory" has them already.
The SAEs are bitwise the same."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=20_000)
    parser.add_argument("--batch", type=int, default=2048)
    parser.add_argument("--latents", type=int, default=2048)
    parser.add_argument("--k", type=int, default=16)
    parser.add_argument("--arch", default="topk", help="topk, batchtopk, jumprelu or relu")
    parser.add_argument("--layer", type=int, default=2)
    parser.add_argument("--repetitions", type=int, default=2)
    parser.add_argument("--quick", action="store_true", help="a few steps, two seeds, nothing written")
    options = parser.parse_args()
    if options.quick:
        options.seeds, options.tokens, options.repetitions = 2, 4 * options.batch, 1
    from saekit import TrainSettings, capture, stream, train
    from saekit.training.architectures import config_from_dict

    penalized = options.arch in ("jumprelu", "relu")
    config = config_from_dict(
        {"arch": options.arch, "latents": options.latents, "target_l0" if penalized else "k": options.k}
    )
    seeds = list(range(options.seeds))
    settings = TrainSettings(batch_rows=options.batch)
    cached = capture("builtin", "builtin", layer=options.layer, tokens=options.tokens)
    sources: dict[str, Callable[[], Any]] = {
        "streamed": lambda: stream("builtin", "builtin", layer=options.layer, tokens=2 * options.tokens),
        "in memory": lambda: cached,
    }
    train(config, cached, tokens=4 * options.batch, settings=settings)  # compile
    times: dict[str, dict[str, list[float]]] = {name: {"together": [], "apart": [], "one": []} for name in sources}
    for _ in range(options.repetitions):
        for name, source in sources.items():
            begin = time.perf_counter()
            train(config, source(), seeds=seeds, tokens=options.tokens, settings=settings)
            times[name]["together"].append(time.perf_counter() - begin)
            begin = time.perf_counter()
            for seed in seeds:
                one = time.perf_counter()
                train(config, source(), seeds=[seed], tokens=options.tokens, settings=settings)
                times[name]["one"].append(time.perf_counter() - one)
            times[name]["apart"].append(time.perf_counter() - begin)
    lines = ["| rows | together, s | apart, s | together / apart | range |", "| --- | --- | --- | --- | --- |"]
    for name, found in times.items():
        ratios = [a / b for a, b in zip(found["together"], found["apart"])]
        together, apart = (statistics.median(found[key]) for key in ("together", "apart"))
        span = f"{min(ratios):.2f} to {max(ratios):.2f}"
        lines.append(f"| {name} | {together:.2f} | {apart:.2f} | {statistics.median(ratios):.2f}× | {span} |")
    print(*lines, sep="\n")
    if options.quick:
        return
    about = f"{ABOUT}\n\n{options.seeds} seeds, {options.arch}, {options.latents:,} latents, k = {options.k}, "
    about += f"{options.tokens:,} rows in batches of {options.batch:,}, on {arena.machine()}."
    arena.replace_part(arena.ROOT / "benchmarks" / "README.md", "seeds", "\n".join([about, "", *lines]))
    record = {"options": vars(options), "seconds": times, "machine": arena.machine()}
    (arena.ROOT / "benchmarks" / "seeds.json").write_text(json.dumps(record, indent=1) + "\n")


main()
