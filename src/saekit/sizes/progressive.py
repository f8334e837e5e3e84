"""One SAE for every size? Pruned SAEs beside nested (Matryoshka) ones, separately trained ones and unsorted prefixes.

The comparison of 2505.00190: at every size, how much fidelity does each way of getting a small SAE keep.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
import torch

from ..errors import ConfigError, FormatError, did_you_mean
from ..inputs.texts import Texts, read_texts
from ..measure.fidelity import CE_TOKENS, CHARACTERS_PER_TOKEN
from ..measure.importance import SCORES, Importance, importance
from ..measure.metrics import METRICS, Metrics
from ..measure.results import Measured, Result
from ..measure.tables import html_table, text_table
from ..models.language import LanguageModel
from ..models.loading import load_language_model
from ..provenance import place_of
from ..rows.opening import as_source
from ..rows.split import text_halves
from ..sae.model import SAE
from ..sae.rules import TopKRule
from ..settings import Progress
from .attribution import ATTRIBUTIONS, attribution
from .latent_metrics import seed_overlap
from .power_law import PowerLaw, decoder_spectrum, power_law
from .prune import competes
from .ranking import ORDERS, rank
from .size_curve import SAMPLE_ROWS, SizeCurve, default_sizes, measure_sizes

RANKINGS = ("energy", "frequency", "unsorted", "random")
"""What the vanilla SAEs are pruned by, unless told."""

COMPARED = ("fvu", "ce_sae", "rsa", "cka", "detection", "purity", "description_length")
"""Metrics of the paired differences, as far as they were measured."""


@dataclass(frozen=True)
class CurvePoint:
    """One way of getting an SAE of one size, over all seeds."""

    name: str
    """``"topk pruned by energy"``, ``"matryoshka"``, ``"topk trained separately"``, ..."""
    size: int
    """Latents."""
    seeds: list[int]
    """The seeds behind it."""
    metrics: Metrics
    """Mean over seeds, with the interval of Student's t over seeds; with one seed, its own over documents."""

    def to_json(self) -> dict[str, Any]:
        """Name, size, seeds, and every metric beside them."""
        return {"name": self.name, "size": self.size, "seeds": self.seeds, **self.metrics.to_json()}

    @classmethod
    def from_json(cls, plain: Any, where: str = "curve") -> CurvePoint:
        """The inverse of `to_json`.

        Raises
        ------
        FormatError
            Name, size or seeds are missing or of another type.
        """
        rest = dict(plain) if isinstance(plain, dict) else {}
        name, size, seeds = (rest.pop(key, None) for key in ("name", "size", "seeds"))
        if not isinstance(name, str) or not isinstance(size, int) or not isinstance(seeds, list):
            raise FormatError(f"`{where}` must hold `name`, `size`, `seeds` and metrics; it is {plain!r}.")
        return cls(name, size, seeds, Metrics.from_json(rest, where))


@dataclass(frozen=True)
class Difference:
    """One way minus another at the same size, paired by seed."""

    metric: str
    name: str
    """The first way."""
    minus: str
    """The second."""
    size: int
    difference: Measured
    """Mean over the seeds that both have, with the interval of Student's t; none with a single seed."""
    verdict: str
    """The name of the better way, ``"undecided"`` (the interval holds 0) or ``"one seed"``."""


@dataclass(frozen=True)
class Ranking:
    """How importance falls off in one vanilla SAE."""

    name: str
    """Of the SAE."""
    by: str
    """The score."""
    fit: PowerLaw | None
    """Power law of the sorted scores; None where too few latents are alive."""
    ranks: list[int]
    """Some ranks from the first to the last."""
    scores: list[float]
    """The sorted score at each of these ranks."""


