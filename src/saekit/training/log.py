"""What a run reports: sums over the steps since the last record, the log file, callbacks, progress, and its time."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Literal, TypedDict

import torch
from torch import Tensor

from ..errors import FormatError
from ..files import append_text, parse_json, write_bytes
from ..forms import NATURAL, check_form
from ..kernels import with_one_torch_thread
from ..rows.source import Source
from ..settings import Progress
from ..variance import fraction_unexplained
from .callbacks import Receiver, Record
from .run_state import Run
from .step import Statistics

LOG_FILE = "log.jsonl"
"""Name of the log. It has no seal: a line is appended at every log step, and a kill may leave half of one. No number is
computed from it and no run goes on from it (checkpoints have all that); it is for charts. The last record of every SAE
is in ``run.json`` too, under its seal."""
STAGE = "train"
"""Name of the stage in progress reports."""


class Seconds(TypedDict, total=False):
    """Where the time of a run went. Unit: s."""

    total: float
    """Everything until the last step."""
    start: float
    """Before the first step: reading the first rows, centre and scale, initial weights."""
    rows: float
    """Waiting for rows: the loader's part."""
    steps: float
    """Training the SAEs, without logs and checkpoints."""
    model: float
    """In the language model, which works at the same time as the steps: more than `rows` where the two overlap. Only
    for sources that run one."""


class Clock:
    """Measures where the time of a run goes.

    Parameters
    ----------
    source
        A source that runs a language model counts its own seconds, in ``seconds["lm"]``.
    """

    def __init__(self, source: Source) -> None:
        self.seconds = Seconds(total=0.0, start=0.0, rows=0.0, steps=0.0)
        self._model = getattr(source, "seconds", None)
        self._model_before = self._model_seconds() or 0.0
        self._began = time.perf_counter()

    def start_steps(self) -> None:
        """End the initialization: what follows are steps."""
        self.seconds["start"] = time.perf_counter() - self._began

    @contextmanager
    def measuring(self, part: Literal["rows", "steps"]) -> Iterator[None]:
        """Count the seconds of a block as time for a part of the run."""
        before = time.perf_counter()
        yield
        self.seconds[part] += time.perf_counter() - before

    def elapsed(self) -> float:
        """Return the seconds since the first step, and bring the totals up to date."""
        self.seconds["total"] = time.perf_counter() - self._began
        model = self._model_seconds()
        if model is not None:
            self.seconds["model"] = model - self._model_before
        return self.seconds["total"] - self.seconds["start"]

    def _model_seconds(self) -> float | None:
        return self._model.get("lm") if isinstance(self._model, dict) else None


class Log:
    """The log of a run: a file in its folder, callbacks and a progress bar.

    Parameters
    ----------
    run
        The run; records before its step are kept, later ones (of a killed process) are dropped from the file.
    clock
        Measures the time of the run.
    receivers
        Called with every record.
    progress
        Called at every log step.
    """

    def __init__(self, run: Run, clock: Clock, receivers: Sequence[Receiver], progress: Progress) -> None:
        self._receivers = receivers
        self._progress = progress
        self._clock = clock
        self._first_step = run.step
        self._file = None if run.folder is None or run.mesh.rank else run.folder / LOG_FILE
        if self._file is not None:
            cut_log(self._file, run.step)

    def write(self, run: Run) -> None:
        """Report the steps since the last record, and begin new sums."""
        elapsed = self._clock.elapsed()
        rate = (run.step - self._first_step) * run.request.batch_rows / max(elapsed, 1e-9)
        run.keep_records(records_of(run))
        run.sums.clear()
        records = [
            {**record, "seconds": round(elapsed, 3), "rows_per_second": round(rate, 1)} for record in run.last.values()
        ]
        if self._file is not None:
            append_text(self._file, "".join(json.dumps(record, allow_nan=False) + "\n" for record in records))
        for record in records:
            for receive in self._receivers:
                receive(record)
        batch_rows, total_steps = run.request.batch_rows, run.request.total_steps
        self._progress(STAGE, run.step * batch_rows, total_steps * batch_rows, note_of(records, rate))


