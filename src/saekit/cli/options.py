"""Options that several commands share: the same word means the same everywhere."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

Saes = Annotated[
    list[str], typer.Argument(metavar="SAE...", help="SAEs: folders, training runs, or hf:owner/name/folder.")
]
_MODEL = typer.Option("--model", metavar="M", help="Language model: a folder, a hub name or `builtin`.")
Model = Annotated[str | None, _MODEL]
NeededModel = Annotated[str, _MODEL]
Data = Annotated[
    str | None,
    typer.Option(
        "--data", metavar="D", help="Texts: a file or folder, owner/name[:config][@split] on the hub, or `builtin`."
    ),
]
Rows = Annotated[
    str | None,
    typer.Option(
        "--rows", metavar="R", help="Rows instead of a model: a folder of `saekit capture`, .npy, .safetensors."
    ),
]
Layer = Annotated[
    int | None, typer.Option("--layer", metavar="L", help="Residual stream after block L, counted from 0.")
]
Hook = Annotated[
    str | None,
    typer.Option("--hook", metavar="PATH", help="Any module instead of --layer, e.g. layers.6.mlp."),
]
Text = Annotated[str | None, typer.Option("--text", metavar="COLUMN", help="Column of the texts in --data [text].")]
Tokens = Annotated[int | None, typer.Option("--tokens", metavar="N", help="Tokens (rows) to use.")]
_OUT = typer.Option("--out", metavar="DIR", help="Folder for the results.")
Out = Annotated[Path | None, _OUT]
NeededOut = Annotated[Path, _OUT]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout, and nothing else there.")]
ConfigFile = Annotated[
    Path | None, typer.Option("--config", metavar="FILE", help="TOML file with these settings; options override it.")
]
Set = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="A.B=V", help="Any setting by its dotted name, the value in TOML; repeatable."),
]

SHARED: dict[str, Any] = {
    "model": Model, "data": Data, "rows": Rows, "layer": Layer, "hook": Hook, "text": Text, "tokens": Tokens,
}  # fmt: skip
"""Options that fields of settings classes with these names have."""
