"""Compare SAEs: which latents of one does another have, matched one to one, exactly, compared with chance."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import zip_longest
from typing import Any

import numpy as np
from torch import Tensor

from ..errors import ConfigError, ShapeError, listed
from ..matching.matching import Certificate
from ..matching.shared import SharedRule
from ..measure.fidelity import SplicedModel
from ..measure.intervals import LEVEL
from ..measure.results import Measured
from ..measure.settings import TextSettings
from ..measure.weight_scores import weight_scores
from ..models.language import LanguageModel
from ..places import Warned, warnings_between
from ..progress import shows_progress
from ..provenance import facts_of_sae, library_versions, release
from ..ranks import refuse_unsplit
from ..rows.opening import Rows, as_source, warnings_on_rows
from ..rows.origin import refuse_unread
from ..rows.source import Source
from ..sae.model import SAE
from ..sae.naming import Given, check_finite, check_same_target, given_saes, named_saes
from ..sae.parts import check_parts, common_parts
from ..settings import Progress, suggest_keywords
from ..training.convergence import undertrained
from .concept_groups import LEAST_POINTS, Groups, concept_groups, only_in_one, sharing_law
from .fingerprints import in_the_model
from .function import function_of
from .intervals import OverPairs, over_saes
from .nulls import chance_of, nulls_of
from .on_rows import NOT_SEEN, SAMPLE_ROWS, Activity, act_on
from .pairs import MatchedPair, MatchProgress, Named, found_in, match_all
from .result import Compared, Comparison, Pair
from .settings import ComparisonSettings, FunctionSettings
from .stability import alignment, check_local, counted_others, local_folder, predictors, with_stability


@suggest_keywords
@shows_progress
def compare(
    saes: Given | Sequence[Given],
    rows: Rows | None = None,
    *,
    write: bool = False,
    model: str | os.PathLike[str] | LanguageModel | None = None,
    data: object = None,
    settings: ComparisonSettings = ComparisonSettings(),
    function: FunctionSettings = FunctionSettings(),
    progress: Progress | None = None,
) -> Comparison:
    """Match the latents of SAEs one to one, on decoder and on encoder cosine, and count those that they share.

    A latent is *shared* by two SAEs when the matching of the decoders and the matching of the encoders, found
    independently, give it the same partner and both cosines exceed a threshold; otherwise it is an orphan. Both
    matchings have the largest possible sum of cosines and carry the proof.

    Parameters
    ----------
    saes
        Two SAEs or more, of the same hook: values, or paths that `SAE.load` takes. Widths may differ: then every
        latent of the narrower gets a partner, and fractions are of its latents.
    rows
        Rows to compare activations on: a source, an array ``[n, d_in]``, or the path of a cache folder or array file.
        None: only weights are compared. With rows it is also tested whether partners *do* the same: see
        `saekit.comparison.function.FUNCTION`.
    write
        Whether to write what was found about each latent into the SAEs' files: the SAEs must be given as local paths.
        See `with_stability` for what is written.
    model, data
        A causal language model and texts, for what partners do in it: cross-entropies with the partners' decoder rows,
        and the change of next-token probabilities when they are ablated. `rows` must be given too.
    settings
        The threshold, the controls, how many rows.
    function
        How many tokens, latents and pairs are tested in the model.
    progress
        Called as ``progress(stage, done, total)`` with the stages ``"match"`` (matchings), ``"rows"``, ``"tokens"`` and
        ``"fingerprints"`` [shown on stderr; ``False``: none].

    Returns
    -------
    Comparison
        ``.shared``, ``.equal``, ``.mean_cosine``, ``.pw_mcc`` with their nulls; ``.function``; ``.pairs``;
        ``.saes[i].stability`` per latent.

    Raises
    ------
    ConfigError
        Fewer than two SAEs, a setting out of range, `write` with SAEs that are no local files, a model without rows or
        one that predicts no tokens; crosscoders of different sources, or rows of others.
    ShapeError
        The SAEs read or write rows of different widths, or the rows have another.
    DataError
        NaN in weights or rows, or no rows.
    """
    refuse_unsplit("compare")
    saes = given_saes(saes)
    if len(saes) < 2:
        raise ConfigError(
            "compare: at least two SAEs must be given; got one. Train another seed: train(…, seeds=[0, 1])."
        )
    _check_different(saes)
    if write:
        check_local(saes)
    named = named_saes(saes, "compare")
    _check_widths(named)
    values = [sae for _, sae in named]
    source = None if rows is None else as_source(rows, values[0].d_in, "compare")
    if source is not None:
        check_parts(values[0], source.info, "compare")
    refuse_unread(model, data, "compare")
    spliced = None if model is None else _spliced(model, data, values, source, function)
    result = _compared_with_chance(named, source, settings, progress, _InModel(spliced, function))
    if write:
        for path, scored in zip(saes, with_stability(values, result), strict=True):
            scored.save(local_folder(path))
    return result


@dataclass(frozen=True)
class _InModel:
    """The language model in which it is tested what partners do; None without one."""

    spliced: SplicedModel | None
    settings: FunctionSettings


def _spliced(
    model: str | os.PathLike[str] | LanguageModel,
    data: object,
    saes: Sequence[SAE],
    source: Source | None,
    function: FunctionSettings,
) -> SplicedModel:
    if source is None:
        raise ConfigError("compare: `model` must come with `rows`, on which latents are matched by what they do.")
    texts = TextSettings(text=function.text, tokens=function.tokens)
    spliced = SplicedModel.of(model, data, saes, source, texts, "compare")
    if spliced.texts is None:
        raise ConfigError(f"compare: the model must predict next tokens; `{spliced.lm.name}` does not. Leave it out.")
    return spliced


def _check_different(saes: Sequence[Given]) -> None:
    """Refuse one SAE given twice: it shares everything with itself, which says nothing about seeds."""
    seen: set[int | str] = set()
    for item in saes:
        place = id(item) if isinstance(item, SAE) else os.path.realpath(item)
        if place in seen:
            what = "one" if isinstance(item, SAE) else f"`{os.fspath(item)}`"
            raise ConfigError(f"compare: the SAEs must be different ones; got {what} twice. Give another seed.")
        seen.add(place)


def _compared_with_chance(
    named: Named,
    source: Source | None,
    settings: ComparisonSettings,
    progress: Progress | None,
    inside: _InModel,
) -> Comparison:
    """Match every pair, look at what they do on rows, and match dictionaries that have nothing in common."""
    values = [sae for _, sae in named]
    n_pairs = len(named) * (len(named) - 1) // 2
    tick = MatchProgress(progress, 2 * n_pairs + (4 if settings.controls else 0))
    rule = SharedRule(settings.threshold, settings.strict)
    matched = match_all(named, tick)
    seen = NOT_SEEN if source is None else act_on(values, matched, rule, source, settings, progress)
    nulls = nulls_of(values[0], values[1], rule, settings.seed, tick) if settings.controls else {}
    acts = zip_longest(matched, seen.on_rows, seen.function)
    pairs = [pair.result(named, rule, on_rows, function) for pair, on_rows, function in acts]
    counting = counting_pairs(pairs)
    if inside.spliced is not None:
        tested = counting[: inside.settings.pairs]
        some = [matched[at] for at in tested]
        found = in_the_model(values, some, rule, inside.spliced, inside.settings, progress)
        pairs = _with_more(pairs, dict(zip(tested, found, strict=True)))
    over = OverPairs([(matched[at].first, matched[at].second) for at in counting], len(named))
    counted = [pairs[at] for at in counting]
    compared = _latents_found(named, matched, rule, seen)
    return Comparison(
        saekit=release(),
        versions=library_versions(False),
        settings=_facts(settings, over, with_rows=source is not None),
        rows=None if source is None else dict(source.info),
        n_rows=seen.n_rows,
        **_means(counted, over),
        **chance_of(nulls),
        certificate=_certificates(pairs),
        **compared,
        pairs=pairs,
        nulls=nulls,
        groups=_groups(named, matched, rule),
        **_alive(counted, over),
        pw_mcc=over.mean([pair.decoder.mean_cosine for pair in counted], least=-1.0),
        pw_mcc_null=nulls["random"].mean_cosine if nulls else None,
        predictors=predictors(compared["saes"], [sae for _, sae in named]),
        function=function_of(counted, over),
        warnings=_warnings(named, source) + undertrained(named),
    )


def _with_more(pairs: Sequence[Pair], more: dict[int, dict[str, Measured]]) -> list[Pair]:
    """Return pairs with what was found out about some of them in a language model."""
    return [replace(pair, function=pair.function | more.get(at, {})) for at, pair in enumerate(pairs)]


def counting_pairs(pairs: Sequence[Pair]) -> list[int]:
    """Return the indices of the pairs that means are over.

    What SAEs share that began alike is no answer to the question; where there are other pairs, those alone count.
    """
    return [at for at, pair in enumerate(pairs) if not pair.same_seed] or list(range(len(pairs)))


def _latents_found(named: Named, matched: Sequence[MatchedPair], rule: SharedRule, seen: Activity) -> dict[str, Any]:
    """Return the fields of a comparison that say in how many SAEs latents are found."""
    has = found_in(named, matched, rule)
    return {
        "in_exactly": in_exactly([have.sum(1) for have in has]),
        "only_in_one": [_over_bases(each) for each in only_in_one(has).T],
        "saes": _compared(named, matched, has, seen),
        "law": sharing_law(has) if len(named) > LEAST_POINTS else None,
    }


def _check_widths(named: Named) -> None:
    first, reference = named[0]
    for name, sae in named:
        if (sae.d_in, sae.d_out) != (reference.d_in, reference.d_out):
            raise ShapeError(
                f"compare: all SAEs must read and write rows of one width; `{name}` maps {sae.d_in} to {sae.d_out}, "
                f"`{first}` {reference.d_in} to {reference.d_out}. Compare SAEs of one hook."
            )
        check_same_target(name, sae, reference, "compare")
        check_finite(name, {"W_enc": sae.W_enc, "W_dec": sae.W_dec})
    common_parts(named, "compare", of_all=True)


def _warnings(named: Named, source: Source | None) -> list[Warned]:
    """Return in what the SAEs' places differ from each other and from that of the rows, and what signs hide."""
    signed = [name for name, sae in named if sae.has_signs]
    told = warnings_between(named) + ([] if source is None else warnings_on_rows(named, source))
    if len(signed) in (0, len(named)):
        return told
    message = (
        f"the codes of {listed(signed)} are signed, so that a latent and its negative are the same, and those of the "
        "others are not: in pairs of either kind they count as different, which makes the fractions lower bounds"
    )
    return [*told, Warned("signed_codes", message)]


