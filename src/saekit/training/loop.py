"""The training loop: rows are read once and feed every learner."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import overload

import torch

from ..errors import ConfigError
from ..files import check_path, locked_folder
from ..interruption import noted_interrupts
from ..memory import check_memory
from ..places import warn
from ..progress import shows_progress
from ..ranks import agreed, any_of, together, working
from ..rows.joined import with_equal_parts
from ..rows.opening import Rows, source_of
from ..rows.shared_reading import shared_reading
from ..sae.model import SAE
from ..settings import Progress, silent, suggest_keywords
from .architectures import ARCHITECTURES, config_to_dict
from .callbacks import Callback, Receiver, receiver
from .config import Config, Selecting, encoder_fixed
from .defaults import ResolvedConfig, default_batch_rows, resolve
from .diagnostics import check_step, check_weights
from .initialization import (
    SAMPLE_ROWS,
    affine_map,
    check_first_rows,
    first_rows,
    initial_bias,
    initial_scale,
    read_first_rows,
)
from .learner import finish, initialize_learner, unscaled, whole
from .log import Clock, Log, add_step
from .mesh import ALONE, Mesh, launched
from .request import (
    Request,
    Seeds,
    check_configs,
    check_ranks,
    check_seeds,
    check_target,
    device_of,
    make_request,
    memory_of,
    with_parts,
)
from .run_folder import claim, provenance_of, read_back, save_finished, save_snapshot, source_facts
from .run_state import Run, begin, save_checkpoint, targets_of
from .settings import TrainSettings
from .step import STEPS

CHECK_EVERY = 50
"""Steps between checks for NaN on a GPU, where a check waits for the device; on a CPU every step is checked."""

AGREE_EVERY = 10
"""Steps after which several ranks ask each other whether somebody wants the run to end."""


@overload
def train(
    configs: Config | Sequence[Config],
    rows: Rows,
    *,
    seeds: Seeds = 0,
    tokens: int | None = None,
    start: SAE | Sequence[SAE] | None = None,
    out: str | os.PathLike[str] | None = None,
    resume: bool = False,
    settings: TrainSettings = ...,
    callbacks: Sequence[Callback | Receiver] = (),
    progress: Progress | None = None,
) -> list[SAE]: ...
@overload
def train(
    configs: Config | Sequence[Config],
    rows: Mapping[str, Rows],
    *,
    seeds: Seeds = 0,
    tokens: int | None = None,
    start: SAE | Sequence[SAE] | None = None,
    out: str | os.PathLike[str] | None = None,
    resume: bool = False,
    settings: TrainSettings = ...,
    callbacks: Sequence[Callback | Receiver] = (),
    progress: Progress | None = None,
) -> dict[str, list[SAE]]: ...
@suggest_keywords
@shows_progress
def train(
    configs: Config | Sequence[Config],
    rows: Rows | Mapping[str, Rows],
    *,
    seeds: Seeds = 0,
    tokens: int | None = None,
    start: SAE | Sequence[SAE] | None = None,
    out: str | os.PathLike[str] | None = None,
    resume: bool = False,
    settings: TrainSettings = TrainSettings(),
    callbacks: Sequence[Callback | Receiver] = (),
    progress: Progress | None = None,
) -> list[SAE] | dict[str, list[SAE]]:
    """Train one SAE for each configuration and seed, in one pass over the rows; a transcoder where they have targets.

    Together equals alone: an SAE is bitwise the same whatever else is trained in the same call (unless its
    configuration sets ``mutual``, which ties the seeds of that configuration together), on whatever other rows.

    Parameters
    ----------
    configs
        One configuration or several (`TopK`, `ReLU`, ...).
    rows
        A source of rows (see `saekit.rows.source.Source`), an array ``[n, d_in]``, or the path of stored rows. A
        dictionary of them (what `capture` and `stream` return for several layers): a run on each, step by step side by
        side, so that a language model runs once for all. Rows with targets (``ArrayRows(x, target=y)``, or
        `CaptureSettings` and `StreamSettings` with ``target``) train transcoders, which give the target of each row.
    seeds
        Random seeds of the learners: initial weights and draws during training. The order of the rows has its own
        seed. A list of lists gives each configuration its own: ``[[0, 1], [0]]``.
    tokens
        Number of rows to train on (epochs repeat when the source has fewer). None: one pass. The last part of a batch
        is left out.
    start
        SAE to initialize the learners with instead of random weights, or one for each configuration and seed: its
        shape and rule must be the configuration's. Adam starts from zero; seeds still determine draws during training.
    out
        Folder for the SAEs (``<arch>-<latents>-<k or l0 or l1>-seed<S>``), ``run.json``, ``log.jsonl`` and
        checkpoints; of a dictionary of rows, one such folder for each. None: nothing is written.
    resume
        Continue the run in `out` from its last checkpoint, bit for bit. A folder without a checkpoint starts from the
        beginning; a finished run is read back.
    settings
        Batch size, data order, precision, device, intervals of logs and checkpoints.
    callbacks
        Further receivers of log records: functions of a record, or objects with ``log`` and ``close``.
    progress
        Function called with ``("train", rows done, rows in all, note)`` at every log step [shown on stderr;
        ``False``: none].

    Returns
    -------
    list of SAE
        For each configuration in order, for each seed in order; on the training device. For a dictionary of rows a
        dictionary of such lists.

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
    KeyboardInterrupt
        Ctrl-C or SIGTERM, after the step that it came in; with `out` a checkpoint of that step is written first. A
        second one stops at once.

    Examples
    --------
    >>> from saekit import SyntheticRows, TopK, TrainSettings, train
    >>> rows = SyntheticRows(d_in=8, n_features=16, n_rows=2048)
    >>> [sae] = train(TopK(n_latents=16, k=4), rows, settings=TrainSettings(batch_rows=256))
    >>> sae.n_latents
    16
    """
    if resume and out is None:
        raise ConfigError("train: `resume` needs the folder of the run to continue; got out=None. Give `out`.")
    several = isinstance(rows, Mapping)
    sources: dict[str, Rows] = dict(rows) if isinstance(rows, Mapping) else {"": rows}
    _check_sources(sources, start, several)
    with ExitStack() as stack:
        stack.enter_context(together("train"))
        mesh = launched(settings.latent_shards, device_of(settings).type)
        requests = {
            name: make_request(
                configs, each, seeds=seeds, tokens=tokens, start=start, settings=settings, ranked=mesh.size > 1
            )
            for name, each in sources.items()
        }
        for request in requests.values():
            check_ranks(request, mesh)
        if several:
            _check_memory_of(requests)
        stack.enter_context(shared_reading([each.source for each in requests.values()], mesh))
        receivers = [receiver(callback, stack) for callback in callbacks if mesh.rank == 0]
        begun: dict[str, Training] = {}
        done: dict[str, list[SAE]] = {}
        for name, request in requests.items():
            warn(request.warnings)
            folder = None if out is None else check_path(out) / name
            claimed = agreed(mesh, lambda: _claimed(folder, request, resume, stack))  # noqa: B023
            if claimed is None:
                assert folder is not None
                done[name] = agreed(mesh, lambda: read_back(folder, request.names, request.device))  # noqa: B023
                continue
            clock = Clock(request.source)
            run = begin(replace(request, resolved=claimed), folder, resume, mesh)
            clock.start_steps()
            shown = silent if begun or mesh.rank else progress or silent
            begun[name] = Training(run, Log(run, clock, _named(receivers, name), shown), clock, Schedule.of(run))
        with working():
            advance(list(begun.values()), mesh)
        done |= {name: _finished(training) for name, training in begun.items()}
    return {name: done[name] for name in requests} if several else done[""]


def _claimed(folder: Path | None, request: Request, resume: bool, stack: ExitStack) -> list[ResolvedConfig] | None:
    """Hold the folder of a run; return the defaults that the run has, None where it is finished."""
    if folder is None:
        return request.resolved
    claimed = claim(stack.enter_context(locked_folder(folder)), request, resume)
    return None if claimed is None else claimed.resolved


def _check_sources(sources: Mapping[str, Rows], start: object, several: bool) -> None:
    """Refuse no rows at all, names that are no folder names, and SAEs to start from for several sources."""
    if not several:
        return
    wrong = [name for name in sources if not isinstance(name, str) or Path(name).name != name or name in ("", "..")]
    if not sources or wrong:
        raise ConfigError(
            "train: `rows` must be rows, or a dictionary of them by names that a folder can have; "
            f"got {f'the name {wrong[0]!r}' if wrong else 'none'}. Pass what `stream` returns for several layers."
        )
    if start is not None:
        raise ConfigError("train: `start` must be left out with several rows: an SAE belongs to one place.")


def _check_memory_of(requests: Mapping[str, Request]) -> None:
    """Refuse several runs side by side that do not fit into memory together."""
    needs: dict[str, int] = {}
    for name, request in requests.items():
        configs = [config for config, _ in request.learners]
        for what, size in memory_of(configs, request.source.d_in, request.d_out).items():
            needs[f"{name}: {what}"] = size
    device = next(iter(requests.values())).device
    check_memory("train", needs, "Use fewer latents or seeds, or fewer layers in a call.", device)


def _named(receivers: Sequence[Receiver], name: str) -> list[Receiver]:
    """Return receivers of the records of one of several runs, whose learners they see as ``name/learner``."""
    if not name:
        return list(receivers)
    return [
        lambda record, receive=each: receive({**record, "learner": f"{name}/{record['learner']}"})  # type: ignore[misc]
        for each in receivers
    ]


@dataclass(frozen=True)
class Training:
    """A run with what it reports to."""

    run: Run
    log: Log
    clock: Clock
    schedule: Schedule


def _finished(training: Training) -> list[SAE]:
    """Return the SAEs of a run after its last step, and write them."""
    run = training.run
    check_weights(run)
    run.learners = [whole(learner) for learner in run.learners]
    source = run.request.source
    saes = [unscaled(finish(learner, provenance_of(run, index)), source) for index, learner in enumerate(run.learners)]
    if run.folder is not None:
        agreed(run.mesh, lambda: save_finished(run, saes, training.clock.seconds))
    return saes


def advance(trainings: Sequence[Training], mesh: Mesh = ALONE) -> None:
    """Train every learner of every run to the last step: the loop. Runs that are behind come first.

    Raises
    ------
    KeyboardInterrupt
        Somebody wants the runs to end (Ctrl-C, SIGTERM); a checkpoint of the last step of each is written.
    """
    with noted_interrupts() as interruption:
        while unfinished := [each for each in trainings if each.run.step < each.run.request.total_steps]:
            first = min(each.run.step for each in unfinished)
            for training in unfinished:
                if training.run.step == first:
                    train_batch(training)
            if (mesh.size == 1 or first % AGREE_EVERY == 0) and any_of(mesh, interruption.requested):
                stop(trainings)


def train_batch(training: Training) -> None:
    """Train every learner of a run on its next batch; report and save where that is due."""
    run, clock, schedule = training.run, training.clock, training.schedule
    device = run.request.device
    step = STEPS[run.request.step]
    with clock.measuring("rows"):
        batch = next(run.batches)
    with clock.measuring("steps"):
        matrices = [each.to(device=device, dtype=torch.float32, non_blocking=True) for each in batch.matrices]
        own = [run.mesh.rows_of(each) for each in matrices]
        add_step(run, matrices[-1], [step(learner, *own) for learner in run.learners])
        run.move_on(batch)
        # Before anything is written: what is not finite never reaches a log or a checkpoint.
        if schedule.checks(run.step):
            check_step(run)
    if schedule.logs(run.step):
        training.log.write(run)
    if run.step in schedule.snapshots:
        check_weights(run)
        save_snapshot(run)
    if schedule.saves(run.step):
        save_checkpoint(run)


def stop(trainings: Sequence[Training]) -> None:
    """Keep the runs as they are after this step, and raise KeyboardInterrupt."""
    for training in trainings:
        run, schedule = training.run, training.schedule
        if not schedule.checks(run.step):
            check_step(run)
        if run.folder is not None and not schedule.saves(run.step):
            save_checkpoint(run, scheduled=False)
    run = trainings[0].run
    folders = ", ".join(f"`{each.run.folder}`" for each in trainings)
    kept = "nothing is kept (no `out`)" if run.folder is None else f"a checkpoint is in {folders} (resume=True)"
    raise KeyboardInterrupt(f"train: interrupted after step {run.step:,} of {run.request.total_steps:,}; {kept}")


@dataclass(frozen=True)
class Schedule:
    """At which steps a run is checked, logged and saved."""

    last: int
    log_every: int
    checkpoint_every: int | None
    """None: there is no folder."""
    check_every: int
    snapshots: Sequence[int] = ()
    """Steps after which the SAEs are kept as they are; none without a folder."""

    @classmethod
    def of(cls, run: Run) -> Schedule:
        """Return the schedule of a run."""
        settings, last = run.request.settings, run.request.total_steps
        return cls(
            last=last,
            log_every=settings.log_interval(last),
            checkpoint_every=None if run.folder is None else settings.checkpoint_interval(last),
            check_every=1 if run.request.device.type == "cpu" else CHECK_EVERY,
            snapshots=() if run.folder is None else settings.snapshot_steps(last),
        )

    def logs(self, step: int) -> bool:
        """Return whether a record is due after a step."""
        return step % self.log_every == 0 or step == self.last

    def saves(self, step: int) -> bool:
        """Return whether a checkpoint is due after a step."""
        return self.checkpoint_every is not None and step % self.checkpoint_every == 0 and step != self.last

    def checks(self, step: int) -> bool:
        """Return whether it is due to look for what is not finite."""
        return step % self.check_every == 0 or self.logs(step) or self.saves(step) or step in self.snapshots


@suggest_keywords
def untrained(config: Config, rows: Rows, seed: int = 0, *, settings: TrainSettings = TrainSettings()) -> SAE:
    """Return the SAE that training with this configuration and seed starts from: a baseline that costs nothing.

    Parameters
    ----------
    config
        Configuration of an architecture.
    rows
        Rows, of a transcoder with targets, for centre, scale and thresholds; see `train`. Up to 100,000 are read.
    seed
        Random seed of the initial weights.
    settings
        As in `train`; with the same batch size and data seed the weights are bitwise those that it starts from
        (but encoder rows always have length 1).
    """
    check_configs([config])
    check_seeds([seed])
    source = source_of(rows)
    d_out = source.info.get("d_out")
    check_target(config, d_out)
    config, source = with_parts(config, source), with_equal_parts(source)
    check_memory("untrained", memory_of([config], source.d_in, d_out), "Use fewer latents.")
    batch_rows = settings.batch_rows or default_batch_rows(source.n_rows or 0)
    available = source.n_rows if source.n_rows is not None else batch_rows * 8
    batches = source.batches(min(batch_rows, available), seed=settings.data_seed)
    _, matrices = read_first_rows(batches, first_rows(available, source.d_in + (d_out or 0)))
    check_first_rows(matrices, source)
    first, *wanted = matrices
    bias = initial_bias(first, config.bias)
    # Short encoder rows would make a baseline that is too easy to beat.
    if isinstance(config, Selecting) and not encoder_fixed(config):
        config = replace(config, encoder_length=1.0)
    learner = initialize_learner(
        config,
        seed,
        resolve(config, source.d_in, total_steps=1, batch_rows=min(batch_rows, len(first))),
        bias=bias,
        scale=initial_scale(first, config.scaling, bias),
        sample=first[:SAMPLE_ROWS],
        device="cpu",
        targets=targets_of(config, wanted[0], affine_map(first, wanted[0]) if config.skip else None)
        if wanted
        else None,
    )
    if ARCHITECTURES[config.arch].batch_threshold:  # the threshold over a batch is only known after a step
        assert isinstance(config, Selecting)
        learner.config = replace(config, control="untrained", encoder_length=None)
        x, *target = (each[: learner.resolved.batch_rows] for each in matrices)
        STEPS["plain"](learner, x, *target)
        learner.config = config
    known = source_facts(source) | {"config": config_to_dict(config), "seed": seed, "rows_seen": 0}
    return unscaled(finish(learner, known), source)
