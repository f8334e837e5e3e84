"""What latents are that no other seed finds: how they differ from shared ones, what they carry, what they span."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from ..errors import ConfigError, DataError, ShapeError
from ..measure.bootstrap import LEVEL
from ..measure.chance import against_chance
from ..measure.fidelity import SplicedModel
from ..measure.importance import ImportanceSums
from ..measure.pca import Covariance
from ..measure.reconstruction import measure_saes
from ..measure.redundancy import max_cosines
from ..measure.results import Measured, Result
from ..measure.settings import MeasureSettings
from ..measure.token_statistics import TokenScores, token_detection
from ..models.language import LanguageModel
from ..provenance import library_versions, release, sae_digest
from ..rows.opening import Rows, as_source, facts_of
from ..rows.source import Source
from ..sae.model import SAE
from ..sae.naming import Given, common_width, named_saes
from ..settings import Progress, suggest_keywords
from .result import Comparison
from .run import compare
from .settings import ComparisonSettings, OrphanSettings

PROPERTIES = {
    "frequency": "share of rows on which it fires",
    "activation": "mean code where it fires",
    "decoder_norm": "length of its decoder row",
    "encoder_norm": "length of its encoder row",
    "neighbour": "largest cosine of its decoder row with another of the same SAE",
    "loss": "what removing it adds to FVU, the other codes as they are",
    "lift": "divergence of its tokens from all tokens, above that of chance firings of its frequency, in nats",
    "detection": "how well tokens of other documents tell where it fires: area under the ROC curve",
}
"""What latents are compared by; the last two need rows that know their tokens."""

FREQUENCY_STEP = 0.25
"""Width of the classes within which frequencies count as equal. Unit: powers of two."""

NULL_DRAWS = 200
"""Random subspaces behind the null of an overlap."""

LEAST = 2
"""Latents of each kind that an SAE needs to take part."""


@dataclass(frozen=True)
class Property:
    """One property of orphans beside that of shared latents."""

    name: str
    meaning: str
    orphans: Measured
    """Median over the orphans of an SAE: mean over SAEs."""
    shared: Measured
    """Median over the shared latents."""
    auc: Measured
    """Chance that an orphan has more of it than a shared latent, mean over SAEs; ties count half, 0.5: none."""
    p: float | None
    """Two-sided Mann-Whitney test: the largest p over the SAEs, times the number of properties (at most 1)."""
    auc_matched: Measured
    """The same chance among orphans and shared latents of equal frequency."""
    p_matched: float | None


@dataclass(frozen=True)
class Silenced:
    """What it costs to keep some latents from writing."""

    latents: str
    """Which."""
    n_latents: float
    """How many, mean over SAEs."""
    fvu: Measured
    """Rise of FVU: mean over SAEs."""
    ce: Measured | None
    """Rise of the language model's cross-entropy, in nats per token; None without one."""


@dataclass(frozen=True)
class Span:
    """How alike the subspaces are that latents of two seeds span: mean squared cosine of their principal angles."""

    rank: int
    """Dimensions of each subspace: those in which the unit decoder rows are longest."""
    orphans: Measured
    """Orphans of one SAE against orphans of another: mean over pairs."""
    shared: Measured
    """Shared latents against shared latents."""
    null: Measured
    """Random subspaces: rank / d is expected; the interval holds 95 % of draws."""
    rows: Measured | None
    """Orphans against the principal components of the rows: what the data alone explains."""


