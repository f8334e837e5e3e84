"""Parts of a crosscoder: which columns of its rows come from which source."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from ..errors import ConfigError
from .model import SAE

PARTS = "parts"
"""Entry of the `info` of joined rows, and of the provenance of their SAEs: a list of ``{"name", "width", ...}``, one
for each source."""


def widths_of(info: Mapping[str, Any]) -> tuple[int, ...] | None:
    """Return the widths of the sources of joined rows, from their `info`; None of other rows."""
    parts = info.get(PARTS)
    return None if parts is None else tuple(int(part["width"]) for part in parts)


def is_crosscoder(sae: SAE) -> bool:
    """Return whether an SAE says that its rows are those of several sources."""
    return bool(sae.provenance.get(PARTS))


def in_equal_parts(sae: SAE, rows: Tensor) -> Tensor:
    """Return rows of a crosscoder in the units of its training, in which its sources weigh alike; others as they are.

    In raw units the source that varies most would decide every error.
    """
    return sae.scaling.apply(rows)[0] if is_crosscoder(sae) else rows


def parts_of(sae: SAE, where: str) -> dict[str, int]:
    """Return the width of each source of a crosscoder, by name, in the order of the columns; nothing of other SAEs.

    Raises
    ------
    ConfigError
        Its provenance has parts that are none: without name or width, or of another width together than the SAE.
    """
    parts = sae.provenance.get(PARTS)
    if not parts:
        return {}
    try:
        found = {str(part["name"]): int(part["width"]) for part in parts}
    except (TypeError, KeyError, ValueError):
        found = {}
    if len(found) != len(parts) or min(found.values(), default=0) < 1 or sum(found.values()) != sae.d_in:
        raise ConfigError(
            f"{where}: `provenance['parts']` must give name and width of each source, {sae.d_in} together; it is "
            f"{parts!r}. Take the SAE as it was trained."
        )
    return found


def common_parts(named: Sequence[tuple[str, SAE]], where: str, *, of_all: bool = False) -> dict[str, int]:
    """Return the parts that all crosscoders among the SAEs have; nothing where none is one.

    Parameters
    ----------
    named
        SAEs of one width, by name.
    where
        Function that messages name.
    of_all
        Whether SAEs of other rows are refused next to crosscoders.

    Raises
    ------
    ConfigError
        Two have different parts.
    """
    found = [(name, parts_of(sae, where)) for name, sae in named]
    first, common = next((each for each in found if each[1]), ("", {}))
    for name, parts in found:
        if list(parts.items()) != list(common.items()) and (parts or of_all):
            raise ConfigError(
                f"{where}: all crosscoders must have the same sources in the same order; `{first}` has "
                f"{_told(common)}, `{name}` has {_told(parts)}. Take those of the same rows."
            )
    return common


def check_parts(sae: SAE, info: Mapping[str, Any], where: str) -> None:
    """Refuse a crosscoder on rows of other sources than its own; arrays, which do not say what they are, pass.

    Raises
    ------
    ConfigError
        Joined rows of other names, widths or order, or rows of one place.
    """
    own = parts_of(sae, where)
    if not own:
        return
    rows = [(str(part["name"]), int(part["width"])) for part in info.get(PARTS) or ()]
    if rows != list(own.items()) if rows else info.get("hook") is not None:
        raise ConfigError(
            f"{where}: the rows must be joined ones of the sources {_told(own)}, as in training; they are of "
            f"{_told(dict(rows)) if rows else info['hook']}. Make them with join_rows, with the same names in the same "
            "order."
        )


def _told(parts: Mapping[str, int]) -> str:
    return ", ".join(f"`{name}` ({width} wide)" for name, width in parts.items()) or "none"
