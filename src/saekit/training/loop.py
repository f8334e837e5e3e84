"""The training loop: rows are read once and feed every learner."""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import platform
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypedDict, cast

import torch
from torch import Tensor

from ..errors import NonFiniteError, ShapeError, listed
from ..files import locked_folder, write_json
from ..rows.arrays import ArrayRows
from ..rows.source import Batch, Source
from ..sae.model import SAE
from . import checkpoint
from .architectures import ARCHITECTURES, config_to_dict
from .callbacks import Callback, Record
from .config import Config
from .diagnostics import warnings_for
from .fused import default_step
from .initialization import SAMPLE_ROWS, first_rows, gather_first, start_bias, start_scale
from .learner import STEPS, Learner, Settings, Statistics, finish, resolve, restore, start_learner, tensors_of
from .mutual_regularization import check_mutual
from .run_folder import (
    RUN_FORMAT,
    check,
    claim,
    cut_log,
    read_back,
    run_names,
    seeds_of,
    source_facts,
    total_steps_of,
    versions,
)
from .warm_start import start_from, starts_of

CHECK_EVERY = 50
"""Steps between looks for NaN on a device where looking means waiting; on a CPU every step is looked at."""


@dataclass(frozen=True)
class LearnerProgress:
    """State of one learner, over the rows since the last report."""

    name: str
    fvu: float
    """Fraction of variance unexplained. Unit: fraction."""
    l0: float
    """Latents per row."""
    dead_fraction: float
    """Latents that have not fired for `dead_after_rows` rows. Unit: fraction."""


@dataclass(frozen=True)
class Progress:
    """What the progress callback gets, at every log step."""

    step: int
    total_steps: int
    rows: int
    """Rows seen."""
    rows_per_second: float
    """Rows per second since the run (or its resumption) began; each row feeds all learners."""
    seconds_left: float
    """Estimate from the rate so far."""
    learners: tuple[LearnerProgress, ...]
    seconds: Mapping[str, float] = field(default_factory=dict)
    """Where the time went so far, see `Seconds`. Unit: s."""


class Seconds(TypedDict, total=False):
    """Where the time of a run went. Unit: s."""

    total: float
    """Everything until the last step."""
    start: float
    """Before the first step: reading the first rows, centre and scale, first weights."""
    rows: float
    """Waiting for rows: the loader's share."""
    steps: float
    """Training the SAEs, logs and checkpoints apart."""
    model: float
    """In the language model, which works beside the steps: more than `rows` where the two overlap. Only for sources
    that run one."""


@dataclass
class _Run:
    """One call of `train`: what it was asked for and where it stands."""

    learners: list[Learner]
    names: list[str]
    step_with: Callable[[Learner, Tensor], Statistics]
    out: Path | None
    total_steps: int
    batch_rows: int
    data_seed: int
    place: tuple[int, int] = (0, 0)
    step: int = 0
    order_digest: str = "saekit"
    center: Tensor = field(default_factory=lambda: torch.zeros(()))
    """Mean of the first rows, ``[d_in]``: the fixed point of the variance sums."""
    sums: dict[str, Tensor] = field(default_factory=dict)
    last: dict[str, dict[str, Any]] = field(default_factory=dict)
    seconds: Seconds = field(default_factory=lambda: Seconds(total=0.0, start=0.0, rows=0.0, steps=0.0))


