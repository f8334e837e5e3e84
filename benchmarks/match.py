"""Exact matching of latents: seconds, peak memory and the gap of the certificate, by width.

    python benchmarks/match.py                            # 4,096 … 131,072 latents in 768 dimensions
    python benchmarks/match.py --latents 4096,16384       # some of them
    python benchmarks/match.py --exact 200 --most 1024    # against scipy on random and hard instances instead

Dictionaries are simulated: 40 % of the latents shared at cosine 0.7 to 0.98, the rest mildly clustered. Every width
runs in a process of its own, so that its peak memory is its own. The table goes to ``benchmarks/match.json`` and
between the markers of ``benchmarks/README.md``, with ``--latents`` only if there is ``--write``.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

HERE = Path(__file__).resolve().parent
MARKERS = re.compile(r"(<!-- match -->\n).*?(<!-- /match -->)", re.DOTALL)


def simulated(n: int, d: int, seed: int, shared: float = 0.4) -> tuple[torch.Tensor, torch.Tensor]:
    """Two dictionaries ``[n, d]`` as two seeds of one SAE might give them, the second in random order."""
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(max(1, n // 128), d, generator=generator)
    parts = []
    for _ in range(2):
        which = torch.randint(len(centres), (n,), generator=generator)
        rows = torch.randn(n, d, generator=generator)
        parts.append(torch.nn.functional.normalize(rows.add_(centres[which], alpha=0.35)))
    a, b = parts
    count = int(shared * n)
    cosine = 0.7 + 0.28 * torch.rand(count, 1, generator=generator)
    noise = torch.nn.functional.normalize(torch.randn(count, d, generator=generator))
    b[:count] = cosine * a[:count] + (1 - cosine.square()).sqrt() * noise
    return a, b[torch.randperm(n, generator=generator)]


def measure(n: int, d: int, device: str) -> dict[str, Any]:
    """One width, in this process. The first, small matching compiles and warms up."""
    import resource

    from saekit.matching.matching import match_latents

    a, b = (rows.to(device) for rows in simulated(n, d, seed=n))
    match_latents(a[:64], b[:64])
    before = time.perf_counter()
    found = match_latents(a, b)
    seconds = time.perf_counter() - before
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    if device != "cpu":
        peak = torch.cuda.max_memory_allocated() / 2**30
    return {
        "latents": n, "d": d, "device": device, "threads": torch.get_num_threads(), "seconds": round(seconds, 2),
        "peak_gib": round(peak, 2), "objective": found.certificate.objective, "gap": found.certificate.gap,
        "rounds": found.rounds, "edges_per_latent": round(found.edges / n, 1),
    }  # fmt: skip


def table(results: list[dict[str, Any]]) -> str:
    lines = ["| latents | seconds | peak memory, GiB | sum of cosines | gap | rounds |", "| ---: " * 6 + "|"]
    lines += [
        f"| {each['latents']:,} | {each['seconds']:.1f} | {each['peak_gib']:.2f} | {each['objective']:,.2f} "
        f"| {each['gap']:.1e} | {each['rounds']} |"
        for each in results
    ]
    return "\n".join(lines)


def instance(seed: int, most: int) -> tuple[str, torch.Tensor, torch.Tensor]:
    """A random or hard instance, square or rectangular, of up to `most` rows."""
    g = torch.Generator().manual_seed(seed)
    n, m = (int(most ** (0.3 + 0.7 * float(torch.rand(1, generator=g)))) for _ in range(2))
    n, m = (n, n) if seed % 2 else (n, m)
    d = (8, 64, 256)[seed // 2 % 3]

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=g)

    def clustered(noise: float) -> tuple[torch.Tensor, torch.Tensor]:
        centres = normal(max(1, n // 64), d)
        which = [torch.randint(len(centres), (rows,), generator=g) for rows in (n, m)]
        return centres[which[0]] + noise * normal(n, d), centres[which[1]] + noise * normal(m, d)

    a, b = normal(n, d), normal(m, d)
    k = min(n, m)
    family = seed // 6 % 9
    if family == 0:
        return "random", a, b
    if family <= 3:
        return f"clustered {(0.1, 0.01, 0.0)[family - 1]}", *clustered((0.1, 0.01, 0.0)[family - 1])
    if family == 4:
        return "equal", torch.ones(n, d), torch.ones(m, d)
    if family == 5:
        a[::3], b[::2] = 0, 0
        return "zero rows", a, b
    if family == 6:
        return "negative", a.abs(), -b.abs()
    if family == 7:
        b[:k] = a[torch.randperm(n, generator=g)[:k]] + 0.8 * b[:k]
        return "copy", a, b
    return "plane", normal(n, 2) @ normal(2, d), normal(m, 2) @ normal(2, d)


def against_scipy(count: int, most: int) -> float:
    """The largest relative difference of the objective from scipy's over `count` instances."""
    from scipy.optimize import linear_sum_assignment

    from saekit.matching.matching import match_latents

    worst = 0.0
    for seed in range(count):
        name, a, b = instance(seed, most)
        found = match_latents(a, b).certificate
        units = [torch.where((norm := x.double().norm(dim=1, keepdim=True)) > 0, x / norm, 0.0) for x in (a, b)]
        S = (units[0] @ units[1].T).numpy()
        best = float(S[linear_sum_assignment(S, maximize=True)].sum())
        difference = abs(found.objective - best) / max(abs(best), 1.0)
        worst = max(worst, difference, found.gap / max(abs(best), 1.0))
        print(
            f"{len(a):5} × {len(b):5} {name:14} {found.objective:12.4f} {difference:.1e} gap {found.gap:.1e}",
            flush=True,
        )
    return worst


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="the smallest width, nothing written")
    parser.add_argument("--latents", default="", help="widths, separated by commas, instead of 4,096 … 131,072")
    parser.add_argument("--d", type=int, default=768)
    parser.add_argument("--device", default="cpu")
    parser.add_argument(
        "--write", action="store_true", help="put the table into benchmarks/README.md whatever was chosen"
    )
    parser.add_argument("--exact", type=int, default=0, metavar="COUNT", help="instances to compare with scipy instead")
    parser.add_argument("--most", type=int, default=4096, help="rows of the largest of these")
    parser.add_argument("--one", type=int, default=0, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.exact:
        worst = against_scipy(options.exact, options.most)
        print(f"largest relative difference or gap over {options.exact} instances: {worst:.1e}")
        return int(worst > 1e-6)
    if options.one:
        print(json.dumps(measure(options.one, options.d, options.device)))
        return 0
    results = []
    usual = "4096" if options.quick else "4096,8192,16384,32768,65536,131072"
    for n in map(int, (options.latents or usual).split(",")):
        command = [sys.executable, __file__, "--one", str(n), "--d", str(options.d), "--device", options.device]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        results.append(json.loads(done.stdout.splitlines()[-1]))
        print(results[-1], flush=True)
    print(table(results))
    if options.write or not (options.quick or options.latents):
        (HERE / "match.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
        page = HERE / "README.md"
        text = page.read_text(encoding="utf-8")
        block = f"<!-- match -->\n{table(results)}\n<!-- /match -->"
        text = MARKERS.sub(block, text) if MARKERS.search(text) else f"{text.rstrip()}\n\n## Matching\n\n{block}\n"
        page.write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
