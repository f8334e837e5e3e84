"""A consensus SAE: the latents that several seeds agree on, pooled into one SAE of any size."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import ConfigError, DataError
from ..measure.importance import importance
from ..places import RECORDED, Warned, warn, warnings_between
from ..progress import shows_progress
from ..rows.opening import Rows, as_source, warnings_on_rows
from ..rows.source import Source
from ..sae.model import SAE
from ..sae.naming import Given, given_saes, named_saes
from ..sae.rules import GroupMaxRule, JumpReLURule, Rule, TopKRule
from ..settings import Progress, suggest_keywords
from ..training.architectures import config_from_dict
from ..training.loop import train
from ..training.settings import TrainSettings
from .pairs import Named
from .result import Comparison
from .run import compare
from .settings import ComparisonSettings, ConsensusSettings

SCALE_TOLERANCE = 1e-3
"""Relative difference of the input scales of seeds that is rounding of the same rows."""

INHERITED = (*RECORDED, "data_digest", "row_variance", "config")
"""What the provenance takes over from the first parent."""

CHUNK = 256
"""Candidates that are compared with the latents chosen so far at once."""


@suggest_keywords
@shows_progress
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
        Called as ``progress(stage, done, total)`` [shown on stderr; ``False``: none].

    Returns
    -------
    SAE
        An ordinary SAE. ``scores["stability"]`` is the fraction of the other parents that have the concept, for a
        parent that has it; ``scores["energy"]`` the mean over its members. ``provenance["consensus"]`` says what was
        pooled.

    Raises
    ------
    ConfigError
        SAEs that differ in more than their seeds, a size that is not available, nothing to pool, rows that are needed
        and missing, or a refit without a known configuration.

    Examples
    --------
    ::

        both = consensus(saes, rows, settings=ConsensusSettings(refit=200_000))
        sk.evaluate([both, *saes], heldout)
    """
    saes = given_saes(saes)
    if len(saes) < 2:
        raise ConfigError("consensus: at least two SAEs must be given; one agrees with itself.")
    if settings.refit and rows is None:
        raise ConfigError("consensus: `refit` trains on rows; got none. Pass rows like the training's.")
    named = named_saes(saes, "consensus")
    _check(named, settings)
    values = [sae.fold_norms() for _, sae in named]
    source = None if rows is None else as_source(rows, values[0].d_in, "consensus")
    comparison = _compared(named, comparison, settings)
    energies = _energies(values, source, settings, progress)
    pooled = _pooled(values, comparison, energies, settings)
    size = settings.size or (max(sae.n_latents for sae in values) if settings.fill else len(pooled))
    chosen = pooled[:size]
    if len(chosen) < size:
        chosen += _filling(values, pooled, size - len(chosen), energies, settings)
    told = warnings_between(named) + ([] if source is None else warnings_on_rows(named, source))
    warn(told)
    sae = _assemble(values, chosen, _facts(named, comparison, chosen, settings, told))
    if source is None or not settings.refit:
        return sae
    return _refitted(named, sae, source, settings, progress)


# ---------------------------------------------------------------------------------------------------------- the call


def _check(named: Named, settings: ConsensusSettings) -> None:
    if settings.min_seeds > len(named):
        raise ConfigError(
            f"consensus: `min_seeds` must be 2 to the number of SAEs, {len(named)}; got {settings.min_seeds}."
        )
    for each in named:
        _check_alike(named[0], each)


def _check_alike(reference: tuple[str, SAE], other: tuple[str, SAE]) -> None:
    """Refuse an SAE that differs from the first in more than its seed, or whose latents cannot be pooled."""
    (first, one), (name, sae) = reference, other
    same = type(sae.rule) is type(one.rule) and sae.rule.settings() == one.rule.settings()
    if not same or isinstance(sae.rule, GroupMaxRule):
        raise ConfigError(
            f"consensus: all SAEs must have one rule, and one without groups; `{name}` has {sae.rule!r}, `{first}` "
            f"{one.rule!r}. Pool seeds of one configuration."
        )
    if sae.W_skip is not None or sae.is_transcoder:
        what = "be SAEs" if sae.is_transcoder else "have no skip path"
        raise ConfigError(
            f"consensus: all must {what}; `{name}` {'is a transcoder' if sae.is_transcoder else 'has one'}: what is "
            "pooled is trained on to reconstruct the rows that it reads."
        )
    if isinstance(sae.rule, TopKRule) and sae.rule.threshold is not None:
        raise ConfigError(f"consensus: TopK must have no thresholds besides k; `{name}` has them.")
    if isinstance(sae.rule, TopKRule) and sae.rule.sign == "magnitude":
        raise ConfigError(
            f"consensus: codes must not be signed by magnitude, as those of `{name}` are: a latent and its negative "
            "are the same there, and means of decoder rows would cancel."
        )
    scales = one.scaling.tensors()
    close = sae.scaling.kind == one.scaling.kind and all(
        torch.allclose(tensor, scales[key], rtol=SCALE_TOLERANCE) for key, tensor in sae.scaling.tensors().items()
    )
    if not close:
        raise ConfigError(
            f"consensus: all SAEs must scale rows alike; `{name}` and `{first}` do not. Train the seeds on the "
            "same rows in one call."
        )


