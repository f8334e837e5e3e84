"""Are SAE features useful for classification, and what do they cost?

    python studies/classify/run.py                      # all sets, models and arms
    python studies/classify/run.py --sets paradetox     # one of them; what is complete is not computed again
    python studies/classify/run.py --quick              # a minute, to see that everything works; its page goes to --out
    python studies/classify/run.py --page               # the page again, from the results
    python studies/classify/context.py                  # then: the sentence embedding and a small head, for context
    python studies/classify/beat_dense.py               # and: can scikit-learn alone beat the dense baseline?

SAEs are trained here, on the training rows of all sets and on other texts. Everything runs offline, on the sample data
beside the checkout (SAEKIT_SHARED_DATA). Cells, features and classifiers go to ``--out`` (``saekit report`` makes a page
of each folder there), results to ``results/`` here; every number of README.md is read from these.
"""

# ruff: noqa: E501 (sentences and tables of the page)
from __future__ import annotations

import argparse
import importlib.util
import os
import sys
import time
import tomllib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from selected_alignment import decoder_alignment, selected_alignment

import saekit as sk
from saekit.classification.arms import VOTERS
from saekit.classification.plan import Plan, plan_classification
from saekit.classification.result import ArmScore, Classification, summarize
from saekit.classification.run import run_plan
from saekit.classification.settings import Budget, ClassifierSettings
from saekit.classification.verdicts import difference
from saekit.evaluation.settings import EvaluationSettings
from saekit.files import read_json, write_bytes, write_json, write_sealed
from saekit.inputs.labelled import Labelled, read_labelled
from saekit.measure.results import Measured
from saekit.measure.verdicts import Claim, Stored, family_verdicts, non_inferiority, verdict
from saekit.places import without_local_paths
from saekit.report.classification import write_classification_figures
from saekit.rows.pooling import Ask, pool_texts

HERE = Path(__file__).resolve().parent

SHARED = Path(os.environ.get("SAEKIT_SHARED_DATA", HERE.parents[2] / "shared" / "data"))
OTHER_TEXTS = ("text/tinystories_1000_clean.jsonl.gz", "text/wikitext2_valid.txt.gz")
OTHER_CHARACTERS = 400_000
"""Of each of the other texts."""
SEARCHED = "-families"
"""End of the names of runs that search every family."""
SHUFFLED = "minilm-shuffled"
"""The run that shuffles labels more often."""
SET_KEYS = ("label", "group", "split_column", "train_rows", "test_rows")

Config = Mapping[str, Any]


