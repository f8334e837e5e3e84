"""Put values back into a running model: a function of the hidden states instead of what a module returned."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import ModelError, ShapeError
from .hooks import Hook, find_hook, first_token, given_to, hidden_of, listen


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


def _put_given(args: tuple[Any, ...], kwargs: dict[str, Any], old: Tensor, x: Tensor) -> tuple[tuple[Any, ...], Any]:
    """Return the arguments of a module with its hidden states replaced."""
    x = x.reshape(old.shape)
    return tuple(x if each is old else each for each in args), {k: x if v is old else v for k, v in kwargs.items()}


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
    function: Callable[..., Tensor],
    *,
    mask: Tensor | Callable[[Tensor], Tensor] | None = None,
    source: Hook | str | None = None,
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
    source
        A hook that a pass reaches before, for a transcoder: `function` is called with the rows there and the rows at
        `hook`, and returns what replaces the latter. None: with the rows at `hook` alone.

    Yields
    ------
    Hook
        The module that is replaced.

    Raises
    ------
    ShapeError
        `mask` or what `function` returns has another shape than the activations.
    ModelError
        A pass reaches `hook` before `source`.

    Examples
    --------
    ::

        with splice(lm, "layers.2", lambda x: sae.reconstruct(x), mask=tokens.keep):
            logits = lm.model(**tokens.inputs).logits
    """
    model: nn.Module = getattr(lm, "model", lm) if not isinstance(lm, nn.Module) else lm
    target = find_hook(model, hook)
    thread = threading.get_ident()  # rows that are being captured in another thread stay as they are

    read: list[Tensor] = []  # the rows at `source` in this pass

    def kept_in(hidden: Tensor) -> Tensor:
        return _kept(model, hidden, mask(hidden) if callable(mask) else mask)

    def replaced(hidden: Tensor) -> Tensor:
        rows = hidden.reshape(-1, hidden.shape[-1])
        kept = kept_in(hidden)
        taken = rows[kept]
        if source is None:
            changed = function(taken)
        elif read:
            changed = function(read.pop(), taken)
        else:
            raise ModelError(f"`{source}` must be reached before `{target.name}` in a forward pass; it is not.")
        if changed.shape != taken.shape:
            raise ShapeError(
                f"what is spliced in at `{target.name}` must have shape {tuple(taken.shape)}; "
                f"got {tuple(changed.shape)}. Was the SAE trained on this hook of this model?"
            )
        spliced = rows.clone()
        spliced[kept] = changed.to(rows)
        return spliced

    def note(hidden: Tensor) -> None:
        if threading.get_ident() == thread:
            read[:] = [hidden.reshape(-1, hidden.shape[-1])[kept_in(hidden)]]

    def replace_output(module: nn.Module, args: Any, output: Any) -> Any:
        if threading.get_ident() != thread:
            return None
        return _put_hidden(output, target, replaced(hidden_of(output, target)))

    def replace_input(module: nn.Module, args: Any, kwargs: Any) -> Any:
        if threading.get_ident() != thread:
            return None
        old = given_to(args, kwargs, target)
        return _put_given(args, kwargs, old, replaced(old))

    module = model.get_submodule(target.path)
    handles = [] if source is None else [listen(model, find_hook(model, source), note)]
    if target.is_input:
        handles.append(module.register_forward_pre_hook(replace_input, with_kwargs=True))
    else:
        handles.append(module.register_forward_hook(replace_output))
    try:
        yield target
    finally:
        for handle in handles:
            handle.remove()
