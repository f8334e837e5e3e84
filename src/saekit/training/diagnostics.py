"""Diagnostics: values that are not finite stop a run; at its end, signs that an SAE is not what was asked for."""

from __future__ import annotations

import torch

from ..errors import NonFiniteError
from ..ranks import any_of, flags_of
from ..variance import SAME_ROWS
from . import checkpoint
from .callbacks import Record
from .config import Config
from .convergence import fall_of, is_undertrained
from .defaults import DEAD_AFTER_ROWS, ROWS_PER_LATENT, ResolvedConfig
from .learner import Learner
from .request import Request
from .run_state import Run

Warned = dict[str, str]
"""A warning: its `code`, its `message` and, where it is about one SAE, the name of that, `sae`."""

FVU_LIMIT = 1.0
"""FVU from which an SAE is flagged: predicting the mean row scores 1. Unit: fraction."""
DEAD_LIMIT = 0.02
"""Fraction of silent latents above which an SAE is flagged: the default learning rate leaves fewer. Unit: fraction."""
SILENT_FRACTION = 0.2
"""Last fraction of the run in which a latent that never fired is silent: `dead_after_rows`, by which training revives
latents, is so short that live latents which are rare count as dead. At most `DEAD_AFTER_ROWS` rows."""
L0_LIMIT = 0.15
"""Distance of L0 from its target above which an SAE is flagged; the controller ends well within it. Unit: fraction of
the target."""
DENSE_LIMIT = 0.2
"""L0 above which an SAE without a target is flagged as hardly sparse. Unit: fraction of the latents."""
LEFT_OUT_LIMIT = 0.01
"""Fraction of the rows asked for above which it is told that they do not fill a whole batch."""


def check_step(run: Run) -> None:
    """Refuse to go on when a loss or gradient was not finite since the last log record; raises `NonFiniteError`."""
    bad = torch.stack([run.sums[f"{index}.bad"] for index in range(len(run.learners))])
    if not bool((bad > 0).any()):
        return
    index = int((bad > 0).nonzero()[0])
    learner, steps_ago = run.learners[index], int(bad[index])  # once not finite, every later step is not
    kept = checkpoint.newest(run.folder)
    hint = (
        f"The last good checkpoint is `{kept}`; pass resume=True to continue from it."
        if kept
        else "No checkpoint exists."
    )
    rows_bad = not bool(torch.isfinite(run.sums["x.squares"]))
    cause = (
        "the rows hold NaN, infinity or numbers whose squares float32 cannot hold (scale the rows)"
        if any_of(run.mesh, rows_bad)
        else "lower `lr`, or use precision='fp32'"
    )
    where = ""
    if run.mesh.size > 1:
        first = flags_of(run.mesh, rows_bad or bool(run.sums[f"{index}.own_bad"] > 0))
        ranks = ", ".join(str(rank) for rank, is_bad in enumerate(first) if is_bad)
        where = f" on rank {ranks or 'unknown'} of {run.mesh.size}"
    raise NonFiniteError(
        f"train: loss and gradient must be finite; got NaN or infinity in step {run.step - steps_ago + 1}{where}, "
        f"learner `{run.request.names[index]}` (seed {learner.seed}, {learner.config!r}): {cause}. {hint}"
    )


def check_weights(run: Run) -> None:
    """Refuse weights that are not finite: the last update came after its gradient was checked.

    Raises
    ------
    NonFiniteError
        Nothing that is not finite is ever saved.
    """
    for name, learner in run.named_learners():
        if any_of(run.mesh, not all(bool(torch.isfinite(t).all()) for t in learner.parameters.values())):
            kept = checkpoint.newest(run.folder)
            raise NonFiniteError(
                f"train: weights must be finite; learner `{name}` (seed {learner.seed}) is not after step "
                f"{run.step}. Last good checkpoint: {kept or 'none'}. Lower `lr`."
            )


def warnings_of(run: Run) -> list[Warned]:
    """Return what is doubtful about a finished run: its start, its rows, then each learner."""
    found = [each.to_json() for each in run.request.warnings] + row_warnings(run.request)
    for name, learner in run.named_learners():
        fall = fall_of(run.curves.get(name, []), learner.resolved)
        found += [{**warning, "sae": name} for warning in warnings_for(learner, run.last[name], fall)]
    return found


