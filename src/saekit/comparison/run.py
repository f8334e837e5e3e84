"""Compare SAEs: which latents of one does another have, matched one to one, exactly, beside what chance gives."""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import ConfigError, DataError, ShapeError
from ..matching.matching import Certificate, Matching, match_latents
from ..matching.shared import SharedRule, agree
from ..matching.top_cosines import Directions, extremes
from ..measure.bootstrap import LEVEL, NORMAL, Estimate, row_groups, wilson_interval
from ..measure.redundancy import random_max_cosine
from ..measure.results import Measured
from ..measure.similarity import linear_cka, rsa
from ..provenance import facts_of_sae, library_versions, release, sae_digest
from ..rows.opening import Rows, as_source
from ..rows.source import Source
from ..sae.codes import Codes
from ..sae.model import SAE
from ..sae.naming import Given, given_saes, named_saes
from ..settings import Progress, suggest_keywords
from .concept_groups import LEAST_POINTS, Groups, concept_groups, only_in_one, sharing_law
from .result import Compared, Comparison, Null, OnRows, Pair, Side
from .settings import ComparisonSettings

SAMPLE_ROWS = 512
"""Rows of these that are compared with each other for CKA and RSA."""


@suggest_keywords
def compare(
    saes: Given | Sequence[Given],
    rows: Rows | None = None,
    *,
    write: bool = False,
    settings: ComparisonSettings = ComparisonSettings(),
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
        None: only weights are compared.
    write
        Whether to write what was found about each latent into the SAEs' files: the SAEs must be given as local paths.
        See `with_stability` for what is written.
    settings
        The threshold, the controls, how many rows.
    progress
        Called as ``progress(stage, done, total)`` with the stages ``"match"`` (matchings) and ``"rows"``.

    Returns
    -------
    Comparison
        ``.shared``, ``.equal``, ``.mean_cosine`` with their nulls; ``.pairs``; ``.saes[i].stability`` per latent.

    Raises
    ------
    ConfigError
        Fewer than two SAEs, a setting out of range, or `write` with SAEs that are no local files.
    ShapeError
        The SAEs read or write rows of different widths, or the rows have another.
    DataError
        NaN in weights or rows, or no rows.
    """
    saes = given_saes(saes)
    if len(saes) < 2:
        raise ConfigError(
            "compare: at least two SAEs must be given; got one. Train another seed: train(…, seeds=[0, 1])."
        )
    if write:
        check_local(saes)
    named = named_saes(saes, "compare")
    _check_widths(named)
    source = None if rows is None else as_source(rows, named[0][1].d_in, "compare")
    every = list(combinations(range(len(named)), 2))
    tick = _Count(progress, 2 * len(every) + (4 if settings.controls else 0))
    matched = [(i, j, *_match(named[i][1], named[j][1], tick)) for i, j in every]
    rule = SharedRule(settings.threshold, settings.strict)
    seen = None if source is None else _act(named, matched, rule, source, settings, progress)
    pairs = [
        _pair(named[i], named[j], decoder, encoder, rule, None if seen is None else seen.on_rows[at])
        for at, (i, j, decoder, encoder) in enumerate(matched)
    ]
    has = _has(named, matched, rule)
    others = [have.sum(1) for have in has]
    counted = _counted(named)
    nulls = _nulls(named[0][1], named[1][1], rule, settings.seed, tick) if settings.controls else {}
    chance = nulls.get("random")
    # What SAEs share that began alike is no answer to the question; where there are other pairs, those alone count.
    counting = [at for at, pair in enumerate(pairs) if not pair.same_seed] or list(range(len(pairs)))
    over = _Over([every[at] for at in counting], len(named))
    means = [pairs[at] for at in counting]
    result = Comparison(
        saekit=release(),
        versions=library_versions(False),
        settings={
            "threshold": settings.threshold,
            "strict": settings.strict,
            "controls": settings.controls,
            "seed": settings.seed,
            "max_rows": settings.max_rows if source is not None else None,
            "sample_rows": SAMPLE_ROWS if source is not None else None,
            "batch_rows": settings.batch_rows,
            "intervals": {"level": LEVEL, "over": over.meaning},
        },
        rows=None if source is None else dict(source.info),
        n_rows=0 if seen is None else seen.n_rows,
        shared=over.mean([pair.shared for pair in means]),
        shared_null=None if chance is None else chance.shared,
        equal=over.mean([pair.equal for pair in means]),
        equal_null=None if chance is None else _kept_tie(nulls["permuted"].equal, chance.equal),
        mean_cosine=over.mean([pair.decoder.mean_cosine for pair in means], least=-1.0),
        mean_cosine_null=None if chance is None else chance.mean_cosine,
        mean_cosine_encoder=over.mean([pair.encoder.mean_cosine for pair in means], least=-1.0),
        max_cosine=over.mean([pair.decoder.max_cosine for pair in means], least=-1.0),
        max_cosine_null=None if chance is None else chance.max_cosine,
        pw_mcc=over.mean([pair.decoder.pw_mcc for pair in means]),
        certificate={
            "decoder": _sum([pair.decoder.certificate for pair in pairs]),
            "encoder": _sum([pair.encoder.certificate for pair in pairs]),
        },
        in_exactly=_in_exactly(others),
        only_in_one=[_over_saes(each) for each in only_in_one(has).T],
        saes=[
            Compared(
                name=name,
                sae=facts_of_sae(sae),
                found_in=(1 + others[at]).tolist(),
                stability=has[at][:, counted[at]].mean(1).tolist(),
                alignment=_alignment(at, matched, counted[at]),
                frequency=[] if seen is None else seen.frequency[at],
            )
            for at, (name, sae) in enumerate(named)
        ],
        pairs=pairs,
        nulls=nulls,
        groups=_groups(named, matched, rule),
        law=sharing_law(has) if len(named) > LEAST_POINTS else None,
        shared_alive=None
        if seen is None
        else over.mean([each for at in counting if (each := seen.on_rows[at].shared_alive) is not None]),
    )
    if write:
        for path, scored in zip(saes, with_stability([sae for _, sae in named], result), strict=True):
            scored.save(local_folder(path))
    return result


def with_stability(saes: Sequence[SAE], result: Comparison) -> list[SAE]:
    """The SAEs of a comparison with what it found about each latent.

    ``scores["stability"]`` is the share of the other SAEs that have the latent, ``scores["alignment"]`` its mean cosine
    with its partners in them (-1 where it has no partner); `Compared` defines both. ``provenance["stability"]`` holds
    the mean and what it was compared with.

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
        if sae_digest(sae) != compared.sae["digest"]:
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
                for place, other in enumerate(result.saes)
                if place != at
            ],
        }
        alignment = [-1.0 if value is None else value for value in compared.alignment]
        scores = {"stability": compared.stability, "alignment": alignment}
        scored.append(sae.with_scores(**scores).replace(provenance={**sae.provenance, "stability": about}))
    return scored


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
    """The folder that a path of an SAE, or of one of its two files, names."""
    text = os.fspath(path)
    return os.path.dirname(text) or "." if os.path.basename(text) in ("sae.json", "sae.safetensors") else text


