"""A classifier that learned on the latents of one SAE reads those of another, put into its order by matching."""

from __future__ import annotations

import itertools
import os
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from ..errors import ConfigError, ShapeError, listed
from ..inputs.images import Images
from ..inputs.labelled import read_labelled
from ..inputs.settings import Split
from ..matching.matching import Matching as Matched
from ..matching.matching import match_latents
from ..matching.shared import have_signs
from ..models.language import LanguageModel
from ..models.pretrained import find_model
from ..places import Warned
from ..progress import shows_progress
from ..provenance import place_of
from ..randomness import random_order
from ..rows.pooling import Ask
from ..sae.model import SAE
from ..sae.naming import check_same_target, named_saes
from ..settings import Progress, silent, suggest_keywords
from .arms import Arm, dense_pools
from .cells import transfer_of
from .features import Named, Reader, View, check_widths, warnings_at
from .plan import check_inner, checked_pools, kinds_of, make_plan, reader_of
from .settings import FEATURE_KINDS, POOLS, ClassifierSettings, Matching
from .stored_fits import run_jobs
from .transfer import facts_of, saved
from .transfer_result import Transfer
from .verdicts import judge

LINEAR_POOLS = ("sum", "mean", "last", "first")
"""Poolings that turn round with the codes that they are of."""

PROFILE_ROWS = 4096
"""Maximum number of documents that latents are correlated over when they are matched by documents."""

TextModel = str | os.PathLike[str] | LanguageModel


@suggest_keywords
@shows_progress
def transfer_features(
    saes: Sequence[SAE | str | os.PathLike[str]],
    *,
    model: TextModel | Sequence[TextModel],
    data: Any,
    matching: Matching = Matching(),
    split: Split = Split(),
    settings: ClassifierSettings = ClassifierSettings(),
    out: str | os.PathLike[str] | None = None,
    progress: Progress | None = None,
) -> Transfer:
    """Train a classifier on the latents of one SAE and let it read those of another, put into its order by matching.

    Each latent of the first gets the column of its partner in the second; one without a partner gets zeros. Where codes
    have signs, a latent and its negative are the same, and a partner that points the other way is turned round. The
    diagonal is every SAE with itself. Control: the same classifier with the other's latents in random order. Baseline:
    dense states through the same protocol (for SAEs of one hook the rows are the same, so nothing can be lost).

    Parameters
    ----------
    saes
        Two SAEs or more.
    model
        The language model of the SAEs, or one for each SAE.
    data
        Labelled texts, as `read_texts` takes them.
    matching
        How latents are matched.
    split, settings, out, progress
        See `transfer`; kinds of arms are some of `saekit.classification.settings.FEATURE_KINDS`, under one pooling.

    Returns
    -------
    Transfer
        With ``across="sae"``; ``values[i].about["matched"]`` tells, for each other SAE, the mean cosine of the pairs
        and how many there are.

    Raises
    ------
    ConfigError, DataError
        As `transfer`; fewer than two SAEs; codes with signs under a pooling that does not turn round with them.
    ShapeError
        Decoder rows of different widths: match by documents.
    """
    how, tell = settings, progress or silent
    named, models = _checked(saes, model, data, matching)
    kinds, pool = kinds_of(how, FEATURE_KINDS, False, True, FEATURE_KINDS), _only_pool(how, named)
    labelled = read_labelled(data, split=split)
    check_inner(labelled, how.budget, *(train for train, _ in labelled.parts))
    readers = {id(each): reader_of(each, labelled, how, out) for each in models}
    sides = [
        _Side(
            name, sae, place_of(sae, layer=how.layer, hook=how.hook, where="transfer", name=f"`{name}`"), readers[id(m)]
        )
        for (name, sae), m in zip(named, models)
    ]
    pooled = _pooled(sides, pool, "dense" in kinds, tell)
    partners = match_all(named, [each["codes"] for each in pooled], labelled.parts[0][0], matching, pool)
    is_lost = len({each["dense"].shape[1] for each in pooled if "dense" in each}) > 1
    notes = ["no dense arm: the hidden states of the models differ in width"] * is_lost
    arms = _arms(sides, pool, {*kinds} - {"dense"} if is_lost else kinds)
    said = {"arms": list(kinds), "pools": [pool], "dense_pools": list(dense_pools([pool])), **_said(sides, matching)}
    plan = make_plan(sides[0].reader, arms, {}, split=split, how=how, said=said, across="sae", out=out)
    view = _view(pooled, partners, split.seed, len(labelled))
    fits = run_jobs(plan, lambda arms, _: view, tell)
    result = transfer_of(judge(plan, fits, tell), facts_of(named), notes=notes, about=_about(sides, partners))
    return saved(replace(result, warnings=[*result.warnings, *_place_warnings(sides)]), out)


