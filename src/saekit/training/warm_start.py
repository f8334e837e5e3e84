"""Warm start: initialize a learner from an existing SAE, the inverse of freezing a learner."""

from __future__ import annotations

import os
from collections.abc import Sequence

from torch import Tensor

from ..errors import ConfigError
from ..sae.model import SAE
from ..sae.rules import JumpReLURule, TopKRule
from .architectures import ARCHITECTURES, LEAST_THRESHOLD
from .learner import Learner, anchor_of, finish


def warm_start(learner: Learner, sae: SAE) -> None:
    """Give a learner at step 0 the weights, the biases and the scale of `sae`, in place.

    ``finish(learner, {})`` is then the same function as `sae`, with two exceptions: a threshold over the whole batch,
    which only training finds, is found again; and TopK with decoder rows of lengths other than 1 chooses by code times
    length from then on (its rows are brought to length 1).

    Raises
    ------
    ConfigError
        The SAE has another shape or rule than the configuration trains, or parts that no training has.
    """
    check_warm_start(learner, sae)
    if ARCHITECTURES[learner.config.arch].unit_decoder:
        sae = sae.fold_norms()
    sae = sae.to(learner.device, learner.center.dtype)
    learner.scale = None if sae.scaling.scale is None else sae.scaling.scale.clone()
    # The losses subtract b_dec before the encoder; what the SAE subtracts differently goes into the bias.
    shift = sae.b_dec if sae.b_pre is None else sae.b_dec - sae.b_pre
    learner.center = sae.b_dec.clone()
    values = {"W_enc": sae.W_enc, "W_dec": sae.W_dec, "b_dec": sae.b_dec, "b_enc": sae.b_enc + sae.W_enc @ shift}
    learner.parameters |= {name: t.clone() for name, t in (values | _of_the_rule(learner, sae, values)).items()}
    learner.anchor = anchor_of(learner.config, learner.parameters["W_dec"])


def check_warm_start(learner: Learner, sae: SAE) -> None:
    """Refuse an SAE that the learner cannot become.

    Raises
    ------
    ConfigError
        The SAE has another shape or rule than the configuration trains, or parts that no training has.
    """
    config = learner.config
    d_in = len(learner.center)
    if (sae.n_latents, sae.d_in, sae.d_out) != (config.n_latents, d_in, d_in):
        raise ConfigError(
            f"train: the SAE to start from must have n_latents={config.n_latents} on rows of width {d_in}; it has "
            f"{sae.n_latents} on {sae.d_in}. Take a part of it, or change `n_latents`."
        )
    if sae.is_transcoder:
        raise ConfigError(
            "train: the SAE to start from must reconstruct the rows that it reads; it is a transcoder, and saekit "
            "trains none."
        )
    rule = finish(learner, {}).rule
    if isinstance(sae.rule, TopKRule) and isinstance(rule, TopKRule) and sae.rule.sign != rule.sign:
        raise ConfigError(
            f"train: the SAE to start from must have codes of the sign that the configuration trains, {rule.sign!r}; "
            f"it has {sae.rule.sign!r}. Set `sign` where there is one, or take another SAE."
        )
    if type(rule) is not type(sae.rule) or {*sae.rule.tensors()} - {*rule.tensors()}:
        raise ConfigError(
            f"train: the SAE to start from must have the rule that {type(config).__name__} ends with, {rule.name}; it "
            f"has {sae.rule.name}. Train the architecture that it comes from."
        )
    if sae.W_skip is not None or sae.scaling.kind not in ("none", "scalar"):
        part = "a skip path" if sae.W_skip is not None else f"{sae.scaling.kind} scaling"
        raise ConfigError(f"train: the SAE to start from must have no more than training has; it has {part}.")


def _of_the_rule(learner: Learner, sae: SAE, values: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the parameters of the gate or the thresholds."""
    names = learner.parameters
    if not isinstance(sae.rule, JumpReLURule):
        return {}
    if "log_threshold" in names:
        return {"log_threshold": sae.rule.threshold.clamp_min(LEAST_THRESHOLD).log()}
    if "r_mag" in names:  # with r_mag = 0 the gate is the encoder: it opens where pre > b_mag - b_gate
        zeros = values["b_enc"].new_zeros(sae.n_latents)
        return {"r_mag": zeros, "b_mag": values["b_enc"], "b_enc": values["b_enc"] - sae.rule.threshold}
    return {}


def warm_starts(start: SAE | Sequence[SAE] | None, count: int) -> list[SAE]:
    """Return one SAE per learner, or none: `start` is None, one for all, or one each.

    Raises
    ------
    ConfigError
        Another number of them, or paths.
    """
    if start is None:
        return []
    saes = [start] * count if isinstance(start, SAE | str | os.PathLike) else list(start)
    wrong = next((each for each in saes if not isinstance(each, SAE)), None)
    if wrong is not None:
        raise ConfigError(f"train: `start` must be SAEs; got {wrong!r}. Load one: SAE.load(path).")
    if len(saes) != count:
        raise ConfigError(
            f"train: `start` must be one SAE, or one for each of the {count} learners; got {len(saes)}. "
            "They come configuration by configuration, seed by seed."
        )
    return saes
