"""Smaller SAEs from a trained one: keep the latents that matter most, without training again."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..errors import ConfigError, DataError
from ..measure.importance import batches, normal_equations
from ..places import warn
from ..progress import shows_progress
from ..ranks import refuse_unsplit
from ..rows.opening import facts_of, source_for, warnings_on_rows
from ..rows.source import Source
from ..sae.model import SAE
from ..sae.naming import name_of
from ..sae.rules import GroupMaxRule, JumpReLURule, ReLURule, TopKRule
from ..settings import Progress, suggest_keywords
from .ranking import ORDERS, rank
from .settings import PruneSettings

CALIBRATION_ROWS = 8192
"""Maximum number of rows that thresholds are found from."""

CALIBRATION_NUMBERS = 2**22
"""Pre-activations that are sorted at once (float32: 16 MiB)."""


@suggest_keywords
@shows_progress
def prune(
    sae: SAE,
    rows: Any = None,
    *,
    sizes: Sequence[int],
    by: str | Tensor = "energy",
    settings: PruneSettings = PruneSettings(),
    progress: Progress | None = None,
) -> list[SAE]:
    """Return ordinary SAEs with the most important latents of `sae`, one per size, without training.

    Parameters
    ----------
    sae
        An SAE, or a transcoder, whose latents are ranked and refitted on the rows that it predicts.
    rows
        A source of rows, an array ``[n, d_in]``, or the path of a cache folder or array file. Needed by rankings that
        look at rows, by ``refit``, by ``recalibrate`` and by selection after TopK.
    sizes
        Numbers of latents to keep, increasing, each from 1 to ``n_latents``. The full size gives the SAE itself,
        sorted.
    by
        What the latents are ranked by: see `rank`. ``"unsorted"`` keeps the stored order. With ``"forward"`` or
        ``"backward"`` and a rule that looks at one latent at a time the error falls with the size up to the best
        size; latents beyond that only hurt (with ``refit`` it falls along any order).
    settings
        How, and on how many rows.

        ``selection`` says what a rule that lets latents compete (TopK, GroupMax) does. ``"before"``: the competition
        is among the latents kept, as in ``rank(sae).take(m)``; each row uses as many latents as before. ``"after"``:
        the latents kept fire where they fired in the whole SAE. No small TopK SAE can do that exactly, for it does not
        see the competitors; the result is a JumpReLU SAE whose thresholds let every latent fire as often as it did on
        the first 8,192 rows. `measure_sizes` measures the exact curve of either. It makes no difference to rules that
        look at one latent at a time (ReLU, JumpReLU).

        ``refit`` fits the decoder and its bias by least squares over the rows to the codes of the latents kept; latents
        that never fire keep their decoder rows. ``recalibrate`` multiplies the thresholds of a JumpReLU SAE by one
        factor such that as many latents fire per row as in the whole SAE (or as many as can). TopK keeps its k anyway.
    progress
        Called as ``progress(stage, done, total)``; stages are ``"importance"``, ``"thresholds"`` and ``"refit"``
        [shown on stderr; ``False``: none].

    Returns
    -------
    list of SAE
        In the order of `sizes`; what was done is in ``provenance["pruned"]``.

    Raises
    ------
    ConfigError
        A size that is not within 1..n_latents, sizes that do not increase, a size that would cut through latents that
        all have an importance of 0 (the dead, say), an unknown `by`, rows that are needed and missing, or
        ``recalibrate`` of a rule without thresholds (ReLU).
    DataError, ShapeError
        As `rank`.
    """
    refuse_unsplit("prune")
    sizes = check_sizes(sae, sizes, "prune")
    _check(sae, rows, settings)
    source = None if rows is None else source_for(sae, rows, "prune")
    ranked = rank(
        sae, source, by=by, max_rows=settings.max_rows, batch_rows=settings.batch_rows, seed=settings.seed,
        progress=progress,
    )  # fmt: skip
    check_ties(ranked, sizes, "prune")
    pruned = _calibrated(ranked, sizes, source, settings, progress)
    if settings.refit:
        assert source is not None
        equations = normal_equations(pruned, source, settings.max_rows, settings.batch_rows, progress, "refit")
        decoders = [each.refit(small) for each, small in zip(equations, pruned, strict=True)]
        pruned = [small.replace(W_dec=W, b_dec=b) for small, (W, b) in zip(pruned, decoders, strict=True)]
    done = {
        "from": sae.n_latents,
        "by": _name_of(by, ranked),
        "selection": settings.selection,
        "refit": settings.refit,
        "recalibrate": settings.recalibrate,
        **({} if source is None else {"rows": facts_of(source)}),
    }
    if source is not None and "n_rows" not in ranked.provenance.get("ranking", {}):  # else `rank` has said it
        warn(warnings_on_rows([(name_of(sae), sae)], source))
    return [small.replace(provenance=_provenance(small, done)) for small in pruned]


def _calibrated(
    ranked: SAE, sizes: Sequence[int], source: Source | None, settings: PruneSettings, progress: Progress | None
) -> list[SAE]:
    """Return the prefixes, with thresholds where the settings want them."""
    whole, after = ranked, settings.selection == "after" and competes(ranked)
    is_cut = sizes[0] < ranked.n_latents
    if is_cut and (after or settings.recalibrate):
        assert source is not None
        sample = _sample(source, settings, progress).to(ranked.device, ranked.dtype)
        if after:
            whole = ranked.replace(rule=JumpReLURule(matched_thresholds(ranked, sample)))
    pruned = [whole.take(size) if size < ranked.n_latents else ranked for size in sizes]
    if is_cut and settings.recalibrate:
        with torch.no_grad():
            l0 = ranked.encode(sample).l0()
            pruned = [
                each if each.n_latents == ranked.n_latents else _recalibrated(each, sample, l0) for each in pruned
            ]
    return pruned


def competes(sae: SAE) -> bool:
    """Return whether latents keep each other from firing, so that a selection before and after pruning differ."""
    return isinstance(sae.rule, TopKRule | GroupMaxRule)


def is_signed(sae: SAE) -> bool:
    """Return whether codes can be negative."""
    return isinstance(sae.rule, TopKRule) and sae.rule.sign != "positive"


def check_sizes(sae: SAE, sizes: Sequence[int], where: str) -> list[int]:
    """Return sizes as a list of whole numbers.

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


