"""What training methods do to the stability of latents, beside plain TopK: five seeds each, on the built-in model.

    python studies/seeds/stabilizers.py [OUT.json]

Same rows, order, k and length for all; error is told beside stability, because a method may buy one with the other.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import saekit as sk
from saekit.comparison.settings import ComparisonSettings
from saekit.training.config import TopK

SEEDS = [0, 1, 2, 3, 4]
N, K, ROWS, TOKENS = 256, 8, 40_000, 160_000
METHODS = {
    "TopK": {},
    "L2 .03": {"l2": 0.03},
    "L2 .01": {"l2": 0.01},
    "aligned": {"aligned": True},
    "OrtSAE .25": {"orthogonal": 0.25},
    "soft-frozen": {"control": "soft-frozen-decoder"},
}
COLUMNS = ("fvu_own", "fvu_recovered", "top_overlap", "coactivation")


def main(out: str | None) -> None:
    """Train, compare, print a table as it grows, and write the numbers."""
    rows = sk.capture("builtin", "builtin", layer=2, tokens=ROWS, progress=False)
    found = {}
    for name, options in METHODS.items():
        began = time.process_time()
        saes = sk.train(TopK(N, k=K, **options), rows, seeds=SEEDS, tokens=TOKENS, progress=False)
        seconds = time.process_time() - began
        settings = ComparisonSettings(controls=name == "TopK", max_rows=4096)
        result = sk.compare(saes, rows, settings=settings, progress=False)
        numbers = {"shared": result.shared, "pw_mcc": result.pw_mcc, "shared_alive": result.shared_alive}
        numbers |= {column: result.function[column] for column in COLUMNS}
        found[name] = {key: value.to_json() for key, value in numbers.items() if value is not None}
        found[name] |= {
            "seconds": seconds,
            "shared_null": None if result.shared_null is None else result.shared_null.value,
        }
        print(name, *(f"{key} {value}" for key, value in numbers.items()), f"{seconds:.0f} s", sep=" | ", flush=True)
    if out is not None:
        settings = {"n_latents": N, "k": K, "rows": ROWS, "tokens": TOKENS, "seeds": SEEDS, "layer": 2}
        Path(out).write_text(json.dumps({"settings": settings, "methods": found}, indent=1) + "\n")


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else None)
