"""A consensus SAE: the latents that several seeds agree on, pooled into one SAE of any size."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from ..errors import ConfigError, DataError
from ..measure.importance import importance
from ..rows.opening import Rows, as_source
from ..rows.source import Source
from ..sae.model import SAE
from ..sae.naming import Given, given_saes, named_saes
from ..sae.rules import GroupMaxRule, JumpReLURule, Rule, TopKRule
from ..settings import Progress, suggest_keywords
from ..training.architectures import config_from_dict
from ..training.loop import train
from ..training.settings import TrainSettings
from .result import Comparison
from .run import compare
from .settings import ComparisonSettings, ConsensusSettings

SCALE_TOLERANCE = 1e-3
"""Relative difference of the input scales of seeds that is rounding of the same rows."""

CHUNK = 256
"""Candidates that are compared with the latents chosen so far at once."""


@suggest_keywords
def consensus(
    saes: Given | Sequence[Given],
    rows: Rows | None = None,
    *,
    comparison: Comparison | None = None,
    settings: ConsensusSettings = ConsensusSettings(),
    progress: Progress | None = None,
) -> SAE:
    """Pool the latents that several seeds share into one SAE.

    Each concept group (see `Groups`) becomes one latent: the unit mean direction of its members' decoder rows, the mean
    of their encoder rows, biases and thresholds. The groups that most seeds have come first, then those of higher
    energy. What is missing to the size is filled with the other latents of highest energy that point elsewhere.

    Parameters
    ----------
    saes
        Two SAEs or more that differ in their seeds only: one hook, one rule, one scale. Values or paths.
    rows
        Rows, for energies and for the refit; not needed where all SAEs carry ``scores["energy"]`` and there is no
        refit.
    comparison
        What `compare` found about these SAEs, in this order; None: it is made here.
    settings
        The size, what is pooled, what it is filled up with, the refit.
    progress
        Called as ``progress(stage, done, total)``.

    Returns
    -------
    SAE
        An ordinary SAE. ``scores["stability"]`` is the fraction of the other parents that have the concept, for a
        parent that has it; ``scores["energy"]`` the mean over its members. ``provenance["consensus"]`` says what was
        pooled.

    Raises
    ------
    ConfigError
        SAEs that differ in more than their seeds, a size that cannot be had, nothing to pool, rows that are needed and
        missing, or a refit without a known configuration.

    Examples
    --------
    ::

        both = consensus(saes, rows, settings=ConsensusSettings(refit=200_000))
        sk.evaluate([both, *saes], heldout)
    """
    saes = given_saes(saes)
    if len(saes) < 2:
        raise ConfigError("consensus: at least two SAEs must be given; one agrees with itself.")
    named = named_saes(saes, "consensus")
    values = [sae.fold_norms() for _, sae in named]
    _check(named, settings)
    source = None if rows is None else as_source(rows, values[0].d_in, "consensus")
    if settings.refit and source is None:
        raise ConfigError("consensus: `refit` trains on rows; got none. Pass rows like the training's.")
    if comparison is None:
        compared = ComparisonSettings(threshold=settings.threshold, controls=False)
        comparison = compare([sae for _, sae in named], settings=compared)
    if [each.sae["digest"] for each in comparison.saes] != [sae.digest() for _, sae in named]:
        raise ConfigError("consensus: `comparison` must be of these SAEs, in this order; it is of others.")
    groups = comparison.groups
    if groups is None:
        raise ConfigError("consensus: `comparison` must hold concept groups; this one is of an older release.")
    energies = _energies(values, source, settings, progress)
    parts = [
        members for members, count in zip(groups.members(), groups.size, strict=True) if count >= settings.min_seeds
    ]
    pooled = [_Latent.pooled(values, members, energies) for members in parts]
    if not pooled:
        raise ConfigError(
            f"consensus: there must be a concept that {settings.min_seeds} of the SAEs have; there is none at a "
            f"cosine of {comparison.settings['threshold']}. Train longer, or lower `threshold`."
        )
    if energies is not None:
        order = sorted(range(len(pooled)), key=lambda at: (-pooled[at].count, -pooled[at].energy, at))
        pooled = [pooled[at] for at in order]
    size = settings.size or (max(sae.n_latents for sae in values) if settings.fill else len(pooled))
    chosen = pooled[:size]
    if len(chosen) < size:
        if not settings.fill:
            raise ConfigError(
                f"consensus: `size` must be at most the {len(pooled)} concepts that {settings.min_seeds} SAEs have; "
                f"got {size}. Pass fill=True to add others."
            )
        chosen += _filling(values, parts, chosen, size, settings.threshold, energies)
    sae = _assemble(named, values, chosen, len(pooled[:size]), comparison, settings.min_seeds)
    if not settings.refit:
        return sae
    assert source is not None  # seen to above
    return _refitted(named, sae, source, settings, progress)


# ---------------------------------------------------------------------------------------------------------- the call


def _check(named: list[tuple[str, SAE]], settings: ConsensusSettings) -> None:
    first, reference = named[0]
    m = len(named)
    if settings.min_seeds > m:
        raise ConfigError(f"consensus: `min_seeds` must be 2 to the number of SAEs, {m}; got {settings.min_seeds}.")
    for name, sae in named:
        same = type(sae.rule) is type(reference.rule) and sae.rule.settings() == reference.rule.settings()
        if not same or isinstance(sae.rule, GroupMaxRule):
            raise ConfigError(
                f"consensus: all SAEs must have one rule, and one without groups; `{name}` has {sae.rule!r}, `{first}` "
                f"{reference.rule!r}. Pool seeds of one configuration."
            )
        if sae.W_skip is not None:
            raise ConfigError(f"consensus: SAEs must have no skip path; `{name}` has one.")
        one, other = sae.scaling, reference.scaling
        close = one.kind == other.kind and all(
            torch.allclose(tensor, other.tensors()[key], rtol=SCALE_TOLERANCE) for key, tensor in one.tensors().items()
        )
        if not close:
            raise ConfigError(
                f"consensus: all SAEs must scale rows alike; `{name}` and `{first}` do not. Train the seeds on the "
                "same rows in one call."
            )


def _energies(
    saes: list[SAE], source: Source | None, settings: ConsensusSettings, progress: Progress | None
) -> list[np.ndarray] | None:
    """Energy of every latent, measured where there are rows, else as the SAEs say; None where neither is known."""
    if source is not None:
        return [
            importance(sae, source, max_rows=settings.max_rows, batch_rows=settings.batch_rows, progress=progress)
            .scores["weighted_energy"]
            .numpy()
            for sae in saes
        ]
    if all("energy" in sae.scores for sae in saes):
        return [sae.scores["energy"].double().numpy() for sae in saes]
    return None


# ---------------------------------------------------------------------------------------------------------- pooling


class _Latent:
    """One latent of the result."""

    def __init__(self, members: list[tuple[int, int]], tensors: dict[str, Tensor], energy: float) -> None:
        self.members, self.tensors, self.energy = members, tensors, energy

    @property
    def count(self) -> int:
        """SAEs that have it."""
        return len(self.members)

    @classmethod
    def pooled(cls, saes: list[SAE], members: list[tuple[int, int]], energies: list[np.ndarray] | None) -> _Latent:
        each = [_of(saes[sae], latent) for sae, latent in members]
        tensors = {name: torch.stack([one[name] for one in each]).mean(0) for name in each[0]}
        length = tensors["W_dec"].norm()
        tensors["W_dec"] = tensors["W_dec"] / length.clamp_min(1e-12)
        energy = 0.0 if energies is None else float(np.mean([energies[sae][latent] for sae, latent in members]))
        return cls(members, tensors, energy)


def _of(sae: SAE, latent: int) -> dict[str, Tensor]:
    """The tensors of one latent, in float64."""
    found = {name: getattr(sae, name)[latent].double().cpu() for name in ("W_enc", "b_enc", "W_dec")}
    if isinstance(sae.rule, JumpReLURule):
        found["threshold"] = sae.rule.threshold[latent].double().cpu()
    return found


def _filling(
    saes: list[SAE],
    parts: list[list[tuple[int, int]]],
    chosen: list[_Latent],
    size: int,
    threshold: float,
    energies: list[np.ndarray] | None,
) -> list[_Latent]:
    """Latents outside of the groups pooled, by energy, that point away from all taken before them."""
    if energies is None:
        raise ConfigError(
            "consensus: `fill` takes latents by energy; got no rows and SAEs without it. Pass rows, or fill=False."
        )
    taken = {member for members in parts for member in members}
    left = [
        (float(energies[sae][latent]), sae, latent)
        for sae in range(len(saes))
        for latent in range(saes[sae].n_latents)
        if (sae, latent) not in taken
    ]
    left.sort(key=lambda item: (-item[0], item[1], item[2]))
    directions = torch.stack([latent.tensors["W_dec"] for latent in chosen]).float()
    found: list[_Latent] = []
    for start in range(0, len(left), CHUNK):
        if len(chosen) + len(found) >= size:
            break
        chunk = left[start : start + CHUNK]
        rows = torch.stack([saes[sae].W_dec[latent].float().cpu() for _, sae, latent in chunk])
        rows = rows / rows.norm(dim=1, keepdim=True).clamp_min(1e-12)
        far = (rows @ directions.T).amax(1) <= threshold
        among = rows @ rows.T
        kept: list[int] = []
        for at in far.nonzero().squeeze(1).tolist():
            if len(chosen) + len(found) + len(kept) < size and (not kept or float(among[at, kept].max()) <= threshold):
                kept.append(at)
        found += [_Latent([chunk[at][1:]], _of(saes[chunk[at][1]], chunk[at][2]), chunk[at][0]) for at in kept]
        directions = torch.cat([directions, rows[kept]])
    if len(chosen) + len(found) < size:
        raise ConfigError(
            f"consensus: `size` must be at most {len(chosen) + len(found)}, the different directions of all SAEs; got "
            f"{size}. Raise `threshold`, or ask for fewer."
        )
    return found


def _assemble(
    named: list[tuple[str, SAE]],
    saes: list[SAE],
    chosen: list[_Latent],
    pooled: int,
    comparison: Comparison,
    least: int,
) -> SAE:
    first = saes[0]
    stacked = {
        name: torch.stack([latent.tensors[name] for latent in chosen]).to(first.dtype) for name in chosen[0].tensors
    }
    rule: Rule = first.rule
    if isinstance(rule, JumpReLURule):
        rule = JumpReLURule(stacked.pop("threshold"))
    elif isinstance(rule, TopKRule):
        rule = TopKRule(min(rule.k, len(chosen)))
    biases = {"b_dec": torch.stack([sae.b_dec.double().cpu() for sae in saes]).mean(0).to(first.dtype)}
    if first.b_pre is not None:
        pre = [sae.b_pre.double().cpu() for sae in saes if sae.b_pre is not None]
        biases["b_pre"] = torch.stack(pre).mean(0).to(first.dtype)
    facts = ("model", "hook", "layer", "data", "data_digest", "model_digest", "config", "context", "filters")
    provenance = {key: first.provenance[key] for key in facts if key in first.provenance}
    provenance["consensus"] = {
        "of": [
            {"name": name, "seed": sae.provenance.get("seed"), "digest": each.sae["digest"]}
            for (name, sae), each in zip(named, comparison.saes, strict=True)
        ],
        "pooled": pooled,
        "filled": len(chosen) - pooled,
        "least": least,
        "threshold": comparison.settings["threshold"],
        "refit_rows": 0,
    }
    m = len(saes)
    scores = {
        "stability": torch.tensor([(latent.count - 1) / (m - 1) for latent in chosen]),
        "energy": torch.tensor([latent.energy for latent in chosen]),
    }
    return SAE(
        **stacked,
        **biases,
        rule=rule,
        scaling=first.scaling.to("cpu", first.dtype),
        provenance=provenance,
        scores=scores,
    )


def _refitted(
    named: list[tuple[str, SAE]], sae: SAE, source: Source, settings: ConsensusSettings, progress: Progress | None
) -> SAE:
    known = named[0][1].provenance.get("config")
    if not isinstance(known, dict):
        raise ConfigError(
            f"consensus: `refit` needs the configuration that `{named[0][0]}` was trained with; its provenance has "
            "none. Pass refit=0, or train it yourself: train(config, rows, start=consensus(…))."
        )
    changes = settings.config or {}
    wanted = {**known, "latents": sae.n_latents, **changes}
    if "k" in known and "k" not in changes:
        wanted["k"] = min(known["k"], sae.n_latents)
    if known.get("sizes") is not None:
        wanted["sizes"] = None
    refit, batch_rows = settings.refit, settings.batch_rows
    if refit < batch_rows:
        raise DataError(f"consensus: `refit` must be at least one batch of {batch_rows} rows; got {refit}.")

    def tell(stage: str, done: int, total: int | None = None, note: str = "") -> None:
        if progress is not None:
            progress("refit", done, total)

    [fitted] = train(
        config_from_dict(wanted),
        source,
        seeds=settings.seed,
        tokens=refit,
        start=sae,
        settings=TrainSettings(batch_rows=batch_rows, data_seed=settings.seed),
        progress=tell,
    )
    about = {**sae.provenance["consensus"], "refit_rows": fitted.provenance["rows_seen"]}
    kept = {key: value for key, value in fitted.provenance.items() if key not in ("seed", "start")}
    return fitted.replace(provenance={**sae.provenance, **kept, "consensus": about}, scores=sae.scores)
