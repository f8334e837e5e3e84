"""Which documents labels are made of, and which they are tested on; where the rows of a batch lie among all tokens."""

from __future__ import annotations

from typing import Any

import numpy as np

from ..models.language import LanguageModel
from ..randomness import hashed_key
from ..rows.tokens import Contexts, TokenBatch
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


def places_of(contexts: Contexts, batch: TokenBatch) -> np.ndarray:
    """Return where the kept tokens of a batch lie among those of all contexts, in the order of ``hidden[keep]``."""
    keep = batch.keep.cpu().numpy()
    mask = batch.inputs["attention_mask"].cpu().numpy().astype(bool)
    first = contexts.offsets[list(batch.index)]
    within = np.cumsum(mask, 1) - 1
    return (first[:, None] + within)[keep]
