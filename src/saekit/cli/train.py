"""``saekit train``: several architectures and seeds in one pass over the rows."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from ..errors import ConfigError, did_you_mean, listed
from ..files import read_json
from .console import print_json, print_table, progress_bar, tell
from .options import ConfigFile, Data, Hook, Json, Layer, Model, Out, Rows, Set, Text, Tokens
from .settings import merge, names_of, required, whole_numbers

HELP = """Train sparse autoencoders: every architecture and seed sees the same rows, read once.

\b
  saekit train --rows rows --arch topk --latents 1024 --k 16 --seeds 0,1,2 --out run
  saekit train --model builtin --data builtin --layer 2 --tokens 500000 --arch topk,relu --latents 1024 --k 16 --out run
  saekit train --rows X.npy --arch matryoshka --latents 512 --k 16 --set config.sizes=[64,128,512] --out run
  saekit train --config run.toml --resume

\b
A TOML file holds the same words; [[configs]] repeats, [config] applies to all of them, [stream] is about --model:
  rows = "rows"
  out = "run"
  seeds = [0, 1]
  tokens = 1_000_000
  [[configs]]
  arch = "topk"
  latents = 1024
  k = 16
  lr = 1e-3
  [[configs]]
  arch = "relu"
  latents = 1024
  target_l0 = 16

