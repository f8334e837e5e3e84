"""Scratch memory of the compiled kernels, used again by the next call."""

from __future__ import annotations

import math
import threading
from typing import Any

import torch
from torch import Tensor

from .huge_pages import on_large_pages

_scratch = threading.local()


def remembered() -> dict[str, Any]:
    """Return what this thread keeps between calls."""
    return _scratch.__dict__


def buffer(name: str, shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> Tensor:
    """Return memory that the next call with this name on this thread uses again; its content is undefined.

    The system has to clear every new page, and looking it up for the first time costs as much as several passes over
    it.
    """
    buffers = remembered().setdefault("buffers", {})
    size = math.prod(shape)
    held = buffers.get((name, dtype))
    if held is None or len(held) < size:
        held = buffers[name, dtype] = on_large_pages(max(size, 1), dtype)
    return held[:size].view(shape)


def buffer_within(name: str, shape: tuple[int, ...]) -> Tensor:
    """Return bf16 in the memory of a float32 buffer that is not needed before this is no longer needed."""
    size = math.prod(shape)
    return buffer(name, (-(-size // 2),)).view(torch.bfloat16)[:size].view(shape)


def release() -> None:
    """Give back the memory that calls on this thread have kept for the next one."""
    remembered().clear()
