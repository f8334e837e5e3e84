"""Rows of several modules or models side by side, for crosscoders: the same tokens, read in several places."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..errors import ConfigError, DataError, ShapeError
from ..memory import check_memory
from ..sae.parts import PARTS, widths_of
from ..sae.scaling import Scaling
from .arrays import ArrayRows
from .opening import Rows, source_of
from .source import Batch, Source

JOIN_ROWS = 65_536
"""Rows that are read at a time."""


def join_rows(sources: Mapping[str, Rows]) -> ArrayRows:
    """Return rows ``[n, d_1 + d_2 + ...]``: every row of one source, then the same row of the next.

    An SAE of joined rows is a crosscoder (`BatchTopK`): its latents read and write several layers of a model, or the
    same layer of a base model and a tuned one. Rows must be those of the same tokens. All are held in memory.

    Parameters
    ----------
    sources
        Two or more sources by name: sources, arrays, paths of stored rows. Widths may differ.

    Raises
    ------
    ConfigError
        Fewer than two sources, the same rows twice, rows with targets, or rows of which only some know their tokens.
    ShapeError
        Different numbers of rows.
    DataError
        The tokens, documents or positions of the rows differ: other texts, or another tokenizer. NaN.

    Examples
    --------
    >>> a, b = torch.zeros(4, 2), torch.ones(4, 3)
    >>> join_rows({"base": a, "tuned": b}).d_in
    5
    """
    found = {name: source_of(each) for name, each in sources.items()}
    _check(found)
    names, (first, *_) = list(found), found.values()
    n_rows = first.n_rows or 0
    width = sum(each.d_in for each in found.values())
    check_memory("join_rows", {f"{n_rows:,} rows of width {width:,}": 4 * n_rows * width}, "Use fewer rows.")
    x = torch.empty(n_rows, width)
    columns: dict[str, Tensor | None] = {}
    at = 0
    for name, source in found.items():
        own = _read_into(x[:, at : at + source.d_in], source)
        at += source.d_in
        if name == names[0]:
            columns = own
        else:
            _check_same(columns, own, names[0], name)
    parts = [{"name": name, "width": each.d_in, **_place(each)} for name, each in found.items()]
    return ArrayRows(x, info={PARTS: parts}, **columns)


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
    mean = torch.zeros(source.d_in, dtype=torch.float64)
    count = 0
    for batch in source.batches(JOIN_ROWS):
        mean += batch.x.double().sum(0)
        count += len(batch.x)
    mean /= count
    squares = torch.zeros_like(mean)
    for batch in source.batches(JOIN_ROWS):
        squares += (batch.x.double() - mean).square().sum(0)
    factors = []
    for part, own in zip(source.info[PARTS], squares.split(widths)):
        variance = float(own.sum()) / count
        if not variance > 0:
            raise DataError(f"train: rows of a crosscoder must vary; those of `{part['name']}` are all the same.")
        factors.append(torch.full((len(own),), (source.d_in / len(widths) / variance) ** 0.5, dtype=torch.float64))
    scale = torch.cat(factors).float()
    return ScaledRows(source, Scaling("standardize", scale=scale, mean=mean.float()))


def null_rows(rows: Source, *, seed: int = 0) -> ArrayRows:
    """Return joined rows whose two sources hold the same: the first one, and the first one with noise.

    The noise is Gaussian and independent in every dimension, as large there as the difference of the two sources that
    were joined (each centred and scaled as for training), so that what a crosscoder of these rows calls specific to a
    source is an error.

    Parameters
    ----------
    rows
        Joined rows of two sources of the same width.
    seed
        Random seed of the noise.

    Raises
    ------
    ConfigError
        Rows of other than two sources, or sources of different widths.
    """
    widths = widths_of(rows.info)
    if widths is None or len(widths) != 2 or widths[0] != widths[1]:
        raise ConfigError(
            f"null_rows: the rows must be joined ones of two sources of the same width; they have {widths}. There is "
            "no null for others: their difference has no size."
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
    size = ((squares / count).sqrt() / scale[:width].double()).float()
    stream = torch.Generator().manual_seed(seed)
    x, columns = torch.empty(count, 2 * width), _columns_of(rows)
    at = 0
    for batch in rows.batches(JOIN_ROWS):
        a = batch.x[:, :width]
        x[at : at + len(a)] = torch.cat([a, a + size * torch.randn(a.shape, generator=stream)], 1)
        at += len(a)
    names = [part["name"] for part in rows.info[PARTS]]
    parts = [{"name": name, "width": width, "null": True} for name in names]
    return ArrayRows(x, info={PARTS: parts}, **columns)


def _columns_of(rows: Source) -> dict[str, Tensor | None]:
    return {name: getattr(rows, name, None) for name in ("token", "document", "position")}


JOINED, NULL = "joined:", "joined-null:"
"""What addresses of joined rows, and of their null, begin with."""


def joined_rows(address: str) -> ArrayRows:
    """Return the rows of an address ``joined:base=PATH,tuned=PATH``, or ``joined-null:…`` for their null.

    Raises
    ------
    ConfigError
        Not names and paths; see `join_rows` and `null_rows`.
    """
    is_null = address.startswith(NULL)
    pairs = [each.partition("=") for each in address.partition(":")[2].split(",")]
    names = [name.strip() for name, _, _ in pairs]
    if any(not name or not path.strip() for name, (_, _, path) in zip(names, pairs)) or len({*names}) < len(names):
        raise ConfigError(
            f"`{address}` must give a name and a path for each source, different names. Write "
            f"{JOINED}base=rows-a,tuned=rows-b, say."
        )
    rows = join_rows({name: path.strip() for name, (_, _, path) in zip(names, pairs)})
    return null_rows(rows) if is_null else rows


def _check(sources: Mapping[str, Source]) -> None:
    if len(sources) < 2:
        raise ConfigError(f"join_rows: there must be two sources or more; got {len(sources)}. Give each a name.")
    known: dict[str, str] = {}
    for name, source in sources.items():
        if source.info.get("d_out") is not None or source.info.get(PARTS) is not None:
            raise ConfigError(f"join_rows: `{name}` must be rows of one place, without targets. Capture it alone.")
        if source.n_rows is None:
            raise ConfigError(f"join_rows: `{name}` must have a last row; it is without end. Capture some of it.")
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
            f"join_rows: all sources must have the same rows; they have {told}. Capture them from the same texts."
        )


def _read_into(x: Tensor, source: Source) -> dict[str, Tensor | None]:
    """Fill `x` with the rows of a source; return its columns."""
    kept: dict[str, list[Tensor | None]] = {"token": [], "document": [], "position": []}
    at = 0
    for batch in source.batches(JOIN_ROWS):
        x[at : at + len(batch.x)] = batch.x
        at += len(batch.x)
        for column, parts in kept.items():
            parts.append(getattr(batch, column))
    return {
        column: None if any(each is None for each in parts) else torch.cat([each for each in parts if each is not None])
        for column, parts in kept.items()
    }


def _check_same(
    one: Mapping[str, Tensor | None], other: Mapping[str, Tensor | None], name: str, other_name: str
) -> None:
    """Refuse rows of other tokens."""
    for column, a in one.items():
        b = other[column]
        if (a is None) != (b is None):
            raise ConfigError(
                f"join_rows: all sources must know their {column}s, or none; only one of `{name}` and `{other_name}` "
                "does. Capture both alike."
            )
        if a is not None and b is not None and not torch.equal(a, b):
            at = int((a != b).nonzero()[0])
            raise DataError(
                f"join_rows: the {column}s of all sources must be the same; in row {at} `{name}` has {int(a[at])}, "
                f"`{other_name}` {int(b[at])}. Capture both from the same texts; models need the same tokenizer."
            )


def _place(source: Source) -> dict[str, Any]:
    keys = ("model", "model_digest", "hook", "layer", "data", "digest")
    return {key: source.info[key] for key in keys if source.info.get(key) is not None}
