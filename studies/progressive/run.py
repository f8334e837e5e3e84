"""How many latents are needed? Pruned, nested and separately trained SAEs on two small language models.

    python studies/progressive/run.py                 everything; about 20 minutes on two idle cores
    python studies/progressive/run.py --quick         the same in a minute, to see that it works

The claims are those of *Empirical Evaluation of Progressive Coding for Sparse Autoencoders* (2505.00190). Work is
divided into cells (training, measuring, ... of one model and seed); each leaves a JSON file in the work folder when it
is done and is skipped the next time, so a run that was stopped goes on. The numbers go to results/<model>.json, and
README.md is written from these alone (page.py).
"""

from __future__ import annotations

import argparse
import hashlib
import os
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import page
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import f1_score
from sklearn.preprocessing import MaxAbsScaler

import saekit as sk
from saekit.files import read_json, write_json
from saekit.inputs.corpus import paragraphs
from saekit.measure.accumulators import fvu
from saekit.measure.importance import importance
from saekit.rows.pooling import Ask, pool_texts
from saekit.rows.split import halves
from saekit.sizes.latent_metrics import seed_overlap
from saekit.sizes.progressive import progressive
from saekit.sizes.ranking import rank
from saekit.sizes.settings import ProgressiveSettings
from saekit.training.config import HierarchicalTopK, Matryoshka, TopK
from saekit.training.defaults import resolve
from saekit.training.learner import initialize_learner
from saekit.training.step import STEPS

HERE = Path(__file__).resolve().parent
sys.path.append(str(HERE.parent))
from earlier import earlier  # noqa: E402 (what the studies share)

SHARED = Path(os.environ.get("SAEKIT_SHARED_DATA", HERE.parents[1].parent / "shared" / "data"))
STORIES = "tinystories_truecased_3678.jsonl.gz"

BY = ("energy", "frequency", "attribution", "unsorted", "random")
PROBED = ("energy", "frequency", "unsorted")


@dataclass(frozen=True)
class Plan:
    """What is run; the name of the work folder depends on it."""

    sizes: tuple[int, ...] = (256, 512, 1024, 2048, 4096)
    seeds: tuple[int, ...] = (0, 1, 2)
    tokens: int = 600_000
    """Rows that SAEs are trained on, once through."""
    batch_rows: int = 512
    heldout_rows: int = 32_768
    """Half of them rank the latents, the other half are measured on."""
    ce_tokens: int = 4096
    sample_rows: int = 512
    probe_texts: int = 1600
    cost_steps: int = 6
    probe_tokens: int = 64

    @property
    def widest(self) -> int:
        """Latents of the SAEs that are pruned."""
        return self.sizes[-1]


QUICK = Plan(
    sizes=(16, 32, 64), seeds=(0, 1), tokens=8192, batch_rows=256, heldout_rows=2048, ce_tokens=256, sample_rows=64,
    probe_texts=80, cost_steps=2, probe_tokens=32,
)  # fmt: skip


@dataclass(frozen=True)
class Subject:
    """One language model with its texts."""

    name: str
    model: str
    layer: int
    k: int

    def texts(self) -> tuple[Any, Any]:
        """Texts to train on, and others to measure on."""
        if self.name == "builtin":
            return "builtin@train", "builtin@heldout"
        texts = sk.read_texts(SHARED / "text" / STORIES, columns=())
        return list(texts[:-400]), list(texts[-400:])


SUBJECTS = (
    Subject("stories260K", str(SHARED / "stories260K"), 2, 8),
    Subject("builtin", "builtin", 2, 16),
)


