"""Rows of several modules or models side by side, for crosscoders: the same tokens, read in several places.

Nothing is held: stored rows are read range by range, in an order of their own, and those of language models side by
side as they come.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, TypeAlias

import numpy as np
import torch
from torch import Tensor

from ..errors import ConfigError, DataError, ShapeError, listed
from ..files import digest_bytes
from ..inputs.records import repeatable
from ..models.hooks import Hook, are_several, find_hooks
from ..models.language import LanguageModel
from ..models.loading import load_language_model
from ..models.quiet import quiet_transformers
from ..randomness import hashed_key
from ..sae.parts import PARTS, widths_of
from ..sae.scaling import Scaling
from ..settings import suggest_keywords
from .opening import Rows, source_of
from .settings import StreamSettings
from .shuffle import CHUNK_ROWS, ShufflePlan, planned_block, read_ahead
from .source import Batch, Block, Columns, Source, Stored, check_reading, rows_in_words
from .stream import StreamRows, stream
from .tokens import CONTEXT, special_tokens

JOIN_ROWS = 65_536
"""Rows that are read at a time."""

COLUMNS = ("token", "document", "position")

PROBE = "Then the cat sat on 3 mats: naïve, old (but not `very`) and, by 12:45, gone.\n\treturn x[0] != y"
"""Text of which models that are read side by side must make the same tokens."""

AnyModel: TypeAlias = str | os.PathLike[str] | LanguageModel
"""A model as functions take it."""


def join_rows(sources: Mapping[str, Rows]) -> JoinedRows | JoinedStreams:
    """Return rows ``[n, d_1 + d_2 + ...]``: every row of one source, then the same row of the next.

    An SAE of joined rows is a crosscoder (`BatchTopK`): its latents read and write several layers of a model, or the
    same layer of a base model and a tuned one. Rows must be those of the same tokens. They are read as they are needed,
    from arrays and files, or from models that compute them meanwhile (what `stream` returns for several layers, or
    streams of two models): all of them stored, or none.

    Parameters
    ----------
    sources
        Two or more sources by name: sources, arrays, paths of stored rows. Widths may differ.

    Raises
    ------
    ConfigError
        Fewer than two sources, the same rows twice, rows with targets, without a last one, or of which only some know
        their tokens; some sources are stored and some are not.
    ShapeError
        Different numbers of rows.
    DataError
        The tokens, documents or positions of the rows differ: other texts, or another tokenizer. What lies between the
        first rows and the last ones is compared when it is read.

    Examples
    --------
    >>> a, b = torch.zeros(4, 2), torch.ones(4, 3)
    >>> join_rows({"base": a, "tuned": b}).d_in
    5
    """
    found = {name: source_of(each) for name, each in sources.items()}
    _check(found)
    stored = {name: each for name, each in found.items() if isinstance(each, Stored)}
    if not stored:
        return JoinedStreams(_in_equal_blocks(found))
    if len(stored) < len(found):
        raise ConfigError(
            f"join_rows: all sources must be stored, or none; {listed(stored)} are, {listed({*found} - {*stored})} are "
            "computed while they are read. Capture those first."
        )
    joined = JoinedRows(stored)
    n = joined.n_rows
    joined.read([(0, min(n, CHUNK_ROWS)), (max(n - CHUNK_ROWS, 0), n)])  # tells at once what is not the same
    return joined


@suggest_keywords
def stream_joined(
    model: AnyModel | Mapping[str, AnyModel],
    data: str | os.PathLike[str] | Iterable[object],
    *,
    layer: int | Sequence[int] | Literal["all"] | None = None,
    hook: str | Hook | Sequence[str | Hook] | None = None,
    tokens: int | None = None,
    text: str = "text",
    settings: StreamSettings = StreamSettings(outliers=None),
) -> JoinedStreams:
    """Return rows of several layers of a model, or of several models at one layer, computed while they are read.

    What `stream` returns, side by side. Everything is compared before a model reads a text.

    Parameters
    ----------
    model
        One model, or two or more by name: ``{"base": "owner/a", "tuned": "owner/b"}``.
    data, tokens, text
        As for `stream`.
    layer, hook
        Several where there is one model; one where there are several, which all of them must have.
    settings
        As for `stream`, without a filter for outliers, which leaves out other rows in every place. Contexts are cut
        as they suit the model that takes the fewest tokens.

    Raises
    ------
    ModelError, OfflineError, DataError, ConfigError
        As for `stream` and `join_rows`: no such layer in one of the models, or models with different tokenizers, say.
    """
    place: Any = hook if layer is None else layer
    models = dict(model) if isinstance(model, Mapping) else None
    if (models is None) != are_several(layer, hook) or (
        place != "all" and len(place if models is None else models) < 2
    ):
        told = "one model" if models is None else f"models {listed(models)}"
        raise ConfigError(
            "stream_joined: there must be one model and two or more layers or hooks, or two or more models and one "
            f"layer or hook; got {told} and {place!r}. Give layer=[1, 3], say, or models by name and layer=1."
        )
    asked: Any = {"layer": layer, "hook": hook, "tokens": tokens, "text": text}
    streams: Mapping[str, StreamRows]
    if models is None:
        streams = stream(model, data, **asked, settings=settings)  # type: ignore[assignment, arg-type]
    else:
        lms = {name: load_language_model(each, **settings.placement) for name, each in models.items()}
        _check_models(lms, layer, hook, settings)
        data, cut = repeatable(data), _cut_alike(lms.values(), settings)
        streams = {name: stream(lm, data, **asked, settings=each) for (name, lm), each in zip(lms.items(), cut)}
    joined = join_rows(streams)
    assert isinstance(joined, JoinedStreams)
    return joined


def _check_models(lms: Mapping[str, LanguageModel], layer: Any, hook: Any, settings: StreamSettings) -> None:
    """Refuse models without such a layer, and of different tokenizers."""
    ids = {}
    for name, lm in lms.items():
        find_hooks(lm.model, layer, hook, site=settings.site)
        with quiet_transformers():  # which would say that a text is too long for the smallest models
            ids[name] = list(lm.tokenizer(PROBE, add_special_tokens=False)["input_ids"])
    first = next(iter(ids))
    if other := next((name for name in ids if ids[name] != ids[first]), None):
        raise ConfigError(
            f"stream_joined: all models must have the same tokenizer; those of `{first}` and `{other}` make other "
            f"tokens of {PROBE!r}. Give a base model and one that was tuned from it, say."
        )


def _cut_alike(lms: Iterable[LanguageModel], settings: StreamSettings) -> list[StreamSettings]:
    """Return the settings for each model: as many tokens of the text in a context, whatever is added around them."""
    added = [len(each.before + each.after) for each in (special_tokens(lm.tokenizer) for lm in lms)]
    room = min(min(settings.context or CONTEXT, lm.context) - extra for lm, extra in zip(lms, added))
    return [replace(settings, context=room + extra) for extra in added]


def _info_of(sources: Mapping[str, Source], kind: str) -> dict[str, Any]:
    """Return what joined rows are."""
    digests = {name: each.info.get("digest") for name, each in sources.items()}
    known = all(each is not None for each in digests.values())
    return {
        "kind": kind,
        PARTS: [{"name": name, "width": each.d_in, **_place(each)} for name, each in sources.items()],
        "n_rows": next(iter(sources.values())).n_rows,
        "d_in": sum(each.d_in for each in sources.values()),
        "dtype": "float32",
        **({"digest": digest_bytes(json.dumps([*digests.items()]).encode())} if known else {}),
    }


class Sized:
    """Rows whose width and number are what their `info` says."""

    info: dict[str, Any]

    @property
    def d_in(self) -> int:
        """Width of a row: the sum of those of the sources."""
        return int(self.info["d_in"])

    @property
    def n_rows(self) -> int:
        """Rows of one pass."""
        return int(self.info["n_rows"])


@dataclass(frozen=True, eq=False)
class JoinedRows(Sized):
    """Stored rows of several sources side by side; made by `join_rows`."""

    __repr__ = rows_in_words

    sources: Mapping[str, Stored] = field(repr=False)
    info: dict[str, Any] = field(init=False, repr=False)
    plan: ShufflePlan = field(init=False, repr=False)
    """In which order rows are read."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "info", _info_of(self.sources, "joined"))
        object.__setattr__(self, "plan", ShufflePlan.for_rows(self.n_rows, 4 * self.d_in))

    def read(self, ranges: list[tuple[int, int]]) -> Columns:
        """Return the rows of these ranges; see `saekit.rows.source.Stored`."""
        parts = {name: each.read(ranges) for name, each in self.sources.items()}
        rows = [torch.arange(first, last) for first, last in ranges]
        return _side_by_side(parts, lambda at: f"row {int(torch.cat(rows)[at]):,}")

    def batches(self, batch_rows: int, *, seed: int | None = None, start: tuple[int, int] = (0, 0)) -> Iterator[Batch]:
        """Yield rows in batches, see `saekit.rows.source.Source.batches`; a thread reads the next block meanwhile."""
        start = check_reading(self, batch_rows, seed, start)
        return _planned_batches(self, batch_rows, seed, start)


