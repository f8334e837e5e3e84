"""Rows that come in batches, pooled into one row per document."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import numpy as np
import torch
from torch import Tensor

from ..errors import ConfigError, InputError, listed
from ..kernels.pooling import largest_of_rows, pool_segments
from ..sae.codes import Codes
from ..sae.finite import check_finite
from ..sae.model import SAE
from .asks import Ask, top_of

if TYPE_CHECKING:
    from scipy.sparse import csr_matrix

Matrix: TypeAlias = "np.ndarray | csr_matrix"
"""Dense or sparse, float32."""

Pooled = dict[str, Matrix]
"""Pooling -> matrix with a row per document."""

Batches = Iterable[tuple[Mapping[str, Tensor], Tensor]]


def pool_batches(
    batches: Batches,
    n_documents: int,
    asks: Sequence[Ask],
    *,
    empty: Literal["refuse", "zero"] = "refuse",
    what: str = "documents",
) -> list[Pooled]:
    """Pool rows that come in batches into one row per document.

    Parameters
    ----------
    batches
        Pairs of activations by the name of their hook (`Ask.place`), each ``[n, d]``, and the document of each row,
        int64 ``[n]``, ``0 .. n_documents - 1``. The rows of a document come in their order, in one batch or in several.
    n_documents
        Number of documents.
    asks
        What is wanted. Asks of one SAE at one hook are encoded once.
    empty
        What to do about documents without rows: ``"refuse"`` them, or give a ``"zero"`` row.
    what
        What documents are called in messages.

    Returns
    -------
    list of dict
        For each ask, pooling -> float32 matrix: ``scipy.sparse.csr_matrix`` ``[n_documents, n_latents]`` for an SAE,
        array ``[n_documents, d]`` for hidden states. With z the codes (or states) of a document's n rows::

            sum: Σ z    mean: Σ z / n    max: max z    min: min z    last: z of the last row    first: of the first
            count: rows where the latent fired    topN: rows where it was among the N largest that fired

    Raises
    ------
    DataError
        A document has no rows, or an activation is NaN or infinite.
    ShapeError
        The SAE is for rows of another width.
    """
    pooled, n_rows = pool_and_count(batches, n_documents, asks, numbers=range(n_documents), what=what)
    check_empty(np.flatnonzero(n_rows == 0), empty, what)
    return pooled


def pool_and_count(
    batches: Batches, n_documents: int, asks: Sequence[Ask], *, numbers: Sequence[int], what: str
) -> tuple[list[Pooled], np.ndarray]:
    """Return the matrices of `pool_batches`, and the rows of each document.

    `numbers` is what documents are called in messages; documents without rows are not refused.
    """
    pools = DocumentPools(asks, n_documents, numbers, what)
    for states, document in batches:
        pools.add(pools.part(states, document))
    return pools.finish()


@dataclass(frozen=True)
class Part:
    """What one batch of rows adds: the pieces of documents in it, and their poolings for each SAE and hook."""

    pieces: Tensor
    lengths: Tensor
    pooled: list[Any]


class DocumentPools:
    """Documents pooled so far; `part` pools a batch, in any process, and `add` takes the parts in their order."""

    def __init__(self, asks: Sequence[Ask], n_documents: int, numbers: Sequence[int], what: str) -> None:
        self.asks, self.numbers, self.what = asks, numbers, what
        self.groups = _groups(asks)
        self.n_rows = np.zeros(n_documents, np.int64)

    def part(self, states: Mapping[str, Tensor], document: Tensor) -> Part | None:
        """Return what a batch of rows adds; None without rows.

        Raises
        ------
        DataError, ConfigError
            An activation is not finite; there is none for a hook.
        """
        if not len(document):
            return None
        pieces, lengths = torch.unique_consecutive(document.cpu(), return_counts=True)
        for place in dict.fromkeys(group.place for group in self.groups.values()):
            if place not in states:
                raise ConfigError(
                    f"activations must be given for the hook `{place}`; got {listed(states)}. Name it as asked."
                )
            check_finite(states[place], _number_of(document, self.numbers), f"the {self.what} at `{place}`")
        groups = _groups(self.asks)
        for group in groups.values():
            group.add(states[group.place], pieces, lengths)
        return Part(pieces, lengths, [group.taken() for group in groups.values()])

    def add(self, part: Part | None) -> None:
        """Add what a batch adds."""
        if part is not None:
            np.add.at(self.n_rows, part.pieces.numpy(), part.lengths.numpy())
            for group, taken in zip(self.groups.values(), part.pooled, strict=True):
                group.put(taken)

    def finish(self) -> tuple[list[Pooled], np.ndarray]:
        """Return the matrices for every ask, and the rows of each document."""
        results = {key: group.finish(self.n_rows) for key, group in self.groups.items()}
        return [{pool: results[ask.place, id(ask.sae)][pool] for pool in ask.pools} for ask in self.asks], self.n_rows


def _groups(asks: Sequence[Ask]) -> dict[tuple[str, int], _DensePools | _SparsePools]:
    """Return one accumulator per SAE and hook: asks that share both are encoded once."""
    groups: dict[tuple[str, int], _DensePools | _SparsePools] = {}
    for ask in asks:
        key = (ask.place, id(ask.sae))
        if key not in groups:
            groups[key] = _DensePools(ask.place) if ask.sae is None else _SparsePools(ask.place, ask.sae)
        groups[key].pools.update(dict.fromkeys(ask.pools))
    return groups


def _number_of(document: Tensor, numbers: Sequence[int]) -> Callable[[int], int]:
    """Return the function from the index of a row to what its document is called."""
    return lambda index: int(numbers[int(document[index])])


def check_empty(rows: np.ndarray, empty: str, what: str) -> None:
    """Refuse documents without a token, naming them, unless they are to be zero.

    Raises
    ------
    DataError
        There are such documents.
    ConfigError
        `empty` is another word.
    """
    if empty not in ("refuse", "zero"):
        raise ConfigError(f"`empty` must be `refuse` or `zero`; got {empty!r}.")
    if len(rows) and empty == "refuse":
        raise InputError(
            f"{what} must have at least one token; {len(rows)} have none: rows {listed(rows.tolist(), 8)}. "
            "Remove them, or pass empty='zero' for rows of zeros."
        )


def _ends_of(lengths: Tensor) -> Tensor:
    return torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])


def _once(document: np.ndarray) -> bool:
    return len(np.unique(document)) == len(document)


# ----------------------------------------------------------------------------------------------------- hidden states


@dataclass
class _DensePools:
    """All poolings of the hidden states at one hook, with the pieces of documents so far."""

    place: str
    pools: dict[str, None] = field(default_factory=dict)
    pieces: dict[str, list[tuple[np.ndarray, np.ndarray]]] = field(default_factory=dict)
    width: int = 0

    def add(self, x: Tensor, document: Tensor, lengths: Tensor) -> None:
        """Pool the pieces of documents in one batch of rows."""
        self.width = x.shape[1]
        ends = _ends_of(lengths).to(x.device)
        lengths = lengths.to(x.device)
        for name in dict.fromkeys("sum" if pool == "mean" else pool for pool in self.pools):
            if name == "sum":
                pooled = torch.segment_reduce(x.double(), "sum", lengths=lengths, axis=0).float()
            elif name in ("max", "min"):
                pooled = torch.segment_reduce(x.float(), name, lengths=lengths, axis=0)
            else:
                pooled = x[ends[:-1] if name == "first" else ends[1:] - 1].float()
            self.pieces.setdefault(name, []).append((document.numpy(), pooled.cpu().numpy()))

    def taken(self) -> tuple[int, dict[str, list[tuple[np.ndarray, np.ndarray]]]]:
        """Return the pieces so far."""
        return self.width, self.pieces

    def put(self, taken: tuple[int, dict[str, list[tuple[np.ndarray, np.ndarray]]]]) -> None:
        """Add pieces that follow."""
        self.width, pieces = taken
        for name, each in pieces.items():
            self.pieces.setdefault(name, []).extend(each)

    def finish(self, n_rows: np.ndarray) -> Pooled:
        """Return one matrix per pooling: the pieces put together."""
        if not self.pieces:  # no batch had a row
            return {pool: np.zeros((len(n_rows), self.width), np.float32) for pool in self.pools}
        results: dict[str, np.ndarray] = {}
        for name, pieces in self.pieces.items():
            document, x = (np.concatenate(parts) for parts in zip(*pieces))
            results[name] = _joined(name, document, x, len(n_rows))
        if "mean" in self.pools:
            results["mean"] = (results["sum"] * (1.0 / np.maximum(n_rows, 1))[:, None]).astype(np.float32)
        return dict(results)


def _joined(name: str, document: np.ndarray, x: np.ndarray, n_documents: int) -> np.ndarray:
    """Return one row per document from pooled pieces of documents."""
    result = np.zeros((n_documents, x.shape[1]), np.float32)
    if name == "sum" and not _once(document):
        total = np.zeros((n_documents, x.shape[1]))
        np.add.at(total, document, x)
        result[:] = total
    elif name in ("max", "min"):
        order = np.argsort(document, kind="stable")
        starts = np.flatnonzero(np.diff(document[order], prepend=-1))
        extreme = np.maximum if name == "max" else np.minimum
        result[document[order][starts]] = extreme.reduceat(x[order], starts, axis=0)
    elif name == "first":
        result[document[::-1]] = x[::-1]
    else:
        result[document] = x
    return result


# ------------------------------------------------------------------------------------------------------------- codes


@dataclass
class _Pile:
    """Pooled pieces of documents, in the order in which they came: one support and several numbers on it."""

    document: list[np.ndarray] = field(default_factory=list)
    counts: list[np.ndarray] = field(default_factory=list)
    indices: list[np.ndarray] = field(default_factory=list)
    numbers: dict[str, list[np.ndarray]] = field(default_factory=dict)

    def add(self, document: Tensor, offsets: Tensor, indices: Tensor, numbers: Mapping[str, Tensor]) -> None:
        """Add one more piece of each document in `document`."""
        self.document.append(document.cpu().numpy())
        self.counts.append(offsets.diff().cpu().numpy())
        self.indices.append(indices.to("cpu", torch.int32).numpy())
        for name, values in numbers.items():
            self.numbers.setdefault(name, []).append(values.float().cpu().numpy())

    def extend(self, other: _Pile) -> None:
        """Add pieces that follow."""
        self.document += other.document
        self.counts += other.counts
        self.indices += other.indices
        for name, values in other.numbers.items():
            self.numbers.setdefault(name, []).extend(values)

    def finish(self, name: str, n_documents: int, width: int) -> dict[str, csr_matrix]:
        """Return one matrix per number: the pieces put together."""
        import scipy.sparse

        document = np.concatenate(self.document)
        counts = np.concatenate(self.counts)
        pieces = _pieces_in_order(name, document)
        starts = np.concatenate([[0], np.cumsum(counts)])
        chosen = counts[pieces]
        ends = np.concatenate([[0], np.cumsum(chosen)])
        # where each number lies: where its piece began, plus its index within the piece
        at = np.arange(ends[-1]) + np.repeat(starts[pieces] - ends[:-1], chosen)
        indices = np.concatenate(self.indices)[at]
        lengths = np.bincount(document[pieces], minlength=n_documents)
        offsets = ends[np.concatenate([[0], np.cumsum(lengths)])]
        merge = bool((lengths > 1).any())
        results = {}
        for key, parts in self.numbers.items():
            values = np.concatenate(parts)[at]
            arrays = (values, indices.copy(), offsets.copy())
            if merge:
                merged = pool_segments(
                    torch.from_numpy(ends), torch.from_numpy(indices).long(), torch.from_numpy(values),
                    torch.from_numpy(lengths), width,
                )  # fmt: skip
                number = getattr(merged, key) if key in ("max", "min") else merged.sum
                arrays = (number.numpy(), merged.indices.numpy().astype(np.int32), merged.offsets.numpy())
            matrix = scipy.sparse.csr_matrix(arrays, shape=(n_documents, width), dtype=np.float32)
            matrix.sort_indices()
            results[key] = matrix
        return results


def _pieces_in_order(name: str, document: np.ndarray) -> np.ndarray:
    """Return the pieces by document; of ``first`` and ``last`` only the piece of a document that counts."""
    pieces = np.argsort(document, kind="stable")
    if name not in ("first", "last") or _once(document):
        return pieces
    ordered = document[pieces]
    edge = np.append(ordered[1:] != ordered[:-1], True) if name == "last" else np.diff(ordered, prepend=-1) != 0
    return pieces[edge]


_NUMBERS = {"sum": ("sum",), "mean": ("sum",), "max": ("max",), "count": ("count",), "min": ("min", "count")}
"""Numbers that are added up for a pooling."""


@dataclass
class _SparsePools:
    """All poolings of the codes of one SAE at one hook, with the pieces of documents so far."""

    place: str
    sae: SAE
    pools: dict[str, None] = field(default_factory=dict)
    piles: dict[str, _Pile] = field(default_factory=dict)

    def add(self, x: Tensor, document: Tensor, lengths: Tensor) -> None:
        """Encode one batch of rows and pool the pieces of documents in it."""
        with torch.no_grad():
            codes = self.sae.encode(x)
        ends = _ends_of(lengths).to(codes.offsets.device)
        lengths = lengths.to(codes.indices.device)
        numbers = sorted({each for pool in self.pools for each in _NUMBERS.get(pool, ())})
        if numbers:
            pooled = pool_segments(codes.offsets, codes.indices, codes.values, lengths, codes.n_latents)
            values = {name: getattr(pooled, name) for name in numbers}
            self._pile("all").add(document, pooled.offsets, pooled.indices, values)
        for name, rows in (("first", ends[:-1]), ("last", ends[1:] - 1)):
            if name in self.pools:
                part = codes.rows(rows)
                self._pile(name).add(document, part.offsets, part.indices, {name: part.values})
        self._add_tops(codes, document, lengths)

    def taken(self) -> dict[str, _Pile]:
        """Return the pieces so far."""
        return self.piles

    def put(self, taken: Mapping[str, _Pile]) -> None:
        """Add pieces that follow."""
        for name, pile in taken.items():
            self._pile(name).extend(pile)

    def _add_tops(self, codes: Codes, document: Tensor, lengths: Tensor) -> None:
        """Count the rows where a latent was among the N largest."""
        tops = {pool: n for pool in self.pools if (n := top_of(pool)) is not None}
        if not tops:
            return
        order = largest_of_rows(codes.offsets, codes.indices, codes.values)
        for name, n in tops.items():
            part = _where(codes, order < n)
            pooled = pool_segments(part.offsets, part.indices, part.values, lengths, codes.n_latents)
            self._pile(name).add(document, pooled.offsets, pooled.indices, {name: pooled.count})

    def finish(self, n_rows: np.ndarray) -> Pooled:
        """Return one matrix per pooling: the pieces put together."""
        import scipy.sparse

        if not self.piles:  # no batch had a row
            shape = (len(n_rows), self.sae.n_latents)
            return {pool: scipy.sparse.csr_matrix(shape, dtype=np.float32) for pool in self.pools}
        results: dict[str, csr_matrix] = {}
        for name, pile in self.piles.items():
            results |= pile.finish(name, len(n_rows), self.sae.n_latents)
        if "mean" in self.pools:
            mean = results["sum"].copy()
            mean.data = (mean.data * np.repeat(1.0 / np.maximum(n_rows, 1), np.diff(mean.indptr))).astype(np.float32)
            results["mean"] = mean
        if "min" in self.pools:
            least, fires = results["min"].copy(), results["count"]
            in_all = fires.data == np.repeat(n_rows, np.diff(fires.indptr))
            least.data = np.where(in_all, least.data, np.minimum(least.data, 0))  # 0 where it did not fire
            least.eliminate_zeros()
            results["min"] = least
        return dict(results)

    def _pile(self, name: str) -> _Pile:
        return self.piles.setdefault(name, _Pile())


def _where(codes: Codes, kept: Tensor) -> Codes:
    """Return the stored codes where `kept` is true."""
    return Codes(_ends_of(kept)[codes.offsets], codes.indices[kept], codes.values[kept], codes.n_latents)