@dataclass(frozen=True, repr=False)
class Progressive(Result):
    """Fidelity along sizes for every way of getting a small SAE from the same rows.

    Examples
    --------
    ::

        result = progressive({"a": topk, "b": matryoshka}, heldout, fit=rows)
        [(point.name, point.size, point.metrics.fvu.value) for point in result.curves]
    """

    KIND: ClassVar[str] = "progressive"
    SCHEMA: ClassVar[int] = 1

    rows: dict[str, Any]
    """The rows measured on."""
    n_rows: int
    language_model: dict[str, Any] | None
    curves: list[CurvePoint]
    """By name, then size."""
    differences: list[Difference]
    """Claims to judge: nested minus pruned, energy minus frequency, energy minus unsorted, at each size."""
    rankings: list[Ranking]
    """Power laws of the importance in the vanilla SAEs."""
    spectra: list[Ranking]
    """Power laws of the eigenvalues of the decoder's covariance."""
    runs: list[SizeCurve] = field(default_factory=list)
    """The curve of every single SAE."""

    @property
    def names(self) -> list[str]:
        """The ways, in order."""
        return list(dict.fromkeys(point.name for point in self.curves))

    def table(self, metric: str = "fvu") -> list[list[str]]:
        """Rows of text for one metric: a row per way, a column per size."""
        sizes = sorted({point.size for point in self.curves})
        at = {(point.name, point.size): point.metrics for point in self.curves}
        lines = [[metric, *(f"{size:,}" for size in sizes)]]
        for name in self.names:
            cells = [at.get((name, size)) for size in sizes]
            lines.append([name, *("" if c is None or metric not in c else f"{c[metric].value:.3f}" for c in cells)])
        return lines

    def __repr__(self) -> str:
        return text_table(self.table(), f"{self.n_rows:,} rows")

    def _repr_html_(self) -> str:
        return html_table(self.table(), f"FVU by latents; {self.n_rows:,} rows")


