"""What this machine has, which kernels run on it, and why, in words."""

from __future__ import annotations

import os
import platform
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from ..errors import ConfigError
from ..files import cache_folder
from ..memory import available_memory, in_units
from ..version import __version__
from . import backend, verdicts

INSTRUCTIONS = (
    "sse4.2", "avx", "avx2", "fma", "f16c", "avxvnni", "avx512f", "avx512bw", "avx512vnni", "avx512bf16", "amx-int8",
    "amx-bf16", "neon", "dotprod", "i8mm", "bf16", "fp-armv8", "fullfp16", "sve", "sve2",
)  # fmt: skip
"""Instruction sets that products and loops are made of, as LLVM calls them."""

ASKED = "plain torch was asked for (SAEKIT_KERNELS or saekit.kernels.use)"


@dataclass(frozen=True)
class DevicePath:
    """What runs on one device."""

    device: str
    """Name for torch: ``cpu``, ``cuda:0``, ``mps``."""
    name: str
    """Name of the processor."""
    memory: int | None
    """Memory that is free now; None where the device does not say. Unit: bytes."""
    encode: str
    """``fast`` or ``plain``."""
    step: str
    """The same of training steps."""
    product: str
    """What finds the latents of a row: format and library of the product."""
    why: str
    """Reason for these."""
    verdict: verdicts.Verdict | None = None
    """What ``saekit kernels check`` found out about it; None where it was not run."""


@dataclass(frozen=True)
class Machine:
    """A machine, and the kernels that run on it."""

    mode: str
    """See `saekit.kernels.use`."""
    threads: int
    """Threads of torch on the CPU."""
    cores: int
    """Processors that this process may use."""
    system: str
    """Operating system and architecture."""
    versions: dict[str, str]
    """Versions of Python, saekit, torch and of the compilers that are installed."""
    torch_build: str
    """What torch was built with, and for."""
    instructions: tuple[str, ...]
    """Members of `INSTRUCTIONS` that the processor has; empty where nothing tells."""
    cache: str
    """Folder of verdicts and of what can be made again."""
    devices: tuple[DevicePath, ...]
    environment: dict[str, str] = field(default_factory=dict)
    """Variables that are set and have a say in which kernels run."""

    def __repr__(self) -> str:
        lines = [
            f"machine: {self.system}, {self.cores} cores, " + ", ".join(map(" ".join, self.versions.items())),
            f"torch: {self.torch_build}",
            f"instructions: {' '.join(self.instructions) or 'unknown'}",
            f"kernels: {self.mode}, {self.threads} threads",
            f"cache: {self.cache}",
        ]
        if self.environment:
            lines.append("environment: " + " ".join(f"{name}={value}" for name, value in self.environment.items()))
        for each in self.devices:
            free = "" if each.memory is None else f", {in_units(each.memory)} free"
            lines.append(f"{each.device} ({each.name}{free}): encode {each.encode}, step {each.step}; {each.product}")
            lines.append(f"  {each.why}")
        return "\n".join(lines)

    def to_json(self) -> dict[str, Any]:
        """Return all of it as plain values."""
        plain = asdict(self)
        for each, device in zip(self.devices, plain["devices"]):
            device["verdict"] = None if each.verdict is None else each.verdict.to_json()
        return {**plain, "instructions": list(self.instructions), "devices": list(plain["devices"])}


VARIABLES = (
    "SAEKIT_KERNELS", "SAEKIT_CACHE", "OMP_NUM_THREADS", "MKL_NUM_THREADS", "ATEN_CPU_CAPABILITY", "NUMBA_DISABLE_JIT",
    "NUMBA_CPU_NAME", "NUMBA_CPU_FEATURES", "ONEDNN_MAX_CPU_ISA", "CUDA_VISIBLE_DEVICES", "TRITON_INTERPRET",
)  # fmt: skip


