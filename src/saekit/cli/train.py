"""``saekit train``: several architectures and seeds in one pass over the rows."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import typer

from ..errors import ConfigError, did_you_mean, listed
from ..rows.settings import StreamSettings
from ..settings import Progress
from ..sizes.settings import KChoiceSettings
from ..training.config import (
    BatchTopK,
    Config,
    Gated,
    HierarchicalTopK,
    JumpReLU,
    Matryoshka,
    PAnneal,
    ReLU,
    TopK,
)
from ..training.settings import TrainSettings
from .command import Setting, Table, command
from .completion import several_of
from .console import print_json, print_table, progress_of, tell
from .options import Data, Json, Layer, Layers, Model, Out, Rows, Text
from .settings import layers_of, required

if TYPE_CHECKING:
    from ..rows.source import Source
    from ..sizes.k_choice import KChoice

HELP = """Train sparse autoencoders: every architecture and seed sees the same rows, read once.

\b
  saekit train --rows rows --arch topk --latents 1024 --k 16 --seeds 0,1,2 --out run
  saekit train --model builtin --data builtin --layer 2 --tokens 500000 --arch topk,relu --latents 1024 --k 16 --out run
  saekit train --model builtin --data builtin --layers 1,2,3 --tokens 500000 --arch topk --latents 1024 --k 16 --out run
  saekit train --rows X.npy --arch matryoshka --latents 512 --k 16 --lr 1e-3 --batch-rows 512 --out run
  saekit train --rows rows --arch matryoshka --latents 512 --k 16 --set config.sizes=[64,128,512] --out run
  saekit train --model builtin --data builtin --hook-in layers.2.mlp.input --hook-out layers.2.mlp --tokens 500000 \
--arch topk --latents 1024 --k 16 --set config.skip='"zero"' --out transcoders
  saekit train --model builtin --data builtin --layers 1,3 --join --tokens 500000 --arch batchtopk --latents 1024 \
--k 16 --out crosscoder
  saekit train --model joined:base=owner/a,tuned=owner/b --data texts.txt --layer 2 --arch batchtopk --latents 1024 \
--k 16 --out crosscoder
  saekit train --rows rows --arch topk --latents 1024 --k auto --out run
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