class Cells:
    """Results of finished cells, one JSON file each."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def run(self, name: str, work: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """What the cell found, now or in an earlier run."""
        path = self.folder / f"{name}.json"
        if path.is_file():
            return read_json(path)
        begun = time.monotonic()
        print(f"{time.strftime('%H:%M:%S')}  {name}", flush=True)
        found = {**work(), "cell_seconds": round(time.monotonic() - begun, 1)}
        write_json(path, found)
        return found


# -------------------------------------------------------------------------------------------------------------- cells


def run_subject(subject: Subject, plan: Plan, work: Path) -> dict[str, Any]:
    """Every cell of one model, and what they say together."""
    cells, folder = Cells(work / "cells" / subject.name), work / subject.name
    begun = time.monotonic()
    lm = sk.load_model(subject.model)
    train_on, measure_on = subject.texts()
    rows = capture_rows(lm, subject, train_on, plan.tokens, folder / "rows")
    heldout = capture_rows(lm, subject, measure_on, plan.heldout_rows, folder / "heldout")
    fit, measured = halves(heldout)
    trained = [
        cells.run(f"train-{seed}", lambda seed=seed: train_cell(subject, plan, rows, folder, seed))
        for seed in plan.seeds
    ]
    saes = {seed: load_saes(folder / f"seed{seed}") for seed in plan.seeds}
    settings = ProgressiveSettings(by=BY, tokens=plan.ce_tokens, sample_rows=plan.sample_rows, intervals=False)
    compared = [
        cells.run(
            f"measure-{seed}",
            lambda seed=seed: progressive(
                saes[seed], measured, fit=fit, sizes=plan.sizes, model=lm, data=measure_on, settings=settings
            ).to_json(),
        )
        for seed in plan.seeds
    ]
    overlap = cells.run("overlap", lambda: overlap_cell(saes, fit, plan))
    probes = (
        [cells.run(f"probe-{seed}", lambda seed=seed: probe_cell(lm, saes[seed], fit, plan)) for seed in plan.seeds]
        if subject.name == "builtin"
        else []
    )
    many = cells.run("many-k", lambda: many_k_cell(subject, plan, rows, measured, folder))
    cost = cells.run("cost", lambda: cost_cell(subject, plan, rows))
    return {
        "kind": "study_progressive",
        "schema": 1,
        "model": subject.name,
        "plan": {**asdict(plan), "k": subject.k, "layer": subject.layer, "d_in": lm.d_model, "by": list(BY)},
        "versions": compared[0]["versions"],
        "n_rows": compared[0]["n_rows"],
        "n_tokens": compared[0]["language_model"]["n_tokens"],
        "ce_clean": compared[0]["curves"][0]["ce_clean"]["value"],
        "curves": curves_of(compared, overlap, probes),
        "power_laws": laws_of(compared, "rankings"),
        "spectra": laws_of(compared, "spectra"),
        "many_k": many,
        "cost": cost,
        "train_seconds": [each["seconds"] for each in trained],
        "seconds": round(time.monotonic() - begun, 1),
    }


def capture_rows(lm: Any, subject: Subject, texts: Any, tokens: int, out: Path) -> Any:
    """Rows in the work folder; made once."""
    if not (out / "manifest.json").is_file():
        sk.capture(lm, texts, layer=subject.layer, tokens=tokens, out=out)
    return sk.open_rows(out)


def configs_of(subject: Subject, plan: Plan) -> list[Any]:
    """One vanilla SAE per size, and one nested SAE for all."""
    vanilla = [TopK(n_latents=size, k=subject.k) for size in plan.sizes]
    configs = [*vanilla, Matryoshka(n_latents=plan.widest, k=subject.k, sizes=plan.sizes)]
    return [earlier(config, plan.tokens, plan.batch_rows) for config in configs]


def train_cell(subject: Subject, plan: Plan, rows: Any, folder: Path, seed: int) -> dict[str, Any]:
    """All SAEs of one seed, in one pass over the rows."""
    begun = time.monotonic()
    sk.train(
        configs_of(subject, plan), rows, seeds=[seed], tokens=plan.tokens,
        settings=sk.TrainSettings(batch_rows=plan.batch_rows), out=folder / f"seed{seed}", resume=True,
    )  # fmt: skip
    return {"seconds": round(time.monotonic() - begun, 1)}


def load_saes(folder: Path) -> dict[str, sk.SAE]:
    """The SAEs of a training run by the names of their folders."""
    return {path.parent.name: sk.SAE.load(path.parent) for path in sorted(folder.glob("*/sae.json"))}


def ways_of(saes: dict[str, sk.SAE], fit: Any, plan: Plan, by: tuple[str, ...]) -> Iterator[tuple[str, int, sk.SAE]]:
    """Every way of getting an SAE of every size from those of one seed; the same names as in `progressive`."""
    vanilla = {sae.n_latents: sae for name, sae in saes.items() if name.startswith("topk")}
    nested = next(sae for name, sae in saes.items() if name.startswith("matryoshka"))
    widest = vanilla[plan.widest]
    scores = importance(widest, fit).scores
    for each in by:
        order = rank(widest, by=scores[each]) if each in scores else rank(widest, by=each)
        name = "topk unsorted" if each == "unsorted" else f"topk pruned by {each}"
        yield from ((name, size, order.take(size)) for size in plan.sizes)
    yield from (("topk trained separately", size, vanilla[size]) for size in plan.sizes)
    yield from (("matryoshka", size, nested.take(size)) for size in plan.sizes)


def overlap_cell(saes: dict[int, dict[str, sk.SAE]], fit: Any, plan: Plan) -> dict[str, Any]:
    """What the seeds share, by way and size."""
    groups: dict[tuple[str, int], list[sk.SAE]] = {}
    for of_seed in saes.values():
        for way, size, sae in ways_of(of_seed, fit, plan, PROBED):
            groups.setdefault((way, size), []).append(sae)
    whole = seed_overlap(groups["topk pruned by energy", plan.widest])  # the same latents in any order
    found: dict[str, Any] = {}
    for (way, size), group in groups.items():
        is_whole = size == plan.widest and way != "matryoshka"
        found.setdefault(way, {})[str(size)] = (whole if is_whole else seed_overlap(group)).value
    return {"shared": found}


def probe_cell(lm: Any, saes: dict[str, sk.SAE], fit: Any, plan: Plan) -> dict[str, Any]:
    """Macro-F1 of a linear probe for the section of a docstring paragraph, on max-pooled codes of every SAE."""
    texts, labels, test = probe_texts(plan)
    ways = list(ways_of(saes, fit, plan, PROBED))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # that texts are cut is what we ask for
        pooled = pool_texts(lm, texts, [Ask(("max",), sae=sae) for _, _, sae in ways], max_tokens=plan.probe_tokens)
    found: dict[str, Any] = {}
    for (way, size, _), features in zip(ways, pooled, strict=True):
        scaler = MaxAbsScaler().fit(features["max"][~test])
        probe = LogisticRegression(max_iter=300).fit(scaler.transform(features["max"][~test]), labels[~test])
        guess = probe.predict(scaler.transform(features["max"][test]))
        found.setdefault(way, {})[str(size)] = float(f1_score(labels[test], guess, average="macro"))
    return {"macro_f1": found, "n_train": int((~test).sum()), "n_test": int(test.sum())}


def probe_texts(plan: Plan) -> tuple[list[str], np.ndarray, np.ndarray]:
    """Paragraphs of the commonest sections, equally many of each; modules are in the test part or not."""
    by_section: dict[str, list[Any]] = {}
    for paragraph in paragraphs(split="heldout"):
        if len(paragraph.text) >= 40:
            by_section.setdefault(paragraph.section, []).append(paragraph)
    common = sorted(by_section, key=lambda section: (-len(by_section[section]), section))[:6]
    each = plan.probe_texts // len(common)
    chosen = [paragraph for section in common for paragraph in by_section[section][:each]]
    modules = sorted({paragraph.module for paragraph in chosen})
    in_test = {module: index % 3 == 0 for index, module in enumerate(modules)}
    labels = np.array([paragraph.section for paragraph in chosen])
    return [p.text for p in chosen], labels, np.array([in_test[p.module] for p in chosen])


def many_k_cell(subject: Subject, plan: Plan, rows: Any, measured: Any, folder: Path) -> dict[str, Any]:
    """One SAE for many k (HierarchicalTopK) beside SAEs trained for each k."""
    latents = plan.sizes[len(plan.sizes) // 2]
    ks = [subject.k // 4, subject.k // 2, subject.k]
    configs = [HierarchicalTopK(n_latents=latents, k=subject.k), *(TopK(n_latents=latents, k=k) for k in ks)]
    saes = sk.train(
        [earlier(config, plan.tokens, plan.batch_rows) for config in configs], rows, seeds=[plan.seeds[0]],
        tokens=plan.tokens,
        settings=sk.TrainSettings(batch_rows=plan.batch_rows), out=folder / "many-k",
        resume=True,
    )  # fmt: skip
    x = torch.cat([batch.x for batch in measured.batches(4096)])
    hierarchical, *apart = saes
    found = {
        "hierarchical": [fvu(x, hierarchical.with_k(k).reconstruct(x)) for k in ks],
        "trained for each k": [fvu(x, sae.reconstruct(x)) for sae in apart],
        f"trained for k={subject.k}": [fvu(x, apart[-1].with_k(k).reconstruct(x)) for k in ks],
    }
    return {"latents": latents, "ks": ks, "fvu": found}


def cost_cell(subject: Subject, plan: Plan, rows: Any) -> dict[str, Any]:
    """Seconds per training step, all kinds side by side: each in turn, many times, on the same rows."""
    x = next(iter(rows.batches(plan.batch_rows))).x
    sizes, widest = plan.sizes, plan.widest
    kinds: dict[str, Any] = {f"topk {size}": TopK(n_latents=size, k=subject.k) for size in sizes}
    kinds["matryoshka"] = Matryoshka(n_latents=widest, k=subject.k, sizes=sizes)
    kinds["hierarchical"] = HierarchicalTopK(n_latents=widest, k=subject.k)
    learners = {}
    for name, config in kinds.items():
        resolved = resolve(config, x.shape[1], 1000, plan.batch_rows)
        learners[name] = initialize_learner(config, 0, resolved, bias=x.mean(0), scale=None, sample=x, device="cpu")
    found: dict[str, Any] = {"batch_rows": plan.batch_rows, "d_in": x.shape[1]}
    for step in ("plain", "fused"):
        if step not in STEPS:
            continue
        seconds: dict[str, list[float]] = {name: [] for name in kinds}
        for turn in range(plan.cost_steps + 1):
            for name, learner in learners.items():
                begun = time.perf_counter()
                STEPS[step](learner, x)
                if turn:  # the first turn only warms up
                    seconds[name].append(time.perf_counter() - begun)
        median = {name: statistics.median(values) for name, values in seconds.items()}
        found[step] = {
            "seconds_per_step": {name: round(value, 5) for name, value in median.items()},
            "matryoshka_to_one": median["matryoshka"] / median[f"topk {widest}"],
            "hierarchical_to_one": median["hierarchical"] / median[f"topk {widest}"],
            "separate_to_one": sum(median[f"topk {size}"] for size in sizes) / median[f"topk {widest}"],
        }
    return found


# ------------------------------------------------------------------------------------------------------------ together


def curves_of(
    compared: list[dict[str, Any]], overlap: dict[str, Any], probes: list[dict[str, Any]]
) -> dict[str, dict[str, dict[str, Any]]]:
    """``way -> metric -> size -> interval over seeds``."""
    found: dict[str, dict[str, dict[str, Any]]] = {}
    for index, result in enumerate(compared):
        for point in result["curves"]:
            for metric, value in point.items():
                if isinstance(value, dict):
                    by_size = found.setdefault(point["name"], {}).setdefault(metric, {})
                    by_size.setdefault(str(point["size"]), [None] * len(compared))[index] = value["value"]
    for probe in probes:
        for way, by_size in probe["macro_f1"].items():
            for size, value in by_size.items():
                found[way].setdefault("macro_f1", {}).setdefault(size, []).append(value)
    curves = {
        way: {
            metric: {size: page.interval(values) for size, values in sizes.items()} for metric, sizes in metrics.items()
        }
        for way, metrics in found.items()
    }
    for way, by_size in overlap["shared"].items():
        curves[way]["shared"] = {
            size: {"value": value, "low": None, "high": None, "by_seed": []} for size, value in by_size.items()
        }
    return curves


def laws_of(compared: list[dict[str, Any]], what: str) -> dict[str, Any]:
    """Exponents of the fitted power laws over seeds, and how often each rival fits better."""
    found: dict[str, Any] = {}
    for result in compared:
        for each in result[what]:
            fit = each["fit"]
            if fit is not None:
                law = found.setdefault(each["by"], {"alpha": [], "r2": [], "rivals": {}})
                law["alpha"].append(fit["alpha"]["value"])
                law["r2"].append(fit["r2"])
                for rival in fit["rivals"]:
                    law["rivals"].setdefault(rival["name"], []).append(rival["verdict"])
    return {
        by: {"alpha": page.interval(law["alpha"]), "r2": page.interval(law["r2"]), "rivals": law["rivals"]}
        for by, law in found.items()
    }


def main() -> None:
    """Run what is missing, then write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="tiny sizes; results stay in the work folder")
    parser.add_argument("--work", type=Path, default=HERE.parents[1] / "build" / "study-progressive")
    parser.add_argument("--model", choices=[subject.name for subject in SUBJECTS], help="one of the models only")
    parser.add_argument("--page", action="store_true", help="only write the page again, from the stored results")
    options = parser.parse_args()
    if options.page:
        page.write(sorted((HERE / "results").glob("*.json")), HERE / "README.md")
        return
    plan = QUICK if options.quick else Plan()
    digest = hashlib.sha256(repr((plan, BY, SUBJECTS)).encode()).hexdigest()[:8]  # cells of another plan are not reused
    work = options.work / f"{'quick' if options.quick else 'full'}-{digest}"
    results = work / "results" if options.quick else HERE / "results"
    for subject in SUBJECTS:
        if options.model not in (None, subject.name):
            continue
        if subject.name != "builtin" and not Path(subject.model).is_dir():
            print(f"skipped {subject.name}: {subject.model} is not there (set SAEKIT_SHARED_DATA)")
            continue
        write_json(results / f"{subject.name}.json", run_subject(subject, plan, work))
    readme = work / "README.md" if options.quick else HERE / "README.md"
    page.write(sorted(results.glob("*.json")), readme)
    print(f"wrote {readme}")


if __name__ == "__main__":
    main()