def main() -> int:
    """Run what is asked for; exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=HERE.parents[1] / "runs" / "classify")
    parser.add_argument("--sets", help="names of data sets, with commas between [all]")
    parser.add_argument("--runs", help="names of runs, with commas between [all]")
    parser.add_argument("--quick", action="store_true", help="small, to see that everything works")
    parser.add_argument("--page", action="store_true", help="only write README.md again")
    arguments = parser.parse_args()
    config = tomllib.loads((HERE / "config.toml").read_text(encoding="utf-8"))
    if arguments.page:
        folder = arguments.out / "quick" if arguments.quick else HERE
        if (folder / "results").is_dir():
            write_page(config, folder)
        return 0
    if not (SHARED / "labelled").is_dir():
        tell(f"skipped: no sample data at `{SHARED}`; set SAEKIT_SHARED_DATA to its folder")
        return 0
    out = arguments.out / "quick" if arguments.quick else arguments.out
    folder = out if arguments.quick else HERE
    if arguments.quick:
        config = smaller(config)
    sets = chosen(config["sets"], arguments.sets)
    runs = chosen(config["runs"], arguments.runs)
    since = time.monotonic()
    tables = {each["name"]: table_of(each) for each in config["sets"]}
    splits = {each["name"]: split_of(each, tables[each["name"]], config) for each in config["sets"]}
    for name, model in config["models"].items():
        mine = [run for run in runs if run["model"] == name]
        path = model_path(model["path"])
        if path is None:
            tell(f"skipped: `{model['path']}` is not installed")
            continue
        if not mine:
            continue
        lm = sk.load_model(path)
        saes = trained(name, lm, model, splits, out / "saes", needed(mine, model))
        for run in mine:
            for each in (each for each in sets if each["name"] not in run.get("without", ())):
                classify_set(lm, saes, run, each, tables[each["name"]], config, out, folder)
        if any(run["name"] == "minilm" for run in mine):
            for each in sets:
                alignment_of(lm, saes, each, tables[each["name"]], config, out, folder)
    tell(f"all in {time.monotonic() - since:.0f} s")
    if any((folder / "results").glob("minilm-*.json")):
        write_page(config, folder)
    else:
        tell("no page: it is about the runs of minilm, which were not made")
    return 0


def tell(message: str) -> None:
    """A line on stderr."""
    print(message, file=sys.stderr, flush=True)


def chosen(items: Sequence[Config], names: str | None) -> list[Config]:
    """The items of these names."""
    if names is None:
        return list(items)
    wanted = names.split(",")
    unknown = set(wanted) - {item["name"] for item in items}
    if unknown:
        raise SystemExit(f"unknown: {sorted(unknown)}; there are {[item['name'] for item in items]}")
    return [item for item in items if item["name"] in wanted]


def smaller(config: Config) -> dict[str, Any]:
    """The same study in a minute."""
    quick = config["quick"]
    sets = [
        {**{k: v for k, v in each.items() if k != "train_sizes"}, "train_rows": quick["train_rows"],
         "test_rows": quick["test_rows"]}
        for each in config["sets"] if each["name"] in quick["sets"]
    ]  # fmt: skip
    models = {}
    for name, model in config["models"].items():
        saes = [{**sae, "latents": quick["latents"], "width": sae["latents"]} for sae in model["saes"]]
        models[name] = {**model, **{k: quick[k] for k in ("tokens", "rows")}, "saes": saes}
    return {
        **config, "sets": sets, "models": models, "ks": quick["ks"], "control_ks": [4],
        "budget": {"C": quick["C"], "alphas": [1.0, 100.0], "shrinkages": [0.3], "depths": [3], "thresholds": [0.0],
                   "widen": 0},
        "search_pools": quick["search_pools"], "probes": quick["probes"],
        "runs": [{**run, **({"ks": quick["ks"]} if "ks" in run else {})} for run in config["runs"]],
    }  # fmt: skip


def model_path(name: str) -> str | None:
    """``builtin``, or the folder of the weights within a package; None where it is not installed."""
    if name == "builtin":
        return name
    spec = importlib.util.find_spec(name)
    if spec is None or spec.origin is None:
        return None
    return str(next(file.parent for file in sorted(Path(spec.origin).parent.rglob("model.safetensors"))))


# --------------------------------------------------------------------------------------------------------------- data


def table_of(each: Config) -> list[dict[str, Any]]:
    """The rows of a data set."""
    texts = sk.read_texts(SHARED / each["file"])
    rows = [
        {"text": text, **{name: values[i] for name, values in texts.columns.items()}} for i, text in enumerate(texts)
    ]
    only = each.get("only", {})
    return [row for row in rows if all(row[name] == value for name, value in only.items())]


def settings_of(each: Config, run: Config | None = None) -> dict[str, Any]:
    """How a data set is read and split; a run may draw fewer training rows, which are among those of the others."""
    found = {name: each[name] for name in SET_KEYS if name in each}
    if run is not None and "train_rows" in run and "train_rows" in found:
        found["train_rows"] = min(found["train_rows"], run["train_rows"])
    return found


def split_of(each: Config, table: Sequence[Mapping[str, Any]], config: Config) -> Labelled:
    """The same split that every classification of the set makes."""
    return read_labelled(table, split=sk.Split(seed=config["seed"], **settings_of(each)))


def training_texts(splits: Mapping[str, Labelled], tokens: int) -> list[str]:
    """Texts for the SAEs: the training rows of every set, and other texts; never a test row."""
    parts = [[data.texts[row] for row in data.parts[0][0]] for data in splits.values()]
    for file in OTHER_TEXTS:
        found = sk.read_texts(SHARED / file, characters=OTHER_CHARACTERS).texts
        parts.append([text for text in found if len(text) > 40])
    budget = tokens * 4 // len(parts)  # characters of each part
    texts: list[str] = []
    for part in parts:
        taken = 0
        for text in part:
            texts.append(text[:2000])
            taken += len(texts[-1])
            if taken > budget:
                break
    return [texts[i] for i in np.random.default_rng(0).permutation(len(texts))]


# --------------------------------------------------------------------------------------------------------------- SAEs


def sae_name(sae: Config, seed: int) -> str:
    """``layers.4-4096-seed0``."""
    control = f"-{sae['control']}" if sae.get("control") else ""
    return f"layers.{sae['layer']}-{sae.get('width', sae['latents'])}{control}-seed{seed}"


def needed(runs: Sequence[Config], model: Config) -> set[str]:
    """Names of the SAEs that some runs of a model read; all, other seeds too, where one looks at what other seeds find."""
    if any(run["name"] == "minilm" for run in runs):
        return {sae_name(sae, seed) for sae in model["saes"] for seed in sae["seeds"]}
    return {name for run in runs for name in run["saes"]}


def trained(
    name: str, lm: Any, model: Config, splits: Mapping[str, Labelled], out: Path, wanted: set[str]
) -> dict[str, Path]:
    """Folders of the SAEs of a model, by name; of those wanted, what is not there is trained, each as if alone."""
    folders = {sae_name(sae, seed): out / name / sae_name(sae, seed) for sae in model["saes"] for seed in sae["seeds"]}
    left = [
        {**sae, "seeds": seeds}
        for sae in model["saes"]
        if (
            seeds := [
                seed
                for seed in sae["seeds"]
                if sae_name(sae, seed) in wanted and not (folders[sae_name(sae, seed)] / "sae.json").is_file()
            ]
        )
    ]
    if left:
        since = time.monotonic()
        layers = sorted({sae["layer"] for sae in left})
        texts = training_texts(splits, model["tokens"])
        rows = sk.capture(lm, texts, layer=layers, tokens=model["tokens"])
        rows = rows if isinstance(rows, dict) else {f"layers.{layers[0]}": rows}
        tell(f"{name}: {next(iter(rows.values())).n_rows:,} rows at {list(rows)} in {time.monotonic() - since:.0f} s")
        for sae in left:
            since = time.monotonic()
            settings = {"control": sae["control"]} if sae.get("control") else {}
            made = sk.train(
                sk.TopK(n_latents=sae["latents"], k=sae["k"], lr=model.get("lr"), **settings),
                rows[f"layers.{sae['layer']}"], seeds=sae["seeds"], tokens=model["rows"],
            )  # fmt: skip
            for seed, each in zip(sae["seeds"], made):
                each.save(folders[sae_name(sae, seed)])
            shown = sk.evaluate(
                made[0],
                rows[f"layers.{sae['layer']}"],
                settings=EvaluationSettings(max_rows=20_000, controls=False, intervals=False),
            ).metrics
            tell(f"{sae_name(sae, sae['seeds'][0])}: FVU {shown.fvu.value:.3f}, dead {shown.dead_fraction.value:.1%}, "
                 f"{time.monotonic() - since:.0f} s")  # fmt: skip
    return folders


# ----------------------------------------------------------------------------------------------------- classification


def plan_of(
    lm: Any, saes: Mapping[str, Path], run: Config, each: Config, table: Any, config: Config, out: Path
) -> Plan:
    """The plan of one run over one set."""
    settings = {name: run.get(name, config.get(name)) for name in ("pools", "ks", "control_ks")}
    more = {name: run[name] for name in ("arms", "shuffles", "hook") if name in run}
    more |= {name: config[name] for name in ("search_pools", "probes") if name in config}
    if "max_tokens" in each:
        more["max_tokens"] = each["max_tokens"]
    if run["name"] == "minilm" and "train_sizes" in each:
        more["train_sizes"] = each["train_sizes"]
    return plan_classification(
        [(name, sk.SAE.load(saes[name])) for name in run["saes"]], model=lm, data=table,
        split=sk.Split(seed=run.get("seed", config["seed"]), **settings_of(each, run)),
        settings=ClassifierSettings(
            name=each["name"], margin=config["margin"], budget=Budget(**config.get("budget", {})),
            save_arm="none", cache=str(out / "features"), **settings, **more,
        ),
        out=out / run["name"] / each["name"],
    )  # fmt: skip


def classify_set(
    lm: Any, saes: Mapping[str, Path], run: Config, each: Config, table: Any, config: Config, out: Path, folder: Path
) -> None:
    """One table: every arm of a run on one set."""
    since, results = time.monotonic(), folder / "results"
    plan = plan_of(lm, saes, run, each, table, config, out)
    result = run_plan(plan)
    write_sealed(results / f"{run['name']}-{each['name']}.json", without_local_paths(result.to_json()))
    if run["name"] == "minilm":
        write_classification_figures(result.to_json(), plan.out)
        pairs = {}
        for label, other in (("last", named(result, "last")), ("words", named(result, "words"))):
            if other is not None and result.best_sae is not None:
                pairs[label] = difference(plan, result.best_sae, other).to_json()
        for pool in config["pools"]:
            full, binary = named(result, "full", pool), named(result, "binarized", pool)
            if full is not None and binary is not None:
                pairs[f"binarized {pool}"] = difference(plan, binary, full).to_json()
        full = [named(result, "full", pool) for pool in config["pools"][:2]]
        if None not in full:
            pairs["pooling"] = difference(plan, str(full[0]), str(full[1])).to_json()
        write_json(results / f"pairs-{each['name']}.json", pairs)
        from saekit.report.classification import figures as charts

        drawn = charts(result.to_json())
        if "price" in drawn:
            write_bytes(folder / "figures" / f"price-{each['name']}.svg", on_white(drawn["price"][0].svg()))
    if "contrasts" in run:
        pairs = {
            f"{one} − {other}": difference(plan, contrasted(result, one).name, contrasted(result, other).name).to_json()
            for one, other in run["contrasts"]
        }
        write_json(results / f"pairs-{run['name']}-{each['name']}.json", pairs)
    best = result.arm(result.best_sae)
    tell(f"{run['name']} {each['name']}: {best.name} {best.macro_f1:.3f}, − dense {best.difference:+.3f} "
         f"({best.verdict}); {time.monotonic() - since:.0f} s")  # fmt: skip


def contrasted(result: Classification, word: str) -> Any:
    """The arm of all latents of an SAE (without its seed) or of a pooling, as `contrasts` of config.toml has it."""
    return next(
        arm for arm in result.arms if arm.kind == "full" and word in (arm.pool, arm.source.removesuffix("-seed0"))
    )


def on_white(svg: str) -> bytes:
    """A chart as a file of its own, readable in dark pages too."""
    return svg.replace("<svg ", '<svg style="background:#fff;color:#22272e" ', 1).encode()


def named(result: Classification, kind: str, pool: str | None = None) -> str | None:
    """The arm of a kind, the best one by inner folds."""
    arms = [arm for arm in result.arms if arm.kind == kind and (pool is None or arm.pool == pool)]
    return max(arms, key=lambda arm: arm.inner or 0).name if arms else None


def alignment_of(
    lm: Any, saes: Mapping[str, Path], each: Config, table: Any, config: Config, out: Path, folder: Path
) -> None:
    """Whether the latents that the sparse probes select are those that other seeds find."""
    run = next(run for run in config["runs"] if run["name"] == "minilm")
    main_name = run["saes"][0]
    twins = [
        name for name in saes if name.rsplit("-seed", 1)[0] == main_name.rsplit("-seed", 1)[0] and name != main_name
    ]
    results = folder / "results"
    path = results / f"{run['name']}-{each['name']}.json"
    if not twins or not path.is_file():
        return
    sae = sk.SAE.load(saes[main_name])
    alignment = alignments(sae, saes, twins)
    plan = plan_of(lm, saes, run, each, table, config, out)
    data = plan.data
    hook = str(sae.provenance["hook"])
    train = [data.texts[row] for row in data.parts[0][0]]
    X = pool_texts(
        lm, train, [Ask(("max",), sae=sae, hook=hook)], cache=plan.reader.cache, max_tokens=plan.how.max_tokens
    )[0]["max"]
    density = np.diff(X.tocsc().indptr) / X.shape[0]
    found = {}
    for arm in Classification.load(path).arms:
        if arm.kind == "sparse" and arm.source == main_name and (arm.k or 0) >= 4:
            found[arm.name] = selected_alignment(arm.selected, alignment, density).to_json()
    write_json(results / f"stability-{each['name']}.json", {"mean": float(alignment.mean()), "arms": found})


_ALIGNMENT: dict[str, np.ndarray] = {}


def alignments(sae: Any, saes: Mapping[str, Path], twins: Sequence[str]) -> np.ndarray:
    """Matched cosine of every latent with the other seeds, once for all sets."""
    key = " ".join(twins)
    if key not in _ALIGNMENT:
        _ALIGNMENT[key] = decoder_alignment(sae, [sk.SAE.load(saes[name]) for name in twins])
    return _ALIGNMENT[key]


# ----------------------------------------------------------------------------------------------------------- the page


def write_page(config: Config, folder: Path) -> None:
    """README.md from the results."""
    write_bytes(folder / "README.md", page(config, folder).encode())
    tell(f"wrote {folder / 'README.md'}")


def load_all(config: Config, folder: Path) -> dict[tuple[str, str], Classification]:
    """Results by run and set."""
    found = {}
    for run in config["runs"]:
        for each in config["sets"]:
            path = folder / "results" / f"{run['name']}-{each['name']}.json"
            if path.is_file():
                found[run["name"], each["name"]] = Classification.load(path)
    return found


def shown(measured: Mapping[str, Any] | sk.Measured | None, sign: str = "") -> str:
    """A value with its interval."""
    if measured is None:
        return "–"
    found = measured if isinstance(measured, sk.Measured) else sk.Measured.from_json(measured)
    return f"{found:{sign}.3f}"


def row(*cells: object) -> str:
    """A line of a table."""
    return "| " + " | ".join(str(cell) for cell in cells) + " |"


def heading(*cells: object) -> list[str]:
    """The first lines of a table."""
    return [row(*cells), row(*("---" for _ in cells))]


def page(config: Config, folder: Path) -> str:
    """The text of README.md."""
    results = load_all(config, folder)
    main = {name: result for (run, name), result in results.items() if run == "minilm"}
    if not main:
        raise SystemExit("there are no results yet; run without --page first")
    first = next(iter(main.values()))
    lines = [
        "# Are SAE features useful for classification?",
        "",
        "<!-- Written by run.py from results/; do not edit. -->",
        "",
        "**Before you read on.** An encoder of 22 million parameters and a language model of 2.9 million, with SAEs trained here: "
        "how SAE features compare with simple arms here says little about large models, and how they do there little about these. "
        "On small test sets (column *resolves*) most differences are undecided, which is not the same as equal.",
        "",
        "The paper *Sparse Autoencoder Features for Classifications and Transferability* (2502.11367) says yes: macro-F1 above "
        "0.8, better than hidden states and bag of words, best when summed over tokens and binarized. It gives the hidden states "
        "one token and the SAE all of them, and chooses the best configuration on the test set. Here every arm gets the same "
        "texts, pooling, folds and grids; everything is chosen within the training rows, and the test rows are read once.",
        "",
        f"Models: all-MiniLM-L6-v2 (an encoder of six blocks; residual stream after block 4, counted from 0) and saekit's built-in language model (after block 2), with "
        f"TopK SAEs trained by this study ([how far](#how-far-the-saes-are-trained)). {first.settings['intervals']['level']:.0%} intervals from test rows (groups where "
        f"there are any); differences "
        f"below {first.settings['margin']:g} macro-F1 count as none (*equivalent*). Verdicts follow the one rule of saekit "
        "([concepts](../../docs/concepts.md)), corrected for the arms of a set and, in the table below, for the sets (Holm).",
        "",
        "## What the paper says, and what we find",
        "",
        *family_claims(config, results),
        *families(config, results),
        *context(config, folder),
        *challenge(folder),
        "## Every data set: best arms, chosen by inner cross-validation",
        "",
        "Logistic regression (and shallow trees) on single poolings: the arms of the paper. What each family can do at best is "
        "in the table of families, which decides.",
        "",
        *heading("data set", "classes", "train / test", "best SAE arm", "macro-F1", "best dense arm", "macro-F1",
                 "SAE − dense", "verdict", "− learned nothing", "verdict", "resolves"),
    ]  # fmt: skip
    for run in ("minilm", "builtin"):
        for name, result in ((name, r) for (label, name), r in results.items() if label == run):
            sae, dense = result.arm(result.best_sae), result.arm(result.best_dense)
            lines.append(
                row(f"{name} ({run})", len(result.classes), f"{result.data['n_train']:,} / {result.data['n_test']:,}",
                    short(sae.name), shown(sae.macro_f1), dense.name, shown(dense.macro_f1),
                    shown(gap_of(result, sae), "+") + unit_of(result), f"**{sae.verdict}**", shown(beyond(result, sae), "+") + unit_of(result),
                    sae.control_verdict, f"{result.floor.value:.3f}")
            )  # fmt: skip
    lines += [
        "",
        "*− learned nothing*: minus the best of random projections, untrained SAEs and, on MiniLM, frozen-decoder SAEs (which "
        "learn an encoder), of the same width and L0. "
        "*resolves*: half the width of the interval of SAE − dense.",
        "",
        "In the paper: " + "; ".join(f"{each['name']}: {each['paper']}" for each in config["sets"]) + ".",
        "",
        "What the paper says of single arms:",
        "",
        *claims(config, results, folder),
        "",
        *arms_tables(main),
        *layers(config, results, folder),
        *price(main, folder),
        *alignment(main, folder),
        *over_sets(results),
        *training(results),
        "## To be kept in mind",
        "",
        *[f"- **{name}**: {warning}" for name, result in main.items() for warning in result.warnings],
        *[f"- **{each['name']}**: {each['about']}." for each in config["sets"]],
        "",
        "## Again",
        "",
        "```sh",
        "make study-classify                        # needs ../shared/data",
        "make study-classify STUDY_OPTIONS=--quick  # a minute",
        "```",
        "",
        "Settings: [config.toml](config.toml). All numbers: `results/`.",
        "",
    ]
    return "\n".join(lines)


def searched_tables(results: Mapping[tuple[str, str], Classification]) -> dict[tuple[str, str], Classification]:
    """Results with every family, by model and set."""
    return {
        (run.removesuffix(SEARCHED), name): result for (run, name), result in results.items() if run.endswith(SEARCHED)
    }


def family_claims(config: Config, results: Mapping[tuple[str, str], Classification]) -> list[str]:
    """The paper's claims about SAEs, judged from the strongest arm of every family; all tables are one family (Holm)."""
    known = searched_tables(results)
    if not known:
        return []
    saes = {key: next(each for each in result.families if each.role == "sae") for key, result in known.items()}
    gaps = sae_gaps(known)
    controls = {key: sae.control_difference for key, sae in saes.items() if sae.control_difference is not None}
    asked: list[tuple[str, Mapping[tuple[str, str], Stored], float]] = [
        ("SAE features reach macro-F1 > 0.8", {key: Stored(sae.macro_f1).oriented(1, 0.8) for key, sae in saes.items()}, 0.0),
        ("They beat what needs no SAE (hidden states under every pooling, their principal components, TF-IDF)",
         {key: Stored(gap) for key, gap in gaps.items()}, config["margin"]),
        ("*Not asked there:* the training of the SAE is what helps (minus random, untrained, frozen)",
         {key: Stored(gap) for key, gap in controls.items()}, config["margin"]),
    ]  # fmt: skip
    n = len(config["sets"]) * len(config["models"])
    lines = [
        f"Decided by the strongest arm of every family, chosen within the training rows, in {len(known)} of {n} tables (a table "
        "is a model on a data set); the intervals hold the choice. Claims about single arms (binarizing, summing, the last token) "
        "are decided below, from weaker searches.",
        "",
        *heading("claim", "here", "holds?"),
    ]
    for claim, each, margin in asked:
        words = dict(zip(each, family_verdicts([Claim(gap, margin) for gap in each.values()]), strict=True))
        up, down = ([key for key, word in words.items() if word == side] for side in ("better", "worse"))
        named = f": {', '.join(f'{name} ({run})' for run, name in up)}" if up else ""
        counts = ", ".join(
            f"{'so' if word == 'better' else word} on {list(words.values()).count(word)}"
            for word in dict.fromkeys(words.values())
        )
        lines.append(row(claim, f"{counts} of {len(words)} tables{named}", judged(up, down, n)))
    return [*lines, ""]


