"""Texts to one row each: the codes of an SAE (or the hidden states) pooled over the tokens of a text.

One pass of the model serves every pooling, every layer and every SAE that is asked for. Codes stay sparse from the
encoder to the result: memory is O(tokens of a batch · active latents) and the pooled rows themselves.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from ..errors import ConfigError, DataError, did_you_mean, listed
from ..kernels.pooling import largest_of_rows, pool_segments
from ..sae import SAE, Codes
from .capture import CONTEXT, Contexts, token_batches, tokenize
from .hooks import Hook, activations, find_hook
from .model import LanguageModel, load_model
from .rows import check_finite

POOLS = ("sum", "mean", "max", "last", "first", "count", "top")
"""Poolings over the tokens of a document. ``top`` is written with a number: ``top5``."""

DENSE_POOLS = ("sum", "mean", "max", "last", "first")
"""Poolings that hidden states have."""

Progress = Callable[[int, int | None], object]
Empty = Literal["refuse", "zero"]

_TOP = re.compile(r"top([1-9]\d*)")


@dataclass(frozen=True)
class Ask:
    """Features that are wanted: an SAE's codes at a hook, or its hidden states, under one or more poolings.

    Raises
    ------
    ConfigError
        A pooling is unknown, or hidden states do not have it; both or neither of `layer` and `hook` are known.
    """

    pools: tuple[str, ...]
    """Any of ``sum mean max last first count topN``; hidden states have the first five."""
    sae: SAE | None = None
    """The SAE; None for hidden states."""
    layer: int | None = None
    """Number of the block, from 0. Neither `layer` nor `hook`: what the SAE's provenance says."""
    hook: str | None = None
    """Name of a hook instead of `layer`; see `find_hook`."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "pools", (self.pools,) if isinstance(self.pools, str) else tuple(self.pools))
        for pool in self.pools:
            check_pool(pool, dense=self.sae is None)
        if not self.pools:
            raise ConfigError(f"`pools` must name at least one pooling; got none. Known: {listed(POOLS, 12)}.")
        if self.layer is not None and self.hook is not None:
            raise ConfigError(
                f"at most one of `layer` and `hook` may be given; got layer={self.layer!r} and hook={self.hook!r}."
            )

    @property
    def place(self) -> str:
        """Name of the hook: ``layers.2``, or a path.

        Raises
        ------
        ConfigError
            It is not given, and the SAE does not know.
        """
        if self.hook is not None:
            return self.hook
        layer = self.layer
        if layer is None and self.sae is not None:
            known = self.sae.provenance.get("hook")
            if known:
                return str(known)
            layer = self.sae.provenance.get("layer")
        if layer is None:
            raise ConfigError(
                "`layer` (or `hook`) must say where the rows come from; got none"
                + (", and the SAE's provenance does not say." if self.sae is not None else ".")
                + " Give layer=2, say."
            )
        return f"layers.{layer}"


def check_pool(pool: str, *, dense: bool = False) -> None:
    """Refuse a pooling that is unknown, or that hidden states do not have.

    Raises
    ------
    ConfigError
        With the poolings that there are.
    """
    known = DENSE_POOLS if dense else (*POOLS[:-1], "top5")
    if isinstance(pool, str) and (pool in DENSE_POOLS or (not dense and (pool == "count" or _TOP.fullmatch(pool)))):
        return
    what = "hidden states" if dense else "codes"
    hint = " `top` needs a number: `top5`." if pool == "top" and not dense else ""
    raise ConfigError(
        f"`pool` must be a pooling of {what}, one of {listed(known, 12)}; got {pool!r}.{hint} "
        f"{did_you_mean(str(pool), known)}"
    )


# ------------------------------------------------------------------------------------------ activations to documents


@dataclass
class _Pile:
    """Pooled pieces of documents, in the order in which they came: one support and several numbers on it."""

    document: list[np.ndarray] = field(default_factory=list)
    offsets: list[np.ndarray] = field(default_factory=list)
    indices: list[np.ndarray] = field(default_factory=list)
    numbers: dict[str, list[np.ndarray]] = field(default_factory=dict)

    def add(self, document: Tensor, offsets: Tensor, indices: Tensor, numbers: Mapping[str, Tensor]) -> None:
        """One more piece of each document in `document`."""
        self.document.append(document.cpu().numpy())
        self.offsets.append(offsets.diff().cpu().numpy())
        self.indices.append(indices.to("cpu", torch.int32).numpy())
        for name, values in numbers.items():
            self.numbers.setdefault(name, []).append(values.float().cpu().numpy())


def pool_batches(
    batches: Iterable[tuple[Mapping[str, Tensor], Tensor]],
    n_documents: int,
    asks: Sequence[Ask],
    *,
    empty: Empty = "refuse",
    what: str = "documents",
) -> list[dict[str, Any]]:
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

            sum: Σ z    mean: Σ z / n    max: max z    last: z of the last row    first: z of the first row
            count: rows where the latent fired    topN: rows where it was among the N largest that fired

    Raises
    ------
    DataError
        A document has no rows, or an activation is NaN or infinite.
    ShapeError
        The SAE is for rows of another width.
    """
    groups: dict[tuple[str, int], _Group] = {}
    for ask in asks:
        key = (ask.place, id(ask.sae))
        groups.setdefault(key, _Group(ask.place, ask.sae)).pools.extend(ask.pools)
    n_rows = np.zeros(n_documents, np.int64)
    for states, document in batches:
        if not len(document):
            continue
        pieces, lengths = torch.unique_consecutive(document.cpu(), return_counts=True)
        np.add.at(n_rows, pieces.numpy(), lengths.numpy())
        checked: set[str] = set()
        for group in groups.values():
            if group.place not in states:
                raise ConfigError(
                    f"activations must be given for the hook `{group.place}`; got {listed(states)}. Name it as asked."
                )
            x = states[group.place]
            if group.place not in checked:
                check_finite(x.float(), 0, f"the activations at `{group.place}`")
                checked.add(group.place)
            _add(group, x, pieces, lengths)
    check_empty(np.flatnonzero(n_rows == 0), empty, what)
    results = {key: _finish(group, n_rows) for key, group in groups.items()}
    return [{pool: results[ask.place, id(ask.sae)][pool] for pool in ask.pools} for ask in asks]


