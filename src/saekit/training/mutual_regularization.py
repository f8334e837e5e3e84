"""Mutual feature regularization: seeds that are trained together pull each other's decoder rows closer (2411.01220).

``penalty = mutual * d_in * (1 - mean over the other seeds, and over latents, of the largest cosine of a decoder row
with theirs)``, of codes with a sign the largest absolute cosine. With it an SAE depends on which seeds are trained
together; that is the point.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .. import kernels
from ..errors import ConfigError
from .config import Config

BLOCK_ROWS = 1024
"""Rows of cosines held at once: the matrix of all is never made."""


def pull(W: Tensor, others: Sequence[Tensor], mutual: float, signed: bool = False) -> tuple[Tensor, Tensor]:
    """Return the penalty and its gradient with respect to `W`, the others held fixed.

    Parameters
    ----------
    W
        Decoder rows ``[n, d]``.
    others
        Decoder rows of the other seeds, each ``[n, d]``.
    mutual
        Weight.
    signed
        Whether a row and its negative are the same.

    Returns
    -------
    penalty, gradient
        ``[]`` and ``[n, d]``. Where two rows of another seed are equally close, the first counts.
    """
    n, d = W.shape
    lengths = W.norm(dim=1, keepdim=True).clamp_min(1e-12)
    unit = W / lengths
    gradient, mean = torch.zeros_like(W), W.new_zeros(())
    for other in others:
        theirs = other / other.norm(dim=1, keepdim=True).clamp_min(1e-12)
        for start in range(0, n, BLOCK_ROWS):
            part = slice(start, start + BLOCK_ROWS)
            cosines = kernels.matmul(unit[part], theirs.T)
            best, at = (cosines.abs() if signed else cosines).max(1)
            mean += best.sum()
            nearest = theirs[at]
            if signed:
                nearest = nearest * cosines.gather(1, at[:, None]).sign()
            gradient[part] += (nearest - best[:, None] * unit[part]) / lengths[part]
    weight = mutual * d / (n * len(others))
    return mutual * d - weight * mean, gradient.mul_(-weight)


def check_mutual(config: Config, seeds: Sequence[int], step: str) -> None:
    """Refuse what makes no sense with `mutual`.

    Raises
    ------
    ConfigError
        A single seed, a control whose decoder is not trained, or a step that does not know the penalty.
    """
    if not config.mutual:
        return
    name = type(config).__name__
    if len(seeds) < 2:
        raise ConfigError(
            f"train: `mutual` pulls seeds towards each other, so {name} needs at least two; got {list(seeds)}. "
            "Pass seeds=[0, 1]."
        )
    if config.control in ("untrained", "frozen-decoder"):
        raise ConfigError(
            f"train: `mutual` moves the decoder, which control={config.control!r} keeps. Drop one of them."
        )
    if step != "plain":
        raise ConfigError(f"train: `mutual` needs step='plain'; got step={step!r}. Leave `step` out of TrainSettings.")
