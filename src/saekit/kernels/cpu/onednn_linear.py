"""Products in fp32 by oneDNN, where torch's own choice leaves half of the processor idle.

torch hands fp32 products on a CPU to MKL, which runs its 256-bit code on processors of AMD. oneDNN, which torch has
too, uses their 512-bit units: about twice as fast on layers of 64 to 3,072 columns on a Zen 5
(benchmarks/linear.py). Both compute in fp32; results differ by rounding.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from .. import backend

SMALLEST = 2**21
"""Products with fewer multiply-adds are left to torch: a call of oneDNN costs a few microseconds more."""


@contextlib.contextmanager
def fast_linears() -> Iterator[None]:
    """Run linear layers that are called in the block, on this thread, on the faster library where there is a choice.

    That is on a CPU of AMD with AVX-512, for fp32, without gradients; everywhere else nothing changes, nor with
    ``saekit.kernels.use("plain")``.
    """
    if backend.mode() == "plain" or torch.is_grad_enabled() or not pays():
        yield
        return
    with _Linears():
        yield


def matmul(a: Tensor, b: Tensor) -> Tensor:
    """Return ``a @ b`` for matrices, by the same choice as in `fast_linears`."""
    if backend.mode() == "plain" or not pays() or not _fits(a, b.mT) or _differentiated(a, b):
        return a @ b
    return _linear(a, b.mT, None)


def _differentiated(*tensors: Tensor) -> bool:
    return torch.is_grad_enabled() and any(t.requires_grad for t in tensors)


@functools.cache
def pays() -> bool:
    """Return whether oneDNN is there and beats torch's choice on this processor."""
    if not (torch.backends.mkl.is_available() and torch.backends.mkldnn.is_available()):
        return False
    if torch.backends.cpu.get_cpu_capability() != "AVX512" or _vendor() != "AuthenticAMD":
        return False
    x, W, b = torch.ones(3, 2), torch.tensor([[1.0, 2.0], [3.0, 4.0]]), torch.tensor([0.5, 0.0])
    try:  # torch promises nothing about this operator
        with torch.no_grad():
            return torch.equal(_linear(x, W, b), x @ W.T + b) and torch.equal(_linear(x, W.T, None), x @ W)
    except (AttributeError, NotImplementedError, RuntimeError, TypeError):
        return False


def _vendor() -> str:
    """Return the processor's vendor in Linux's words; empty elsewhere."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("vendor_id"):
                return line.split(":")[1].strip()
    return ""


def _linear(x: Tensor, W: Tensor, b: Tensor | None) -> Tensor:
    """``x @ W.T + b`` for ``x [..., d]`` and ``W [m, d]``."""
    return torch.ops.mkldnn._linear_pointwise(x, W, b, "none", [], "")


class _Linears(TorchFunctionMode):
    """Takes over ``F.linear(x, W, b)``, and ``torch.addmm(b, x, W.T)``, which GPT-2's layers call."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Sequence[type], args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is F.linear and not kwargs and _fits(*args):
            return _linear(args[0], args[1], args[2] if len(args) > 2 else None)
        if func is torch.addmm and not kwargs and len(args) == 3 and _fits(args[1], args[2].mT, args[0]):
            return _linear(args[1], args[2].mT, args[0])
        return func(*args, **kwargs)


def _fits(x: Tensor, W: Tensor, b: Tensor | None = None) -> bool:
    """Return whether this is a product for oneDNN: plain fp32 tensors on the CPU, a bias per column, large enough."""
    tensors = (x, W) if b is None else (x, W, b)
    if any(type(t) not in PLAIN or t.dtype != torch.float32 or t.device.type != "cpu" for t in tensors):
        return False
    if any(t.layout != torch.strided for t in tensors) or W.ndim != 2 or (b is not None and b.ndim != 1):
        return False
    return not torch.is_autocast_enabled("cpu") and x.numel() * len(W) >= SMALLEST


PLAIN = (Tensor, torch.nn.Parameter)
"""Kinds of tensors whose products are what they seem; quantized weights, for example, are of another kind."""