def _planned_batches(
    rows: JoinedRows | NullRows, batch_rows: int, seed: int | None, start: tuple[int, int]
) -> Iterator[Batch]:
    """Yield rows in batches."""

    def block_at(number: int) -> Block | None:
        return planned_block(rows.plan, seed, number, rows.read)

    return read_ahead(block_at, batch_rows, start)


@dataclass(frozen=True, eq=False)
class JoinedStreams(Sized):
    """Rows of several models or modules side by side, computed while they are read; made by `join_rows`."""

    __repr__ = rows_in_words

    sources: Mapping[str, Source] = field(repr=False)
    info: dict[str, Any] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "info", _info_of(self.sources, "joined-streams"))

    def batches(self, batch_rows: int, *, seed: int | None = None, start: tuple[int, int] = (0, 0)) -> Iterator[Batch]:
        """Yield rows in batches, in the order that the sources have in common; see `Source.batches`."""
        own = [each.batches(batch_rows, seed=seed, start=start) for each in self.sources.values()]
        for batches in zip(*own, strict=True):
            columns = _side_by_side(dict(zip(self.sources, batches)), lambda at: f"row {at:,} of a batch")
            yield replace(batches[0], x=columns.x)


def _side_by_side(parts: Mapping[str, Columns], place: Callable[[int], str]) -> Columns:
    """Return the same rows of all sources as rows; refuse those of other tokens, documents or positions."""
    (name, first), *others = parts.items()
    for other_name, other in others:
        for column in COLUMNS:
            a, b = getattr(first, column), getattr(other, column)
            if (a is None) != (b is None):
                raise ConfigError(
                    f"join_rows: all sources must know their {column}s, or none; only one of `{name}` and "
                    f"`{other_name}` does. Capture both alike."
                )
            if a is not None and not torch.equal(a, b):
                at = int((a != b).nonzero()[0])
                raise DataError(
                    f"join_rows: the {column}s of all sources must be the same; in {place(at)} `{name}` has "
                    f"{int(a[at])}, `{other_name}` {int(b[at])}. Capture both from the same texts; models need the "
                    "same tokenizer."
                )
    return replace(first, x=torch.cat([each.x.float() for each in parts.values()], 1))


