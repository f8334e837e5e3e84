"""Texts to one row each: the codes of an SAE (or the hidden states) pooled over the tokens of a text.

One pass of the model serves every pooling, every layer and every SAE that is asked for. Codes stay sparse from the
encoder to the result: memory is O(tokens of a batch · active latents) and the pooled rows themselves.
"""

from __future__ import annotations

import os
import re
import warnings
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from ..errors import ConfigError, DataError, ShapeError, did_you_mean, listed
from ..kernels.pooling import largest_of_rows, pool_segments
from ..models.hooks import Hook, activations, find_hook
from ..models.language import LanguageModel
from ..models.origin import Origin, language_origin
from ..provenance import place_of
from ..sae.codes import Codes
from ..sae.model import SAE
from . import pooling_cache
from .source import check_finite
from .tokens import CONTEXT, Contexts, token_batches, tokenize

POOLS = ("sum", "mean", "max", "last", "first", "count", "top")
"""Poolings over the tokens of a document. ``top`` is written with a number: ``top5``."""

DENSE_POOLS = ("sum", "mean", "max", "last", "first")
"""Poolings that hidden states have."""

Progress = Callable[[int, int | None], object]
Empty = Literal["refuse", "zero"]

_TOP = re.compile(r"top([1-9]\d*)")
_RESIDUAL = re.compile(r"layers\.\d+")


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
            _ = self.place  # refuses both

    @property
    def place(self) -> str:
        """Name of the hook: ``layers.2``, or a path.

        Raises
        ------
        ConfigError
            It is not given, and the provenance of the SAE does not name it.
        """
        return place_of(self.sae, layer=self.layer, hook=self.hook)


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
    pooled, n_rows = _pool(batches, n_documents, asks, numbers=range(n_documents), what=what)
    check_empty(np.flatnonzero(n_rows == 0), empty, what)
    return pooled


def _pool(
    batches: Iterable[tuple[Mapping[str, Tensor], Tensor]],
    n_documents: int,
    asks: Sequence[Ask],
    *,
    numbers: Sequence[int],
    what: str,
) -> tuple[list[dict[str, Any]], np.ndarray]:
    """Matrices per ask, and rows per document; `numbers` is what documents are called in messages."""
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
                check_finite(x, _number_of(document, numbers), f"the {what} at `{group.place}`")
                checked.add(group.place)
            _add(group, x, pieces, lengths)
    results = {key: _finish(group, n_rows) for key, group in groups.items()}
    return [{pool: results[ask.place, id(ask.sae)][pool] for pool in ask.pools} for ask in asks], n_rows


def _number_of(document: Tensor, numbers: Sequence[int]) -> Callable[[int], int]:
    """From the place of a row to what its document is called."""
    return lambda place: int(numbers[int(document[place])])


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


