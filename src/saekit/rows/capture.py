"""Rows from a language model: texts are cut into contexts, the model runs over them, a hook gives one row per token.

`capture` runs the model once and keeps the rows, in memory or on disk; `stream` runs it while somebody reads.
Padding never becomes a row. Tokens that the tokenizer adds (BOS, CLS, SEP) and tokens whose norm is out of all
proportion are skipped by settings that are recorded with the rows.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from ..errors import ConfigError, DataError, listed
from ..files import locked_folder
from ..inputs.texts import Texts, read_texts
from ..models.hooks import Hook, Site, activations, find_hook
from ..models.language import LanguageModel
from ..models.loading import load_language_model
from ..models.pretrained import DTYPES, as_dtype
from .arrays import ArrayRows
from .outliers import CALIBRATION_TOKENS, OUTLIER_TIMES, OutlierFilter
from .shards import ShardRows, ShardWriter
from .source import Columns, Source, check_finite
from .tokens import CONTEXT, Contexts, _batch_tokens, special_tokens, token_batches, tokenize

Data = str | os.PathLike[str] | Iterable[Any]
Progress = Callable[[int, int | None], object]

_GROUP_TOKENS = 16_384  # tokens in consecutive contexts that are sorted by length together; the grain of resuming
_TEXTS_AT_ONCE = 512
_CHARACTERS_PER_TOKEN = 12  # how much text is read for a number of tokens before more is fetched


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
    lm = load_language_model(model, dtype=model_dtype, device=device, device_map=device_map)
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
