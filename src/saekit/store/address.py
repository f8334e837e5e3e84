"""Addresses of SAEs: a folder, a folder that holds several (a training run), or ``hf:owner/name/folder``."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

from ..errors import ConfigError, SaekitError
from ..files import check_path

HUB = "hf:"


def sae_paths(addresses: str | os.PathLike[str] | Iterable[str | os.PathLike[str]]) -> list[str]:
    """Return the addresses of single SAEs; a folder that holds several, such as a training run, stands for all of them.

    So does a folder with several SAEs of another library, in folders or files of their own. An address at which nothing
    is found, or on the hub, stays as it is: loading it says what is wrong.

    Examples
    --------
    ::

        sae_paths("run")        # ["run/topk-1024-k16-seed0", "run/topk-1024-k16-seed1"]
    """
    given: Iterable[str | os.PathLike[str]]
    given = [addresses] if isinstance(addresses, str | os.PathLike) else addresses
    found: list[str] = []
    for address in [os.fspath(each) for each in given]:
        found += _inside(address) or [address]
    return found


def _inside(address: str) -> list[str]:
    """Return the SAEs in a local folder that is not one itself; none for any other address."""
    if address.startswith(HUB):
        return []
    folder = check_path(address)
    if not folder.is_dir() or (folder / "sae.json").is_file():
        return []
    return sorted(str(file.parent) for file in folder.glob("*/sae.json")) or _foreign_in(folder)


def _foreign_in(folder: Path) -> list[str]:
    """Return the SAEs of other libraries in a folder that is not one itself, by the numbers in their names."""
    from .formats import recognize
    from .formats.canonical import Stated
    from .listing import HEADER, WEIGHTS, list_local

    listing = replace(list_local(str(folder)), part=HEADER)
    with_weights = [name for name in listing.names if name.endswith(WEIGHTS)]
    if len(with_weights) < 2:
        return []
    try:
        recognize(listing, Stated())
    except ConfigError:
        files = listing.weights()
        inside = files if len(files) > 1 else {name.split("/")[0] for name in with_weights if "/" in name}
        return [str(folder / name) for name in sorted(inside, key=_numbers)]
    except SaekitError:  # it is one thing, which loading will name
        pass
    return []


def _numbers(name: str) -> list[tuple[int, str]]:
    """Return a key that sorts ``layer_2`` before ``layer_10``."""
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"(\d+)", name)]
