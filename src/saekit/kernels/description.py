"""Which kernels run on this machine, and why, in words."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass

import torch

from . import backend, verdicts


@dataclass(frozen=True)
class DevicePath:
    """What runs on one device."""

    device: str
    """Name for torch: ``cpu``, ``cuda:0``, ``mps``."""
    name: str
    """Name of the processor."""
    encode: str
    """``fast`` or ``plain``."""
    step: str
    """The same of training steps."""
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
            lines.append(f"{each.device} ({each.name}): encode {each.encode}, step {each.step}; {each.product}")
            lines.append(f"  {each.why}")
        return "\n".join(lines)


def describe() -> Machine:
    """Return which kernels run on each device of this machine, and why."""
    names = ("torch", "numba", "triton")
    found = {name: verdicts.version_of(name) for name in names if importlib.util.find_spec(name) is not None}
    devices = [_cpu(), *(_cuda(torch.device("cuda", index)) for index in range(torch.cuda.device_count()))]
    if torch.backends.mps.is_available():
        devices.append(_mps())
    return Machine(backend.mode(), torch.get_num_threads(), found, tuple(devices))


def _cpu() -> DevicePath:
    device = torch.device("cpu")
    reason = backend.unavailable()
    if backend.mode() == "plain" or reason is not None:
        why = reason or "plain torch was asked for (SAEKIT_KERNELS or saekit.kernels.use)"
        return DevicePath("cpu", verdicts.device_name(device), "plain", "plain", "fp32, by torch", why)
    from .cpu import rounded

    product, why = rounded.product_here()
    paths = {work: "fast" if backend.fast_here(work) else "plain" for work in verdicts.WORKS}
    why += _checked(device)
    return DevicePath("cpu", verdicts.device_name(device), paths["encode"], paths["step"], product, why)


def _cuda(device: torch.device) -> DevicePath:
    paths = {work: "fast" if backend.triton_runs(work, device) else "plain" for work in verdicts.WORKS}
    if backend.mode() == "plain":
        why = "plain torch was asked for (SAEKIT_KERNELS or saekit.kernels.use)"
    elif not backend.triton_here():
        why = "Triton is not installed"
    elif backend.mode() == "fast":
        why = "the Triton kernels were asked for (SAEKIT_KERNELS or saekit.kernels.use)"
    else:
        why = "`auto` runs the Triton kernels where a check has found them right and faster" + _checked(device)
        if verdicts.verdict_on(device) is None:
            why += "; no check was run: saekit kernels check"
    product = "bf16, by Triton" if paths["encode"] == "fast" else "fp32, by torch"
    return DevicePath(str(device), verdicts.device_name(device), paths["encode"], paths["step"], product, why)


def _mps() -> DevicePath:
    device = torch.device("mps")
    why = "there are no compiled kernels for this device" + _checked(device)
    return DevicePath("mps", verdicts.device_name(device), "plain", "plain", "fp32, by torch", why)


def _checked(device: torch.device) -> str:
    verdict = verdicts.verdict_on(device)
    if verdict is None:
        return ""
    if verdict.failed:
        return "; a check failed: " + ", ".join(each.name for each in verdict.failed)
    if not verdict.ratios:
        return "; checked"
    faster = ", ".join(f"{work} {ratio:.2f} times as fast as plain torch" for work, ratio in verdict.ratios.items())
    return f"; checked: {faster}"