def _in_equal_blocks(sources: Mapping[str, Source]) -> dict[str, Source]:
    """Return sources with all streams in blocks of as many contexts as those of the first.

    Raises
    ------
    DataError
        Streams of other tokens, or other contexts; before a model reads any.
    """
    streams = {name: each for name, each in sources.items() if isinstance(each, StreamRows)}
    found = dict(sources)
    for name, each in streams.items():
        first, of_first = next(iter(streams.items()))
        if not all(np.array_equal(*both) for both in zip(_tokens_of(each), _tokens_of(of_first), strict=True)):
            raise DataError(
                f"join_rows: the tokens of all sources must be the same; those of `{first}` and `{name}` are not. "
                "Stream both from the same texts; models need the same tokenizer."
            )
        mine, wanted = (one.shared.runner.n_rows(one.contexts) for one in (each, of_first))
        if not np.array_equal(mine, wanted):
            raise DataError(
                f"join_rows: texts must be cut into the same contexts for all sources; those of `{first}` and "
                f"`{name}` are not. Use stream_joined, which does, or give the one with a longer context less."
            )
        found[name] = replace(each, block_contexts=of_first.block_contexts)
    return found


def _tokens_of(source: StreamRows) -> tuple[np.ndarray, ...]:
    """Return token, document and position of every row."""
    contexts = source.contexts
    kept = contexts.position >= 0
    return contexts.ids[kept], contexts.document[kept], contexts.position[kept]


