"""Where a run stands: its learners, its position in the rows, its running sums; begun, saved and continued."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..ranks import agreed
from ..rows.source import Batch
from . import checkpoint
from .callbacks import Record
from .config import Config
from .convergence import Point, adds_point
from .initialization import (
    SAMPLE_ROWS,
    Targets,
    affine_map,
    check_first_rows,
    first_rows,
    initial_bias,
    initial_scale,
    read_first_rows,
)
from .learner import Learner, initialize_learner, restore, shard, tensors_of, whole
from .mesh import ALONE, Mesh
from .request import Request
from .warm_start import warm_start


@dataclass
class Run:
    """One call of `train`: what it was asked for and where it stands."""

    request: Request
    folder: Path | None
    learners: list[Learner]
    batches: Iterator[Batch]
    center: Tensor
    """Mean of the first rows ``[d_in]``, for transcoders of the first targets: the fixed point of the variance sums."""
    step: int = 0
    position: tuple[int, int] = (0, 0)
    """Block and row of the first row that has not been trained on."""
    order_digest: str = "saekit"
    sums: dict[str, Tensor] = field(default_factory=dict)
    """Sums since the last log record."""
    last: dict[str, Record] = field(default_factory=dict)
    """The last log record of each learner, by its name."""
    mesh: Mesh = ALONE
    """The ranks that train together; only rank 0 writes."""
    curves: dict[str, list[Point]] = field(default_factory=dict)
    """Rows seen and FVU, about one pair per percent of the run, of each learner by its name."""

    def named_learners(self) -> Iterator[tuple[str, Learner]]:
        """Yield the learners with the names of their folders."""
        yield from zip(self.request.names, self.learners, strict=True)

    def keep_records(self, records: dict[str, Record]) -> None:
        """Keep the records of a log step: as the last ones, and as a point of each curve where one is due."""
        before = max((int(record["step"] or 0) for record in self.last.values()), default=0)
        self.last = records
        if adds_point(before, self.step, self.request.total_steps):
            for name, record in records.items():
                if record["fvu"] is not None:
                    self.curves.setdefault(name, []).append((int(record["rows"] or 0), float(record["fvu"])))

    def move_on(self, batch: Batch) -> None:
        """Count a batch that every learner has been trained on."""
        self.step += 1
        self.position = batch.next
        self.order_digest = next_digest(self.order_digest, batch)


def begin(request: Request, folder: Path | None, resume: bool, mesh: Mesh = ALONE) -> Run:
    """Return a run before its first step, or at its last checkpoint in `folder`.

    Raises
    ------
    ShapeError, NonFiniteError
        The first rows have another width than the source says, or a value that is not finite.
    """
    found = agreed(mesh, lambda: checkpoint.read(folder)) if resume and folder is not None else None
    run = _begin_first(request, folder) if found is None else _begin_at(request, folder, *found)
    if mesh.size > 1:
        run.mesh = mesh
        for learner in run.learners:
            shard(learner, mesh)
    return run


def save_checkpoint(run: Run, *, scheduled: bool = True) -> None:
    """Write everything that the rest of the run depends on, the same for any number of ranks."""
    folder = run.folder
    assert folder is not None
    tensors = {f"sums.{name}": t for name, t in run.sums.items()} | {"center": run.center}
    for index, learner in enumerate(run.learners):
        tensors |= {f"{index}.{name}": t for name, t in tensors_of(whole(learner)).items()}
    facts = {"place": list(run.position), "order_digest": run.order_digest, "last": run.last, "curves": run.curves}

    def write() -> None:
        checkpoint.write(folder, run.step, tensors, facts, scheduled=scheduled)

    agreed(run.mesh, write)


def next_digest(digest: str, batch: Batch) -> str:
    """Return the chained digest of the data order: positions, and the first and the last row of each batch."""
    text = hashlib.sha256(f"{digest} {batch.next}".encode())
    if batch.x.device.type == "cpu":  # reading rows back from a GPU would make every step wait
        text.update(batch.x[[0, -1]].contiguous().numpy().tobytes())
    return text.hexdigest()


def _begin_first(request: Request, folder: Path | None) -> Run:
    source, settings = request.source, request.settings
    batches = source.batches(request.batch_rows, seed=settings.data_seed)
    head, matrices = read_first_rows(batches, first_rows(request.used_rows, source.d_in + (request.d_out or 0)))
    check_first_rows(matrices, source, request.names)
    center = matrices[-1].mean(0).to(request.device)
    return Run(request, folder, _learners(request, *matrices), _chained(head, batches), center)


def _begin_at(request: Request, folder: Path | None, facts: dict[str, Any], tensors: dict[str, Tensor]) -> Run:
    source, settings, device = request.source, request.settings, request.device
    position = tuple(facts["place"])
    sums = _group("sums", tensors)
    # The learners' tensors are replaced, so their shapes are all that counts here: one row of zeros is enough.
    run = Run(
        request=request,
        folder=folder,
        learners=_learners(request, *(torch.zeros(1, width) for width in (source.d_in, request.d_out) if width)),
        batches=source.batches(request.batch_rows, seed=settings.data_seed, start=position),
        center=tensors["center"].to(device, copy=True),
        step=facts["step"],
        position=position,
        order_digest=facts["order_digest"],
        sums={name: t.to(device, copy=True) for name, t in sums.items()},
        last=facts["last"],
        curves=facts["curves"],
    )
    for index, learner in enumerate(run.learners):
        restore(learner, _group(str(index), tensors), run.step)
    return run


def _learners(request: Request, rows: Tensor, targets: Tensor | None = None) -> list[Learner]:
    """Return every learner before its first step; what depends on the rows alone is computed once for all."""
    skips = targets is not None and any(config.skip == "least-squares" for config in request.configs)
    affine = affine_map(rows, targets) if skips and targets is not None else None
    biases = {kind: initial_bias(rows, kind) for kind in {config.bias for config in request.configs}}
    scales = {
        (scaling, kind): initial_scale(rows, scaling, biases[kind])
        for scaling, kind in {(config.scaling, config.bias) for config in request.configs}
    }
    learners = []
    for config, seed in request.learners:
        learner = initialize_learner(
            config,
            seed,
            request.resolved[request.configs.index(config)],
            bias=biases[config.bias],
            scale=scales[config.scaling, config.bias],
            sample=rows[:SAMPLE_ROWS],
            device=request.device,
            targets=None if targets is None else targets_of(config, targets, affine),
        )
        learners.append(learner)
    for learner, sae in zip(learners, request.warm_starts):  # none, or one for each
        warm_start(learner, sae)
    _tie_seeds(learners)
    return learners


def targets_of(config: Config, targets: Tensor, affine: tuple[Tensor, Tensor] | None) -> Targets:
    """Return what a transcoder of this configuration begins with: its b_dec is the mean of the targets, or zero."""
    bias = initial_bias(targets, "zero" if config.bias == "zero" else "mean")
    scale = initial_scale(targets, config.scaling, bias)
    return Targets(bias, scale, targets[:SAMPLE_ROWS], affine)


def _tie_seeds(learners: list[Learner]) -> None:
    """Show the learners of a configuration to each other where `mutual` makes them depend on each other."""
    for learner in learners:
        if learner.config.mutual:
            learner.peers = [each for each in learners if each is not learner and each.config == learner.config]


def _group(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors whose names begin with the prefix and a dot, without it."""
    return {name.removeprefix(f"{prefix}."): t for name, t in tensors.items() if name.startswith(f"{prefix}.")}


def _chained(head: list[Batch], batches: Iterator[Batch]) -> Iterator[Batch]:
    """Yield the batches that were read for the initialization, then the others."""
    while head:  # emptied on the way, so that these rows do not stay in memory
        yield head.pop(0)
    yield from batches
