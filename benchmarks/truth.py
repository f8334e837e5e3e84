"""Architectures on rows whose dictionary is known: F1, MCC, FVU and shared latents over seeds, at one L0.

``python benchmarks/truth.py`` trains all in one pass (3 minutes of CPU time); ``--quick``: does everything run?;
``--write`` puts the table into README.md and the numbers into truth.json.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import saekit as sk
from saekit.comparison.settings import ComparisonSettings
from saekit.evaluation.settings import EvaluationSettings
from saekit.files import write_json
from saekit.rows.synthetic import synthetic_rows

HERE = Path(__file__).resolve().parent
MARKS = "<!-- truth -->", "<!-- end of truth -->"
ROWS = (
    "synthetic:d_in=64,n_features=256,l0=6,power=0.8,trees=8,branching=4,depth=3,factors=10,norm_spread=0.3,"
    "n_rows=200000"
)
N, K = 128, 6
SEEDS = (0, 1, 2, 3)
TRUTH = ("f1", "f1_matched", "mcc", "recovered")
CONFIGS = {
    "TopK": sk.TopK(N, k=K),
    "AbsTopK": sk.TopK(N, k=K, sign="magnitude"),
    "AbsTopK, incoherence .1 (iSAE)": sk.TopK(N, k=K, sign="magnitude", incoherence=0.1),
    "BatchTopK": sk.BatchTopK(N, k=K),
    "Matryoshka": sk.Matryoshka(N, k=K),
    "Matryoshka, balance .75": sk.Matryoshka(N, k=K, balance=0.75),
    "Matryoshka, detached": sk.Matryoshka(N, k=K, detached=True),
    "JumpReLU": sk.JumpReLU(N, target_l0=K),
    "JumpReLU, tanh": sk.JumpReLU(N, target_l0=K, tanh=0.003),
    "Gated": sk.Gated(N, target_l0=K),
    "ReLU": sk.ReLU(N, target_l0=K),
}
PUBLISHED = """Published, on other synthetic rows: 2602.14687 (16,384 features, 4,096 latents, d 768, k 25) has
Matryoshka first in F1 (.88; a linear probe .97). 2602.14111 (3,200 features, d 100) recovers 9% of the features with
BatchTopK, 7% with JumpReLU, up to 43% with TopK.

MCC and shared match AbsTopK's latents by absolute cosine: a latent and its negative are the same there."""


def measure(quick: bool) -> dict[str, Any]:
    """Train everything in one pass, and measure it."""
    rows, seeds = synthetic_rows(ROWS), SEEDS[:2] if quick else SEEDS
    tokens = 256 * (20 if quick else 500)
    settings = sk.TrainSettings(batch_rows=256)
    saes = sk.train(list(CONFIGS.values()), rows, seeds=list(seeds), tokens=tokens, settings=settings, progress=False)
    held = rows.rows(rows.n_rows - 8192, rows.n_rows)
    found = []
    for index, name in enumerate(CONFIGS):
        own = saes[index * len(seeds) : (index + 1) * len(seeds)]
        truth = sk.evaluate(own, rows, settings=EvaluationSettings(
            truth=True, controls=False, intervals=False, max_rows=4096), progress=False).entries  # fmt: skip
        plain = EvaluationSettings(controls=False, intervals=False)
        entries = sk.evaluate(own, sk.ArrayRows(held), settings=plain, progress=False).entries
        compared = sk.compare(own, sk.ArrayRows(held), settings=ComparisonSettings(controls=False, max_rows=1024),
                              progress=False)  # fmt: skip
        values = {key: [each.truth[key].value for each in truth] for key in TRUTH}
        values |= {key: [each.metrics[key].value for each in entries] for key in ("fvu", "l0", "dead_fraction")}
        found.append({"name": name, **values, "shared": [pair.shared.value for pair in compared.pairs]})
        print(name, {key: round(sum(v) / len(v), 3) for key, v in found[-1].items() if key != "name"}, flush=True)
    bounds = {key: truth[0].truth[key].value for key in ("f1_probe", "f1_ceiling")}
    return {
        "rows": ROWS, "tokens": tokens, "seeds": list(seeds), "architectures": found, "bounds": bounds,
        "saekit": sk.__version__, "command": " ".join(["python", "benchmarks/truth.py", *sys.argv[1:]]),
    }  # fmt: skip


def _cell(values: list[float]) -> str:
    mean = sum(values) / len(values)
    return f"{mean:.3f} ({min(values):.3f}–{max(values):.3f})"


def table(found: dict[str, Any]) -> str:
    """The section of README.md."""
    lines = [
        MARKS[0],
        "## Architectures on a known dictionary",
        "",
        f"Rows `{found['rows']}`:",
        f"{N} latents, L0 {K}, {found['tokens']:,} rows, {len(found['seeds'])} seeds in one pass at the defaults; mean",
        "(smallest–largest), of `shared` over pairs of seeds. F1 and MCC as `evaluate --truth` defines them; F1 of a",
        f"linear probe {found['bounds']['f1_probe']:.3f}, of matching pursuit on the true dictionary, told",
        f"the number of features, {found['bounds']['f1_ceiling']:.3f}.",
        "",
        "| architecture | F1 | MCC | FVU | shared | L0 | dead |",
        "| --- | --: | --: | --: | --: | --: | --: |",
    ]
    for each in sorted(found["architectures"], key=lambda each: -sum(each["f1"])):
        cells = [_cell(each[key]) for key in ("f1", "mcc", "fvu", "shared")]
        l0, dead = (sum(each[key]) / len(each[key]) for key in ("l0", "dead_fraction"))
        lines.append(f"| {each['name']} | {' | '.join(cells)} | {l0:.2f} | {dead:.3f} |")
    return "\n".join([*lines, "", PUBLISHED, "", "`" + found["command"] + "`", MARKS[1]])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="few rows, two seeds")
    parser.add_argument("--write", action="store_true", help="write README.md's table and truth.json")
    options = parser.parse_args()
    found = measure(options.quick)
    print(table(found))
    if options.write:
        write_json(HERE / "truth.json", found)
        text = (HERE / "README.md").read_text(encoding="utf-8")
        if MARKS[0] in text:
            text = text.split(MARKS[0])[0] + table(found) + text.split(MARKS[1])[1]
        else:
            text = text.rstrip("\n") + "\n\n" + table(found) + "\n"
        (HERE / "README.md").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
