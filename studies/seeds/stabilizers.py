"""What training methods do to the stability of latents, beside plain TopK at equal L0 and at equal FVU.

    python studies/seeds/stabilizers.py --out runs/stabilizers            # goes on where it stopped
    python studies/seeds/stabilizers.py --out runs/stabilizers --quick    # does everything run?
    python studies/seeds/stabilizers.py --out runs/stabilizers --write    # also stabilizers.json and .md here
    python studies/seeds/stabilizers.py --keep --write                    # only the cells that stabilizers.json lacks

A cell is one method on the rows of one model (or on synthetic rows): as many SAEs as there are seeds, which differ in
their first weights only, with snapshots of the first ones. All is kept under ``OUT``: with more seeds in `QUEUE` those
that are there are trained no second time, and more cells leave the others as they are. With ``--keep`` so do the cells
of stabilizers.json that were made by the same settings and have as many seeds, wherever they were made.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from stabilizers_page import claims, page

import saekit as sk
from saekit.comparison.along import along
from saekit.comparison.consensus import consensus
from saekit.comparison.settings import ComparisonSettings, ConsensusSettings
from saekit.errors import ConfigError
from saekit.evaluation.settings import EvaluationSettings
from saekit.explanation.settings import ExplainSettings
from saekit.files import read_json, write_json
from saekit.models.loading import load_language_model
from saekit.rows.synthetic import synthetic_rows

HERE = Path(__file__).resolve().parent
sys.path.append(str(HERE.parent))
from earlier import earlier  # noqa: E402 (what the studies share)

SHARED = Path(os.environ.get("SAEKIT_SHARED_DATA", HERE.parents[2] / "shared" / "data"))

HELD_OUT = 10
"""Every so many documents one is held out."""
SNAPSHOTS = 2
ALONG = 12
"""SAEs whose snapshots are compared, at most."""
LAYER = 2
BATCH_ROWS = 256
WIDTH = 128
COMPANION = 1000
"""What is added to the seed of an SAE that another one is trained with and that is not compared."""
DRAWS = 3
"""Draws of equally many stable and other latents, for probes."""
EXPLAINED = 4
"""SAEs of a place that are explained."""


@dataclass(frozen=True)
class Place:
    """Where rows come from."""

    model: str = ""
    data: str = ""
    captured: int = 0
    address: str = ""
    """Of synthetic rows, instead."""
    rows: int = 160_000
    """Rows that an SAE sees."""
    k: int = 8
    quick: int = 1
    """Divisor of all rows."""


TEXTS = "text/tinystories_truecased_3678.jsonl.gz"
SYNTHETIC = (
    "synthetic:d_in=64,n_features=256,l0=6,power=0.8,trees=8,branching=4,depth=3,factors=10,norm_spread=0.3,"
    "n_rows=200000"
)
PLACES = {
    "stories260K": Place("stories260K", TEXTS, 200_000),
    "built-in": Place("builtin", "builtin", 120_000),
    "stories260K, random weights": Place("randomized:stories260K", TEXTS, 200_000),
    "built-in, random weights": Place("randomized:builtin", "builtin", 120_000),
    "synthetic": Place(address=SYNTHETIC, rows=64_000, k=6),
}
MODELS = ("stories260K", "built-in")
RANDOM = tuple(f"{name}, random weights" for name in MODELS)


@dataclass(frozen=True)
class Method:
    """One way to train."""

    kind: str = "TopK"
    options: dict[str, Any] = field(default_factory=dict)
    latents: int = WIDTH
    start: str = ""
    """How SAEs come to be, where not in one call from random weights that differ; see `Study.chunk`."""
    times: float = 1.0
    """Rows that an SAE sees, as a multiple of those of its place."""

    def config(self, k: int) -> Any:
        sparsity = {"target_l0": float(k)} if self.kind in ("JumpReLU", "Gated", "ReLU") else {"k": k}
        return getattr(sk, self.kind)(n_latents=self.latents, **sparsity, **self.options)


SOFT = {"control": "soft-frozen-decoder"}
METHODS = {
    "TopK": Method(),
    "L2 .01": Method(options={"l2": 0.01}),
    "L2 .03": Method(options={"l2": 0.03}),
    "aligned": Method(options={"aligned": True}),
    "OrtSAE .25": Method(options={"orthogonal": 0.25}),
    "AbsTopK": Method(options={"sign": "magnitude"}),
    "iSAE .1": Method(options={"sign": "magnitude", "incoherence": 0.1}),
    "mutual .1, together": Method(options={"mutual": 0.1}),
    "mutual .1, apart": Method(options={"mutual": 0.1}, start="apart"),
    "consensus start": Method(start="consensus"),
    "k annealed from 48": Method(options={"k_start": 48, "k_fraction": 0.3}),
    "subspace 1/2": Method(options={"subspace": 0.5}),
    "soft-frozen decoder": Method(options=SOFT),
    "frozen decoder": Method(options={"control": "frozen-decoder"}),
    "one start, other orders": Method(start="one"),
    "other starts and orders": Method(start="orders"),
    "one start, soft-frozen, other orders": Method(options=SOFT, start="one"),
    "TopK, 64 latents": Method(latents=64),
    "TopK, 96 latents": Method(latents=96),
    "TopK, 192 latents": Method(latents=192),
    "TopK, 1/16 of the rows": Method(times=1 / 16),
    "TopK, 1/4 of the rows": Method(times=1 / 4),
    "TopK, 4 times the rows": Method(times=4.0),
    "TopK, 16 times the rows": Method(times=16.0),
    "BatchTopK": Method("BatchTopK"),
    "JumpReLU": Method("JumpReLU"),
    "Matryoshka": Method("Matryoshka"),
    "Matryoshka, balance .75": Method("Matryoshka", {"balance": 0.75}),
    "Gated": Method("Gated"),
    "ReLU": Method("ReLU"),
}
"""By name, in the order of the page."""

STEADY = ("TopK", "L2 .01", "L2 .03", "aligned", "OrtSAE .25")
CLOSE = ("TopK", "aligned", "OrtSAE .25")
"""Whose difference is near nothing, so that it takes more seeds."""
WIDTHS = ("TopK, 64 latents", "TopK, 96 latents", "TopK, 192 latents")
OTHERS = (
    "AbsTopK", "iSAE .1", "mutual .1, together", "mutual .1, apart", "consensus start", "k annealed from 48",
    "subspace 1/2", "soft-frozen decoder", "frozen decoder",
)  # fmt: skip
STARTS = ("one start, other orders", "other starts and orders", "one start, soft-frozen, other orders")
SHORT = ("TopK, 1/16 of the rows", "TopK, 1/4 of the rows")
LONG = ("TopK, 4 times the rows", "TopK, 16 times the rows")
ARCHITECTURES = ("BatchTopK", "Matryoshka", "Matryoshka, balance .75", "JumpReLU", "Gated", "ReLU")
QUEUE: tuple[tuple[tuple[str, ...], tuple[str, ...], int], ...] = (
    (MODELS, CLOSE, 48),
    (RANDOM[:1], CLOSE, 24),
    (MODELS, STEADY + WIDTHS, 8),
    (MODELS, OTHERS + STARTS + SHORT, 5),
    (RANDOM, STEADY + WIDTHS[::2], 5),
    (("synthetic",), STEADY + OTHERS, 5),
    (RANDOM, OTHERS, 5),
    (MODELS, LONG[:1], 8),
    (MODELS, LONG[1:], 3),
    (MODELS[1:], ("AbsTopK", "iSAE .1"), 16),
    (MODELS[1:], ("mutual .1, together",), 10),
    (("synthetic",), ARCHITECTURES, 5),
)
"""Places, methods and seeds, in the order in which cells are made; one that has as many seeds is not made again."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default="runs/stabilizers", type=Path)
    parser.add_argument("--quick", action="store_true", help="tiny: does everything run?")
    parser.add_argument("--write", action="store_true", help="write stabilizers.json and .md beside this script")
    parser.add_argument("--keep", action="store_true", help="take what stabilizers.json has; make only the rest")
    parser.add_argument(
        "--page", action="store_true", help="only decide again and write both, from stabilizers.json and OUT"
    )
    options = parser.parse_args()
    stored = read_json(HERE / "stabilizers.json") if options.keep or options.page else {}
    study = Study(options.out, options.quick, stored)
    if options.page:
        write(study.results())
        return
    if not SHARED.is_dir():
        sys.exit(f"the sample data must lie at {SHARED}; set SAEKIT_SHARED_DATA to where it is")
    for places, methods, seeds in QUEUE:
        for method, place in product(methods, places[:1] if options.quick else places):
            study.cell(place, method, 3 if options.quick else seeds)
    found = study.results()
    write_json(options.out / "stabilizers.json", found)
    if options.write:
        write(found)


