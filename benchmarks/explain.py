"""What explaining all latents of an SAE of the built-in language model costs: time by stage and peak memory.

``python benchmarks/explain.py`` explains 16,384 latents over a million tokens; ``--quick`` a little, nothing written.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent / "contestants"))

import arena
import torch

from saekit import SAE, load_model
from saekit.explanation import run
from saekit.explanation.firings import FiringsWriter
from saekit.explanation.settings import ExplainSettings
from saekit.sae.rules import TopKRule

LAYER, K = 2, 16
ABOUT = """## Explain

Every latent of a TopK SAE of {latents:,} random latents (k = 16) on the built-in language model, over {tokens:,} tokens
of the built-in corpus: {cards:,} cards, scores of all latents, shuffled codes as the control (random directions run
the model twice more where the rows are not kept). CPU seconds and seconds of a clock by stage, {threads} threads; the
load average over the run was {load:.1f} (about {threads} where nothing else runs); and the peak of the memory of the
process before and after. What SAEDashboard costs by measurement is below (a small run);
by arithmetic SAEDashboard, which reads the texts anew for every batch of latents (64 latents, 24,576 contexts of 64
tokens), puts {dashboard:.0f} M tokens through the model for the same latents, and Delphi 50,000 tokens of prompts for
each latent through a judge, {delphi:.0f} M in all."""


class Clock:
    """Times of stages by name, without those of the stages within."""

    def __init__(self) -> None:
        self.times: dict[str, list[float]] = {}
        self.inner = [0.0, 0.0]

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Time what is inside."""
        before, outer = (time.process_time(), time.perf_counter()), self.inner
        self.inner = [0.0, 0.0]
        try:
            yield
        finally:
            took = [time.process_time() - before[0], time.perf_counter() - before[1]]
            mine = self.times.setdefault(name, [0.0, 0.0])
            for i in range(2):
                mine[i] += took[i] - self.inner[i]
                outer[i] += took[i]
            self.inner = outer

    def wrap(self, owner: object, name: str, title: str) -> None:
        """Time every call of a function."""
        function = getattr(owner, name)

        def timed(*args: object, **kwargs: object) -> object:
            with self.stage(title):
                return function(*args, **kwargs)

        setattr(owner, name, timed)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="2,048 latents over 30,000 tokens, nothing written")
    parser.add_argument("--latents", type=int, help="another number of latents; printed, nothing written")
    parser.add_argument("--tokens", type=int, help="another number of tokens; printed, nothing written")
    options = parser.parse_args()
    n, tokens = (2048, 30_000) if options.quick else (16_384, 1_000_000)
    n, tokens = options.latents or n, options.tokens or tokens
    lm = load_model("builtin")
    W = torch.nn.functional.normalize(torch.randn(n, lm.d_model, generator=torch.Generator().manual_seed(0)), dim=1)
    place = {"hook": f"layers.{LAYER}", "context": 256}
    sae = SAE(W, torch.zeros(n), W.clone(), torch.zeros(lm.d_model), TopKRule(K), provenance=place)
    clock = Clock()
    for owner, name, title in (
        (run, "activations", "model"),
        (FiringsWriter, "add", "firings: sorting"),
        (FiringsWriter, "finish", "firings: sorting"),
        (run, "responses", "tokens and positions"),
        (run, "window_scores", "windows"),
        (run, "coactive", "co-activation"),
        (run, "logit_lists", "tokens that are written"),
        (run, "random_directions", "random directions: making"),
        (run._Run, "card", "cards"),
    ):
        clock.wrap(owner, name, title)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    settings = ExplainSettings(tokens=tokens, controls=("shuffled",))
    with clock.stage("the rest: encoding, results"):
        found = run.explain(sae, lm, "builtin", settings=settings, progress=lambda *_: None)
    after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    whole = [sum(each[i] for each in clock.times.values()) for i in range(2)]
    lines = ["| stage | CPU s | clock s |", "| --- | ---: | ---: |"]
    times = sorted(clock.times.items(), key=lambda each: -each[1][0])
    lines += [f"| {name} | {cpu:.1f} | {wall:.1f} |" for name, (cpu, wall) in [*times, ("all", whole)]]
    lines += ["", f"Peak memory: {before:.2f} GB before, {after:.2f} GB after; {len(found.cards):,} cards."]
    print(*lines, sep="\n", flush=True)
    if options.quick or options.latents or options.tokens:
        return
    about = ABOUT.format(
        latents=n,
        tokens=tokens,
        cards=len(found.cards),
        dashboard=n / 64 * 24_576 * 64 / 1e6,
        delphi=n * 50_000 / 1e6,
        threads=torch.get_num_threads(),
        load=os.getloadavg()[1],
    )
    command = f"`python benchmarks/explain.py` on {arena.machine()}."
    record = {"stages": clock.times, "peak_gb": [before, after], "latents": n, "tokens": tokens}
    record["machine"] = arena.machine()
    (arena.ROOT / "benchmarks" / "explain.json").write_text(json.dumps(record, indent=1) + "\n")
    arena.replace_part(arena.ROOT / "benchmarks" / "README.md", "explain", "\n".join([about, "", command, "", *lines]))


main()