@dataclass(frozen=True, repr=False)
class Orphans(Result):
    """Latents that none of the other SAEs has, beside those that at least one other has.

    SAEs are what intervals are about: each gives one number, and Student's t says how sure their mean is.

    Examples
    --------
    ::

        found = sk.orphans(saes, rows)
        found.property("frequency").auc         # 0.31: orphans are rarer
        found.spans[0].orphans, found.spans[0].null
    """

    KIND: ClassVar[str] = "orphans"
    SCHEMA: ClassVar[int] = 1

    rows: dict[str, Any]
    """Where the rows come from."""
    n_rows: int
    """Rows that properties were measured on."""
    language_model: dict[str, Any] | None
    """Model and texts of the cross-entropies."""
    names: list[str]
    """The SAEs."""
    n_orphans: list[int]
    """Of each SAE."""
    n_shared: list[int]
    properties: list[Property] = field(default_factory=list)
    silenced: list[Silenced] = field(default_factory=list)
    fvu_difference: Measured | None = None
    """Rise of FVU without matched orphans minus that without as many shared latents of equal frequency."""
    ce_difference: Measured | None = None
    """The same of cross-entropy."""
    spans: list[Span] = field(default_factory=list)

    def property(self, name: str) -> Property:
        """One of `properties`.

        Raises
        ------
        KeyError
            It was not measured.
        """
        return {each.name: each for each in self.properties}[name]

    def table(self) -> list[list[str]]:
        """Rows of text, headings first: properties, what silencing costs, spans."""
        lines = [["", "orphans", "shared", "AUC", "p", "AUC, equal frequency", "p "]]
        for each in self.properties:
            p = ["–" if value is None else f"{value:.2g}" for value in (each.p, each.p_matched)]
            found = map(str, (each.orphans, each.shared, each.auc))
            lines.append([each.name, *found, p[0], str(each.auc_matched), p[1]])
        return lines

    def caption(self) -> str:
        """One line under the table."""
        orphans, shared = sum(self.n_orphans), sum(self.n_shared)
        parts = [f"{orphans:,} orphans and {shared:,} shared latents of {len(self.names)} SAEs"]
        if self.fvu_difference is not None:
            parts.append(f"FVU lost without orphans minus without as many shared ones: {self.fvu_difference}")
        if self.ce_difference is not None:
            parts.append(f"cross-entropy: {self.ce_difference}")
        if self.spans:
            span = self.spans[0]
            parts.append(
                f"overlap of spans of rank {span.rank}: {span.orphans} (shared {span.shared}, null {span.null})"
            )
        return "; ".join(parts)


@suggest_keywords
def orphans(
    saes: Sequence[Given],
    rows: Rows,
    *,
    comparison: Comparison | None = None,
    model: str | os.PathLike[str] | LanguageModel | None = None,
    data: Any = None,
    settings: OrphanSettings = OrphanSettings(),
    progress: Progress | None = None,
) -> Orphans:
    """Measure how latents that no other seed finds differ from those that another finds.

    Parameters
    ----------
    saes
        Two SAEs or more of one hook, differing in their seeds: values or paths.
    rows
        Rows to measure on: a source, an array ``[n, d_in]``, or a path. Rows that know their tokens and documents give
        scores of interpretability too.
    comparison
        What `compare` found about these SAEs, in this order; None: it is made here.
    model, data
        A language model and texts, for what ablating latents does to its cross-entropy; see `evaluate`.
    settings
        How many rows and tokens, which ranks of subspaces.
    progress
        Called as ``progress(stage, done, total)``.

    Returns
    -------
    Orphans
        Properties with their AUC, plain and among latents of equal frequency; costs of ablation; spans.

    Raises
    ------
    ConfigError
        Fewer than two SAEs, a comparison of others, or a setting out of range.
    DataError
        No rows, or no SAE has at least two orphans and two shared latents.
    ShapeError
        Rows of another width, or SAEs that are transcoders.
    """
    if isinstance(saes, SAE | str | os.PathLike) or len(saes) < 2:
        raise ConfigError("orphans: at least two SAEs must be given; an orphan is what no other has.")
    named = named_saes(saes, "orphans")
    source = as_source(rows, named[0][1].d_in, "orphans")
    comparison = comparison or compare(
        [sae for _, sae in named], settings=ComparisonSettings(controls=False), progress=progress
    )
    _check(named, comparison, settings.ranks)
    kinds = [np.asarray(each.stability) > 0 for each in comparison.saes]
    part = [at for at, shared in enumerate(kinds) if min(int(shared.sum()), int((~shared).sum())) >= LEAST]
    if not part:
        counts = [(int((~shared).sum()), int(shared.sum())) for shared in kinds]
        raise DataError(
            f"orphans: an SAE needs at least {LEAST} orphans and {LEAST} shared latents; they have {counts} (orphans, "
            "shared). Train longer, or move the threshold of the comparison."
        )
    measured, n_rows, components = _measure([sae for _, sae in named], source, settings, progress)
    generator = np.random.default_rng(settings.seed)
    matched = {at: frequency_matched(measured[at]["frequency"], kinds[at], generator) for at in part}
    properties = _properties(measured, kinds, matched, part)
    silenced, differences, language = _silence(named, kinds, matched, part, source, model, data, settings, progress)
    return Orphans(
        saekit=release(),
        versions=library_versions(model is not None),
        settings={
            "threshold": comparison.settings["threshold"],
            "strict": comparison.settings["strict"],
            "orphan": "no other SAE has it",
            "shared": "at least one other SAE has it",
            "equal_frequency": f"within classes of 2^{FREQUENCY_STEP}, as many of each",
            "rows": settings.max_rows,
            "batch_rows": settings.batch_rows,
            "seed": settings.seed,
            "intervals": {"level": LEVEL, "over": "SAEs (Student's t), latents of one kind where there are two"},
        },
        rows=facts_of(source),
        n_rows=n_rows,
        language_model=language,
        names=[name for name, _ in named],
        n_orphans=[int((~shared).sum()) for shared in kinds],
        n_shared=[int(shared.sum()) for shared in kinds],
        properties=properties,
        silenced=silenced,
        fvu_difference=differences.get("fvu"),
        ce_difference=differences.get("ce"),
        spans=_spans([sae for _, sae in named], kinds, settings, components),
    )


