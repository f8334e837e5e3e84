"""Which kernels run on this machine, and why, in words."""

from __future__ import annotations

import importlib.util
import platform
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import torch

from . import backend


@dataclass(frozen=True)
class DevicePath:
    """What runs on one device."""

    device: str
    """Name for torch: ``cpu``, ``cuda:0``, ``mps``."""
    name: str
    """Name of the processor."""
    kernels: str
    """``fast`` or ``plain``."""
    product: str
    """What finds the latents of a row: format and library of the product."""
    why: str
    """Reason for these."""


@dataclass(frozen=True)
class Machine:
    """Kernels of this machine."""

    mode: str
    """See `saekit.kernels.use`."""
    threads: int
    """Threads on the CPU."""
    versions: dict[str, str]
    """Versions of torch and of the compilers that are installed."""
    devices: tuple[DevicePath, ...]

    def __repr__(self) -> str:
        lines = [f"kernels: {self.mode}, {self.threads} threads, " + ", ".join(map(" ".join, self.versions.items()))]
        for each in self.devices:
            lines.append(f"{each.device} ({each.name}): {each.kernels}; {each.product}")
            lines.append(f"  {each.why}")
        return "\n".join(lines)


def describe() -> Machine:
    """Return which kernels run on each device of this machine, and why."""
    names = ("torch", "numba", "triton")
    found = {name: metadata.version(name) for name in names if importlib.util.find_spec(name) is not None}
    devices = [_cpu(), *(_cuda(torch.device("cuda", index)) for index in range(torch.cuda.device_count()))]
    if torch.backends.mps.is_available():
        devices.append(_mps())
    return Machine(backend.mode(), torch.get_num_threads(), found, tuple(devices))


def _cpu() -> DevicePath:
    reason = backend.unavailable()
    if backend.mode() == "plain" or reason is not None:
        why = reason or "plain torch was asked for (SAEKIT_KERNELS or saekit.kernels.use)"
        return DevicePath("cpu", _processor(), "plain", "fp32, by torch", why)
    from .cpu import rounded

    product, why = rounded.product_here()
    return DevicePath("cpu", _processor(), "fast", product, why)


def _cuda(device: torch.device) -> DevicePath:
    name = torch.cuda.get_device_name(device)
    if backend.triton_runs():
        why = "the Triton kernels were asked for (SAEKIT_KERNELS or saekit.kernels.use)"
        return DevicePath(str(device), name, "fast", "bf16, by torch", why)
    why = {"plain": "plain torch was asked for (SAEKIT_KERNELS or saekit.kernels.use)"}.get(
        backend.mode(), "no GPU has run the Triton kernels yet: only `fast` asks for them"
    )
    if not backend.triton_here():
        why = "Triton is not installed"
    return DevicePath(str(device), name, "plain", "fp32, by torch", why)


def _mps() -> DevicePath:
    why = "there are no compiled kernels for this device"
    return DevicePath("mps", f"{platform.machine()} {platform.release()}", "plain", "fp32, by torch", why)


def _processor() -> str:
    """Return the model of the processor where the system tells, else its architecture."""
    path = Path("/proc/cpuinfo")
    for line in path.read_text().splitlines() if path.exists() else []:
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()
