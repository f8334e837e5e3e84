"""Features that are wanted of documents: the codes of an SAE, or hidden states, under one or more poolings."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ..errors import ConfigError, listed, nearest
from ..places import Warned, warnings_on
from ..provenance import place_of
from ..sae.model import SAE
from ..sae.naming import name_of

POOLS = ("sum", "mean", "max", "min", "last", "first", "count", "top")
"""Poolings over the tokens of a document. ``top`` is written with a number: ``top5``."""

DENSE_POOLS = ("sum", "mean", "max", "min", "last", "first")
"""Poolings that hidden states have."""

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
    """Any of ``sum mean max min last first count topN``; hidden states have the first six."""
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


def warnings_on_pooling(asks: Sequence[Ask], made: Mapping[str, object]) -> list[Warned]:
    """Return what is not as in training about the rows that a model makes for the SAEs of some asks.

    Parameters
    ----------
    asks
        What is wanted.
    made
        What is known of the rows, but for the hook, as the `info` of rows.
    """
    told = [
        warnings_on([(name_of(ask.sae), ask.sae)], {**made, "hook": ask.place}, what="the model given makes")
        for ask in asks
        if ask.sae is not None
    ]
    return list(dict.fromkeys(each for some in told for each in some))


def check_pool(pool: str, *, dense: bool = False) -> None:
    """Refuse a pooling that is unknown, or that hidden states do not have.

    Raises
    ------
    ConfigError
        With the available poolings.
    """
    known = DENSE_POOLS if dense else (*POOLS[:-1], "top5")
    if isinstance(pool, str) and (pool in DENSE_POOLS or (not dense and (pool == "count" or _TOP.fullmatch(pool)))):
        return
    what = "hidden states" if dense else "codes"
    hint = " `top` needs a number: `top5`." if pool == "top" and not dense else ""
    raise ConfigError(
        f"`pool` must be a pooling of {what}, one of {listed(known, 12)}; got {pool!r}.{hint}{nearest(pool, known)}"
    )


def top_of(pool: str) -> int | None:
    """Return N of a pooling ``topN``; None for any other."""
    match = _TOP.fullmatch(pool)
    return int(match[1]) if match else None
