"""Options that several commands share: the same word means the same everywhere.

A command writes ``model: Model`` where it needs one, and ``model: Model | None = None`` where it does not.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from .completion import models, saes

Saes = Annotated[
    list[str],
    typer.Argument(
        metavar="SAE...", help="SAEs: folders, training runs, or hf:owner/name/folder.", autocompletion=saes
    ),
]
Sae = Annotated[
    list[str],
    typer.Option(
        "--sae",
        metavar="SAE...",
        help="SAEs of the model: folders, runs, hf:owner/name/folder.",
        autocompletion=saes,
    ),
]
Model = Annotated[
    str,
    typer.Option(
        "--model",
        metavar="M",
        help="Language model: a folder, a hub name or `builtin`; `randomized:builtin`: the same, random weights.",
        autocompletion=models,
    ),
]
Data = Annotated[
    str,
    typer.Option(
        "--data", metavar="D", help="Texts: a file or folder, owner/name[:config][@split] on the hub, or `builtin`."
    ),
]
Images = Annotated[
    str,
    typer.Option("--images", metavar="D", help="Images instead of texts: a folder, .npy, .npz, IDX, a data set."),
]
Rows = Annotated[
    str,
    typer.Option(
        "--rows", metavar="R", help="Rows instead of a model: a folder of `saekit capture`, .npy, .safetensors."
    ),
]
Layer = Annotated[int, typer.Option("--layer", metavar="L", help="Residual stream after block L, counted from 0.")]
Layers = Annotated[
    str, typer.Option("--layers", metavar="L,L", help="Several layers in the same forward passes, 4,8,12 or `all`.")
]
Hook = Annotated[str, typer.Option("--hook", metavar="PATH", help="Any module instead of --layer, e.g. layers.6.mlp.")]
Target = Annotated[
    str,
    typer.Option("--target", metavar="PATH", help="Module whose rows a transcoder predicts, e.g. layers.6.mlp."),
]
Text = Annotated[str, typer.Option("--text", metavar="COLUMN", help="Column of the texts in --data [text].")]
Tokens = Annotated[int, typer.Option("--tokens", metavar="N", help="Tokens to capture, one row each [all].")]
Out = Annotated[Path, typer.Option("--out", metavar="DIR", help="Folder for the results.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout, and nothing else there.")]
ConfigFile = Annotated[
    Path | None,
    typer.Option("--config", metavar="FILE", path_type=str, help="TOML file with these settings; options override it."),
]
Set = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="A.B=V",
        help="Any setting by its dotted name, the value in TOML, or `none` for no number or list; repeatable.",
    ),
]

SHARED: dict[str, Any] = {
    "model": Model, "data": Data, "rows": Rows, "layer": Layer, "hook": Hook, "target": Target, "text": Text,
    "tokens": Tokens,
}  # fmt: skip
"""Options that fields of settings classes with these names have."""
