"""Do seeds of one SAE find the same latents? The claims of 2501.16615 on two small real models.

    python studies/seeds/run.py --out runs/seeds            # 30 minutes on two quiet cores; goes on where it stopped
    python studies/seeds/run.py --out runs/seeds-quick --quick
    python studies/seeds/run.py --out runs/seeds --write    # also rewrites README.md and results.json beside this file
    python studies/seeds/run.py --keep --write              # only what results.json lacks

Every cell (a model, a layer, an architecture, a width, a k, a length) is one JSON file in ``OUT/cells``, written when
it is done; what is there is not computed again, nor is with ``--keep`` what results.json has of the same settings. All
intervals are over seeds: SAEs are what was sampled.
"""

from __future__ import annotations

import argparse
import csv
import gzip
import hashlib
import json
import os
import sys
import time
import tomllib
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from verdicts import claims, page

import saekit as sk
from saekit.comparison.consensus import consensus
from saekit.comparison.orphan_properties import frequency_matched
from saekit.comparison.result import Comparison
from saekit.comparison.settings import ComparisonSettings, ConsensusSettings, OrphanSettings
from saekit.comparison.stability import with_stability
from saekit.errors import ConfigError
from saekit.evaluation.settings import EvaluationSettings
from saekit.files import read_json, write_json
from saekit.sae.rules import TopKRule

HERE = Path(__file__).resolve().parent
sys.path.append(str(HERE.parent))
from earlier import earlier  # noqa: E402 (what the studies share)

SHARED = Path(os.environ.get("SAEKIT_SHARED_DATA", HERE.parents[2] / "shared" / "data"))
HELD_OUT = 10  # every tenth document
STAGES = ("orphans", "consensus", "joined", "across")  # whose results lie in one file per model
MUTUAL = 0.1  # weight of mutual feature regularization in the architecture of that name


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default="runs/seeds", type=Path)
    parser.add_argument("--config", default=HERE / "config.toml", type=Path)
    parser.add_argument("--quick", action="store_true", help="tiny: does everything run?")
    parser.add_argument("--write", action="store_true", help="write README.md and results.json beside this script")
    parser.add_argument("--keep", action="store_true", help="take what results.json has; make only the rest")
    parser.add_argument("--page", action="store_true", help="only decide again and write both, from results.json")
    parser.add_argument("--only", help="stages: cells, orphans, consensus, joined, across, outside (comma-separated)")
    options = parser.parse_args()
    if options.page:
        found = read_json(HERE / "results.json")
        found["claims"] = claims(found)
        write_json(HERE / "results.json", found)
        (HERE / "README.md").write_text(page(found), encoding="utf-8")
        return
    if not SHARED.is_dir():
        sys.exit(f"the sample data must lie at {SHARED}; set SAEKIT_SHARED_DATA to where it is")
    study = Study(settings(options.config, options.quick), options.out)
    if options.keep:
        study.restore(read_json(HERE / "results.json"))
    stages = {
        "cells": study.cells, "orphans": study.orphans, "consensus": study.consensus, "joined": study.joined,
        "across": study.across, "outside": study.outside,
    }  # fmt: skip
    wanted = options.only.split(",") if options.only else list(stages)
    for name in wanted:
        stages[name]()
    results = study.results()
    write_json(options.out / "results.json", results)
    text = page(results)
    (options.out / "README.md").write_text(text, encoding="utf-8")
    if options.write:
        write_json(HERE / "results.json", results)
        (HERE / "README.md").write_text(text, encoding="utf-8")
    say(f"wrote {options.out}/results.json and README.md")


def say(message: str) -> None:
    print(f"{time.strftime('%H:%M:%S')}  {message}", flush=True)


