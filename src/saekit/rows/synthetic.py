"""Rows made from a known dictionary, so that what an SAE finds can be compared with what is there.

    x = mean_offset + sum_j c_j * dictionary_j + noise * e,    c_j = fires_j * magnitude_j,    e ~ N(0, 1 / d_in)

where feature j fires with probability ``frequencies[j]``: independently, or (after 2602.14687) correlated, or only
where its parent in a tree does.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, fields
from typing import Any

import torch
from torch import Tensor

from ..errors import ConfigError, did_you_mean
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
    trees: int = 0
    """Number of trees of features: a child fires only where its parent does, at most one child of a parent in a row,
    with a size in proportion to the parent's. The rest of the features are in no tree."""
    branching: int = 4
    """Children of a parent, with `trees`."""
    depth: int = 3
    """Levels of a tree, with `trees`; the roots are the first one."""
    factors: int = 0
    """Number of common causes: features that are in no tree, and roots, fire together more or less often than by
    chance, through a Gaussian copula ``F F^T + diag`` with ``F = 0.1 * randn(n_features, factors)``; 0 for none."""
    norm_spread: float = 0.0
    """Standard deviation of the logarithm of the features' mean sizes: 0 gives all the same."""
    parting: int = 0
    """Steps in which directions are moved apart, so that they interfere less than random ones; 0 for random ones."""
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
    parent: Tensor = field(init=False, repr=False, compare=False)
    """Parent of each feature ``[n_features]`` int64, -1 for none."""
    sizes: Tensor = field(init=False, repr=False, compare=False)
    """Mean size of each feature where it fires ``[n_features]``."""

    def __post_init__(self) -> None:
        self._check()
        directions = torch.randn(self.n_features, self.d_in, generator=self._generator("dictionary"))
        offset = torch.randn(self.d_in, generator=self._generator("offset"))
        object.__setattr__(self, "dictionary", _parted(directions / directions.norm(dim=1, keepdim=True), self.parting))
        object.__setattr__(self, "parent", self._parents())
        object.__setattr__(self, "frequencies", self._frequencies())
        spread = torch.randn(self.n_features, generator=self._generator("norms")) * self.norm_spread
        object.__setattr__(self, "sizes", self.magnitude * spread.exp())
        if not bool(self.sizes.isfinite().all()):
            raise ConfigError(
                f"`SyntheticRows.norm_spread` must leave sizes that are numbers; with {self.norm_spread!r} the "
                "largest is infinite. Use a smaller one."
            )
        object.__setattr__(self, "offset", offset * (self.mean / offset.norm()))

    def _check(self) -> None:
        """Refuse settings from which no rows can be made."""
        self._check_sizes()
        if not 0 < self.l0 <= self.n_features:
            raise ConfigError(
                f"`SyntheticRows.l0` must lie above 0 and not above n_features={self.n_features}; got {self.l0!r}."
            )
        for name in ("power", "magnitude", "noise", "mean", "norm_spread"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise ConfigError(f"`SyntheticRows.{name}` must be 0 or more; got {getattr(self, name)!r}.")
        for name, least in {"trees": 0, "factors": 0, "parting": 0, "branching": 1, "depth": 1}.items():
            if not (is_whole(getattr(self, name)) and getattr(self, name) >= least):
                raise ConfigError(
                    f"`SyntheticRows.{name}` must be a whole number of at least {least}; got {getattr(self, name)!r}."
                )
        if self.trees and self.trees * self._tree_size() > self.n_features:
            raise ConfigError(
                f"`SyntheticRows.trees` must fit into n_features={self.n_features}; {self.trees} of them with "
                f"{self._tree_size()} features each, or more, do not. Use fewer, or a smaller `branching` or `depth`."
            )
        check_memory("SyntheticRows", self._memory(), "Use a smaller `d_in`, or fewer features or `factors`.")

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
            f"{self.factors:,} common causes": 8 * self.factors * n + 4 * _CHUNK_ROWS * self.factors,
        }

    @property
    def info(self) -> dict[str, Any]:
        """All settings, and a digest of them."""
        made = {entry.name: (getattr(self, entry.name), entry.default) for entry in fields(self) if entry.init}
        settings = {name: value for name, (value, default) in made.items() if name not in _LATER or value != default}
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

    def read(self, ranges: list[tuple[int, int]]) -> Columns:
        """Return the rows of these ranges; see `saekit.rows.source.Stored`."""
        return Columns.cat([self._columns(first, last) for first, last in ranges])

    def _block(self, seed: int | None, number: int) -> Block | None:
        if self.n_rows is not None:
            # short blocks: here a block costs work, not memory, and rows are independent anyway
            plan = ShufflePlan(self.n_rows, _CHUNK_ROWS, _ENDLESS_CHUNKS * _CHUNK_ROWS)
            return planned_block(plan, seed, number, self.read)
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
        chance = torch.rand(shape, generator=generator)
        if self.factors:
            chance = self._copula(generator)
        fires = chance < self.frequencies.float()
        size = 0.5 + 0.5 * torch.empty(shape).exponential_(generator=generator)
        if self.trees:
            fires, size = self._grown(chance, fires, size)
        return fires * (size * self.sizes), generator

    def _tree_size(self) -> int:
        """Return the features of a tree, or a number above `n_features` that it has at least."""
        size, level = 0, 1
        for _ in range(self.depth):
            size, level = size + level, level * self.branching
            if size > self.n_features:
                break  # a depth that cannot be meant would take for ever
        return size

    def _parents(self) -> Tensor:
        """Return the parents, level by level: roots are the most frequent features, then their children, and so on."""
        parent = torch.full((self.n_features,), -1)
        above, first = torch.arange(self.trees), self.trees
        for _ in range(1, self.depth):
            children = above.repeat_interleave(self.branching)
            parent[first : first + len(children)] = children
            above, first = torch.arange(first, first + len(children)), first + len(children)
        return parent

    def _frequencies(self) -> Tensor:
        """Return the power law; in trees children share their parent's frequency where the law gives them more."""
        wanted = self.l0
        frequencies = _power_law(self.n_features, self.power, wanted)
        if not self.trees:
            return frequencies
        low, high = 0.0, float(self.n_features)
        for _ in range(60):  # what children lose, all of them are to gain
            wanted = (low + high) / 2
            frequencies = self._under_parents(_power_law(self.n_features, self.power, wanted))
            low, high = (wanted, high) if float(frequencies.sum()) < self.l0 else (low, wanted)
        reached = float(frequencies.sum())
        if reached < self.l0 * (1 - 1e-6):
            raise ConfigError(
                f"`SyntheticRows.l0` must be at most {reached:.3g} with trees={self.trees}: one child of a "
                f"parent fires at most; got {self.l0!r}. Use a smaller `l0`, or fewer or deeper trees."
            )
        return frequencies

    def _under_parents(self, frequencies: Tensor) -> Tensor:
        first = self.trees
        for level in range(1, self.depth):
            children = torch.arange(first, first + self.trees * self.branching**level)
            frequencies[children] = torch.minimum(
                frequencies[children], frequencies[self.parent[children]] / self.branching
            )
            first += len(children)
        return frequencies

    def _copula(self, generator: torch.Generator) -> Tensor:
        """Return correlated uniform numbers ``[_CHUNK_ROWS, n_features]``."""
        loadings = _LOADING * torch.randn(self.n_features, self.factors, generator=self._generator("factors"))
        own = (1 - loadings.square().sum(1)).clamp(min=0.01)
        common = torch.randn(_CHUNK_ROWS, self.factors, generator=generator)
        noise = torch.randn(_CHUNK_ROWS, self.n_features, generator=generator)
        normal = (common @ loadings.T + noise * own.sqrt()) / (loadings.square().sum(1) + own).sqrt()
        return 1 - torch.special.ndtr(normal)

    def _grown(self, chance: Tensor, fires: Tensor, size: Tensor) -> tuple[Tensor, Tensor]:
        """Let children fire where their parent does, one at most of each parent, at sizes in proportion to its."""
        fires, size = fires.clone(), size.clone()
        first = self.trees
        for level in range(1, self.depth):
            children = torch.arange(first, first + self.trees * self.branching**level)
            parents = self.parent[children]
            given = (self.frequencies[children] / self.frequencies[parents]).float()
            edges = given.view(-1, self.branching).cumsum(1).flatten()
            # One number for all children of a parent decides which of them fires, if any.
            shared = chance[:, children[:: self.branching]].repeat_interleave(self.branching, 1)
            fires[:, children] = fires[:, parents] & (shared < edges) & (shared >= edges - given)
            size[:, children] *= size[:, parents]
            first += len(children)
        return fires, size

    def _generator(self, *key: int | str) -> torch.Generator:
        return torch.Generator().manual_seed(hashed_key("synthetic", self.seed, *key, n_bytes=7))


