"""What memory a device has left, and the refusal of what cannot fit into it before anything is allocated."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from .errors import ConfigError

_GROUPS = Path("/sys/fs/cgroup")
ADDRESSES = 2**47
"""Bytes that a process can address; where nothing else is known, more than that is too much."""


def check_memory(where: str, needed: Mapping[str, int], advice: str, device: Any = "cpu") -> None:
    """Refuse what needs more bytes than a device has left.

    Parameters
    ----------
    where
        The function that messages name.
    needed
        Bytes by what needs them. They need not be all: nothing that would fit is refused.
    advice
        What to do.
    device
        The device, as torch calls it.

    Raises
    ------
    ConfigError
        The message has the arithmetic.
    """
    total, left = sum(needed.values()), available_memory(device)
    if total > left:
        parts = ", ".join(f"{in_units(size)} for {what}" for what, size in needed.items() if size)
        raise ConfigError(
            f"{where}: the memory needed must be at most the {in_units(left)} that `{device}` has left; got "
            f"{in_units(total)}: {parts}. {advice}"
        )


def available_memory(device: Any = "cpu") -> int:
    """Return the bytes that are free on a device; on a CPU what this process may still have."""
    if str(device).startswith("cuda"):
        import torch

        return int(torch.cuda.mem_get_info(device)[0])
    return min((ADDRESSES, *_of_machine(), *_of_group(), *_of_process()))


def in_units(size: int) -> str:
    """Return a number of bytes to read.

    >>> in_units(900), in_units(1_500_000), in_units(128 * 10**12), in_units(10**30)
    ('900 B', '1.5 MB', '128 TB', '1,000,000,000,000,000,000 TB')
    """
    for unit, bytes_ in (("TB", 10**12), ("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if size >= bytes_:
            return f"{size // bytes_:,} {unit}" if size >= 100 * bytes_ else f"{size / bytes_:.3g} {unit}"
    return f"{size} B"


def _of_machine() -> Iterator[int]:
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                yield int(line.split()[1]) * 1024
                return
    except (OSError, ValueError):
        pass
    if hasattr(os, "sysconf") and {"SC_PHYS_PAGES", "SC_PAGE_SIZE"} <= os.sysconf_names.keys():
        yield os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")  # of a Mac, say: all of it, in use or not


def _of_group() -> Iterator[int]:
    """Yield what is left in the container: its limit, less what is used and is no cache of files."""
    for limit, used, cached in (
        ("memory.max", "memory.current", "file"),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes", "total_cache"),
    ):
        try:
            most, now = int((_GROUPS / limit).read_text()), int((_GROUPS / used).read_text())
            facts = dict(line.split() for line in (_GROUPS / limit).with_name("memory.stat").read_text().splitlines())
            yield max(most - now + int(facts.get(cached, 0)), 0)
        except (OSError, ValueError):  # no group, or one without a limit ("max")
            continue


def _of_process() -> Iterator[int]:
    """Yield what ``ulimit -v`` leaves."""
    try:
        import resource

        limit = resource.getrlimit(resource.RLIMIT_AS)[0]
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    except (ImportError, OSError, ValueError):
        return
    if limit != resource.RLIM_INFINITY:
        yield max(limit - used, 0)
