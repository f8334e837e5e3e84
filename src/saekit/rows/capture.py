"""Rows from a model: it runs over texts or images, and a hook gives one row per token or patch.

The rows are kept in memory or on disk; `saekit.rows.stream.stream` runs the model while somebody reads instead.
Padding never becomes a row. Tokens that the tokenizer or the model adds (BOS, CLS, SEP, registers) and tokens whose
norm is out of all proportion are skipped by settings that are recorded with the rows.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol, overload

import numpy as np
import torch
from torch import Tensor

from ..errors import ConfigError, DataError, listed
from ..files import check_path, locked_folder
from ..inputs.images import are_images, read_images
from ..inputs.records import repeatable
from ..interruption import Interruption, noted_interrupts
from ..models.hooks import Hook, are_several, find_hooks
from ..models.language import LanguageModel
from ..models.loading import load_model
from ..models.pretrained import DTYPES, PretrainedModel, as_dtype
from ..models.vision import VisionModel
from ..places import without_locations
from ..progress import shows_progress
from ..provenance import library_versions, release
from ..ranks import ALONE, Ranks, agreed, any_of, check_same, dealt, together
from ..sae.finite import check_finite
from ..settings import Progress, check_whole, silent, suggest_keywords
from .arrays import ArrayRows
from .capture_images import ImageReader
from .capture_texts import TextRunner, open_texts
from .outliers import OutlierFilter
from .settings import CaptureSettings
from .shards import ShardRows, ShardWriter
from .source import Columns

Captured = ArrayRows | ShardRows
Data = str | os.PathLike[str] | Iterable[Any] | np.ndarray | Tensor


class Reader(Protocol):
    """Texts or images in groups, and the model that turns a group into rows at every hook."""

    @property
    def unit(self) -> str:
        """What `done` counts: rows or images."""
        ...

    @property
    def total(self) -> int | None:
        """How many of them there will be, if known."""
        ...

    @property
    def n_groups(self) -> int:
        """Number of groups; a group is the grain of resuming."""
        ...

    def done(self, n_groups: int, n_rows: int) -> int:
        """Return how many units are done after `n_groups` groups that gave `n_rows` rows."""
        ...

    def sample(self) -> list[Columns]:
        """Return rows at every hook from which the median norm is taken."""
        ...

    def rows(self, group: int) -> list[Columns]:
        """Return the rows of a group at every hook, in order."""
        ...

    def info(self, hook: Hook) -> dict[str, Any]:
        """Return what is recorded with the rows: the data, and how they are read."""
        ...

    def special(self, n_groups: int) -> dict[str, Any]:
        """Return what is recorded about added tokens in the first groups."""
        ...


@overload
def capture(
    model: str | os.PathLike[str] | LanguageModel | VisionModel,
    data: Data,
    *,
    layer: int | None = None,
    hook: str | Hook | None = None,
    tokens: int | None = None,
    text: str = "text",
    out: str | os.PathLike[str] | None = None,
    settings: CaptureSettings = ...,
    progress: Progress | None = None,
) -> Captured: ...
@overload
def capture(
    model: str | os.PathLike[str] | LanguageModel | VisionModel,
    data: Data,
    *,
    layer: Sequence[int] | Literal["all"] | None = None,
    hook: Sequence[str | Hook] | None = None,
    tokens: int | None = None,
    text: str = "text",
    out: str | os.PathLike[str] | None = None,
    settings: CaptureSettings = ...,
    progress: Progress | None = None,
) -> dict[str, Captured]: ...
@suggest_keywords
@shows_progress
def capture(
    model: str | os.PathLike[str] | LanguageModel | VisionModel,
    data: Data,
    *,
    layer: int | Sequence[int] | Literal["all"] | None = None,
    hook: str | Hook | Sequence[str | Hook] | None = None,
    tokens: int | None = None,
    text: str = "text",
    out: str | os.PathLike[str] | None = None,
    settings: CaptureSettings = CaptureSettings(),
    progress: Progress | None = None,
) -> Captured | dict[str, Captured]:
    """Run a model over texts or images and keep one row per token or patch.

    Parameters
    ----------
    model
        ``"builtin"``, a folder, a hub name, or a model; see `load_model`. A vision model gives a row per patch, a
        vision-language model a row per image token.
    data
        Texts as `read_texts` takes them (``"builtin"``, a file, a hub data set, a list of texts), or images as
        `read_images` takes them (a folder, an array, a list of images); of a name, the model's type decides which.
    layer
        Number of a block, from 0: the residual stream after it. A list of layers, or ``"all"``,
        gives a dictionary of sources.
    hook
        Instead of `layer`: a short name such as ``"layers.2.mlp"``, or the path of any module; or a list.
    tokens
        Rows to make; exactly so many where the data suffice, else all there are. None: all.
    text
        Name of the text column.
    out
        Folder for the rows; None: keep them in memory. Run again after an interruption, capture continues after the
        last whole shard, and the result is byte for byte that of an uninterrupted run.
    settings
        Everything else.
    progress
        Called as ``progress("rows", done, total)`` after every group of contexts, or with images done
        [shown on stderr; ``False``: none].

    Returns
    -------
    ArrayRows or ShardRows
        `ShardRows` with `out`; for several hooks a dictionary from the hooks' names (``"layers.2"``) to sources, and in
        `out` one folder each. Rows come in the order of the data; `document` is the number of the text or image,
        `position` that of the token or patch.

    Raises
    ------
    ModelError, OfflineError
        The model or the hook is not available.
    DataError, FormatError
        The data cannot be read or hold no token; a row is NaN or infinite.
    ConfigError
        A setting cannot work, or `out` holds another capture.
    BusyError
        Another run writes to `out`.

    Examples
    --------
    ::

        rows = sk.capture("builtin", "builtin", layer=2, tokens=1_000_000)
        rows = sk.capture(model, texts, layer=2, settings=CaptureSettings(outliers=None))  # of saekit.rows.settings
    """
    with together("capture") as ranks:
        recording = _recording(model, data, (layer, hook), tokens, text, out, settings)
        sources = recording.run(None if out is None else check_path(out), progress or silent, ranks)
    return sources if recording.several else sources[recording.hooks[0].name]


def _recording(
    model: str | os.PathLike[str] | LanguageModel | VisionModel,
    data: Data,
    where: tuple[Any, Any],
    tokens: int | None,
    text: str,
    out: str | os.PathLike[str] | None,
    settings: CaptureSettings,
) -> Recording:
    """Look everything up; `where` is layer and hook."""
    layer, hook = where
    check_whole("capture", tokens=tokens)
    row_type = as_dtype(settings.dtype)
    if row_type not in (None, *DTYPES.values()):
        raise ConfigError(f"`dtype` must be one of {listed(DTYPES)}; got {settings.dtype!r}.")
    if settings.target is not None and out is not None:
        raise ConfigError("capture: `target` must be left out with `out`: folders of rows hold no targets.")
    data = repeatable(data)
    loaded = load_model(model, vision=are_images(data), **settings.placement)
    _check_applicable(settings, text, isinstance(loaded, VisionModel))
    hooks = find_hooks(loaded.model, layer, hook, site=settings.site)
    dtype = row_type or loaded.row_dtype
    reader: Reader
    if isinstance(loaded, VisionModel):
        images = read_images(data, split=settings.split)
        reader = ImageReader(loaded, images, hooks, dtype, settings.patches)
    else:
        reader = open_texts(TextRunner(loaded, hooks, dtype, settings), data, text=text, tokens=tokens)
    several = are_several(layer, hook)
    return Recording(reader, loaded, hooks, several=several, tokens=tokens, dtype=dtype, settings=settings)


_FOR_TEXTS = (
    "target",
    "context",
    "pack",
    "padding",
    "batch_tokens",
    "roles",
    "skip_tokens",
    "positions",
    "chat_template",
)
_FOR_IMAGES = ("special", "prompt", "batch_images")


def _check_applicable(settings: CaptureSettings, text: str, is_vision: bool) -> None:
    """Refuse settings for texts when images are looked at, and the other way round."""
    default = CaptureSettings()
    wrong = _FOR_TEXTS if is_vision else _FOR_IMAGES
    given = [name for name in wrong if getattr(settings, name) != getattr(default, name)]
    given += ["text"] if is_vision and text != "text" else []
    if given:
        these, those = ("texts", "images") if is_vision else ("images", "texts")
        raise ConfigError(f"capture: {listed(given)} must be left out: for {these}, and these are {those}.")


@dataclass(frozen=True)
class Recording:
    """A capture with everything looked up and checked, before anything expensive has run."""

    reader: Reader
    model: PretrainedModel
    hooks: tuple[Hook, ...]
    several: bool
    """Whether there is a source per hook, by name."""
    tokens: int | None
    dtype: torch.dtype
    settings: CaptureSettings

    def run(self, out: Path | None, progress: Progress, ranks: Ranks = ALONE) -> dict[str, Captured]:
        """Read group by group and hand the rows of each hook to its sink.

        Several ranks read a group each in turn; rank 0 has the sinks, and takes the groups in their order.
        """
        self._check_same(ranks)
        sinks: list[Sink] = []
        with ExitStack() as stack:

            def begin() -> None:
                if out is not None:
                    stack.enter_context(locked_folder(out))
                sinks.extend(self._sinks(out))

            agreed(ranks, begin)
            with noted_interrupts() as interruption:
                groups = self._groups(sinks, interruption, ranks)
                for group, found in dealt(ranks, groups, lambda group: (group, self.reader.rows(group))):
                    for sink, rows in zip(sinks, found):
                        sink.take(group, rows)
                    done = self.reader.done(group + 1, min(sink.n_rows for sink in sinks))
                    progress(self.reader.unit, done, self.reader.total)
            finished = agreed(ranks, lambda: self._finished(sinks))
        return {name: _source(*each) for name, each in finished.items()}

    def _groups(self, sinks: Sequence[Sink], interruption: Interruption, ranks: Ranks) -> Iterator[int]:
        """Yield the groups that are read, until every sink has its rows: as many at a time as there are ranks.

        Raises
        ------
        KeyboardInterrupt
            Somebody wants the capture to end; what was taken is kept.
        """
        read = 0

        def ahead() -> tuple[int, list[int]]:
            """Return what is read by now, and the next groups that a sink wants."""
            found: list[int] = []
            at = read
            while at < self.reader.n_groups and len(found) < ranks.size and not all(sink.is_done for sink in sinks):
                if any(sink.wants(at) for sink in sinks):
                    found.append(at)
                at += 1
            return at, found

        def pause() -> int:
            """Keep what was taken, and return how much that is."""
            for sink in sinks:
                sink.pause()
            return self.reader.done(read, min(sink.n_rows for sink in sinks))

        while True:
            if read and any_of(ranks, interruption.requested):
                raise KeyboardInterrupt(f"capture: interrupted after {agreed(ranks, pause):,} {self.reader.unit}")
            read, wanted = agreed(ranks, ahead)
            if not wanted:
                return
            yield from wanted

    def _finished(self, sinks: Sequence[Sink]) -> dict[str, tuple[Path | Columns, dict[str, Any]]]:
        """Return what the sources are made of: a folder, or rows and what is recorded with them."""
        special = self._special(sinks)
        return {
            hook.name: sink.finish({**self.info(hook), "filters": {"special": special, "outliers": sink.outliers}})
            for hook, sink in zip(self.hooks, sinks)
        }

    def _check_same(self, ranks: Ranks) -> None:
        """Refuse ranks that were started for different captures."""
        if ranks.size > 1:
            facts = {hook.name: without_locations(self.info(hook)) for hook in self.hooks}
            versions = {**library_versions(with_model=True), "saekit": release()}
            settings = {**vars(self.settings), "tokens": self.tokens}
            check_same(ranks, "capture", {"versions": versions, "settings": settings, "rows": facts})

    def _special(self, sinks: Sequence[Sink]) -> dict[str, Any]:
        """Return what is recorded about added tokens; the same for every hook, also where one was finished before."""
        finished = [sink.writer.info for sink in sinks if sink.writer is not None and sink.writer.complete]
        if finished:
            return dict(finished[0]["filters"]["special"])
        return self.reader.special(max(sink.group for sink in sinks))

    def info(self, hook: Hook) -> dict[str, Any]:
        """Return what is recorded with the rows of a hook."""
        wanted = {} if self.tokens is None else {"tokens": self.tokens}
        return {**self.model.info, **hook.info, **self.reader.info(hook), **wanted}

    def _sinks(self, out: Path | None) -> list[Sink]:
        """Return a sink per hook: width and outlier filter are measured before the long run."""
        sinks = []
        for hook, sample in zip(self.hooks, self.reader.sample()):
            for x in sample.matrices:
                check_finite(x.float(), 0, "the capture")
            keep = OutlierFilter.measured(self.settings.outliers, sample.x)
            writer = None
            if out is not None:
                shown = {"skip_special": self.settings.skip_special, "outliers": self.settings.outliers}
                writer = ShardWriter.open(
                    out / hook.name if self.several else out,
                    sample.x.shape[1],
                    self.dtype,
                    {**without_locations(self.info(hook)), **shown},
                    shard_rows=self.settings.shard_rows,
                )
            sinks.append(Sink(self.tokens, keep, writer))
        return sinks


@dataclass
class Sink:
    """Where the rows of one hook go: into memory, or into a folder, where it begins after the last whole shard."""

    tokens: int | None
    keep: OutlierFilter | None
    writer: ShardWriter | None
    group: int = 0
    """Number of the next group to take."""
    skip: int = 0
    """Rows of that group that are taken already."""
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
        """Whether no more rows are wanted."""
        if self.writer is not None and self.writer.complete:
            return True
        # a group whose rows were taken before an interruption is read again: its outliers are not yet counted
        return self.tokens is not None and self.n_rows >= self.tokens and not self.skip

    @property
    def outliers(self) -> dict[str, Any] | None:
        """What is recorded about outliers; None when nothing is left out for its norm."""
        return None if self.keep is None else {**self.keep.info(), "n": self.n_outliers}

    def wants(self, group: int) -> bool:
        """Return whether rows of a group are still to be taken."""
        return not self.is_done and group >= self.group

    def take(self, group: int, rows: Columns) -> None:
        """Take the rows of a group, the filter not yet applied."""
        if not self.wants(group):
            return
        for x in rows.matrices:
            check_finite(x.float(), self.n_rows - self.skip, "the capture")
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

    def pause(self) -> None:
        """Keep what has been taken, for the call that goes on."""
        if self.writer is not None and not self.writer.complete:
            self.writer.pause({"group": self.group, "row": self.skip, "n_outliers": self.n_outliers})

    def finish(self, info: dict[str, Any]) -> tuple[Path | Columns, dict[str, Any]]:
        """Return the folder, finished, or the rows; and what is recorded with them."""
        if not self.n_rows:
            raise DataError("there must be at least one row; the filters left none. Is every text empty?")
        if self.writer is not None:
            if not self.writer.complete:
                self.writer.finish(info)
            return self.writer.folder, info
        return Columns.cat(self.parts), {**info, "kind": "capture"}


def _source(rows: Path | Columns, info: dict[str, Any]) -> Captured:
    """Return captured rows as a source."""
    if isinstance(rows, Path):
        return ShardRows(rows)
    return ArrayRows(rows.x, rows.token, rows.document, rows.position, info=info, target=rows.target)