@dataclass(frozen=True, eq=False)
class ScaledRows:
    """The rows of a source after a scaling: what a crosscoder is trained on."""

    source: Source
    scaling: Scaling

    @property
    def d_in(self) -> int:
        """Width of a row."""
        return self.source.d_in

    @property
    def n_rows(self) -> int | None:
        """Rows of one pass."""
        return self.source.n_rows

    @property
    def info(self) -> dict[str, Any]:
        """What the rows are, before the scaling."""
        return self.source.info

    def batches(self, batch_rows: int, *, seed: int | None = None, start: tuple[int, int] = (0, 0)) -> Iterator[Batch]:
        """Yield scaled rows in batches; see `Source.batches`."""
        for batch in self.source.batches(batch_rows, seed=seed, start=start):
            yield replace(batch, x=self.scaling.apply(batch.x)[0])


def with_equal_parts(source: Source) -> Source:
    """Return joined rows with each part centred and scaled to the same total variance; other rows as they are.

    It takes a pass over all rows, which models that compute them make once more.

    ``u_m = (x_m - mean_m) * f_m`` with one factor ``f_m = sqrt(d_in / (M v_m))`` for each of the M parts, ``v_m`` the
    mean of ``|x_m - mean_m|^2`` over all rows: no part outweighs the others in the loss (2504.02922).

    Raises
    ------
    DataError
        The rows of a part are all the same.
    """
    widths = widths_of(source.info)
    if widths is None:
        return source
    pivot = next(source.batches(JOIN_ROWS)).x.double().mean(0)  # near the mean: squares around it lose no digits
    sums, squares, count = torch.zeros_like(pivot), torch.zeros_like(pivot), 0
    for batch in source.batches(JOIN_ROWS):
        offset = batch.x.double() - pivot
        sums += offset.sum(0)
        squares += offset.square().sum(0)
        count += len(offset)
    mean = pivot + sums / count
    squares -= sums.square() / count
    factors = []
    for part, own in zip(source.info[PARTS], squares.split(widths)):
        variance = float(own.sum()) / count
        if not variance > 0:
            raise DataError(f"train: rows of a crosscoder must vary; those of `{part['name']}` are all the same.")
        factors.append(torch.full((len(own),), (source.d_in / len(widths) / variance) ** 0.5, dtype=torch.float64))
    scale = torch.cat(factors).float()
    return ScaledRows(source, Scaling("standardize", scale=scale, mean=mean.float()))