def _check(sae: SAE, rows: Any, settings: PruneSettings) -> None:
    if settings.recalibrate and isinstance(sae.rule, ReLURule):
        raise ConfigError("prune: `recalibrate` needs a rule with thresholds; a ReLU SAE has none. Use `refit`.")
    after = settings.selection == "after" and competes(sae)
    if after and is_signed(sae):
        raise ConfigError(
            "prune: `selection` must be 'before' for an SAE with signed codes: 'after' gives a JumpReLU SAE, whose "
            "codes are never negative. `measure_sizes` measures the exact curve of either."
        )
    if rows is None and (settings.refit or settings.recalibrate or after):
        asked = (
            "refit" if settings.refit else "recalibrate" if settings.recalibrate else "selection='after' of a TopK SAE"
        )
        raise ConfigError(f"prune: {asked} is computed from rows; got none. Pass rows like the training's.")


def _name_of(by: str | Tensor, ranked: SAE) -> str:
    """Return what the latents kept were chosen by; an SAE that was in order already says by what."""
    if isinstance(by, str) and by != "unsorted":
        return by.replace("-", "_")
    return str(ranked.provenance.get("latent_order", by if isinstance(by, str) else "given"))


def _provenance(small: SAE, done: dict[str, Any]) -> dict[str, Any]:
    # What was measured while training, and any curve along the sizes, was about the whole SAE.
    kept = {key: value for key, value in small.provenance.items() if key not in ("metrics", "sizes")}
    return {**kept, "pruned": done}


# --------------------------------------------------------------------------------------------------------- thresholds


def _sample(source: Source, settings: PruneSettings, progress: Progress | None) -> Tensor:
    limit = min(CALIBRATION_ROWS, settings.max_rows or CALIBRATION_ROWS)
    found = [batch.x for batch in batches(source, limit, settings.batch_rows, "thresholds", progress)]
    if not found:
        raise DataError("prune: there must be at least one row; the source has none. Is the data empty?")
    return torch.cat(found)


@torch.no_grad()
def matched_thresholds(sae: SAE, x: Tensor) -> Tensor:
    """Return thresholds ``[n_latents]`` such that each latent fires on as many rows of `x` as under its rule."""
    codes = sae.encode(x)
    fires = torch.bincount(codes.indices, minlength=sae.n_latents)
    centred = sae.scaling.apply(x)[0]
    centred = centred if sae.b_pre is None else centred - sae.b_pre
    thresholds = torch.zeros_like(sae.b_enc)
    step = max(1, CALIBRATION_NUMBERS // len(x))
    for start in range(0, sae.n_latents, step):
        part = slice(start, start + step)
        pre = torch.addmm(sae.b_enc[part], centred, sae.W_enc[part].T).sort(dim=0, descending=True).values
        # Half way between the last that fires and the first that does not fire: rounding moves neither across.
        last, first = (
            pre.gather(0, at[None])[0] for at in ((fires[part] - 1).clamp(min=0), fires[part].clamp(max=len(x) - 1))
        )
        between = torch.where(fires[part] == 0, first, (last + first.clamp_min(0)) / 2)
        thresholds[part] = torch.where(fires[part] < len(x), between, between.new_zeros(())).clamp_min(0)
    return thresholds


def _recalibrated(sae: SAE, x: Tensor, l0: float) -> SAE:
    """Return the SAE with its thresholds times one factor, such that about `l0` latents fire per row of `x`."""
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
