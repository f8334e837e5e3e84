"""``saekit demo``: everything once, on files that come with saekit."""

from __future__ import annotations

import time
from dataclasses import dataclass
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
  saekit demo --out demo --short       a smaller run, with worse SAEs

Called again with the same folder it goes on where it stopped.

\b
DIR/rows/             the captured rows
DIR/run/              four SAEs, log.jsonl, run.json
DIR/evaluation.json   every number with its interval and its controls
DIR/report.html       the same as one page
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


FULL = Size(tokens=400_000, latents=1024, batch_rows=512, test_rows=32_768, test_tokens=8_192)
SHORT = Size(tokens=20_000, latents=256, batch_rows=256, test_rows=4_096, test_tokens=1_024)


def demo(
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="Folder for everything.")],
    short: Annotated[bool, typer.Option("--short", help="A small run, to see that everything works.")] = False,
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

    size = SHORT if short else FULL
    train_data, test_data = (data, data) if data else ("builtin@train", "builtin@heldout")
    configs = [
        TopK(latents=size.latents, k=K),
        Relu(latents=size.latents, target_l0=K),
        Matryoshka(latents=size.latents, k=K),
    ]
    with progress_bar(quiet=json) as progress:
        lm = load_model(model)
        rows = capture(
            lm,
            train_data,
            layer=LAYER,
            tokens=size.tokens,
            dtype="float16",
            out=out / "rows",
            progress=lambda done, total: progress("capture", done, total),
        )
        saes = train_saes(
            configs,
            rows,
            seeds=[[0, 1], [0], [0]],
            batch_rows=size.batch_rows,
            out=out / "run",
            resume=True,
            progress=training_progress(progress),
        )
        result = evaluate(
            saes,
            model=lm,
            data=test_data,
            rows=size.test_rows,
            tokens=size.test_tokens,
            progress=lambda stage, done, total: progress(f"evaluate {stage}", done, total),
        )
    result.save(out / "evaluation.json")
    return result
