"""Damaged files: every reader refuses them with an error of saekit, or reads them. `make fuzz`.

Each mutation is named by its reader and its number, and is the same in every run.
"""

from __future__ import annotations

import argparse
import math
import re
import sys
import time
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1] / "tests")  # not this folder: it has modules of common names

from fixtures.fuzzing import BYTES, SECONDS, fuzz_in_child, readers  # noqa: E402


def main() -> int:
    """Print how each reader fared, and return 1 where one failed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--mutations", type=int, default=10_000, help="mutations over all readers [10000]")
    parser.add_argument("--first", type=int, default=0, help="number of the first mutation of each reader [0]")
    parser.add_argument("--readers", default="", help="regular expression for the names of the readers [all]")
    options = parser.parse_args()
    chosen = [reader for reader in readers() if re.search(options.readers, reader.name)]
    unit = options.mutations / sum(reader.weight for reader in chosen)
    failures, began, total = [], time.perf_counter(), 0
    for reader in chosen:
        since, each = time.perf_counter(), math.ceil(unit * reader.weight)
        total += each
        found = fuzz_in_child(reader, range(options.first, options.first + each))
        failures += found
        print(
            f"{reader.name:34} {each:6,} mutations {len(found):4} failed {time.perf_counter() - since:7.1f} s",
            flush=True,
        )
        for failure in found[:20]:
            print(f"    {failure.seed}: {failure.change}: {failure.what}", flush=True)
    hangs = sum("no end" in failure.what for failure in failures)
    large = sum("MiB" in failure.what for failure in failures)
    print(
        f"{total:,} mutations over {len(chosen)} readers in {time.perf_counter() - began:.0f} s: "
        f"{len(failures) - hangs - large} outside the error tree, {hangs} longer than {SECONDS} s, "
        f"{large} over {BYTES // 2**20:,} MiB"
    )
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
