"""Tensors that have a shape and a type and no numbers: what a reader says about a file whose matrices are not read."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map


class Hollow(Tensor):
    """A tensor without numbers. Operations on it give tensors without numbers; whatever is asked of it is true."""

    @staticmethod
    def __new__(cls, shape: Any, dtype: torch.dtype) -> Hollow:
        """Return one of a shape and type."""
        return torch.Tensor._make_wrapper_subclass(cls, tuple(shape), dtype=dtype)

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        """Compute the shape and type of what an operation gives."""
        if func in _QUESTIONS:
            return 1
        kwargs = {key: value for key, value in (kwargs or {}).items() if key != "device"}
        found = func(*tree_map(_shape_of, args), **tree_map(_shape_of, kwargs))
        return tree_map(lambda each: cls(each.shape, each.dtype) if isinstance(each, Tensor) else each, found)

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"Hollow({tuple(self.shape)}, {self.dtype})"


_QUESTIONS = (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.is_nonzero.default)


def _shape_of(each: Any) -> Any:
    return torch.empty(each.shape, dtype=each.dtype, device="meta") if isinstance(each, Tensor) else each


def is_matrix(shape: tuple[int, ...]) -> bool:
    """Return whether a tensor of this shape is one of weights: what a reader asks of it is its shape alone.

    >>> is_matrix((64, 32)), is_matrix((64,)), is_matrix((1, 64))
    (True, False, False)
    """
    return len(shape) >= 2 and min(shape) > 1


def hollowed(value: Any) -> Any:
    """Return nested dicts with every matrix hollow; all else is as it was."""
    if isinstance(value, Tensor):
        return Hollow(value.shape, value.dtype) if is_matrix(tuple(value.shape)) else value.clone()
    return {key: hollowed(each) for key, each in value.items()} if isinstance(value, Mapping) else value
