"""What a model does with its input, measured by tiny forward passes instead of guessed from the names of its parts.

Each question costs one or two passes over a few tokens (or two images) and is asked once per model.
"""

from __future__ import annotations

import inspect
import re
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

BATCH, TOKENS = 2, 5  # unequal, so that the axes of hidden states can be told apart
_ROWS = 32  # rows of a tensor that are compared
_MOST = 0.7  # fraction of them that must agree: some rows of real models are so large that rounding hides all else
_TOLERANCE = 1e-3  # relative; rounding in float32 stays well below


@dataclass(frozen=True)
class Facts:
    """What one tiny forward pass showed."""

    calls: dict[str, int]
    """How often each module ran, by path; modules that did not run are missing."""
    shapes: dict[str, tuple[int, ...]]
    """Shape of the hidden states that each module gave."""
    repeats: bool
    """Whether the same call gave the same output again."""
    is_text: bool
    """Whether the input was tokens, ``[BATCH, TOKENS]``."""


@dataclass
class _Known:
    facts: Facts | None = None
    adding: dict[tuple[str, tuple[str, ...], bool], frozenset[str]] = field(default_factory=dict)
    broken: dict[str, int | None] = field(default_factory=dict)
    moved: dict[str, tuple[int, int, int] | None] = field(default_factory=dict)


_KNOWN: WeakKeyDictionary[nn.Module, _Known] = WeakKeyDictionary()


def _known(model: nn.Module) -> _Known:
    return _KNOWN.setdefault(model, _Known())


def facts_of(model: nn.Module) -> Facts | None:
    """Return what a tiny forward pass over a model shows; None where no input is known that it takes."""
    known = _known(model)
    if known.facts is None:  # once more where there were none: a setting of the model may have been missing
        known.facts = _measure(model)
    return known.facts


def _measure(model: nn.Module) -> Facts | None:
    calls: dict[str, int] = {}
    shapes: dict[str, tuple[int, ...]] = {}

    def count(path: str, value: object, *, is_output: bool) -> None:
        if not is_output:
            return
        calls[path] = calls.get(path, 0) + 1
        found = first_tensor(value)
        if found is not None:
            shapes.setdefault(path, tuple(found.shape))

    inputs = tiny_inputs(model)
    if inputs is None:
        return None
    outputs = []
    try:
        for seed in (0, 1):
            with _watched({} if seed else dict(model.named_modules()), count), seeded(model, seed):
                outputs.append(first_tensor(model(**inputs)))
    except Exception:  # whatever a model raises about inputs that it does not take
        return None
    first, second = outputs
    repeats = first is None or second is None or differs(first, second) <= tolerance(first)
    return Facts(calls, shapes, repeats, "input_ids" in inputs)


def added_parts(model: nn.Module, block: str, parts: Sequence[str], *, together: bool = True) -> frozenset[str] | None:
    """Return which parts of a block give what is added to the residual stream.

    A part does when some tensor in the block is another one plus its output, or plus the outputs of all parts; so a
    sub-layer whose output is scaled, or goes through a norm or a residual sum of its own, before it is added, does not.

    Parameters
    ----------
    model
        The model.
    block
        Path of the block.
    parts
        Paths inside the block.
    together
        Whether all parts at once may be added in one sum.

    Returns
    -------
    frozenset of str or None
        Those of `parts`; None where it cannot be measured.
    """
    known = _known(model)
    key = (block, tuple(parts), together)
    if key not in known.adding:
        seen = _inside(model, block)
        if seen is None:
            return None
        known.adding[key] = _adding(seen, parts, together)
    return known.adding[key]


def broken_after(model: nn.Module, blocks: str, count: int) -> int | None:
    """Return the first block whose output is nothing that the next one takes; None where the stream is whole.

    Parameters
    ----------
    model
        The model.
    blocks
        Path of the list of blocks.
    count
        Number of blocks.
    """
    known = _known(model)
    if blocks not in known.broken:
        known.broken[blocks] = _broken_after(model, [f"{blocks}.{i}" for i in range(count)])
    return known.broken[blocks]