def families(config: Config, results: Mapping[tuple[str, str], Classification]) -> list[str]:
    """The strongest arm of every family, and what a reader may conclude."""
    known = searched_tables(results)
    if not known:
        return []
    whole = {each["name"]: each.get("train_rows") for each in config["sets"]}
    fewer = [
        f"{name} ({run}) {result.data['n_train']:,} of {whole[name]:,}" for (run, name), result in known.items()
        if whole[name] is not None and result.data["n_train"] < whole[name]
    ]  # fmt: skip
    most = max(config["ks"])
    edge = [
        key for key, result in known.items() for each in result.families
        if f"PCA {most}," in each.strongest.partition(" & ")[0]
    ]  # fmt: skip
    lines = [
        "## Families, each with its strongest arm",
        "",
        "Representation, probe and penalty are searched within the training rows, for every family alike, and so is whether up to "
        f"{VOTERS} of them vote (*a & b*: the mean of their class probabilities). Intervals hold the choice: training rows (groups) are "
        "resampled, arm, penalty or vote are chosen again, on both sides of a difference, but not who votes with whom, so that intervals "
        "of votes are somewhat too narrow. *Chosen*: in how many of these resamples it is the same arm or vote."
        f"{voting(known)} Where arms are chosen and compared by AUC, nothing chose the threshold "
        "that macro-F1 depends on."
        + (f" For time, fewer training rows than in the tables below: {', '.join(fewer)}." if fewer else "")
        + f" The best arm of PCA keeps the most components that it may ({most}) on {len(edge)} of {len(known)} tables: with all of them it "
        "is the dense family, which stands in the same table.",
        "",
        *heading("data set", "family", "strongest arm", "chosen", "macro-F1", "AUC", "− best non-SAE", "verdict"),
    ]
    for (run, name), result in known.items():
        is_auc = result.verdict_metric == "auc"
        for each in result.families:
            gap = each.auc_difference if is_auc else each.difference
            label = f"**{each.name}**" if each.role == "sae" else each.name
            lines.append(
                row(f"{name} ({run})", label, searched(each), f"{each.again.get(each.strongest, 0):.0%}",
                    shown(each.macro_f1), shown(each.auc), shown(gap, "+") + unit_of(result), each.verdict)
            )  # fmt: skip
    lines += ["", *(f"- {name} ({run}): {result.conclusion()}" for (run, name), result in known.items()), ""]
    saes = [next(each for each in result.families if each.role == "sae") for result in known.values()]
    against = {
        "the best non-SAE": [each.verdict for each in saes],
        "the best of what learned nothing": [each.control_verdict for each in saes],
    }
    missing = [
        f"{each['name']} ({run})"
        for run in ("minilm", "builtin")
        for each in config["sets"]
        if (run, each["name"]) not in known
    ]
    if missing:
        lines += [f"Not searched yet: {', '.join(missing)}.", ""]
    for name, words in against.items():
        counts = ", ".join(f"{word} on {words.count(word)}" for word in dict.fromkeys(words))
        lines += [f"SAE minus {name}, over {len(words)} tables: {counts}.", ""]
    return [*lines, f"**What a reader may conclude:** {concluded(config, known)}", ""]