def write(found: dict[str, Any]) -> None:
    cells = ",\n".join(json.dumps(cell, ensure_ascii=False) for cell in found["cells"])  # a line for each
    rest = json.dumps({**found, "cells": "@"}, indent=2, ensure_ascii=False)
    (HERE / "stabilizers.json").write_text(rest.replace('"@"', f"[\n{cells}\n  ]", 1) + "\n", encoding="utf-8")
    (HERE / "stabilizers.md").write_text(page(found), encoding="utf-8")


def say(message: str) -> None:
    print(f"{time.strftime('%H:%M:%S')}  {message}", flush=True)


class Study:
    """Cells under one folder."""

    def __init__(self, out: Path, quick: bool, stored: dict[str, Any] | None = None) -> None:
        self.out, self.quick, self.stored = out, quick, stored or {}
        self.rows = cache(self._rows)
        self.labelled = cache(self._labelled)

    def place(self, name: str) -> Place:
        found = PLACES[name]
        if not self.quick:
            return found
        return Place(found.model, found.data, min(found.captured, 6000), found.address, 40 * BATCH_ROWS, found.k, 20)

    def texts(self, name: str) -> str:
        """The texts as `read_texts` takes them."""
        data = self.place(name).data
        return data if data == "builtin" else str(SHARED / data)

    def model(self, name: str) -> str:
        """The model as `load_model` takes it."""
        prefix, _, rest = self.place(name).model.rpartition(":")
        return f"{prefix}:" * bool(prefix) + (rest if rest == "builtin" else str(SHARED / rest))

    # ------------------------------------------------------------------ rows

    def _rows(self, name: str) -> tuple[Any, Any]:
        """Rows to train on, and rows of other documents."""
        place = self.place(name)
        if place.address:
            rows = synthetic_rows(place.address)
            x = rows.rows(rows.n_rows - 16_384, rows.n_rows)
            return rows, sk.ArrayRows(x)
        source = self.captured(f"{name}-{place.captured}", self.model(name), self.texts(name), place.captured)
        batches = list(source.batches(65_536))
        columns = {key: torch.cat([getattr(b, key) for b in batches]) for key in ("x", "token", "document")}
        held = columns["document"] % HELD_OUT == HELD_OUT - 1
        info = {key: source.info[key] for key in ("model", "model_digest", "hook", "data") if key in source.info}
        parts = []
        for mask in (~held, held):
            part = {key: value[mask] for key, value in columns.items()}
            parts.append(sk.ArrayRows(part.pop("x"), **part, info=info))
        return parts[0], parts[1]

    def captured(self, name: str, model: str, data: Any, tokens: int | None = None) -> Any:
        """Rows that are kept under ``OUT/rows``."""
        folder = self.out / "rows" / name.replace(" ", "_").replace(",", "")
        if not (folder / "done").is_file():
            say(f"rows of {name}")
            sk.capture(model, data, layer=LAYER, tokens=tokens, out=folder, progress=False)
            (folder / "done").touch()
        return sk.open_rows(folder)

    def _labelled(self, name: str) -> tuple[torch.Tensor, np.ndarray, np.ndarray]:
        """Rows of labelled texts, the text of each row, and the labels: what probes are measured on."""
        texts = sk.read_texts(str(SHARED / "labelled" / "slurp_devel_test.csv.gz"), limit=300 if self.quick else 1500)
        labels = np.array(texts.columns["scenario"])
        rows = self.captured(f"{name}-labelled-{len(texts)}", self.model(name), list(texts.texts))
        batches = list(rows.batches(65_536))
        return torch.cat([b.x for b in batches]), torch.cat([b.document for b in batches]).numpy(), labels

    # ------------------------------------------------------------------ cells

    def cell(self, place: str, method: str, seeds: int) -> None:
        """Train and measure so many SAEs, unless that was done."""
        if any((cell["place"], cell["method"]) == (place, method) and cell["m"] >= seeds for cell in self.cells()):
            return
        began = time.process_time()
        try:
            paths = self.trained(place, method, seeds)
        except ConfigError as error:  # parents that agree on nothing, say
            say(f"{place} | {method} | left out: {error}")
            return
        trained = time.process_time()
        found = self.measured(place, method, paths)
        seconds = {"train": trained - began, "measure": time.process_time() - trained}
        path = self.out / "cells" / f"{_name(place, method)}.json"
        spec = self.digest(place, method)
        write_json(path, {"spec": spec, "place": place, "method": method, **found, "seconds": seconds})
        shared = np.mean(found["pairs"]["shared"])
        say(f"{place} | {method} | {seeds} | shared {shared:.3f} FVU {np.mean(found['fvu']):.4f} {seconds}")

    def digest(self, place: str, method: str) -> str:
        """What each SAE of a cell depends on."""
        spec = json.dumps([repr(self.place(place)), repr(METHODS[method]), SNAPSHOTS, BATCH_ROWS, LAYER])
        return hashlib.sha256(spec.encode()).hexdigest()

    def trained(self, place: str, method: str, seeds: int) -> list[Path]:
        """Folders of the SAEs of seeds 0, 1, …; only those that are not there yet are trained, in one chunk."""
        folder = self.out / "saes" / f"{_name(place, method)}-{self.digest(place, method)[:8]}"
        if "mutual" in METHODS[method].options and not METHODS[method].start:
            folder /= f"of {seeds}"  # seeds that pull each other are trained in one call, or are others
        paths: list[Path] = []
        while (first := len(paths)) < seeds:
            known = [each for each in folder.glob(f"{first}-*") if (each / "saes.json").is_file()]
            chunk = known[0] if known else folder / f"{first}-{seeds - 1}"
            if not known:
                made = self.chunk(place, METHODS[method], chunk, list(range(first, seeds)))
                write_json(chunk / "saes.json", {"saes": [str(path.relative_to(chunk)) for path in made]})
            paths += [chunk / each for each in read_json(chunk / "saes.json")["saes"]]
        return paths[:seeds]

    def chunk(self, place: str, method: Method, folder: Path, seeds: list[int]) -> list[Path]:
        """Train the SAEs of some seeds, and return their folders."""
        rows, _ = self.rows(place)
        budget = self.place(place).rows * method.times
        config = method.config(self.place(place).k)
        snapshots = 0 if method.start else SNAPSHOTS

        def run(where: str, seeds: list[int], share: float = 1.0, order: int = 0, **options: Any) -> list[Path]:
            out = folder / where
            settings = sk.TrainSettings(batch_rows=BATCH_ROWS, data_seed=order, snapshots=snapshots)
            as_then = earlier(config, budget * share, BATCH_ROWS)
            if "start" in options:
                as_then = replace(as_then, encoder_length=None)
            sk.train(as_then, rows, seeds=seeds, tokens=int(budget * share), out=out, resume=True, settings=settings,
                     progress=False, **options)  # fmt: skip
            return sorted(out.glob("*-seed*"), key=lambda p: int(p.name.rpartition("-seed")[2]))

        if method.start == "one":
            return [path for seed in seeds for path in run(f"order{seed}", [0], order=seed)]
        if method.start == "orders":
            return [path for seed in seeds for path in run(f"order{seed}", [seed], order=seed)]
        if method.start == "apart":  # each with a companion of its own, so that those compared never met
            return [run(f"call{seed}", [seed, COMPANION + seed])[0] for seed in seeds]
        if method.start == "consensus":
            # the budget of one SAE: a third for each of two parents, a third from where they agree
            two = [COMPANION + 2 * seed + each for seed in seeds for each in (0, 1)]
            parents = [sk.SAE.load(path) for path in run("parents", two, 1 / 3)]
            threshold = 0.35 if self.quick else 0.5
            sample = min(16_384, rows.n_rows or 0)
            settings = ConsensusSettings(size=method.latents, max_rows=sample, threshold=threshold)
            starts = [
                consensus(parents[2 * at : 2 * at + 2], rows, settings=settings, progress=False)
                for at in range(len(seeds))
            ]
            return run("refit", seeds, 1 / 3, order=1, start=starts)
        return run("run", seeds)

    def measured(self, place: str, method: str, paths: list[Path]) -> dict[str, Any]:
        """Everything about the SAEs of a cell."""
        rows, held = self.rows(place)
        saes = [oriented(sk.SAE.load(path), held) for path in paths]
        settings = ComparisonSettings(controls=method.startswith("TopK"), max_rows=2048)
        compared = sk.compare(saes, held, settings=settings, progress=False)
        plain = EvaluationSettings(controls=False, intervals=False, max_rows=16_384)
        entries = sk.evaluate(saes, held, settings=plain, progress=False).entries
        seen = sk.evaluate(saes, rows, settings=plain, progress=False).entries
        stable = [np.array(each.stability) >= 0.5 for each in compared.saes]
        found = summary(compared) | {
            "fvu": [each.metrics["fvu"].value for each in entries],
            "l0": [each.metrics["l0"].value for each in entries],
            "dead": [each.metrics["dead_fraction"].value for each in seen],
            "collapsed": [float((sae.fold_norms().W_enc.norm(dim=1) < 0.01).float().mean()) for sae in saes],
            "stable": [float(each.mean()) for each in stable],
            "without": [without(sae, kind, held) for sae, kind in zip(saes, stable, strict=True)],
        }
        if self.place(place).address:
            truth = sk.evaluate(saes, rows, settings=EvaluationSettings(
                truth=True, controls=False, intervals=False, max_rows=8192), progress=False).entries  # fmt: skip
            values = {key: [each.truth[key].value for each in truth] for key in truth[0].truth}
            found["truth"] = {key: [x if np.isfinite(x) else None for x in each] for key, each in values.items()}
        else:
            found["probe"] = [self.probed(place, sae, kind) for sae, kind in zip(saes, stable, strict=True)]
        if not METHODS[method].start:
            first = [path for path in paths if path.parent == paths[0].parent][:ALONG]  # of one run, as `along` needs
            bare = ComparisonSettings(controls=False)
            points = along(first, sk.compare(first, settings=bare, progress=False), settings=bare, progress=False).along
            found["along"] = [{"rows": point.rows_seen, "shared": point.shared.value} for point in points]
        return found

    def probed(self, place: str, sae: sk.SAE, stable: np.ndarray) -> dict[str, float]:
        """Macro-F1 of a ridge classifier of texts by their largest codes: of all latents, the stable, the others.

        ``stable_few`` and ``others_few`` are of equally many, drawn at random as often as `DRAWS` says.
        """
        x, document, labels = self.labelled(place)
        entries = sae.encode(x).to_scipy().tocoo()
        pooled = np.zeros((len(labels), sae.n_latents), np.float32)
        np.maximum.at(pooled, (document[entries.row], entries.col), np.abs(entries.data))
        found = {
            "all": macro_f1(pooled, labels),
            "stable": macro_f1(pooled[:, stable], labels),
            "others": macro_f1(pooled[:, ~stable], labels),
        }
        few = int(min(stable.sum(), (~stable).sum()))
        for name, kind in (("stable_few", stable), ("others_few", ~stable)):
            drawn = [np.random.default_rng(seed).permutation(np.flatnonzero(kind))[:few] for seed in range(DRAWS)]
            found[name] = float(np.mean([macro_f1(pooled[:, columns], labels) for columns in drawn]))
        return found

    def explained(self, place: str) -> dict[str, list[float]]:
        """Scores of the explanations of the TopK SAEs, by name: the mean over latents of each SAE."""
        if place in self.stored.get("explained", {}):
            return dict(self.stored["explained"][place])
        path = self.out / f"explained-{_name(place, 'TopK')}.json"
        digest = self.digest(place, "TopK")
        if path.is_file() and (kept := read_json(path)).get("spec") == digest:
            return dict(kept["scores"])
        lm = load_language_model(self.model(place))
        tokens = 4000 if self.quick else 20_000
        settings = ExplainSettings(tokens=tokens, logit_tokens=0, top=2, sample=0, controls=("shuffled",))
        found: dict[str, list[float]] = {}
        for sae in self.trained(place, "TopK", 3 if self.quick else EXPLAINED):
            for score in sk.explain(sae, lm, self.texts(place), settings=settings, progress=False).scores:
                found.setdefault(score.name, []).append(score.value.value)
        write_json(path, {"spec": digest, "tokens": tokens, "scores": found})
        say(f"{place}: explained")
        return found

    def cells(self) -> list[dict[str, Any]]:
        """The cells that are there and were made by these settings: of each the one of most seeds."""
        here = [read_json(path) for path in (self.out / "cells").glob("*.json")]
        found: dict[tuple[str, str], dict[str, Any]] = {}
        for cell in [*here, *self.stored.get("cells", [])]:
            key = cell["place"], cell["method"]
            if cell["method"] not in METHODS or cell.get("spec") != self.digest(*key):
                continue
            if key not in found or cell["m"] > found[key]["m"]:
                found[key] = cell
        return list(found.values())

    def results(self) -> dict[str, Any]:
        """Everything that is there, and the verdicts."""
        cells = self.cells()
        order = {name: at for at, name in enumerate(METHODS)}
        places = {name: at for at, name in enumerate(PLACES)}
        cells.sort(key=lambda cell: (places[cell["place"]], order[cell["method"]]))
        found = {
            "saekit": sk.__version__,
            "settings": {"latents": WIDTH, "batch_rows": BATCH_ROWS, "layer": LAYER},
            "places": {name: {"rows": self.place(name).rows, "k": self.place(name).k} for name in PLACES},
            "cells": cells,
            "explained": {
                cell["place"]: self.explained(cell["place"])
                for cell in cells
                if cell["method"] == "TopK" and cell["place"] in MODELS + RANDOM
            },
        }
        return found | {"claims": claims(found)}


