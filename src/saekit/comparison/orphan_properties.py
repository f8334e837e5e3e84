"""How orphans differ from shared latents: properties of every latent, and tests of the difference."""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ..errors import DataError
from ..measure.chance import against_chance
from ..measure.importance import ImportanceSums
from ..measure.intervals import BLOCK_ROWS
from ..measure.pca import Covariance
from ..measure.redundancy import max_cosines
from ..measure.results import Measured
from ..measure.token_statistics import TokenScores, token_detection
from ..rows.opening import target_rows
from ..rows.source import Batch, Columns, Source
from ..sae.model import SAE
from ..settings import Progress, silent
from .intervals import over_saes
from .orphans_result import Property
from .settings import OrphanSettings

PROPERTIES = {
    "frequency": "fraction of rows on which it fires",
    "activation": "mean code where it fires",
    "decoder_norm": "length of its decoder row",
    "encoder_norm": "length of its encoder row",
    "neighbour": "largest cosine of its decoder row with another of the same SAE, absolute where codes have signs",
    "loss": "what removing it adds to FVU, the other codes as they are",
    "lift": "divergence of its tokens from all tokens, above that of chance firings of its frequency, in nats",
    "detection": "how well tokens of other documents tell where it fires: area under the ROC curve",
}
"""What latents are compared by; the last two need rows that know their tokens."""

FREQUENCY_STEP = 0.25
"""Width of the classes within which frequencies count as equal. Unit: powers of two."""

MIN_LATENTS = 2
"""Latents of each kind that an SAE needs to take part."""

UNITS = {"frequency": "fraction of rows", "loss": "fraction of variance", "lift": "nats"}


@dataclass(frozen=True)
class Kinds:
    """Which latents of the SAEs are orphans, and orphans and shared latents of equal frequency."""

    shared: list[np.ndarray]
    """Per SAE ``bool [n_latents]``: whether another SAE has the latent."""
    matched: dict[int, tuple[np.ndarray, np.ndarray]]
    """By index of the SAEs that have enough of both: orphans and shared latents of the same frequencies."""


@dataclass(frozen=True)
class MeasuredLatents:
    """Properties of all latents."""

    properties: list[dict[str, np.ndarray]]
    """Per SAE: by name, a number per latent."""
    n_rows: int
    """Rows seen."""
    components: Tensor
    """Principal components of the rows that are reconstructed, or predicted, ``[d, d]``."""


class _Latents:
    """Accumulates the properties of the latents of one SAE."""

    def __init__(self, sae: SAE) -> None:
        self.sae = sae
        self.importance = ImportanceSums(sae)
        # Tokens are learned on one half of the documents, detection is scored on the other.
        self.halves = TokenScores(sae.n_latents), TokenScores(sae.n_latents)

    def update(self, rows: Columns, token: Tensor | None, document: Tensor, halves: Tensor) -> None:
        """Add rows; without tokens nothing is learned about them."""
        with torch.no_grad():
            codes = self.sae.encode(rows.x.to(self.sae.device, self.sae.dtype))
            self.importance.update(rows.x, codes, target=target_rows(rows, self.sae))
        if token is None:
            return
        codes = codes.to("cpu")
        for half, scores in enumerate(self.halves):
            mine = (halves == half).nonzero().squeeze(1)
            scores.update(codes.rows(mine), token[mine], document[mine])

    def compute(self, variance: float, *, with_tokens: bool, seed: int) -> dict[str, np.ndarray]:
        """Return the properties by name; `variance` is that of the rows."""
        sae = self.sae
        scores = self.importance.compute().scores
        frequency = scores["frequency"].numpy()
        alive = frequency > 0
        norm = sae.W_dec.float().norm(dim=1).cpu().numpy()
        values = {
            "frequency": frequency,
            "activation": np.where(alive, norm * scores["mean"].numpy() / np.where(alive, frequency, 1.0), math.nan),
            "decoder_norm": norm,
            "encoder_norm": sae.W_enc.float().norm(dim=1).cpu().numpy(),
            "neighbour": max_cosines(sae.W_dec, either_sign=sae.has_signs).cpu().numpy(),
            "loss": scores["loss"].numpy() / variance,
        }
        learned, scored = self.halves
        if with_tokens and learned.n_rows and scored.n_rows:
            values["detection"] = token_detection(learned, scored).numpy()
            learned.merge(scored)
            lift = learned.compute().lift
            values["lift"] = (lift - against_chance(learned, seed=seed)["lift"].chance).numpy()
        return {name: np.asarray(value, dtype=float) for name, value in values.items()}