def progressive(
    saes: Mapping[str, SAE] | Sequence[SAE | str | os.PathLike[str]],
    source: Any,
    *,
    fit: Any = None,
    sizes: Sequence[int] | None = None,
    by: Sequence[str] = RANKINGS,
    model: Any = None,
    data: Any = None,
    text: str = "text",
    rows: int | None = None,
    tokens: int | None = None,
    sample_rows: int = SAMPLE_ROWS,
    latents: bool = True,
    batch_rows: int = 4096,
    draws: int = 1000,
    seed: int = 0,
    progress: Progress | None = None,
) -> Progressive:
    """Compare the ways of getting SAEs of several sizes, at equal sizes and k, over seeds.

    Parameters
    ----------
    saes
        The SAEs of one run, by name, or values or paths. Matryoshka SAEs are measured at their prefixes. Of the others
        the widest of each architecture are pruned, and narrower ones are what training separately gives. Controls
        (frozen, untrained) are left out.
    source
        Rows to measure on.
    fit
        Rows to rank the latents on; by default those of `source`, which favours the rankings a little.
    sizes
        Latents to keep, increasing; by default those that Matryoshka SAEs were trained for and separate SAEs have.
    by
        Rankings of the pruned SAEs: names in `saekit.sizes.ranking.ORDERS`, ``"attribution"`` (the gradient of the
        cross-entropy; it needs `model` and `data`, and is taken on the texts in even places where the cross-entropies
        are measured on the others), or a score that all the SAEs to be pruned carry (``"stability"``).
    latents
        Whether to measure the latents too: interpretability (where rows know their tokens), description length, parents
        (see `measure_sizes`), and over seeds the share of latents that two of them have in common (``shared``).
    model, data, text, tokens, rows, sample_rows, batch_rows, draws, seed, progress
        As for `measure_sizes`.

    Returns
    -------
    Progressive

    Raises
    ------
    ConfigError
        No SAE to prune or nest, SAEs of different widths, two of one architecture, size and seed, an unknown ranking,
        a size that no SAE has.
    ShapeError, DataError
        As `measure_sizes`.
    """
    named = _named(saes)
    by = [each.replace("-", "_") for each in by]
    families = _families(named)
    pruned = [sae for family in families if not family.nested for sae in family.widest.values()]
    carried = set.intersection(*(set(sae.scores) for sae in pruned)) if pruned else set()
    known = [*ORDERS, *ATTRIBUTIONS, *sorted(carried)]
    for each in by:
        if each not in known:
            written = " Stability is written by `saekit compare --write`." if each in ("stability", "alignment") else ""
            raise ConfigError(
                f"progressive: `by` must name rankings; got `{each}`. {did_you_mean(each, known)}{written}"
            )
    by_gradient = [each for each in by if each in ATTRIBUTIONS]
    if by_gradient and (model is None or data is None):
        raise ConfigError(
            f"progressive: `{by_gradient[0]}` is a gradient of a language model; got none. "
            "Pass `model` and `data` beside the rows."
        )
    first = next(iter(named.values()))
    source = as_source(source, first.d_in, "progressive")
    fit = source if fit is None else as_source(fit, first.d_in, "progressive")
    wanted = _sizes(sizes, families)
    gradients: tuple[LanguageModel, Texts, int] | None = None
    if model is not None and data is not None and (tokens != 0 or by_gradient):  # once for all, not once per SAE
        model = load_language_model(model)
        wanted_tokens = tokens or CE_TOKENS
        parts = 2 if by_gradient else 1
        data = read_texts(data, text=text, columns=(), characters=parts * wanted_tokens * CHARACTERS_PER_TOKEN)
        if by_gradient:
            chosen_on, data = text_halves(data)
            gradients = (model, chosen_on, wanted_tokens)
    common: dict[str, Any] = {
        "model": model, "data": data, "text": text, "rows": rows, "tokens": tokens, "sample_rows": sample_rows,
        "latents": latents, "batch_rows": batch_rows, "draws": draws, "seed": seed, "progress": progress,
    }  # fmt: skip
    runs: list[tuple[str, int, SizeCurve]] = []
    rankings, spectra = [], []
    kept: dict[tuple[str, int], list[SAE]] = {}  # by way and size, one per seed

    def keep(way: str, sae: SAE, at: Sequence[int]) -> None:
        for size in at if latents else ():
            kept.setdefault((way, size), []).append(sae.take(size))

    for family in families:
        for name, sae in family.widest.items():
            own = [size for size in wanted if size <= sae.n_latents]
            if family.nested:
                curve = _nested_curve(sae, own, source, name, common)
                runs.append((family.arch, _seed(sae), curve))
                keep(family.arch, sae, own)
                continue
            scores = None
            if set(by) & set(SCORES):  # one pass over the rows serves all of them
                scores = importance(sae, fit, rows=rows, batch_rows=batch_rows, progress=progress)
                rankings += [_falling(name, each, scores.scores[each].numpy()) for each in by if each in SCORES]
            if gradients is not None:
                lm, texts, n_tokens = gradients
                place = place_of(sae, getattr(source, "info", {}), where="progressive", name=f"`{name}`")
                found = attribution(sae, lm, texts, hook=place, tokens=n_tokens, progress=progress)
                sae = sae.with_scores(**{each: found.scores[each] for each in by_gradient})
                rankings += [_falling(name, each, found.scores[each].numpy()) for each in by_gradient]
            for label, ranked in _ranked(sae, by, scores, fit, rows, batch_rows, seed).items():
                curve = measure_sizes(ranked, source, own, name=f"{name}, {label}", **common)
                runs.append((f"{family.arch} {_way(label)}", _seed(sae), curve))
                keep(f"{family.arch} {_way(label)}", ranked, own)
            spectra.append(_falling(name, "decoder covariance", decoder_spectrum(sae).numpy()))
        for number, trained in family.separate.items():
            saes_at = [trained[size] for size in wanted if size in trained]
            if saes_at:
                curve = measure_sizes(saes_at, source, name=f"{family.arch}, seed {number}", **common)
                runs.append((f"{family.arch} trained separately", number, curve))
                for small in saes_at:
                    keep(f"{family.arch} trained separately", small, [small.n_latents])
    overlaps = _overlaps(kept, progress)
    return _result(runs, rankings, spectra, wanted, by, fit, overlaps)