def _name(place: str, method: str) -> str:
    return f"{place}-{method}".replace(" ", "_").replace(",", "").replace("/", "")


def oriented(sae: sk.SAE, held: Any) -> sk.SAE:
    """The same SAE with every latent turned so that its mean code on held-out rows is not negative.

    Only codes with a sign (AbsTopK) can be: a latent and its negative are one there, and which of the two was learned
    is chance.
    """
    codes = sae.encode(next(iter(held.batches(8192))).x)
    sign = torch.ones(sae.n_latents)
    sign[torch.from_numpy(np.asarray(codes.to_scipy().sum(0)).ravel() < 0)] = -1
    return sae.replace(W_enc=sae.W_enc * sign[:, None], W_dec=sae.W_dec * sign[:, None], b_enc=sae.b_enc * sign)


PAIRED: dict[str, Callable[[Any], float]] = {
    "shared": lambda pair: pair.shared.value,
    "shared_alive": lambda pair: pair.on_rows.shared_alive.value,
    "pw_mcc": lambda pair: pair.decoder.mean_cosine.value,
    "recovered": lambda pair: pair.function["fvu_recovered"].value,
    "coactivation": lambda pair: pair.function["coactivation"].value,
    "top_overlap": lambda pair: pair.function["top_overlap"].value,
}
"""What is kept of every pair of SAEs, from which intervals over seeds are made."""


