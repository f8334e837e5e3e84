"""Are SAEs of other libraries read as they compute them? Written by the libraries themselves, read by saekit, compared.

    make parity                 all of it: the libraries' environment, their SAEs, the table
    python benchmarks/formats.py [--peer .venv-peers/bin/python]

For every case the dense codes and the reconstructions of rows of norm 1 and 30 must agree to 1e-5 of the largest value.
And back: what saekit exports, the library must load and compute the same. The table: ``benchmarks/formats.json``.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from contextlib import suppress
from itertools import product
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from saekit import SAE
from saekit.errors import ConfigError, SaekitError
from saekit.sae.rules import GroupMaxRule, JumpReLURule, ReLURule, TopKRule
from saekit.sae.scaling import Scaling
from saekit.store.exports import export

HERE = Path(__file__).resolve().parent
TOLERANCE = 1e-5


def relative(got: torch.Tensor, wanted: torch.Tensor) -> float:
    """Return the largest difference as a fraction of the largest wanted value; infinite for other shapes."""
    if got.shape != wanted.shape:
        return float("inf")
    return float((got - wanted).abs().max() / wanted.abs().max().clamp(min=1e-30))


def compared(out: Path, case: dict[str, Any]) -> dict[str, Any]:
    """Return one row of the table: differences on rows of norm 1 and 30, or the refusal."""
    folder = out / case["library"]
    expected = load_file(folder / f"{case['case']}.safetensors")
    row: dict[str, Any] = {key: case[key] for key in ("library", "version", "case")}
    address = (folder / case["case"] / case["inside"]).resolve()
    try:
        sae = SAE.load(address)
    except SaekitError as error:
        return row | {"refused": str(error).replace(str(out), "")}
    half = len(expected["x"]) // 2
    for norm, part in (("1", slice(0, half)), ("30", slice(half, None))):
        x = expected["x"][part]
        row[f"codes_{norm}"] = relative(sae.encode(x).to_dense(), expected["codes"][part])
        row[f"x_hat_{norm}"] = relative(sae.reconstruct(x), expected["x_hat"][part])
    return row | {"l0": round(float((expected["codes"] != 0).sum(1).float().mean()), 2)}


def run_peer(python: str, verb: str, out: Path) -> None:
    subprocess.run([python, str(HERE / "formats_peer.py"), verb, str(out)], check=True, env={"PATH": "/usr/bin:/bin"})


def export_all(out: Path) -> dict[str, SAE]:
    """Export an SAE of every rule, scaling and input bias that a format can express; return them by ``format/case``."""
    g = torch.Generator().manual_seed(3)
    n, d = 32, 8
    tensors = {"W_enc": torch.randn(n, d, generator=g), "W_dec": torch.randn(n, d, generator=g)}
    tensors |= {"b_enc": torch.randn(n, generator=g) * 0.3, "b_dec": torch.randn(d, generator=g) * 0.3}
    rules = {"relu": ReLURule(), "topk": TopKRule(4), "abstopk": TopKRule(4, sign="magnitude"),
             "jumprelu": JumpReLURule(torch.linspace(0, 0.6, n)), "groupmax": GroupMaxRule(4)}  # fmt: skip
    scalings = {"none": Scaling(), "scalar": Scaling("scalar", torch.tensor(0.3)), "layer_norm": Scaling("layer_norm"),
                "standardize": Scaling("standardize", torch.linspace(0.5, 2, d), torch.linspace(-1, 1, d))}  # fmt: skip
    biases = {"b_dec": tensors["b_dec"], "raw": None, "own": torch.randn(d, generator=g) * 0.3}
    done = {}
    for (rule, scaling, bias), to in product(
        product(rules, scalings, biases), ("saelens", "sparsify", "dictionary_learning")
    ):
        sae = SAE(**tensors, rule=rules[rule], scaling=scalings[scaling], b_pre=biases[bias])
        name = f"{rule}-{scaling}-{bias}"
        with suppress(ConfigError):  # the format cannot express it: tests/store/test_exports.py says which
            export(sae, out / "exports" / to / name, to)
            done[f"{to}/{name}"] = sae
    return done


def compared_back(out: Path, case: str, sae: SAE) -> dict[str, Any]:
    """Return one row of the table: what the library computes from saekit's export, compared with saekit."""
    to, name = case.split("/")
    found = load_file(out / "exports" / to / f"{name}.safetensors")
    row: dict[str, Any] = {"library": f"exported to {to}", "case": name}
    half = len(found["x"]) // 2
    for norm, part in (("1", slice(0, half)), ("30", slice(half, None))):
        x = found["x"][part]
        row[f"codes_{norm}"] = relative(found["codes"][part], sae.encode(x).to_dense())
        row[f"x_hat_{norm}"] = relative(found["x_hat"][part], sae.reconstruct(x))
    return row


def outcome(row: dict[str, Any]) -> str:
    if "refused" in row:
        return "refused"
    return "equal" if max(row[key] for key in row if key.startswith(("codes", "x_hat"))) <= TOLERANCE else "WRONG"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--peer", default=str(HERE.parent / ".venv-peers/bin/python"), help="Python with the libraries")
    parser.add_argument("--out", help="folder to keep the libraries' SAEs in [a temporary one]")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        out = Path(options.out or temporary)
        run_peer(options.peer, "write", out)
        index = json.loads((out / "index.json").read_text())
        rows = [compared(out, case) for case in index["cases"]]
        exported = export_all(out)
        run_peer(options.peer, "read", out)
        rows += [compared_back(out, case, sae) for case, sae in exported.items()]
    for row in rows:
        worst = max((row[key] for key in row if key.startswith(("codes", "x_hat"))), default=float("nan"))
        print(f"{outcome(row):8} {row['library']:22} {row['case']:42} {worst:.1e} {row.get('refused', '')[:90]}")
    for library, trace in index["failed"].items():
        print(f"FAILED   {library}: {trace}")
    (HERE / "formats.json").write_text(json.dumps({"tolerance": TOLERANCE, "cases": rows}, indent=1) + "\n")
    wrong = [row for row in rows if outcome(row) == "WRONG" or ("refused" in row) != row["case"].startswith("refused")]
    print(f"{len(rows)} cases, {len(wrong)} wrong, {len(index['failed'])} libraries failed")
    return 1 if wrong or index["failed"] else 0


if __name__ == "__main__":
    sys.exit(main())