def _check(named: list[tuple[str, SAE]], comparison: Comparison, ranks: Sequence[int] | None) -> None:
    found = [each.sae["digest"] for each in comparison.saes]
    if found != [sae_digest(sae) for _, sae in named]:
        raise ConfigError(
            f"orphans: `comparison` must be of these {len(named)} SAEs, in this order; it is of "
            f"{', '.join(each.name for each in comparison.saes)}. Compare them again."
        )
    d = named[0][1].d_out
    if ranks is not None and (not ranks or any(not 1 <= rank < d for rank in ranks)):
        raise ConfigError(f"orphans: `ranks` must lie within 1..{d - 1}, below the width of the rows; got {ranks!r}.")


# ------------------------------------------------------------------------------------------------------- properties


def _measure(
    saes: list[SAE], source: Source, settings: OrphanSettings, progress: Progress | None
) -> tuple[list[dict[str, np.ndarray]], int, Tensor]:
    """Properties per SAE and latent, the rows seen, and the principal components of the rows ``[d, d]``."""
    limit, seed = settings.max_rows, settings.seed
    scores = [ImportanceSums(sae) for sae in saes]
    tokens = [(TokenScores(sae.n_latents), TokenScores(sae.n_latents)) for sae in saes]
    covariance = Covariance(source.d_in)
    known, done = True, 0
    numbers: dict[int, int] = {}
    for batch in source.batches(settings.batch_rows):
        x = batch.x if limit is None else batch.x[: limit - done]
        covariance.update(x.float().cpu())
        place = torch.arange(done, done + len(x)) // 64
        document = place if batch.document is None else torch.where(batch.document >= 0, batch.document, -1)[: len(x)]
        halves = _halves(document, numbers)
        known &= batch.token is not None and bool((batch.token[: len(x)] >= 0).all())
        for sae, score, (learned, scored) in zip(saes, scores, tokens, strict=True):
            with torch.no_grad():
                codes = sae.encode(x.to(sae.device, sae.dtype))
                score.update(x, codes)
            if known and batch.token is not None:
                codes = codes.to("cpu")
                for half, accumulator in enumerate((learned, scored)):
                    mine = (halves == half).nonzero().squeeze(1)
                    accumulator.update(codes.rows(mine), batch.token[: len(x)][mine], document[mine])
        done += len(x)
        if progress is not None:
            progress("rows", done, source.n_rows if limit is None else limit)
        if limit is not None and done >= limit:
            break
    if not done:
        raise DataError("orphans: there must be at least one row; the source has none. Is the data empty?")
    pca = covariance.compute()
    variance = float(pca.variance.sum())
    found = []
    for sae, score, (learned, scored) in zip(saes, scores, tokens, strict=True):
        each = score.compute().scores
        frequency = each["frequency"].numpy()
        alive = frequency > 0
        values = {
            "frequency": frequency,
            "activation": np.where(alive, each["mean"].numpy() / np.where(alive, frequency, 1.0), math.nan),
            "decoder_norm": sae.W_dec.float().norm(dim=1).cpu().numpy(),
            "encoder_norm": sae.W_enc.float().norm(dim=1).cpu().numpy(),
            "neighbour": max_cosines(sae.W_dec).cpu().numpy(),
            "loss": each["loss"].numpy() / variance,
        }
        if known and learned.n_rows and scored.n_rows:
            values["detection"] = token_detection(learned, scored).numpy()
            learned.merge(scored)
            stats = learned.compute()
            values["lift"] = (stats.lift - against_chance(learned, seed=seed)["lift"].chance).numpy()
        found.append({name: np.asarray(value, dtype=float) for name, value in values.items()})
    return found, done, pca.components


