"""``saekit capture``: activations of a language model into a cache on disk."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from ..errors import ConfigError
from .console import print_facts, print_json, progress_bar, tell
from .options import ConfigFile, Data, Hook, Json, Layer, Model, Out, Set, Text, Tokens
from .settings import merge, names_of, required

HELP = """Run a language model over texts and store its activations at one place as rows.

\b
  saekit capture --model builtin --data builtin --layer 2 --tokens 200000 --out rows
  saekit capture --model gpt2 --data texts.jsonl.gz --text body --hook h.6.mlp --out rows
  saekit capture --model builtin --data builtin --layer 2 --out rows --set dtype="float32" --set context=256
  saekit capture --model vit --images photos --layer 6 --out rows        one row per patch, or per image token

An interrupted capture goes on where it stopped when it is called again. `--set` reaches every setting of
saekit.capture, or of saekit.rows.capture_images.capture_images.
"""


def capture(
    model: Model = None,
    data: Data = None,
    images: Annotated[
        str | None,
        typer.Option("--images", metavar="D", help="Images instead of texts: a folder, .npy, .npz, IDX, a data set."),
    ] = None,
    layer: Layer = None,
    hook: Hook = None,
    tokens: Tokens = None,
    text: Text = None,
    out: Out = None,
    config: ConfigFile = None,
    set_: Set = None,
    json: Json = False,
) -> None:
    """Capture rows into a folder."""
    from ..rows.capture import capture as capture_texts
    from ..rows.capture_images import capture_images

    options: dict[str, Any] = {
        "model": model, "data": data, "layer": layer, "hook": hook, "tokens": tokens, "text": text,
        "out": None if out is None else str(out),
    }  # fmt: skip
    if images is not None:
        alone = [name for name in ("data", "tokens", "text") if options.pop(name) is not None]
        if alone:
            raise ConfigError(f"--{alone[0]} is for texts; --images is given. Leave one of them out.")
        options["images"] = images
    run: Any = capture_texts if images is None else capture_images
    seen = "data" if images is None else "images"
    settings = merge(names_of(run, without=("progress",)), file=config, options=options, sets=set_)
    required(settings, "model", seen, "out")
    if (settings.get("layer") is None) == (settings.get("hook") is None):
        raise ConfigError("exactly one of --layer and --hook must be given: where in the model the rows come from.")
    with progress_bar(quiet=json) as progress:
        model, data = settings.pop("model"), settings.pop(seen)
        stage = "rows" if images is None else "images"
        rows = run(model, data, **settings, progress=lambda done, total: progress(stage, done, total))
    sources = rows if isinstance(rows, dict) else {"": rows}
    facts: dict[str, Any] = {"out": settings["out"]}
    for name, source in sources.items():
        facts |= {name: summary(source)} if name else summary(source)
    if json:
        print_json(facts)
    else:
        print_facts(facts)
        tell(f"\nTrain on them: saekit train --rows {settings['out']} --arch topk --latents 1024 --k 16 --out run")


def summary(rows: Any) -> dict[str, Any]:
    """What is told about a source of rows."""
    return {
        "n_rows": rows.n_rows,
        "d_in": rows.d_in,
        **{k: v for k, v in rows.info.items() if k not in ("n_rows", "d_in")},
    }
