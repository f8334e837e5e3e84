"""Stability and alignment of every latent, and writing them into SAEs."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from typing import Any

import numpy as np

from ..errors import ConfigError
from ..measure.results import Measured
from ..measure.weight_scores import WEIGHT_SCORES, weight_scores
from ..sae.model import SAE
from .intervals import over_saes
from .pairs import MatchedPair, Named, began_alike
from .result import Compared, Comparison


def with_stability(saes: Sequence[SAE], result: Comparison) -> list[SAE]:
    """Return the SAEs of a comparison with what it found about each latent.

    ``scores["stability"]`` is the fraction of the other SAEs that have the latent, ``scores["alignment"]`` its mean
    cosine with its partners in them (-1 where it has no partner), ``scores["alignment_self"]`` the cosine of its own
    encoder and decoder row; `Compared` defines all three. ``provenance["stability"]`` holds the mean and what it was
    compared with.

    Parameters
    ----------
    saes
        Those that were compared, in the same order.
    result
        The comparison.

    Raises
    ------
    ConfigError
        Other SAEs than those of the comparison.
    """
    if len(saes) != len(result.saes):
        raise ConfigError(f"with_stability: all {len(result.saes)} SAEs compared must be given; got {len(saes)}.")
    scored = []
    for at, (sae, compared) in enumerate(zip(saes, result.saes, strict=True)):
        if sae.digest() != compared.sae["digest"]:
            raise ConfigError(
                f"with_stability: SAE {at} must be `{compared.name}` of the comparison; its weights are others. "
                "Give the SAEs in the order in which they were compared."
            )
        about = {
            "mean": round(float(np.mean(compared.stability)), 6),
            "threshold": result.settings["threshold"],
            "strict": result.settings["strict"],
            "compared_with": [
                {"name": other.name, "seed": other.sae["provenance"].get("seed"), "digest": other.sae["digest"]}
                for index, other in enumerate(result.saes)
                if index != at
            ],
        }
        alignment = [-1.0 if value is None else value for value in compared.alignment]
        own = {name: score for name, score in weight_scores(sae).items() if name == "alignment_self"}
        scores = {"stability": compared.stability, "alignment": alignment, **own}
        scored.append(sae.with_scores(**scores).replace(provenance={**sae.provenance, "stability": about}))
    return scored


def predictors(compared: Sequence[Compared], saes: Sequence[SAE]) -> dict[str, Measured]:
    """Return how well a number of one SAE alone predicts the stability of its latents: Spearman, mean over SAEs."""
    numbers = [weight_scores(sae) | _frequency(each) for sae, each in zip(saes, compared, strict=True)]
    names = [name for name in (*WEIGHT_SCORES, "frequency") if all(name in each for each in numbers)]
    return {
        name: over_saes(
            [_spearman(own[name], each.stability) for own, each in zip(numbers, compared, strict=True)], "correlation"
        )
        for name in names
    }


def _frequency(compared: Compared) -> dict[str, Any]:
    return {"frequency": compared.frequency} if compared.frequency else {}


def _spearman(one: Any, other: Any) -> float:
    """Return the rank correlation, ties by mid-rank; NaN where either side is constant."""
    from scipy.stats import rankdata

    a, b = (rankdata(np.asarray(each)) for each in (one, other))
    a, b = a - a.mean(), b - b.mean()
    lengths = float(np.linalg.norm(a) * np.linalg.norm(b))
    return float(a @ b) / lengths if lengths > 0 else math.nan


def check_local(saes: Sequence[Any]) -> None:
    """Refuse what nothing can be written into.

    Raises
    ------
    ConfigError
        An SAE is a value or on a hub.
    """
    for sae in saes:
        if isinstance(sae, SAE) or os.fspath(sae).startswith("hf:"):
            came = "an SAE in memory" if isinstance(sae, SAE) else f"`{os.fspath(sae)}`"
            raise ConfigError(
                f"compare: `write` puts stability into the files of SAEs, which must be local folders; got {came}. "
                "Use with_stability(saes, result) for values."
            )


def local_folder(path: Any) -> str:
    """Return the folder that a path of an SAE, or of one of its two files, names."""
    text = os.fspath(path)
    return os.path.dirname(text) or "." if os.path.basename(text) in ("sae.json", "sae.safetensors") else text


def counted_others(named: Named) -> list[list[int]]:
    """Return per SAE the others that say something about it; those that began alike only where there are no others."""
    every = [[j for j in range(len(named)) if j != i] for i in range(len(named))]
    fresh = [[j for j in own if not began_alike(named[i][1], named[j][1])] for i, own in enumerate(every)]
    return [some or own for some, own in zip(fresh, every, strict=True)]


def alignment(at: int, matched: Sequence[MatchedPair], others: Sequence[int]) -> list[float | None]:
    """Return the mean cosine of each latent of one SAE with its partners in others, over decoder and encoder."""
    values = []
    for pair in matched:
        is_first = pair.first == at
        if (pair.second if is_first else pair.first) in others and at in (pair.first, pair.second):
            sides = [each.matching for each in (pair.decoder, pair.encoder)]
            values += [(side if is_first else side.inverse()).cosine.numpy() for side in sides]
    table = np.stack(values)
    known = ~np.isnan(table)
    mean = np.where(known, table, 0.0).sum(0) / np.maximum(known.sum(0), 1)
    return [round(float(value), 6) if is_known else None for value, is_known in zip(mean, known.any(0), strict=True)]
