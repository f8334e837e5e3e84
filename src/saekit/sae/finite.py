"""Rows as public functions take them: arrays, lists and frames as tensors; NaN, infinity and overflow are refused."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from ..errors import DataError, ShapeError
from .codes import Codes


def as_tensor(x: object, where: str) -> Tensor:
    """Return rows as a tensor: a tensor itself, a numpy array, a list or a frame of numbers.

    Raises
    ------
    ShapeError
        It holds no numbers, or lists of different lengths.
    """
    if isinstance(x, Tensor):
        return x
    try:
        array = np.asarray(x)
        native = array.dtype in (np.dtype("float16"), np.dtype("float32"), np.dtype("float64"))
        return torch.from_numpy(np.array(array, dtype=None if native else np.float32))
    except (TypeError, ValueError):
        raise ShapeError(
            f"{where}: rows must be numbers [n, d_in]: a tensor, an array, a list or a frame; got {type(x).__name__}. "
            "Convert it with numpy.asarray."
        ) from None


def check_finite(x: Tensor, first_row: int | Callable[[int], int], where: str) -> None:
    """Refuse NaN and infinity, naming the row.

    Parameters
    ----------
    x
        Rows ``[n, d]``.
    first_row
        Number of row 0 of `x`, or a function from the index in `x` to the row number.
    where
        What the rows are called in the message.

    Raises
    ------
    DataError
        A value is NaN or infinite.
    """
    # A finite sum proves that every entry is finite; only a suspicious one pays for the exact look.
    if bool(torch.isfinite(x.sum())):
        return
    bad = (~torch.isfinite(x)).any(dim=1).nonzero().flatten()
    if len(bad):
        index = int(bad[0])
        row = first_row(index) if callable(first_row) else first_row + index
        column = int((~torch.isfinite(x[index])).nonzero()[0])
        more = f"; {len(bad)} of these {len(x)} rows are not finite" if len(bad) > 1 else ""
        raise DataError(
            f"rows must be finite; row {row} of {where} has {float(x[index, column])} in column {column}{more}. "
            "Remove such rows, or find out where they come from (half precision overflows at 65504)."
        )


def as_rows(x: object, width: int, dtype: torch.dtype, device: torch.device, where: str) -> Tensor:
    """Return finite rows ``[n, width]`` in a number type, on a device.

    Parameters
    ----------
    x
        Rows ``[..., width]``: a tensor, an array, a list or a frame; leading axes are flattened.
    width, dtype, device
        What they must have.
    where
        Function that messages name.

    Raises
    ------
    ShapeError
        Another width, or no numbers.
    DataError
        NaN, infinity, or numbers that the number type cannot hold.
    """
    x = as_tensor(x, where)
    if x.ndim < 1 or x.shape[-1] != width:
        raise ShapeError(
            f"SAE: rows must have width d_in={width}; got {tuple(x.shape)}. "
            "Was this SAE trained on another model or hook?"
        )
    x = x.reshape(-1, width)
    rows = x.to(device=device, dtype=dtype)
    if not bool(torch.isfinite(rows.sum())):
        check_finite(x, 0, f"the rows given to {where}")
        check_held(rows, x, where)
    return rows


def check_held(values: Tensor, x: Tensor, where: str) -> None:
    """Refuse finite rows `x` whose `values` overflow the number type; raises `DataError`."""
    held = torch.isfinite(values).flatten(1).all(1)
    if not bool(held.all()):
        row = int((~held).nonzero()[0])
        raise DataError(
            f"{where}: rows and their norms must fit into {str(values.dtype).removeprefix('torch.')}, the number type "
            f"of the SAE; row {row} has numbers up to {float(x[row].abs().max()):.3g}, and {int((~held).sum())} of "
            f"{len(held)} rows are too large. Scale the rows."
        )


def check_codes(codes: Codes) -> None:
    """Refuse codes with NaN or infinity, naming the row; raises `DataError`."""
    if not bool(torch.isfinite(codes.values.sum())):
        bad = (~torch.isfinite(codes.values)).nonzero().flatten()
        if len(bad):
            row, latent = int(codes.row_of()[bad[0]]), int(codes.indices[bad[0]])
            raise DataError(
                f"decode: codes must be finite; latent {latent} of row {row} has {float(codes.values[bad[0]])}, and "
                f"{len(bad)} of {codes.nnz} codes are not finite."
            )
