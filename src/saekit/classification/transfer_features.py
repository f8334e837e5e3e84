"""A classifier that learned on the latents of one SAE reads those of another, put into its order by matching."""

from __future__ import annotations

import itertools
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from ..errors import ConfigError, ShapeError
from ..inputs.images import Images
from ..inputs.labelled import read_labelled
from ..inputs.settings import Split
from ..matching.matching import match_latents
from ..models.language import LanguageModel
from ..places import warnings_on
from ..progress import shows_progress
from ..provenance import place_of
from ..randomness import random_order
from ..rows.pooling import Ask, check_pool
from ..sae.model import SAE
from ..sae.naming import named_saes
from ..settings import Progress, silent, suggest_keywords
from .arms import Arm, dense_pools
from .cells import transfer_of
from .features import Named, Reader, View, check_widths
from .plan import check_inner, kinds_of, make_plan, reader_of, seeded
from .settings import FEATURE_KINDS, ClassifierSettings, Matching
from .stored_fits import run_jobs
from .transfer import facts_of, saved
from .transfer_result import Transfer
from .verdicts import judge

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

    Each latent of the first gets the column of its partner in the second; one without a partner gets zeros. The
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
        As `transfer`; fewer than two SAEs.
    ShapeError
        Decoder rows of different widths: match by documents.
    """
    how = settings
    tell = progress or silent
    named, models = _checked(saes, model, matching)
    if isinstance(data, Images):
        raise ConfigError("features are transferred between SAEs on texts; got images. Use `transfer` for them.")
    kinds = kinds_of(how, FEATURE_KINDS, False, True, FEATURE_KINDS)
    (pool, *more) = how.pools or ("sum",)
    check_pool(pool)
    if more:
        raise ConfigError(f"transfer: `pools` must name one pooling between SAEs; got {list(how.pools or ())}.")
    labelled = read_labelled(data, split=split)
    for train, _ in labelled.parts:
        check_inner(labelled, train, seeded(how.budget, split))
    hooks = [place_of(sae, layer=how.layer, hook=how.hook, where="transfer", name=f"`{name}`") for name, sae in named]
    readers = {id(each): reader_of(each, labelled, how, out) for each in models}
    pooled = _pooled(named, hooks, [readers[id(each)] for each in models], (pool, "dense" in kinds), tell)
    partners = match_all(named, [each["codes"] for each in pooled], labelled.parts[0][0], matching)
    names = [name for name, _ in named]
    facts = [readers[id(each)].facts for each in models]
    is_lost = "dense" in kinds and len({each["dense"].shape[1] for each in pooled}) > 1
    said = {
        "arms": list(kinds), "pools": [pool], "dense_pools": list(dense_pools([pool])), "hooks": hooks, "values": names,
        "matched_by": matching.by, "threshold": matching.threshold,
        "to_model": {**facts[1], "model": facts[1]["name"]} if facts[1] != facts[0] else None,
        "saes": [sae["digest"] for sae in facts_of(named)],
    }  # fmt: skip
    arms = [
        arm for arm in _arms(" | ".join(names), pool) if arm.kind in kinds and not (is_lost and arm.kind == "dense")
    ]
    plan = make_plan(readers[id(models[0])], arms, {}, split=split, how=how, said=said, across="sae", out=out)
    view = _view(pooled, partners, split.seed, len(labelled))
    fits = run_jobs(plan, lambda arms, _: view, tell)
    about = [
        {"model": facts[i]["name"], "hook": hooks[i], "matched": {names[j]: pair.about for j, pair in row.items()}}
        for i, row in enumerate(partners)
    ]
    notes = ["no dense arm: the hidden states of the models differ in width"] if is_lost else []
    result = transfer_of(judge(plan, fits, tell), facts_of(named), notes=notes, about=about)
    told = [
        warnings_on([each], {**readers[id(models[i])].place(), "hook": hooks[i]}, what="the model given makes")
        for i, each in enumerate(named)
    ]
    return saved(replace(result, warnings=list(dict.fromkeys(itertools.chain(*told)))), out)


def _checked(saes: Any, model: Any, matching: Matching) -> tuple[Named, list[Any]]:
    """Return the SAEs with their names, and the model of each."""
    if isinstance(saes, SAE | str | os.PathLike) or len(saes) < 2:
        raise ConfigError("transfer: at least two SAEs must be given; got one. Name the other (--to).")
    named = named_saes(saes, "transfer")
    models = list(model) if isinstance(model, list | tuple) else [model] * len(named)
    if len(models) != len(named):
        raise ConfigError(
            f"transfer: `model` must be one model, or one for each of the {len(named)} SAEs; got {len(models)}."
        )
    if matching.by == "decoder" and len({each.d_out for _, each in named}) > 1:
        raise ShapeError(
            f"SAEs matched by their decoders must write rows of one width; they write {[s.d_out for _, s in named]}. "
            "Match them by documents (by='documents')."
        )
    return named, models


def _arms(names: str, pool: str) -> list[Arm]:
    dense = dense_pools([pool])[0]
    return [
        Arm("majority", "majority", features="none", probe="majority"),
        Arm(f"dense {dense}", "dense", features="dense", source="dense", pool=dense),
        Arm(f"random {pool}", "random", features="random", source=names, pool=pool),
        Arm(f"SAE {pool} binarized", "binarized", features="codes", steps=("binarize",), source=names, pool=pool),
        Arm(f"SAE {pool}", "full", features="codes", source=names, pool=pool),
    ]


def _pooled(
    named: Named, hooks: Sequence[str], readers: Sequence[Reader], wanted: tuple[str, bool], progress: Progress
) -> list[dict[str, Any]]:
    """For each SAE its codes and, where they are wanted, the hidden states; one pass of each model."""
    pool, with_dense = wanted
    dense = dense_pools([pool])[0]
    found: list[dict[str, Any]] = [{} for _ in named]
    for reader in dict.fromkeys(readers):
        mine = [i for i, other in enumerate(readers) if other is reader]
        check_widths([(*named[i], hooks[i]) for i in mine], reader.load())
        asks = [Ask((pool,), named[i][1], None, hooks[i]) for i in mine]
        asks += [Ask((dense,), None, None, hooks[i]) for i in mine] if with_dense else []
        matrices = reader.pool(asks, progress)
        for at, i in enumerate(mine):
            found[i] = {"codes": matrices[at][pool]}
            if with_dense:
                found[i]["dense"] = matrices[len(mine) + at][dense]
    return found


def _view(pooled: Sequence[dict[str, Any]], partners: Sequence[dict[int, Pairing]], seed: int, n_rows: int) -> View:
    """Return what the classifier of SAE i reads of SAE j."""
    nothing = np.zeros((n_rows, 1), np.float32)

    def view(arm: Arm, i: int, j: int) -> Any:
        if arm.features == "none":
            return nothing
        if arm.features == "dense" or i == j:
            return pooled[j]["dense" if arm.features == "dense" else "codes"]
        codes = pooled[j]["codes"]
        partner = partners[i][j].partner
        return in_order(codes, shuffled(partner, codes.shape[1], seed, i, j) if arm.features == "random" else partner)

    return view


# ---------------------------------------------------------------------------------------------------------- matching


@dataclass(frozen=True, eq=False)
class Pairing:
    """Which latents of one SAE stand for those of another."""

    partner: np.ndarray
    """For each latent of the first the index of one of the second, -1 for none."""
    about: dict[str, Any]
    """How near the pairs are: pairs, unmatched, mean_cosine."""


def match_all(named: Named, codes: Sequence[Any], train: np.ndarray, matching: Matching) -> list[dict[int, Pairing]]:
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
    """
    found: list[dict[int, Pairing]] = [{} for _ in named]
    for i in range(len(named)):
        for j in range(i + 1, len(named)):
            sides = (named[i][1].W_dec, named[j][1].W_dec.to(named[i][1].device))
            if matching.by == "documents":
                sides = (_profiles(codes[i], train), _profiles(codes[j], train))
            there = match_latents(*sides)
            found[i][j] = _pairing(there, matching.threshold)
            found[j][i] = _pairing(there.inverse(), matching.threshold)
    return found


def _pairing(matched: Any, threshold: float | None) -> Pairing:
    partner, cosine = matched.partner.numpy().copy(), matched.cosine.numpy()
    if threshold is not None:
        partner[~(cosine >= threshold)] = -1
    paired = partner >= 0
    mean = float(cosine[paired].mean()) if paired.any() else None
    return Pairing(partner, {"pairs": int(paired.sum()), "unmatched": int((~paired).sum()), "mean_cosine": mean})


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


def in_order(codes: Any, partner: np.ndarray) -> Any:
    """Return the columns of `codes` in the order of the other SAE's latents; zeros for latents without a partner."""
    import scipy.sparse

    mine = np.flatnonzero(partner >= 0)
    ones = np.ones(len(mine), codes.dtype)
    shape = (codes.shape[1], len(partner))
    return scipy.sparse.csr_matrix(codes @ scipy.sparse.csr_matrix((ones, (partner[mine], mine)), shape=shape))
