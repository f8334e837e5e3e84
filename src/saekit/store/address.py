"""Addresses of SAEs: a folder, a folder that holds several (a training run), or ``hf:owner/name/folder``."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

HUB = "hf:"


def sae_paths(addresses: str | os.PathLike[str] | Iterable[str | os.PathLike[str]]) -> list[str]:
    """Return the addresses of single SAEs; a folder that holds several, such as a training run, stands for all of them.

    An address at which nothing is found stays as it is: loading it says what is wrong.

    Examples
    --------
    ::

        sae_paths("run")        # ["run/topk-1024-k16-seed0", "run/topk-1024-k16-seed1"]
    """
    given: Iterable[str | os.PathLike[str]]
    given = [addresses] if isinstance(addresses, str | os.PathLike) else addresses
    found: list[str] = []
    for address in [os.fspath(each) for each in given]:
        folder = Path(address)
        is_run = not address.startswith(HUB) and folder.is_dir() and not (folder / "sae.json").is_file()
        inside = sorted(str(file.parent) for file in folder.glob("*/sae.json")) if is_run else []
        found += inside or [address]
    return found
