"""The fast step of a TopK learner: `saekit.kernels.topk_step` behind the seam of `saekit.train.learner`."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import kernels
from .config import TopK
from .learner import ADAM_EPS, STEPS, Learner, Statistics, learning_rate, plain_step


def default_step(device: torch.device) -> str:
    """The name of the step that a run on this device uses when none is asked for."""
    return "fused" if device.type == "cpu" and kernels.fast_here() else "plain"


def fuses(learner: Learner) -> bool:
    """Whether this learner's step has a fast path here: plain TopK (with AuxK), everything trained, on the CPU."""
    config = learner.config
    simple = type(config) is TopK and config.control is None and not config.multi_topk
    return simple and kernels.topk_step_runs(learner.parameters, config.k)


def fused_step(learner: Learner, x: Tensor) -> Statistics:
    """One step without a dense gradient, where there is such a path; `plain_step` otherwise.

    The codes are those of the fp32 product whatever the precision of the run. Weights agree with `plain_step` up to the
    rounding of sums.

    Parameters
    ----------
    learner
        Changed in place.
    x
        Rows ``[n, d_in]`` on the learner's device, in their own units; not changed.
    """
    if not fuses(learner):
        return plain_step(learner, x)
    config, settings = learner.config, learner.settings
    u = kernels.scratch("centered rows", x.shape)
    if learner.scale is None:
        torch.sub(x, learner.center, out=u)
    else:
        torch.mul(x, learner.scale, out=u).sub_(learner.center)
    # No latent can be dead before that many rows.
    can_be_dead = learner.rows_seen >= settings.dead_after_rows
    beta1, beta2 = config.betas
    outcome = kernels.topk_step(
        learner.parameters,
        learner.first_moments,
        learner.second_moments,
        u,
        learner.parameters["b_dec"] - learner.center,
        kernels.TopKSettings(config.k, config.clip, settings.k_aux, config.aux_coefficient),
        kernels.Adam(learning_rate(settings, learner.step), learner.step + 1, beta1, beta2, ADAM_EPS),
        learner.rows_since_fired >= settings.dead_after_rows if can_be_dead else None,
    )
    learner.rows_since_fired = torch.where(outcome.fired > 0, 0, learner.rows_since_fired + len(x))
    learner.step += 1
    parts = {"reconstruction": torch.tensor(outcome.error)}
    if can_be_dead and config.aux_coefficient and settings.k_aux:
        parts["aux"] = torch.tensor((outcome.aux or 0.0) * len(x))
    loss = torch.stack(list(parts.values())).sum()
    norm = torch.tensor(outcome.grad_norm)
    return Statistics(
        rows=len(x),
        loss=loss,
        error=parts["reconstruction"] if learner.scale is None else parts["reconstruction"] / learner.scale**2,
        fired=torch.tensor(float(outcome.n_fired)),
        dead=(learner.rows_since_fired >= settings.dead_after_rows).sum(),
        grad_norm=norm * len(x),
        finite=torch.isfinite(loss) & torch.isfinite(norm),
        parts=parts,
    )


STEPS["fused"] = fused_step