def _facts(settings: ComparisonSettings, over: OverPairs, *, with_rows: bool) -> dict[str, Any]:
    """Return what the result says about how it was made."""
    return {
        "threshold": settings.threshold,
        "strict": settings.strict,
        "controls": settings.controls,
        "seed": settings.seed,
        "max_rows": settings.max_rows if with_rows else None,
        "sample_rows": SAMPLE_ROWS if with_rows else None,
        "batch_rows": settings.batch_rows,
        "intervals": {"level": LEVEL, "over": over.meaning},
    }


def _means(pairs: Sequence[Pair], over: OverPairs) -> dict[str, Any]:
    """Return what the comparison says about all pairs together."""
    decoders, encoders = [pair.decoder for pair in pairs], [pair.encoder for pair in pairs]
    return {
        "shared": over.mean([pair.shared for pair in pairs]),
        "equal": over.mean([pair.equal for pair in pairs]),
        "mean_cosine": over.mean([side.mean_cosine for side in decoders], least=-1.0),
        "mean_cosine_encoder": over.mean([side.mean_cosine for side in encoders], least=-1.0),
        "max_cosine": over.mean([side.max_cosine for side in decoders], least=-1.0),
        "max_absolute_cosine": over.mean([side.max_absolute_cosine for side in decoders]),
    }


