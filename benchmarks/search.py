"""CPU time of the search of one family: every probe and penalty on two representations, on rows like pooled codes.

``python benchmarks/search.py`` fits the arm `strongest` as `saekit classify` does: 2,000 rows of three classes, 4,096
latents (a row has about 180 of them) and 12,288 columns of several poolings; without votes of arms, and with them. Run
it at two commits to compare them.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import replace

import numpy as np
import scipy.sparse

from saekit.classification.arms import VOTERS, Arm
from saekit.classification.fit import fit_arm
from saekit.classification.settings import PROBES


def codes(topic: np.ndarray, d: int, seed: int) -> scipy.sparse.csr_matrix:
    """Return rows of `d` columns, active by the topic of each row."""
    generator = np.random.default_rng(seed)
    often = np.minimum(1, generator.pareto(1.2, d) * 0.03) * generator.random((topic.max() + 1, d)) ** 4 * 3
    is_active = generator.random((len(topic), d)) < often[topic]
    return scipy.sparse.csr_matrix((is_active * generator.random(is_active.shape)).astype(np.float32))


def main() -> None:
    """Print the CPU seconds, and what was chosen."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=2000)
    parser.add_argument("--latents", type=int, default=4096)
    options = parser.parse_args()
    generator = np.random.default_rng(0)
    topic = generator.integers(0, 30, options.rows)
    X = {f"x{times}": codes(topic, times * options.latents, times) for times in (1, 3)}
    truth = generator.normal(size=(30, 3))[topic] + generator.normal(size=(options.rows, 3))
    candidates = tuple(
        replace(Arm(f"{name}, {probe}", "full", name), probe=probe) for name in X for probe in PROBES[:4]
    )
    for voters in (0, VOTERS):
        arm = Arm("strongest", "strongest", probe="search", candidates=candidates, voters=voters)
        since = time.process_time()
        found = fit_arm(arm, X, truth.argmax(1))
        spent = time.process_time() - since
        best = max((found, *found.finalists), key=lambda each: each.inner_score)
        print(f"{voters} voters: {spent:.1f} CPU s; {best.chosen}, inner {best.inner_score:.4f}")


if __name__ == "__main__":
    main()