def sae_gaps(known: Mapping[tuple[str, str], Classification]) -> dict[tuple[str, str], Measured]:
    """SAE minus the best non-SAE, by table, in the metric of its verdicts."""
    saes = {key: next(each for each in result.families if each.role == "sae") for key, result in known.items()}
    return {
        key: sae.auc_difference if known[key].verdict_metric == "auc" else sae.difference for key, sae in saes.items()
    }


def concluded(config: Config, known: Mapping[tuple[str, str], Classification]) -> str:
    """What all tables of families together allow, in a few sentences; all tables are one family (Holm)."""
    gaps, margin = sae_gaps(known), config["margin"]
    words = dict(zip(gaps, family_verdicts([Claim(Stored(gap), margin) for gap in gaps.values()]), strict=True))

    def on(word: str) -> str:
        names = [f"{name} ({run})" for (run, name), each in words.items() if each == word]
        return f"on {len(names)} of {len(words)} tables" + (f" ({', '.join(names)})" if names else "")

    said = (
        "corrected for the number of tables, SAE features are shown to classify better than the best of TF-IDF, pooled hidden "
        f"states and their components, by more than {margin:g}, {on('better')}, worse {on('worse')}, and as well {on('equivalent')}."
    )
    halves = sorted((gap.high - gap.low) / 2 for key, gap in gaps.items()
                    if words[key] == "undecided" and gap.low is not None and gap.high is not None)  # fmt: skip
    if not halves:
        return said
    below = [f"{name} ({run})" for (run, name), gap in gaps.items()
             if words[run, name] == "undecided" and gap.high is not None and gap.high < 0]  # fmt: skip
    above = [f"{name} ({run})" for (run, name), gap in gaps.items()
             if words[run, name] == "undecided" and gap.low is not None and gap.low > 0]  # fmt: skip
    lower = "".join(
        f" On {len(names)} of them ({', '.join(names)}) the whole interval of the table itself is {side} 0."
        for names, side in ((below, "below"), (above, "above"))
        if names
    )
    return (
        f"{said} On the other {len(halves)} the test sets are too small to tell, which is no evidence that they are equal: half the "
        f"interval of one table is {halves[0]:.3f} to {halves[-1]:.3f}.{lower}"
    )