def settings(path: Path, quick: bool) -> dict[str, Any]:
    """The configuration; with `quick` everything that costs time is small."""
    found = tomllib.loads(path.read_text(encoding="utf-8"))
    small = found.pop("quick")
    found["quick"] = quick
    if not quick:
        return found
    found |= {name: small[name] for name in ("seeds", "held_out_rows", "threshold")}
    found["models"] = {name: model for name, model in found["models"].items() if name in small["models"]}
    found["joined"]["texts"], found["ce_tokens"] = small["texts"], small["ce_tokens"]

    def rows(n: int) -> int:
        return max(int(n * small["scale_rows"]), 8 * small["batch_rows"])

    def latents(n: int) -> int:
        return max(int(n * small["scale_latents"]), 48)

    for model in found["models"].values():
        model |= {name: small[name] for name in ("captured", "batch_rows", "law_seeds")}
        for part in [model[name] for name in ("base", "architectures") if name in model]:
            part |= {"rows": rows(part["rows"]), "latents": latents(part["latents"]), "k": 8, "seeds": small["seeds"]}
        model["width"] = sorted({latents(n) for n in model["width"]} | {model["base"]["latents"]})[-3:]
        model["sparsity"] = [4, 8]
        model["length"] = sorted({model["base"]["rows"], 2 * model["base"]["rows"]})
        model["layers"] = model.get("layers", [])[1:]
    return found


# ---------------------------------------------------------------------------------------------------------- the cells


def plan(name: str, config: dict[str, Any], seeds: int) -> list[dict[str, Any]]:
    """Every cell of one model, once, with the sweeps that it belongs to."""
    base = config["base"]
    wanted: list[tuple[str, dict[str, Any]]] = [("base", {"seeds": config["law_seeds"]})]
    wanted += [("width", {"latents": n}) for n in config["width"]]
    wanted += [("sparsity", {"k": k}) for k in config["sparsity"]]
    wanted += [("length", {"rows": rows}) for rows in config.get("length", [])]
    wanted += [("layer", {"layer": layer}) for layer in config.get("layers", [])]
    if "architectures" in config:
        wanted += [
            ("architecture", {**config["architectures"], "arch": arch})
            for arch in ("topk", "relu", "gated", "jumprelu", "topk+mutual")
        ]
    cells: dict[str, dict[str, Any]] = {}
    for sweep, changes in wanted:
        cell = {**base, "seeds": seeds, "batch_rows": config["batch_rows"], **changes, "model": name}
        key = "-".join(str(cell[part]) for part in ("model", "layer", "arch", "latents", "k", "rows", "lr"))
        known = cells.setdefault(key, {**cell, "id": key, "sweeps": []})
        known["seeds"] = max(known["seeds"], cell["seeds"])
        known["sweeps"].append(sweep)
    return list(cells.values())


