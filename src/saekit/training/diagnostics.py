"""Plain-word warnings at the end of a run: signs that an SAE is not what was asked for."""

from __future__ import annotations

from typing import Any

from .learner import Learner

DEAD_LIMIT = 0.1
"""Share of dead latents from which the doctor speaks. Unit: fraction."""
L0_LIMIT = 0.15
"""Relative distance of L0 from its target from which the doctor speaks. Unit: fraction of the target."""


def warnings_for(learner: Learner, record: dict[str, Any]) -> list[str]:
    """What is wrong with a learner at the end of its run, a sentence each; empty when nothing is.

    Parameters
    ----------
    learner
        After its last step.
    record
        Its last log record: `fvu`, `l0`, `dead_fraction`.
    """
    config, found = learner.config, []
    target = getattr(config, "target_l0", None) or getattr(config, "k", None)
    if record["fvu"] >= 1:
        found.append(
            f"FVU is {record['fvu']:.3g}: the SAE is no better than predicting the mean row. Train longer, "
            "or lower the sparsity coefficient or the learning rate."
        )
    if record["dead_fraction"] > DEAD_LIMIT:
        found.append(
            f"{record['dead_fraction']:.0%} of the latents did not fire in the last "
            f"{learner.settings.dead_after_rows:,} rows. "
            "Use fewer latents, a larger k or aux_coefficient, or more rows."
        )
    if target and abs(record["l0"] / target - 1) > L0_LIMIT:
        found.append(
            f"L0 is {record['l0']:.3g} and should be {target:g}. Train longer"
            + (", or raise `sparsity`." if config.arch == "jumprelu" else ".")
        )
    if target is None and record["l0"] > 0.2 * config.n_latents:
        found.append(
            f"L0 is {record['l0']:.3g} of {config.n_latents} latents: hardly sparse. Raise `l1` or give `target_l0`."
        )
    return found