def train(
    configs: Config | Sequence[Config],
    source: Any,
    *,
    seeds: int | Sequence[int] | Sequence[Sequence[int]] = (0,),
    tokens: int | None = None,
    batch_rows: int = 4096,
    data_seed: int = 0,
    start: SAE | Sequence[SAE] | None = None,
    out: str | os.PathLike[str] | None = None,
    resume: bool = False,
    precision: str = "fp32",
    device: str | torch.device | None = None,
    log_every: int | None = None,
    checkpoint_every: int | None = None,
    callbacks: Sequence[Callback | Callable[[Record], None]] = (),
    progress: Callable[[Progress], None] | None = None,
    step: str | None = None,
) -> list[SAE]:
    """Train one SAE for each configuration and seed, in one pass over the rows.

    Together equals alone: an SAE is bitwise the same whatever else is trained beside it (unless its configuration sets
    ``mutual``, which ties the seeds of that configuration together).

    Parameters
    ----------
    configs
        One configuration or several (`TopK`, `ReLU`, ...).
    source
        Rows: anything with ``d_in``, ``n_rows``, ``info`` and ``batches`` (see
        `saekit.rows.source.Source`), or an array ``[n, d_in]``.
    seeds
        Seeds of the learners: first weights and draws during training. The data order has its own seed. A list of lists
        gives each configuration its own: ``[[0, 1], [0]]``.
    tokens
        Rows to train on (epochs repeat when the source has fewer). None: one pass. The last part of a batch is left
        out.
    batch_rows
        Rows per step.
    data_seed
        Determines the order of the rows.
    start
        An SAE to go on from instead of random weights, or one for each configuration and seed: its shape and rule must
        be the configuration's. Adam starts anew; seeds still determine draws during training.
    out
        Folder for the SAEs (``<arch>-<latents>-<k or l0 or l1>-seed<S>``), ``run.json``, ``log.jsonl`` and
        checkpoints. None: nothing
        is written.
    resume
        Continue the run in `out` from its last checkpoint, bit for bit. A folder without a checkpoint starts from the
        beginning; a
        finished run is read back.
    precision
        ``fp32``, or ``bf16``: matrix products in bfloat16 with fp32 master weights.
    device
        Where to train, for example ``cuda``. None: a CUDA device when there is one, otherwise the CPU.
    log_every
        Steps between log records. None: total steps / 100, between 1 and 100.
    checkpoint_every
        Steps between checkpoints (only with `out`). None: a tenth of the run, at most 1,000.
    callbacks
        Further places for log records: functions of a record, or objects with ``log`` and ``close``.
    progress
        Called with a `Progress` at every log step.
    step
        Which implementation of the step to use, from `saekit.training.learner.STEPS`. None: ``fused`` where the
        compiled kernels run (see `saekit.kernels.use`), otherwise ``plain``; they differ in the rounding of sums only.

    Returns
    -------
    list of SAE
        For each configuration in order, for each seed in order; on the training device.

    Raises
    ------
    ConfigError
        A setting cannot work, or `out` holds another run. Nothing was computed.
    DataError
        The source has too few rows.
    NonFiniteError
        NaN or infinity in the rows, a loss or a gradient. Nothing that is not finite is ever written.
    BusyError
        Another process is writing to `out`.

    Examples
    --------
    >>> from saekit.rows.synthetic import SyntheticRows
    >>> rows = SyntheticRows(d_in=8, n_features=16, n_rows=2048)
    >>> from saekit import TopK, train
    >>> [sae] = train(TopK(n_latents=16, k=4), rows, batch_rows=256)
    >>> sae.n_latents
    16
    """
    configs = [configs] if isinstance(configs, Config) else list(configs)
    wanted: list[Any] = [seeds] if isinstance(seeds, int) else list(seeds)
    source = source if isinstance(source, Source) else ArrayRows(source)
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    tied = any(getattr(config, "mutual", 0) for config in configs)
    step = step or ("plain" if tied else default_step(device))
    check(
        configs,
        wanted,
        batch_rows,
        tokens,
        data_seed,
        precision,
        step,
        device,
        log_every,
        checkpoint_every,
        resume,
        out,
    )
    for config, own in zip(configs, seeds_of(configs, wanted)):
        check_mutual(config, own, step)
    total_steps = total_steps_of(source, tokens, batch_rows)
    names = run_names(configs, wanted)
    starts = starts_of(start, len(names))
    request = {
        "configs": [config_to_dict(config) for config in configs],
        "seeds": wanted,
        "total_steps": total_steps,
        "batch_rows": batch_rows,
        "data_seed": data_seed,
        "precision": precision,
        "step": step,
        "d_in": source.d_in,
        "rows": source.info.get("digest"),
        **({"start": [sae.digest() for sae in starts]} if starts else {}),
    }
    with ExitStack() as stack:
        folder = None
        if out is not None:
            folder = stack.enter_context(locked_folder(out))
            finished = claim(folder, request, resume, source)
            if finished:
                return read_back(folder, names, device)
        run = _Run([], names, STEPS[step], folder, total_steps, batch_rows, data_seed)
        sinks = [_sink(callback, stack) for callback in callbacks]
        began, in_model = time.perf_counter(), _clock(source)
        batches = _begin(run, configs, wanted, source, precision, device, resume, starts)
        run.seconds["start"] = time.perf_counter() - began
        log_every = log_every or min(max(total_steps // 100, 1), 100)
        checkpoint_every = checkpoint_every or min(max(total_steps // 10, 1), 1000)
        _advance(run, batches, log_every, checkpoint_every, sinks, progress, in_model)
        return _end(run, source, request)


def untrained(config: Config, source: Any, seed: int = 0, *, batch_rows: int = 4096, data_seed: int = 0) -> SAE:
    """The SAE that training with this configuration and seed starts from: the control that costs nothing.

    Parameters
    ----------
    config
        Configuration of an architecture.
    source
        Rows, for centre, scale and thresholds; see `train`. Up to 100,000 are read.
    seed
        Seed of the first weights.
    batch_rows, data_seed
        As in `train`: with the same values the start is bitwise the same.
    """
    source = source if isinstance(source, Source) else ArrayRows(source)
    check([config], [seed], batch_rows, None, data_seed, "fp32", "plain", torch.device("cpu"), None, None, False, None)
    available = source.n_rows if source.n_rows is not None else batch_rows * 8
    wanted = first_rows(available, source.d_in)
    _, rows = gather_first(source.batches(min(batch_rows, available), seed=data_seed), wanted)
    _check_rows(rows, source, None)
    settings = resolve(config, source.d_in, 1, min(batch_rows, len(rows)))
    learner = _start(config, seed, settings, rows, torch.device("cpu"), {})
    if ARCHITECTURES[config.arch].batch_threshold:  # the running threshold of a batch selection, from one batch
        from dataclasses import replace

        learner.config = replace(config, control="untrained")
        STEPS["plain"](learner, rows[: settings.batch_rows])
        learner.config = config
    return finish(learner, source_facts(source) | {"config": config_to_dict(config), "seed": seed, "rows_seen": 0})


# ---------------------------------------------------------------- before the first step


def _sink(callback: Callback | Callable[[Record], None], stack: ExitStack) -> Callable[[Record], None]:
    if isinstance(callback, Callback):
        stack.callback(callback.close)
        return callback.log
    return callback


def _begin(
    run: _Run, configs: list[Any], seeds: list[Any], source: Source, precision: str, device: torch.device, resume: bool,
    starts: list[SAE],
) -> Iterator[Batch]:  # fmt: skip
    """Learners at their start or at the last checkpoint, and the batches from there on."""
    found = checkpoint.read(run.out) if resume and run.out is not None else None
    tensors: dict[str, Tensor] = {}
    head: list[Batch] = []
    if found is None:
        batches = source.batches(run.batch_rows, seed=run.data_seed)
        head, rows = gather_first(batches, first_rows(run.total_steps * run.batch_rows, source.d_in))
        _check_rows(rows, source, run)
        run.center = rows.mean(0).to(device)
    else:
        facts, tensors = found
        run.step, run.place, run.order_digest = facts["step"], tuple(facts["place"]), facts["order_digest"]
        run.last, run.center = facts["last"], tensors["center"].to(device, copy=True)
        run.sums = {
            name.removeprefix("sums."): t.to(device, copy=True)
            for name, t in tensors.items()
            if name.startswith("sums.")
        }
        batches = source.batches(run.batch_rows, seed=run.data_seed, start=run.place)
        rows = torch.zeros(1, source.d_in)  # everything computed from first rows is in the checkpoint
    memo: dict[str, Any] = {}
    pairs = ((config, seed) for config, own in zip(configs, seeds_of(configs, seeds)) for seed in own)
    for index, (config, seed) in enumerate(pairs):
        settings = resolve(config, source.d_in, run.total_steps, run.batch_rows, precision)
        learner = _start(config, seed, settings, rows, device, memo)
        if starts:
            start_from(learner, starts[index])
        if found is not None:
            own = {n.removeprefix(f"{index}."): t for n, t in tensors.items() if n.startswith(f"{index}.")}
            restore(learner, own, run.step)
        run.learners.append(learner)
    for learner in run.learners:
        if learner.config.mutual:
            learner.peers = [each for each in run.learners if each is not learner and each.config == learner.config]
    if run.out is not None:
        cut_log(run.out / "log.jsonl", run.step)

    def chain() -> Iterator[Batch]:
        while head:
            yield head.pop(0)
        yield from batches

    return chain()


def _start(
    config: Any, seed: int, settings: Settings, rows: Tensor, device: torch.device, memo: dict[str, Any]
) -> Learner:
    """A new learner; what depends on the rows alone is computed once and kept in `memo`."""
    bias_key, scale_key = f"bias {config.bias}", f"scale {config.scaling}"
    if bias_key not in memo:
        memo[bias_key] = start_bias(rows, config.bias)
    if scale_key not in memo:
        memo[scale_key] = start_scale(rows, config.scaling)
    sample = rows[:SAMPLE_ROWS]
    return start_learner(
        config, seed, settings, bias=memo[bias_key], scale=memo[scale_key], sample=sample, device=device
    )


def _check_rows(rows: Tensor, source: Source, run: _Run | None) -> None:
    if rows.shape[1] != source.d_in:
        raise ShapeError(
            f"train: rows must have width d_in={source.d_in}, as the source says; got {tuple(rows.shape)}."
        )
    if not bool(torch.isfinite(rows).all()):
        where = f"; learners {listed(run.names)}" if run is not None else ""
        raise NonFiniteError(
            f"train: rows must be finite; NaN or infinity among the first {len(rows)} rows, before step 1{where}. "
            "No checkpoint exists. Look for overflow in the captured model (half precision)."
        )


# ---------------------------------------------------------------- the loop


def _advance(
    run: _Run, batches: Iterator[Batch], log_every: int, checkpoint_every: int,
    sinks: list[Callable[[Record], None]], progress: Callable[[Progress], None] | None,
    in_model: Callable[[], float | None],
) -> None:  # fmt: skip
    began, first_step = time.perf_counter(), run.step
    device = run.learners[0].device
    every_look = 1 if device.type == "cpu" else CHECK_EVERY
    while run.step < run.total_steps:
        before = time.perf_counter()
        batch = next(batches)
        read = time.perf_counter()
        x = batch.x.to(device=device, dtype=torch.float32, non_blocking=True)
        _add(run.sums, _row_sums(x, run.center))
        for index, learner in enumerate(run.learners):
            statistics = run.step_with(learner, x)
            _add(run.sums, _learner_sums(statistics, str(index), run.step))
        run.step += 1
        run.place = batch.next
        run.order_digest = _next_digest(run.order_digest, batch)
        last = run.step == run.total_steps
        logs = run.step % log_every == 0 or last
        saves = run.out is not None and (run.step % checkpoint_every == 0 and not last)
        if run.step % every_look == 0 or logs or saves:
            _look(run)
        done = time.perf_counter()
        run.seconds["rows"] += read - before
        run.seconds["steps"] += done - read
        if logs:
            run.seconds["total"] = run.seconds["start"] + done - began
            if (model := in_model()) is not None:
                run.seconds["model"] = model
            _log(run, time.perf_counter() - began, run.step - first_step, sinks, progress)
        if saves:
            _save(run)


def _clock(source: Any) -> Callable[[], float | None]:
    """Seconds in the language model since now; None for sources that have none."""
    seconds = getattr(source, "seconds", None)
    if not isinstance(seconds, dict) or "lm" not in seconds:
        return lambda: None
    before = seconds["lm"]
    return lambda: seconds["lm"] - before


def _row_sums(x: Tensor, center: Tensor) -> dict[str, Tensor]:
    """Sums for the variance of the rows, about a fixed point near their mean."""
    away = x - center
    return {
        "x.rows": torch.tensor(float(len(x)), device=x.device),
        "x.squares": away.pow(2).sum(),
        "x.sum": away.sum(0),
    }


def _learner_sums(s: Statistics, name: str, step: int) -> dict[str, Tensor]:
    sums = {"loss": s.loss, "error": s.error, "fired": s.fired, "grad_norm": s.grad_norm}
    sums |= {f"part.{part}": value for part, value in s.parts.items()}
    sums |= {"dead=": s.dead, "bad": torch.where(s.finite, 0, 1)}
    return {f"{name}.{key}": value for key, value in sums.items()}


def _add(sums: dict[str, Tensor], new: dict[str, Tensor]) -> None:
    """Add to running sums in the widest type of the device; names that end in ``=`` keep the last value."""
    for name, value in new.items():
        value = value.detach()
        wide = value if value.device.type == "mps" else value.double()
        sums[name] = wide if name.endswith("=") or name not in sums else sums[name] + wide


def _look(run: _Run) -> None:
    """Stop when a loss or gradient was not finite since the last look."""
    bad = torch.stack([run.sums[f"{index}.bad"] for index in range(len(run.learners))])
    if not bool((bad > 0).any()):
        return
    index = int((bad > 0).nonzero()[0])
    learner, steps_ago = run.learners[index], int(bad[index])
    kept = checkpoint.newest(run.out)
    hint = (
        f"The last good checkpoint is `{kept}`; pass resume=True to continue from it."
        if kept
        else "No checkpoint exists."
    )
    rows_bad = not bool(torch.isfinite(run.sums["x.squares"]))
    cause = "the rows hold NaN or infinity" if rows_bad else "lower `lr`, or use precision='fp32'"
    raise NonFiniteError(
        f"train: loss and gradient must be finite; got NaN or infinity in step {run.step - steps_ago + 1}, learner "
        f"`{run.names[index]}` (seed {learner.seed}, {learner.config!r}): {cause}. {hint}"
    )


def _next_digest(digest: str, batch: Batch) -> str:
    """Chained digest of the data order: places, and the first and the last row of each batch."""
    text = hashlib.sha256(f"{digest} {batch.next}".encode())
    if batch.x.device.type == "cpu":
        text.update(batch.x[[0, -1]].contiguous().numpy().tobytes())
    return text.hexdigest()


def _log(
    run: _Run,
    elapsed: float,
    steps: int,
    sinks: list[Callable[[Record], None]],
    progress: Callable[[Progress], None] | None,
) -> None:
    sums: dict[str, float] = {name: float(t) for name, t in run.sums.items() if name != "x.sum"}
    n = sums["x.rows"]
    variance = max(sums["x.squares"] - float(run.sums["x.sum"].pow(2).sum()) / n, 1e-30)
    rate = steps * run.batch_rows / max(elapsed, 1e-9)
    records = []
    for index, (learner, name) in enumerate(zip(run.learners, run.names)):
        own = {key.removeprefix(f"{index}."): value for key, value in sums.items() if key.startswith(f"{index}.")}
        record = {
            "step": run.step,
            "rows": run.step * run.batch_rows,
            "learner": name,
            "loss": own["loss"] / n,
            "fvu": own["error"] / variance,
            "l0": own["fired"] / n,
            "dead_fraction": own["dead="] / learner.config.n_latents,
            "grad_norm": own["grad_norm"] / n,
            **{key.removeprefix("part."): value / n for key, value in own.items() if key.startswith("part.")},
        }
        run.last[name] = record
        records.append({**record, "seconds": round(elapsed, 3), "rows_per_second": round(rate, 1)})
    run.sums.clear()
    if run.out is not None:
        with open(run.out / "log.jsonl", "a", encoding="utf-8") as stream:
            stream.write("".join(json.dumps(record, allow_nan=False) + "\n" for record in records))
    for record, sink in itertools.product(records, sinks):
        sink(record)
    if progress is not None:
        shown = tuple(LearnerProgress(r["learner"], r["fvu"], r["l0"], r["dead_fraction"]) for r in records)
        left = (run.total_steps - run.step) * run.batch_rows / max(rate, 1e-9)
        seconds = cast("Mapping[str, float]", dict(run.seconds))
        progress(Progress(run.step, run.total_steps, run.step * run.batch_rows, rate, left, shown, seconds))


def _save(run: _Run) -> None:
    assert run.out is not None
    tensors = {f"sums.{name}": t for name, t in run.sums.items()} | {"center": run.center}
    for index, learner in enumerate(run.learners):
        tensors |= {f"{index}.{name}": t for name, t in tensors_of(learner).items()}
    facts = {"place": list(run.place), "order_digest": run.order_digest, "last": run.last}
    checkpoint.write(run.out, run.step, tensors, facts)


# ---------------------------------------------------------------- after the last step


def _end(run: _Run, source: Source, request: dict[str, Any]) -> list[SAE]:
    _check_weights(run)
    saes: list[SAE] = []
    for learner, name in zip(run.learners, run.names):
        record = run.last[name]
        provenance = source_facts(source) | {
            "config": config_to_dict(learner.config),
            "seed": learner.seed,
            "data_seed": run.data_seed,
            "rows_seen": learner.rows_seen,
            "rows_digest": f"sha256:{run.order_digest}",
            "versions": versions(),
            "metrics": {key: record[key] for key in ("fvu", "l0", "dead_fraction")},
            **({"start": request["start"][len(saes)]} if "start" in request else {}),
        }
        saes.append(finish(learner, provenance))
    if run.out is None:
        return saes
    from ..store.native import save

    for sae, name in zip(saes, run.names):
        save(sae, run.out / name)
    warnings = {name: warnings_for(learner, run.last[name]) for learner, name in zip(run.learners, run.names)}
    total = max(run.seconds["total"], 1e-9)
    spent = cast("dict[str, float]", run.seconds)
    shares = {f"{part}_fraction": value / total for part, value in spent.items() if part != "total"}
    write_json(
        run.out / "run.json",
        {
            "format": RUN_FORMAT,
            "status": "done",
            "request": request,
            "saes": run.names,
            "rows_seen": run.step * run.batch_rows,
            "order_digest": f"sha256:{run.order_digest}",
            "final": run.last,
            "warnings": {name: found for name, found in warnings.items() if found},
            "seconds": {**spent, **shares},
            "versions": versions(),
            "machine": {
                "device": str(run.learners[0].device),
                "threads": torch.get_num_threads(),
                "system": platform.platform(),
            },
            "source": source.info,
        },
    )
    return saes


def _check_weights(run: _Run) -> None:
    """The update of the last step happened after its gradient was looked at; nothing that is not finite is saved."""
    for learner, name in zip(run.learners, run.names):
        if not all(bool(torch.isfinite(t).all()) for t in learner.parameters.values()):
            kept = checkpoint.newest(run.out)
            raise NonFiniteError(
                f"train: weights must be finite; learner `{name}` (seed {learner.seed}) is not after step "
                f"{run.step}. Last good checkpoint: {kept or 'none'}. Lower `lr`."
            )
