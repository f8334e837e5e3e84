"""Where rows are taken from: modules of a model by short names, forward hooks on them, and splicing values back in.

``layer=L`` is the residual stream after block L, 0-based: the output of the block itself. For the last block that is
*not* the last of transformers' ``hidden_states``, which comes after the final norm. ``.input`` after a name means what
the module is given instead of what it returns: ``layers.2.mlp.input`` is what a transcoder of an MLP reads.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from .. import kernels
from ..errors import ConfigError, MissingModelError, ModelError, SaekitError, did_you_mean, listed
from .probe import BATCH, TOKENS, added_parts, broken_after, facts_of, tokens_around

Site = Literal["resid", "mlp", "attn"]

# Paths inside a block, most specific first: what the sub-layer adds, before the residual sum where that exists.
_SITES: dict[str, tuple[str, ...]] = {
    "mlp": (
        "mlp", "feed_forward", "ffn", "ff", "block_sparse_moe", "moe", "output.dense", "layer.2.DenseReluDense",
        "layer.1.DenseReluDense", "fc2", "feedforward",
    ),
    "attn": (
        "self_attn", "attention.output.dense", "attn", "attention", "self_attention", "layer.0.SelfAttention",
        "linear_attn", "mixer", "attention_layer",
    ),
}  # fmt: skip
_SHORT = re.compile(r"(?:layers?|blocks?|h)\.(-?\d+)(?:\.(.+))?")
_LAST_PART = ("dense", "fc2")  # of a sub-layer that is no module of its own: its input is not that of the sub-layer

INPUT = ".input"
"""What the name of a hook ends with when its rows are what the module is given."""

LAYER = "{layer}"
"""What stands for the number of the layer in the name of a module of several layers."""


@dataclass(frozen=True)
class Hook:
    """A module whose outputs are the rows."""

    name: str
    """Short name, the same for all models: ``layers.2``, ``layers.2.mlp``; the path of any other module."""
    path: str
    """Path of the module in the model."""
    layer: int | None
    """Number of the block that it is or lies in, from 0; None outside the blocks."""

    @property
    def is_residual(self) -> bool:
        """Whether it is a whole block: its output is the residual stream."""
        return self.layer is not None and self.name == f"layers.{self.layer}"

    @property
    def is_input(self) -> bool:
        """Whether the rows are what the module is given, not what it returns."""
        return self.name.endswith(INPUT) and not self.path.endswith(INPUT)

    @property
    def info(self) -> dict[str, Any]:
        """Name, path and layer, as plain JSON."""
        return {"hook": self.name, "module": self.path, "layer": self.layer}


def blocks(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """Return the path of the list of blocks of a transformer, and the list.

    Found by shape, not by model name: the ``ModuleList`` with as many entries as the config has layers, outermost
    first, language parts before vision parts.

    Raises
    ------
    ModelError
        There is no list of modules at all.
    """
    found = [
        (path, module) for path, module in model.named_modules() if isinstance(module, nn.ModuleList) and len(module)
    ]
    paths = [path for path, _ in found]
    outer = [(path, module) for path, module in found if not any(path.startswith(other + ".") for other in paths)]
    if not outer:
        raise ModelError(
            f"`{type(model).__name__}` must have a list of blocks for layers to be numbered; it has none. "
            "Name a module by its path instead."
        )
    expected = _n_layers(model)

    def merit(item: tuple[str, nn.ModuleList]) -> tuple[bool, bool, int]:
        path, module = item
        return (len(module) == expected, not re.search("vision|visual|image|audio|decoder_blocks", path), len(module))

    return max(outer, key=merit)


def _n_layers(model: nn.Module) -> int | None:
    config = getattr(model, "config", None)
    if config is None:
        return None
    if hasattr(config, "get_text_config"):
        config = config.get_text_config()
    for name in ("num_hidden_layers", "n_layer", "num_layers"):
        count = getattr(config, name, None)
        if isinstance(count, int):
            return count
    return None


def find_hook(
    model: nn.Module, hook: str | int | Hook | None = None, *, layer: int | None = None, site: Site = "resid"
) -> Hook:
    """Find the module that a layer number, a short name or a path means.

    Parameters
    ----------
    model
        A transformers model, or any module.
    hook
        ``"layers.2"``, ``"layers.2.mlp"``, ``"layers.2.attn"`` or the path of any module; an integer means that layer.
        With ``.input`` behind it: what the module is given.
    layer
        Number of a block, from 0; instead of `hook`.
    site
        With `layer`: ``"resid"`` (after the block), ``"mlp"`` or ``"attn"`` (what that sub-layer adds).

    Raises
    ------
    ModelError
        There is no such layer or module; near matches are listed.
    ConfigError
        Neither or both of `hook` and `layer` are given, or `site` is unknown.
    """
    if isinstance(hook, Hook):
        return hook
    if isinstance(hook, int) and layer is None:
        hook, layer = None, hook
    _check_one_given(layer, hook)
    if site not in ("resid", *_SITES):
        raise ConfigError(f"`site` must be `resid`, `mlp` or `attn`; got {site!r}.")
    if isinstance(hook, str):
        return _by_path(model, hook)
    if hook is not None:
        raise ConfigError(f"`hook` must be the name or path of a module; got {hook!r}.")
    if isinstance(layer, bool) or not isinstance(layer, int):
        raise ConfigError(f"`layer` must be an integer, 0 for the first block; got {layer!r}.")
    return _in_block(model, layer, "" if site == "resid" else site)


def _check_one_given(layer: Any, hook: Any) -> None:
    if (hook is None) == (layer is None):
        raise ConfigError(f"exactly one of `layer` and `hook` must be given; got layer={layer!r} and hook={hook!r}.")


def find_hooks(
    model: nn.Module,
    layer: int | Sequence[int] | Literal["all"] | None,
    hook: str | Hook | Sequence[str | Hook] | None,
    *,
    site: Site = "resid",
) -> tuple[Hook, ...]:
    """Find the modules that one or several layer numbers, or names, mean; see `find_hook`. ``"all"``: every block.

    With both, `hook` is the name of a module in each of these layers: ``layers.{layer}.mlp.input``.

    Raises
    ------
    ModelError
        There is no such layer or module.
    ConfigError
        Neither or both of `layer` and `hook` are given, two of them are the same, or there are none.
    """
    is_pattern = isinstance(hook, str) and LAYER in hook
    if not is_pattern or layer is None:
        _check_one_given(layer, hook)
    if layer == "all":
        layer = range(len(blocks(model)[1]))
    if is_pattern and layer is not None:
        found = tuple(find_hook(model, str(hook).replace(LAYER, str(each))) for each in _as_list(layer))
    elif hook is None:
        found = tuple(find_hook(model, layer=each, site=site) for each in _as_list(layer))
    else:
        found = tuple(find_hook(model, each) for each in _as_list(hook))
    names = [each.name for each in found]
    if not names or len(set(names)) < len(names):
        raise ConfigError(
            f"hooks must differ, and there must be one at least; got {listed(names) if names else 'none'}."
        )
    return found


def _as_list(value: Any) -> list[Any]:
    return list(value) if isinstance(value, list | tuple | range) else [value]


def are_several(layer: object, hook: object) -> bool:
    """Return whether a list of layers or hooks is given, even of one, or all of them."""
    return layer == "all" or isinstance(hook if layer is None else layer, list | tuple | range)


def in_layer(name: str, hook: Hook) -> str:
    """Return the name of a module with the layer of a hook in place of ``{layer}``.

    Raises
    ------
    ConfigError
        The hook lies in no layer.

    >>> in_layer("layers.{layer}.mlp", Hook("layers.2.mlp.input", "model.layers.2.mlp", 2))
    'layers.2.mlp'
    """
    if LAYER in name and hook.layer is None:
        raise ConfigError(f"`{name}` names a module of each layer; `{hook.name}` lies in none. Name one module.")
    return name.replace(LAYER, str(hook.layer))


def _by_path(model: nn.Module, hook: str) -> Hook:
    modules = dict(model.named_modules())
    if hook.endswith(INPUT) and hook not in modules:
        return _input_of(model, hook.removesuffix(INPUT), modules)
    short = _SHORT.fullmatch(hook)
    if short and (hook not in modules or short[2] in _SITES):
        return _in_block(model, int(short[1]), short[2] or "")
    if not hook or hook not in modules:
        raise _unknown(model, hook, [path for path in modules if path])
    return _named(model, hook)


def _input_of(model: nn.Module, given: str, modules: Mapping[str, nn.Module]) -> Hook:
    """Return the hook on what a module is given, of its short name or its path."""
    short = _SHORT.fullmatch(given)
    path = given
    if short and (given not in modules or short[2] in _SITES):
        path = _path_in_block(model, int(short[1]), short[2] or "")
        if short[2] in _SITES and path.rsplit(".", 1)[-1] in _LAST_PART:
            raise ModelError(
                f"`{given}{INPUT}` must be what a whole sub-layer is given; `{path}` is the last part of one that is "
                "no module by itself. Name the module before it, or the first part, by its path."
            )
    elif not given or given not in modules:
        raise _unknown(model, given, [name for name in modules if name])
    layer, rest = _inside(model, path)
    if layer is None:
        return _checked(model, Hook(path + INPUT, path, None))
    site = next((site for site in _SITES if rest and rest == _site_path(blocks(model)[1][layer], site)), rest)
    site = rest if path.rsplit(".", 1)[-1] in _LAST_PART else site
    return _checked(model, Hook(_short_name(layer, site) + INPUT, path, layer))


def _inside(model: nn.Module, path: str) -> tuple[int | None, str]:
    """Return the number of the block that a path lies in and its path there; None and nothing outside of them."""
    try:
        root = blocks(model)[0]
    except ModelError:
        return None, ""
    found = re.fullmatch(re.escape(root) + r"\.(\d+)(\..+)?", path)
    return (None, "") if found is None else (int(found[1]), (found[2] or "").removeprefix("."))


def _named(model: nn.Module, path: str) -> Hook:
    """Return the hook of a path, under its short name where it lies in a block."""
    try:
        root, listing = blocks(model)
    except ModelError:
        return Hook(path, path, None)
    layer, rest = _inside(model, path)
    if layer is None:
        return _checked(model, Hook(path, path, None))
    site = next((site for site in _SITES if rest and rest == _site_path(listing[layer], site)), rest)
    keeps = _is_added(model, listing[layer], f"{root}.{layer}", site) if site in _SITES else True
    if not rest:
        keeps = broken_after(model, root, len(listing)) is None
    # a short name promises what it stands for; where the module gives something else, its path is its name
    return _checked(model, Hook(_short_name(layer, site) if keeps else path, path, layer))


def _short_name(layer: int, rest: str) -> str:
    return f"layers.{layer}.{rest}" if rest else f"layers.{layer}"


def _path_in_block(model: nn.Module, layer: int, rest: str) -> str:
    """Return the path of a block, or of a part of it: ``mlp``, ``attn`` or a path inside the block."""
    root, listing = blocks(model)
    if not 0 <= layer < len(listing):
        raise MissingModelError(
            f"`layer` must lie between 0 and {len(listing) - 1} for a model of {len(listing)} blocks; got {layer}. "
            "Layers are counted from 0 at the input."
        )
    place = f"{root}.{layer}"
    path = f"{place}.{_part_of(listing[layer], layer, rest)}" if rest else place
    modules = [name for name, _ in model.named_modules() if name]
    if path not in modules:
        raise _unknown(model, path, modules, _short_name(layer, rest))
    return path


def _in_block(model: nn.Module, layer: int, rest: str) -> Hook:
    """Return the hook of a block, or of a part of it."""
    path = _path_in_block(model, layer, rest)
    root, listing = blocks(model)
    place = f"{root}.{layer}"
    if not rest:
        _check_stream(model, root, len(listing))
        return _checked(model, Hook(_short_name(layer, ""), path, layer))
    if rest in _SITES and not _is_added(model, listing[layer], place, rest):
        raise ModelError(_not_added(model, _short_name(layer, rest), place, path))
    return _checked(model, Hook(_short_name(layer, rest), path, layer))


def _part_of(block: nn.Module, layer: int, rest: str) -> str:
    """Return the path inside a block of ``mlp``, ``attn`` or a path."""
    if rest not in _SITES:
        return rest
    found = _site_path(block, rest)
    if found is None:
        raise ModelError(
            f"block {layer} must have a part that is its `{rest}`; its parts are "
            f"{listed((name for name, _ in block.named_children()), 12)}. Name the module by its path instead."
        )
    return found


def _check_stream(model: nn.Module, root: str, n_blocks: int) -> None:
    broken = broken_after(model, root, n_blocks)
    if broken is not None:
        raise ModelError(
            f"the residual stream of `{type(model).__name__}` must run through its blocks; what `{root}.{broken}` "
            f"gives is nothing that `{root}.{broken + 1}` takes, so that no module is a whole block. Name a module by "
            "its path."
        )


def _is_added(model: nn.Module, block: nn.Module, path: str, site: str) -> bool:
    """Return whether the part of a block that looks like a sub-layer gives what is added to the residual stream."""
    parts = [found for found in (_site_path(block, each) for each in _SITES) if found is not None]
    added = added_parts(model, path, parts)
    return added is not None and _site_path(block, site) in added


def _not_added(model: nn.Module, name: str, block: str, path: str) -> str:
    inner = [each for each, _ in model.get_submodule(block).named_modules() if each]
    added = sorted(added_parts(model, block, inner, together=False) or (), key=lambda each: (each.count("."), each))
    instead = f"What is added there comes from {listed((f'{block}.{each}' for each in added), 4)}. " if added else ""
    itself = f"; `{path}` is taken as it is" if path != name else ""
    return (
        f"`{name}` must be what a sub-layer adds to the residual stream; the output of `{path}` is not: it is scaled, "
        f"normalized or summed before it is added, or that cannot be measured. {instead}"
        f"Name a module by its path{itself}."
    )


def _checked(model: nn.Module, hook: Hook) -> Hook:
    """Refuse a module whose output in one pass is not one row per token."""
    if "lsh" in (getattr(getattr(model, "config", None), "attn_layers", None) or ()):  # only where texts are longer
        raise ModelError(
            f"the rows of a text must depend on it alone; `{type(model).__name__}` sorts tokens by random hashes. Take "
            "another model, or one with local attention only (`attn_layers`)."
        )
    facts = facts_of(model)
    if facts is None:
        return hook
    if not facts.repeats:
        raise ModelError(
            f"two identical calls must give the same rows; those of `{type(model).__name__}` differ, because it draws "
            "random numbers as it runs. Switch that off in its config, or take another model."
        )
    n_calls = facts.calls.get(hook.path, 0)
    if n_calls > 1:
        raise ModelError(
            f"the module of `{hook.name}` must run once in a forward pass; `{hook.path}` runs {n_calls} times (its "
            "weights are shared), so that its rows are not those of one layer. Name another module."
        )
    if facts.is_text and not hook.is_input and facts.shapes.get(hook.path, ())[:2] == (TOKENS, BATCH):
        raise ModelError(
            f"the output of `{hook.name}` must be hidden states of shape (batch, sequence, width); `{hook.path}` puts "
            "the sequence before the batch. Name another module."
        )
    return hook


def _site_path(block: nn.Module, site: str) -> str | None:
    names = {name for name, _ in block.named_modules()}
    return next((path for path in _SITES[site] if path in names), None)


def _unknown(model: nn.Module, path: str, modules: list[str], given: str | None = None) -> ModelError:
    root, listing = blocks(model)
    same_block = re.match(re.escape(root) + r"\.\d+\.", path)
    near = [name for name in modules if name.startswith(same_block[0])] if same_block else modules
    advice = did_you_mean(path, near or modules)
    return MissingModelError(
        f"the hook `{given or path}` must be a module of the model; there is none of that name. {advice} Short forms: "
        f"`layers.0` to `layers.{len(listing) - 1}`, and `.mlp` or `.attn` after them; `.input` behind it for what a "
        "module is given."
    )


class _Stop(BaseException):
    """Ends a forward pass once every hook has its value; not an Exception, so that no model catches it by accident."""


def activations(
    model: nn.Module, hooks: Sequence[Hook], inputs: Mapping[str, Any], *, stop: bool = True
) -> list[Tensor]:
    """Return the outputs (or inputs) of several modules in one forward pass.

    Parameters
    ----------
    model
        The model.
    hooks
        Where to look.
    inputs
        Keyword arguments of the forward.
    stop
        End the pass as soon as all hooks have been reached; the rest of the model does not run.

    Returns
    -------
    list of Tensor
        ``[batch, sequence, d]`` per hook, detached, in the order of `hooks`.

    Raises
    ------
    ModelError
        A module is not reached, or its output is no tensor of hidden states.
    """
    found: dict[int, Tensor] = {}
    batch, length = _input_shape(inputs)
    thread = threading.get_ident()  # a pass of another thread over the same model is none of ours

    def keep(index: int) -> Callable[[Tensor], None]:
        def note(hidden: Tensor) -> None:
            if threading.get_ident() != thread:
                return
            found[index] = hidden.detach()
            if stop and len(found) == len(hooks):
                raise _Stop

        return note

    handles = [listen(model, hook, keep(index)) for index, hook in enumerate(hooks)]
    try:
        with torch.no_grad(), kernels.fast_linears():
            model(**inputs)
    except _Stop:
        pass
    except (SaekitError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # whatever a model raises about inputs that it does not take
        raise ModelError(_not_taken(model, inputs, error)) from error
    finally:
        for handle in handles:
            handle.remove()
    if len(found) < len(hooks):
        unseen = [hook.name for index, hook in enumerate(hooks) if index not in found]
        raise ModelError(
            f"the forward pass must reach every hook; it does not reach {listed(unseen)}. Name another module."
        )
    return [_as_hidden(model, found[index], batch, length, hook) for index, hook in enumerate(hooks)]


def _not_taken(model: nn.Module, inputs: Mapping[str, Any], error: Exception) -> str:
    message = (" ".join(str(error).split()) or type(error).__name__)[:300].rstrip(".")
    return (
        f"`{type(model).__name__}` must take {listed(inputs)} and nothing else; its forward pass fails: {message}. "
        "What it asks for can be set on the `.model` of what `load_model` returns, which is then given instead of its "
        "name; a model that cannot do without other inputs is not read."
    )


def _input_shape(inputs: Mapping[str, Any]) -> tuple[int, int | None]:
    """Batch size, and the number of tokens where the input is tokens."""
    first = inputs.get("input_ids")
    if first is not None:
        return first.shape[0], first.shape[1]
    first = next(value for value in inputs.values() if isinstance(value, Tensor))
    return first.shape[0], None


def listen(model: nn.Module, hook: Hook, note: Callable[[Tensor], None]) -> RemovableHandle:
    """Call `note` with the hidden states at a hook in every forward pass, until the handle is removed."""
    module = model.get_submodule(hook.path)
    if hook.is_input:
        return module.register_forward_pre_hook(
            lambda _, args, kwargs: note(given_to(args, kwargs, hook)), with_kwargs=True
        )
    return module.register_forward_hook(lambda _, args, output: note(hidden_of(output, hook)))


def given_to(args: tuple[Any, ...], kwargs: Mapping[str, Any], hook: Hook) -> Tensor:
    """Return the hidden states among the arguments of a module: the first tensor."""
    given = next((value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)), None)
    if given is None:
        raise ModelError(f"the arguments of `{hook.path}` must hold a tensor; they hold none. Name another module.")
    return given


def hidden_of(output: Any, hook: Hook) -> Tensor:
    """Return the hidden states in what a module returned: a tensor, the first of a tuple, a field of a ModelOutput."""
    if isinstance(output, Tensor):
        return output
    if isinstance(output, Mapping):
        for key in ("last_hidden_state", "hidden_states"):
            if isinstance(output.get(key), Tensor):
                return output[key]
        values = list(output.values())
    else:
        values = list(output) if isinstance(output, tuple | list) else []
    if values and isinstance(values[0], Tensor):
        return values[0]
    raise ModelError(
        f"the output of `{hook.name}` must be a tensor, or start with one; it is {type(output).__name__}. "
        "Name another module."
    )


def _as_hidden(model: nn.Module, x: Tensor, batch: int, length: int | None, hook: Hook) -> Tensor:
    """`[batch, sequence, d]`; some modules (mixtures of experts) flatten the first two axes."""
    if length is not None:
        x = _of_tokens(model, x, batch, length)
    fits = x.ndim == 3 and x.shape[0] == batch and x.shape[1] == (length or x.shape[1]) and x.is_floating_point()
    if not fits:
        raise ModelError(
            f"the output of `{hook.name}` must be hidden states of shape (batch, sequence, width); got "
            f"{tuple(x.shape)} {x.dtype} for a batch of {batch}. Name another module."
        )
    return x


def _of_tokens(model: nn.Module, x: Tensor, batch: int, length: int) -> Tensor:
    """Return the hidden states of the tokens of the input, where they are flattened or among others."""
    if x.ndim == 2 and x.shape[0] == batch * length:
        return x.reshape(batch, length, -1)
    start = first_token(model) if x.ndim == 3 and x.shape[1] > length else None
    return x if start is None else x[:, start : start + length]


def first_token(model: nn.Module) -> int | None:
    """Return where the tokens of the input begin in hidden states that hold more: padding to whole windows, a prompt.

    None where it cannot be measured.
    """
    around = other_tokens(model)
    return None if around is None or around[0] < 0 else around[0]


def other_tokens(model: nn.Module) -> tuple[int, int] | None:
    """Return how many hidden states come before and behind those of the input; None where it cannot be measured."""
    try:
        return tokens_around(model, f"{blocks(model)[0]}.0")
    except ModelError:
        return None