# ---------------------------------------------------------------------------------------------------------- the call


def _check_widths(named: list[tuple[str, SAE]]) -> None:
    first, reference = named[0]
    for name, sae in named:
        if (sae.d_in, sae.d_out) != (reference.d_in, reference.d_out):
            raise ShapeError(
                f"compare: all SAEs must read and write rows of one width; `{name}` maps {sae.d_in} to {sae.d_out}, "
                f"`{first}` {reference.d_in} to {reference.d_out}. Compare SAEs of one hook."
            )
        for key in ("W_enc", "W_dec"):
            if not bool(torch.isfinite(getattr(sae, key)).all()):
                raise DataError(
                    f"`{name}` must have finite weights; `{key}` holds NaN or infinity. Its training went wrong."
                )


# ---------------------------------------------------------------------------------------------------------- matching


@dataclass(frozen=True)
class _Matched:
    """A matching and what it is compared with."""

    matching: Matching
    largest: Measured
    largest_absolute: Measured


class _Count:
    """Tells how many of the matchings are done."""

    def __init__(self, progress: Progress | None, total: int) -> None:
        self.progress, self.total, self.done = progress, total, 0

    def __call__(self) -> None:
        self.done += 1
        if self.progress is not None:
            self.progress("match", self.done, self.total)