def _halves(document: Tensor, numbers: dict[int, int]) -> Tensor:
    """0 or 1 for every row: every second document, as they come (ids may all be odd, say); `numbers` remembers them."""
    ids, first, back = np.unique(document.numpy(), return_index=True, return_inverse=True)
    for at in np.argsort(first):
        numbers.setdefault(int(ids[at]), len(numbers))
    return torch.from_numpy(np.array([numbers[int(each)] % 2 for each in ids])[back])


def frequency_matched(
    frequency: np.ndarray, shared: np.ndarray, generator: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """As many orphans and shared latents of each class of frequency as there are of both; dead latents are left out.

    Parameters
    ----------
    frequency
        ``[n]`` share of rows on which each latent fires.
    shared
        ``bool [n]``; the others are orphans.
    generator
        Draws where a class has more of one kind.

    Returns
    -------
    tuple
        Latents: orphans, and shared ones of the same frequencies; equally many.
    """
    alive = frequency > 0
    classes = np.full(len(frequency), np.iinfo(np.int64).min)
    classes[alive] = np.floor(np.log2(frequency[alive]) / FREQUENCY_STEP).astype(np.int64)
    picked: tuple[list[np.ndarray], list[np.ndarray]] = ([], [])
    for each in np.unique(classes[alive]):
        members = [np.flatnonzero((classes == each) & (shared == kind)) for kind in (False, True)]
        count = min(len(some) for some in members)
        for into, some in zip(picked, members, strict=True):
            into.append(np.sort(generator.permutation(some)[:count]))
    empty = [np.zeros(0, dtype=np.int64)]
    return np.concatenate(empty + picked[0]), np.concatenate(empty + picked[1])


def _properties(
    measured: list[dict[str, np.ndarray]],
    kinds: list[np.ndarray],
    matched: dict[int, tuple[np.ndarray, np.ndarray]],
    part: list[int],
) -> list[Property]:
    names = [name for name in PROPERTIES if name in measured[0]]
    # A property that is the same for all latents (unit decoder rows) says nothing and costs the others nothing.
    names = [name for name in names if any(np.nanstd(measured[at][name]) > 1e-5 for at in part)]
    found = []
    for name in names:
        medians: list[tuple[float, float]] = []
        plain, equal = _Tests(), _Tests()
        for at in part:
            value, shared = measured[at][name], kinds[at]
            medians.append((_median(value[~shared]), _median(value[shared])))
            plain.add(value[~shared], value[shared])
            equal.add(*(value[which] for which in matched[at]))
        units = {"frequency": "fraction of rows", "loss": "fraction of variance", "lift": "nats"}
        sides = [over_saes([pair[side] for pair in medians], units.get(name, "")) for side in (0, 1)]
        found.append(
            Property(
                name,
                PROPERTIES[name],
                sides[0],
                sides[1],
                plain.auc(),
                plain.p(len(names)),
                equal.auc(),
                equal.p(len(names)),
            )
        )
    return found


class _Tests:
    """Mann-Whitney tests, one per SAE."""

    def __init__(self) -> None:
        self.aucs: list[float] = []
        self.ps: list[float] = []
        self.errors: list[float] = []

    def add(self, orphan: np.ndarray, shared: np.ndarray) -> None:
        from scipy.stats import mannwhitneyu

        orphan, shared = orphan[np.isfinite(orphan)], shared[np.isfinite(shared)]
        if min(len(orphan), len(shared)) < LEAST:
            return
        test = mannwhitneyu(orphan, shared)
        pairs = len(orphan) * len(shared)
        self.aucs.append(float(test.statistic) / pairs)
        self.ps.append(float(test.pvalue))
        self.errors.append(math.sqrt((len(orphan) + len(shared) + 1) / (12 * pairs)))

    def auc(self) -> Measured:
        if not self.aucs:
            return Measured(math.nan, None, None, "probability", "undefined: too few latents of both kinds")
        return over_saes(self.aucs, "probability", fallback=float(np.mean(self.errors)), most=1.0)

    def p(self, tests: int) -> float | None:
        return min(1.0, max(self.ps) * tests) if self.ps else None


def over_saes(
    values: Sequence[float], unit: str = "", *, fallback: float | None = None, most: float | None = None
) -> Measured:
    """Mean over SAEs with the interval of Student's t; of one or two SAEs the error `fallback`, where it is known."""
    from scipy.stats import t

    each = np.asarray([value for value in values if math.isfinite(value)])
    if not len(each):
        return Measured(math.nan, None, None, unit, "undefined in every SAE")
    mean, n = float(each.mean()), len(each)
    reason = f"interval over {n} SAEs"
    if n >= 3:
        half = float(t.ppf((1 + LEVEL) / 2, n - 1)) * float(each.std(ddof=1)) / math.sqrt(n)
    elif fallback is not None:
        half, reason = 1.959964 * fallback, "interval over latents: it needs at least 3 SAEs to be over SAEs"
    else:
        return Measured(mean, None, None, unit, "no interval: it needs at least 3 SAEs")
    low, high = mean - half, mean + half
    return Measured(
        mean, low if most is None else max(low, 0.0), high if most is None else min(high, most), unit, reason
    )


def _median(values: np.ndarray) -> float:
    values = values[np.isfinite(values)]
    return float(np.median(values)) if len(values) else math.nan


# ------------------------------------------------------------------------------------------------------- silencing

_GROUPS = ("all orphans", "all shared", "orphans, matched", "shared, matched")


def silenced(sae: SAE, latents: Tensor | np.ndarray) -> SAE:
    """The SAE with some latents that compete as before but write nothing."""
    W = sae.W_dec.clone()
    W[torch.as_tensor(latents, device=W.device)] = 0
    return sae.replace(W_dec=W)


def _silence(
    named: list[tuple[str, SAE]],
    kinds: list[np.ndarray],
    matched: dict[int, tuple[np.ndarray, np.ndarray]],
    part: list[int],
    source: Source,
    model: Any,
    data: Any,
    settings: OrphanSettings,
    progress: Progress | None,
) -> tuple[list[Silenced], dict[str, Measured], dict[str, Any] | None]:
    arms: list[SAE] = []
    counts = np.zeros((len(part), len(_GROUPS)))
    for row, at in enumerate(part):
        sae = named[at][1]
        groups = [np.flatnonzero(~kinds[at]), np.flatnonzero(kinds[at]), *matched[at]]
        counts[row] = [len(group) for group in groups]
        arms += [sae, *(silenced(sae, group) for group in groups)]
    common_width(named, "orphans")
    spliced = None
    if model is not None:
        spliced = SplicedModel.of(model, data, arms, source, settings, "orphans")
    measured = MeasureSettings(max_rows=settings.max_rows, batch_rows=settings.batch_rows, draws=0)
    found = measure_saes(arms, source, spliced=spliced, settings=measured, progress=progress)
    metrics = [found.metrics(at) for at in range(len(arms))]
    width = 1 + len(_GROUPS)
    rises: dict[str, np.ndarray] = {}
    for name, key in (("fvu", "fvu"), ("ce", "ce_sae")):
        if key in metrics[0]:
            value = np.array([each[key].value for each in metrics]).reshape(len(part), width)
            rises[name] = value[:, 1:] - value[:, :1]
    units = {"fvu": "fraction", "ce": "nats per token"}
    listed = [
        Silenced(
            group,
            float(counts[:, place].mean()),
            over_saes(rises["fvu"][:, place].tolist(), units["fvu"]),
            over_saes(rises["ce"][:, place].tolist(), units["ce"]) if "ce" in rises else None,
        )
        for place, group in enumerate(_GROUPS)
    ]
    differences = {name: over_saes((value[:, 2] - value[:, 3]).tolist(), units[name]) for name, value in rises.items()}
    return listed, differences, found.language_model


# ------------------------------------------------------------------------------------------------------- subspaces


def span_of(rows: Tensor, rank: int) -> Tensor:
    """Orthonormal basis ``[rank, d]`` of the directions in which unit rows ``[n, d]`` are longest.

    Raises
    ------
    ShapeError
        Fewer rows than dimensions asked for.
    """
    if len(rows) < rank:
        raise ShapeError(f"span_of: {rank} dimensions need at least as many rows; got {len(rows)}. Lower the rank.")
    unit = rows.double() / rows.double().norm(dim=1, keepdim=True).clamp_min(1e-30)
    return torch.linalg.svd(unit, full_matrices=False).Vh[:rank]


def principal_angles(a: Tensor, b: Tensor) -> Tensor:
    """Angles between the spans of the rows of two matrices, in radians, smallest first.

    Parameters
    ----------
    a, b
        ``[r_a, d]`` and ``[r_b, d]`` of full row rank; the rows need not be orthonormal.

    Returns
    -------
    Tensor
        ``float64 [min(r_a, r_b)]``; all 0 where one span holds the other.

    Raises
    ------
    ShapeError
        Not matrices of one width.
    """
    if a.ndim != 2 or b.ndim != 2 or a.shape[1] != b.shape[1]:
        raise ShapeError(
            f"principal_angles: two matrices of one width are needed; got {tuple(a.shape)} and {tuple(b.shape)}."
        )
    one, other = (torch.linalg.qr(each.double().T).Q for each in (a, b))
    cosines = torch.linalg.svdvals(one.T @ other).clamp(0, 1)
    # Near 0 the cosine loses half of the digits; the sine of the same angle has them.
    if one.shape[1] > other.shape[1]:
        one, other = other, one
    sines = torch.linalg.svdvals(one - other @ (other.T @ one)).clamp(0, 1).flip(0)
    return torch.where(cosines**2 < 0.5, cosines.acos(), sines.asin())


def _overlap(a: Tensor, b: Tensor) -> float:
    """Mean squared cosine of the angles between two orthonormal bases."""
    return float((a @ b.T).square().sum()) / min(len(a), len(b))


def _spans(saes: list[SAE], kinds: list[np.ndarray], settings: OrphanSettings, components: Tensor) -> list[Span]:
    d = saes[0].d_out
    wanted = sorted(set(settings.ranks or [max(1, d // 8), max(1, d // 4), max(1, d // 2)]))
    rows = [sae.W_dec.float().cpu() for sae in saes]
    generator = torch.Generator().manual_seed(settings.seed)
    found = []
    for rank in wanted:
        if any(min(int(kind.sum()), int((~kind).sum())) < rank for kind in kinds):
            continue
        bases = [[span_of(W[torch.from_numpy(kind == is_shared)], rank) for W, kind in zip(rows, kinds, strict=True)]
                 for is_shared in (False, True)]  # fmt: skip
        overlaps = [[[_overlap(one, other) for other in side] for one in side] for side in bases]
        null = []
        for _ in range(NULL_DRAWS):
            one, other = (
                torch.linalg.qr(torch.randn(d, rank, generator=generator, dtype=torch.float64)).Q.T for _ in range(2)
            )
            null.append(_overlap(one, other))
        low, high = np.quantile(null, [(1 - LEVEL) / 2, (1 + LEVEL) / 2]).tolist()
        principal = components[:rank].double()
        found.append(
            Span(
                rank,
                _pairs(np.array(overlaps[0])),
                _pairs(np.array(overlaps[1])),
                Measured(rank / d, low, high, "fraction", f"expected: rank / d; 95 % of {NULL_DRAWS} random pairs"),
                over_saes([_overlap(base, principal) for base in bases[0]], "fraction"),
            )
        )
    return found


def _pairs(table: np.ndarray) -> Measured:
    """Mean over pairs of SAEs, with a jackknife that leaves out one SAE at a time."""
    from scipy.stats import t

    m = len(table)
    upper = np.triu_indices(m, 1)
    value = float(table[upper].mean())
    if m < 3:
        return Measured(value, None, None, "fraction", "no interval: one pair of SAEs")
    left_out = []
    for out in range(m):
        keep = [at for at in range(m) if at != out]
        left_out.append(table[np.ix_(keep, keep)][np.triu_indices(m - 1, 1)].mean())
    error = math.sqrt((m - 1) / m * float(np.square(np.array(left_out) - np.mean(left_out)).sum()))
    half = float(t.ppf((1 + LEVEL) / 2, m - 1)) * error
    reason = f"interval from a jackknife over {m} SAEs"
    return Measured(value, max(value - half, 0.0), min(value + half, 1.0), "fraction", reason)