def config_of(cell: dict[str, Any], rows: int) -> Any:
    """The configuration of a cell in a run on so many rows, with the defaults that the first cells were made with."""
    l0 = {"target_l0": float(cell["k"])}
    kinds: dict[str, tuple[Any, dict[str, Any]]] = {
        "topk": (sk.TopK, {"k": cell["k"]}), "topk+mutual": (sk.TopK, {"k": cell["k"], "mutual": MUTUAL}),
        "relu": (sk.ReLU, l0), "gated": (sk.Gated, l0), "jumprelu": (sk.JumpReLU, {**l0, "bandwidth": 0.1}),
    }  # fmt: skip
    kind, options = kinds[cell["arch"]]
    seen = rows // cell["batch_rows"] * cell["batch_rows"]
    config = kind(
        n_latents=cell["latents"], lr=cell["lr"], scaling="scalar",
        dead_after_rows=max(seen // 5, cell["batch_rows"]), **options,
    )  # fmt: skip
    return earlier(config, rows, cell["batch_rows"])


class Study:
    """Everything that is computed, kept by name under one folder."""

    def __init__(self, config: dict[str, Any], out: Path) -> None:
        self.config, self.out = config, out
        self.plans = {name: plan(name, model, config["seeds"]) for name, model in config["models"].items()}
        self.beside = {name: model["beside"] for name, model in config["models"].items() if "beside" in model}
        self.alone = [name for name in self.plans if name not in self.beside]
        self.rows = cache(self._rows)
        self.began = time.perf_counter()

    def kept(self, name: str, spec: Any, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """A result under ``OUT/<name>.json``: read if it is of the same settings, else made and written."""
        path = self.out / f"{name}.json"
        digest = hashlib.sha256(json.dumps(spec, sort_keys=True).encode()).hexdigest()
        if path.is_file() and (found := read_json(path)).get("spec_digest") == digest:
            return found
        start = time.perf_counter()
        try:
            made = make()
        except sk.SaekitError as error:  # nothing shared, say: the page says so
            made = {"skipped": str(error)}
            say(f"{name}: {error}")
        found = {"spec_digest": digest, **made, "seconds": round(time.perf_counter() - start, 1)}
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, found)
        say(f"{name}: {found['seconds']} s")
        return found

    def restore(self, found: dict[str, Any]) -> None:
        """Lay what was found under ``OUT``, where nothing lies yet, as if it had been made here."""
        parts = {f"cells/{cell['id']}": {k: v for k, v in cell.items() if k != "sweeps"} for cell in found["cells"]}
        parts |= {f"{stage}-{name}": part for stage in STAGES for name, part in found.get(stage, {}).items()}
        for name, part in (parts | {"outside": found["outside"]}).items():
            path = self.out / f"{name}.json"
            if part is not None and not path.is_file():
                path.parent.mkdir(parents=True, exist_ok=True)
                write_json(path, part)

    # ------------------------------------------------------------------ rows

    def place(self, name: str) -> tuple[str, str]:
        """Model and texts."""
        model, data = (
            where if where == "builtin" else str(SHARED / where)
            for where in (self.config["models"][name][key] for key in ("model", "data"))
        )
        return model, data

    def _rows(self, name: str) -> dict[int | str, tuple[sk.ArrayRows, sk.ArrayRows]]:
        """Rows of every layer of the plan, in memory: for training, and held out by document."""
        config = self.config["models"][name]
        model, data = self.place(name)
        layers = list(dict.fromkeys(cell["layer"] for cell in self.plans[name]))
        say(f"{name}: rows of layers {layers}")
        found = sk.capture(model, data, hook=[f"layers.{layer}" for layer in layers], tokens=config["captured"])
        sources = found if isinstance(found, dict) else {f"layers.{layers[0]}": found}
        split = {}
        for layer in layers:
            source = sources[f"layers.{layer}"]
            batches = list(source.batches(65_536))
            columns = {key: torch.cat([getattr(b, key) for b in batches]) for key in ("x", "token", "document")}
            held = columns["document"] % HELD_OUT == HELD_OUT - 1
            parts = []
            for mask, limit in ((~held, None), (held, self.config["held_out_rows"])):
                part = {key: value[mask][:limit] for key, value in columns.items()}
                info = {
                    key: source.info[key] for key in ("model", "model_digest", "hook", "data") if key in source.info
                }
                parts.append(sk.ArrayRows(part.pop("x"), **part, info=info))
            split[layer] = (parts[0], parts[1])
        return split

    # ------------------------------------------------------------------ stages

    def cells(self) -> None:
        """Train and compare."""
        for plans in self.plans.values():
            for number, cell in enumerate(plans, start=1):
                say(
                    f"cell {number} of {len(plans)}: {cell['id']} × {cell['seeds']} seeds ({', '.join(cell['sweeps'])})"
                )
                self.cell(cell)

    def cell(self, cell: dict[str, Any]) -> dict[str, Any]:
        spec = {key: value for key, value in cell.items() if key != "sweeps"} | {
            "captured": self.config["models"][cell["model"]]["captured"], "threshold": self.config["threshold"],
        }  # fmt: skip
        found = self.kept(f"cells/{cell['id']}", spec, lambda: self._cell(cell))
        return {**cell, **found}

    def train(self, cell: dict[str, Any], *, data_seed: int = 0, **changes: Any) -> list[sk.SAE]:
        rows, _ = self.rows(cell["model"])[cell["layer"]]
        options = {"seeds": list(range(cell["seeds"])), "tokens": cell["rows"]} | changes
        config = config_of(cell, options["tokens"])
        if "start" in options:  # which has a scale and rows of its own
            config = replace(config, encoder_length=None, scaling="centered")
        settings = sk.TrainSettings(batch_rows=cell["batch_rows"], data_seed=data_seed)
        return sk.train(config, rows, settings=settings, **options)

    def trained(self, cell: dict[str, Any]) -> list[sk.SAE]:
        """The SAEs of a cell; those of a base cell are kept, for what else is asked of them."""
        saes = self.train(cell)
        if "base" in cell["sweeps"]:
            for seed, sae in enumerate(saes):
                sae.save(self.folder(cell, seed))
        return saes

    def _cell(self, cell: dict[str, Any]) -> dict[str, Any]:
        saes = self.trained(cell)
        found = sk.compare(saes, settings=ComparisonSettings(threshold=self.config["threshold"]))
        _, held = self.rows(cell["model"])[cell["layer"]]
        entries = sk.evaluate(saes, held, settings=EvaluationSettings(controls=False, intervals=False)).entries
        return {
            **summary(found),
            **{name: [entry.metrics[name].value for entry in entries] for name in ("fvu", "l0", "dead_fraction")},
        }

    def folder(self, cell: dict[str, Any], seed: int) -> Path:
        return self.out / "saes" / cell["id"] / f"seed{seed}"

    def base_cell(self, name: str) -> dict[str, Any]:
        return next(cell for cell in self.plans[name] if "base" in cell["sweeps"])

    def base(self, name: str) -> list[sk.SAE]:
        """The SAEs of the base cell of a model, trained if they are not there yet."""
        cell = self.base_cell(name)
        self.cell(cell)
        folders = [self.folder(cell, seed) for seed in range(cell["seeds"])]
        if all(folder.is_dir() for folder in folders):
            return [sk.SAE.load(folder) for folder in folders]
        return self.trained(cell)  # the cell was taken from results.json

    def compared(self, name: str, saes: list[sk.SAE]) -> Comparison:
        path = self.out / f"comparison-{name}.json"
        if path.is_file():
            found = Comparison.load(path)
            try:
                with_stability(saes, found)  # refuses a comparison of other weights
            except ConfigError:
                pass
            else:
                if found.settings["threshold"] == self.config["threshold"]:
                    return found
        found = sk.compare(saes, settings=ComparisonSettings(threshold=self.config["threshold"], controls=False))
        found.save(path)
        return found

    def orphans(self) -> None:
        """What orphans are, on held-out rows."""
        for name in self.alone:
            cell = self.base_cell(name)

            def make(name: str = name, cell: dict[str, Any] = cell) -> dict[str, Any]:
                saes = self.base(name)
                _, held = self.rows(name)[cell["layer"]]
                model, data = self.place(name)
                found = sk.orphans(
                    saes,
                    held,
                    comparison=self.compared(name, saes),
                    model=model,
                    data=data,
                    settings=OrphanSettings(tokens=self.config.get("ce_tokens", 8192)),
                )
                return {"orphans": found.to_json()}

            self.kept(f"orphans-{name}", self.spec(cell), make)

    def spec(self, cell: dict[str, Any], **more: Any) -> dict[str, Any]:
        """What a result about the base cell depends on."""
        return {**cell, "held_out": self.config["held_out_rows"], "threshold": self.config["threshold"], **more}

    def consensus(self) -> None:
        """Consensus SAEs of disjoint sets of seeds, beside their parents and beside parents trained as much longer."""
        for name in self.alone:
            self.kept(f"consensus-{name}", self.spec(self.base_cell(name)), lambda name=name: self._consensus(name))

    def _consensus(self, name: str) -> dict[str, Any]:
        cell, saes = self.base_cell(name), self.base(name)
        rows, held = self.rows(name)[cell["layer"]]
        refit = max(cell["rows"] // 5 // cell["batch_rows"], 2) * cell["batch_rows"]
        threshold = self.config["threshold"]
        sample = min(32_768, rows.n_rows or 0)
        arms: dict[str, list[sk.SAE]] = {"parents": saes}
        arms["parents, longer"] = [
            self.train(cell, seeds=[seed], tokens=refit, start=sae, data_seed=1)[0] for seed, sae in enumerate(saes)
        ]
        for count in (2, len(saes) // 2) if len(saes) > 5 else (2,):
            groups = [saes[start : start + count] for start in range(0, len(saes) - count + 1, count)]
            pooled = ConsensusSettings(size=cell["latents"], threshold=threshold, max_rows=sample)
            plain = [consensus(group, rows, settings=pooled) for group in groups]
            arms[f"consensus of {count}"] = plain
            arms[f"consensus of {count}, refitted"] = [
                self.train(cell, seeds=[0], tokens=refit, start=sae, data_seed=1)[0] for sae in plain
            ]
        model, data = self.place(name)
        found = {}
        for arm, members in arms.items():
            entries = sk.evaluate(
                members,
                held,
                model=model,
                data=data,
                settings=EvaluationSettings(tokens=self.config.get("ce_tokens", 8192), controls=False, intervals=False),
            ).entries
            shared = None
            if len(members) > 1:
                shared = sk.compare(
                    members, settings=ComparisonSettings(threshold=threshold, controls=False)
                ).shared.to_json()
            found[arm] = {
                "n": len(members),
                **{key: [entry.metrics[key].value for entry in entries] for key in ("fvu", "ce_sae", "l0")},
                "shared": shared,
                "pooled": [sae.provenance["consensus"]["pooled"] for sae in members if "consensus" in sae.provenance],
            }
        return {"refit_rows": refit, "arms": found}

    def joined(self) -> None:
        """Stability of the latents that a sparse probe selects, against others that are active in as many texts."""
        for name in self.alone:
            spec = self.spec(self.base_cell(name), joined=self.config["joined"])
            self.kept(f"joined-{name}", spec, lambda name=name: self._joined(name))

    def _joined(self, name: str) -> dict[str, Any]:
        from saekit.rows.pooling import Ask, pool_texts

        saes = self.base(name)
        stability = [np.array(each.stability) for each in self.compared(name, saes).saes]
        lm = sk.load_model(self.place(name)[0])
        settings = self.config["joined"]
        tasks = []
        for task in settings["tasks"]:
            texts, labels = labelled(task, settings["texts"])
            pooled = pool_texts(lm, texts, [Ask(("max",), sae) for sae in saes])
            differences, densities = [], []
            for sae_stability, each in zip(stability, pooled, strict=True):
                X = each["max"]
                chosen = sk.SelectLatents(min(settings["select"], X.shape[1] // 4)).fit(X, labels).get_support()
                density = np.asarray((X > 0).mean(axis=0)).ravel()
                generator = np.random.default_rng(0)
                draws = [frequency_matched(density, chosen, generator) for _ in range(50)]
                differences.append(
                    float(
                        np.mean([sae_stability[yes].mean() - sae_stability[no].mean() for no, yes in draws if len(yes)])
                    )
                )
                densities.append(float(density[chosen].mean()))
            plain = [float(each.mean()) for each in stability]
            tasks.append(
                {
                    "task": task["name"],
                    "texts": len(texts),
                    "differences": differences,
                    "density": densities,
                    "mean_stability": plain,
                }
            )
        return {"tasks": tasks}

    def across(self) -> None:
        """SAEs of one model on two data sets, compared with each other."""
        for name, beside in self.beside.items():
            spec = self.spec(self.base_cell(name), beside=self.base_cell(beside))
            self.kept(f"across-{name}", spec, lambda name=name, beside=beside: self._across(name, beside))

    def _across(self, name: str, beside: str) -> dict[str, Any]:
        ours, theirs = self.base(name), self.base(beside)
        m = min(len(ours), len(theirs))
        both = ours[:m] + theirs[:m]
        found = summary(sk.compare(both, settings=ComparisonSettings(threshold=self.config["threshold"])))
        return {"beside": beside, **{key: found[key] for key in ("m", "pairs", "equal_null", "cosine_null")}}

    def outside(self) -> None:
        """Five seeds of an SAE that others trained."""
        spec = self.config["outside"] | {"threshold": self.config["threshold"], "version": 2}
        self.kept("outside", spec, self._outside)

    def _outside(self) -> dict[str, Any]:
        saes = [outside_sae(path) for path in sorted(SHARED.glob(self.config["outside"]["files"]))]
        found = sk.compare(saes, settings=ComparisonSettings(threshold=self.config["threshold"]))
        centres = np.corrcoef(np.stack([sae.b_pre.numpy() for sae in saes if sae.b_pre is not None]))
        return {
            "means_correlation": float(np.abs(centres - np.eye(len(saes))).max()),
            "n_latents": saes[0].n_latents,
            "d_in": saes[0].d_in,
            "k": saes[0].rule.settings()["k"],
            **summary(found),
        }

    # ------------------------------------------------------------------ what was found

    def results(self) -> dict[str, Any]:
        """Everything that is there, by stage, and the verdicts."""
        cells = [
            {**cell, **read_json(path)}
            for plans in self.plans.values()
            for cell in plans
            if (path := self.out / "cells" / f"{cell['id']}.json").is_file()
        ]
        stages = {}
        for stage in STAGES:
            stages[stage] = {
                name: read_json(path) for name in self.plans if (path := self.out / f"{stage}-{name}.json").is_file()
            }
        outside = self.out / "outside.json"
        found = {
            "saekit": sk.__version__,
            "quick": self.config["quick"],
            "threshold": self.config["threshold"],
            "cells": cells,
            **stages,
            "outside": read_json(outside) if outside.is_file() else None,
        }
        return {**found, "claims": claims(found)}


def summary(found: Comparison) -> dict[str, Any]:
    """What a cell keeps of its comparison: the means, and every pair, from which intervals over seeds are made."""
    m = len(found.saes)
    pairs = {
        name: [pick(pair) for pair in found.pairs]
        for name, pick in {
            "shared": lambda pair: pair.shared.value,
            "equal": lambda pair: pair.equal.value,
            "cosine_decoder": lambda pair: pair.decoder.mean_cosine.value,
            "cosine_encoder": lambda pair: pair.encoder.mean_cosine.value,
            "max_cosine": lambda pair: pair.decoder.max_cosine.value,
        }.items()
    }
    return {
        "m": m,
        "pairs": pairs,
        "shared": found.shared.to_json(),
        "equal": found.equal.to_json(),
        "equal_null": None if found.equal_null is None else found.equal_null.to_json(),
        "cosine": found.mean_cosine.to_json(),
        "cosine_null": None if found.mean_cosine_null is None else found.mean_cosine_null.to_json(),
        "in_exactly": [each.to_json() for each in found.in_exactly],
        "only_in_one": [each.to_json() for each in found.only_in_one],
        "law": None if found.law is None else found.to_json()["law"],
        "groups": None if found.groups is None else {
            "count": found.groups.count, "consistency": found.groups.mean_consistency,
            "contested": found.groups.contested,
        },
        "gap": max(each.gap for each in found.certificate.values()),
    }  # fmt: skip


def labelled(task: dict[str, Any], most: int) -> tuple[list[str], np.ndarray]:
    """Texts and labels of a task, drawn evenly."""
    with gzip.open(SHARED / "labelled" / task["file"], "rt", encoding="utf-8", newline="") as stream:
        lines = [(line[task["text"]], line[task["label"]]) for line in csv.DictReader(stream)]
    order = np.random.default_rng(0).permutation(len(lines))[:most]
    texts, labels = zip(*(lines[at] for at in sorted(order)), strict=True)
    return list(texts), np.array(labels)


def outside_sae(path: Path) -> sk.SAE:
    """One of the files of others; nothing in it is executed."""
    found = torch.load(path, map_location="cpu", weights_only=True)
    weights = found["state_dict"]
    # They subtract the mean of their rows before the encoder and add it to what the decoder writes.
    mean = found["mean"].reshape(-1).float()
    return sk.SAE(
        W_enc=weights["encoder.weight"].float(), b_enc=weights["encoder.bias"].float(),
        W_dec=weights["decoder.weight"].float().T.contiguous(), b_dec=weights["decoder.bias"].float() + mean,
        b_pre=mean, rule=TopKRule(found["config"]["k"]),
        provenance={"seed": int(path.name.split("_")[1].split(".")[0])},
    )  # fmt: skip


if __name__ == "__main__":
    main()