def training(results: Mapping[tuple[str, str], Classification]) -> list[str]:
    """How far the SAEs of all tables are trained: FVU, dead latents, and what twice the rows would change."""
    found: dict[tuple[str, str], dict[str, Mapping[str, Any]]] = {}
    for (run, _), result in results.items():
        for sae in result.saes:
            found.setdefault((run.partition("-")[0], sae["name"]), {})[sae["digest"]] = sae["provenance"]
    lines = [
        "## How far the SAEs are trained",
        "",
        "FVU and dead latents as training saw them; *fall*: by how much twice the rows would lower FVU, from the curve of the run "
        "(from 10% on saekit's own check calls an SAE undertrained).",
        "",
        *heading("model", "layer, latents, seed", "k", "peak learning rate", "FVU", "dead", "fall"),
    ]
    for (model, name), made in found.items():
        for each in made.values():
            metrics = each["metrics"]
            lines.append(
                row(model, name, each["config"]["k"], f"{each['resolved']['lr']:.2g}", f"{metrics['fvu']:.3f}", f"{metrics['dead_fraction']:.1%}",
                    f"{metrics['fvu_fall_per_doubling']:.0%}")
            )  # fmt: skip
    twice = [name for (_, name), made in found.items() if len(made) > 1]
    if twice:
        lines += ["", f"Made more than once, and not the same in all tables: {', '.join(twice)}."]
    return [*lines, ""]