def _overlaps(kept: Mapping[tuple[str, int], list[SAE]], progress: Progress | None) -> dict[tuple[str, int], Measured]:
    """What the seeds of every way share at every size."""
    found: dict[tuple[str, int], Measured] = {}
    same: dict[tuple[int, ...], Measured] = {}  # all latents of an SAE are the same ones in every order
    for done, ((way, size), saes) in enumerate(kept.items(), start=1):
        if len(saes) > 1:
            key = tuple(hash(frozenset(row.tobytes() for row in sae.W_dec.float().cpu().numpy())) for sae in saes)
            if key not in same:
                same[key] = seed_overlap(saes)
            found[way, size] = same[key]
        if progress is not None:
            progress("overlap", done, len(kept))
    return found


# ---------------------------------------------------------------------------------------------------------- the SAEs


@dataclass(frozen=True)
class _Family:
    """The SAEs of one architecture."""

    arch: str
    nested: bool
    widest: dict[str, SAE]
    """To be pruned (or measured at their prefixes), one per seed."""
    separate: dict[int, dict[int, SAE]]
    """By seed, then size; empty for nested ones and where there is one size only."""


def _named(saes: Any) -> dict[str, SAE]:
    if isinstance(saes, Mapping):
        named = dict(saes)
    else:
        named = {}
        for item in [saes] if isinstance(saes, SAE | str | os.PathLike) else list(saes):
            sae = item if isinstance(item, SAE) else SAE.load(item)
            name = "" if isinstance(item, SAE) else os.path.basename(os.fspath(item).rstrip("/\\"))
            named[_unique(name or f"{_arch(sae)}-{sae.n_latents}-seed{_seed(sae)}", named)] = sae
    named = {name: sae for name, sae in named.items() if not _config(sae).get("control")}
    if not named:
        raise ConfigError("progressive: at least one SAE that is no control must be given; got none.")
    widths = {sae.d_in for sae in named.values()}
    if len(widths) > 1:
        raise ConfigError(f"progressive: all SAEs must have one width; they have {sorted(widths)}. Compare them apart.")
    return named


def _unique(name: str, taken: Mapping[str, Any]) -> str:
    unique, count = name, 1
    while unique in taken:
        count += 1
        unique = f"{name} ({count})"
    return unique


def _config(sae: SAE) -> dict[str, Any]:
    config = sae.provenance.get("config")
    return config if isinstance(config, dict) else {}


def _arch(sae: SAE) -> str:
    return str(_config(sae).get("arch") or sae.rule.name)


def _seed(sae: SAE) -> int:
    seed = sae.provenance.get("seed")
    return seed if isinstance(seed, int) else 0


def _families(named: Mapping[str, SAE]) -> list[_Family]:
    known: dict[tuple[str, int, int], str] = {}
    for name, sae in named.items():
        other = known.setdefault((_arch(sae), sae.n_latents, _seed(sae)), name)
        if other != name:
            raise ConfigError(
                f"progressive: SAEs of one architecture and size must differ in their seed, over which they are "
                f"averaged; `{other}` and `{name}` do not. Compare different settings apart."
            )
    families = []
    for arch in sorted({_arch(sae) for sae in named.values()}):
        mine = {name: sae for name, sae in named.items() if _arch(sae) == arch}
        most = max(sae.n_latents for sae in mine.values())
        widest = {name: sae for name, sae in mine.items() if sae.n_latents == most}
        nested = arch == "matryoshka"
        separate: dict[int, dict[int, SAE]] = {}
        if not nested and len({sae.n_latents for sae in mine.values()}) > 1:
            for sae in mine.values():
                separate.setdefault(_seed(sae), {})[sae.n_latents] = sae
        families.append(_Family(arch, nested, widest, separate))
    return families