def _match(a: SAE, b: SAE, tick: _Count) -> tuple[_Matched, _Matched]:
    """Decoders and encoders of two SAEs matched."""
    return _match_rows(a.W_dec, b.W_dec, tick), _match_rows(a.W_enc, b.W_enc, tick)


def _match_rows(a: Tensor, b: Tensor, tick: _Count) -> _Matched:
    b = b.to(a.device)
    matching = match_latents(a, b)
    with torch.no_grad():
        top_a, low_a, top_b, low_b = extremes(Directions.of(a, "a"), Directions.of(b, "b"))
    tick()
    largest = (top_a.mean() + top_b.mean()) / 2
    absolute = (torch.maximum(top_a, -low_a).mean() + torch.maximum(top_b, -low_b).mean()) / 2
    spread = _spread(top_a), _spread(top_b)
    error = math.hypot(*spread) / 2
    return _Matched(matching, _within(float(largest), error), _within(float(absolute), error, least=0.0))


def _side(matched: _Matched) -> Side:
    matching = matched.matching
    cosine = [None if math.isnan(value) else round(value, 6) for value in matching.cosine.tolist()]
    paired = matching.cosine[matching.partner >= 0]
    return Side(
        partner=matching.partner.tolist(),
        cosine=cosine,
        mean_cosine=_within(matching.mean_cosine, _spread(paired)),
        max_cosine=matched.largest,
        pw_mcc=matched.largest_absolute,
        certificate=matching.certificate,
    )


def _pair(
    a: tuple[str, SAE], b: tuple[str, SAE], decoder: _Matched, encoder: _Matched, rule: SharedRule,
    on_rows: OnRows | None,
) -> Pair:  # fmt: skip
    one, other = decoder.matching, encoder.matching
    n = min(len(one.partner), one.n_b)
    return Pair(
        first=a[0],
        second=b[0],
        same_seed=_same_seed(a[1], b[1]),
        **_shares(one, other, rule, n),
        decoder=_side(decoder),
        encoder=_side(encoder),
        on_rows=on_rows,
    )


def _shares(decoder: Matching, encoder: Matching, rule: SharedRule, n: int) -> dict[str, Measured]:
    """``shared``, ``aligned`` and ``equal`` of `n` latents."""
    return {
        "shared": wilson_interval(int(rule.shared(decoder, encoder).sum()), n),
        "aligned": wilson_interval(int(rule.aligned(decoder, encoder).sum()), n),
        "equal": wilson_interval(int(agree(decoder, encoder).sum()), n),
    }


def _same_seed(a: SAE, b: SAE) -> bool:
    seed = a.provenance.get("seed")
    return seed is not None and seed == b.provenance.get("seed") and a.W_enc.shape == b.W_enc.shape


def _sum(certificates: list[Certificate]) -> Certificate:
    objective, dual = (math.fsum(getattr(each, name) for each in certificates) for name in ("objective", "dual"))
    return Certificate(objective, dual, math.fsum(each.gap for each in certificates))


# ---------------------------------------------------------------------------------------------------------- many SAEs

_Found = list[tuple[int, int, _Matched, _Matched]]


def _has(named: list[tuple[str, SAE]], matched: _Found, rule: SharedRule) -> list[np.ndarray]:
    """Per SAE ``bool [n_latents, m]``: which other SAEs have each of its latents."""
    has = [np.zeros((sae.n_latents, len(named)), dtype=bool) for _, sae in named]
    for i, j, decoder, encoder in matched:
        shared = rule.shared(decoder.matching, encoder.matching)
        has[i][shared.numpy(), j] = True
        has[j][decoder.matching.partner[shared].numpy(), i] = True
    return has


def _counted(named: list[tuple[str, SAE]]) -> list[list[int]]:
    """Per SAE: the others that say something about it; those that began alike only where there are no others."""
    every = [[j for j in range(len(named)) if j != i] for i in range(len(named))]
    fresh = [[j for j in own if not _same_seed(named[i][1], named[j][1])] for i, own in enumerate(every)]
    return [some or own for some, own in zip(fresh, every, strict=True)]


