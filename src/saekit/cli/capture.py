"""``saekit capture``: activations of a language model into a cache on disk."""

from __future__ import annotations

import dataclasses
from typing import Annotated, Any

import typer

from ..errors import ConfigError
from .console import print_facts, print_json, progress_bar, tell
from .options import ConfigFile, Data, Hook, Json, Layer, Model, Out, Set, Text, Tokens
from .settings import merge, required

HELP = """Run a language model over texts and store its activations at one place as rows.

\b
  saekit capture --model builtin --data builtin --layer 2 --tokens 200000 --out rows
  saekit capture --model gpt2 --data texts.jsonl.gz --text body --hook h.6.mlp --out rows
  saekit capture --model builtin --data builtin --layer 2 --out rows --set dtype="float32" --set context=256
  saekit capture --model vit --images photos --layer 6 --out rows        one row per patch, or per image token

An interrupted capture goes on where it stopped when it is called again. `--set` reaches every setting of
saekit.rows.settings.CaptureSettings, and with --images `image` (a column) and `limit` (a number of images).
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
    from ..inputs.images import read_images
    from ..models.loading import load_model
    from ..rows.capture import capture as run
    from ..rows.settings import CaptureSettings

    options: dict[str, Any] = {
        "model": model, "data": data, "layer": layer, "hook": hook, "tokens": tokens, "text": text,
        "out": None if out is None else str(out),
    }  # fmt: skip
    if images is not None:
        alone = [name for name in ("data", "tokens", "text") if options.pop(name) is not None]
        if alone:
            raise ConfigError(f"--{alone[0]} is for texts; --images is given. Leave one of them out.")
        options["images"] = images
    seen = "data" if images is None else "images"
    known = ["model", "layer", "hook", "out"] + (["data", "tokens", "text"] if images is None else ["image", "limit"])
    fields = [field.name for field in dataclasses.fields(CaptureSettings)]
    settings = merge(dict.fromkeys([*known, seen, *fields]), file=config, options=options, sets=set_)
    required(settings, "model", seen, "out")
    if (settings.get("layer") is None) == (settings.get("hook") is None):
        raise ConfigError("exactly one of --layer and --hook must be given: where in the model the rows come from.")
    with progress_bar(quiet=json) as progress:
        reading = CaptureSettings(**{name: value for name, value in settings.items() if name in fields})
        loaded = load_model(settings["model"], vision=images is not None, **reading.placement)
        source: Any = settings[seen]
        if images is not None:
            names = ("image", "split", "limit")
            source = read_images(source, **{name: settings[name] for name in names if name in settings})
        given = {name: settings[name] for name in ("layer", "hook", "tokens", "text", "out") if name in settings}
        rows = run(loaded, source, **given, settings=reading, progress=progress)
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
