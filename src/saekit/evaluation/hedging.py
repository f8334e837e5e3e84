"""Hedging: whether latents carry parts of features that an SAE is too narrow to hold apart (2505.11756).

Where features fire together and one of them has no latent, the latents of the others learn a part of it. Given more
latents, they let go of it. So the SAE is trained on twice from where it is, on the same rows in the same order: as it
is, and with m new latents. With d_j and d'_j its decoder rows afterwards, at length 1, and P the projection onto the
span of the new latents' decoder rows::

    moved  = mean_j |P (d'_j - d_j)|
    chance = the same with P the projection onto m Gaussian vectors, mean of 50 draws
    degree = max(0, (moved - chance) / (1 - chance))

The new latents begin at random directions, encoder and decoder alike, with the mean bias or threshold of the others. m
is 64 there; here at most an eighth of the width of the rows, since 64 vectors can span all of it.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..errors import ConfigError
from ..measure.intervals import measured_mean
from ..measure.results import Measured
from ..randomness import hashed_key
from ..rows.source import Source
from ..sae.model import SAE
from ..sae.rules import JumpReLURule, Rule, TopKRule
from ..settings import silent
from ..training.architectures import config_from_dict
from ..training.config import Config, Matryoshka, TopK, matryoshka_sizes
from ..training.initialization import unit_rows
from ..training.loop import train
from ..training.request import STARTED

HEDGING = {
    "degree": "hedging degree: how far decoder rows turn towards those of new latents when both are trained on, beyond "
    "chance; 0 for no hedging, and at most 1",
    "moved": "length of the part of that change which lies in the span of the new latents' decoder rows, mean over "
    "latents",
    "chance": "the same for random directions, mean of 50 draws",
}
"""What is measured, by name."""

NEW_LATENTS, WIDTH_PART, DRAWS = 64, 8, 50
"""Maximum number of new latents, width of the rows for each of them, and draws of random directions."""


def hedging_config(sae: SAE) -> Config:
    """Return the configuration with which an SAE is trained on; raises `ConfigError` where there is none."""
    known = sae.provenance.get("config")
    if sae.is_transcoder or sae.provenance.get("parts"):
        raise ConfigError("evaluate: `hedging_rows` is for SAEs of one place; got a transcoder or crosscoder.")
    if known is None and isinstance(sae.rule, TopKRule):
        return TopK(sae.n_latents, k=sae.rule.k, sign=sae.rule.sign)
    if known is None:
        raise ConfigError(
            "evaluate: `hedging_rows` trains the SAE on, and this one does not say how it was trained. Leave it out."
        )
    config = config_from_dict(known)
    if config.control is not None or config.mutual or config.n_latents != sae.n_latents:
        raise ConfigError(
            "evaluate: `hedging_rows` trains a whole SAE on by itself; this one is a control, one of several that "
            "were tied together, or a part of another. Leave it out."
        )
    once: dict[str, Any] = dict.fromkeys((*STARTED, "k_start", "k_fraction", "lr", "warmup_steps", "dead_after_rows"))
    known_names = {name: getattr(type(config), name) for name in once if hasattr(config, name)}
    if isinstance(config, Matryoshka) and not config.sampled:
        known_names["sizes"] = matryoshka_sizes(config)
    return replace(config, **known_names)


def hedging(sae: SAE, rows: Source, n_rows: int, seed: int = 0) -> dict[str, Measured]:
    """Return how much an SAE hedges, by the names of `HEDGING`.

    Parameters
    ----------
    sae
        An SAE that saekit trained, or any whose rule is TopK.
    rows
        Rows to train it on with, at the default learning rate.
    n_rows
        How many; in the paper half as many as it was trained on.
    seed
        Random seed of the new latents and directions.
    """
    config = hedging_config(sae)
    stream = torch.Generator().manual_seed(hashed_key("hedging", seed, n_bytes=7))
    new = max(1, min(NEW_LATENTS, sae.d_in // WIDTH_PART))
    more: dict[str, Any] = {"n_latents": sae.n_latents + new}
    if isinstance(config, Matryoshka) and config.sizes is not None:
        more["sizes"] = (*config.sizes[:-1], sae.n_latents + new)
    plain, wide = train(
        [config, replace(config, **more)], rows, tokens=n_rows, start=[sae, _widened(sae, new, stream)], progress=silent
    )
    before, after = unit_rows(plain.W_dec.cpu().double()), unit_rows(wide.W_dec.cpu().double())
    change, added = after[: sae.n_latents] - before, after[sae.n_latents :]
    moved = _within(change, added)
    draws = [_within(change, torch.randn(added.shape, generator=stream, dtype=torch.float64)) for _ in range(DRAWS)]
    chance = float(torch.stack(draws).mean())
    degree = measured_mean(((moved - chance) / (1 - chance)).numpy(), "fraction", least=0.0, most=1.0)
    return {
        "degree": replace(degree, value=max(degree.value, 0.0)),
        "moved": measured_mean(moved.numpy(), "fraction", least=0.0),
        "chance": Measured(chance, None, None, "fraction", f"no interval: the mean of {DRAWS} random draws"),
    }


def _within(rows: Tensor, span: Tensor) -> Tensor:
    """Return the length of the part of each row ``[n, d]`` that lies in the span of others ``[m, d]``, ``[n]``."""
    u, sizes, _ = torch.linalg.svd(span.T, full_matrices=False)
    basis = u[:, sizes > sizes[0] * 1e-9]
    return (rows @ basis).norm(dim=1)


def _widened(sae: SAE, new: int, stream: torch.Generator) -> SAE:
    """Return the SAE with more latents behind its own."""
    sae = sae.fold_norms()
    rows = unit_rows(torch.randn(new, sae.d_in, generator=stream)).to(sae.W_dec)

    def longer(values: Tensor) -> Tensor:
        return torch.cat([values, values.mean().expand(new)])

    rule: Rule = sae.rule
    if isinstance(rule, JumpReLURule):
        rule = JumpReLURule(longer(rule.threshold))
    elif isinstance(rule, TopKRule):
        rule = TopKRule(rule.k, sign=rule.sign)  # by code times length, as training goes on with
    return sae.replace(
        W_enc=torch.cat([sae.W_enc, rows]), W_dec=torch.cat([sae.W_dec, rows]), b_enc=longer(sae.b_enc), rule=rule,
        scores={},
    )  # fmt: skip
