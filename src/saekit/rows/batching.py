"""Whether the rows of a text depend on what it shares a forward pass with: measured once per model and side."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal
from weakref import WeakKeyDictionary

from torch import Tensor, nn

from ..models.probe import differs, first_tensor, plain_tokens, seeded, tolerance

Batching = Literal["padded", "equal lengths", "one at a time"]
"""How contexts may share a forward pass: with padding, only when they have the same length, or not at all."""

_SHORT, _LONG = 3, 7
_KNOWN: WeakKeyDictionary[nn.Module, dict[str, Batching]] = WeakKeyDictionary()


def batching_of(model: nn.Module, side: str, make: Callable[[Sequence[Sequence[int]]], dict[str, Any]]) -> Batching:
    """Return how contexts may share a forward pass without changing each other's rows beyond rounding.

    Two short contexts are run alone and in one batch. A model that mixes all positions without a mask (FNet), or that
    numbers positions from the padding (BART with padding on the left), gives other rows in a padded batch.

    Parameters
    ----------
    model
        The model.
    side
        Side of the padding.
    make
        From lists of token ids to the arguments of the forward, padded on that side.
    """
    known = _KNOWN.setdefault(model, {})
    if side not in known:
        found = _measure(model, side, make)
        if found is None:  # the model takes no such input; the run itself will say why
            return "padded"
        known[side] = found
    return known[side]


def _measure(model: nn.Module, side: str, make: Callable[[Sequence[Sequence[int]]], dict[str, Any]]) -> Batching | None:
    ids = plain_tokens(model, _SHORT + 2 * _LONG)
    short, long, other = ids[:_SHORT], ids[_SHORT : _SHORT + _LONG], ids[_SHORT + _LONG :]

    def run(*contexts: Sequence[int]) -> list[Tensor] | None:
        """Return the output at the tokens of each context, not at the padding."""
        with seeded(model, 0):
            output = first_tensor(model(**make(contexts)))
        width = max(len(context) for context in contexts)
        if output is not None and output.ndim == 2 and len(output) == len(contexts):
            return list(output)  # one vector for each context: it depends on the padding if its tokens do
        if output is None or output.ndim < 3 or output.shape[:2] != (len(contexts), width):
            return None
        cuts = [slice(width - len(c), None) if side == "left" else slice(0, len(c)) for c in contexts]
        return [output[row, cut] for row, cut in enumerate(cuts)]

    def same(*contexts: Sequence[int]) -> bool:
        together = run(*contexts)
        for context, found in zip(contexts, together or (), strict=False):
            alone = run(context)
            if alone is not None and differs(alone[0], found) > tolerance(found):
                return False
        return True

    try:
        if same(short, long):
            return "padded"
        return "equal lengths" if same(long, other) else "one at a time"
    except Exception:
        return None