def _compared(named: Named, comparison: Comparison | None, settings: ConsensusSettings) -> Comparison:
    """Return the comparison of the SAEs, made where it is not given, with its concept groups."""
    if comparison is None:
        compared = ComparisonSettings(threshold=settings.threshold, controls=False)
        comparison = compare([sae for _, sae in named], settings=compared)
    if [each.sae["digest"] for each in comparison.saes] != [sae.digest() for _, sae in named]:
        raise ConfigError("consensus: `comparison` must be of these SAEs, in this order; it is of others.")
    if comparison.groups is None:
        raise ConfigError("consensus: `comparison` must hold concept groups; this one is of an older release.")
    return comparison


def _energies(
    saes: list[SAE], source: Source | None, settings: ConsensusSettings, progress: Progress | None
) -> list[np.ndarray] | None:
    """Energy of every latent, measured where there are rows, else as the SAEs say; None where neither is known."""
    if source is not None:
        each = (
            importance(sae, source, max_rows=settings.max_rows, batch_rows=settings.batch_rows, progress=progress)
            for sae in saes
        )
        return [found.scores["weighted_energy"].numpy() for found in each]
    if all("energy" in sae.scores for sae in saes):
        return [sae.scores["energy"].double().numpy() for sae in saes]
    return None


# ---------------------------------------------------------------------------------------------------------- pooling


@dataclass(frozen=True)
class _Latent:
    """One latent of the result."""

    members: list[tuple[int, int]]
    """SAE and latent that it comes from."""
    tensors: dict[str, Tensor]
    energy: float

    @property
    def count(self) -> int:
        """SAEs that have it."""
        return len(self.members)

    @classmethod
    def mean_of(cls, saes: list[SAE], members: list[tuple[int, int]], energies: list[np.ndarray] | None) -> _Latent:
        """Return the unit mean direction of some latents, with the mean of everything else."""
        each = [_tensors_of(saes[sae], latent) for sae, latent in members]
        tensors = {name: torch.stack([one[name] for one in each]).mean(0) for name in each[0]}
        length = tensors["W_dec"].norm()
        tensors["W_dec"] = tensors["W_dec"] / length.clamp_min(1e-12)
        energy = 0.0 if energies is None else float(np.mean([energies[sae][latent] for sae, latent in members]))
        return cls(members, tensors, energy)


def _tensors_of(sae: SAE, latent: int) -> dict[str, Tensor]:
    """Return the tensors of one latent, in float64."""
    found = {name: getattr(sae, name)[latent].double().cpu() for name in ("W_enc", "b_enc", "W_dec")}
    if isinstance(sae.rule, JumpReLURule):
        found["threshold"] = sae.rule.threshold[latent].double().cpu()
    return found


def _pooled(
    saes: list[SAE], comparison: Comparison, energies: list[np.ndarray] | None, settings: ConsensusSettings
) -> list[_Latent]:
    """Return a latent for every concept that enough seeds have, in order of seeds, then of energy."""
    groups = comparison.groups
    assert groups is not None  # seen to in _compared
    enough = [
        members for members, count in zip(groups.members(), groups.size, strict=True) if count >= settings.min_seeds
    ]
    pooled = [_Latent.mean_of(saes, members, energies) for members in enough]
    if not pooled:
        raise ConfigError(
            f"consensus: there must be a concept that {settings.min_seeds} of the SAEs have; there is none at a "
            f"cosine of {comparison.settings['threshold']}. Train longer, or lower `threshold`."
        )
    if energies is None:
        return pooled
    order = sorted(range(len(pooled)), key=lambda at: (-pooled[at].count, -pooled[at].energy, at))
    return [pooled[at] for at in order]