def searched(family: Any) -> str:
    """What a search chose for a family: representation and probe."""
    return str(family.strongest.rpartition(": ")[2])


def voting(known: Mapping[tuple[str, str], Classification]) -> str:
    """What votes gain over the strongest arm alone, the one that the inner folds prefer among those that do not vote."""
    gains: dict[str, list[float]] = {}
    families = {
        (data, each.name, None if each.name == "TF-IDF" else run): (result, each)  # words are the same to all models
        for (run, data), result in known.items() for each in result.families
    }  # fmt: skip
    for result, each in families.values():
        arm = result.arm(each.strongest.partition(": ")[0])
        if " & " in each.strongest:
            gap = getattr(each, result.verdict_metric).value - getattr(arm, result.verdict_metric).value
            gains.setdefault(each.name, []).append(gap)
    every = [gain for some in gains.values() for gain in some]
    if not every:
        return ""
    total = len(families)
    return (
        f" Votes are chosen in {len(every)} of {total} cases; there they gain {np.mean(every):+.4f} over the best arm alone, in the "
        f"metric of the verdicts (more in {sum(gain > 0 for gain in every)}, less in {sum(gain < 0 for gain in every)}; "
        + ", ".join(f"{name} {np.mean(some):+.4f}" for name, some in gains.items())
        + ")."
    )


def context(config: Config, folder: Path) -> list[str]:
    """What people would use without an SAE."""
    path = folder / "results" / "context.json"
    if not path.is_file():
        return []
    found = read_json(path)
    lines = [
        "## For context: the encoder as people use it",
        "",
        "`context.py`: the sentence embedding (mean over tokens of the states after MiniLM's last block, length 1) with logistic "
        f"regression, and with a head of {found['head']['hidden']} hidden units trained by torch on the frozen embeddings, where "
        f"there are {found['head']['rows']} training rows. They read a later layer than the arms above; no verdict rests on them.",
        "",
        *heading("data set", "embedding + logistic, macro-F1", "AUC", "embedding + head, macro-F1", "AUC"),
    ]
    for name in (each["name"] for each in config["sets"] if each["name"] in found["sets"]):
        each = found["sets"][name]
        cells = [
            shown(each.get(arm, {}).get(metric)) for arm in ("embedding", "head") for metric in ("macro_f1", "auc")
        ]
        lines.append(row(name, *cells))
    return [*lines, ""]


def challenge(folder: Path) -> list[str]:
    """What scikit-learn alone reaches on the same pooled hidden states."""
    path = folder / "results" / "beat_dense.json"
    if not path.is_file():
        return []
    found = read_json(path)
    lines = [
        "## Is there a better dense baseline?",
        "",
        f"`beat_dense.py` tries, with scikit-learn alone, on the same pooled rows; it may let two "
        f"classifiers vote, as a family here up to four. It beats the dense family where it is more "
        f"than {found['margin']:g} above. Intervals are over test rows, nothing refitted: where one holds 0, so few rows cannot "
        "tell it from chance. *Inner*: the scores by which both chose within the training rows, ours in 3 folds, the "
        "challenger's in 4.",
        "",
        *heading("data set", "metric", "dense family", "test", "inner", "challenger", "test", "inner", "challenger − dense",
                 "beaten?"),
    ]  # fmt: skip
    for each in found["sets"]:
        run = each["run"].removesuffix(SEARCHED)
        gap = f"{each['gap']:+.3f} [{each['low']:+.3f}, {each['high']:+.3f}]"
        told = "no" if each["gap"] <= found["margin"] else "yes" if each["low"] > 0 else "yes, but within chance"
        lines.append(
            row(f"{each['set']} ({run})", each["metric"], each["arm"].removeprefix("strongest dense: "),
                f"{each['dense']:.3f}", f"{each['dense_inner']:.3f}", each["chose"], f"{each['challenger']:.3f}",
                f"{each['challenger_inner']:.3f}", gap, told)
        )  # fmt: skip
    return [*lines, ""]


