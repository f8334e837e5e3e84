"""Rows made from a known dictionary, so that what an SAE finds can be compared with what is there.

    x = mean_offset + sum_j c_j * dictionary_j + noise * e,    c_j = fires_j * magnitude_j,    e ~ N(0, 1 / d_in)

where feature j fires independently with probability ``frequencies[j]``.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, fields
from typing import Any

import torch
from torch import Tensor

from ..errors import ConfigError
from ..files import digest_bytes
from ..kinds import LARGEST
from ..memory import check_memory
from ..randomness import hashed_key, random_order
from ..settings import is_whole, suggest_keywords
from .shuffle import ShufflePlan, planned_block, read_batches
from .source import Batch, Block, Columns, check_reading

_CHUNK_ROWS = 1024  # rows generated together; a chunk is a function of (seed, chunk number)
_ENDLESS_CHUNKS = 16  # chunks in a block when there is no last row


@suggest_keywords
@dataclass(frozen=True, kw_only=True)
class SyntheticRows:
    """Rows ``[n_rows, d_in]`` that are sparse sums of known directions; generated, never stored.

    Any part can be made without the parts before it, so the source may be endless and a place in it is exact.

    Examples
    --------
    >>> rows = SyntheticRows(d_in=16, n_features=64, n_rows=1000)
    >>> rows.dictionary.shape, next(rows.batches(100, seed=0)).x.shape
    (torch.Size([64, 16]), torch.Size([100, 16]))
    """

    d_in: int
    """Width of a row."""
    n_features: int
    """Directions in the dictionary; more than `d_in` means superposition."""
    l0: float = 8.0
    """Mean number of features that fire in a row. Unit: features per row, between 0 and `n_features`."""
    power: float = 0.5
    """Exponent of the power law of frequencies, ``frequency_j ~ (j + 1) ** -power``; 0 makes all equal."""
    magnitude: float = 1.0
    """Mean size of a feature that fires; sizes are ``magnitude * (0.5 + 0.5 * Exponential(1))``, never negative."""
    noise: float = 0.02
    """Expected length of the Gaussian noise added to a row."""
    mean: float = 0.0
    """Length of a fixed offset added to every row."""
    n_rows: int | None = 1_048_576
    """Rows of one pass; None for rows without end."""
    rows_per_document: int = 32
    """Rows that share a document number (they are independent all the same)."""
    seed: int = 0
    """Determines dictionary and rows."""
    dictionary: Tensor = field(init=False, repr=False, compare=False)
    """Unit directions ``[n_features, d_in]``, most frequent first."""
    frequencies: Tensor = field(init=False, repr=False, compare=False)
    """Probability ``[n_features]`` that a feature fires in a row, float64, falling."""
    offset: Tensor = field(init=False, repr=False, compare=False)
    """What is added to every row, ``[d_in]``; its length is `mean`."""

    def __post_init__(self) -> None:
        self._check()
        directions = torch.randn(self.n_features, self.d_in, generator=self._generator("dictionary"))
        offset = torch.randn(self.d_in, generator=self._generator("offset"))
        object.__setattr__(self, "dictionary", directions / directions.norm(dim=1, keepdim=True))
        object.__setattr__(self, "frequencies", _power_law(self.n_features, self.power, self.l0))
        object.__setattr__(self, "offset", offset * (self.mean / offset.norm()))

    def _check(self) -> None:
        """Refuse settings from which no rows can be made."""
        self._check_sizes()
        if not 0 < self.l0 <= self.n_features:
            raise ConfigError(
                f"`SyntheticRows.l0` must lie above 0 and not above n_features={self.n_features}; got {self.l0!r}."
            )
        for name in ("power", "magnitude", "noise", "mean"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise ConfigError(f"`SyntheticRows.{name}` must be 0 or more; got {getattr(self, name)!r}.")
        check_memory("SyntheticRows", self._memory(), "Use a smaller `d_in` or fewer features.")

    def _check_sizes(self) -> None:
        """Refuse a width or a number that is not a positive integer; the rows alone may be without end."""
        sizes = {name: getattr(self, name) for name in ("d_in", "n_features", "rows_per_document")}
        for name, value in {**sizes, "n_rows": self.n_rows}.items():
            if value is None and name == "n_rows":
                continue
            if not (is_whole(value) and 1 <= value <= LARGEST):
                what = f"a positive integer{', or None for no end' if name == 'n_rows' else ''} (below 2**63)"
                raise ConfigError(f"`SyntheticRows.{name}` must be {what}; got {value!r}.")

    def _memory(self) -> dict[str, int]:
        """Return the bytes of the dictionary and of the rows that are made together."""
        n, d = self.n_features, self.d_in
        return {
            f"a dictionary of {n:,} directions": 2 * 4 * n * d + 8 * n,  # before and after they are normalized
            f"blocks of {_CHUNK_ROWS:,} rows": 4 * _CHUNK_ROWS * (2 * d + 2 * n),
        }

    @property
    def info(self) -> dict[str, Any]:
        """All settings, and a digest of them."""
        settings = {entry.name: getattr(self, entry.name) for entry in fields(self) if entry.init}
        return {
            "kind": "synthetic",
            **settings,
            "dtype": "float32",
            "digest": digest_bytes(repr(settings).encode()),
        }

    def codes(self, first: int, last: int) -> Tensor:
        """Return the true sizes ``[last - first, n_features]`` of all features in rows `first` to `last`, float32."""
        chunks = range(first // _CHUNK_ROWS, -(-last // _CHUNK_ROWS))
        skipped = first - chunks.start * _CHUNK_ROWS
        return torch.cat([self._codes(chunk)[0] for chunk in chunks])[skipped : skipped + last - first]

    def rows(self, first: int, last: int) -> Tensor:
        """Rows `first` to `last` in stored order, ``[last - first, d_in]`` float32."""
        return self._columns(first, last).x

    def batches(self, batch_rows: int, *, seed: int | None = None, start: tuple[int, int] = (0, 0)) -> Iterator[Batch]:
        """Rows in batches; see `Source.batches`. Without a last row, the rows of a pass never repeat."""
        start = check_reading(self, batch_rows, seed, start)
        return read_batches(lambda number: self._block(seed, number), batch_rows, start)

    def _block(self, seed: int | None, number: int) -> Block | None:
        if self.n_rows is not None:
            # short blocks: here a block costs work, not memory, and rows are independent anyway
            plan = ShufflePlan(self.n_rows, _CHUNK_ROWS, _ENDLESS_CHUNKS * _CHUNK_ROWS)
            return planned_block(plan, seed, number, lambda ranges: Columns.cat([self._columns(*r) for r in ranges]))
        size = _ENDLESS_CHUNKS * _CHUNK_ROWS
        columns = self._columns(number * size, (number + 1) * size)
        if seed is None:
            return Block(columns)
        return Block(columns, torch.from_numpy(random_order(size, "rows", seed, number)))

    def _columns(self, first: int, last: int) -> Columns:
        parts = []
        for chunk in range(first // _CHUNK_ROWS, -(-last // _CHUNK_ROWS)):
            codes, generator = self._codes(chunk)
            noise = torch.randn(_CHUNK_ROWS, self.d_in, generator=generator) * (self.noise / self.d_in**0.5)
            parts.append(codes @ self.dictionary + self.offset + noise)
        skipped = first % _CHUNK_ROWS
        row = torch.arange(first, last)
        return Columns(
            torch.cat(parts)[skipped : skipped + last - first],
            document=row // self.rows_per_document,
            position=(row % self.rows_per_document).to(torch.int32),
        )

    def _codes(self, chunk: int) -> tuple[Tensor, torch.Generator]:
        generator = self._generator("rows", chunk)
        shape = (_CHUNK_ROWS, self.n_features)
        fires = torch.rand(shape, generator=generator) < self.frequencies.float()
        size = torch.empty(shape).exponential_(generator=generator)
        return fires * (self.magnitude * (0.5 + 0.5 * size)), generator

    def _generator(self, *key: int | str) -> torch.Generator:
        return torch.Generator().manual_seed(hashed_key("synthetic", self.seed, *key, n_bytes=7))


def _power_law(n: int, power: float, total: float) -> Tensor:
    """Probabilities ``min(1, c * (j + 1) ** -power)`` with the c that makes their sum `total`; float64 ``[n]``."""
    weight = torch.arange(1, n + 1, dtype=torch.float64) ** -power
    low, high = 0.0, 1.0 / float(weight[-1])
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if float((middle * weight).clamp(max=1).sum()) < total else (low, middle)
    return (high * weight).clamp(max=1)
