"""One SAE for every size? Pruned, nested (Matryoshka) and separately trained SAEs, and unsorted prefixes.

The comparison of 2505.00190: at every size, how much fidelity does each way of getting a small SAE keep.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch

from ..errors import ConfigError, FormatError, did_you_mean
from ..files import digest_bytes
from ..grid import Cell, Sharing, compute_cells
from ..inputs.texts import Texts, read_texts
from ..measure.fidelity import CHARACTERS_PER_TOKEN
from ..measure.importance import SCORES, Importance, importance
from ..measure.results import Measured, Result
from ..measure.settings import CE_TOKENS
from ..models.language import LanguageModel
from ..models.loading import load_language_model
from ..places import warnings_between
from ..progress import shows_progress
from ..provenance import library_versions, place_of, release
from ..ranks import refuse_unsplit
from ..rows.opening import source_for, warnings_on_rows
from ..rows.origin import refuse_unread
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
    refuse_unsplit("progressive")
    return compare_sizes(
        plan_progressive(saes, rows, fit=fit, sizes=sizes, model=model, data=data, settings=settings, progress=progress)
    )


def plan_progressive(
    saes: Mapping[str, SAE] | Sequence[SAE | str | os.PathLike[str]] | SAE | str | os.PathLike[str],
    rows: Any,
    *,
    fit: Any = None,
    sizes: Sequence[int] | None = None,
    model: Any = None,
    data: Any = None,
    settings: ProgressiveSettings = ProgressiveSettings(),
    progress: Progress | None = None,
) -> ProgressivePlan:
    """Return what `progressive` will measure, checked; see there."""
    refuse_unread(model, data, "progressive")
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
    jobs = [job for family in families for job in _jobs_of(family, comparison.sizes)]
    return ProgressivePlan(named, comparison, tuple(jobs))


def compare_sizes(plan: ProgressivePlan, folder: Path | None = None, sharing: Sharing = Sharing()) -> Progressive:
    """Measure what is planned; with a folder together with other processes, see `saekit.grid`.

    Raises
    ------
    ConfigError
        A process with other settings works in the folder.
    """
    if folder is None:
        parts = [plan.comparison.measured(job) for job in plan.jobs]
    else:
        compute_parts(plan, folder, sharing)
        parts = [Part.load(folder / PARTS / plan.file_of(job)) for job in plan.jobs]
    saes_by_name = list(plan.named.items())
    told = warnings_between(saes_by_name) + warnings_on_rows(saes_by_name, plan.comparison.source)
    return replace(plan.comparison.result(plan.jobs, parts), warnings=told)


def compute_parts(plan: ProgressivePlan, folder: Path, sharing: Sharing) -> int:
    """Measure the parts that a folder lacks, together with other processes; return how many are there.

    Raises
    ------
    ConfigError
        A process with other settings works in the folder.
    """
    place = folder / PARTS
    cells = [
        Cell(
            name=job.name,
            is_done=partial(_is_there, place / plan.file_of(job)),
            compute=partial(plan.comparison.measured, job),
            store=partial(_store, place / plan.file_of(job)),
        )
        for job in plan.jobs
    ]
    compute_cells(folder, cells, facts=plan.facts(), sharing=sharing, progress=plan.comparison.progress)
    return sum(cell.is_done() for cell in cells)


def _is_there(path: Path) -> bool:
    try:
        Part.load(path)
    except (FormatError, OSError):
        return False
    return True


def _store(path: Path, part: Part) -> None:
    part.save(path)


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


@dataclass(frozen=True)
class Run:
    """A curve of a way of getting small SAEs."""

    way: str
    seed: int
    curve: SizeCurve


@dataclass(frozen=True)
class Kept:
    """Which latents a way keeps, where seeds are compared latent by latent."""

    way: str
    sizes: list[int]
    order: list[int] | None
    """All latents of the SAE by importance; None where each size is an SAE of its own."""


@dataclass(frozen=True, repr=False)
class Part(Result):
    """What was measured of one SAE, or of the separately trained ones of a seed."""

    KIND: ClassVar[str] = "progressive_part"
    SCHEMA: ClassVar[int] = 1

    runs: list[Run]
    rankings: list[Ranking]
    spectra: list[Ranking]
    kept: list[Kept]


@dataclass(frozen=True, eq=False)
class _Job:
    """What is measured by itself: an SAE and its prefixes, or the separately trained ones of a seed."""

    family: Family
    name: str
    """Name of the widest SAE; or what the separate ones are called."""
    saes: tuple[SAE, ...]
    is_separate: bool

    @property
    def seed(self) -> int:
        return seed_of(self.saes[0])


def _jobs_of(family: Family, sizes: Sequence[int]) -> Iterator[_Job]:
    for name, sae in family.widest.items():
        yield _Job(family, name, (sae,), is_separate=False)
    for seed, trained in family.separate.items():
        if small := tuple(trained[size] for size in sizes if size in trained):
            yield _Job(family, f"{family.arch}, seed {seed}", small, is_separate=True)


@dataclass(frozen=True, eq=False)
class ProgressivePlan:
    """What a comparison of sizes measures, with everything checked and nothing computed."""

    named: dict[str, SAE]
    comparison: _Comparison
    jobs: tuple[_Job, ...]

    def facts(self) -> dict[str, Any]:
        """Return what all numbers depend on, besides the SAEs."""
        c, language = self.comparison, self.comparison.language
        texts = language.data.info if isinstance(language.data, Texts) else str(language.data)
        model = language.model.digest if isinstance(language.model, LanguageModel) else str(language.model)
        return {
            "versions": library_versions(True),
            "settings": asdict(c.settings),
            "sizes": list(c.sizes),
            "rows": dict(c.source.info),
            "ranked_on": dict(c.fit.info),
            "texts": texts,
            "model": model,
        }

    def file_of(self, job: _Job) -> str:
        """Return the name of the file of a part: a digest of everything that its numbers depend on."""
        saes = [sae.digest() for sae in job.saes]
        about = [release(), self.facts(), job.family.arch, job.name, job.is_separate, saes]
        return f"{digest_bytes(json.dumps(about, sort_keys=True, default=str).encode())[7:27]}.json"


PARTS = "parts"
"""Folder of the parts within the output folder."""


@dataclass(frozen=True)
class _Comparison:
    """What everything is measured on, and how."""

    source: Source
    fit: Source
    sizes: list[int]
    language: _Language
    settings: ProgressiveSettings
    progress: Progress

    def measured(self, job: _Job) -> Part:
        """Measure one part."""
        versions = library_versions(True)
        part = Part(saekit=release(), versions=versions, settings={}, runs=[], rankings=[], spectra=[], kept=[])
        family, sae = job.family, job.saes[0]
        if job.is_separate:
            way = f"{family.arch} trained separately"
            curve = self._measured(list(job.saes), None, job.name)
            part.runs.append(Run(way, job.seed, curve))
            part.kept.append(Kept(way, [small.n_latents for small in job.saes], None))
            return part
        own = [size for size in self.sizes if size <= sae.n_latents]
        if family.is_nested:
            part.runs.append(Run(family.arch, job.seed, self._nested(sae, own, job.name)))
            part.kept.append(Kept(family.arch, own, list(range(sae.n_latents))))
            return part
        for by, ranked in self._ranked(sae, job.name, part).items():
            way = f"{family.arch} {_way(by)}"
            part.runs.append(Run(way, job.seed, self._measured(ranked, own, f"{job.name}, {by}")))
            part.kept.append(Kept(way, own, _order_of(sae, ranked) if self.settings.latents else []))
        part.spectra.append(_falling(job.name, "decoder covariance", decoder_spectrum(sae).numpy()))
        return part

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

    def _ranked(self, sae: SAE, name: str, part: Part) -> dict[str, SAE]:
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
            part.rankings.extend(_falling(name, each, scores.scores[each].numpy()) for each in falling)
        if self.language.ranked_on is not None:
            sae = self._with_gradients(sae, name, part)
        return {each: self._order(sae, each, scores) for each in self.settings.by}

    def _with_gradients(self, sae: SAE, name: str, part: Part) -> SAE:
        lm, texts = self.language.model, self.language.ranked_on
        assert lm is not None
        place = place_of(sae, self.source.info, where="progressive", name=f"`{name}`")
        tokens = self.settings.tokens or CE_TOKENS
        target = self.source.info.get("hook_out") if sae.is_transcoder else None
        how = AttributionSettings(target=target)
        found = attribution(sae, lm, texts, hook=place, tokens=tokens, settings=how, progress=self.progress)
        wanted = [each for each in self.settings.by if each in ATTRIBUTIONS]
        part.rankings.extend(_falling(name, each, found.scores[each].numpy()) for each in wanted)
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

    def result(self, jobs: Sequence[_Job], parts: Sequence[Part]) -> Progressive:
        """Return what was measured, with means and differences over seeds."""
        points: dict[tuple[str, int], dict[int, SizePoint]] = {}
        runs = [run for part in parts for run in part.runs]
        for run in runs:
            for point in run.curve.points:
                points.setdefault((run.way, point.size), {})[run.seed] = point
        values = {key: {seed: point.metrics for seed, point in own.items()} for key, own in points.items()}
        first = runs[0].curve
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
            curves=curves_over_seeds(points, self._overlaps(jobs, parts)),
            differences=paired_differences(values, by),
            rankings=[each for part in parts for each in part.rankings],
            spectra=[each for part in parts for each in part.spectra],
            runs=[run.curve for run in runs],
        )

    def _overlaps(self, jobs: Sequence[_Job], parts: Sequence[Part]) -> dict[tuple[str, int], Measured]:
        """Return the fraction of latents that seeds share, for every way and size."""
        found: dict[tuple[str, int], Measured] = {}
        if not self.settings.latents:
            return found
        small: dict[tuple[str, int], list[SAE]] = {}
        for job, part in zip(jobs, parts):
            for kept in part.kept:
                of_size = {sae.n_latents: sae for sae in job.saes}
                for size in kept.sizes:
                    sae = of_size[size] if kept.order is None else _first(job.saes[0], kept.order, size)
                    small.setdefault((kept.way, size), []).append(sae)
        same: dict[tuple[int, ...], Measured] = {}  # all latents of an SAE are the same ones in every order
        for done, ((way, size), saes) in enumerate(small.items(), start=1):
            if len(saes) > 1:
                key = tuple(hash(frozenset(row.tobytes() for row in sae.W_dec.float().cpu().numpy())) for sae in saes)
                if key not in same:
                    same[key] = seed_overlap(saes)
                found[way, size] = same[key]
            self.progress("overlap", done, len(small))
        return found


def _order_of(sae: SAE, ranked: SAE) -> list[int]:
    """Return the latents of an SAE in the order of `ranked`; latents that are equal may stand for each other."""

    def latents(of: SAE) -> list[bytes]:
        parts = [t.detach().float().cpu().numpy() for t in (of.W_enc, of.b_enc[:, None], of.W_dec)]
        return [row.tobytes() for row in np.concatenate(parts, axis=1)]

    places: dict[bytes, list[int]] = {}
    for j, latent in enumerate(latents(sae)):
        places.setdefault(latent, []).append(j)
    return [places[latent].pop(0) for latent in latents(ranked)]


def _first(sae: SAE, order: Sequence[int], size: int) -> SAE:
    return sae.permute(torch.tensor(order)).take(size)


def _way(label: str) -> str:
    return label if label == "unsorted" else "in random order" if label == "random" else f"pruned by {label}"


def _falling(name: str, by: str, values: np.ndarray) -> Ranking:
    """Return sorted values at some ranks, with their power law."""
    ordered = np.sort(values)[::-1]
    ranks = np.unique(np.geomspace(1, len(ordered), min(64, len(ordered))).round().astype(int))
    alive = ordered[ordered > 0]
    fit = power_law(torch.from_numpy(values.copy())) if len(alive) >= 10 and alive[0] != alive[-1] else None
    return Ranking(name, by, fit, [int(r) for r in ranks], [float(ordered[r - 1]) for r in ranks])