def _place_warnings(sides: Sequence[_Side]) -> list[Warned]:
    """Return what is not as in training about the rows that each model makes for its SAE."""
    told = [warnings_at(side.reader, side.hook, [(side.name, side.sae)]) for side in sides]
    return list(dict.fromkeys(itertools.chain(*told)))


def _checked(saes: Any, model: Any, data: Any, matching: Matching) -> tuple[Named, list[Any]]:
    """Return the SAEs with their names, and the model of each."""
    if isinstance(saes, SAE | str | os.PathLike) or len(saes) < 2:
        raise ConfigError("transfer: at least two SAEs must be given; got one. Name the other (--to).")
    named = named_saes(saes, "transfer")
    models = list(model) if isinstance(model, list | tuple) else [model] * len(named)
    if len(models) != len(named):
        raise ConfigError(
            f"transfer: `model` must be one model, or one for each of the {len(named)} SAEs; got {len(models)}."
        )
    if matching.by == "decoder":
        _check_decoders(named)
    for name in [each for each in models if isinstance(each, str | os.PathLike)]:
        find_model(name)  # of the second SAE too, before the first model reads everything
    if isinstance(data, Images):
        raise ConfigError("features are transferred between SAEs on texts; got images. Use `transfer` for them.")
    return named, models


def _check_decoders(named: Named) -> None:
    """Refuse SAEs whose decoders cannot be compared: those that write rows of other widths, or other rows."""
    if len({each.d_out for _, each in named}) > 1:
        raise ShapeError(
            f"SAEs matched by their decoders must write rows of one width; they write {[s.d_out for _, s in named]}. "
            "Match them by documents (by='documents')."
        )
    for name, sae in named:
        check_same_target(name, sae, named[0][1], "transfer")


def _only_pool(how: ClassifierSettings, named: Named) -> str:
    pool, *more = checked_pools(how, POOLS[:1])
    if more:
        raise ConfigError(f"transfer: `pools` must name one pooling between SAEs; got {list(how.pools or ())}.")
    if pool not in (*LINEAR_POOLS, "count") and sum(sae.has_signs for _, sae in named) > 1:
        raise ConfigError(
            f"transfer: `pools` must be one of {listed(LINEAR_POOLS)} or `count` where codes have signs; got `{pool}`, "
            "which depends on the way round that a latent points, and that is chance."
        )
    return pool


@dataclass(frozen=True, eq=False)
class _Side:
    """One of the SAEs, and what reads its texts."""

    name: str
    sae: SAE
    hook: str
    reader: Reader


def _said(sides: Sequence[_Side], matching: Matching) -> dict[str, Any]:
    """Return what the result says about the SAEs."""
    first, second = sides[0].reader.facts, sides[1].reader.facts
    return {
        "hooks": [side.hook for side in sides], "values": [side.name for side in sides],
        "matched_by": matching.by, "threshold": matching.threshold,
        "to_model": {**second, "model": second["name"]} if second != first else None,
        "saes": [side.sae.digest() for side in sides],
    }  # fmt: skip


def _about(sides: Sequence[_Side], partners: Sequence[Mapping[int, Pairing]]) -> list[dict[str, Any]]:
    """Return what is known of each SAE, with how near its latents are to those of the others."""
    return [
        {
            "model": side.reader.facts["name"], "hook": side.hook,
            "matched": {sides[j].name: pair.about for j, pair in row.items()},
        }
        for side, row in zip(sides, partners)
    ]  # fmt: skip


def _arms(sides: Sequence[_Side], pool: str, kinds: Collection[str]) -> list[Arm]:
    names = " | ".join(side.name for side in sides)
    dense = dense_pools([pool])[0]
    arms = [
        Arm("majority", "majority", features="none", probe="majority"),
        Arm(f"dense {dense}", "dense", features="dense", source="dense", pool=dense),
        Arm(f"random {pool}", "random", features="random", source=names, pool=pool),
        Arm(f"SAE {pool} binarized", "binarized", features="codes", steps=("binarize",), source=names, pool=pool),
        Arm(f"SAE {pool}", "full", features="codes", source=names, pool=pool),
    ]
    return [arm for arm in arms if arm.kind in kinds]


def _pooled(sides: Sequence[_Side], pool: str, with_dense: bool, progress: Progress) -> list[dict[str, Any]]:
    """For each SAE its codes and, where they are wanted, the hidden states; one pass of each model."""
    dense = dense_pools([pool])[0] if with_dense else None
    asks = {(side, what): ask for side in sides for what, ask in _asks(side, pool, dense)}
    found: dict[_Side, dict[str, Any]] = {side: {} for side in sides}
    for reader in dict.fromkeys(side.reader for side in sides):
        mine = {key: ask for key, ask in asks.items() if key[0].reader is reader}
        check_widths([(side.name, side.sae, side.hook) for side, what in mine if what == "codes"], reader.load())
        for ((side, what), ask), matrix in zip(mine.items(), reader.pool(list(mine.values()), progress)):
            found[side][what] = matrix[ask.pools[0]]
    return list(found.values())