def measure_latents(
    saes: Sequence[SAE], source: Source, settings: OrphanSettings, progress: Progress | None
) -> MeasuredLatents:
    """Measure properties of all latents, in one pass over the rows.

    Raises
    ------
    DataError
        No rows.
    """
    tell = progress or silent
    latents = [_Latents(sae) for sae in saes]
    covariance = Covariance(saes[0].d_out)
    limit = settings.max_rows or sys.maxsize
    with_tokens, done = True, 0
    numbers: dict[int, int] = {}
    for batch in source.batches(settings.batch_rows):
        rows = batch.map(lambda column, room=limit - done: column[:room])  # type: ignore[misc]
        x = rows.x
        covariance.update(target_rows(rows, saes[0]).float().cpu())
        document = _documents(batch, done)[: len(x)]
        halves = _halves(document, numbers)
        token = None if batch.token is None else batch.token[: len(x)]
        with_tokens &= token is not None and bool((token >= 0).all())
        for each in latents:
            each.update(rows, token if with_tokens else None, document, halves)
        done += len(x)
        tell("rows", done, settings.max_rows or source.n_rows)
        if done >= limit:
            break
    if not done:
        raise DataError("orphans: there must be at least one row; the source has none. Is the data empty?")
    pca = covariance.compute()
    variance = float(pca.variance.sum())
    found = [each.compute(variance, with_tokens=with_tokens, seed=settings.seed) for each in latents]
    return MeasuredLatents(found, done, pca.components)


def _documents(batch: Batch, first: int) -> Tensor:
    """Return the document of each row, -1 where it is not known; runs of rows where no document is."""
    if batch.document is None:
        return torch.arange(first, first + batch.n_rows) // BLOCK_ROWS
    return torch.where(batch.document >= 0, batch.document, -1)


def _halves(document: Tensor, numbers: dict[int, int]) -> Tensor:
    """0 or 1 for every row: every second document, as they come (ids may all be odd, say); `numbers` remembers them."""
    ids, first, back = np.unique(document.numpy(), return_index=True, return_inverse=True)
    for at in np.argsort(first):
        numbers.setdefault(int(ids[at]), len(numbers))
    return torch.from_numpy(np.array([numbers[int(each)] % 2 for each in ids])[back])


def frequency_matched(
    frequency: np.ndarray, shared: np.ndarray, generator: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Return as many orphans as shared latents of each class of frequency; dead latents are left out.

    Parameters
    ----------
    frequency
        ``[n]`` fraction of rows on which each latent fires.
    shared
        ``bool [n]``; the others are orphans.
    generator
        Chooses where a class has more of one kind.

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


def compare_properties(measured: Sequence[dict[str, np.ndarray]], kinds: Kinds) -> list[Property]:
    """Compare the properties of orphans with those of shared latents, plain and at equal frequencies."""
    names = [name for name in PROPERTIES if name in measured[0]]
    # A property that is the same for all latents (unit decoder rows) says nothing and costs the others nothing.
    names = [name for name in names if any(np.nanstd(measured[at][name]) > 1e-5 for at in kinds.matched)]
    return [_compare(name, measured, kinds, len(names)) for name in names]


def _compare(name: str, measured: Sequence[dict[str, np.ndarray]], kinds: Kinds, n_tests: int) -> Property:
    medians: list[tuple[float, float]] = []
    plain, equal = _Tests(), _Tests()
    for at, matched in kinds.matched.items():
        value, shared = measured[at][name], kinds.shared[at]
        medians.append((_median(value[~shared]), _median(value[shared])))
        plain.add(value[~shared], value[shared])
        equal.add(*(value[which] for which in matched))
    orphans, others = (over_saes([pair[side] for pair in medians], UNITS.get(name, "")) for side in (0, 1))
    return Property(
        name=name,
        meaning=PROPERTIES[name],
        orphans=orphans,
        shared=others,
        auc=plain.auc(),
        p=plain.p(n_tests),
        auc_matched=equal.auc(),
        p_matched=equal.p(n_tests),
    )


class _Tests:
    """Mann-Whitney tests, one per SAE."""

    def __init__(self) -> None:
        self.aucs: list[float] = []
        self.ps: list[float] = []
        self.errors: list[float] = []

    def add(self, orphan: np.ndarray, shared: np.ndarray) -> None:
        from scipy.stats import mannwhitneyu

        orphan, shared = orphan[np.isfinite(orphan)], shared[np.isfinite(shared)]
        if min(len(orphan), len(shared)) < MIN_LATENTS:
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


def _median(values: np.ndarray) -> float:
    values = values[np.isfinite(values)]
    return float(np.median(values)) if len(values) else math.nan