def describe() -> Machine:
    """Return what this machine has, and which kernels run on each of its devices, and why."""
    versions = {"Python": platform.python_version(), "saekit": __version__}
    for name in ("torch", "numba", "llvmlite", "triton"):
        if (version := verdicts.version_of(name)) != "none":
            versions[name] = version
    devices = [_cpu(), *(_cuda(torch.device("cuda", index)) for index in range(torch.cuda.device_count()))]
    if torch.backends.mps.is_available():
        devices.append(_mps())
    return Machine(
        mode=backend.mode(),
        threads=torch.get_num_threads(),
        cores=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
        system=f"{platform.system()} {platform.machine()}",
        versions=versions,
        torch_build=_torch_build(),
        instructions=_instructions(),
        cache=_cache(),
        devices=tuple(devices),
        environment={name: os.environ[name] for name in VARIABLES if name in os.environ},
    )


def _cache() -> str:
    try:
        return str(cache_folder())
    except ConfigError as error:
        return f"none: {error}"


def _torch_build() -> str:
    build = f"CUDA {torch.version.cuda}" if torch.version.cuda else f"ROCm {torch.version.hip}"
    parts = [build if torch.version.cuda or torch.version.hip else "for CPUs"]
    parts.append(f"runs {torch.backends.cpu.get_cpu_capability()}")
    libraries = {"MKL": torch.backends.mkl, "oneDNN": torch.backends.mkldnn, "OpenMP": torch.backends.openmp}
    parts += [name for name, there in libraries.items() if there.is_available()]
    return ", ".join(parts)


def _instructions() -> tuple[str, ...]:
    """Return what LLVM finds the processor to have."""
    found = {} if backend.unavailable() is not None else backend.host_features()
    return tuple(name for name in INSTRUCTIONS if found.get(name))


def _cpu() -> DevicePath:
    device = torch.device("cpu")
    name, memory = verdicts.device_name(device), available_memory()
    reason = backend.unavailable()
    if backend.mode() == "plain" or reason is not None:
        return DevicePath("cpu", name, memory, "plain", "plain", "fp32, by torch", reason or ASKED)
    from .cpu import rounded

    product, why = rounded.product_here()
    paths = {work: "fast" if backend.fast_here(work) else "plain" for work in verdicts.WORKS}
    verdict = verdicts.verdict_on(device)
    if paths["encode"] == "plain":
        product = "fp32, by torch"
        if verdict is None:
            why = f"no {platform.machine()} processor has run the compiled loops yet: saekit kernels check"
    return DevicePath("cpu", name, memory, paths["encode"], paths["step"], product, why + _checked(verdict), verdict)


def _cuda(device: torch.device) -> DevicePath:
    paths = {work: "fast" if backend.triton_runs(work, device) else "plain" for work in verdicts.WORKS}
    verdict = verdicts.verdict_on(device)
    if backend.mode() == "plain":
        why = ASKED
    elif not backend.triton_here():
        why = "Triton is not installed"
    elif backend.mode() == "fast":
        why = "the Triton kernels were asked for (SAEKIT_KERNELS or saekit.kernels.use)"
    else:
        why = "`auto` runs the Triton kernels where a check has found them right and faster" + _checked(verdict)
        if verdict is None:
            why += "; none was made with these versions: saekit kernels check"
    product = "bf16, by torch" if paths["encode"] == "fast" else "fp32, by torch"
    name = verdicts.device_name(device)
    return DevicePath(
        str(device), name, available_memory(device), paths["encode"], paths["step"], product, why, verdict
    )


def _mps() -> DevicePath:
    device = torch.device("mps")
    verdict = verdicts.verdict_on(device)
    why = "there are no compiled kernels for this device" + _checked(verdict)
    free = torch.mps.recommended_max_memory() - torch.mps.current_allocated_memory()
    return DevicePath("mps", verdicts.device_name(device), free, "plain", "plain", "fp32, by torch", why, verdict)


def _checked(verdict: verdicts.Verdict | None) -> str:
    if verdict is None:
        return ""
    if verdict.failed:
        return "; a check failed: " + ", ".join(each.name for each in verdict.failed)
    ratios = {work: verdict.ratio(work) for work in verdicts.WORKS}
    if not any(ratios.values()):
        return "; checked"
    each = ", ".join(f"{work} {ratio:.2f}" for work, ratio in ratios.items())
    return f"; checked: {each} times as fast as plain torch, or more"