The results are OUT/<arch>-<latents>-…-seed<S>/ (one SAE each), OUT/run.json and OUT/log.jsonl; with --layers each layer
has such a folder of its own, OUT/layers.4/ say, and the model runs once for all of them. With --join, or the models of
joined:NAME=M,NAME=M, one crosscoder reads all places at once, and no token is left out as an outlier. A run that was
interrupted, in any way, continues with --resume and ends with the same bits.
"""

CONFIGS = (TopK, BatchTopK, HierarchicalTopK, Matryoshka, JumpReLU, ReLU, Gated, PAnneal)


@command(
    "Train SAEs: several architectures and seeds in one pass.",
    HELP,
    flags=("batch_rows", "device", "snapshots"),
    ranked=True,
)
def train(
    *,
    rows: Rows | None = None,
    model: Model | None = None,
    data: Data | None = None,
    layer: Layer | None = None,
    layers: Layers | None = None,
    join: Annotated[
        bool, typer.Option("--join", help="One crosscoder of all --layers, instead of SAEs for each.")
    ] = False,
    hook: Annotated[
        str | None,
        typer.Option(
            "--hook",
            "--hook-in",
            metavar="PATH",
            help="Any module instead of --layer, e.g. layers.6.mlp; with --layers one of each, layers.{layer}.mlp.",
        ),
    ] = None,
    hook_out: Annotated[
        str | None,
        typer.Option(
            "--hook-out",
            metavar="PATH",
            help="Module whose rows are to be given: transcoders are trained, not SAEs [the rows that are read].",
        ),
    ] = None,
    text: Text | None = None,
    arch: Annotated[
        list[str] | None,
        typer.Option(
            "--arch",
            metavar="A,B",
            help=f"Architectures: {', '.join(kind.arch for kind in CONFIGS)}.",
            autocompletion=several_of([kind.arch for kind in CONFIGS]),
        ),
    ] = None,
    latents: Annotated[
        int | None, typer.Option("--latents", metavar="N", help="Number of latents of each SAE.")
    ] = None,
    k: Annotated[
        str | int | None,
        typer.Option(
            "--k",
            metavar="N",
            help="Latents per row: `k`, or `target_l0` where the sparsity is a penalty; `auto`: chosen from SAEs that "
            "are trained on a part of the rows first, on top of the run (see k_choice).",
        ),
    ] = None,
    lr: Annotated[
        float | None,
        typer.Option(
            "--lr",
            metavar="X",
            help="Peak learning rate of Adam [by `saekit.training.defaults.default_lr`: about 8e-3 with 1024 latents, "
            "16 of them per row, 512 rows per step and 1000 steps; less with more latents, more steps or smaller "
            "batches, and more with fewer latents].",
        ),
    ] = None,
    tokens: Annotated[
        int | None,
        typer.Option(
            "--tokens", metavar="N", help="Rows (tokens) to train on; fewer rows than that are repeated [all, once]."
        ),
    ] = None,
    seeds: Annotated[tuple[int, ...], typer.Option("--seeds", metavar="0,1", help="Random seeds of the SAEs [0].")] = (
        0,
    ),
    start: Annotated[str | None, Setting("SAE to initialize the learners with [random weights].")] = None,
    settings: TrainSettings,
    out: Out,
    resume: Annotated[
        bool, typer.Option("--resume", help="Continue the interrupted run in --out, bit for bit.")
    ] = False,
    stream: Annotated[StreamSettings, Table()],
    k_choice: Annotated[KChoiceSettings, Table()],
    config: Annotated[dict[str, Any], Table(kinds=CONFIGS, also=("latents",))],
    configs: Annotated[list[dict[str, Any]], Table(repeated=True)],
    json: Json = False,
) -> None:
    """Train SAEs into a folder."""
    from ..ranks import is_first_rank
    from ..sae.model import SAE
    from ..sae.parts import PARTS
    from ..training.loop import train as run
    from ..training.request import check_crosscoder
    from ..training.run_folder import RUN_FILE

    wanted = _configs(_Asked(arch, latents, None if k == AUTO else _number_of(k), lr), config, configs, auto=k == AUTO)
    if k != AUTO and k_choice != KChoiceSettings():
        raise ConfigError("k_choice is about --k auto; the k is given.")
    if model is not None and stream.device is None:
        stream = dataclasses.replace(stream, device=settings.device)
    if join or (model or "").startswith("joined:"):
        for each in wanted:
            check_crosscoder(each, start)
    texts = _Texts(data, layer, layers, join or None, hook, hook_out, text)
    source = _source(rows, model, texts, tokens, stream)
    choice = None
    if resume and is_first_rank() and not any(out.rglob(RUN_FILE)):
        tell(f"there is no run in {out} to continue: a new one begins")
    with progress_of(json) as progress:
        if k == AUTO:
            wanted, choice = _chosen(
                wanted, source, tokens, _Choosing(out, resume, k_choice, settings, progress), start
            )
        run(
            wanted,
            source,
            seeds=list(seeds),
            tokens=tokens,
            start=None if start is None else SAE.load(start),
            out=out,
            resume=resume,
            settings=settings,
            progress=progress,
        )
    if is_first_rank():
        runs = [f"{out}/{name}" for name in source] if isinstance(source, Mapping) else [str(out)]
        parts = None if isinstance(source, Mapping) else source.info.get(PARTS)
        joined = f"--rows joined:{','.join(str(part['name']) + '=R' for part in parts)}" if parts else None
        _tell_result(runs, json, choice, joined or "--model M --data D, or --rows R")


class _Asked(NamedTuple):
    """Training configurations as the flags say them."""

    arch: list[str] | None
    latents: int | None
    k: int | None
    lr: float | None


AUTO = "auto"
"""The k of an SAE whose k is chosen from a curve."""


class _Choosing(NamedTuple):
    """How a k is chosen."""

    out: Path
    resume: bool
    settings: KChoiceSettings
    train: TrainSettings
    progress: Progress


def _chosen(
    wanted: Sequence[Config],
    source: Source | Mapping[str, Source],
    tokens: int | None,
    how: _Choosing,
    start: str | None,
) -> tuple[list[Config], KChoice]:
    """Choose the k of the only configuration; return it, and the choice.

    The curve goes to stderr and to ``k_choice.json`` in the folder of the run.
    """
    from ..measure.tables import text_table
    from ..sizes.sparsity import choose_k

    if len(wanted) != 1 or isinstance(source, Mapping) or start is not None:
        raise ConfigError("--k auto must come with one architecture, one layer and no `start`: it chooses one k.")
    choice = choose_k(
        wanted[0],
        source,
        tokens=tokens,
        out=how.out,
        resume=how.resume,
        settings=how.settings,
        train_settings=how.train,
        progress=how.progress,
    )
    tell(text_table(choice.table(), choice.footer()))
    return [dataclasses.replace(wanted[0], k=choice.decided)], choice  # type: ignore[call-arg]


def _number_of(k: str | int | None) -> int | None:
    """Return ``"16"`` as a number; raises `ConfigError` for what is none."""
    if isinstance(k, str):
        if not k.strip().isdecimal():
            raise ConfigError(f"--k must be a whole number, or `{AUTO}`; got `{k}`.")
        return int(k)
    return k


def _configs(
    asked: _Asked, common: Mapping[str, Any], tables: Sequence[Mapping[str, Any]], *, auto: bool = False
) -> list[Config]:
    """Return training configurations from tables, or from flags; `common` applies to all.

    Raises
    ------
    ConfigError
        Both or neither are given, or a configuration cannot be.
    """
    from ..training.architectures import config_from_dict

    if bool(tables) == bool(asked.arch):
        raise ConfigError(
            "the architectures must come from --arch (with --latents and --k) or from [[configs]] in --config; "
            f"{'both' if tables else 'neither'} came."
        )
    if asked.arch:
        names = [name.strip() for part in asked.arch for name in part.split(",")]
        tables = [_table(name, asked, common) for name in names]
        if auto:  # any k will do until one is chosen
            if "k" in common:
                raise ConfigError(f"the k must come from --k {AUTO} or from [config]; both came.")
            tables = [{**table, **({"k": 1} if "k" in _KNOWN[table["arch"]] else {})} for table in tables]
    elif auto:
        raise ConfigError(f"--k {AUTO} goes with --arch; in a file `k` of [[configs]] is a number.")
    elif asked[1:] != (None, None, None):
        raise ConfigError("--latents, --k and --lr go with --arch; in a file they are in [[configs]] or [config].")
    return [config_from_dict({**common, **table}) for table in tables]


_KNOWN = {kind.arch: {field.name for field in dataclasses.fields(kind)} for kind in CONFIGS}
"""The settings of each architecture."""


def _table(name: str, asked: _Asked, common: Mapping[str, Any]) -> dict[str, Any]:
    known = _KNOWN
    if name not in known:
        raise ConfigError(f"--arch must name architectures; got `{name}`. {did_you_mean(name, known)}")
    table: dict[str, Any] = {"arch": name}
    if asked.latents is not None:
        table["latents"] = asked.latents
    elif not {"latents", "n_latents"} & common.keys():
        raise ConfigError("--latents must be given with --arch: the number of latents of each SAE.")
    given = {"k" if "k" in known[name] else "target_l0": asked.k, "lr": asked.lr}
    return {**table, **{word: value for word, value in given.items() if value is not None and word not in common}}


class _Texts(NamedTuple):
    """What a model reads and where its rows are taken, as the flags say it."""

    data: str | None
    layer: int | None
    layers: str | None
    join: bool | None
    hook: str | None
    hook_out: str | None
    text: str | None


def _source(
    rows: str | None, model: str | None, texts: _Texts, tokens: int | None, settings: StreamSettings
) -> Source | Mapping[str, Source]:
    """Return rows from a file or folder, or from a model while it trains; for several layers by name."""
    from ..models.hooks import LAYER
    from ..rows.joined import JOINED, NULL, named_paths, stream_joined
    from ..rows.shards import open_rows
    from ..rows.stream import stream

    if (rows is None) == (model is None):
        raise ConfigError(
            "the rows must come from --rows or from --model with --data and --layer; give one of the two."
        )
    if rows is not None:
        _refuse_texts(texts, settings)
        return open_rows(rows)
    assert model is not None
    required(texts._asdict(), "data", why="with --model")
    is_pattern = texts.layers is not None and texts.hook is not None and LAYER in texts.hook
    if [texts.layer, texts.layers, texts.hook].count(None) != (1 if is_pattern else 2):
        raise ConfigError(
            "exactly one of --layer, --layers and --hook must be given with --model, or --layers and a --hook with "
            "{layer} in it."
        )
    layer: Any = texts.layer if texts.layers is None else layers_of(texts.layers)
    if model.startswith(NULL):
        raise ConfigError(
            f"--model cannot begin with {NULL}: the null of several sources is made from stored rows. Capture each, "
            f"and give --rows {NULL}base=PATH,tuned=PATH."
        )
    if texts.join or model.startswith(JOINED):
        if texts.hook_out is not None or settings.target is not None:
            raise ConfigError("--hook-out must be left out for a crosscoder, which gives the rows that it reads.")
        if model.startswith(JOINED) == (texts.layers is not None):
            raise ConfigError(
                "a crosscoder must have several --layers of one model with --join, or one --layer or --hook of several "
                "models, --model joined:base=M,tuned=M."
            )
        if settings.outliers == StreamSettings().outliers:
            settings = dataclasses.replace(settings, outliers=None)  # other tokens would go in every place
            tell("no token is left out as an outlier: other tokens would go in every place")
        return stream_joined(
            named_paths(model) if model.startswith(JOINED) else model, str(texts.data), layer=layer, hook=texts.hook,
            text="text" if texts.text is None else texts.text, tokens=tokens, settings=settings,
        )  # fmt: skip
    settings = settings if texts.hook_out is None else dataclasses.replace(settings, target=texts.hook_out)
    found: Source | Mapping[str, Source] = stream(
        model, str(texts.data), layer=layer, hook=texts.hook,
        text="text" if texts.text is None else texts.text, tokens=tokens, settings=settings,
    )  # fmt: skip
    return found


def _refuse_texts(texts: _Texts, settings: StreamSettings) -> None:
    """Refuse flags and settings about a model that reads texts, where the rows are given."""
    given = [f"--{name.replace('_', '-')}" for name, value in texts._asdict().items() if value is not None]
    extra = given or (["stream"] if settings != StreamSettings() else [])
    if extra:
        raise ConfigError(f"{listed(extra)} are about --model; the rows of --rows exist already.")


def _tell_result(runs: Sequence[str], json: bool, choice: KChoice | None, rows: str) -> None:
    """Print the last numbers of every SAE, from the runs' own records, and in JSON what choosing a k has cost.

    `rows` says how the rows are given that measure them.
    """
    from ..training.run_folder import read_record

    records = {out: read_record(Path(out)) for out in runs}
    saes: list[dict[str, Any]] = [
        {"sae": f"{out}/{name}", **_final(record["final"][name])}
        for out, record in records.items()
        for name in record["saes"]
    ]
    warnings = [warning for record in records.values() for warning in record["warnings"]]
    whole = str(Path(runs[0]).parent) if len(runs) > 1 else runs[0]
    first = records[runs[0]]
    if json:
        cost = {} if choice is None else {"k": choice.k, "rows_used": choice.rows_used, "n_saes": choice.n_saes}
        result = {"out": whole, "rows": first["rows_seen"], "saes": saes, "warnings": warnings}
        print_json(result | ({"k_choice": cost} if cost else {}))
        return
    lines: list[list[str]] = [["", *_FINAL]]
    lines += [[str(sae["sae"]), *("–" if sae[name] is None else f"{sae[name]:.3g}" for name in _FINAL)] for sae in saes]
    print_table(lines)
    tell(_time(first["seconds"]))
    for warning in warnings:
        about = f"{warning['sae']}: " if "sae" in warning else ""
        tell(f"warning: {about}{warning['message']}")
    for out in runs:
        tell(f"\nTraining batches only. Measure them: saekit evaluate {out} {rows}")


_FINAL = ("fvu", "l0", "dead_fraction")


def _final(record: Mapping[str, Any]) -> dict[str, float | None]:
    return {name: record[name] for name in _FINAL}


def _time(seconds: Mapping[str, float]) -> str:
    """Return where the time of a run went, in words.

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