def _filling(
    saes: list[SAE],
    pooled: list[_Latent],
    missing: int,
    energies: list[np.ndarray] | None,
    settings: ConsensusSettings,
) -> list[_Latent]:
    """Latents outside of the concepts pooled, by energy, that point away from all taken before them."""
    if not settings.fill:
        raise ConfigError(
            f"consensus: `size` must be at most the {len(pooled)} concepts that {settings.min_seeds} SAEs have; "
            f"got {settings.size}. Pass fill=True to add others."
        )
    if energies is None:
        raise ConfigError(
            "consensus: `fill` takes latents by energy; got no rows and SAEs without it. Pass rows, or fill=False."
        )
    left = _others(pooled, energies)
    directions = torch.stack([latent.tensors["W_dec"] for latent in pooled]).float()
    found: list[_Latent] = []
    for start in range(0, len(left), CHUNK):
        if len(found) >= missing:
            break
        chunk = left[start : start + CHUNK]
        rows = torch.stack([saes[sae].W_dec[latent].float().cpu() for _, sae, latent in chunk])
        rows = rows / rows.norm(dim=1, keepdim=True).clamp_min(1e-12)
        kept = _apart(rows, directions, settings.threshold, missing - len(found))
        for at in kept:
            energy, sae, latent = chunk[at]
            found.append(_Latent([(sae, latent)], _tensors_of(saes[sae], latent), energy))
        directions = torch.cat([directions, rows[kept]])
    if len(found) < missing:
        largest = len(pooled) + len(found)
        raise ConfigError(
            f"consensus: `size` must be at most {largest}, the different directions of all SAEs; got "
            f"{len(pooled) + missing}. Raise `threshold`, or ask for fewer."
        )
    return found


def _others(pooled: list[_Latent], energies: list[np.ndarray]) -> list[tuple[float, int, int]]:
    """Energy, SAE and latent of all that are not pooled, in order of energy."""
    taken = {member for latent in pooled for member in latent.members}
    every = ((float(energy), sae, latent) for sae, own in enumerate(energies) for latent, energy in enumerate(own))
    return sorted((each for each in every if each[1:] not in taken), key=lambda each: (-each[0], *each[1:]))


def _apart(rows: Tensor, directions: Tensor, threshold: float, most: int) -> list[int]:
    """Return the indices of the first `most` rows that point away from the directions and from each other."""
    far = (rows @ directions.T).amax(1) <= threshold
    among = rows @ rows.T
    kept: list[int] = []
    for at in far.nonzero().squeeze(1).tolist():
        if len(kept) < most and (not kept or float(among[at, kept].max()) <= threshold):
            kept.append(at)
    return kept


def _facts(
    named: Named, comparison: Comparison, chosen: list[_Latent], settings: ConsensusSettings, told: list[Warned]
) -> dict[str, Any]:
    """Return what the provenance says about the pooling."""
    pooled = sum(latent.count >= settings.min_seeds for latent in chosen)
    return {
        "of": [
            {"name": name, "seed": sae.provenance.get("seed"), "digest": each.sae["digest"]}
            for (name, sae), each in zip(named, comparison.saes, strict=True)
        ],
        "pooled": pooled,
        "filled": len(chosen) - pooled,
        "least": settings.min_seeds,
        "threshold": comparison.settings["threshold"],
        "refit_rows": 0,
        **({"warnings": [each.to_json() for each in told]} if told else {}),
    }


def _assemble(saes: list[SAE], chosen: list[_Latent], facts: dict[str, Any]) -> SAE:
    """Return the SAE of the latents chosen, with the mean biases of the parents."""
    first = saes[0]
    stacked = {
        name: torch.stack([latent.tensors[name] for latent in chosen]).to(first.dtype) for name in chosen[0].tensors
    }
    rule: Rule = first.rule
    if "threshold" in stacked:
        rule = JumpReLURule(stacked.pop("threshold"))
    elif isinstance(rule, TopKRule):
        rule = TopKRule(min(rule.k, len(chosen)), sign=rule.sign)
    biases = {"b_dec": _mean_bias([sae.b_dec for sae in saes], first.dtype)}
    if first.b_pre is not None:
        biases["b_pre"] = _mean_bias([sae.b_pre for sae in saes if sae.b_pre is not None], first.dtype)
    provenance = {key: first.provenance[key] for key in INHERITED if key in first.provenance}
    scores = {
        "stability": torch.tensor([(latent.count - 1) / (len(saes) - 1) for latent in chosen]),
        "energy": torch.tensor([latent.energy for latent in chosen]),
    }
    return SAE(
        **stacked,
        **biases,
        rule=rule,
        scaling=first.scaling.to("cpu", first.dtype),
        provenance={**provenance, "consensus": facts},
        scores=scores,
    )


def _mean_bias(biases: list[Tensor], dtype: torch.dtype) -> Tensor:
    return torch.stack([bias.double().cpu() for bias in biases]).mean(0).to(dtype)


def _refitted(named: Named, sae: SAE, source: Source, settings: ConsensusSettings, progress: Progress | None) -> SAE:
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