def records_of(run: Run) -> dict[str, Record]:
    """Return the record of each learner over the steps since the last one, by its name."""
    sums = {name: float(t) for name, t in run.sums.items() if name != "x.sum"}
    n = sums["x.rows"]
    # Sums about a point near the mean: the difference of two large squares would lose its digits.
    shift = run.sums["x.sum"] / n
    variance = max(sums["x.squares"] - n * float(shift.pow(2).sum()), 0.0)
    square = variance + n * float((run.center + shift).pow(2).sum())
    rows = run.step * run.request.batch_rows
    records: dict[str, Record] = {}
    for index, (name, learner) in enumerate(run.named_learners()):
        own = {key.removeprefix(f"{index}."): value for key, value in sums.items() if key.startswith(f"{index}.")}
        records[name] = {
            "step": run.step,
            "rows": rows,
            **({"epochs": rows / run.request.source.n_rows} if run.request.source.n_rows else {}),
            "learner": name,
            "loss": own["loss"] / n,
            "fvu": _defined(float(fraction_unexplained(own["error"], variance, square))),
            "row_variance": variance / n,
            "l0": own["fired"] / n,
            "dead_fraction": own["dead="] / learner.config.n_latents,
            "grad_norm": own["grad_norm"] / n,
            **{key.removeprefix("part."): value / n for key, value in own.items() if key.startswith("part.")},
        }
    return records


def _defined(value: float) -> float | None:
    """Return None for NaN, which JSON does not have."""
    return None if math.isnan(value) else value


def note_of(records: Sequence[Record], rate: float) -> str:
    """Return the state of the learners in a few words, for a progress bar.

    >>> note_of([{"fvu": 0.25, "l0": 16, "dead_fraction": 0}, {"fvu": 0.5, "l0": 16, "dead_fraction": 0}], 2000)
    '2,000 rows/s  FVU 0.250–0.500  L0 16  dead 0%'
    """
    parts = [f"{rate:,.0f} rows/s"]
    epochs = float(records[0].get("epochs") or 0)
    if epochs > 1:
        parts.append(f"epoch {math.ceil(epochs)}")
    for label, name, form in (("FVU", "fvu", ".3f"), ("L0", "l0", ".0f"), ("dead", "dead_fraction", ".0%")):
        values = [float(value) for record in records if (value := record[name]) is not None]
        if values:
            low, high = format(min(values), form), format(max(values), form)
            parts.append(f"{label} {low if low == high else f'{low}–{high}'}")
        else:
            parts.append(f"{label} undefined")
    return "  ".join(parts)


def add_step(run: Run, x: Tensor, statistics: Sequence[Statistics]) -> None:
    """Add one step of every learner to the running sums."""
    cheap = x.device.type == "cpu"  # beside the step: not worth the wait of several threads for each other
    of_rows = with_one_torch_thread(lambda: _row_sums(run, x), x.numel()) if cheap else _row_sums(run, x)
    _add(run.sums, of_rows)
    for index, each in enumerate(statistics):
        _add(run.sums, _learner_sums(each, str(index)))


def _row_sums(run: Run, x: Tensor) -> dict[str, Tensor]:
    away = x - run.center
    rows, sums = torch.tensor(float(len(x)), device=x.device), away.sum(0)
    return {"x.rows": rows, "x.squares": away.pow_(2).sum(), "x.sum": sums}


def _learner_sums(s: Statistics, name: str) -> dict[str, Tensor]:
    sums = {"loss": s.loss, "error": s.error, "fired": s.fired, "grad_norm": s.grad_norm}
    sums |= {f"part.{part}": value for part, value in s.parts.items()}
    sums |= {"dead=": s.dead, "bad": torch.where(s.finite, 0, 1)}
    if s.own_finite is not None:
        sums["own_bad"] = torch.where(s.own_finite, 0, 1)
    return {f"{name}.{key}": value for key, value in sums.items()}


def _add(sums: dict[str, Tensor], new: dict[str, Tensor]) -> None:
    """Add to running sums in the widest type of the device; names that end in ``=`` keep the last value."""
    for name, value in new.items():
        value = value.detach()
        wide = value if value.device.type == "mps" else value.double()  # that device has no doubles
        sums[name] = wide if name.endswith("=") or name not in sums else sums[name] + wide


def cut_log(path: Path, step: int) -> None:
    """Drop the lines of a log file after `step`, and a line that a killed run left half written."""
    if not path.is_file():
        return
    kept = []
    for line in path.read_bytes().split(b"\n"):
        try:
            record = parse_json(line, path)
            check_form(record, {"step": NATURAL}, path)
        except FormatError:
            continue
        if record["step"] <= step:
            kept.append(line + b"\n")
    write_bytes(path, b"".join(kept))