def _asks(side: _Side, pool: str, dense: str | None) -> list[tuple[str, Ask]]:
    codes = ("codes", Ask((pool,), side.sae, None, side.hook))
    return [codes] if dense is None else [codes, ("dense", Ask((dense,), None, None, side.hook))]


def _view(pooled: Sequence[dict[str, Any]], partners: Sequence[dict[int, Pairing]], seed: int, n_rows: int) -> View:
    """Return what the classifier of SAE i reads of SAE j."""
    nothing = np.zeros((n_rows, 1), np.float32)

    def view(arm: Arm, i: int, j: int) -> Any:
        if arm.features == "none":
            return nothing
        if arm.features == "dense" or i == j:
            return pooled[j]["dense" if arm.features == "dense" else "codes"]
        codes = pooled[j]["codes"]
        partner, sign = partners[i][j].partner, partners[i][j].sign
        if arm.features == "random":
            return in_order(codes, shuffled(partner, codes.shape[1], seed, i, j), np.ones_like(sign))
        return in_order(codes, partner, sign)

    return view


# ---------------------------------------------------------------------------------------------------------- matching


@dataclass(frozen=True, eq=False)
class Pairing:
    """Which latents of one SAE stand for those of another."""

    partner: np.ndarray
    """For each latent of the first the index of one of the second, -1 for none."""
    sign: np.ndarray
    """-1 where that one must be turned round, else 1."""
    about: dict[str, Any]
    """How near the pairs are: pairs, unmatched, mean_cosine."""


def match_all(
    named: Named, codes: Sequence[Any], train: np.ndarray, matching: Matching, pool: str
) -> list[dict[int, Pairing]]:
    """Return for SAE i and every other j which latents of j stand for those of i.

    Parameters
    ----------
    named
        The SAEs.
    codes
        Pooled codes of each.
    train
        Training rows, over which documents are correlated.
    matching
        How latents are matched.
    pool
        How the codes were pooled.
    """
    turns = pool in LINEAR_POOLS
    found: list[dict[int, Pairing]] = [{} for _ in named]
    for i in range(len(named)):
        for j in range(i + 1, len(named)):
            (_, one), (_, other) = named[i], named[j]
            sides, either = (one.W_dec, other.W_dec.to(one.device)), have_signs(one, other)
            if matching.by == "documents":
                sides, either = (_profiles(codes[i], train), _profiles(codes[j], train)), either and turns
            there = match_latents(*sides, either_sign=either)
            found[i][j] = _pairing(there, matching.threshold, turns)
            found[j][i] = _pairing(there.inverse(), matching.threshold, turns)
    return found


def _pairing(matched: Matched, threshold: float | None, turns: bool) -> Pairing:
    partner, cosine = matched.partner.numpy().copy(), matched.cosine.numpy()
    if threshold is not None:
        partner[~(cosine >= threshold)] = -1
    paired = partner >= 0
    mean = float(cosine[paired].mean()) if paired.any() else None
    sign = np.where(matched.opposite.numpy() & turns, -1.0, 1.0)
    return Pairing(partner, sign, {"pairs": int(paired.sum()), "unmatched": int((~paired).sum()), "mean_cosine": mean})


def _profiles(codes: Any, train: np.ndarray) -> torch.Tensor:
    """Centred pooled codes, a row per latent: their cosine is the correlation over (a part of) the documents."""
    train = train[:: -(-len(train) // PROFILE_ROWS)]
    X = codes[train].toarray().T.astype(np.float32)
    return torch.from_numpy(X - X.mean(1, keepdims=True))


def shuffled(partner: np.ndarray, n_other: int, seed: int, i: int, j: int) -> np.ndarray:
    """Return as many partners, drawn at random."""
    chosen = random_order(n_other, "partners", seed, i, j)
    result = np.full(len(partner), -1)
    paired = np.flatnonzero(partner >= 0)
    result[paired] = chosen[: len(paired)]
    return result


def in_order(codes: Any, partner: np.ndarray, sign: np.ndarray) -> Any:
    """Return the columns of `codes`, times a sign, in the order of the other SAE's latents; zeros for those without."""
    import scipy.sparse

    mine = np.flatnonzero(partner >= 0)
    shape = (codes.shape[1], len(partner))
    signs = sign[mine].astype(codes.dtype)
    return scipy.sparse.csr_matrix(codes @ scipy.sparse.csr_matrix((signs, (partner[mine], mine)), shape=shape))