def _alignment(at: int, matched: _Found, counted: list[int]) -> list[float | None]:
    """Mean cosine of each latent of one SAE with its partners in the others, over decoder and encoder."""
    values = []
    for i, j, decoder, encoder in matched:
        if (i == at and j in counted) or (j == at and i in counted):
            sides = [each.matching if i == at else each.matching.inverse() for each in (decoder, encoder)]
            values += [side.cosine.numpy() for side in sides]
    table = np.stack(values)
    known = ~np.isnan(table)
    mean = np.where(known, table, 0.0).sum(0) / np.maximum(known.sum(0), 1)
    return [round(float(value), 6) if any_ else None for value, any_ in zip(mean, known.any(0), strict=True)]


def _groups(named: list[tuple[str, SAE]], matched: _Found, rule: SharedRule) -> Groups:
    """Concepts: shared latents of all pairs, clustered by the mean of their two cosines."""
    shared = []
    for i, j, decoder, encoder in matched:
        mine = rule.shared(decoder.matching, encoder.matching)
        close = (decoder.matching.cosine[mine] + encoder.matching.cosine[mine]) / 2
        partner = decoder.matching.partner[mine]
        shared.append((i, j, mine.nonzero().squeeze(1).numpy(), partner.numpy(), close.numpy()))
    return concept_groups([sae.n_latents for _, sae in named], shared)


def _in_exactly(found: list[np.ndarray]) -> list[Measured]:
    """Share of latents in exactly j SAEs, j = 1 … m: mean over the SAEs."""
    m = len(found)
    counts = np.array([np.bincount(others, minlength=m) / len(others) for others in found])
    return [_over_saes(counts[:, j]) for j in range(m)]


def _over_saes(values: np.ndarray) -> Measured:
    """Mean over SAEs with the interval of Student's t; two SAEs of one pair are no sample."""
    m = len(values)
    if m < 3:
        return Measured(float(values.mean()), None, None, "fraction", "no interval: it needs at least 3 SAEs")
    error = _student(m - 1) * float(values.std(ddof=1)) / math.sqrt(m)
    reason = "interval over the SAEs, each as base"
    return _within(float(values.mean()), error / NORMAL, least=0.0, unit="fraction", reason=reason)


@dataclass(frozen=True)
class _Over:
    """Means over pairs of SAEs. Pairs share SAEs, so SAEs are left out, not pairs."""

    pairs: list[tuple[int, int]]
    m: int

    @property
    def meaning(self) -> str:
        """What intervals of the means come from."""
        if self.m == 2:
            return "over latents of the one pair (how seeds differ takes 3 SAEs)"
        return f"from a jackknife over the {self.m} SAEs"

    def mean(self, each: list[Measured], least: float = 0.0) -> Measured:
        """Mean over pairs; with 3 SAEs or more the interval of a jackknife that leaves out one SAE at a time."""
        if self.m == 2:
            one = each[0]
            return Measured(one.value, one.low, one.high, one.unit, "interval over latents: one pair of SAEs")
        values = np.array([measured.value for measured in each])
        kept = [[value for value, pair in zip(values, self.pairs, strict=True) if s not in pair] for s in range(self.m)]
        if not all(kept):
            reason = "no interval: all pairs that count have one SAE in common"
            return Measured(float(values.mean()), None, None, each[0].unit, reason)
        left_out = [np.mean(each_kept) for each_kept in kept]
        error = math.sqrt((self.m - 1) / self.m * float(np.square(left_out - np.mean(left_out)).sum()))
        if not error:  # all pairs alike, at 0 or 1 say: what the latents leave open remains
            return _widest(float(values.mean()), each)
        error *= _student(self.m - 1) / NORMAL
        reason = f"interval from a jackknife over {self.m} SAEs"
        return _within(float(values.mean()), error, least=least, unit=each[0].unit, reason=reason)


def _student(degrees: int) -> float:
    from scipy.stats import t

    return float(t.ppf((1 + LEVEL) / 2, degrees))


# ---------------------------------------------------------------------------------------------------------- intervals


def _spread(values: Tensor) -> float:
    """Standard error of the mean."""
    return float(values.double().std()) / math.sqrt(len(values)) if len(values) > 1 else math.inf


def _within(
    value: float, error: float, *, least: float = -1.0, unit: str = "cosine", reason: str | None = None
) -> Measured:
    """A value with its normal interval, cut at its range."""
    if not math.isfinite(error):
        return Measured(value, None, None, unit, "no interval: there is one latent")
    return Measured(
        value, max(value - NORMAL * error, least), min(value + NORMAL * error, 1.0), unit, reason or "over latents"
    )