_LOADING = 0.1
"""Scale of the loadings of common causes (2602.14687)."""

_LATER = ("trees", "branching", "depth", "factors", "norm_spread", "parting")
"""Settings that came later: at their defaults they are no part of the digest."""

_PARTING_RATE = 0.05
"""How far a step moves directions apart, in parts of what would undo their frame potential."""


def _parted(directions: Tensor, steps: int) -> Tensor:
    """Return unit directions after some steps down the sum of their squared cosines."""
    for _ in range(steps):
        pull = directions @ (directions.T @ directions) - directions
        directions = directions - _PARTING_RATE * pull * (directions.shape[1] / len(directions))
        directions = directions / directions.norm(dim=1, keepdim=True)
    return directions


def synthetic_rows(address: str) -> SyntheticRows:
    """Return the rows of an address ``synthetic:d_in=32,n_features=64,l0=4``, with the settings of `SyntheticRows`.

    Raises
    ------
    ConfigError
        A setting is unknown, not a number, or missing.
    """
    kinds = {entry.name: entry for entry in fields(SyntheticRows) if entry.init}
    found: dict[str, Any] = {}
    for part in address.removeprefix(ADDRESS).split(","):
        name, _, text = (each.strip() for each in part.partition("="))
        if name not in kinds:
            raise ConfigError(f"`{address}`: `{name}` is no setting of synthetic rows. {did_you_mean(name, kinds)}")
        found[name] = _number(address, name, text, is_float=kinds[name].type == "float")
    missing = [name for name in ("d_in", "n_features") if name not in found]
    if missing:
        raise ConfigError(f"`{address}` must give `{missing[0]}`. Write {ADDRESS}d_in=32,n_features=64, say.")
    return SyntheticRows(**found)


def _number(address: str, name: str, text: str, *, is_float: bool) -> float | int:
    try:
        return float(text) if is_float else int(text.replace("_", ""))
    except ValueError:
        kind = "a number" if is_float else "a whole number"
        raise ConfigError(f"`{address}`: `{name}` must be {kind}; got `{text}`. Write {name}=4, say.") from None


ADDRESS = "synthetic:"
"""What an address of synthetic rows begins with."""


def _power_law(n: int, power: float, total: float) -> Tensor:
    """Probabilities ``min(1, c * (j + 1) ** -power)`` with the c that makes their sum `total`; float64 ``[n]``."""
    weight = torch.arange(1, n + 1, dtype=torch.float64) ** -power
    low, high = 0.0, 1.0 / float(weight[-1])
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if float((middle * weight).clamp(max=1).sum()) < total else (low, middle)
    return (high * weight).clamp(max=1)
