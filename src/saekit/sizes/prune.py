"""Smaller SAEs from a trained one: keep the latents that matter most, without training again."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..errors import ConfigError, DataError
from ..measure.importance import batches, normal_equations
from ..rows.opening import as_source, facts_of
from ..rows.source import Source
from ..sae.model import SAE
from ..sae.rules import GroupMaxRule, JumpReLURule, ReLURule, TopKRule
from ..settings import Progress
from .ranking import ORDERS, rank

SELECTIONS = ("before", "after")

CALIBRATION_ROWS = 8192
"""Rows that thresholds are found from, at most."""

CALIBRATION_NUMBERS = 2**22
"""Pre-activations that are sorted at once (float32: 16 MiB)."""


def prune(
    sae: SAE,
    source: Any = None,
    *,
    sizes: Sequence[int],
    by: str | Tensor = "energy",
    selection: str = "before",
    refit: bool = False,
    recalibrate: bool = False,
    rows: int | None = None,
    batch_rows: int = 4096,
    seed: int = 0,
    progress: Progress | None = None,
) -> list[SAE]:
    """Ordinary SAEs with the most important latents of `sae`, one per size, without training.

    Parameters
    ----------
    sae
        An SAE with ``d_in = d_out``.
    source
        Rows: a source, an array ``[n, d_in]``, or the path of a cache folder or array file. Needed by rankings that
        look at rows, by `refit`, by `recalibrate` and by selection after TopK.
    sizes
        Numbers of latents to keep, increasing, each from 1 to ``n_latents``. The full size gives the SAE itself,
        sorted.
    by
        What the latents are ranked by: see `rank`. ``"unsorted"`` keeps the stored order. With ``"forward"`` or
        ``"backward"`` and a rule that looks at one latent at a time the error falls with the size up to the best
        size; latents beyond that only hurt (with `refit` it falls along any order).
    selection
        What a rule that lets latents compete (TopK, GroupMax) does. ``"before"``: the competition is among the
        latents kept, as in ``rank(sae).take(m)``; each row uses as many latents as before. ``"after"``: the latents
        kept fire where they fired in the whole SAE. No small TopK SAE can do that exactly, for it does not see the
        competitors; the result is a JumpReLU SAE whose thresholds let every latent fire as often as it did on the
        first 8,192 rows. `measure_sizes` measures the exact curve of either. Rules that look at one latent at a time
        (ReLU, JumpReLU) know no difference.
    refit
        Whether to fit the decoder and its bias anew, by least squares over the rows, to the codes of the latents
        kept. Latents that never fire keep their rows.
    recalibrate
        Whether to multiply the thresholds of a JumpReLU SAE by one factor such that as many latents fire per row as
        in the whole SAE (or as many as can). TopK keeps its k anyway.
    rows
        Most rows to see; None for all.
    batch_rows, seed, progress
        As for `rank`; the stages are ``"importance"``, ``"thresholds"`` and ``"refit"``.

    Returns
    -------
    list of SAE
        In the order of `sizes`; what was done is in ``provenance["pruned"]``.

    Raises
    ------
    ConfigError
        A size that is not within 1..n_latents, sizes that do not increase, a size that would cut through latents that
        all have an importance of 0 (the dead, say), an unknown `by` or `selection`, rows that are needed and missing,
        or `recalibrate` of a rule without thresholds (ReLU).
    DataError, ShapeError
        As `rank`.
    """
    sizes = check_sizes(sae, sizes, "prune")
    _check(sae, source, selection, refit, recalibrate)
    if source is not None:
        source = as_source(source, sae.d_in, "prune")
    ranked = rank(sae, source, by=by, rows=rows, batch_rows=batch_rows, seed=seed, progress=progress)
    check_ties(ranked, sizes, "prune")
    after = selection == "after" and competes(ranked)
    pruned = [ranked.take(size) for size in sizes]
    if (after or recalibrate) and any(size < sae.n_latents for size in sizes):
        sample = _sample(source, rows, batch_rows, progress).to(sae.device, sae.dtype)
        with torch.no_grad():
            if after:
                rule = JumpReLURule(matched_thresholds(ranked, sample))
                whole = ranked.replace(rule=rule)
                pruned = [whole.take(size) if size < sae.n_latents else ranked for size in sizes]
            if recalibrate:
                l0 = ranked.encode(sample).l0()
                pruned = [
                    each if each.n_latents == sae.n_latents else _recalibrated(each, sample, l0) for each in pruned
                ]
    if refit:
        equations = normal_equations(pruned, source, rows, batch_rows, progress, "refit")
        decoders = [each.refit(small) for each, small in zip(equations, pruned, strict=True)]
        pruned = [small.replace(W_dec=W, b_dec=b) for small, (W, b) in zip(pruned, decoders, strict=True)]
    done = {
        "from": sae.n_latents,
        "by": _name_of(by, ranked),
        "selection": selection,
        "refit": refit,
        "recalibrate": recalibrate,
        **({} if source is None else {"rows": facts_of(source)}),
    }
    return [small.replace(provenance=_provenance(small, done)) for small in pruned]


def competes(sae: SAE) -> bool:
    """Whether latents keep each other from firing, so that a selection before and after pruning differ."""
    return isinstance(sae.rule, TopKRule | GroupMaxRule)


def check_sizes(sae: SAE, sizes: Sequence[int], where: str) -> list[int]:
    """Sizes as a list of whole numbers.

    Raises
    ------
    ConfigError
        None, not increasing, or one outside 1..n_latents.
    """
    found: list[int] = [sizes] if isinstance(sizes, int) else list(sizes)
    if not found or any(isinstance(size, bool) or not isinstance(size, int) for size in found):
        raise ConfigError(f"{where}: `sizes` must be whole numbers of latents; got {sizes!r}.")
    wrong = [size for size in found if not 1 <= size <= sae.n_latents]
    if wrong:
        raise ConfigError(
            f"{where}: `sizes` must lie within 1..{sae.n_latents}, the latents of this SAE; got {wrong[0]}. "
            "A pruned SAE cannot be larger than the one it comes from."
        )
    if found != sorted(set(found)):
        raise ConfigError(f"{where}: `sizes` must increase; got {found}. Sort them and drop the repeats.")
    return found


def check_ties(ranked: SAE, sizes: Sequence[int], where: str) -> None:
    """Refuse sizes at which the ranking cannot say which latents to keep: those on both sides of the cut score 0.

    Raises
    ------
    ConfigError
        Such a size; the message says how many latents have an importance.
    """
    ranking = ranked.provenance.get("ranking")
    by = ranking.get("by") if isinstance(ranking, dict) else None
    scores = ranked.scores.get(str(by))
    if scores is None:
        return
    for size in sizes:
        if size < len(scores) and scores[size - 1] == scores[size] == 0:
            important = int((scores > 0).sum())
            finer = by == "stability" and "alignment" in ranked.scores
            otherwise = "rank by `alignment`, which tells them apart" if finer else "rank by something else"
            otherwise = "rank on more rows" if by in ORDERS else otherwise
            fewer = f"at most {important:,}, or for " if important else ""
            raise ConfigError(
                f"{where}: {size} latents cannot be chosen by `{by}`: only {important:,} have more of it than 0, and "
                f"which of the others to keep would be chance. Ask for {fewer}all {len(scores):,}, or {otherwise}."
            )


def _check(sae: SAE, source: Any, selection: str, refit: bool, recalibrate: bool) -> None:
    if selection not in SELECTIONS:
        raise ConfigError(f"prune: `selection` must be 'before' or 'after'; got {selection!r}.")
    if recalibrate and isinstance(sae.rule, ReLURule):
        raise ConfigError("prune: `recalibrate` needs a rule with thresholds; a ReLU SAE has none. Use `refit`.")
    after = selection == "after" and competes(sae)
    if source is None and (refit or recalibrate or after):
        asked = "refit" if refit else "recalibrate" if recalibrate else "selection='after' of a TopK SAE"
        raise ConfigError(f"prune: {asked} is computed from rows; got none. Pass rows like the training's.")


def _name_of(by: str | Tensor, ranked: SAE) -> str:
    """What the latents kept were chosen by; an SAE that was in order already says by what."""
    if isinstance(by, str) and by != "unsorted":
        return by.replace("-", "_")
    return str(ranked.provenance.get("latent_order", by if isinstance(by, str) else "given"))


def _provenance(small: SAE, done: dict[str, Any]) -> dict[str, Any]:
    # What was measured while training, and any curve along the sizes, was about the whole SAE.
    kept = {key: value for key, value in small.provenance.items() if key not in ("metrics", "sizes")}
    return {**kept, "pruned": done}


# --------------------------------------------------------------------------------------------------------- thresholds


def _sample(source: Source, rows: int | None, batch_rows: int, progress: Progress | None) -> Tensor:
    limit = min(CALIBRATION_ROWS, rows or CALIBRATION_ROWS)
    found = list(batches(source, limit, batch_rows, "thresholds", progress))
    if not found:
        raise DataError("prune: there must be at least one row; the source has none. Is the data empty?")
    return torch.cat(found)


def matched_thresholds(sae: SAE, x: Tensor) -> Tensor:
    """Thresholds ``[n_latents]`` with which each latent fires on as many of the rows `x` as under the SAE's rule."""
    codes = sae.encode(x)
    fires = torch.bincount(codes.indices, minlength=sae.n_latents)
    centred = sae.scaling.apply(x)[0]
    centred = centred if sae.b_pre is None else centred - sae.b_pre
    thresholds = torch.zeros_like(sae.b_enc)
    step = max(1, CALIBRATION_NUMBERS // len(x))
    for start in range(0, sae.n_latents, step):
        part = slice(start, start + step)
        pre = torch.addmm(sae.b_enc[part], centred, sae.W_enc[part].T).sort(dim=0, descending=True).values
        # Half way between the last that fires and the first that stays silent: rounding moves neither across.
        last, first = (
            pre.gather(0, at[None])[0] for at in ((fires[part] - 1).clamp(min=0), fires[part].clamp(max=len(x) - 1))
        )
        between = torch.where(fires[part] == 0, first, (last + first.clamp_min(0)) / 2)
        thresholds[part] = torch.where(fires[part] < len(x), between, between.new_zeros(())).clamp_min(0)
    return thresholds


def _recalibrated(sae: SAE, x: Tensor, l0: float) -> SAE:
    """The SAE with its thresholds times one factor, such that about `l0` latents fire per row of `x`."""
    if not isinstance(sae.rule, JumpReLURule):
        return sae
    threshold = sae.rule.threshold.clamp_min(0)
    step = max(1, CALIBRATION_NUMBERS // sae.n_latents)
    ratios = []
    for block in x.split(step):
        pre = sae.pre(block)
        fires = pre > 0
        ratios.append((pre / threshold)[fires])  # infinite where the threshold is 0: it fires at any factor
    ratio = torch.cat(ratios)
    count = round(l0 * len(x))
    factor = 0.0 if count >= len(ratio) else float(ratio.kthvalue(len(ratio) - count).values)
    if factor == float("inf"):  # more latents without a threshold fire than should
        return sae
    return sae.replace(rule=JumpReLURule(sae.rule.threshold * factor))