@dataclass(frozen=True, eq=False)
class NullRows(Sized):
    """Rows whose two sources hold the same but for noise; made by `null_rows`."""

    __repr__ = rows_in_words

    rows: Stored = field(repr=False)
    size: Tensor = field(repr=False)
    """Standard deviation of the noise ``[d]``, in the units of the first source."""
    seed: int
    info: dict[str, Any] = field(init=False, repr=False)
    plan: ShufflePlan = field(init=False, repr=False)
    """In which order rows are read."""

    def __post_init__(self) -> None:
        own = self.rows.info
        parts = [{"name": part["name"], "width": part["width"], "null": True} for part in own[PARTS]]
        digest = {} if "digest" not in own else {"digest": digest_bytes(f"null {self.seed} {own['digest']}".encode())}
        object.__setattr__(self, "info", {**own, "kind": "joined-null", PARTS: parts, **digest})
        object.__setattr__(self, "plan", ShufflePlan.for_rows(self.n_rows, 4 * self.d_in))

    def read(self, ranges: list[tuple[int, int]]) -> Columns:
        """Return the rows of these ranges; see `saekit.rows.source.Stored`."""
        columns = self.rows.read(ranges)
        a = columns.x[:, : len(self.size)]
        noise = torch.cat([self._noise(first, last) for first, last in ranges])
        return replace(columns, x=torch.cat([a, a + self.size * noise], 1))

    def _noise(self, first: int, last: int) -> Tensor:
        """Return the noise of rows `first` to `last`, each drawn for its number: whoever reads it gets the same."""
        chunks = range(first // CHUNK_ROWS, -(-last // CHUNK_ROWS))
        drawn = [
            torch.randn(
                CHUNK_ROWS,
                len(self.size),
                generator=torch.Generator().manual_seed(hashed_key("joined null", self.seed, chunk, n_bytes=7)),
            )
            for chunk in chunks
        ]
        skipped = first - chunks.start * CHUNK_ROWS
        return torch.cat(drawn)[skipped : skipped + last - first]

    def batches(self, batch_rows: int, *, seed: int | None = None, start: tuple[int, int] = (0, 0)) -> Iterator[Batch]:
        """Yield rows in batches; see `saekit.rows.source.Source.batches`."""
        start = check_reading(self, batch_rows, seed, start)
        return _planned_batches(self, batch_rows, seed, start)


def null_rows(rows: Source, *, seed: int = 0) -> NullRows:
    """Return joined rows whose two sources hold the same: the first one, and the first one with noise.

    The noise is Gaussian and independent in every dimension, as large there as the difference of the two sources that
    were joined (each centred and scaled as for training), so that what a crosscoder of these rows calls specific to a
    source is an error.

    Parameters
    ----------
    rows
        Joined rows of two stored sources of the same width.
    seed
        Random seed of the noise.

    Raises
    ------
    ConfigError
        Rows of other than two sources, sources of different widths, or rows that are computed while they are read.
    """
    widths = widths_of(rows.info)
    if widths is None or len(widths) != 2 or widths[0] != widths[1]:
        raise ConfigError(
            f"null_rows: the rows must be joined ones of two sources of the same width; they have {widths}. There is "
            "no null for others: their difference has no size."
        )
    if not isinstance(rows, Stored):
        raise ConfigError(
            "null_rows: the sources must be stored; these are computed while they are read. Capture them."
        )
    scaled = with_equal_parts(rows)
    assert isinstance(scaled, ScaledRows)
    scale, width = scaled.scaling.scale, widths[0]
    assert scale is not None
    squares, count = torch.zeros(width, dtype=torch.float64), 0
    for batch in scaled.batches(JOIN_ROWS):
        a, b = batch.x.double().split(widths, 1)
        squares += (b - a).square().sum(0)
        count += len(a)
    return NullRows(rows, ((squares / count).sqrt() / scale[:width].double()).float(), seed)


JOINED, NULL = "joined:", "joined-null:"
"""What addresses of joined rows, and of their null, begin with."""


def joined_rows(address: str) -> JoinedRows | JoinedStreams | NullRows:
    """Return the rows of an address ``joined:base=PATH,tuned=PATH``, or ``joined-null:…`` for their null.

    Raises
    ------
    ConfigError
        Not names and paths; see `join_rows` and `null_rows`.
    """
    rows = join_rows(named_paths(address))
    return null_rows(rows) if address.startswith(NULL) else rows


def named_paths(address: str) -> dict[str, str]:
    """Return the paths of an address by name.

    >>> named_paths("joined:base=rows-a, tuned=rows-b")
    {'base': 'rows-a', 'tuned': 'rows-b'}

    Raises
    ------
    ConfigError
        A name or a path is missing, or a name comes twice.
    """
    pairs = [each.partition("=") for each in address.partition(":")[2].split(",")]
    names = [name.strip() for name, _, _ in pairs]
    if any(not name or not path.strip() for name, (_, _, path) in zip(names, pairs)) or len({*names}) < len(names):
        raise ConfigError(
            f"`{address}` must give a name and a path for each source, different names. Write "
            f"{JOINED}base=PATH,tuned=PATH, say."
        )
    return {name: path.strip() for name, (_, _, path) in zip(names, pairs)}


def _check(sources: Mapping[str, Source]) -> None:
    if len(sources) < 2:
        raise ConfigError(f"join_rows: there must be two sources or more; got {len(sources)}. Give each a name.")
    known: dict[str, str] = {}
    for name, source in sources.items():
        if source.info.get("d_out") is not None or source.info.get(PARTS) is not None:
            raise ConfigError(f"join_rows: `{name}` must be rows of one place, without targets. Capture it alone.")
        if source.n_rows is None:
            raise ConfigError(
                f"join_rows: `{name}` must know how many rows it has; it is without end, or leaves out outliers as it "
                "goes (StreamSettings(outliers=None) does not). Capture it, or stream it without."
            )
        digest = source.info.get("digest")
        if digest is not None and digest in known:
            raise ConfigError(
                f"join_rows: the rows must come from different places; `{known[digest]}` and `{name}` are the same "
                "rows. Give another hook or model."
            )
        known[str(digest)] = name
    counts = {name: each.n_rows for name, each in sources.items()}
    if len(set(counts.values())) > 1:
        told = ", ".join(f"`{name}` {count:,}" for name, count in counts.items())
        raise ShapeError(
            f"join_rows: all sources must have the same rows; they have {told}. Capture them from the same texts, with "
            "the same tokenizer and positions, and without a filter for outliers, which differ from module to module."
        )


def _place(source: Source) -> dict[str, Any]:
    keys = ("model", "model_digest", "hook", "layer", "data", "digest")
    return {key: source.info[key] for key in keys if source.info.get(key) is not None}