The results are OUT/<arch>-<latents>-…-seed<S>/ (one SAE each), OUT/run.json and OUT/log.jsonl. A run that was
interrupted, in any way, goes on with --resume and ends with the same bits.
"""

_ARCHITECTURES = "topk, batchtopk, hierarchical-topk, matryoshka, jumprelu, relu, gated, p-anneal"


def train(
    rows: Rows = None,
    model: Model = None,
    data: Data = None,
    layer: Layer = None,
    hook: Hook = None,
    text: Text = None,
    arch: Annotated[
        list[str] | None, typer.Option("--arch", metavar="A,B", help=f"Architectures: {_ARCHITECTURES}.")
    ] = None,
    latents: Annotated[int | None, typer.Option("--latents", metavar="N", help="Latents of each SAE.")] = None,
    k: Annotated[
        int | None,
        typer.Option("--k", metavar="N", help="Latents per row: `k`, or `target_l0` where the sparsity is a penalty."),
    ] = None,
    tokens: Tokens = None,
    seeds: Annotated[str | None, typer.Option("--seeds", metavar="0,1", help="Seeds of the first weights [0].")] = None,
    out: Out = None,
    resume: Annotated[
        bool | None, typer.Option("--resume", help="Continue the interrupted run in --out, bit for bit.")
    ] = None,
    config: ConfigFile = None,
    set_: Set = None,
    json: Json = False,
) -> None:
    """Train SAEs into a folder."""
    from ..rows.settings import StreamSettings
    from ..rows.shards import open_rows
    from ..rows.stream import stream
    from ..training.loop import train as run
    from ..training.settings import TrainSettings

    direct = names_of(run, without=("configs", "rows", "settings", "callbacks", "progress"))
    loop = dict.fromkeys(field.name for field in dataclasses.fields(TrainSettings))
    stream_settings = dict.fromkeys(field.name for field in dataclasses.fields(StreamSettings))
    known: dict[str, Any] = {
        **direct,
        **loop,
        **dict.fromkeys(("rows", "model", "data", "layer", "hook", "text", "arch", "latents", "k")),
        "stream": stream_settings,
        "config": _config_names(),
        "configs": [],
    }
    options: dict[str, Any] = {
        "rows": rows, "model": model, "data": data, "layer": layer, "hook": hook, "text": text, "arch": arch,
        "latents": latents, "k": k, "tokens": tokens, "out": None if out is None else str(out), "resume": resume,
        "seeds": None if seeds is None else whole_numbers(seeds, "--seeds"),
    }  # fmt: skip
    settings = merge(known, file=config, options=options, sets=set_)
    required(settings, "out")
    configs = configs_from(settings)
    settings["seeds"] = _seeds(settings.get("seeds", (0,)))
    source = _source(settings, open_rows, stream)
    with progress_bar(quiet=json) as progress:
        run(
            configs,
            source,
            **{name: value for name, value in settings.items() if name in direct},
            settings=TrainSettings(**{name: value for name, value in settings.items() if name in loop}),
            progress=progress,
        )
    _tell_result(settings["out"], json)


def configs_from(settings: Mapping[str, Any]) -> list[Any]:
    """Training configurations from ``configs``, or from ``arch``, ``latents`` and ``k``; ``config`` applies to all.

    Raises
    ------
    ConfigError
        Both or neither are given, or a configuration cannot be.
    """
    from ..training.architectures import config_from_dict

    common = settings.get("config", {})
    tables = settings.get("configs", [])
    names = settings.get("arch")
    if bool(tables) == bool(names):
        raise ConfigError(
            "the architectures must come from --arch (with --latents and --k) or from [[configs]] in --config; "
            f"{'both' if names else 'neither'} came."
        )
    if names:
        names = [names] if isinstance(names, str) else names
        tables = [_table(name.strip(), settings, common) for part in names for name in part.split(",")]
    elif settings.get("latents") is not None or settings.get("k") is not None:
        raise ConfigError("--latents and --k go with --arch; in a file set them inside [[configs]] or in [config].")
    return [config_from_dict({**common, **table}) for table in tables]


def _table(name: str, settings: Mapping[str, Any], common: Mapping[str, Any]) -> dict[str, Any]:
    from ..training.architectures import ARCHITECTURES

    if name not in ARCHITECTURES:
        raise ConfigError(f"--arch must name architectures; got `{name}`. {did_you_mean(name, ARCHITECTURES)}")
    table: dict[str, Any] = {"arch": name}
    if settings.get("latents") is not None:
        table["latents"] = settings["latents"]
    elif not {"latents", "n_latents"} & common.keys():
        raise ConfigError("--latents must be given with --arch: the number of latents of each SAE.")
    if settings.get("k") is not None:
        fields = _fields(name)
        word = "k" if "k" in fields else "target_l0"
        if word not in common:
            table[word] = settings["k"]
    return table


def _fields(arch: str) -> set[str]:
    from ..training.architectures import ARCHITECTURES

    return {field.name for field in dataclasses.fields(ARCHITECTURES[arch].config)}


def _config_names() -> dict[str, None]:
    """Every setting that some architecture has."""
    from ..training.architectures import ARCHITECTURES

    return dict.fromkeys(sorted({name for arch in ARCHITECTURES for name in _fields(arch)} | {"latents"}))


def _seeds(value: Any) -> list[int]:
    if isinstance(value, int):
        return [value]
    return whole_numbers(value, "seeds") if isinstance(value, str) else list(value)


def _source(settings: Mapping[str, Any], open_rows: Any, stream: Any) -> Any:
    """Rows from a file or folder, or from a model on the fly."""
    if (settings.get("rows") is None) == (settings.get("model") is None):
        raise ConfigError(
            "the rows must come from --rows or from --model with --data and --layer; give one of the two."
        )
    if settings.get("rows") is not None:
        extra = [f"--{name}" for name in ("data", "layer", "hook", "text") if settings.get(name) is not None]
        if extra or settings.get("stream"):
            raise ConfigError(f"{listed(extra or ['stream'])} are about --model; the rows of --rows exist already.")
        return open_rows(settings["rows"])
    required(settings, "data", why="with --model")
    if (settings.get("layer") is None) == (settings.get("hook") is None):
        raise ConfigError("exactly one of --layer and --hook must be given with --model.")
    names = ("layer", "hook", "text", "tokens")
    given = {name: settings[name] for name in names if settings.get(name) is not None}
    from ..rows.settings import StreamSettings

    how = StreamSettings(**settings.get("stream", {}))
    return stream(settings["model"], settings["data"], **given, settings=how)


def _tell_result(out: str, json: bool) -> None:
    """The last numbers of every SAE, from the run's own record."""
    record = read_json(Path(out) / "run.json")
    saes: list[dict[str, Any]] = [{"sae": f"{out}/{name}", **_final(record["final"][name])} for name in record["saes"]]
    if json:
        print_json({"out": out, "rows": record["rows_seen"], "saes": saes, "warnings": record["warnings"]})
        return
    lines: list[list[str]] = [["", *_FINAL]]
    lines += [[str(sae["sae"]), *(f"{sae[name]:.3g}" for name in _FINAL)] for sae in saes]
    print_table(lines)
    tell(_time(record["seconds"]))
    for name, found in record["warnings"].items():
        for warning in found:
            tell(f"warning: {name}: {warning}")
    tell(f"\nTraining batches only. Measure them: saekit evaluate {out} --model M --data D, or --rows R")


_FINAL = ("fvu", "l0", "dead_fraction")


def _final(record: Mapping[str, Any]) -> dict[str, float]:
    return {name: record[name] for name in _FINAL}


def _time(seconds: Mapping[str, float]) -> str:
    """Where the time of a run went, in words.

    >>> _time({"total": 10.0, "start": 0.5, "rows": 2.0, "steps": 7.5, "model": 6.0})
    '10 s: 5% start, 75% training the SAEs, 20% waiting for rows (the language model worked for 60% of it)'
    """
    total = max(seconds["total"], 1e-9)
    text = f"{seconds['total']:.3g} s: {seconds['start'] / total:.0%} start"
    text += f", {seconds['steps'] / total:.0%} training the SAEs"
    text += f", {seconds['rows'] / total:.0%} waiting for rows"
    if "model" in seconds:
        text += f" (the language model worked for {seconds['model'] / total:.0%} of it)"
    return text
