"""``saekit demo``: everything once, on files that come with saekit."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..files import check_folder
from ..settings import Progress
from .classify import print_classification
from .command import command
from .completion import models
from .console import print_comparison, print_curve, print_evaluation, print_json, progress_of, say, tell
from .options import Json

if TYPE_CHECKING:
    from ..models.language import LanguageModel
    from ..rows.source import Source
    from ..sae.model import SAE

HELP = """The whole flow on this machine, without network: capture rows of the built-in language model on the built-in
corpus (the docstrings that every installation has), train four SAEs in one pass, and ask: are they faithful to the
model, are their latents real (shared by two seeds), how many are needed, are they useful (which section of a
docstring is a paragraph from), and what does each respond to? Everything is measured on held-out modules, compared with
baselines and controls, and shown on one page, which also shows every latent.

\b
  saekit demo --out demo
  saekit demo --out demo --short       a smaller run, with worse SAEs

Called again with the same folder it continues where it stopped.

\b
DIR/rows/                 the captured rows
DIR/run/                  four SAEs, log.jsonl, run.json
DIR/evaluation.json       fidelity, with intervals and baselines
DIR/comparison.json       latents that two seeds share, compared with chance
DIR/sizes.json            metrics of the first 64, 128, ... latents of the Matryoshka SAE
DIR/classification.json   classifiers on latents, hidden states and TF-IDF (built-in corpus only)
DIR/explanation.json      what each latent of the first SAE responds to
DIR/report.html           all of it as one page, with every latent
"""

LAYER = 2
K = 16
SECTIONS = ("Description", "Examples", "Notes", "Parameters", "Returns", "Summary")
"""Sections of docstrings that occur in many modules."""

ARMS = ("majority", "words", "dense", "untrained", "full", "binarized", "sparse")
KS = (4, 16, 64)


@dataclass(frozen=True)
class Size:
    """How large a demo is."""

    tokens: int
    """Rows to train on."""
    latents: int
    test_rows: int
    """Held-out rows for the reconstruction metrics."""
    test_tokens: int
    """Held-out tokens for the cross-entropies."""
    paragraphs: int
    """Held-out paragraphs to classify, a quarter of them for the test."""
    explained_tokens: int
    """Held-out tokens that latents are labelled and shown on."""


FULL = Size(
    tokens=400_000, latents=1024, test_rows=32_768, test_tokens=10_240, paragraphs=4_000, explained_tokens=20_000
)
SHORT = Size(tokens=20_000, latents=256, test_rows=4_096, test_tokens=1_024, paragraphs=1_600, explained_tokens=12_000)


@command("The whole flow once, offline, in minutes.", HELP)
def demo(
    *,
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="Folder for everything.")],
    short: Annotated[bool, typer.Option("--short", help="A small run, to see that everything works.")] = False,
    model: Annotated[
        str, typer.Option("--model", metavar="M", help="Another language model [builtin].", autocompletion=models)
    ] = "builtin",
    data: Annotated[
        str | None, typer.Option("--data", metavar="D", help="Other texts, for training and measuring [builtin].")
    ] = None,
    json: Json = False,
) -> None:
    """Run the demo and print its tables."""
    from ..report.results_folder import write_report

    check_folder(out)
    begun = time.monotonic()
    with progress_of(json) as progress:
        answers = run(out, model=model, data=data, size=SHORT if short else FULL, progress=progress)
    page = write_report(out, title="saekit demo")
    seconds = time.monotonic() - begun
    if json:
        plain = {name: result.to_json() for name, result in answers.items() if name != "explanation"}
        facts = {"kind": "demo", "seconds": round(seconds, 1), "report": str(page)}
        print_json({**plain.pop("evaluation"), **plain, **facts})
        return
    print_answers(answers)
    tell(f"{seconds:.0f} s in all")
    say(f"\nNumbers: {out}/*.json\nUseful? Real? How many? And what does each latent respond to? Open {page}")


def print_answers(answers: dict[str, Any]) -> None:
    """Print the table of every question."""
    say("Are they faithful?\n")
    print_evaluation(answers["evaluation"])
    say("\nAre their latents real? Two seeds of one SAE\n")
    print_comparison(answers["comparison"])
    say("\nHow many are needed? Prefixes of the Matryoshka SAE\n")
    points = answers["sizes"].to_json()["points"]
    print_curve([{"latents": point["size"], "metrics": point["metrics"]} for point in points])
    say(answers["sizes"].answer())
    if "classification" in answers:
        say("\nAre they useful? Which section of a docstring a paragraph is from\n")
        print_classification(answers["classification"])


def run(out: Path, *, model: str, data: str | None, size: Size, progress: Progress) -> dict[str, Any]:
    """Capture, train, and answer the questions; return the results by name, each also in ``out/<name>.json``."""
    from ..models.loading import load_language_model

    train_data, test_data = (data, data) if data is not None else ("builtin@train", "builtin@heldout")
    lm = load_language_model(model)
    saes = train_saes(lm, train_data, out, size, progress)
    answers = measure(lm, test_data, saes, size, progress)
    if data is None:
        answers["classification"] = classify_paragraphs(lm, saes[0], out, size, _within("classify", progress))
    answers["explanation"] = explain_latents(lm, test_data, saes[0], size, _within("explain", progress))
    for name, result in answers.items():
        result.save(out / f"{name}.json")
    return answers


def train_saes(lm: LanguageModel, data: str, out: Path, size: Size, progress: Progress) -> list[SAE]:
    """Return two seeds of a TopK SAE, a ReLU SAE and a Matryoshka SAE."""
    from ..rows.capture import capture
    from ..training.config import Matryoshka, ReLU, TopK
    from ..training.loop import train

    rows = capture(
        lm,
        data,
        layer=LAYER,
        tokens=size.tokens,
        out=out / "rows",
        progress=lambda stage, done, total=None, note="": progress("capture", done, total),
    )
    n = size.latents
    return train(
        [TopK(n_latents=n, k=K), ReLU(n_latents=n, target_l0=K), Matryoshka(n_latents=n, k=K)],
        rows,
        seeds=[[0, 1], [0], [0]],
        out=out / "run",
        resume=True,
        progress=progress,
    )


def measure(lm: LanguageModel, data: str, saes: list[SAE], size: Size, progress: Progress) -> dict[str, Any]:
    """Answer the questions that need no labels."""
    from ..comparison.run import compare
    from ..evaluation.run import evaluate
    from ..evaluation.settings import EvaluationSettings
    from ..rows.capture import capture
    from ..sizes.settings import SizeSettings
    from ..sizes.size_curve import measure_sizes

    heldout: Source = capture(lm, data, layer=LAYER, tokens=size.test_rows, progress=_within("held-out", progress))
    tokens = size.test_tokens
    return {
        "evaluation": evaluate(
            saes,
            model=lm,
            data=data,
            settings=EvaluationSettings(max_rows=size.test_rows, tokens=tokens),
            progress=_within("evaluate", progress),
        ),
        "comparison": compare(saes[:2], progress=_within("compare", progress)),
        "sizes": measure_sizes(
            saes[3],
            heldout,
            model=lm,
            data=data,
            settings=SizeSettings(tokens=tokens, sample_rows=1_000),
            progress=_within("sizes", progress),
        ),
    }


def classify_paragraphs(lm: LanguageModel, sae: SAE, out: Path, size: Size, progress: Progress) -> Any:
    """Classify paragraphs of held-out docstrings by their section."""
    from ..classification.run import classify
    from ..classification.settings import ClassifierSettings
    from ..inputs.settings import Split
    from ..inputs.texts import read_texts

    paragraphs = read_texts("builtin:paragraphs@heldout")
    columns = (paragraphs.texts, paragraphs.column("section"), paragraphs.column("module"))
    records = [{"text": text, "section": section, "module": module} for text, section, module in zip(*columns)]
    return classify(
        sae,
        model=lm,
        data=[each for each in records if each["section"] in SECTIONS],
        split=Split(label="section", group="module", max_rows=size.paragraphs),
        settings=ClassifierSettings(name="sections of docstrings", pools=("sum",), arms=ARMS, ks=KS, save_arm="none"),
        out=out,
        progress=progress,
    )


def explain_latents(lm: LanguageModel, data: str, sae: SAE, size: Size, progress: Progress) -> Any:
    """Label and show what each latent responds to."""
    from ..explanation.run import explain
    from ..explanation.settings import ExplainSettings

    return explain(
        sae,
        lm,
        data,
        settings=ExplainSettings(tokens=size.explained_tokens, controls=("shuffled",), top=5, sample=5, window=20),
        progress=progress,
    )


def _within(question: str, progress: Progress) -> Progress:
    """Return progress whose stages are called after the question."""
    return lambda stage, done, total=None, note="": progress(f"{question} {stage}", done, total, note)
