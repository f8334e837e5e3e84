"""When two latents are the same: the definition that every question uses."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ..sae.model import SAE
from .matching import Matching, match_latents
from .settings import THRESHOLD


@dataclass(frozen=True)
class SharedRule:
    """Which latents two SAEs share, given the matching of their decoders and that of their encoders.

    A latent is shared when both matchings, found independently, give it the same partner and both cosines exceed the
    threshold.
    """

    threshold: float = THRESHOLD
    """Cosine that counts as the same direction."""
    strict: bool = True
    """Whether a cosine must exceed the threshold (True) or may equal it."""

    def exceeds(self, cosine: Tensor) -> Tensor:
        """Return which cosines count, ``bool [n]``; those of latents without a partner (NaN) do not."""
        return cosine > self.threshold if self.strict else cosine >= self.threshold

    def aligned(self, decoder: Matching, encoder: Matching) -> Tensor:
        """Return which latents have both cosines over the threshold, whether or not the partners agree."""
        return self.exceeds(decoder.cosine) & self.exceeds(encoder.cosine)

    def shared(self, decoder: Matching, encoder: Matching) -> Tensor:
        """Return which latents of the first SAE the second has, ``bool [n]``."""
        return agree(decoder, encoder) & self.aligned(decoder, encoder)


def agree(decoder: Matching, encoder: Matching) -> Tensor:
    """Return which latents both matchings give the same partner, ``bool [n]``.

    Where a direction and its negative are the same, both the same way round: a latent that reads one way and writes
    the other does the opposite.
    """
    same_way = decoder.opposite == encoder.opposite
    return (decoder.partner == encoder.partner) & (decoder.partner >= 0) & same_way


def have_signs(one: SAE, other: SAE) -> bool:
    """Return whether a latent and its negative are the same in both SAEs, so that directions of either sign match."""
    return one.has_signs and other.has_signs


def shared_latents(one: SAE, other: SAE, rule: SharedRule = SharedRule()) -> Tensor:
    """Match two SAEs and return which latents of the first the second has, ``bool [n_latents]``.

    >>> import torch
    >>> from saekit.sae.rules import ReLURule
    >>> one = SAE(W_enc=torch.eye(3), b_enc=torch.zeros(3), W_dec=torch.eye(3), b_dec=torch.zeros(3), rule=ReLURule())
    >>> shared_latents(one, one.replace(W_enc=one.W_enc[[0, 2, 1]])).tolist()
    [True, False, False]
    """
    either = have_signs(one, other)
    decoder, encoder = (
        match_latents(getattr(one, key), getattr(other, key), either_sign=either) for key in ("W_dec", "W_enc")
    )
    return rule.shared(decoder, encoder)
