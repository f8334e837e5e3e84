"""Rows from a language model: texts are cut into contexts, the model runs over them, a hook gives one row per token.

`capture` runs the model once and keeps the rows, in memory or on disk; `stream` runs it while somebody reads.
Padding never becomes a row. Tokens that the tokenizer adds (BOS, CLS, SEP) and tokens whose norm is out of all
proportion are skipped by settings that are recorded with the rows.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from ..errors import ConfigError, DataError, listed
from ..files import digest_bytes, locked_folder
from .hooks import Hook, Site, activations, find_hook
from .model import DTYPES, LanguageModel, accepts, as_dtype, dtype_name, load_model
from .quiet import quiet_transformers
from .rows import (
    ArrayRows,
    Batch,
    Block,
    Columns,
    Source,
    check_finite,
    check_reading,
    random_order,
    read_ahead,
    read_batches,
)
from .shards import ShardRows, ShardWriter
from .texts import Texts, read_texts

Data = str | os.PathLike[str] | Iterable[Any]
Progress = Callable[[int, int | None], object]

CONTEXT = 1024
"""Longest context unless given; models with less take less. Unit: tokens."""

BATCH_TOKENS = {"cpu": 2048, "cuda": 16_384}
"""Tokens in one forward pass, padding included, by type of device. On a CPU larger batches leave the cache: measured at
half the speed for 8,192. Unit: tokens."""

OUTLIER_TIMES = 10.0
"""A token is an outlier when its norm is more than this many times the median norm."""

CALIBRATION_TOKENS = 4096
"""Tokens from the beginning of the data that the median norm is taken from. Unit: tokens."""

BLOCK_TOKENS = 32_768
"""Tokens in a shuffled block of a stream. Unit: tokens."""

_GROUP_TOKENS = 16_384  # tokens in consecutive contexts that are sorted by length together; the grain of resuming
_TEXTS_AT_ONCE = 512
_CHARACTERS_PER_TOKEN = 12  # how much text is read for a number of tokens before more is fetched


@dataclass(frozen=True)
class Contexts:
    """Texts as token ids, cut into pieces that the model takes at once."""

    ids: np.ndarray
    """Token ids of all contexts, int32, one after another."""
    document: np.ndarray
    """Number of the text each token belongs to, int64."""
    position: np.ndarray
    """Place of each token in its text, int32, from 0; -1 for tokens that were added (BOS, CLS, SEP)."""
    offsets: np.ndarray
    """Where each context begins in these arrays, int64, with the end behind."""

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def lengths(self) -> np.ndarray:
        """Tokens in each context."""
        return np.diff(self.offsets)

    def pick(self, index: Sequence[int] | np.ndarray) -> Contexts:
        """The contexts at `index`, in that order."""
        spans = [np.arange(self.offsets[i], self.offsets[i + 1]) for i in index]
        where = np.concatenate(spans) if spans else np.empty(0, np.int64)
        return Contexts(
            self.ids[where],
            self.document[where],
            self.position[where],
            np.concatenate([[0], np.cumsum([len(span) for span in spans])]).astype(np.int64),
        )

    @staticmethod
    def cat(parts: Sequence[Contexts]) -> Contexts:
        """Contexts one after another."""
        lengths = np.concatenate([part.lengths() for part in parts]) if parts else np.empty(0, np.int64)
        return Contexts(
            np.concatenate([part.ids for part in parts]) if parts else np.empty(0, np.int32),
            np.concatenate([part.document for part in parts]) if parts else np.empty(0, np.int64),
            np.concatenate([part.position for part in parts]) if parts else np.empty(0, np.int32),
            np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
        )


@dataclass(frozen=True)
class TokenBatch:
    """Padded contexts, ready for one forward pass: ``lm.model(**batch.inputs)``.

    All tensors are ``[batch, sequence]`` on the device of the model.
    """

    inputs: dict[str, Any]
    """Arguments of the forward: input_ids, attention_mask, and position_ids when padding is on the left."""
    keep: Tensor
    """True where the token becomes a row (before the filter for outliers): not padding, not an added token."""
    document: Tensor
    """Number of the text, int64; -1 for padding."""
    position: Tensor
    """Place in the text, int32; -1 for padding and added tokens."""
    index: tuple[int, ...]
    """Which contexts these are."""


@dataclass(frozen=True)
class SpecialTokens:
    """What the tokenizer puts around a text."""

    before: tuple[int, ...]
    after: tuple[int, ...]


def special_tokens(tokenizer: Any) -> SpecialTokens:
    """Ids that the tokenizer puts before and after a single text, found by asking it."""
    with quiet_transformers():
        bare = list(tokenizer("a b", add_special_tokens=False)["input_ids"])
        full = list(tokenizer("a b", add_special_tokens=True)["input_ids"])
    for start in range(len(full) - len(bare) + 1):
        if full[start : start + len(bare)] == bare:
            return SpecialTokens(tuple(full[:start]), tuple(full[start + len(bare) :]))
    return SpecialTokens((), ())


def tokenize(
    tokenizer: Any, texts: Sequence[str], *, context: int, pack: bool = False, first_document: int = 0
) -> Contexts:
    """Cut texts into contexts.

    A text longer than a context becomes several consecutive ones, each with the added tokens around it. Texts never
    share a context unless `pack`.

    Parameters
    ----------
    tokenizer
        A transformers tokenizer.
    texts
        The texts.
    context
        Tokens in a context at most, added ones included.
    pack
        Fill contexts with text after text instead, the added tokens around each text; tokens then see earlier texts.
    first_document
        Number of the first text.

    Raises
    ------
    ConfigError
        `context` leaves no room for a token of the text.
    """
    around = special_tokens(tokenizer)
    room = context - len(around.before) - len(around.after)
    if room < 1:
        raise ConfigError(
            f"`context` must leave room for text beside {context - room} added tokens; got {context}. Give more."
        )
    with quiet_transformers():
        bare = tokenizer(list(texts), add_special_tokens=False)["input_ids"]
    pieces: list[tuple[int, int, list[int]]] = []
    for number, tokens in enumerate(bare, first_document):
        step = max(len(tokens), 1) if pack else room
        pieces.extend((number, start, tokens[start : start + step]) for start in range(0, len(tokens), step))
    ids = [np.array([*around.before, *piece, *around.after], np.int32) for _, _, piece in pieces]
    position = [
        np.array([*[-1] * len(around.before), *range(start, start + len(piece)), *[-1] * len(around.after)], np.int32)
        for _, start, piece in pieces
    ]
    document = [np.full(len(part), number, np.int64) for (number, _, _), part in zip(pieces, ids)]
    lengths = [len(part) for part in ids]
    if pack:
        total = sum(lengths)
        lengths = [min(context, total - start) for start in range(0, total, context)]
    return Contexts(
        np.concatenate([np.empty(0, np.int32), *ids]),
        np.concatenate([np.empty(0, np.int64), *document]),
        np.concatenate([np.empty(0, np.int32), *position]),
        np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
    )


def token_batches(
    lm: LanguageModel,
    contexts: Contexts,
    *,
    batch_tokens: int | None = None,
    padding: Literal["right", "left"] = "right",
    skip_special: bool = True,
) -> Iterator[TokenBatch]:
    """Padded batches of contexts of similar length.

    Contexts are sorted by length, so batches come in another order than contexts; `TokenBatch.index` tells which is
    which.

    Parameters
    ----------
    lm
        The model they are for.
    contexts
        The contexts.
    batch_tokens
        Tokens in a batch at most, padding included; a longer context comes alone. None: `BATCH_TOKENS`.
    padding
        Side of the padding. The values of tokens do not depend on it.
    skip_special
        Whether added tokens (BOS, CLS, SEP) are left out of `TokenBatch.keep`.
    """
    batch_tokens = batch_tokens or _batch_tokens(lm)
    lengths = contexts.lengths()
    order = np.argsort(-lengths, kind="stable")
    first = 0
    while first < len(order):
        longest = int(lengths[order[first]])
        count = max(1, batch_tokens // longest)
        yield _pad(lm, contexts, order[first : first + count], longest, padding, skip_special)
        first += count


def _batch_tokens(lm: LanguageModel) -> int:
    """The usual size of a batch on the device of the model."""
    return BATCH_TOKENS.get(lm.device.type, BATCH_TOKENS["cuda"])


def _pad(
    lm: LanguageModel, contexts: Contexts, index: np.ndarray, longest: int, padding: str, skip_special: bool
) -> TokenBatch:
    shape = (len(index), longest)
    pad = getattr(lm.tokenizer, "pad_token_id", None)
    ids = np.full(shape, 0 if pad is None else pad, np.int64)
    mask = np.zeros(shape, np.int64)
    document = np.full(shape, -1, np.int64)
    position = np.full(shape, -1, np.int32)
    for row, i in enumerate(index):
        span = slice(contexts.offsets[i], contexts.offsets[i + 1])
        n = span.stop - span.start
        place = slice(longest - n, longest) if padding == "left" else slice(0, n)
        ids[row, place] = contexts.ids[span]
        mask[row, place] = 1
        document[row, place] = contexts.document[span]
        position[row, place] = contexts.position[span]
    device = lm.device

    def put(array: np.ndarray) -> Tensor:
        return torch.from_numpy(array).to(device)

    inputs: dict[str, Any] = {"input_ids": put(ids), "attention_mask": put(mask)}
    if padding == "left" and accepts(lm.model, "position_ids") and not _derives_positions(lm):
        inputs["position_ids"] = (inputs["attention_mask"].cumsum(1) - 1).clamp(min=0)
    if accepts(lm.model, "use_cache"):
        inputs["use_cache"] = False
    keep = (position >= 0) if skip_special else mask.astype(bool)
    return TokenBatch(inputs, put(keep), put(document), put(position), tuple(int(i) for i in index))


def _derives_positions(lm: LanguageModel) -> bool:
    """True for models of the RoBERTa family, which number the tokens that are not padding by themselves."""
    return any(
        hasattr(module, "padding_idx") and hasattr(module, "position_embeddings") for module in lm.model.modules()
    )


@dataclass(frozen=True)
class Settings:
    """How contexts become rows."""

    hooks: tuple[Hook, ...]
    dtype: torch.dtype
    skip_special: bool
    padding: Literal["right", "left"]
    batch_tokens: int


def _run(lm: LanguageModel, contexts: Contexts, settings: Settings) -> list[Columns]:
    """Rows of contexts at every hook, in the order of the contexts; added tokens left out if so set."""
    wanted = contexts.position >= 0 if settings.skip_special else np.ones(len(contexts.ids), bool)
    # place of each kept token among the kept ones: batches come sorted by length, rows go back to the order of the text
    place = np.cumsum(wanted) - 1
    stored: list[Tensor] = []
    for batch in token_batches(
        lm,
        contexts,
        batch_tokens=settings.batch_tokens,
        padding=settings.padding,
        skip_special=settings.skip_special,
    ):
        spans = [np.arange(contexts.offsets[i], contexts.offsets[i + 1]) for i in batch.index]
        span = np.concatenate(spans)
        target = torch.from_numpy(place[span[wanted[span]]])
        for index, hidden in enumerate(activations(lm.model, settings.hooks, batch.inputs)):
            if len(stored) <= index:
                stored.append(torch.empty(int(wanted.sum()), hidden.shape[-1], dtype=settings.dtype))
            stored[index][target] = hidden[batch.keep.to(hidden.device)].to("cpu", settings.dtype)
    token, document, position = (
        torch.from_numpy(column[wanted]) for column in (contexts.ids, contexts.document, contexts.position)
    )
    return [Columns(x, token, document, position) for x in stored]


@dataclass(frozen=True)
class OutlierFilter:
    """Tokens whose norm is above `limit` are skipped; made by measuring the median norm of the first tokens."""

    times: float
    """How many times the median is too much."""
    median: float
    """Median norm of the tokens measured."""
    n_measured: int
    """Tokens measured."""

    @property
    def limit(self) -> float:
        """Largest norm that is kept."""
        return self.times * self.median

    def apply(self, rows: Columns) -> Columns:
        """The rows that are kept."""
        kept = rows.x.float().norm(dim=1) <= self.limit
        return rows if bool(kept.all()) else rows.map(lambda column: column[kept])

    def info(self) -> dict[str, Any]:
        """As plain JSON."""
        return {"times": self.times, "median": self.median, "limit": self.limit, "n_measured": self.n_measured}


def _measure(request: _Request, contexts: Contexts) -> list[tuple[int, OutlierFilter | None]]:
    """Width and outlier filter of every hook, from the first tokens: all that must be known before the long run."""
    n_kept = np.cumsum(_kept_per_context(contexts, request.settings.skip_special))
    first = contexts.pick(range(min(int(np.searchsorted(n_kept, CALIBRATION_TOKENS)) + 1, len(contexts))))
    measured = []
    for rows in _run(request.lm, first, request.settings):
        x = rows.x[:CALIBRATION_TOKENS].float()
        check_finite(x, 0, "the capture")
        keep = (
            None if request.outliers is None else OutlierFilter(request.outliers, float(x.norm(dim=1).median()), len(x))
        )
        measured.append((x.shape[1], keep))
    return measured


def _kept_per_context(contexts: Contexts, skip_special: bool) -> np.ndarray:
    """Rows that each context gives before the filter for outliers."""
    if not skip_special:
        return contexts.lengths()
    ends = np.concatenate([[0], np.cumsum(contexts.position >= 0)])
    return np.diff(ends[contexts.offsets])


@dataclass(frozen=True)
class _Request:
    """A capture or stream with everything looked up and checked, before anything expensive has run."""

    lm: LanguageModel
    texts: Callable[[], Iterator[Texts]]
    hooks: tuple[Hook, ...]
    several: bool
    tokens: int | None
    context: int
    pack: bool
    outliers: float | None
    settings: Settings

    def info(self, hook: Hook, texts: Texts) -> dict[str, Any]:
        """What is recorded with the rows of a hook."""
        from importlib.metadata import version

        around = special_tokens(self.lm.tokenizer)
        return {
            **self.lm.info,
            "hook": hook.name,
            "module": hook.path,
            "layer": hook.layer,
            "data": texts.info["name"],
            "data_split": texts.info.get("split"),
            "data_text": texts.info["text"],
            "data_digest": texts.digest,
            "tokens": self.tokens,
            "context": self.context,
            "pack": self.pack,
            "padding": self.settings.padding,
            "batch_tokens": self.settings.batch_tokens,
            "added_tokens": {"before": list(around.before), "after": list(around.after)},
            "versions": {name: version(name) for name in ("torch", "transformers")},
        }


def _request(
    model: str | os.PathLike[str] | LanguageModel,
    data: Data,
    layer: int | Sequence[int] | None,
    hook: str | Hook | Sequence[str | Hook] | None,
    site: Site,
    tokens: int | None,
    text: str,
    split: str | None,
    context: int | None,
    pack: bool,
    skip_special: bool,
    outliers: float | None,
    dtype: str | torch.dtype | None,
    padding: str,
    batch_tokens: int | None,
    model_dtype: str | torch.dtype | None,
    device: str | torch.device | None,
    device_map: Any,
) -> _Request:
    for name, value in (("tokens", tokens), ("context", context), ("batch_tokens", batch_tokens)):
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
            raise ConfigError(f"`{name}` must be a positive integer; got {value!r}.")
    if padding not in ("right", "left"):
        raise ConfigError(f"`padding` must be `right` or `left`; got {padding!r}.")
    if outliers is not None and not outliers > 1:
        raise ConfigError(f"`outliers` must be above 1 (times the median norm), or None to keep all; got {outliers!r}.")
    row_type = as_dtype(dtype)
    if row_type not in (None, *DTYPES.values()):
        raise ConfigError(f"`dtype` must be one of {listed(DTYPES)}; got {dtype!r}.")
    lm = load_model(model, dtype=model_dtype, device=device, device_map=device_map)
    if context is not None and context > lm.context:
        raise ConfigError(f"`context` must fit the model, which takes {lm.context} tokens; got {context}.")
    if (layer is None) == (hook is None):
        raise ConfigError(f"exactly one of `layer` and `hook` must be given; got layer={layer!r} and hook={hook!r}.")
    places: Any = layer if hook is None else hook
    several = isinstance(places, list | tuple)
    hooks = tuple(
        find_hook(lm.model, layer=place, site=site) if hook is None else find_hook(lm.model, place)
        for place in (places if isinstance(places, list | tuple) else [places])
    )
    names = [found.name for found in hooks]
    if not names or len(set(names)) < len(names):
        raise ConfigError(
            f"hooks must differ, and there must be one at least; got {listed(names) if names else 'none'}."
        )
    half = lm.dtype if lm.dtype in DTYPES.values() else torch.float32
    settings = Settings(hooks, row_type or half, skip_special, padding, batch_tokens or _batch_tokens(lm))  # type: ignore[arg-type]

    def texts() -> Iterator[Texts]:
        """The texts; first as many as should do, then, should they not, ever more of them."""
        characters = None if tokens is None else max(tokens * _CHARACTERS_PER_TOKEN, 10_000)
        while True:
            found = read_texts(data, text=text, split=split, columns=(), characters=characters)
            yield found
            if characters is None or found.info["complete"]:
                return
            characters *= 4

    if not isinstance(data, str | os.PathLike | Texts | Sequence):
        data = list(data)  # an iterator can be read only once
    return _Request(lm, texts, hooks, several, tokens, min(context or CONTEXT, lm.context), pack, outliers, settings)


def _contexts(request: _Request) -> tuple[Texts, Contexts, int]:
    """Contexts of a request, and how many of them hold its tokens; those behind replace what the filter takes out."""
    wanted = request.tokens
    for texts in request.texts():
        parts: list[Contexts] = []
        count = 0
        for first in range(0, len(texts), _TEXTS_AT_ONCE):
            part = tokenize(
                request.lm.tokenizer,
                texts[first : first + _TEXTS_AT_ONCE],
                context=request.context,
                pack=request.pack,
                first_document=first,
            )
            parts.append(part)
            count += int(_kept_per_context(part, request.settings.skip_special).sum())
            if wanted is not None and count >= wanted + wanted // 8 + CALIBRATION_TOKENS:
                break
        if wanted is None or count >= wanted or texts.info["complete"]:
            break
    contexts = Contexts.cat(parts)
    if not count:
        raise DataError(
            f"`{texts.info['name']}` must give at least one token; the tokenizer of `{request.lm.name}` makes none of "
            f"its {len(texts)} texts. Is it the tokenizer for this language?"
        )
    n_kept = np.cumsum(_kept_per_context(contexts, request.settings.skip_special))
    enough = len(contexts) if wanted is None else min(int(np.searchsorted(n_kept, wanted)) + 1, len(contexts))
    return texts, contexts, enough


def _groups(contexts: Contexts, enough: int) -> list[tuple[int, int]]:
    """Ranges of consecutive contexts that are run together; the first `enough` contexts end a group."""
    groups = []
    first = n_tokens = 0
    for last, length in enumerate(contexts.lengths(), 1):
        n_tokens += int(length)
        if n_tokens >= _GROUP_TOKENS or last in (enough, len(contexts)):
            groups.append((first, last))
            first, n_tokens = last, 0
    return groups


def capture(
    model: str | os.PathLike[str] | LanguageModel,
    data: Data,
    *,
    layer: int | Sequence[int] | None = None,
    hook: str | Hook | Sequence[str | Hook] | None = None,
    site: Site = "resid",
    tokens: int | None = None,
    out: str | os.PathLike[str] | None = None,
    text: str = "text",
    split: str | None = None,
    context: int | None = None,
    pack: bool = False,
    skip_special: bool = True,
    outliers: float | None = OUTLIER_TIMES,
    dtype: str | torch.dtype | None = None,
    padding: Literal["right", "left"] = "right",
    batch_tokens: int | None = None,
    model_dtype: str | torch.dtype | None = None,
    device: str | torch.device | None = None,
    device_map: Any = None,
    shard_rows: int | None = None,
    progress: Progress | None = None,
) -> Any:
    """Run a language model over texts and keep one row per token.

    Parameters
    ----------
    model
        ``"builtin"``, a folder, a hub name, or a `LanguageModel`; see `load_model`.
    data
        ``"builtin"``, a file, a hub data set, a list of texts; see `read_texts`.
    layer
        Number of a block, from 0: the residual stream after it. A list of layers gives a dictionary of sources.
    hook
        Instead of `layer`: a short name such as ``"layers.2.mlp"``, or the path of any module; or a list.
    site
        With `layer`: ``"resid"``, ``"mlp"`` or ``"attn"``.
    tokens
        Rows to make; exactly so many where the data suffices, else all there are. None: all.
    out
        Folder for the rows; None: keep them in memory. Run again after an interruption, capture goes on after the last
        whole shard, and the result is byte for byte that of an uninterrupted run.
    text, split
        Column of the text and split of the data.
    context
        Tokens that the model sees at once; None: `CONTEXT`, or what the model takes if that is less. Longer texts are
        cut into consecutive contexts.
    pack
        Fill contexts with text after text.
    skip_special
        Leave out tokens that the tokenizer adds: BOS, CLS, SEP.
    outliers
        Leave out tokens whose norm is above this many times the median; None: keep them.
    dtype
        Number type of the rows: ``float32``, ``bfloat16``, ``float16``; None: that of the model.
    padding, batch_tokens
        How contexts are put together for a forward pass (None: `BATCH_TOKENS`). Rows do not depend on it beyond
        rounding.
    model_dtype, device, device_map
        How the model is loaded; see `load_model`.
    shard_rows
        Rows in a file; None: about 64 MiB.
    progress
        Called with rows done and rows wanted (None when unknown) after every group of contexts.

    Returns
    -------
    Source
        `ArrayRows`, or `ShardRows` with `out`; for several hooks a dictionary from the hooks' names (``"layers.2"``) to
        sources, and in `out` one folder each. Rows come in the order of the texts.

    Raises
    ------
    ModelError, OfflineError
        The model or the hook cannot be had.
    DataError
        The texts cannot be read or give no token; a row is NaN or infinite.
    ConfigError
        A setting cannot work, or `out` holds another capture.
    BusyError
        Another run writes to `out`.
    """
    request = _request(
        model, data, layer, hook, site, tokens, text, split, context, pack, skip_special, outliers, dtype,
        padding, batch_tokens, model_dtype, device, device_map,
    )  # fmt: skip
    if out is None:
        return _capture(request, None, shard_rows, progress)
    with locked_folder(out):
        return _capture(request, Path(out), shard_rows, progress)


def _capture(request: _Request, out: Path | None, shard_rows: int | None, progress: Progress | None) -> Any:
    """Run the contexts group by group and hand the rows of each hook to its sink."""
    texts, contexts, enough = _contexts(request)
    measured = _measure(request, contexts)
    sinks = []
    for hook, (d_in, keep) in zip(request.hooks, measured):
        writer = None
        if out is not None:
            fingerprint = {
                **request.info(hook, texts),
                "skip_special": request.settings.skip_special,
                "outliers": request.outliers,
            }
            folder = out / hook.name if request.several else out
            writer = ShardWriter.open(folder, d_in, request.settings.dtype, fingerprint, shard_rows=shard_rows)
        sinks.append(_Sink(request.tokens, keep, writer))
    n_special = 0
    for number, (first, last) in enumerate(_groups(contexts, enough)):
        if all(sink.is_done for sink in sinks):
            break
        group = contexts.pick(range(first, last))
        n_special += int((group.position < 0).sum())
        if all(sink.is_done or number < sink.group for sink in sinks):
            continue
        for sink, rows in zip(sinks, _run(request.lm, group, request.settings)):
            sink.take(number, rows)
        if progress is not None:
            progress(min(sink.n_rows for sink in sinks), request.tokens)
    sources = {}
    for hook, sink in zip(request.hooks, sinks):
        special = {"skipped": request.settings.skip_special, "n": n_special}
        outliers = None if sink.keep is None else {**sink.keep.info(), "n": sink.n_outliers}
        info = {**request.info(hook, texts), "filters": {"special": special, "outliers": outliers}}
        sources[hook.name] = sink.finish(info)
    return sources if request.several else sources[request.hooks[0].name]


@dataclass
class _Sink:
    """Where the rows of one hook go: into memory, or into a folder, where it begins after the last whole shard."""

    tokens: int | None
    keep: OutlierFilter | None
    writer: ShardWriter | None
    group: int = 0
    skip: int = 0
    n_rows: int = 0
    n_outliers: int = 0
    parts: list[Columns] = field(default_factory=list)

    def __post_init__(self) -> None:
        if self.writer is not None:
            self.n_rows = self.writer.n_rows
            cursor = self.writer.cursor
            if cursor:
                self.group, self.skip, self.n_outliers = cursor["group"], cursor["row"], cursor["n_outliers"]

    @property
    def is_done(self) -> bool:
        """True when no more rows are wanted."""
        if self.writer is not None and self.writer.complete:
            return True
        return self.tokens is not None and self.n_rows >= self.tokens

    def take(self, group: int, rows: Columns) -> None:
        """Rows of a group of contexts, the filter not yet applied."""
        if self.is_done or group < self.group:
            return
        check_finite(rows.x.float(), self.n_rows - self.skip, "the capture")
        kept = rows if self.keep is None else self.keep.apply(rows)
        cursor = {"group": group, "n_outliers": self.n_outliers}
        self.n_outliers += len(rows) - len(kept)
        last = len(kept) if self.tokens is None else min(len(kept), self.skip + self.tokens - self.n_rows)
        first, self.skip = self.skip, 0
        kept = kept.map(lambda column: column[first:last])
        if self.writer is None:
            self.parts.append(kept)
        else:
            self.writer.append(kept, cursor, row=first)
        self.n_rows += len(kept)
        self.group = group + 1

    def finish(self, info: dict[str, Any]) -> Source:
        """The rows as a source."""
        if not self.n_rows:
            raise DataError("there must be at least one row; the filters left none. Is every text empty?")
        if self.writer is not None:
            if not self.writer.complete:
                self.writer.finish(info)
            return ShardRows(self.writer.folder)
        rows = Columns.cat(self.parts)
        return ArrayRows(rows.x, rows.token, rows.document, rows.position, info={**info, "kind": "capture"})


def stream(
    model: str | os.PathLike[str] | LanguageModel,
    data: Data,
    *,
    layer: int | None = None,
    hook: str | Hook | None = None,
    site: Site = "resid",
    tokens: int | None = None,
    text: str = "text",
    split: str | None = None,
    context: int | None = None,
    pack: bool = False,
    skip_special: bool = True,
    outliers: float | None = OUTLIER_TIMES,
    padding: Literal["right", "left"] = "right",
    batch_tokens: int | None = None,
    block_tokens: int = BLOCK_TOKENS,
    model_dtype: str | torch.dtype | None = None,
    device: str | torch.device | None = None,
    device_map: Any = None,
    prefetch: bool = True,
) -> StreamRows:
    """Rows that are computed while they are read, so that nothing is stored; see `capture` for the settings they share.

    Parameters
    ----------
    model, data, layer, hook, site, text, split, context, pack, skip_special, outliers, padding, batch_tokens
        As for `capture`.
    tokens
        Size of a pass: contexts until this many tokens are reached. None: all.
    block_tokens
        Tokens that are computed and shuffled together. Contexts are shuffled over the whole data before that.
    model_dtype, device, device_map
        How the model is loaded; see `load_model`.
    prefetch
        Compute the next block in a second thread while this one is being used.

    Returns
    -------
    StreamRows

    Raises
    ------
    ModelError, OfflineError, DataError, ConfigError
        As for `capture`.
    """
    if isinstance(block_tokens, bool) or not isinstance(block_tokens, int) or block_tokens < 1:
        raise ConfigError(f"`block_tokens` must be a positive integer; got {block_tokens!r}.")
    request = _request(
        model, data, layer, hook, site, tokens, text, split, context, pack, skip_special, outliers, None,
        padding, batch_tokens, model_dtype, device, device_map,
    )  # fmt: skip
    if request.several:
        raise ConfigError(f"a stream has one hook; got {listed(found.name for found in request.hooks)}. Use `capture`.")
    texts, contexts, enough = _contexts(request)
    ((d_in, keep),) = _measure(request, contexts)
    contexts = contexts.pick(range(enough))
    n_kept = int(_kept_per_context(contexts, skip_special).sum())
    info = {
        "kind": "stream",
        **request.info(request.hooks[0], texts),
        "filters": {
            "special": {"skipped": skip_special, "n": int((contexts.position < 0).sum())},
            "outliers": None if keep is None else keep.info(),
        },
        "d_in": d_in,
        "dtype": dtype_name(request.settings.dtype),
        "n_tokens": n_kept,
        "n_rows": n_kept if keep is None else None,
        "block_tokens": block_tokens,
    }
    digest = digest_bytes(json.dumps(info, sort_keys=True).encode())
    return StreamRows(
        lm=request.lm,
        contexts=contexts,
        info={**info, "digest": digest},
        keep=keep,
        settings=request.settings,
        block_contexts=max(1, round(block_tokens * len(contexts) / max(len(contexts.ids), 1))),
        prefetch=prefetch,
    )


@dataclass(frozen=True, eq=False)
class StreamRows:
    """Rows computed by a language model as they are read; made by `stream`.

    A block is a fixed number of contexts that follow one another in an order computed from (seed, epoch); its rows are
    permuted. To begin at a place, only its block is computed.
    """

    lm: LanguageModel
    contexts: Contexts = field(repr=False)
    info: dict[str, Any] = field(repr=False)
    keep: OutlierFilter | None
    settings: Settings = field(repr=False)
    block_contexts: int
    """Contexts in a block."""
    prefetch: bool = True
    """Whether a second thread computes the next block."""
    seconds: dict[str, float] = field(default_factory=lambda: {"lm": 0.0, "wait": 0.0})
    """Time so far: ``lm`` in the language model, ``wait`` in which the reader waited for it. Unit: s."""

    @property
    def d_in(self) -> int:
        """Width of a row."""
        return int(self.info["d_in"])

    @property
    def n_rows(self) -> int | None:
        """Rows of one pass; None with the filter for outliers, whose effect is known only afterwards."""
        return self.info["n_rows"]

    def batches(self, batch_rows: int, *, seed: int | None = None, start: tuple[int, int] = (0, 0)) -> Iterator[Batch]:
        """Rows in batches; see `saekit.data.Source.batches`."""
        start = check_reading(batch_rows, seed, start)
        if not self.prefetch:
            return read_batches(lambda number: self._waited(lambda: self._block(seed, number)), batch_rows, start)
        return read_ahead(lambda number: self._block(seed, number), batch_rows, start, waited=self._waited)

    def _waited(self, block: Callable[[], Block | None]) -> Block | None:
        begin = time.perf_counter()
        try:
            return block()
        finally:
            self.seconds["wait"] += time.perf_counter() - begin

    def _block(self, seed: int | None, number: int) -> Block | None:
        n_blocks = -(-len(self.contexts) // self.block_contexts)
        epoch, index = divmod(number, n_blocks)
        if seed is None and epoch:
            return None
        first, last = index * self.block_contexts, min((index + 1) * self.block_contexts, len(self.contexts))
        chosen = (
            range(first, last) if seed is None else random_order(len(self.contexts), "chunks", seed, epoch)[first:last]
        )
        begin = time.perf_counter()
        (rows,) = _run(self.lm, self.contexts.pick(chosen), self.settings)
        self.seconds["lm"] += time.perf_counter() - begin
        check_finite(rows.x.float(), 0, f"block {number} of the stream")
        if self.keep is not None:
            rows = self.keep.apply(rows)
        if seed is None:
            return Block(rows)
        return Block(rows, torch.from_numpy(random_order(len(rows), "rows", seed, number)))