def _broken_after(model: nn.Module, paths: Sequence[str]) -> int | None:
    taken: dict[str, list[Tensor]] = {}
    given: dict[str, Tensor] = {}

    def keep(path: str, value: object, *, is_output: bool) -> None:
        if not is_output:
            taken.setdefault(path, [x.detach().clone() for x in _tensors(value)])
        elif (found := first_tensor(value)) is not None:
            given.setdefault(path, found.detach().clone())

    if not _run_watched(model, {path: model.get_submodule(path) for path in paths}, keep):
        return None
    for at, (path, following) in enumerate(pairwise(paths)):
        if path in given and not _leads_to(given[path], taken.get(following, [])):
            return at
    return None


def _leads_to(output: Tensor, taken: Sequence[Tensor]) -> bool:
    """Return whether a block takes what the one before gave, or that plus what is the same for every input."""
    options = [x for x in taken if x.shape == output.shape]
    return not options or any(differs(output, x) <= tolerance(x) or _is_constant(x - output, x) for x in options)


def _is_constant(added: Tensor, x: Tensor) -> bool:
    """Return whether something is the same for every input of the batch: positions added between two blocks."""
    if len(added) != BATCH:
        return False
    return float((added[0] - added[1]).abs().max()) <= tolerance(x) * float(x.abs().max())


def _tensors(value: Any) -> list[Tensor]:
    """Return the tensors among what a module takes."""
    return [x for x in (value.values() if isinstance(value, Mapping) else value) if isinstance(x, Tensor)]


def _run_watched(
    model: nn.Module, modules: Mapping[str, nn.Module], see: Callable[..., None], inputs: dict[str, Any] | None = None
) -> bool:
    """Run a model over a tiny input and watch some modules; return whether there is one and the model takes it."""
    inputs = tiny_inputs(model) if inputs is None else inputs
    if inputs is None:
        return False
    try:
        with _watched(modules, see), seeded(model, 0):
            model(**inputs)
    except _Enough:
        return True
    except Exception:  # whatever a model raises about inputs that it does not take
        return False
    return True


class _Enough(BaseException):
    """Ends a forward pass when all has been seen; not an Exception, so that no model catches it by accident."""


def tokens_around(model: nn.Module, block: str) -> tuple[int, int] | None:
    """Return how many tokens a model puts before and behind those of its input; None where it cannot be measured.

    Two inputs are run: texts of `TOKENS` tokens that differ in the last one, or two images. Of the hidden states that
    `block`, the first one, takes, only those of the tokens (the patches) of the input can then differ.

    Parameters
    ----------
    model
        The model.
    block
        Path of the first block.
    """
    known = _known(model)
    if block not in known.moved:
        known.moved[block] = _moved(model, block)
    found = known.moved[block]
    if found is None:
        return None
    first, last, total = found
    facts = facts_of(model)
    return (last - TOKENS + 1 if facts is not None and facts.is_text else first), total - last - 1


def _moved(model: nn.Module, block: str) -> tuple[int, int, int] | None:
    """Return the first and the last hidden state that differ between two inputs, and how many there are."""
    inputs = tiny_inputs(model)
    if inputs is None:
        return None
    if "input_ids" in inputs:
        inputs["input_ids"] = _unlike_at_the_end(inputs["input_ids"])
    seen: list[Tensor] = []

    def keep(path: str, value: object, *, is_output: bool) -> None:
        seen.extend(x.detach() for x in _tensors(value) if x.ndim == 3 and x.is_floating_point() and len(x) == BATCH)
        raise _Enough

    if not _run_watched(model, {block: model.get_submodule(block)}, keep, inputs) or not seen:
        return None
    differ = (seen[0][0] - seen[0][1]).abs().amax(-1).nonzero().flatten().tolist()
    return (differ[0], differ[-1], seen[0].shape[1]) if differ else None


def _unlike_at_the_end(ids: Tensor) -> Tensor:
    """Return texts that are equal up to their last token."""
    ids = ids.clone()
    ids[1] = ids[0]
    ids[1, -1] = ids[0, 0]
    return ids


@dataclass
class _Seen:
    """Hidden states in a block, without those that are equal: ``[rows, width]`` each."""

    states: list[Tensor] = field(default_factory=list)
    outputs: dict[str, Tensor] = field(default_factory=dict)
    ran: set[str] = field(default_factory=set)
    rounding: float = 0.0

    def note(self, x: Tensor) -> Tensor:
        for other in self.states:
            if other.shape == x.shape and torch.equal(other, x):
                return other
        self.states.append(x)
        return x


