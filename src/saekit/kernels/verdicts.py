"""What `saekit kernels check` found out about a device, kept between processes: `auto` goes by it.

A verdict holds for one device, one version of torch, of the compiler and of the kernels' own source; anything else has
none.
"""

from __future__ import annotations

import functools
import logging
import math
import os
import platform
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from ..errors import FormatError, SaekitError
from ..files import cache_folder, digest_bytes, read_sealed, write_sealed
from ..version import __version__
from . import backend

FOLDER = "kernels"
"""Folder of the verdicts in `saekit.files.cache_folder`."""

WORKS = ("encode", "step")
"""What is decided one by one: encoding (with decoding), and the training step, which encodes too."""

SCHEMA = 1


@dataclass(frozen=True)
class Check:
    """One comparison of kernels with a slow reference."""

    name: str
    """What was computed."""
    work: str
    """Member of `WORKS`."""
    passed: bool
    detail: str = ""
    """What was wrong."""


@dataclass(frozen=True)
class Timing:
    """Time of the same work by the plain and by the fast kernels."""

    work: str
    """Member of `WORKS`."""
    size: str
    """Width, latents, codes per row and rows, in words."""
    plain: float
    """Unit: seconds."""
    fast: float | None
    """Unit: seconds; None where there are no fast kernels."""

    @property
    def ratio(self) -> float | None:
        """Time of the plain kernels in units of the fast ones."""
        return None if self.fast is None else self.plain / max(self.fast, 1e-12)


@dataclass(frozen=True)
class Verdict:
    """What was found out about the kernels of a device."""

    device: Mapping[str, str]
    """See `identity`."""
    checks: tuple[Check, ...]
    timings: tuple[Timing, ...] = ()
    note: str = ""
    """What is compared, and reason why there is nothing to compare."""

    @property
    def failed(self) -> tuple[Check, ...]:
        """Comparisons that failed."""
        return tuple(each for each in self.checks if not each.passed)

    @property
    def fast(self) -> tuple[str, ...]:
        """Members of `WORKS` that `auto` runs by the fast kernels: right, and at no size slower than plain torch."""
        return tuple(work for work in WORKS if self.ratio(work) >= 1 and not self._wrong(work))

    def ratio(self, work: str) -> float:
        """Return the smallest ratio of any size (see `Timing.ratio`); 0 where nothing was timed."""
        return min((each.ratio or 0.0 for each in self.timings if each.work == work), default=0.0)

    def _wrong(self, work: str) -> bool:
        return not self.checks or any(each.work in ("encode", work) for each in self.failed)

    def to_json(self) -> dict[str, Any]:
        """Return the verdict as plain values."""
        timings = [{**asdict(each), "ratio": each.ratio} for each in self.timings]
        checks = [asdict(each) for each in self.checks]
        return {
            "device": dict(self.device),
            "fast": list(self.fast),
            "checks": checks,
            "timings": timings,
            "note": self.note,
        }

    @classmethod
    def from_json(cls, plain: Mapping[str, Any]) -> Verdict:
        """Return the inverse of `to_json`.

        Raises
        ------
        FormatError
            It holds something else.
        """
        try:
            checks = tuple(Check(**each) for each in plain["checks"])
            timings = tuple(
                Timing(each["work"], each["size"], float(each["plain"]), each["fast"]) for each in plain["timings"]
            )
            found = cls(dict(plain["device"]), checks, timings, plain["note"])
            works = {*(each.work for each in checks), *(each.work for each in timings)}
            sane = works <= {*WORKS} and all(isinstance(each.passed, bool) for each in checks)
            numbers = [x for each in timings for x in (each.plain, each.fast) if x is not None]
            sane = sane and all(math.isfinite(x) and x > 0 for x in numbers) and list(found.fast) == plain["fast"]
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise FormatError(f"a verdict must have the entries of one; got {error!r}.") from None
        if not sane:
            raise FormatError("a verdict must follow from its checks and timings; this one does not.")
        return found


def identity(device: torch.device) -> dict[str, str]:
    """Return what a verdict depends on: kind and name of the device, versions, digest of the kernels' source."""
    known = {"kind": device.type, "name": device_name(device), "torch": torch.__version__, "saekit": __version__}
    known["kernels"] = _digest_of_source()
    if device.type == "cuda":
        known["capability"] = ".".join(map(str, torch.cuda.get_device_capability(device)))
        known |= {"cuda": str(torch.version.cuda or torch.version.hip), "triton": version_of("triton")}
        known["interpreted"] = os.environ.get("TRITON_INTERPRET", "0")
    elif device.type == "cpu":
        known |= {"numba": version_of("numba"), "target": _target()}
    return known


def device_name(device: torch.device) -> str:
    """Return the name that a device's maker gave it."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if device.type == "cpu":
        return processor_name()
    return f"{platform.machine()} {platform.release()}"


def processor_name() -> str:
    """Return the model of the processor where the system tells, else its architecture."""
    path = Path("/proc/cpuinfo")
    for line in path.read_text().splitlines() if path.exists() else []:
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def _target() -> str:
    """Return what numba compiles for, shortened: the environment may ask for less than the processor has."""
    if backend.unavailable() is not None:
        return "none"
    from numba.core.registry import cpu_target

    return digest_bytes(repr(cpu_target.target_context.codegen().magic_tuple()).encode())[-16:]


def version_of(package: str) -> str:
    """Return the version of an installed package, ``none`` where there is none."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "none"


@functools.cache
def _digest_of_source() -> str:
    sources = sorted(Path(__file__).parent.rglob("*.py"))
    return digest_bytes(b"\0".join(path.read_bytes() for path in sources))[-16:]


def path_of(known: Mapping[str, str]) -> Path:
    """Return the file of the verdict on a device with this `identity`."""
    return cache_folder() / FOLDER / f"{digest_bytes(repr(sorted(known.items())).encode())[-16:]}.json"


@functools.cache
def verdict_on(device: torch.device) -> Verdict | None:
    """Return what was found out about this device, with these versions; None where nothing was.

    Read once per process. A file that cannot be read, was changed, or is about another device counts as none, and is
    told on the log.
    """
    known = identity(device)
    try:
        path = path_of(known)
        plain = read_sealed(path, since=SCHEMA) if path.exists() else None
        if plain is None:
            return None
        if not isinstance(plain, dict) or plain.pop("schema", None) != SCHEMA:
            raise FormatError(f"`{path}` must be a verdict of schema {SCHEMA}; it is not.")
        found = Verdict.from_json(plain)
        if dict(found.device) != known:
            raise FormatError(f"`{path}` must be about this device and these versions; it is about {found.device}.")
    except (SaekitError, OSError) as error:
        logging.getLogger("saekit.kernels").warning("a verdict on kernels is not used: %s", error)
        return None
    return found


def keep(verdict: Verdict) -> Path:
    """Write a verdict for later processes, and for this one; return its file.

    Raises
    ------
    StorageError
        The system refused.
    """
    path = path_of(verdict.device)
    write_sealed(path, {"schema": SCHEMA, **verdict.to_json()})
    verdict_on.cache_clear()
    return path