# ----------------------------------------------------------------------------------------------------------- texts


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
    """Run a language model over texts once and pool its rows for every ask; see `pool_batches` for the poolings.

    A text that is longer than a context (what the model takes, `saekit.rows.tokens.CONTEXT` at most, as in training)
    is read in consecutive windows, each with its own BOS, CLS and SEP, and pooled as one. Equal texts are run once.

    The rows of a text do not depend on the order of the texts, bit for bit. On which other texts are there they depend
    through padding only, that is up to rounding: about 1e-6 of a value in float32, and a latent at the very edge of a
    selection may change sides.

    Parameters
    ----------
    lm
        The model: a `LanguageModel`, or what `load_model` takes. By name it is loaded only when a text must be run, and
        stays loaded until another is asked for.
    texts
        The texts.
    asks
        What is wanted; all are served by one pass, which ends after the last hook.
    max_tokens
        Read this many tokens of a text at most, added ones not counted; a warning tells how much was cut. None: all.
    batch_tokens
        Tokens in one forward pass, padding included. Results do not depend on it beyond rounding.
    cache
        Folder for pooled rows; see `saekit.rows.pooling_cache`. A text that is there is not run again, and when all are
        there, the model is not loaded. The key holds the digests of the model and of the SAE's encoder, the hook, the
        pooling and the settings.
    progress
        Called with tokens done and tokens in all, after every forward pass.
    skip_special
        Leave out tokens that the tokenizer adds: BOS, CLS, SEP. Padding is never a row.
    empty
        What to do about texts without tokens: ``"refuse"``, or a ``"zero"`` row.

    Returns
    -------
    list of dict
        For each ask, pooling -> matrix with a row per text; see `pool_batches`.

    Raises
    ------
    DataError
        A text is no string or has no tokens; an activation is NaN or infinite.
    ConfigError, ShapeError
        A setting cannot work, or an SAE is for rows of another width.
    ModelError, OfflineError
        The model or a hook cannot be had.

    Warns
    -----
    UserWarning
        Texts were cut, or an SAE was trained on another model.
    """
    for name, value in (("max_tokens", max_tokens), ("batch_tokens", batch_tokens)):
        if value is not None and (isinstance(value, bool) or not isinstance(value, int | np.integer) or value < 1):
            raise ConfigError(f"`{name}` must be a positive integer or None; got {value!r}.")
    texts = check_texts(texts)
    origin = language_origin(lm)

    def compute(chosen: Sequence[int], wanted: Sequence[Ask]) -> _Computed:
        model = origin.load()
        hooks = _find_hooks(model.model, wanted)
        _check_widths(wanted, hooks, model.d_model)
        contexts = tokenize(model.tokenizer, [texts[i] for i in chosen], context=min(CONTEXT, model.context))
        real = contexts.document[contexts.position >= 0]
        n_tokens = np.bincount(real, minlength=len(chosen))
        if max_tokens is not None:
            contexts = _cut(contexts, max_tokens)
        batches = _text_batches(model, contexts, hooks, batch_tokens, skip_special, progress)
        return *_pool(batches, len(chosen), wanted, numbers=chosen, what="texts"), n_tokens

    settings = {
        "unit": "text", "context": CONTEXT, "max_tokens": max_tokens, "skip_special": bool(skip_special)
    }  # fmt: skip
    digests = [pooling_cache.digest_of(text) for text in texts]
    found, n_rows, n_tokens = _through_cache(digests, asks, origin, settings, cache, compute)
    check_empty(np.flatnonzero(n_rows == 0), empty, "texts")
    if max_tokens is not None and (n_tokens > max_tokens).any():
        long = n_tokens > max_tokens
        lost = int((n_tokens[long] - max_tokens).sum())
        warnings.warn(
            f"max_tokens={max_tokens} cuts {int(long.sum()):,} of {len(texts):,} texts and loses {lost:,} of "
            f"{int(n_tokens.sum()):,} tokens ({lost / n_tokens.sum():.1%}). Pass max_tokens=None to read them whole.",
            stacklevel=2,
        )
    return found


_Computed = tuple[list[dict[str, Any]], np.ndarray, np.ndarray]
"""Matrices per ask, rows pooled per document, tokens per document before any cut."""


def check_texts(texts: Any) -> list[str]:
    """The texts as a list, every one a string.

    Raises
    ------
    DataError
        They are not strings, one string, or none.
    """
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


_sae_digests: weakref.WeakKeyDictionary[SAE, str] = weakref.WeakKeyDictionary()


def encoder_digest(sae: SAE) -> str:
    """Return the digest of an SAE with an empty decoder: what decides its codes, and nothing else."""
    if sae not in _sae_digests:
        encoder = sae.replace(W_dec=sae.W_dec[:, :0], b_dec=sae.b_dec[:0], W_skip=None)
        _sae_digests[sae] = encoder.digest()
    return _sae_digests[sae]


def _find_hooks(model: Any, asks: Sequence[Ask]) -> dict[str, Hook]:
    return {ask.place: find_hook(model, ask.place) for ask in asks}


def _check_widths(asks: Sequence[Ask], hooks: Mapping[str, Hook], d_model: int) -> None:
    """Refuse an SAE that cannot read the residual stream before the model runs."""
    for ask in asks:
        hook = hooks[ask.place]
        is_residual = hook.layer is not None and hook.name == f"layers.{hook.layer}"
        if ask.sae is not None and is_residual and ask.sae.d_in != d_model:
            raise ShapeError(
                f"the SAE must read rows of width {d_model} at `{hook.name}`; its d_in is {ask.sae.d_in}. "
                "Was it trained on another model?"
            )


def _check_provenance(asks: Sequence[Ask], origin: Origin) -> None:
    """Warn about SAEs that were trained on another model or at another hook."""
    for ask in asks:
        known = {} if ask.sae is None else ask.sae.provenance
        name = known.get("model", "another model")
        if known.get("model_digest") not in (None, origin.digest):
            warnings.warn(
                f"the SAE was trained on another model ({name}, {str(known['model_digest'])[:19]}…) than the one given "
                f"({origin.digest[:19]}…). Give the model it was trained on.",
                stacklevel=4,
            )
        hook = str(known.get("hook") or ask.place)
        # other names may mean the same module
        if hook != ask.place and _RESIDUAL.fullmatch(hook) and _RESIDUAL.fullmatch(ask.place):
            warnings.warn(
                f"the SAE was trained at `{hook}` and is used at `{ask.place}`. Leave `layer` out to use it there.",
                stacklevel=4,
            )