def gap_of(result: Classification, arm: ArmScore) -> Measured:
    """An arm minus the best dense one, in the metric of the verdicts."""
    return arm.auc_difference if result.verdict_metric == "auc" else arm.difference


def beyond(result: Classification, arm: ArmScore) -> Measured | None:
    """An arm minus the best dictionary that learned nothing, in the metric of the verdicts."""
    return arm.control_auc_difference if result.verdict_metric == "auc" else arm.control_difference


def unit_of(result: Classification) -> str:
    """What a difference is of, where it is not macro-F1."""
    return " AUC" if result.verdict_metric == "auc" else ""


def short(name: str) -> str:
    """An arm's name without the name of its SAE."""
    words = name.split()
    return " ".join(["SAE" if word.startswith("layers.") else word for word in words])


def claims(config: Config, results: Mapping[tuple[str, str], Classification], folder: Path) -> list[str]:
    """The paper's claims about single arms with our verdicts, computed."""
    main = {name: result for (run, name), result in results.items() if run == "minilm"}
    pairs = {name: read_json(folder / "results" / f"pairs-{name}.json") for name in main}

    def decided(key: str, rule: Rule = verdict) -> tuple[list[str], list[str], str]:
        """What a stored pair says of every set."""
        return over_all({name: Measured.from_json(p[key]) for name, p in pairs.items() if key in p}, rule)

    def over_all(gaps: Mapping[str, Measured], rule: Rule = verdict) -> tuple[list[str], list[str], str]:
        """The sets where it is so, those where the reverse is, and what the page says; the sets are one family (Holm)."""
        known = {name: Stored(gap) for name, gap in gaps.items()}
        words = dict(zip(known, family_verdicts([Claim(each, rule=rule) for each in known.values()]), strict=True))
        up, down = ([name for name, word in words.items() if word in side] for side in (_SO, _REVERSE))
        counts = ", ".join(f"{word} on {list(words.values()).count(word)}" for word in dict.fromkeys(words.values()))
        return up, down, f"{counts} of {len(known)} sets"

    lines = heading("claim", "here", "holds?")
    n = len(main)
    up, down, told = decided("last")
    lines.append(row("They beat hidden states (last token)", told, judged(up, down, n)))
    up, down, told = over_all({name: gap_of(result, result.arm(result.best_sae)) for name, result in main.items()})
    lines.append(row("… with the same choice of poolings (best dense arm)", told, judged(up, down, n)))
    up, down, told = decided("words")
    lines.append(row("They beat bag of words (TF-IDF)", told, judged(up, down, n)))
    for pool in config["pools"]:
        up, down, told = decided(f"binarized {pool}", non_inferiority)
        claim = f"Binarizing keeps or improves ({pool})"
        lines.append(row(claim, f"binarized − as it is, not below the margin: {told}", judged(up, down, n)))
    up, down, told = decided("pooling")
    claim = f"Summing is the best pooling ({config['pools'][0]} − {config['pools'][1]})"
    lines.append(row(claim, told, judged(up, down, n)))
    chance = [arm.shuffled_auc for result in main.values() for arm in result.arms if arm.shuffled_auc is not None]
    held = sum(1 for each in chance if each.low is not None and each.high is not None and each.low <= 0.5 <= each.high)
    again = {name: result for (run, name), result in results.items() if run == SHUFFLED}
    off = {name: called_off(result) for name, result in main.items() if called_off(result)}
    left = [name for name in off if name not in again or called_off(again[name])]
    told = "".join(
        f"; {name} with {again[name].settings['shuffles']} others, of another split, in {len(again[name].arms)} arms: "
        + ", ".join(f"`{short(arm.name)}` {shown(arm.shuffled_auc)}" for arm in again[name].arms if arm.name in arms)
        + ("" if name in left else ", at chance as all others are")
        for name, arms in off.items() if name in again
    )  # fmt: skip
    lines.append(
        row("*Control:* shuffled labels give chance in every arm",
            f"{held} of {len(chance)} intervals of AUC hold 0.5 (19 in 20 would by chance); off chance after Holm's correction of a "
            f"set, which is so in one set of 20 by chance, on {len(off)} sets{told}",
            "yes" if not left else f"look at {', '.join(left)}")
    )  # fmt: skip
    return lines


def called_off(result: Classification) -> list[str]:
    """The arms that are not at chance with shuffled labels, as `saekit classify` decides it."""
    return [
        arm.name
        for arm in result.arms
        if any("leaks" in str(each) and f"`{arm.name}`" in str(each) for each in result.warnings)
    ]


Rule = Callable[[Measured, float], str]
_SO, _REVERSE = ("better", "holds"), ("worse", "refuted")


def judged(up: Sequence[str], down: Sequence[str], n: int) -> str:
    """Yes where it is so everywhere."""
    if len(up) == n:
        return "yes"
    if up and down:
        return "on some, the reverse on others"
    return "on some" if up else "no" if down else "not shown"


def arms_tables(main: Mapping[str, Classification]) -> list[str]:
    """Every arm of every set, folded."""
    lines = [
        "## Every arm (MiniLM)",
        "",
        "*last*: the states of the last token; *TF-IDF* (*words*): no model; *dense*, *PCA*, *SVD*, *ICA*: pooled states; *difference*: "
        "their projection on the difference of class means; *random*: random projections; *untrained*, *frozen decoder*: SAEs before "
        "training, and trained with the decoder they began with; *k=*: that many latents, selected within the training rows; "
        "*matched*: random latents that are active as often as those.",
        "",
    ]
    for name, result in main.items():
        lines += [f"<details><summary>{name}: {len(result.arms)} arms</summary>", ""]
        lines += heading(
            "arm", "macro-F1", "AUC", "balanced accuracy", "Brier", "− best dense", "verdict", "shuffled AUC"
        )
        stars = (result.best_dense, result.best_sae, result.best_control)
        for arm in result.arms:
            label = f"**{short(arm.name)}**" if arm.name in stars else short(arm.name)
            if arm.kind == "frozen":
                label = label.replace("SAE", "frozen decoder")
            lines.append(
                row(label, shown(arm.macro_f1), shown(arm.auc), f"{arm.balanced_accuracy.value:.3f}",
                    f"{arm.brier.value:.3f}", shown(arm.difference, "+"), arm.verdict, shown(arm.shuffled_auc))
            )  # fmt: skip
        lines += ["", "</details>", ""]
    return lines


