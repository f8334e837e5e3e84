"""What a run was asked for, and the folder that remembers it: checks, names, ``run.json``, the log file."""

from __future__ import annotations

import json
import platform
from pathlib import Path
from typing import Any

import torch

from ..errors import ConfigError, DataError, FormatError, listed
from ..files import read_json, write_bytes, write_json
from ..rows.source import Source
from ..sae.model import SAE
from .architectures import name_of
from .config import Config, is_whole
from .fused import STEPS

RUN_FORMAT = 1
"""Version of ``run.json``."""


def check(
    configs: list[Any], seeds: list[Any], batch_rows: Any, tokens: Any, data_seed: Any, precision: str, step: str,
    device: torch.device, log_every: Any, checkpoint_every: Any, resume: bool, out: Any,
) -> None:  # fmt: skip
    """Refuse what cannot work, before anything is computed."""
    if not configs:
        raise ConfigError(
            "train: `configs` must hold at least one configuration; got none. Pass TopK(n_latents=1024, k=16), say."
        )
    for config in configs:
        if not isinstance(config, Config):
            raise ConfigError(
                f"train: every one of `configs` must be a configuration such as TopK(n_latents=1024, k=16); "
                f"got {config!r}. Make one from a dictionary with config_from_dict."
            )
    for own in seeds_of(configs, seeds):
        if not own or not all(is_whole(seed) for seed in own) or len(set(own)) < len(own):
            raise ConfigError(
                f"train: `seeds` must be different whole numbers, at least one; got {own!r}. Pass seeds=[0, 1]."
            )
    if len(set(map(repr, configs))) < len(configs):
        raise ConfigError("train: `configs` must all be different; got one twice. Use seeds=[0, 1] for repetitions.")
    for name, value, optional in (
        ("batch_rows", batch_rows, False), ("tokens", tokens, True), ("log_every", log_every, True),
        ("checkpoint_every", checkpoint_every, True),
    ):  # fmt: skip
        if not (optional and value is None) and not (is_whole(value) and value >= 1):
            raise ConfigError(f"train: `{name}` must be a positive whole number; got {value!r}.")
    if not is_whole(data_seed):
        raise ConfigError(f"train: `data_seed` must be a whole number; got {data_seed!r}.")
    if precision not in ("fp32", "bf16"):
        raise ConfigError(f"train: `precision` must be 'fp32' or 'bf16'; got {precision!r}.")
    if step not in STEPS:
        raise ConfigError(f"train: `step` must be one of {listed(STEPS)}; got {step!r}.")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ConfigError(
            f"train: `device` must be one that is there; got '{device}' and no CUDA device. Use device='cpu'."
        )
    if resume and out is None:
        raise ConfigError("train: `resume` needs the folder of the run to continue; got out=None. Give `out`.")


def seeds_of(configs: list[Any], seeds: list[Any]) -> list[list[Any]]:
    """The seeds of each configuration: the same for all, or one list each.

    >>> seeds_of(["a", "b"], [0, 1]), seeds_of(["a", "b"], [[0, 1], [0]])
    ([[0, 1], [0, 1]], [[0, 1], [0]])
    """
    if not any(isinstance(own, list | tuple) for own in seeds):
        return [seeds] * len(configs)
    if not all(isinstance(own, list | tuple) for own in seeds) or len(seeds) != len(configs):
        raise ConfigError(
            f"train: `seeds` must be whole numbers, or one list of them for each of the {len(configs)} configurations; "
            f"got {seeds!r}. Pass seeds=[0, 1], or seeds=[[0, 1], [0]] for two configurations."
        )
    return [list(own) for own in seeds]


def total_steps_of(source: Source, tokens: int | None, batch_rows: int) -> int:
    """Whole batches in `tokens` rows, or in one pass over the source."""
    rows = tokens if tokens is not None else source.n_rows
    if rows is None:
        raise ConfigError("train: `tokens` must be given for a source that does not know its number of rows; got None.")
    if rows < batch_rows:
        what = "`tokens` must be" if tokens is not None else "the source must have"
        kind = ConfigError if tokens is not None else DataError
        raise kind(f"train: {what} at least batch_rows={batch_rows} rows; got {rows}. Pass a smaller batch_rows.")
    return rows // batch_rows


def run_names(configs: list[Any], seeds: list[Any]) -> list[str]:
    """Folder names, in the order of the learners; configurations that would share a name are numbered from the second
    on.
    """
    seen: dict[str, int] = {}
    names = []
    for config, own in zip(configs, seeds_of(configs, seeds), strict=True):
        base = name_of(config)
        seen[base] = seen.get(base, 0) + 1
        base += f"-{seen[base]}" if seen[base] > 1 else ""
        names += [f"{base}-seed{seed}" for seed in own]
    return names


def claim(out: Path, request: dict[str, Any], resume: bool, source: Source) -> bool:
    """Make `out` the folder of this run, or recognize it; True when the run is already finished."""
    path = out / "run.json"
    if not path.is_file():
        foreign = [p.name for p in out.iterdir() if p.name == "log.jsonl" or (p / "sae.json").exists()]
        if foreign:
            raise ConfigError(
                f"train: `out` must be empty or hold a run; `{out}` holds {listed(foreign)} and no "
                "run.json. Give another folder."
            )
        write_json(
            path,
            {
                "format": RUN_FORMAT,
                "status": "running",
                "request": request,
                "versions": versions(),
                "source": source.info,
            },
        )
        return False
    if not resume:
        raise ConfigError(
            f"train: `out` must be a new folder; `{out}` holds a run. "
            "Pass resume=True (--resume) to continue it, or another folder."
        )
    record = read_json(path)
    if record.get("format") != RUN_FORMAT:
        raise FormatError(
            f"`{path}` must have format {RUN_FORMAT}; got {record.get('format')!r}. "
            "Resume with the release that wrote it."
        )
    then, now = record.get("request", {}), json.loads(json.dumps(request))
    changed = sorted(name for name in {*then, *now} if then.get(name) != now.get(name))
    if changed:
        shown = "; ".join(f"`{name}` was {then.get(name)!r}, now {now.get(name)!r}" for name in changed)
        raise ConfigError(
            f"train: a resumed run must have the settings it began with; {shown}. "
            "Repeat the old settings or give another folder."
        )
    return record.get("status") == "done"


def read_back(out: Path, names: list[str], device: torch.device) -> list[SAE]:
    """The SAEs of a finished run."""
    from ..store.native import load

    return [load(out / name).to(device) for name in names]


def cut_log(path: Path, step: int) -> None:
    """Drop log lines after `step`, and a line that a killed run left half written."""
    if not path.is_file():
        return
    kept = []
    for line in path.read_bytes().split(b"\n"):
        try:
            record = json.loads(line)
        except ValueError:
            continue
        if record["step"] <= step:
            kept.append(line + b"\n")
    write_bytes(path, b"".join(kept))


def source_facts(source: Source) -> dict[str, Any]:
    """What an SAE's provenance says about its rows."""
    info = source.info
    known = {key: info[key] for key in ("model", "model_digest", "hook", "layer", "data") if info.get(key) is not None}
    return known | {"data_digest": info.get("digest")}


def versions() -> dict[str, str]:
    """Releases of the packages that decide the numbers."""
    from importlib.metadata import PackageNotFoundError, version

    found = {"python": platform.python_version()}
    for package in ("saekit", "torch", "numpy", "safetensors", "transformers"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found