def check_empty(rows: np.ndarray, empty: Empty, what: str) -> None:
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
        raise DataError(
            f"{what} must have at least one token; {len(rows)} have none: rows {listed(rows.tolist(), 8)}. "
            "Remove them, or pass empty='zero' for rows of zeros."
        )


@dataclass
class _Group:
    """All poolings of one SAE at one hook, with the pieces of documents so far."""

    place: str
    sae: SAE | None
    pools: list[str] = field(default_factory=list)
    piles: dict[str, _Pile] = field(default_factory=dict)
    width: int = 0

    def pile(self, name: str) -> _Pile:
        return self.piles.setdefault(name, _Pile())


def _add(group: _Group, x: Tensor, document: Tensor, lengths: Tensor) -> None:
    """Pool the pieces of documents in one batch of rows."""
    wanted = set(group.pools)
    ends = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])
    picks = {"first": ends[:-1], "last": ends[1:] - 1}
    if group.sae is None:
        group.width = x.shape[1]
        lengths = lengths.to(x.device)
        if wanted & {"sum", "mean"}:
            total = torch.segment_reduce(x.double(), "sum", lengths=lengths, axis=0).float()
            _add_dense(group.pile("sum"), document, total)
        if "max" in wanted:
            _add_dense(group.pile("max"), document, torch.segment_reduce(x.float(), "max", lengths=lengths, axis=0))
        for name in ("first", "last"):
            if name in wanted:
                _add_dense(group.pile(name), document, x[picks[name].to(x.device)].float())
        return
    group.width = group.sae.n_latents
    with torch.no_grad():
        codes = group.sae.encode(x)
    where = lengths.to(codes.indices.device)
    if wanted & {"sum", "mean", "max", "count"}:
        pooled = pool_segments(codes.offsets, codes.indices, codes.values, where, codes.n_latents)
        numbers = {"sum": pooled.sum, "max": pooled.max, "count": pooled.count}
        kept = {"sum"} if "mean" in wanted else set()
        kept |= wanted & set(numbers)
        group.pile("all").add(document, pooled.offsets, pooled.indices, {name: numbers[name] for name in sorted(kept)})
    for name in ("first", "last"):
        if name in wanted:
            part = codes.rows(picks[name].to(codes.offsets.device))
            group.pile(name).add(document, part.offsets, part.indices, {name: part.values})
    tops = [pool for pool in wanted if _TOP.fullmatch(pool)]
    if tops:
        place = largest_of_rows(codes.offsets, codes.indices, codes.values)
        for name in tops:
            part = _where(codes, place < int(name.removeprefix("top")))
            pooled = pool_segments(part.offsets, part.indices, part.values, where, codes.n_latents)
            group.pile(name).add(document, pooled.offsets, pooled.indices, {name: pooled.count})


