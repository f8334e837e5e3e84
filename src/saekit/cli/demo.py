"""``saekit demo``: everything once, on files that come with saekit."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated, Any

import typer

from .console import print_evaluation, print_json, progress_bar, tell, training_progress
from .options import Json

HELP = """The whole flow on this machine, without network: capture rows of the built-in language model on the built-in
corpus (the docstrings that every installation has), train four SAEs in one pass, measure them beside their controls on
held-out modules, and write a page.

\b
  saekit demo --out demo
  saekit demo --out demo --short       seconds instead of minutes, with worse SAEs

\b
DIR/rows/             the captured rows
DIR/run/              four SAEs, log.jsonl, run.json
DIR/evaluation.json   every number with its interval and its controls
DIR/report.html       the same as one page
"""

LAYER = 2
LATENTS = 1024
K = 16


def demo(
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="Folder for everything.")],
    short: Annotated[bool, typer.Option("--short", help="A run of seconds, to see that everything works.")] = False,
    model: Annotated[str, typer.Option("--model", metavar="M", help="Another language model.")] = "builtin",
    data: Annotated[str, typer.Option("--data", metavar="D", help="Other texts, for training and measuring.")] = "",
    json: Json = False,
) -> None:
    """Run the demo and print its table."""
    begun = time.monotonic()
    result = run(out, model=model, data=data, short=short, json=json)
    from ..report import collect, write

    page = write(collect(out), out, title="saekit demo")
    seconds = time.monotonic() - begun
    if json:
        print_json({**result.to_json(), "seconds": round(seconds, 1), "report": str(page)})
        return
    print_evaluation(result)
    typer.echo(f"\nNumbers: {out}/evaluation.json   Page: {page}")
    tell(f"{seconds:.0f} s in all")


def run(out: Path, *, model: str, data: str, short: bool, json: bool) -> Any:
    """Capture, train, evaluate; returns the `Evaluation`, which is also in ``out/evaluation.json``."""
    from ..data import capture, load_model
    from ..study import evaluate
    from ..train import Matryoshka, Relu, TopK
    from ..train import train as train_saes

    tokens = 30_000 if short else 400_000
    latents = 256 if short else LATENTS
    train_data, test_data = (data, data) if data else ("builtin@train", "builtin@heldout")
    with progress_bar(quiet=json) as progress:
        lm = load_model(model)
        rows = capture(
            lm,
            train_data,
            layer=LAYER,
            tokens=tokens,
            out=out / "rows",
            progress=lambda done, total: progress("capture", done, total),
        )
        configs = [
            TopK(latents=latents, k=K),
            Relu(latents=latents, target_l0=K),
            Matryoshka(latents=latents, k=K),
        ]
        saes = train_saes(
            configs,
            rows,
            seeds=(0, 1),
            batch_rows=1024,
            out=out / "run",
            progress=training_progress(progress),
        )
        result = evaluate(
            saes,
            model=lm,
            data=test_data,
            rows=4_000 if short else 65_536,
            tokens=2_000 if short else 16_384,
            progress=lambda stage, done, total: progress(f"evaluate {stage}", done, total),
        )
    result.save(out / "evaluation.json")
    return result