# -------------------------------------------------------------------------------------------------- one pass, cached


def _through_cache(
    digests: Sequence[bytes],
    asks: Sequence[Ask],
    origin: Origin,
    settings: Mapping[str, Any],
    cache: str | os.PathLike[str] | None,
    compute: Callable[[Sequence[int], Sequence[Ask]], _Computed],
) -> _Computed:
    """Rows of every document for every ask: from the cache, the others computed in one pass and kept.

    Each different document is computed once, in the order of the digests: which other documents it shares a batch with
    then does not depend on the order they came in.
    """
    if not asks:
        raise ConfigError("there must be at least one ask; got none.")
    _check_provenance(asks, origin)
    first: dict[bytes, int] = {}
    for i, digest in enumerate(digests):
        first.setdefault(digest, i)
    places = [(n, pool) for n, ask in enumerate(asks) for pool in ask.pools]
    keys = {place: _key(asks[place[0]], place[1], origin, settings) for place in places} if cache is not None else {}
    kept = {place: None if cache is None else pooling_cache.read_rows(cache, keys[place]) for place in places}
    known = {place: {} if rows is None else {d: i for i, d in enumerate(rows.digests)} for place, rows in kept.items()}
    missing = {place: {digest for digest in first if digest not in known[place]} for place in places}
    to_run = sorted(set().union(*missing.values()))
    if to_run:
        short = [n for n in range(len(asks)) if any(missing[n, pool] for pool in asks[n].pools)]
        wanted = [replace(asks[n], pools=tuple(p for p in asks[n].pools if missing[n, p])) for n in short]
        pooled, n_rows, n_tokens = compute([first[digest] for digest in to_run], wanted)
        for n, result in zip(short, pooled):
            for pool, x in result.items():
                place, old = (n, pool), kept[n, pool]
                new = pooling_cache.Rows(tuple(to_run), x, n_rows, n_tokens)
                if old is not None or len(missing[place]) < len(to_run):
                    new = new.pick([i for i, digest in enumerate(to_run) if digest in missing[place]])
                if cache is not None:
                    pooling_cache.write_rows(cache, keys[place], new)
                kept[place] = new if old is None else pooling_cache.Rows.cat([old, new])
                known[place] = {digest: i for i, digest in enumerate(kept[place].digests)}  # type: ignore[union-attr]
    results: list[dict[str, Any]] = [{} for _ in asks]
    chosen = None
    for n, pool in places:
        table = kept[n, pool]
        assert table is not None
        chosen = table.pick([known[n, pool][digest] for digest in digests])
        results[n][pool] = chosen.x
    assert chosen is not None
    return results, chosen.n_rows, chosen.n_tokens


def _key(ask: Ask, pool: str, origin: Origin, settings: Mapping[str, Any]) -> dict[str, Any]:
    sae = None if ask.sae is None else encoder_digest(ask.sae)
    return {**origin.about, **settings, "hook": ask.place, "sae": sae, "pool": pool}


def _cut(contexts: Contexts, max_tokens: int) -> Contexts:
    """The first `max_tokens` tokens of every text, with the added tokens of the windows that are left."""
    window = np.repeat(np.arange(len(contexts)), contexts.lengths())
    kept = (contexts.position >= 0) & (contexts.position < max_tokens)
    alive = np.bincount(window[kept], minlength=len(contexts)) > 0
    kept |= (contexts.position < 0) & alive[window]
    lengths = np.bincount(window[kept], minlength=len(contexts))
    return Contexts(
        contexts.ids[kept],
        contexts.document[kept],
        contexts.position[kept],
        np.concatenate([[0], np.cumsum(lengths[lengths > 0])]).astype(np.int64),
    )


def _text_batches(
    lm: LanguageModel,
    contexts: Contexts,
    hooks: Mapping[str, Hook],
    batch_tokens: int | None,
    skip_special: bool,
    progress: Progress | None,
) -> Iterator[tuple[dict[str, Tensor], Tensor]]:
    """Rows of the contexts at every hook, batch by batch; the model stops after the last hook.

    Batches come sorted by length, longest first; the windows of a text stay in their order, because all but the last
    are full and sorting is stable.
    """
    done = 0
    for batch in token_batches(lm, contexts, batch_tokens=batch_tokens, skip_special=skip_special):
        hidden = activations(lm.model, list(hooks.values()), batch.inputs)
        states = {name: x[batch.keep.to(x.device)] for name, x in zip(hooks, hidden)}
        yield states, batch.document[batch.keep]
        done += int((batch.document >= 0).sum())
        if progress is not None:
            progress(done, len(contexts.ids))
