"""How many latents are needed? Pruned, nested and separately trained SAEs on two small language models.

    python studies/progressive/run.py                 everything; about half an hour of one core
    python studies/progressive/run.py --quick         the same in two minutes, to see that it works

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
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import page
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import f1_score
from sklearn.preprocessing import MaxAbsScaler

import saekit as sk
from saekit import kernels
from saekit.files import read_json, write_json
from saekit.inputs.corpus import paragraphs
from saekit.measure.accumulators import fvu
from saekit.measure.importance import importance
from saekit.rows.pooling import Ask, pool_texts
from saekit.rows.split import halves
from saekit.sae.naming import training_config
from saekit.sizes.latent_metrics import seed_overlap
from saekit.sizes.progressive import progressive
from saekit.sizes.ranking import rank
from saekit.sizes.settings import ProgressiveSettings
from saekit.training.config import HierarchicalTopK, Matryoshka, TopK
from saekit.training.defaults import resolve
from saekit.training.fused import fused_step
from saekit.training.learner import initialize_learner
from saekit.training.step import plain_step

HERE = Path(__file__).resolve().parent
SHARED = Path(os.environ.get("SAEKIT_SHARED_DATA", HERE.parents[1].parent / "shared" / "data"))
STORIES = "tinystories_truecased_3678.jsonl.gz"

BY = ("energy", "frequency", "attribution", "unsorted")
PROBED = ("energy", "frequency", "unsorted")


@dataclass(frozen=True)
class Plan:
    """What is run; the name of the work folder depends on it."""

    sizes: tuple[int, ...] = ()
    """Numbers of latents; where none are given, those of the model."""
    seeds: tuple[int, ...] = (0, 1, 2, 3)
    tokens: int = 600_000
    """Rows that SAEs are trained on; those of texts that give fewer are seen again."""
    batch_rows: int = 1024
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

    @property
    def middle(self) -> int:
        """Latents of the SAE for every k."""
        return self.sizes[len(self.sizes) // 2]

    @property
    def between(self) -> tuple[int, ...]:
        """Sizes half-way between those that the nested SAE is trained for, on a scale of factors."""
        return tuple(round((a * b) ** 0.5) for a, b in zip(self.sizes, self.sizes[1:]))


QUICK = Plan(
    sizes=(64, 128, 256), seeds=(0, 1), tokens=8192, batch_rows=256, heldout_rows=2048, ce_tokens=256, sample_rows=64,
    probe_texts=80, cost_steps=2, probe_tokens=32,
)  # fmt: skip


@dataclass(frozen=True)
class Subject:
    """One language model with its texts."""

    name: str
    model: str
    layer: int
    k: int
    sizes: tuple[int, ...]
    """Numbers of latents, up to the most of which few die in a run of this length."""

    @property
    def ks(self) -> tuple[int, int, int]:
        """Levels of sparsity."""
        return self.k // 2, self.k, 2 * self.k

    def texts(self) -> tuple[Any, Any]:
        """Texts to train on, and others to measure on."""
        if self.name == "builtin":
            return "builtin@train", "builtin@heldout"
        texts = sk.read_texts(SHARED / "text" / STORIES, columns=())
        return list(texts[:-400]), list(texts[-400:])


SUBJECTS = (
    Subject("stories260K", str(SHARED / "stories260K"), 2, 8, (128, 256, 512, 1024)),
    Subject("builtin", "builtin", 2, 16, (256, 512, 1024, 2048)),
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
    plan = replace(plan, sizes=plan.sizes or subject.sizes)
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
    everything = {seed: load_saes(folder / f"seed{seed}") for seed in plan.seeds}
    saes = {seed: of_k(everything[seed], subject.k) for seed in plan.seeds}

    def measure(k: int, settings: ProgressiveSettings, **language: Any) -> list[dict[str, Any]]:
        """What pruned, nested and separately trained SAEs of a k are worth, by seed."""
        return [
            cells.run(
                f"measure-k{k}-{seed}",
                lambda seed=seed: progressive(
                    of_k(everything[seed], k), measured, fit=fit, sizes=plan.sizes, settings=settings, **language
                ).to_json(),
            )
            for seed in plan.seeds
        ]

    full = ProgressiveSettings(by=BY, tokens=plan.ce_tokens, sample_rows=plan.sample_rows, intervals=False)
    short = ProgressiveSettings(by=("energy",), sample_rows=0, latents=False, intervals=False)
    compared = measure(subject.k, full, model=lm, data=measure_on)
    levels = {k: measure(k, short) for k in subject.ks if k != subject.k}
    overlap = cells.run("overlap", lambda: overlap_cell(saes, fit, plan))
    probes = (
        [cells.run(f"probe-{seed}", lambda seed=seed: probe_cell(lm, saes[seed], fit, plan)) for seed in plan.seeds]
        if subject.name == "builtin"
        else []
    )
    further = [
        cells.run(f"further-{seed}", lambda seed=seed: further_cell(everything[seed], subject, plan, measured))
        for seed in plan.seeds
    ]
    cost = cells.run("cost", lambda: cost_cell(subject, plan, rows))
    return {
        "kind": "study_progressive",
        "schema": 2,
        "model": subject.name,
        "plan": {
            **asdict(plan), "between": plan.between, "k": subject.k, "layer": subject.layer, "d_in": lm.d_model,
            "by": list(BY),
        },
        "distinct_rows": rows.n_rows,
        "versions": compared[0]["versions"],
        "n_rows": compared[0]["n_rows"],
        "n_tokens": compared[0]["language_model"]["n_tokens"],
        "ce_clean": compared[0]["curves"][0]["ce_clean"]["value"],
        "curves": curves_of(compared, overlap["shared"], probes),
        "levels": {str(k): curves_of(found, {}, []) for k, found in levels.items()},
        "dead": {str(k): dead_of([of_k(each, k) for each in everything.values()], plan) for k in subject.ks},
        "sampled": over_seeds([each["sampled"] for each in further]),
        "many_k": {"latents": plan.middle, "ks": subject.ks, **over_seeds([each["many_k"] for each in further])},
        "power_laws": laws_of(compared, "rankings"),
        "spectra": laws_of(compared, "spectra"),
        "cost": cost,
        "train_seconds": [each["seconds"] for each in trained],
        "seconds": round(time.monotonic() - begun, 1),
    }  # fmt: skip


def capture_rows(lm: Any, subject: Subject, texts: Any, tokens: int, out: Path) -> Any:
    """Rows in the work folder; made once."""
    if not (out / "manifest.json").is_file():
        sk.capture(lm, texts, layer=subject.layer, tokens=tokens, out=out)
    return sk.open_rows(out)


def configs_of(subject: Subject, plan: Plan) -> list[Any]:
    """Per k a vanilla SAE of each size and a nested one for all; a nested one of drawn sizes; one for every k."""
    sizes, widest = plan.sizes, plan.widest
    vanilla = [TopK(n_latents=size, k=k) for k in subject.ks for size in sizes]
    nested = [Matryoshka(n_latents=widest, k=k, sizes=sizes) for k in subject.ks]
    drawn = Matryoshka(n_latents=widest, k=subject.k, sampled=len(sizes) - 1)  # the full size is always one more
    return [*vanilla, *nested, drawn, HierarchicalTopK(n_latents=plan.middle, k=subject.ks[-1])]


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


def of_arch(saes: Mapping[str, sk.SAE], arch: str, k: int, *, sampled: bool = False) -> dict[str, sk.SAE]:
    """The SAEs that were trained in one way."""
    configs = {name: training_config(sae) for name, sae in saes.items()}
    return {
        name: sae
        for name, sae in saes.items()
        if (configs[name]["arch"], configs[name]["k"], bool(configs[name].get("sampled"))) == (arch, k, sampled)
    }


def of_k(saes: Mapping[str, sk.SAE], k: int) -> dict[str, sk.SAE]:
    """The vanilla SAEs of all sizes and the nested one with these sizes, of one k."""
    return of_arch(saes, "topk", k) | of_arch(saes, "matryoshka", k)


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


def further_cell(saes: dict[str, sk.SAE], subject: Subject, plan: Plan, measured: Any) -> dict[str, Any]:
    """FVU of nested SAEs with fixed and with drawn sizes, also between the fixed ones; and of one SAE for many k."""
    x = torch.cat([batch.x for batch in measured.batches(4096)])
    [fixed] = of_arch(saes, "matryoshka", subject.k).values()
    [drawn] = of_arch(saes, "matryoshka", subject.k, sampled=True).values()
    sizes = sorted({plan.sizes[0] // 2, *plan.sizes, *plan.between})

    def by_size(sae: sk.SAE) -> dict[str, float]:
        return {str(size): fvu(x, sae.take(size).reconstruct(x)) for size in sizes}

    def by_k(sae: sk.SAE) -> dict[str, float]:
        return {str(k): fvu(x, sae.with_k(k).reconstruct(x)) for k in subject.ks}

    most = subject.ks[-1]
    [hierarchical] = of_arch(saes, "hierarchical-topk", most).values()
    apart = {k: next(v for v in of_arch(saes, "topk", k).values() if v.n_latents == plan.middle) for k in subject.ks}
    many = {
        "hierarchical": by_k(hierarchical),
        "trained for each k": {str(k): fvu(x, sae.reconstruct(x)) for k, sae in apart.items()},
        f"trained for k={most}": by_k(apart[most]),
    }
    return {
        "sampled": {page.NESTED: {"fvu": by_size(fixed)}, page.DRAWN: {"fvu": by_size(drawn)}},
        "many_k": {"fvu": many},
    }


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
    has_kernels = kernels.step_kernels(torch.device("cpu")) is not None
    for step, run in (("plain", plain_step), *([("fused", fused_step)] if has_kernels else [])):
        seconds: dict[str, list[float]] = {name: [] for name in kinds}
        for turn in range(plan.cost_steps + 1):
            for name, learner in learners.items():
                begun = time.perf_counter()
                run(learner, x)
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
    compared: Sequence[dict[str, Any]], shared: Mapping[str, Any], probes: Sequence[dict[str, Any]]
) -> dict[str, dict[str, dict[str, Any]]]:
    """``way -> metric -> size -> interval over seeds``."""
    found: dict[str, dict[str, dict[str, Any]]] = {}
    for index, result in enumerate(compared):
        for point in result["curves"]:
            for metric, value in point.items():
                if isinstance(value, dict) and "value" in value:
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
    for way, by_size in shared.items():
        curves[way]["shared"] = {
            size: {"value": value, "low": None, "high": None, "by_seed": []} for size, value in by_size.items()
        }
    return curves


def over_seeds(found: Sequence[Any]) -> Any:
    """Intervals over seeds in place of the numbers, in nested dictionaries of one shape."""
    if isinstance(found[0], dict):
        return {key: over_seeds([each[key] for each in found]) for key in found[0]}
    return page.interval(list(found))


def dead_of(saes: Sequence[Mapping[str, sk.SAE]], plan: Plan) -> dict[str, Any]:
    """How many latents of the widest vanilla SAE and of the nested one fired on none of the last rows, by seed."""
    found: dict[str, Any] = {}
    for way, arch in ((page.APART, "topk"), (page.NESTED, "matryoshka")):
        facts = [sae.provenance for each in saes for n, sae in each.items() if n.startswith(f"{arch}-{plan.widest}-")]
        found[way] = page.interval([each["metrics"]["dead_fraction"] for each in facts])
        found["last_rows"] = facts[0]["resolved"]["dead_after_rows"]
    return found


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