def _inside(model: nn.Module, block: str) -> _Seen | None:
    seen = _Seen()

    def keep(path: str, value: object, *, is_output: bool) -> None:
        seen.ran.add(path)
        x = first_tensor(value)
        if x is None or x.ndim < 2 or not x.is_floating_point():
            return
        noted = seen.note(x.detach().reshape(-1, x.shape[-1])[:_ROWS].double().cpu().clone())
        seen.rounding = max(seen.rounding, torch.finfo(x.dtype).eps)
        if is_output:
            seen.outputs[path] = noted

    if not _run_watched(model, dict(model.get_submodule(block).named_modules()), keep):
        return None
    whole = seen.outputs.get("")
    if whole is None:
        return None
    seen.states = [x for x in seen.states if x.shape == whole.shape]
    seen.outputs = {path: x for path, x in seen.outputs.items() if x.shape == whole.shape}
    return seen


def _adding(seen: _Seen, parts: Sequence[str], together: bool) -> frozenset[str]:
    there = {part: seen.outputs[part] for part in parts if part in seen.outputs}
    order = {id(x): at for at, x in enumerate(seen.states)}
    alone = {part for part, x in there.items() if _is_term(x, seen, order[id(x)])}
    if (
        len(there) > 1
        and len(alone) < len(there)
        and _is_term(sum(there.values(), torch.zeros(())), seen, min(order[id(x)] for x in there.values()))
    ):
        alone = set(there)  # parallel sub-layers: only their sum is added
    return frozenset(alone | (set(parts) - set(seen.ran)))  # of a part that did not run there is nothing to say


def _is_term(part: Tensor, seen: _Seen, at: int) -> bool:
    """Return whether one of the states is one of the first `at` plus `part`."""
    size = part.norm(dim=1)
    for total in seen.states:
        # what rounding leaves of a small term of a large sum; where it leaves nothing, nothing can be said
        allowed = 0.02 * size + (seen.rounding * total.norm(dim=1)).clamp(max=0.4 * size)
        for before in seen.states[:at]:  # the stream was there first; what comes later is added to it, not it to that
            if total is before or total is part or before is part:
                continue
            moved = total - before
            fits = ((moved - part).norm(dim=1) <= allowed) & (before.norm(dim=1) > 1e-3 * size)
            # over many numbers rounding averages out, a factor in front of the part does not
            factor = float((moved[fits] * part[fits]).sum() / part[fits].square().sum().clamp_min(1e-30))
            if float(fits.double().mean()) >= _MOST and abs(factor - 1) <= 0.02:
                return True
    return False


def sees_later_tokens(model: nn.Module) -> bool | None:
    """Return whether the output at a token depends on later tokens; None where it cannot be measured."""
    inputs = tiny_inputs(model)
    if inputs is None or "input_ids" not in inputs:
        return None
    ids = _unlike_at_the_end(inputs["input_ids"])
    try:
        with seeded(model, 0):
            output = first_tensor(model(**{**inputs, "input_ids": ids}))
    except Exception:
        return None
    if output is None or output.ndim < 3 or output.shape[:2] != (BATCH, TOKENS):
        return None
    return differs(output[0, :-1], output[1, :-1]) > tolerance(output)


# ------------------------------------------------------------------------------------------------------------- inputs


def tiny_inputs(model: nn.Module) -> dict[str, Any] | None:
    """Return arguments for a forward pass over a few tokens, or over two images; None where neither can be made."""
    try:
        taken = inspect.signature(model.forward).parameters
        parameter = next(model.parameters(), torch.zeros(()))
    except (TypeError, ValueError):
        return None
    if parameter.device.type == "meta":
        return None
    config: Any = getattr(model, "config", None)
    if "input_ids" in taken:
        ids = torch.tensor(plain_tokens(model, BATCH * TOKENS)).reshape(BATCH, TOKENS)
        inputs: dict[str, Any] = {"input_ids": ids.to(parameter.device)}
        if "attention_mask" in taken:
            inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
        if "use_cache" in taken:
            inputs["use_cache"] = False
        return inputs
    size = getattr(config, "image_size", None)
    if "pixel_values" not in taken or not isinstance(size, int | list | tuple):
        return None
    height, width = (size, size) if isinstance(size, int) else (size[-2], size[-1])
    channels = getattr(config, "num_channels", 3)
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randn(BATCH, channels, height, width, generator=generator)
    return {"pixel_values": pixels.to(parameter.device, parameter.dtype), **fixed_noise(model, pixels)}