def _where(codes: Codes, kept: Tensor) -> Codes:
    """The stored codes where `kept` is true."""
    ends = torch.cat([codes.offsets.new_zeros(1), kept.cumsum(0)])
    return Codes(ends[codes.offsets], codes.indices[kept], codes.values[kept], codes.n_latents)


def _add_dense(pile: _Pile, document: Tensor, x: Tensor) -> None:
    pile.document.append(document.numpy())
    pile.numbers.setdefault("x", []).append(x.cpu().numpy())


def _finish(group: _Group, n_rows: np.ndarray) -> dict[str, Any]:
    """The pieces put together: one matrix per pooling."""
    make = _finish_dense if group.sae is None else _finish_sparse
    results: dict[str, Any] = {}
    for name, pile in group.piles.items():
        results |= make(name, pile, len(n_rows), group.width)
    if not group.piles:  # no batch had a row
        import scipy.sparse

        shape = (len(n_rows), group.width or (group.sae.n_latents if group.sae is not None else 0))
        for pool in group.pools:
            results[pool] = (
                np.zeros(shape, np.float32) if group.sae is None else scipy.sparse.csr_matrix(shape, dtype=np.float32)
            )
    elif "mean" in group.pools:
        share = (1.0 / np.maximum(n_rows, 1)).astype(np.float64)
        total = results["sum"]
        if group.sae is None:
            results["mean"] = (total * share[:, None]).astype(np.float32)
        else:
            mean = total.copy()
            mean.data = (mean.data * np.repeat(share, np.diff(mean.indptr))).astype(np.float32)
            results["mean"] = mean
    return results


def _finish_dense(name: str, pile: _Pile, n_documents: int, width: int) -> dict[str, Any]:
    document = np.concatenate(pile.document)
    x = np.concatenate(pile.numbers["x"])
    result = np.zeros((n_documents, width), np.float32)
    if name == "sum":
        if _once(document):
            result[document] = x
        else:
            total = np.zeros((n_documents, width))
            np.add.at(total, document, x)
            result[:] = total
    elif name == "max":
        order = np.argsort(document, kind="stable")
        starts = np.flatnonzero(np.diff(document[order], prepend=-1))
        result[document[order][starts]] = np.maximum.reduceat(x[order], starts, axis=0)
    elif name == "first":
        result[document[::-1]] = x[::-1]
    else:
        result[document] = x
    return {name: result}


def _once(document: np.ndarray) -> bool:
    return len(np.unique(document)) == len(document)


