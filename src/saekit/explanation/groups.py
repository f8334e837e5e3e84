"""Scores by group of latents: shared by other seeds or not, ring of size, selected by a classifier, architecture.

The groups are read off results: a comparison says which latents other seeds have, a pruned SAE which sizes it was cut
at, a classifier which latents it weighs, and the explanation of another SAE what that one's latents score.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import ConfigError
from ..files import check_path, read_json
from ..measure.results import Measured
from ..sae.model import SAE
from ..sae.naming import name_of, name_of_config
from .explanation_result import Group
from .nulls import MEANINGS, Scored, mean_over_latents

HALF = 0.5
"""A latent is shared where at least this part of the other SAEs have it."""

KINDS = ("comparison", "size_curve", "classification", "explanation")
"""Results that give groups."""

By = dict[str, dict[str, np.ndarray]]
"""What groups differ in, their names, and which latents they have (``bool [n_latents]``)."""


def groups_of(sae: SAE, results: Sequence[str | os.PathLike[str]]) -> By:
    """Return the groups that results, or folders of results, give of the latents of an SAE.

    Raises
    ------
    ConfigError
        There is no such file, or it says nothing about groups of this SAE.
    """
    found: By = _of_file(sae)
    for path in results:
        read = list(_read(check_path(path)))
        mine = dict(each for plain in read for each in _of_result(sae, plain).items())
        if not mine and not any(_is_of_another(sae, plain) for plain in read):
            raise ConfigError(
                f"explain: `{path}` must hold a result about this SAE ({', '.join(KINDS[:-1])}), or the explanation of "
                "another; it holds none. Compare, prune or classify with the SAE first, or give another file."
            )
        found |= mine
    return found


def _read(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the results in a file, or in a folder and one level below."""
    if not path.exists():
        raise ConfigError(f"explain: `groups` must be files or folders of results; `{path}` does not exist.")
    files = [path] if path.is_file() else [*sorted(path.glob("*.json")), *sorted(path.glob("*/*.json"))]
    for file in files:
        plain = read_json(file)
        if isinstance(plain, dict) and plain.get("kind") in KINDS:
            yield plain


def _of_file(sae: SAE) -> By:
    """Return the rings of the sizes that the SAE's own file states."""
    sizes = sae.provenance.get("sizes")
    points = sizes.get("points") if isinstance(sizes, dict) else None
    return _rings(sae.n_latents, [each.get("latents") for each in points if isinstance(each, dict)]) if points else {}


def _rings(n: int, sizes: Sequence[Any]) -> By:
    """Return what each size adds to the one before."""
    ends = sorted({size for size in sizes if isinstance(size, int) and 0 < size <= n} | {n})
    index = np.arange(n)
    rings = {f"{a + 1:,}–{b:,}": (index >= a) & (index < b) for a, b in zip([0, *ends[:-1]], ends, strict=True)}
    return {"size": rings} if len(rings) > 1 else {}


def _of_result(sae: SAE, plain: Mapping[str, Any]) -> By:
    digest = sae.digest()
    if plain["kind"] == "comparison":
        return _shared(plain, digest)
    if plain["kind"] == "size_curve" and plain.get("sae", {}).get("digest") == digest:
        return _rings(sae.n_latents, [point["size"] for point in plain["points"]])
    if plain["kind"] == "classification":
        return _selected(sae, plain, digest)
    return {}


def _shared(plain: Mapping[str, Any], digest: str) -> By:
    """Return which latents other SAEs of a comparison have."""
    for one in plain["saes"]:
        if one["sae"].get("digest") == digest:
            stability = np.array(one["stability"], float)
            return {"sharing": {"shared": stability >= HALF, "orphan": stability < HALF}}
    return {}


def _selected(sae: SAE, plain: Mapping[str, Any], digest: str) -> By:
    """Return which latents the arms of a classification with few columns selected."""
    names = {each.get("name") for each in plain["saes"] if each.get("digest") == digest}
    mask = np.zeros(sae.n_latents, bool)
    for arm in plain["arms"]:
        if arm["source"] in names and 0 < len(arm["selected"]) < sae.n_latents:
            mask[[latent for latent in arm["selected"] if 0 <= latent < sae.n_latents]] = True
    return {"selection": {"selected": mask, "not selected": ~mask}} if mask.any() else {}


def _is_of_another(sae: SAE, plain: Mapping[str, Any]) -> bool:
    return plain["kind"] == "explanation" and plain["sae"].get("digest") != sae.digest()


def other_explanations(
    sae: SAE, place: Mapping[str, Any], results: Sequence[str | os.PathLike[str]]
) -> list[dict[str, Any]]:
    """Return the explanations of other SAEs among files and folders of results, as plain JSON.

    Parameters
    ----------
    sae
        The SAE that is explained.
    place
        What must be the same for scores to be compared; see `place_of_explanation`.
    results
        Files and folders.

    Raises
    ------
    ConfigError
        An explanation is of another model, other texts, another hook, or was made with other settings.
    """
    others = [plain for path in results for plain in _read(check_path(path)) if _is_of_another(sae, plain)]
    for plain in others:
        other = place_of_explanation(plain)
        wrong = next((name for name, value in place.items() if value != other[name]), None)
        if wrong is not None:
            raise ConfigError(
                f"explain: explanations in `groups` must be of the same texts, read alike; that of {_name(plain)} has "
                f"another {wrong}: {other[wrong]}, not {place[wrong]}. Explain that SAE again."
            )
    return others


def scores_of_others(sae: SAE, mine: Scored, others: Sequence[Mapping[str, Any]]) -> list[Group]:
    """Return the scores of an SAE and of others, as a group of an architecture each; none without others."""
    if not others:
        return []
    everything = scores_by_group(mine, {"architecture": {name_of(sae): np.ones(sae.n_latents, bool)}})
    return everything + [_of_another(plain) for plain in others]


def place_of_explanation(plain: Mapping[str, Any]) -> dict[str, Any]:
    """Return what decides the scores of an explanation, other than its SAE, by name."""
    how = {name: plain["settings"].get(name) for name in ("tokens", "context", "window", "label_tokens", "seed")}
    model, texts = plain["model"].get("model_digest"), plain["data"].get("digest")
    return {"model": model, "digest of the texts": texts, "hook": plain["hook"], **how}


def _of_another(plain: Mapping[str, Any]) -> Group:
    scores = {each["name"]: Measured.from_json(each["value"]) for each in plain["scores"]}
    fire = round(plain["fired_fraction"] * plain["sae"]["n_latents"])
    return Group("architecture", _name(plain), fire, {name: scores[name] for name in MEANINGS if name in scores})


def _name(plain: Mapping[str, Any]) -> str:
    """Return what tables call the SAE of an explanation, as `name_of` does."""
    sae = plain["sae"]
    known = sae["provenance"]
    config = {"arch": sae["rule"]["name"], **sae["rule"], **(known.get("config") or {})}
    return name_of_config(config, sae["n_latents"]) + (f"-seed{known['seed']}" if known.get("seed") is not None else "")


def scores_by_group(scored: Scored, groups: By) -> list[Group]:
    """Return the mean of every score over the latents of each group that fire."""
    found = []
    for by, named in groups.items():
        for name, mask in named.items():
            mine = mask & (scored.count > 0)
            scores = {
                score: mean_over_latents(value[mine], MEANINGS[score][0]) for score, value in scored.scores.items()
            }
            found.append(Group(by, name, int(mine.sum()), scores))
    return found