def _alive(pairs: Sequence[Pair], over: OverPairs) -> dict[str, Any]:
    """Return what is said about latents that fire on the rows: means over pairs; None without rows."""
    found: dict[str, Any] = {}
    for name in ("shared_alive", "pw_mcc_alive"):
        each = [getattr(pair.on_rows, name) for pair in pairs if pair.on_rows is not None]
        found[name] = over.mean(each, least=0.0 if name == "shared_alive" else -1.0) if each else None
    return found


def _compared(
    named: Named, matched: Sequence[MatchedPair], has: Sequence[np.ndarray], seen: Activity
) -> list[Compared]:
    """Return what is known about each latent of each SAE."""
    counted = counted_others(named)
    return [
        Compared(
            name=name,
            sae=facts_of_sae(sae),
            found_in=(1 + has[at].sum(1)).tolist(),
            stability=has[at][:, counted[at]].mean(1).tolist(),
            alignment=alignment(at, matched, counted[at]),
            frequency=seen.frequency[at] if seen.frequency else [],
            alignment_self=_rounded(weight_scores(sae).get("alignment_self")),
        )
        for at, (name, sae) in enumerate(named)
    ]


def _rounded(score: Tensor | None) -> list[float]:
    return [] if score is None else [round(value, 6) for value in score.tolist()]


def _groups(named: Named, matched: Sequence[MatchedPair], rule: SharedRule) -> Groups:
    """Concepts: shared latents of all pairs, clustered by the mean of their two cosines."""
    shared = []
    for pair in matched:
        mine = pair.shared(rule)
        decoder, encoder = pair.decoder.matching, pair.encoder.matching
        close = (decoder.cosine[mine] + encoder.cosine[mine]) / 2
        latents, partners = mine.nonzero().squeeze(1), decoder.partner[mine]
        shared.append((pair.first, pair.second, latents.numpy(), partners.numpy(), close.numpy()))
    return concept_groups([sae.n_latents for _, sae in named], shared)


def _certificates(pairs: Sequence[Pair]) -> dict[str, Certificate]:
    return {
        "decoder": _sum([pair.decoder.certificate for pair in pairs]),
        "encoder": _sum([pair.encoder.certificate for pair in pairs]),
    }


def _sum(certificates: Sequence[Certificate]) -> Certificate:
    objective, dual = (math.fsum(getattr(each, name) for each in certificates) for name in ("objective", "dual"))
    return Certificate(objective, dual, math.fsum(each.gap for each in certificates))


def in_exactly(found: Sequence[np.ndarray]) -> list[Measured]:
    """Return the fraction of latents in exactly j SAEs, j = 1 … m: mean over the SAEs.

    Parameters
    ----------
    found
        Per SAE and latent: the number of other SAEs that have it.
    """
    m = len(found)
    counts = np.array([np.bincount(others, minlength=m) / len(others) for others in found])
    return [_over_bases(counts[:, j]) for j in range(m)]


def _over_bases(values: np.ndarray) -> Measured:
    """Mean over SAEs of a fraction of latents; two SAEs of one pair are no sample."""
    return over_saes(values, "fraction", most=1.0, reason="interval over the SAEs, each as base")
