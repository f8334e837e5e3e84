"""One SAE for every size? Pruned, nested (Matryoshka) and separately trained SAEs, and unsorted prefixes.

The comparison of 2505.00190: at every size, how much fidelity does each way of getting a small SAE keep.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch

from ..errors import ConfigError, did_you_mean
from ..inputs.texts import Texts, read_texts
from ..measure.fidelity import CHARACTERS_PER_TOKEN
from ..measure.importance import SCORES, Importance, importance
from ..measure.results import Measured
from ..measure.settings import CE_TOKENS
from ..models.language import LanguageModel
from ..models.loading import load_language_model
from ..places import warnings_between
from ..progress import shows_progress
from ..provenance import place_of
from ..rows.opening import source_for, warnings_on_rows
from ..rows.source import Source
from ..rows.split import text_halves
from ..sae.model import SAE
from ..sae.naming import common_width, training_config
from ..sae.rules import TopKRule
from ..settings import Progress, part_of, silent, suggest_keywords
from .attribution import ATTRIBUTIONS, attribution
from .families import Family, families_of, name_saes, seed_of, sizes_of
from .latent_metrics import seed_overlap
from .over_seeds import curves_over_seeds, paired_differences
from .power_law import decoder_spectrum, power_law
from .prune import competes
from .ranking import ORDERS, rank
from .result import Progressive, Ranking, SizeCurve, SizePoint
from .settings import AttributionSettings, ProgressiveSettings, SizeSettings
from .size_curve import measure_sizes


@suggest_keywords
@shows_progress
def progressive(
    saes: Mapping[str, SAE] | Sequence[SAE | str | os.PathLike[str]] | SAE | str | os.PathLike[str],
    rows: Any,
    *,
    fit: Any = None,
    sizes: Sequence[int] | None = None,
    model: Any = None,
    data: Any = None,
    settings: ProgressiveSettings = ProgressiveSettings(),
    progress: Progress | None = None,
) -> Progressive:
    """Compare the ways of getting SAEs of several sizes, at equal sizes and k, over seeds.

    Parameters
    ----------
    saes
        The SAEs of one run, by name, or values or paths. Matryoshka SAEs are measured at their prefixes. Of the others
        the widest of each architecture are pruned, and narrower ones are what training separately gives. Controls
        (frozen, untrained) are left out.
    rows
        A source of rows to measure on.
    fit
        Rows to rank the latents on; by default `rows`, which favours the rankings a little.
    sizes
        Numbers of latents to keep, increasing; by default those that Matryoshka SAEs were trained for and separate SAEs
        have.
    model, data
        A causal language model and texts for the cross-entropies.
    settings
        ``by`` names rankings in `saekit.sizes.ranking.ORDERS`, ``"attribution"`` (the gradient of the cross-entropy; it
        needs `model` and `data`, and is taken on every second text, the cross-entropies on the others), or a score that
        all the SAEs to be pruned carry (``"stability"``). With ``latents`` the latents are measured too (see
        `measure_sizes`), and over seeds the fraction of latents that two of them have in common (``shared``). The
        selection is the one that Matryoshka SAEs were trained with, and ``"before"`` for the others.
    progress
        Called as ``progress(stage, done, total)`` [shown on stderr; ``False``: none].

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
    named = name_saes(saes)
    families = families_of(named)
    _check_rankings(settings.by, families, has_model=model is not None and data is not None)
    first = next(iter(named.values()))
    common_width(list(named.items()), "progressive")
    source = source_for(first, rows, "progressive")
    comparison = _Comparison(
        source=source,
        fit=source if fit is None else source_for(first, fit, "progressive"),
        sizes=sizes_of(sizes, families),
        language=_Language.of(model, data, settings),
        settings=settings,
        progress=progress or silent,
    )
    for family in families:
        comparison.add(family)
    saes_by_name = list(named.items())
    told = warnings_between(saes_by_name) + warnings_on_rows(saes_by_name, source)
    return replace(comparison.result(), warnings=told)


def _check_rankings(by: Sequence[str], families: Sequence[Family], *, has_model: bool) -> None:
    known = [*ORDERS, *ATTRIBUTIONS, *sorted(_carried(families))]
    for each in by:
        if each not in known:
            written = " Stability is written by `saekit compare --write`." if each in ("stability", "alignment") else ""
            raise ConfigError(
                f"progressive: `by` must name rankings; got `{each}`. {did_you_mean(each, known)}{written}"
            )
        if each in ATTRIBUTIONS and not has_model:
            raise ConfigError(
                f"progressive: `{each}` is a gradient of a language model; got none. "
                "Pass `model` and `data` with the rows."
            )


