"""Put values back into a running model: a function of the hidden states instead of what a module returned."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import ShapeError
from .hooks import Hook, find_hook, first_token, hidden_of


def _put_hidden(output: Any, hook: Hook, x: Tensor) -> Any:
    """`output` with its hidden states replaced, of the same type and structure."""
    if isinstance(output, Tensor):
        return x.reshape(output.shape)
    old = hidden_of(output, hook)
    x = x.reshape(old.shape)
    if isinstance(output, Mapping):
        key = next(key for key, value in output.items() if value is old)
        return type(output)(**{**output, key: x})
    values = (x, *list(output)[1:])
    if isinstance(output, list):
        return list(values)
    return type(output)(*values) if hasattr(output, "_fields") else values


def _kept(model: nn.Module, hidden: Tensor, mask: Tensor | None) -> Tensor:
    """Return which rows of hidden states, one after another, are replaced."""
    n_rows = hidden.shape[:-1].numel()
    if mask is None:
        return torch.ones(n_rows, dtype=torch.bool, device=hidden.device)
    if mask.ndim == 2 and hidden.ndim == 3 and hidden.shape[1] > mask.shape[1]:
        start = first_token(model) or 0  # the model itself made the text longer
        whole = torch.zeros(hidden.shape[:2], dtype=mask.dtype, device=mask.device)
        whole[:, start : start + mask.shape[1]] = mask
        mask = whole
    if mask.dtype != torch.bool or mask.numel() != n_rows:
        raise ShapeError(
            f"`mask` must be bool with one entry per token, {n_rows} here; got {tuple(mask.shape)} {mask.dtype}."
        )
    return mask.reshape(-1).to(hidden.device)


@contextmanager
def splice(
    lm: Any,
    hook: Hook | str | int,
    function: Callable[[Tensor], Tensor],
    *,
    mask: Tensor | Callable[[Tensor], Tensor] | None = None,
) -> Iterator[Hook]:
    """Replace the activations at a hook during the forward passes inside the block.

    Parameters
    ----------
    lm
        A `LanguageModel`, or a module.
    hook
        Where; see `find_hook`.
    function
        From rows ``[n, d]`` to rows ``[n, d]``; called once per forward pass with the rows where `mask` is true, in
        the model's own number type. The result is cast back to that type.
    mask
        Which tokens are replaced, bool ``[batch, sequence]``; all others (padding, BOS, whatever capture skips) pass
        through unchanged. None: all tokens. It holds for forward passes of this shape; a function of the hidden states
        is asked in every pass.

    Yields
    ------
    Hook
        The module that is replaced.

    Raises
    ------
    ShapeError
        `mask` or what `function` returns has another shape than the activations.

    Examples
    --------
    ::

        with splice(lm, "layers.2", lambda x: sae.reconstruct(x), mask=tokens.keep):
            logits = lm.model(**tokens.inputs).logits
    """
    model: nn.Module = getattr(lm, "model", lm) if not isinstance(lm, nn.Module) else lm
    target = find_hook(model, hook)
    thread = threading.get_ident()  # rows that are being captured in another thread stay as they are

    def replace(module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        if threading.get_ident() != thread:
            return None
        hidden = hidden_of(output, target)
        rows = hidden.reshape(-1, hidden.shape[-1])
        kept = _kept(model, hidden, mask(hidden) if callable(mask) else mask)
        taken = rows[kept]
        replaced = function(taken)
        if replaced.shape != taken.shape:
            raise ShapeError(
                f"what is spliced in at `{target.name}` must have shape {tuple(taken.shape)}; "
                f"got {tuple(replaced.shape)}. Was the SAE trained on this hook of this model?"
            )
        spliced = rows.clone()
        spliced[kept] = replaced.to(rows)
        return _put_hidden(output, target, spliced)

    handle = model.get_submodule(target.path).register_forward_hook(replace, with_kwargs=True)
    try:
        yield target
    finally:
        handle.remove()
