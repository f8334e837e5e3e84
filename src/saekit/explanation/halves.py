"""Which documents labels are made of, and which they are tested on."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np

from ..models.language import LanguageModel
from ..randomness import hashed_key
from ..sae.model import SAE
from ..settings import is_whole


def is_labelling(document: int) -> bool:
    """Return whether a document is of the half that labels are made of; the other half tests them."""
    return _key(document) % 2 == 0


def labelling_among(documents: Iterable[int]) -> np.ndarray:
    """Return which of some documents labels are made of: bool, in their order; see `is_labelling`.

    Where all of two or more documents would fall into one half, the one with the least hash goes to the other, so that
    a few documents are split whatever their numbers. It depends on which documents there are, not on their order.
    """
    numbers = [int(each) for each in documents]
    found = np.array([is_labelling(each) for each in numbers], bool)
    if len(set(numbers)) > 1 and (found.all() or not found.any()):
        moved = min(set(numbers), key=_key)
        found[np.array(numbers) == moved] ^= True
    return found


def _key(document: int) -> int:
    return hashed_key("explanation half", document)


CONTEXT = 256
"""Tokens that the model reads at once where neither the caller nor the SAE says."""


def context_of(sae: SAE, lm: LanguageModel, given: int | None) -> int:
    """Return how many tokens the model reads at once: as given, else as in the SAE's training; at most its limit."""
    trained: Any = sae.provenance.get("context")
    known = trained if is_whole(trained) and trained > 1 else CONTEXT
    return min(known if given is None else given, lm.context)
