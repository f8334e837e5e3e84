"""The one switch between plain torch and the compiled loops, and the reason when the latter cannot run here."""

from __future__ import annotations

import functools
import importlib.util
import logging
import os
import platform
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch

from ..errors import ConfigError, MissingExtraError, did_you_mean

MODES = ("auto", "plain", "fast")
VARIABLE = "SAEKIT_KERNELS"
"""Environment variable that sets the mode of a process until `use` is called."""

PROVEN = ("x86_64", "AMD64")
"""Architectures on which the compiled loops have run; on others ``auto`` needs a verdict of a check."""

_chosen: str | None = None


def mode() -> str:
    """Return the mode in force: ``auto`` (fast where it pays), ``plain`` (torch only) or ``fast`` (where it can run).

    Raises
    ------
    ConfigError
        The environment variable SAEKIT_KERNELS holds another word.
    """
    return _chosen or _checked(os.environ.get(VARIABLE, "auto"), f"environment variable {VARIABLE}")


def use(mode: str) -> str:
    """Choose the kernels of this process: ``auto``, ``plain`` or ``fast``; return the mode that was in force before.

    On a CUDA device ``fast`` means Triton kernels for encode, decode and the training step; ``auto`` means plain torch
    until ``saekit kernels check`` has found there that they are right and faster.

    Both kinds return the same codes; see `saekit.kernels.topk_encode`.

    Raises
    ------
    ConfigError
        Another word.
    MissingExtraError
        ``fast``, and the compiled loops cannot run on this machine.
    """
    global _chosen
    before = globals()["mode"]()
    wanted = _checked(mode, "kernels.use")
    if wanted == "fast" and (reason := unavailable()) and not (triton_here() and torch.cuda.is_available()):
        raise MissingExtraError(f"kernels.use: `fast` cannot run on this machine: {reason}. Use `auto` or `plain`.")
    _chosen = wanted
    return before


@contextmanager
def using(mode: str) -> Iterator[None]:
    """Call `use` for the length of a ``with`` block."""
    global _chosen
    before = _chosen
    use(mode)
    try:
        yield
    finally:
        _chosen = before


@functools.cache
def unavailable() -> str | None:
    """Say why the compiled loops cannot run on this machine; None when they can, on whatever processor."""
    # Looked for before it is imported: that takes half a second, which a machine without it should not pay.
    if importlib.util.find_spec("numba") is None:
        return "numba is not installed (pip install numba)"
    if os.environ.get("NUMBA_DISABLE_JIT", "0") != "0":
        return "NUMBA_DISABLE_JIT is set"
    try:
        import numba
    except Exception as problem:  # whatever it is (a version of numpy that it does not know), plain torch works
        return f"numba cannot be imported: {problem}"
    # LLVM ends the process on a list that it cannot read.
    features = getattr(numba.config, "CPU_FEATURES", None)
    if features and any(word[:1] not in ("+", "-") for word in features.split(",")):
        return f"NUMBA_CPU_FEATURES must name each feature with + or - before it, not {features!r}"
    return None


def bf16_unavailable() -> str | None:
    """Say why products in bf16 do not pay on this processor (fp32 is multiplied instead); None when they do."""
    if (reason := unavailable()) is None and not has_instruction("avx512bf16"):
        reason = "numba does not compile for AVX-512 bf16 instructions on this machine"
    return reason


def has_instruction(name: str) -> bool:
    """Return whether the processor has an instruction set of AVX-512 and numba may use it on 512-bit registers."""
    return has_instructions("avx512f", "avx512bw", name)


@functools.cache
def has_instructions(*names: str) -> bool:
    """Return whether the processor has all of these instruction sets and numba may use them.

    LLVM ends the process on an intrinsic that its target lacks, and the target is not always this processor:
    NUMBA_CPU_NAME and NUMBA_CPU_FEATURES choose another.
    """
    from numba.core.registry import cpu_target

    host = host_features()
    # As LLVM reads the list: the last sign counts, and to take away what a feature is built on takes it away as well.
    signs = {word[1:]: word[0] for word in cpu_target.target_context.codegen().magic_tuple()[2].split(",") if word}
    return all(host.get(name, False) and signs.get(name) == "+" for name in names)


def host_features() -> Mapping[str, bool]:
    """Return which instruction sets LLVM finds the processor to have; empty where it cannot tell."""
    import llvmlite.binding

    try:
        return llvmlite.binding.get_host_cpu_features()
    except RuntimeError:
        return {}


def fast_here(work: str | None = None) -> bool:
    """Return whether the mode asks for the compiled loops and they can run; log once when they cannot.

    Parameters
    ----------
    work
        Member of `saekit.kernels.verdicts.WORKS`: ``auto`` leaves to plain torch what a check has found to be wrong or
        slower. None: whatever was found.
    """
    if mode() == "plain":
        return False
    reason = unavailable()
    if reason is None and work is not None and mode() == "auto":
        from . import verdicts

        verdict = verdicts.verdict_on(torch.device("cpu"))
        if verdict is None and platform.machine() not in PROVEN:
            reason = (
                f"no {platform.machine()} processor has run the compiled loops; `saekit kernels check` tries them here"
            )
        elif verdict is not None and work not in verdict.fast:
            reason = f"`saekit kernels check` found that {work} is not right or not faster on this machine"
    if reason:
        _note(reason)
    return reason is None


def triton_runs(work: str, device: torch.device) -> bool:
    """Return whether the Triton kernels do this work: asked for by ``fast``, or checked on this device by ``auto``."""
    if mode() == "plain" or not triton_here():
        return False
    if mode() == "fast":
        return True
    from . import verdicts

    verdict = verdicts.verdict_on(device)
    return verdict is not None and work in verdict.fast


@functools.cache
def triton_here() -> bool:
    """Return whether Triton is installed (torch for CUDA brings it): without it plain torch does the work."""
    return importlib.util.find_spec("triton") is not None


@functools.cache
def _note(reason: str) -> None:
    logging.getLogger("saekit.kernels").warning("plain torch kernels (slower, same results): %s", reason)


def _checked(word: str, where: str) -> str:
    if word not in MODES:
        raise ConfigError(f"{where}: must be `auto`, `plain` or `fast`; got {word!r}. {did_you_mean(word, MODES)}")
    return word
