"""What `saekit kernels check` found out about a device, kept between processes: `auto` goes by it.

A verdict holds for one device, one version of torch, of the compiler and of the kernels' own source; anything else has
none.
"""

from __future__ import annotations

import functools
import os
import platform
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from ..errors import SaekitError
from ..files import digest_bytes, read_sealed, write_sealed
from ..version import __version__
from . import backend

FOLDER = "SAEKIT_CACHE"
"""Environment variable with the folder of the verdicts."""

WORKS = ("encode", "step")
"""What is decided one by one: encoding (and decoding), and the training step."""


@dataclass(frozen=True)
class Check:
    """One comparison of the fast kernels with the plain ones."""

    name: str
    passed: bool
    detail: str = ""
    """What was wrong."""


@dataclass(frozen=True)
class Verdict:
    """What was found out about the fast kernels on a device."""

    device: Mapping[str, str]
    """See `identity`."""
    fast: tuple[str, ...]
    """Members of `WORKS` that `auto` runs by the fast kernels."""
    checks: tuple[Check, ...]
    ratios: Mapping[str, float] = field(default_factory=dict)
    """Time of the plain kernels in units of the fast ones, by member of `WORKS`."""
    note: str = ""
    """Reason why nothing was compared."""

    @property
    def failed(self) -> tuple[Check, ...]:
        """Comparisons that failed."""
        return tuple(each for each in self.checks if not each.passed)

    def to_json(self) -> dict[str, Any]:
        """Return the verdict as plain values."""
        return {**asdict(self), "fast": list(self.fast), "checks": [asdict(each) for each in self.checks]}

    @classmethod
    def from_json(cls, plain: Mapping[str, Any]) -> Verdict:
        """Return the inverse of `to_json`."""
        checks = tuple(Check(**each) for each in plain["checks"])
        return cls(plain["device"], tuple(plain["fast"]), checks, plain["ratios"], plain["note"])


def cache_folder() -> Path:
    """Return the folder that verdicts are kept in: $SAEKIT_CACHE, $XDG_CACHE_HOME/saekit or ~/.cache/saekit."""
    if own := os.environ.get(FOLDER):
        return Path(own)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "saekit"


def identity(device: torch.device) -> dict[str, str]:
    """Return what a verdict depends on: kind and name of the device, versions, digest of the kernels' source."""
    known = {"kind": device.type, "name": device_name(device), "torch": torch.__version__, "saekit": __version__}
    known["kernels"] = _digest_of_source()
    if device.type == "cuda":
        known |= {"cuda": str(torch.version.cuda or torch.version.hip), "triton": version_of("triton")}
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
    return cache_folder() / f"kernels-{digest_bytes(repr(sorted(known.items())).encode())[-16:]}.json"


@functools.cache
def verdict_on(device: torch.device) -> Verdict | None:
    """Return what was found out about this device, with these versions; None where nothing was.

    Read once per process. A file that cannot be read counts as none.
    """
    known = identity(device)
    path = path_of(known)
    try:
        found = Verdict.from_json(read_sealed(path)) if path.exists() else None
    except (SaekitError, OSError, KeyError, TypeError):
        return None
    return found if found is not None and dict(found.device) == known else None


def keep(verdict: Verdict) -> Path:
    """Write a verdict for later processes, and for this one; return its file."""
    path = path_of(verdict.device)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_sealed(path, {"schema": 1, **verdict.to_json()})
    verdict_on.cache_clear()
    return path