def _finish_sparse(name: str, pile: _Pile, n_documents: int, width: int) -> dict[str, Any]:
    import scipy.sparse

    document = np.concatenate(pile.document)
    counts = np.concatenate(pile.offsets)
    indices = np.concatenate(pile.indices)
    numbers = {key: np.concatenate(values) for key, values in pile.numbers.items()}
    pieces = np.argsort(document, kind="stable")
    if name in ("first", "last") and not _once(document):
        # of the pieces of a document, only the first or the last one counts
        ordered = document[pieces]
        edge = np.append(ordered[1:] != ordered[:-1], True) if name == "last" else np.diff(ordered, prepend=-1) != 0
        pieces = pieces[edge]
    starts = np.concatenate([[0], np.cumsum(counts)])
    chosen = counts[pieces]
    ends = np.concatenate([[0], np.cumsum(chosen)])
    # place of every number: where its piece began, plus its place within the piece
    at = np.arange(ends[-1]) + np.repeat(starts[pieces] - ends[:-1], chosen)
    indices = indices[at]
    lengths = np.bincount(document[pieces], minlength=n_documents)
    offsets = ends[np.concatenate([[0], np.cumsum(lengths)])]
    merge = bool((lengths > 1).any())
    results = {}
    for key, values in numbers.items():
        values = values[at]
        if merge:
            merged = pool_segments(
                torch.from_numpy(ends), torch.from_numpy(indices).long(), torch.from_numpy(values),
                torch.from_numpy(lengths), width,
            )  # fmt: skip
            number = merged.max if key == "max" else merged.sum
            arrays = (number.numpy(), merged.indices.numpy().astype(np.int32), merged.offsets.numpy())
        else:
            arrays = (values, indices.copy(), offsets.copy())
        matrix = scipy.sparse.csr_matrix(arrays, shape=(n_documents, width), dtype=np.float32)
        matrix.sort_indices()
        results[key] = matrix
    return results


# ---------------------------------------------------------------------------------------------------- texts


def pool_texts(
    lm: LanguageModel | str | os.PathLike[str],
    texts: Sequence[str],
    asks: Sequence[Ask],
    *,
    max_tokens: int | None = None,
    batch_tokens: int | None = None,
    cache: str | os.PathLike[str] | None = None,
    progress: Progress | None = None,
    skip_special: bool = True,
    empty: Empty = "refuse",
) -> list[dict[str, Any]]:
    """Run a language model over texts once and pool what every ask wants."""
    texts = check_texts(texts)
    lm = load_model(lm)
    unique = sorted(set(texts))
    number = {text: i for i, text in enumerate(unique)}
    hooks = {ask.place: find_hook(lm.model, ask.place) for ask in asks}
    contexts = _contexts(lm, unique, max_tokens)
    pooled = pool_batches(
        _batches(lm, contexts, hooks, batch_tokens, skip_special, progress), len(unique), asks, empty=empty,
        what="texts",
    )  # fmt: skip
    rows = np.array([number[text] for text in texts], np.int64)
    return [{pool: matrix[rows] for pool, matrix in result.items()} for result in pooled]


def check_texts(texts: Sequence[str]) -> list[str]:
    """The texts as a list, every one a string."""
    if isinstance(texts, str):
        raise DataError("texts must be a list of strings; got one string. Put it in a list: [text].")
    texts = list(texts)
    wrong = [i for i, text in enumerate(texts) if not isinstance(text, str)]
    if wrong:
        first = texts[wrong[0]]
        raise DataError(
            f"texts must be strings; {len(wrong)} of {len(texts)} are not: rows {listed(wrong, 8)} (row {wrong[0]} is "
            f"{first!r}, {type(first).__name__}). Remove or fill them."
        )
    if not texts:
        raise DataError("there must be at least one text; got none.")
    return texts


def _contexts(lm: LanguageModel, texts: Sequence[str], max_tokens: int | None) -> Contexts:
    return tokenize(lm.tokenizer, texts, context=min(CONTEXT, lm.context))


def _batches(
    lm: LanguageModel,
    contexts: Contexts,
    hooks: Mapping[str, Hook],
    batch_tokens: int | None,
    skip_special: bool,
    progress: Progress | None,
) -> Iterable[tuple[dict[str, Tensor], Tensor]]:
    """Rows of the contexts at every hook, batch by batch; the model stops after the last hook."""
    done = 0
    for batch in token_batches(lm, contexts, batch_tokens=batch_tokens, skip_special=skip_special):
        hidden = activations(lm.model, list(hooks.values()), batch.inputs)
        yield (
            {name: x[batch.keep.to(x.device)] for name, x in zip(hooks, hidden)},
            batch.document[batch.keep],
        )
        done += int((batch.document >= 0).sum())
        if progress is not None:
            progress(done, len(contexts.ids))