def _widest(value: float, each: list[Measured]) -> Measured:
    """A value within the widest interval of several over latents."""
    lows, highs = ([end for end in ends if end is not None] for ends in zip(*((m.low, m.high) for m in each)))
    low, high = (min(lows), max(highs)) if lows and highs else (None, None)
    return Measured(value, low, high, each[0].unit, "interval over latents: all pairs of SAEs are alike")


# ---------------------------------------------------------------------------------------------------------- nulls


def _nulls(a: SAE, b: SAE, rule: SharedRule, seed: int, tick: _Count) -> dict[str, Null]:
    """What chance gives, for dictionaries of the shape of the first pair."""
    generator = torch.Generator().manual_seed(seed)

    def random(rows: Tensor) -> Tensor:
        return torch.randn(rows.shape, generator=generator).to(rows.device)

    dec, enc = (torch.randperm(width, generator=generator) for width in (b.d_out, b.d_in))
    enc = dec if b.d_in == b.d_out else enc
    mixed = b.W_dec[:, dec.to(b.device)], b.W_enc[:, enc.to(b.device)]
    directions = "directions drawn at random, decoder and encoder apart"
    return {
        "random": _null(
            directions, (random(a.W_dec), random(b.W_dec)), (random(a.W_enc), random(b.W_enc)), rule, "random", tick
        ),
        "permuted": _null(
            "the first pair, coordinates of the second permuted alike in decoder and encoder",
            (a.W_dec, mixed[0]), (a.W_enc, mixed[1]), rule, "permuted", tick,
        ),
    }  # fmt: skip


def _null(
    made: str, dec: tuple[Tensor, Tensor], enc: tuple[Tensor, Tensor], rule: SharedRule, name: str, tick: _Count
) -> Null:
    decoder, encoder = _match_rows(*dec, tick), _match_rows(*enc, tick)
    n, m, d = len(dec[0]), len(dec[1]), dec[0].shape[1]
    shares = _shares(decoder.matching, encoder.matching, rule, min(n, m))
    mean = _side(decoder).mean_cosine
    if name != "random":
        return Null(made, shares["shared"], shares["equal"], mean, decoder.largest)
    # Two random matchings give one latent the same partner with probability 1 / larger width.
    equal = _with_formula(shares["equal"], 1 / max(n, m))
    largest = (random_max_cosine(m + 1, d) + random_max_cosine(n + 1, d)) / 2
    return Null(made, shares["shared"], equal, mean, _with_formula(decoder.largest, largest))


def _kept_tie(permuted: Measured, unrelated: Measured) -> Measured:
    reason = (
        f"{permuted.reason}; coordinates permuted, so that encoders resemble decoders as they do. "
        f"Dictionaries without any resemblance: {unrelated.value:.3g} ({unrelated.reason})"
    )
    return Measured(permuted.value, permuted.low, permuted.high, permuted.unit, reason)


def _with_formula(measured: Measured, expected: float) -> Measured:
    reason = f"{measured.reason}; expected by formula: {expected:.6g}"
    return Measured(measured.value, measured.low, measured.high, measured.unit, reason)


# ---------------------------------------------------------------------------------------------------------- on rows


@dataclass(frozen=True)
class _Acted:
    on_rows: list[OnRows]
    n_rows: int
    frequency: list[list[float]]