def fixed_noise(model: nn.Module, pixels: Tensor) -> dict[str, Tensor]:
    """Return what keeps the patches of a masked autoencoder in their order: increasing numbers in place of noise."""
    config: Any = getattr(model, "config", None)
    size = getattr(config, "patch_size", None)
    if not isinstance(size, int) or "noise" not in inspect.signature(model.forward).parameters:
        return {}
    patches = (pixels.shape[-2] // size) * (pixels.shape[-1] // size)
    return {"noise": torch.arange(patches, dtype=torch.float32, device=pixels.device).expand(pixels.shape[0], -1)}


def plain_tokens(model: nn.Module, count: int) -> list[int]:
    """Return ordinary token ids, spread over the vocabulary; ids that the config names are left out."""
    config: Any = getattr(model, "config", None)
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    special = _named_ids(config) | _named_ids(text)
    size = min(int(getattr(text, "vocab_size", None) or 2), 2000)
    plain = [token for token in range(size) if token not in special] or [0]
    return [plain[i * len(plain) // count] for i in range(count)]


def _named_ids(config: object) -> set[int]:
    """Return the token ids that a config names: of padding, of images, …"""
    fields = vars(config) if config is not None else {}
    return {value for name, value in fields.items() if isinstance(value, int) and re.search("token_(id|index)", name)}


# ------------------------------------------------------------------------------------------------------------- passes


@contextmanager
def _watched(modules: Mapping[str, nn.Module], see: Callable[..., None]) -> Iterator[None]:
    """Call ``see(path, value, is_output=…)`` with what modules take and what they return, in the order of execution."""
    thread = threading.get_ident()

    def before_of(path: str) -> Callable[..., None]:
        def before(module: nn.Module, args: object, kwargs: object) -> None:
            if threading.get_ident() == thread:
                see(path, args or kwargs, is_output=False)

        return before

    def after_of(path: str) -> Callable[..., None]:
        def after(module: nn.Module, args: object, output: object) -> None:
            if threading.get_ident() == thread:
                see(path, output, is_output=True)

        return after

    handles = []
    for path, module in modules.items():
        handles.append(module.register_forward_pre_hook(before_of(path), with_kwargs=True))
        handles.append(module.register_forward_hook(after_of(path)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def seeded(model: nn.Module, seed: int) -> Iterator[None]:
    """Run a pass without gradients, in eval mode, with a random seed of its own; all is as before afterwards."""
    training = [module for module in model.modules() if module.training]
    devices = sorted({p.device.index or 0 for p in model.parameters() if p.device.type == "cuda"})
    with torch.no_grad(), torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        for module in training:
            module.training = False
        try:
            yield
        finally:
            for module in training:
                module.training = True


def first_tensor(value: object) -> Tensor | None:
    """Return the first tensor in what a module takes or returns."""
    if isinstance(value, Tensor):
        return value
    if isinstance(value, Mapping):
        value = list(value.values())
    if isinstance(value, tuple | list):
        return next((x for x in map(first_tensor, value) if x is not None), None)
    return None


def differs(one: Tensor, other: Tensor) -> float:
    """Return the largest difference, relative to the largest value; NaN equals NaN."""
    if one.shape != other.shape:
        return float("inf")
    if not one.numel():
        return 0.0
    first, second = (x.detach().double().nan_to_num(0.0, 1e30, -1e30) for x in (one, other))
    return float((first - second).abs().max()) / max(float(first.abs().max()), 1e-12)


def tolerance(x: Tensor) -> float:
    """Return the relative difference that rounding alone can leave after a whole forward pass."""
    return _TOLERANCE if x.dtype in (torch.float32, torch.float64) else 0.1
