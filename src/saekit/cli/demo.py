"""``saekit demo``: everything once, on files that come with saekit."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from saekit.evaluation.settings import EvaluationSettings

from .classify import print_classification
from .console import print_comparison, print_curve, print_evaluation, print_json, progress_bar, tell
from .options import Json

HELP = """The whole flow on this machine, without network: capture rows of the built-in language model on the built-in
corpus (the docstrings that every installation has), train four SAEs in one pass, and ask of them: are they faithful to
the model, are their latents real (shared by two seeds), how many are needed, and are they useful (which section of a
docstring is a paragraph from)? All is measured on held-out modules, beside controls, and shown on one page.

\b
  saekit demo --out demo
  saekit demo --out demo --short       a smaller run, with worse SAEs

Called again with the same folder it goes on where it stopped.

\b
DIR/rows/                 the captured rows
DIR/run/                  four SAEs, log.jsonl, run.json
DIR/evaluation.json       fidelity: every number with its interval and its controls
DIR/comparison.json       latents that two seeds share, beside chance
DIR/sizes.json            what the first 64, 128, ... latents of the Matryoshka SAE are worth
DIR/classification.json   classifiers on latents beside hidden states and TF-IDF (built-in corpus only)
DIR/report.html           all of it as one page
"""

LAYER = 2
K = 16


@dataclass(frozen=True)
class Size:
    """How large a demo is."""

    tokens: int
    """Rows to train on."""
    latents: int
    batch_rows: int
    test_rows: int
    """Held-out rows for the reconstruction metrics."""
    test_tokens: int
    """Held-out tokens for the cross-entropies."""
    paragraphs: int
    """Held-out paragraphs to classify, a quarter of them for the test."""


FULL = Size(tokens=400_000, latents=1024, batch_rows=512, test_rows=32_768, test_tokens=8_192, paragraphs=4_000)
SHORT = Size(tokens=20_000, latents=256, batch_rows=256, test_rows=4_096, test_tokens=1_024, paragraphs=800)
SECTIONS = ("Description", "Examples", "Notes", "Parameters", "Returns", "Summary")
"""Sections of docstrings that occur in many modules."""

ARMS = ("majority", "words", "dense", "untrained", "full", "binarized", "sparse")
KS = (4, 16, 64)


def demo(
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="Folder for everything.")],
    short: Annotated[bool, typer.Option("--short", help="A small run, to see that everything works.")] = False,
    model: Annotated[str, typer.Option("--model", metavar="M", help="Another language model.")] = "builtin",
    data: Annotated[str, typer.Option("--data", metavar="D", help="Other texts, for training and measuring.")] = "",
    json: Json = False,
) -> None:
    """Run the demo and print its tables."""
    begun = time.monotonic()
    answers = run(out, model=model, data=data, short=short, json=json)
    from ..report.page import write
    from ..report.results_folder import collect

    page = write(collect(out), out, title="saekit demo")
    seconds = time.monotonic() - begun
    found = answers["evaluation"]
    if json:
        others = {name: result.to_json() for name, result in answers.items() if name != "evaluation"}
        print_json({**found.to_json(), **others, "seconds": round(seconds, 1), "report": str(page)})
        return
    typer.echo("Are they faithful?\n")
    print_evaluation(found)
    typer.echo("\nAre their latents real? Two seeds of one SAE\n")
    print_comparison(answers["comparison"])
    typer.echo("\nHow many are needed? Prefixes of the Matryoshka SAE\n")
    points = answers["sizes"].to_json()["points"]
    print_curve([{"latents": point["size"], "metrics": point["metrics"]} for point in points])
    if "classification" in answers:
        typer.echo("\nAre they useful? Which section of a docstring a paragraph is from\n")
        print_classification(answers["classification"])
    typer.echo(f"\nNumbers: {out}/*.json   Page: {page}")
    tell(f"{seconds:.0f} s in all")


def run(out: Path, *, model: str, data: str, short: bool, json: bool) -> dict[str, Any]:
    """Capture, train, and answer the questions; returns the results by name, each also in ``out/<name>.json``."""
    from ..classification.run import classify
    from ..classification.settings import ClassifierSettings
    from ..comparison.run import compare
    from ..evaluation.run import evaluate
    from ..inputs.settings import Split
    from ..inputs.texts import read_texts
    from ..models.loading import load_language_model
    from ..rows.capture import capture
    from ..rows.settings import CaptureSettings
    from ..sizes.settings import SizeSettings
    from ..sizes.size_curve import measure_sizes
    from ..training.config import Matryoshka, ReLU, TopK
    from ..training.loop import train as train_saes
    from ..training.settings import TrainSettings

    size = SHORT if short else FULL
    train_data, test_data = (data, data) if data else ("builtin@train", "builtin@heldout")
    configs = [
        TopK(n_latents=size.latents, k=K),
        ReLU(n_latents=size.latents, target_l0=K),
        Matryoshka(n_latents=size.latents, k=K),
    ]
    with progress_bar(quiet=json) as progress:
        lm = load_language_model(model)
        rows = capture(
            lm,
            train_data,
            layer=LAYER,
            tokens=size.tokens,
            out=out / "rows",
            settings=CaptureSettings(dtype="float16"),
            progress=lambda stage, done, total=None, note="": progress("capture", done, total),
        )
        saes = train_saes(
            configs,
            rows,
            seeds=[[0, 1], [0], [0]],
            settings=TrainSettings(batch_rows=size.batch_rows),
            out=out / "run",
            resume=True,
            progress=progress,
        )
        heldout = capture(lm, test_data, layer=LAYER, tokens=size.test_rows)

        def stage(what: str) -> Any:
            return lambda stage, done, total=None, note="": progress(f"{what} {stage}", done, total)

        answers: dict[str, Any] = {
            "evaluation": evaluate(
                saes,
                model=lm,
                data=test_data,
                progress=stage("evaluate"),
                settings=EvaluationSettings(max_rows=size.test_rows, tokens=size.test_tokens),
            ),
            "comparison": compare(saes[:2], progress=stage("compare")),
            "sizes": measure_sizes(
                saes[3],
                heldout,
                model=lm,
                data=test_data,
                settings=SizeSettings(tokens=size.test_tokens, sample_rows=1_000),
                progress=stage("sizes"),
            ),
        }
        if not data:
            paragraphs = read_texts("builtin:paragraphs@heldout")
            columns = {name: paragraphs.column(name) for name in ("section", "module")}
            records = [
                {"text": text, **{name: values[i] for name, values in columns.items()}}
                for i, text in enumerate(paragraphs.texts)
            ]
            answers["classification"] = classify(
                saes[0],
                model=lm,
                data=[each for each in records if each["section"] in SECTIONS],
                split=Split(label="section", group="module", max_rows=size.paragraphs),
                settings=ClassifierSettings(
                    name="sections of docstrings", pools=("sum",), arms=ARMS, ks=KS, save_arm="none"
                ),
                out=out,
                progress=stage("classify"),
            )
    for name, result in answers.items():
        result.save(out / f"{name}.json")
    return answers
