"""Which documents labels are made of, and which they are tested on."""

from __future__ import annotations

from typing import Any

from ..models.language import LanguageModel
from ..randomness import hashed_key
from ..sae.model import SAE
from ..settings import is_whole


def is_labelling(document: int) -> bool:
    """Return whether a document is of the half that labels are made of; the other half tests them."""
    return hashed_key("explanation half", document) % 2 == 0


CONTEXT = 256
"""Tokens that the model reads at once where neither the caller nor the SAE says."""


def context_of(sae: SAE, lm: LanguageModel, given: int | None) -> int:
    """Return how many tokens the model reads at once: as given, else as in the SAE's training; at most its limit."""
    trained: Any = sae.provenance.get("context")
    known = trained if is_whole(trained) and trained > 1 else CONTEXT
    return min(known if given is None else given, lm.context)