def row_warnings(request: Request) -> list[Warned]:
    """Return whether rows are seen more than once, and whether asked rows do not fill a whole batch."""
    used, asked, batch_rows = request.used_rows, request.asked_rows, request.batch_rows
    found = []
    if request.epochs is not None and request.epochs > 1:
        found.append(
            _warned(
                "repeated_rows",
                f"Each of the {request.source.n_rows:,} rows is seen {request.epochs:.3g} times, to train on {used:,}. "
                "Give more rows, or fewer tokens.",
            )
        )
    if asked - used > LEFT_OUT_LIMIT * asked:
        found.append(
            _warned(
                "rows_left_out",
                f"Trained on {used:,} of {asked:,} rows, whole batches of {batch_rows:,}. "
                "A smaller `batch_rows` uses more.",
            )
        )
    return found


def _warned(code: str, message: str) -> Warned:
    return {"code": code, "message": message}


def warnings_for(learner: Learner, record: Record, fall: float | None = None) -> list[Warned]:
    """Return what is wrong with a learner at the end of its run; empty when nothing is.

    Parameters
    ----------
    learner
        After its last step, with its latents of all ranks.
    record
        Its last log record: `fvu`, `l0`.
    fall
        How much of its FVU the last doubling of the rows took off; None where its curve does not tell.
    """
    config, found = learner.config, _about_fvu(record["fvu"], fall)
    target = getattr(config, "target_l0", None) or getattr(config, "k", None)
    l0, silent_rows = float(record["l0"] or 0), silent_after_rows(learner.resolved)
    found += _about_size(learner, target)
    silent = float((learner.rows_since_fired >= silent_rows).double().mean())
    if silent > DEAD_LIMIT:
        text = f"{silent:.1%} of the latents did not fire in the last {silent_rows:,} rows. "
        found.append(_warned("dead_latents", text + "Use fewer latents, more rows, or half of the learning rate."))
    if target and abs(l0 / target - 1) > L0_LIMIT:
        text = f"L0 is {l0:.3g} and should be {target:g}. Train longer"
        weighed = config.arch == "jumprelu" and not _has_tanh(config)
        found.append(_warned("l0_off_target", text + (", or raise `sparsity`." if weighed else ".")))
    if target is None and l0 > DENSE_LIMIT * config.n_latents:
        text = f"L0 is {l0:.3g} of {config.n_latents} latents: hardly sparse. "
        text += f"Raise `{'tanh' if _has_tanh(config) else 'l1'}` or give `target_l0`."
        found.append(_warned("hardly_sparse", text))
    return found


def silent_after_rows(resolved: ResolvedConfig) -> int:
    """Return the last rows of a run in which a latent that never fired is silent.

    >>> from saekit import TopK
    >>> from saekit.training.defaults import resolve
    >>> silent_after_rows(resolve(TopK(64, k=4), 64, total_steps=1000, batch_rows=512))
    102400
    """
    rows = round(SILENT_FRACTION * resolved.total_steps * resolved.batch_rows)
    return max(resolved.dead_after_rows, min(rows, DEAD_AFTER_ROWS))


def _has_tanh(config: Config) -> bool:
    """Return whether the tanh penalty sets the sparsity."""
    return bool(getattr(config, "tanh", 0))


def _about_size(learner: Learner, target: float | None) -> list[Warned]:
    """Return why latents stay dead at lower learning rates too: few rows for so many, or no sparsity to speak of."""
    n, d_in = learner.config.n_latents, len(learner.center)
    rows = learner.resolved.total_steps * learner.resolved.batch_rows
    found = []
    if learner.config.control is None and rows < ROWS_PER_LATENT * n:
        text = (
            f"{rows:,} rows are {rows / n:.3g} for each of the {n:,} latents: below {ROWS_PER_LATENT} many never fire. "
        )
        found.append(_warned("few_rows_per_latent", text + "Train on more rows (--tokens), or fewer latents."))
    if target and target >= d_in:
        text = f"L0 of {target:g} reaches the width of the rows, {d_in}: as many latents as dimensions reconstruct any "
        found.append(_warned("l0_reaches_width", text + "row, so latents die unused. Take a smaller k or target."))
    return found


def _about_fvu(fvu: float | str | None, fall: float | None) -> list[Warned]:
    """Return what is wrong with an FVU, and with how much the last doubling of the rows took off it."""
    if fvu is None:
        return [_warned("rows_do_not_vary", f"FVU is undefined: {SAME_ROWS}. Are these the rows that were meant?")]
    if float(fvu) >= FVU_LIMIT:
        text = f"FVU is {float(fvu):.3g}: the SAE is no better than predicting the mean row. Train longer, "
        return [_warned("no_better_than_mean", text + "or lower the sparsity coefficient or the learning rate.")]
    if is_undertrained(fall):
        text = f"FVU still fell by {fall:.0%} with the last doubling of the rows: the SAE is undertrained, its latents "
        return [_warned("undertrained", text + "will still change. Train on more rows (--tokens).")]
    return []