def _act(
    named: list[tuple[str, SAE]],
    matched: _Found,
    rule: SharedRule,
    source: Source,
    settings: ComparisonSettings,
    progress: Progress | None,
) -> _Acted:
    """One pass over the rows for all SAEs: sums per latent and per matched pair, and a sample of codes."""
    sums = [np.zeros((3, sae.n_latents)) for _, sae in named]  # of codes, of their squares, of firings
    products = [np.zeros(len(decoder.matching.partner)) for _, _, decoder, _ in matched]
    samples: list[list[Codes]] = [[] for _ in named]
    groups: list[np.ndarray] = []
    max_rows = settings.max_rows or source.n_rows or sys.maxsize
    total = max_rows if source.n_rows is None else min(max_rows, source.n_rows)
    step = max(1, total // SAMPLE_ROWS)
    done = 0
    for batch in source.batches(settings.batch_rows):
        x = batch.x[: max_rows - done]
        document = None if batch.document is None else batch.document[: len(x)]
        group, _ = row_groups(document, done, len(x))
        sampled = torch.arange(-done % step, len(x), step)
        groups.append(group[sampled].numpy())
        with torch.no_grad():
            codes = [sae.encode(x.to(sae.device)).to("cpu") for _, sae in named]
        sparse = [each.to_scipy().astype(np.float64) for each in codes]
        for i, each in enumerate(codes):
            samples[i].append(each.rows(sampled))
            sums[i][0] += sparse[i].sum(axis=0)
            sums[i][1] += sparse[i].power(2).sum(axis=0)
            sums[i][2] += np.bincount(each.indices.numpy(), minlength=each.n_latents)
        for at, (i, j, decoder, _) in enumerate(matched):
            mine, theirs = _paired(decoder.matching)
            both = sparse[i][:, mine].multiply(sparse[j][:, theirs])
            products[at][mine] += np.asarray(both.sum(axis=0)).ravel()
        done += len(x)
        if progress is not None:
            progress("rows", done, total)
        if done >= max_rows:
            break
    if not done:
        raise DataError("compare: there must be at least one row; the source has none. Is the data empty?")
    together = [Codes.cat(parts).rows(slice(SAMPLE_ROWS)) for parts in samples]
    documents = np.concatenate(groups)[:SAMPLE_ROWS]
    on_rows = []
    for at, (i, j, decoder, encoder) in enumerate(matched):
        mine, theirs = _paired(decoder.matching)
        shared = rule.shared(decoder.matching, encoder.matching)
        correlation, n_pairs = _correlation(sums[i][:, mine], sums[j][:, theirs], products[at][mine], done)
        similar = rsa(together[i].to_dense(), together[j].to_dense(), documents)
        on_rows.append(
            OnRows(
                correlation,
                n_pairs,
                _cka(together[i], together[j], documents),
                _measured(similar, -1.0),
                _shared_alive(shared, decoder.matching.partner, sums[i][2] > 0, sums[j][2] > 0),
            )
        )
    return _Acted(on_rows, done, [[round(float(n), 9) for n in each[2] / done] for each in sums])


def _shared_alive(shared: Tensor, partner: Tensor, alive_a: np.ndarray, alive_b: np.ndarray) -> Measured:
    """Shared pairs that both fire, as a share of the latents that fire in the SAE that has fewer of them."""
    n = int(min(alive_a.sum(), alive_b.sum()))
    if not n:
        return Measured(math.nan, None, None, "fraction", "undefined: no latent of one of the SAEs fires on the rows")
    both = alive_a[shared.numpy()] & alive_b[partner[shared].numpy()]
    return wilson_interval(int(both.sum()), n)


def _paired(matching: Matching) -> tuple[np.ndarray, np.ndarray]:
    """The latents of both SAEs that have a partner, in step."""
    mine = (matching.partner >= 0).nonzero().squeeze(1)
    return mine.numpy(), matching.partner[mine].numpy()


def _correlation(a: np.ndarray, b: np.ndarray, product: np.ndarray, n: int) -> tuple[Measured, int]:
    """Mean Pearson correlation over pairs, from sums and sums of squares ``[2, pairs]`` and sums of products."""
    variance_a, variance_b = a[1] - a[0] ** 2 / n, b[1] - b[0] ** 2 / n
    # A latent that never fires, or always alike, has no correlation.
    alive = (variance_a > 1e-12 * a[1]) & (variance_b > 1e-12 * b[1])
    n_pairs = int(alive.sum())
    if not n_pairs:
        return Measured(math.nan, None, None, "correlation", "undefined: no pair of which both latents fire"), 0
    covariance = product[alive] - a[0][alive] * b[0][alive] / n
    each = torch.from_numpy(np.clip(covariance / np.sqrt(variance_a[alive] * variance_b[alive]), -1, 1))
    return _within(float(each.mean()), _spread(each), unit="correlation", reason="over pairs of latents"), n_pairs


def _cka(a: Codes, b: Codes, group: np.ndarray) -> Measured:
    return _measured(linear_cka(a, b, group), None)


def _measured(estimate: Estimate, least: float | None) -> Measured:
    return estimate.measured("correlation" if least is not None else "fraction", least=least, most=1.0)