def _sizes(sizes: Sequence[int] | None, families: Sequence[_Family]) -> list[int]:
    most = max(sae.n_latents for family in families for sae in family.widest.values())
    if sizes is None:
        found: set[int] = set()
        for family in families:
            for sae in family.widest.values():
                trained = _config(sae).get("sizes") if family.nested else None
                halves_of = [sae.n_latents // part for part in (8, 4, 2, 1)] if family.nested else []
                found |= set(trained or halves_of)
            found |= {size for trained in family.separate.values() for size in trained}
        return sorted(size for size in found if size >= 1) or default_sizes(most)
    wanted = list(sizes)
    wrong = [size for size in wanted if isinstance(size, bool) or not isinstance(size, int) or not 1 <= size <= most]
    if not wanted or wrong or wanted != sorted(set(wanted)):
        raise ConfigError(
            f"progressive: `sizes` must be increasing whole numbers within 1..{most}, the widest SAE; got {wanted}."
        )
    return wanted


def _nested_curve(sae: SAE, sizes: list[int], source: Any, name: str, common: dict[str, Any]) -> SizeCurve:
    """Prefixes as they were trained: with the k of each size, or with the whole selection cut."""
    how = _config(sae).get("k_per_size")
    if how == "scaled" and isinstance(sae.rule, TopKRule):
        small = []
        for size in sizes:
            k = min(size, max(1, round(sae.rule.k * size / sae.n_latents)))
            weights = sae.rule.rank
            small.append(sae.take(size).replace(rule=TopKRule(k, None if weights is None else weights[:size])))
        return measure_sizes(small, source, name=name, **common)
    selection = "after" if how == "truncated" and competes(sae) else "before"
    return measure_sizes(sae, source, sizes, selection=selection, name=name, **common)


def _ranked(
    sae: SAE, by: Sequence[str], scores: Importance | None, fit: Any, rows: int | None, batch_rows: int, seed: int
) -> dict[str, SAE]:
    """The SAE in every order."""
    ranked = {}
    for each in by:
        if scores is None or each not in SCORES:
            rows_for = fit if each in ORDERS else None  # what the SAE carries needs no rows
            ranked[each] = rank(sae, rows_for, by=each, rows=rows, batch_rows=batch_rows, seed=seed)
            continue
        ordered = rank(sae, by=scores.scores[each])
        ranking = {**ordered.provenance["ranking"], "by": each, "n_rows": scores.n_rows, **scores.rows}
        ranked[each] = ordered.replace(provenance={**ordered.provenance, "latent_order": each, "ranking": ranking})
    return ranked


def _way(label: str) -> str:
    return label if label == "unsorted" else "in random order" if label == "random" else f"pruned by {label}"


def _falling(name: str, by: str, values: np.ndarray) -> Ranking:
    """Sorted values at some ranks, with their power law."""
    ordered = np.sort(values)[::-1]
    ranks = np.unique(np.geomspace(1, len(ordered), min(64, len(ordered))).round().astype(int))
    alive = ordered[ordered > 0]
    fit = power_law(torch.from_numpy(values.copy())) if len(alive) >= 10 and alive[0] != alive[-1] else None
    return Ranking(name, by, fit, [int(r) for r in ranks], [float(ordered[r - 1]) for r in ranks])


# ---------------------------------------------------------------------------------------------------------- the result


def _result(
    runs: list[tuple[str, int, SizeCurve]],
    rankings: list[Ranking],
    spectra: list[Ranking],
    sizes: list[int],
    by: Sequence[str],
    fit: Any,
    overlaps: Mapping[tuple[str, int], Measured],
) -> Progressive:
    values: dict[tuple[str, int], dict[int, Metrics]] = {}
    for name, seed, curve in runs:
        for point in curve.points:
            values.setdefault((name, point.size), {})[seed] = point.metrics
    curves = [
        CurvePoint(name, size, sorted(found), _with_ce(_over_seeds(list(found.values())), overlaps.get((name, size))))
        for (name, size), found in sorted(values.items())
    ]
    first = runs[0][2]
    ranked_on = {key: fit.info.get(key) for key in ("model", "hook", "data", "digest", "part") if fit.info.get(key)}
    settings = {**first.settings, "sizes": sizes, "by": list(by), "ranked_on": ranked_on}
    for key in ("selection", "each_size"):
        settings.pop(key, None)
    return Progressive(
        first.saekit, first.versions, settings, first.rows, first.n_rows, first.language_model, curves,
        _differences(values, by), rankings, spectra, [curve for _, _, curve in runs],
    )  # fmt: skip


def _over_seeds(metrics: list[Metrics]) -> dict[str, Measured]:
    """Mean over seeds with its interval; one seed keeps its own interval."""
    if len(metrics) == 1:
        return dict(metrics[0])
    names = [name for name in metrics[0] if all(name in each for each in metrics)]
    return {name: _mean([each[name].value for each in metrics], metrics[0][name].unit, name) for name in names}


def _with_ce(metrics: dict[str, Measured], overlap: Measured | None) -> Metrics:
    """The metrics, with a word about the cross-entropy where there is none, and what the seeds share."""
    unit = METRICS["ce_sae"].unit
    shared = {} if overlap is None else {"shared": overlap}
    none = Measured(math.nan, None, None, unit, "not measured: no language model")
    return Metrics({"ce_sae": none, **metrics, **shared})


def _mean(values: Sequence[float], unit: str, name: str | None = None) -> Measured:
    found = np.array(values, dtype=float)
    if np.isnan(found).any():
        return Measured(math.nan, None, None, unit, "undefined for some seed")
    if len(found) < 2:
        return Measured(float(found.mean()), None, None, unit, "no interval: one seed")
    from scipy.special import stdtrit

    reach = float(stdtrit(len(found) - 1, 0.975) * found.std(ddof=1) / math.sqrt(len(found)))
    mean = float(found.mean())
    metric = METRICS.get(name) if name else None
    low = mean - reach if metric is None or metric.least is None else max(mean - reach, metric.least)
    high = mean + reach if metric is None or metric.most is None else min(mean + reach, metric.most)
    return Measured(mean, low, high, unit, f"interval over {len(found)} seeds (Student's t)")


def _differences(values: Mapping[tuple[str, int], Mapping[int, Metrics]], by: Sequence[str]) -> list[Difference]:
    """Nested minus pruned by the first ranking, and that ranking minus every other way."""
    names = list(dict.fromkeys(name for name, _ in values))
    best = next((each for each in by if each not in ("unsorted", "random")), None)
    leaders = [name for name in names if best is not None and name.endswith(f"pruned by {best}")]
    pairs = [("matryoshka", leader) for leader in leaders if "matryoshka" in names]
    for leader in leaders:
        arch = leader.removesuffix(f" pruned by {best}")
        pairs += [(leader, name) for name in names if name.startswith(f"{arch} ") and name != leader]
    found = []
    for metric in COMPARED:
        for one, other in pairs:
            for size in sorted({size for name, size in values if name == one}):
                left, right = values[one, size], values.get((other, size), {})
                seeds = [seed for seed in left if seed in right and metric in left[seed] and metric in right[seed]]
                if seeds:
                    gaps = [left[seed][metric].value - right[seed][metric].value for seed in seeds]
                    difference = _mean(gaps, METRICS[metric].unit)
                    found.append(
                        Difference(metric, one, other, size, difference, _verdict(metric, one, other, difference))
                    )
    return found


def _verdict(metric: str, one: str, other: str, difference: Measured) -> str:
    if not difference.is_defined or difference.low is None or difference.high is None:
        return "one seed" if difference.is_defined else "undefined"
    if difference.low <= 0 <= difference.high:
        return "undecided"
    return one if (difference.value < 0) == (METRICS[metric].better == "lower") else other