def _carried(families: Sequence[Family]) -> set[str]:
    """Return the scores that all the SAEs to be pruned carry."""
    scores = [set(sae.scores) for each in families if not each.is_nested for sae in each.widest.values()]
    return set.intersection(*scores) if scores else set()


@dataclass(frozen=True)
class _Language:
    """The language model and its texts, read once for all SAEs."""

    model: LanguageModel | None = None
    data: Any = None
    """Texts of the cross-entropies."""
    ranked_on: Texts | None = None
    """Texts of the gradients; None without rankings by gradient."""

    @classmethod
    def of(cls, model: Any, data: Any, settings: ProgressiveSettings) -> _Language:
        by_gradient = bool(set(settings.by) & set(ATTRIBUTIONS))
        if model is None or data is None or (settings.tokens == 0 and not by_gradient):
            return cls(model, data)
        parts = 2 if by_gradient else 1
        characters = parts * (settings.tokens or CE_TOKENS) * CHARACTERS_PER_TOKEN
        texts = read_texts(data, text=settings.text, columns=(), characters=characters)
        if not by_gradient:
            return cls(load_language_model(model), texts)
        ranked_on, measured_on = text_halves(texts)
        return cls(load_language_model(model), measured_on, ranked_on)


@dataclass
class _Comparison:
    """Everything that is measured, family by family."""

    source: Source
    fit: Source
    sizes: list[int]
    language: _Language
    settings: ProgressiveSettings
    progress: Progress
    runs: list[tuple[str, int, SizeCurve]] = field(default_factory=list)
    """Way, seed and curve."""
    rankings: list[Ranking] = field(default_factory=list)
    spectra: list[Ranking] = field(default_factory=list)
    kept: dict[tuple[str, int], list[SAE]] = field(default_factory=dict)
    """By way and size, one per seed."""

    def add(self, family: Family) -> None:
        """Measure the SAEs of one architecture."""
        for name, sae in family.widest.items():
            own = [size for size in self.sizes if size <= sae.n_latents]
            if family.is_nested:
                self._add(family.arch, sae, own, self._nested(sae, own, name))
            else:
                self._prune(family.arch, sae, own, name)
        for seed, trained in family.separate.items():
            saes = [trained[size] for size in self.sizes if size in trained]
            if saes:
                way = f"{family.arch} trained separately"
                self.runs.append((way, seed, self._measured(saes, None, f"{family.arch}, seed {seed}")))
                for small in saes:
                    self._keep(way, small, [small.n_latents])

    def _add(self, way: str, sae: SAE, sizes: list[int], curve: SizeCurve) -> None:
        self.runs.append((way, seed_of(sae), curve))
        self._keep(way, sae, sizes)

    def _keep(self, way: str, sae: SAE, sizes: list[int]) -> None:
        for size in sizes if self.settings.latents else ():
            self.kept.setdefault((way, size), []).append(sae.take(size))

    def _measured(
        self, sae: SAE | list[SAE], sizes: list[int] | None, name: str, selection: str = "before"
    ) -> SizeCurve:
        return measure_sizes(
            sae,
            self.source,
            sizes,
            model=self.language.model,
            data=self.language.data,
            name=name,
            settings=part_of(self.settings, SizeSettings, selection=selection),
            progress=self.progress,
        )

    def _nested(self, sae: SAE, sizes: list[int], name: str) -> SizeCurve:
        """Measure prefixes as they were trained: with the k of each size, or with the whole selection cut."""
        how = training_config(sae).get("k_per_size")
        if how == "scaled" and isinstance(sae.rule, TopKRule):
            small = []
            for size in sizes:
                k = min(size, max(1, round(sae.rule.k * size / sae.n_latents)))
                small.append(sae.take(size).with_k(k))
            return self._measured(small, None, name)
        return self._measured(sae, sizes, name, "after" if how == "truncated" and competes(sae) else "before")

    def _prune(self, arch: str, sae: SAE, sizes: list[int], name: str) -> None:
        """Measure the prefixes of one SAE in every order."""
        for by, ranked in self._ranked(sae, name).items():
            self._add(f"{arch} {_way(by)}", ranked, sizes, self._measured(ranked, sizes, f"{name}, {by}"))
        self.spectra.append(_falling(name, "decoder covariance", decoder_spectrum(sae).numpy()))

    def _ranked(self, sae: SAE, name: str) -> dict[str, SAE]:
        """Return the SAE in every order, and keep how its scores fall off."""
        scores = None
        if set(self.settings.by) & set(SCORES):  # one pass over the rows serves all of them
            scores = importance(
                sae,
                self.fit,
                max_rows=self.settings.max_rows,
                batch_rows=self.settings.batch_rows,
                progress=self.progress,
            )
            falling = [each for each in self.settings.by if each in SCORES]
            self.rankings += [_falling(name, each, scores.scores[each].numpy()) for each in falling]
        if self.language.ranked_on is not None:
            sae = self._with_gradients(sae, name)
        return {each: self._order(sae, each, scores) for each in self.settings.by}

    def _with_gradients(self, sae: SAE, name: str) -> SAE:
        lm, texts = self.language.model, self.language.ranked_on
        assert lm is not None
        place = place_of(sae, self.source.info, where="progressive", name=f"`{name}`")
        tokens = self.settings.tokens or CE_TOKENS
        target = self.source.info.get("hook_out") if sae.is_transcoder else None
        how = AttributionSettings(target=target)
        found = attribution(sae, lm, texts, hook=place, tokens=tokens, settings=how, progress=self.progress)
        wanted = [each for each in self.settings.by if each in ATTRIBUTIONS]
        self.rankings += [_falling(name, each, found.scores[each].numpy()) for each in wanted]
        return sae.with_scores(**{each: found.scores[each] for each in wanted})

    def _order(self, sae: SAE, by: str, scores: Importance | None) -> SAE:
        """Return the SAE ranked by one name; `scores` are those that were measured on the rows."""
        settings = self.settings
        if scores is None or by not in SCORES:
            rows = self.fit if by in ORDERS else None  # what the SAE carries needs no rows
            return rank(
                sae, rows, by=by, max_rows=settings.max_rows, batch_rows=settings.batch_rows, seed=settings.seed
            )
        ordered = rank(sae, by=scores.scores[by])
        ranking = {**ordered.provenance["ranking"], "by": by, "n_rows": scores.n_rows, **scores.rows}
        return ordered.replace(provenance={**ordered.provenance, "latent_order": by, "ranking": ranking})

    def result(self) -> Progressive:
        """Return what was measured, with means and differences over seeds."""
        points: dict[tuple[str, int], dict[int, SizePoint]] = {}
        for way, seed, curve in self.runs:
            for point in curve.points:
                points.setdefault((way, point.size), {})[seed] = point
        values = {key: {seed: point.metrics for seed, point in own.items()} for key, own in points.items()}
        first = self.runs[0][2]
        info = {key: self.fit.info.get(key) for key in ("model", "hook", "data", "digest", "part")}
        kept = {key: value for key, value in first.settings.items() if key not in ("selection", "each_size")}
        by = list(self.settings.by)
        ranked_on = {key: value for key, value in info.items() if value}
        return Progressive(
            saekit=first.saekit,
            versions=first.versions,
            settings={**kept, "sizes": self.sizes, "by": by, "ranked_on": ranked_on},
            rows=first.rows,
            n_rows=first.n_rows,
            language_model=first.language_model,
            curves=curves_over_seeds(points, self._overlaps()),
            differences=paired_differences(values, by),
            rankings=self.rankings,
            spectra=self.spectra,
            runs=[curve for _, _, curve in self.runs],
        )

    def _overlaps(self) -> dict[tuple[str, int], Measured]:
        """Return the fraction of latents that seeds share, for every way and size."""
        found: dict[tuple[str, int], Measured] = {}
        same: dict[tuple[int, ...], Measured] = {}  # all latents of an SAE are the same ones in every order
        for done, ((way, size), saes) in enumerate(self.kept.items(), start=1):
            if len(saes) > 1:
                key = tuple(hash(frozenset(row.tobytes() for row in sae.W_dec.float().cpu().numpy())) for sae in saes)
                if key not in same:
                    same[key] = seed_overlap(saes)
                found[way, size] = same[key]
            self.progress("overlap", done, len(self.kept))
        return found


def _way(label: str) -> str:
    return label if label == "unsorted" else "in random order" if label == "random" else f"pruned by {label}"


def _falling(name: str, by: str, values: np.ndarray) -> Ranking:
    """Return sorted values at some ranks, with their power law."""
    ordered = np.sort(values)[::-1]
    ranks = np.unique(np.geomspace(1, len(ordered), min(64, len(ordered))).round().astype(int))
    alive = ordered[ordered > 0]
    fit = power_law(torch.from_numpy(values.copy())) if len(alive) >= 10 and alive[0] != alive[-1] else None
    return Ranking(name, by, fit, [int(r) for r in ranks], [float(ordered[r - 1]) for r in ranks])