def layers(config: Config, results: Mapping[tuple[str, str], Classification], folder: Path) -> list[str]:
    """Layer, width, and counts of the largest latents."""
    lines: list[str] = []
    for name, title in (
        ("minilm-layers", "Layer and width (MiniLM, sum, all latents, linear)"),
        ("builtin-layers", "Layer and width (built-in model, sum, all latents, linear)"),
        ("builtin-top", "How often a latent is among the N largest of a token (built-in model, all latents, linear)"),
    ):
        found = {each: result for (run, each), result in results.items() if run == name}
        if not found:
            continue
        run = next(run for run in config["runs"] if run["name"] == name)
        words = list(dict.fromkeys(word for pair in run["contrasts"] for word in reversed(pair)))
        lines += [f"## {title}", "", *heading("data set", *words)]
        for each, result in found.items():
            lines.append(row(each, *(shown(contrasted(result, word).macro_f1) for word in words)))
        lines += ["", *contrasts(run, found, folder)]
    return lines


def contrasts(run: Config, found: Mapping[str, Classification], folder: Path) -> list[str]:
    """What a run contrasts, as claims: one family (Holm)."""
    paths = {name: folder / "results" / f"pairs-{run['name']}-{name}.json" for name in found}
    paired = all(path.is_file() for path in paths.values())
    lines = [
        "As claims, corrected together (Holm), "
        + (
            "paired by test row."
            if paired
            else "from the interval of each number only: that of a difference is the sum of both, no shorter than the paired one."
        ),
        "",
        *heading("data set", *(f"{one} − {other}" for one, other in run["contrasts"])),
    ]
    gaps = []
    for name, result in found.items():
        pairs = read_json(paths[name]) if paired else {}
        for one, other in run["contrasts"]:
            if paired:
                gaps.append(Stored(Measured.from_json(pairs[f"{one} − {other}"])))
            else:
                arms = contrasted(result, one), contrasted(result, other)
                gaps.append(Stored(arms[0].macro_f1).minus(Stored(arms[1].macro_f1)))
    words = iter(family_verdicts([Claim(each) for each in gaps]))
    cells = iter([f"{shown(each.difference, '+')} {word}" for each, word in zip(gaps, words, strict=True)])
    lines += [row(name, *(next(cells) for _ in run["contrasts"])) for name in found]
    return [*lines, ""]


def price(main: Mapping[str, Classification], folder: Path) -> list[str]:
    """What k latents cost."""
    first = next(iter(main.values()))
    ks = sorted({arm.k for arm in first.arms if arm.kind == "sparse" and arm.k is not None})
    lines = ["## The price of sparsity", "", "Macro-F1 of k latents (summed over tokens) minus the best dense arm.", ""]
    lines += heading("data set", *(f"k = {k}" for k in ks))
    for name, result in main.items():
        by = {arm.k: arm for arm in result.arms if arm.kind == "sparse" and arm.pool == "sum"}
        lines.append(row(name, *(shown(by[k].difference, "+") if k in by else "–" for k in ks)))
    lines.append("")
    lines += [
        f"![{name}](figures/price-{name}.svg)" for name in main if (folder / "figures" / f"price-{name}.svg").is_file()
    ]
    return [*lines, ""]


def alignment(main: Mapping[str, Classification], folder: Path) -> list[str]:
    """Selected latents and other seeds."""
    paths = {name: folder / "results" / f"stability-{name}.json" for name in main}
    found = [
        (name, arm, each)
        for name, path in paths.items() if path.is_file()
        for arm, each in read_json(path)["arms"].items()
    ]  # fmt: skip
    if not found:
        return []
    words = family_verdicts([Claim(Stored(Measured.from_json(each["difference"]))) for *_, each in found])
    lines = [
        row(name, short(arm), shown(each["selected"]), shown(each["matched"]), shown(each["difference"], "+"), word)
        for (name, arm, each), word in zip(found, words, strict=True)
    ]
    mean = read_json(folder / "results" / f"stability-{next(iter(main))}.json")["mean"]
    return [
        "## Are the selected latents those that other seeds find?",
        "",
        "Mean cosine of a latent's decoder row with its partner in two other seeds (exact one-to-one matching), for the latents "
        f"that a k-sparse probe selects and for random ones that are active in as many texts. All latents: {mean:.3f}. Verdicts at a "
        "margin of 0.01, all rows corrected together (Holm): *better*, the selected ones are found more often.",
        "",
        *heading("data set", "arm", "selected", "density-matched", "difference", "verdict"),
        *lines,
        "",
    ]


def over_sets(results: Mapping[tuple[str, str], Classification]) -> list[str]:
    """All data sets together."""
    lines = ["## Over data sets", ""]
    for run in ("minilm", "builtin"):
        mine = {name: result for (label, name), result in results.items() if label == run}
        if len(mine) < 2:
            continue
        table = [line[:-2] for line in summarize(mine).table()]  # with so few sets no p-value can decide
        lines += [f"**{run}**, {len(mine)} sets: macro-F1 minus the best dense arm, with intervals over data sets.", "",
                  *heading(*table[0])]  # fmt: skip
        lines += [row(*line) for line in table[1:]]
        lines.append("")
    return lines


if __name__ == "__main__":
    sys.exit(main())