def summary(compared: Any) -> dict[str, Any]:
    return {
        "m": len(compared.saes),
        "pairs": {name: [round(pick(pair), 5) for pair in compared.pairs] for name, pick in PAIRED.items()},
        "predictors": {name: each.to_json() for name, each in compared.predictors.items()},
        "shared_null": None if compared.shared_null is None else compared.shared_null.to_json(),
        "pw_mcc_null": None if compared.pw_mcc_null is None else compared.pw_mcc_null.to_json(),
    }


def without(sae: sk.SAE, stable: np.ndarray, held: Any) -> dict[str, float]:
    """By how much FVU rises when the stable latents write nothing, and when the others do not; the former's firings."""
    x = next(iter(held.batches(16_384))).x
    centred = float((x - x.mean(0)).double().square().sum())
    codes = sae.encode(x)

    def fvu(silent: np.ndarray) -> float:
        W = sae.W_dec.clone()
        W[torch.from_numpy(silent)] = 0
        return float((x - sae.replace(W_dec=W).decode(codes)).double().square().sum()) / centred

    base = fvu(np.zeros(len(stable), bool))
    fired = np.diff(codes.to_scipy().tocsc().indptr)
    firings = float(fired[stable].sum() / max(fired.sum(), 1))
    return {"stable": fvu(stable) - base, "others": fvu(~stable) - base, "firings": firings}


def macro_f1(X: np.ndarray, labels: np.ndarray) -> float:
    """Macro-F1 on every third text of a ridge classifier of the others; that of a constant answer without columns."""
    from sklearn.linear_model import RidgeClassifier
    from sklearn.metrics import f1_score
    from sklearn.preprocessing import StandardScaler

    test = np.arange(len(labels)) % 3 == 2
    if not X.shape[1]:
        X = np.zeros((len(labels), 1), np.float32)
    scaler = StandardScaler().fit(X[~test])
    fitted = RidgeClassifier(alpha=100.0).fit(scaler.transform(X[~test]), labels[~test])
    return float(f1_score(labels[test], fitted.predict(scaler.transform(X[test])), average="macro", zero_division=0))


if __name__ == "__main__":
    main()
