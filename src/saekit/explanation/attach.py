"""Run a model with an SAE attached: codes are edited, and the difference is added to the hidden states."""

from __future__ import annotations

import inspect
import os
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import ConfigError, ShapeError, listed
from ..models.hooks import Hook, find_hook, other_tokens
from ..models.intervene import splice
from ..models.language import LanguageModel
from ..models.loading import load_model
from ..models.pretrained import PretrainedModel
from ..models.vision import VisionModel
from ..places import warn, warnings_on
from ..provenance import place_of
from ..sae.model import SAE
from ..sae.naming import Given, as_sae, name_of
from ..settings import suggest_keywords
from .edits import AblateTop, Edit, Edits, checked_edits, difference_of, written_by
from .settings import AT


@dataclass(frozen=True, eq=False)
class Attached:
    """A model while an SAE is attached to it."""

    model: nn.Module
    """The model: call it, or its ``generate``."""
    hook: Hook
    """Where the SAE is attached."""
    tokenizer: Any = None
    """The model's tokenizer, where `attach` was given a language model or its name."""
    change: list[float] = field(default_factory=list)
    """Mean ratio of the norms, edit to hidden state, at the tokens edited: one number per forward pass that had any."""


@contextmanager
@suggest_keywords
def attach(
    model: str | os.PathLike[str] | PretrainedModel | nn.Module,
    sae: Given,
    edits: Edits | None = None,
    *,
    at: str | Tensor = "all",
    layer: int | None = None,
    hook: str | None = None,
    keep_error: bool = True,
    special: bool = False,
) -> Iterator[Attached]:
    """Attach an SAE to a model and edit its codes in every forward pass inside the block.

    With codes z and edited codes z', hidden states become ``x + sum_j (z'_j - z_j) W_dec[j]`` (the SAE's scaling
    undone), so that what the SAE does not explain stays, and edits that change no code change no bit. The rule never
    chooses again: an edit of one latent leaves the others as they are. Attachments nest, at one hook or at several. A
    transcoder's codes come from the hidden states that it reads, and the sum is added to those that it predicts. Of
    several processes each changes its own model alone.

    Parameters
    ----------
    model
        What `load_model` takes or returns, or a transformers model. Of an encoder-decoder, the encoder is attached to
        unless `hook` lies in the decoder.
    sae
        An SAE, or the address of one.
    edits
        ``{latent: edit}``, an edit being a number (sets the code), a text (``"+2"`` adds, ``"*2"`` scales, ``"0..3"``
        clamps, ``"ablate"``) or an `Edit`; or ``AblateTop(m)``. None: nothing is edited.
    at
        Tokens to edit: ``"all"``; ``"prompt"``, those given to the model; ``"generated"``, those that ``generate``, or
        calls with a cache, append; ``"last"``, the last token of each prompt; or a bool mask ``[batch, sequence]`` of
        the prompt. Positions are absolute: generation with and without a cache gives the same.
    layer, hook
        Where; by default where the SAE's provenance says. Of a transcoder where it reads.
    keep_error
        False: hidden states become the reconstruction from the edited codes instead, also where nothing is edited.
    special
        Whether special tokens of the tokenizer (BOS, CLS, …), or what a vision model puts around patches, are edited as
        well; SAEs are rarely trained on them. Padding never is.

    Yields
    ------
    Attached
        The model, the hook, and how large the edits were.

    Raises
    ------
    ConfigError
        No such latent, no hook, a transcoder that does not say what it predicts, `at` unknown; or within the block:
        generation by beam search or with an assistant
        model, whose tokens have no fixed positions.
    ShapeError
        Another width than the hook's, or a mask of another shape.

    Warns
    -----
    PlaceWarning
        The SAE was trained on another model or hook.

    Examples
    --------
    ::

        lm = sk.load_model("builtin")
        inputs = lm.tokenizer("Once upon a time", return_tensors="pt")
        with sk.attach(lm, sae, {17: 8.0}):
            lm.model.generate(**inputs, max_new_tokens=40)
        with sk.attach(lm, sae, {17: "ablate", 4: "*2"}, at="generated"):
            ...
    """
    value = as_sae(sae)
    given = load_model(model) if isinstance(model, str | os.PathLike) else model
    root = given.model if isinstance(given, PretrainedModel) else given
    if not isinstance(root, nn.Module):
        raise ConfigError(f"attach: `model` must be a model or its name; got {type(model).__name__}.")
    place = place_of(value, layer=layer, hook=hook, where="attach")
    with attached(given, value, edits or {}, at=at, hook=place, keep_error=keep_error, special=special) as found:
        _warn_about(given, value, place)
        yield found


@contextmanager
def attached(
    given: PretrainedModel | nn.Module,
    sae: SAE,
    edits: Edits,
    *,
    at: str | Tensor,
    hook: str,
    keep_error: bool = True,
    special: bool = False,
) -> Iterator[Attached]:
    """Attach as `attach` does, without a word about where the SAE belongs: for results, which state it themselves."""
    out = written_at(sae, "attach")
    root = given.model if isinstance(given, PretrainedModel) else given
    changed = checked_edits(sae, edits)
    reader, read = _find(root, hook)
    beside, target = (reader, read) if out is None else _find(root, out)
    if beside is not reader:
        raise ConfigError(
            f"attach: a transcoder must read and write in the same part of the model; `{hook}` lies in another than "
            f"`{out}`, which sees other tokens."
        )
    positions = _Positions.of(given, reader, at, special)
    found = Attached(root, target, getattr(given, "tokenizer", None))
    edited = _edited(sae, changed, keep_error, found.change, target.name)
    function: Callable[..., Tensor] = edited if out is not None else lambda x: edited(x, x)
    before = reader.register_forward_pre_hook(positions.start_of_pass, with_kwargs=True)
    try:
        with (
            splice(reader, target, function, mask=positions.edited, source=None if out is None else read),
            _generating(root, positions),
        ):
            yield found
    finally:
        before.remove()


def written_at(sae: SAE, where: str) -> str | None:
    """Return the hook whose hidden states a transcoder predicts; None for an SAE.

    Raises
    ------
    ConfigError
        The provenance of a transcoder does not say; `where` is the name of the calling function.
    """
    out = sae.provenance.get("hook_out")
    if sae.is_transcoder and out is None:
        raise ConfigError(
            f"{where}: a transcoder must say which module's output it predicts; the provenance of this one does not. "
            'Add it: sae.replace(provenance={**sae.provenance, "hook_out": "layers.2.mlp"}).'
        )
    return str(out) if sae.is_transcoder else None


def check_written(sae: SAE, width: int, hook: str) -> None:
    """Refuse to write what a transcoder predicts into rows of another width; the rows of an SAE are checked when read.

    Raises
    ------
    ShapeError
        They have another width.
    """
    if sae.is_transcoder and width != sae.d_out:
        raise ShapeError(
            f"a transcoder must write rows of the width of `{hook}`, {width}; this one writes {sae.d_out}. Does its "
            "provenance name the module whose output it predicts (`hook_out`)?"
        )


def _find(root: nn.Module, place: str) -> tuple[nn.Module, Hook]:
    """Return the module that reads the tokens which the hook sees, and the hook in it."""
    config = getattr(root, "config", None)
    if not getattr(config, "is_encoder_decoder", False) or not hasattr(root, "get_encoder"):
        return root, find_hook(root, place)
    names = {id(module): name for name, module in root.named_modules()}
    decoder: Any = root.get_decoder()  # type: ignore[operator]
    prefix = names.get(id(decoder), "decoder") + "."
    if place.startswith(prefix):
        return decoder, find_hook(decoder, place.removeprefix(prefix))
    encoder: Any = root.get_encoder()  # type: ignore[operator]
    return encoder, find_hook(encoder, place.removeprefix(names.get(id(encoder), "encoder") + "."))


def _warn_about(given: PretrainedModel | nn.Module, sae: SAE, place: str) -> None:
    root = given.model if isinstance(given, PretrainedModel) else given
    seen: dict[str, Any] = {"hook": _find(root, place)[1].name}
    if isinstance(given, PretrainedModel):
        seen |= given.info
    warn(warnings_on([(name_of(sae), sae)], seen, what="the model given makes"), stacklevel=5)


def _edited(
    sae: SAE, edits: Mapping[int, Edit] | AblateTop, keep_error: bool, change: list[float], hook: str
) -> Callable[[Tensor, Tensor], Tensor]:
    """Return the function from the hidden states that are read and those that are changed, ``[n, d]``, to the latter.

    They are the same but for a transcoder.
    """
    if keep_error and not edits:
        return lambda read, x: x

    def function(read: Tensor, x: Tensor) -> Tensor:
        check_written(sae, x.shape[1], hook)
        rows = read.detach().to(sae.device, sae.dtype)
        codes = sae.encode(rows)
        difference = difference_of(codes, edits)
        touched = difference.offsets.diff().nonzero().squeeze(1).to(x.device)
        added = written_by(sae, difference, rows).to(x.device)
        if len(touched):
            norms = x.detach()[touched].to(rows.dtype).norm(dim=1).clamp(min=torch.finfo(rows.dtype).tiny)
            change.append(float((added[touched].norm(dim=1) / norms).mean()))
        if not keep_error:
            return sae.decode(codes, rows).to(x.device) + added
        # Only rows that change are written: adding zeros would turn -0.0 into 0.0.
        return x.index_copy(0, touched, (x[touched].to(added) + added[touched]).to(x))

    return function


class _Positions:
    """Which tokens of a forward pass are edited, by their absolute columns in the padded batch.

    A pass inside ``generate`` continues the one before when it brings no more columns than have been seen (a cache
    holds the others), and begins again from column 0 when it brings more (no cache). Outside, the cache says.
    """

    def __init__(self, at: str | Tensor, special_ids: Tensor | None, around: tuple[int, int] | None) -> None:
        self.at, self.special_ids, self.around = at, special_ids, around
        self.thread = threading.get_ident()
        self.in_generate = False
        self.seen = self.prompt = self.start = 0
        self.last: Tensor | None = None
        self.ids: Tensor | None = None
        self.real: Tensor | None = None

    @classmethod
    def of(cls, given: PretrainedModel | nn.Module, reader: nn.Module, at: str | Tensor, special: bool) -> _Positions:
        """Return the positions that `at` and `special` mean for a model.

        Raises
        ------
        ConfigError
            `at` is unknown, or means tokens that the model does not have.
        """
        looks = isinstance(given, VisionModel) or getattr(reader, "main_input_name", "") == "pixel_values"
        _check_at(at, looks)
        ids = None if special or looks else _special_ids(given)
        return cls(at, ids, other_tokens(reader) if looks and not special else None)

    def start_of_pass(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Note what a forward pass is given, before it runs."""
        if threading.get_ident() != self.thread:
            return
        self.ids, tokens = _tokens(args, kwargs)
        if tokens is None:  # images
            self.real = None
            return
        count = tokens.shape[1]
        begins = not self.in_generate or not self.seen
        self.start = _cached(kwargs) if begins else 0 if count > self.seen else self.seen
        self.seen = self.start + count
        self.real = _real(_argument(module, args, kwargs, "attention_mask"), self.start, count)
        if begins and (self.in_generate or self.start == 0):
            self.prompt = self.seen
            self.last = _last(self.real, self.start, count, tokens)

    def edited(self, hidden: Tensor) -> Tensor:
        """Return which tokens of the hidden states are edited, bool ``[batch, sequence]``."""
        if self.ids is None and self.special_ids is not None:
            raise ConfigError(
                "attach: special tokens can be left out only where the model is given `input_ids`; it is given "
                "embeddings. Set special=True to edit all of them, or give the ids."
            )
        if self.ids is None and self.real is None:
            return self._of_images(hidden)
        tokens = self.ids if self.ids is not None else hidden[..., 0]
        batch, count = tokens.shape[:2]
        column = torch.arange(self.start, self.start + count, device=hidden.device)
        kept = self._chosen(column, batch)
        if self.real is not None:
            kept = kept & self.real.to(kept.device)
        if self.ids is not None and self.special_ids is not None:
            kept = kept & ~torch.isin(self.ids.to(kept.device), self.special_ids.to(kept.device))
        return kept

    def _chosen(self, column: Tensor, batch: int) -> Tensor:
        if isinstance(self.at, Tensor):
            return _of_mask(self.at.to(column.device), column, batch)
        if self.at == "last":
            last = torch.zeros(batch, dtype=torch.int64) if self.last is None else self.last
            return column[None] == last.to(column.device)[:, None]
        if self.at == "all":
            chosen = torch.ones_like(column, dtype=torch.bool)
        else:
            chosen = (column < self.prompt) == (self.at == "prompt")
        return chosen[None].expand(batch, len(column))

    def _of_images(self, hidden: Tensor) -> Tensor:
        kept = torch.ones(hidden.shape[:-1], dtype=torch.bool, device=hidden.device)
        if isinstance(self.at, Tensor):
            if self.at.shape != kept.shape:
                raise ShapeError(
                    f"attach: the mask `at` must be {tuple(kept.shape)} here, one entry per token of the images; got "
                    f"{tuple(self.at.shape)}."
                )
            kept = self.at.to(kept.device)
        if self.around is not None and hidden.ndim == 3:
            kept = kept.clone()
            kept[:, : self.around[0]] = False
            kept[:, hidden.shape[1] - self.around[1] :] = False
        return kept


def _check_at(at: str | Tensor, looks: bool) -> None:
    if isinstance(at, Tensor):
        if at.dtype != torch.bool or at.ndim != 2:
            raise ShapeError(f"attach: a mask `at` must be bool [batch, sequence]; got {at.dtype} {tuple(at.shape)}.")
        return
    if at not in AT:
        raise ConfigError(f"attach: `at` must be {listed(AT)}, or a bool mask; got {at!r}.")
    if looks and at != "all":
        raise ConfigError(f'attach: images have no prompt and no generated tokens; `at` must be "all", got {at!r}.')


def _special_ids(given: PretrainedModel | nn.Module) -> Tensor:
    """Return the ids of the tokenizer's special tokens; of a model without its tokenizer, those that its config names.

    The token for unknown words stands for text, and is none of them.
    """
    if isinstance(given, LanguageModel):
        tokenizer = given.tokenizer
        ids = set(tokenizer.all_special_ids) - {tokenizer.unk_token_id}
    else:
        config = getattr(given, "config", None)
        named = [getattr(config, f"{name}_token_id", None) for name in ("bos", "eos", "pad", "cls", "sep")]
        listed = [each for some in named for each in (some if isinstance(some, list | tuple) else [some])]
        ids = {each for each in listed if isinstance(each, int)}
    return torch.tensor(sorted(ids), dtype=torch.int64)


def _tokens(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[Tensor | None, Tensor | None]:
    """Return the token ids that a pass is given, and what has a column per token: the ids, or embeddings."""
    ids = kwargs.get("input_ids", args[0] if args else None)
    if isinstance(ids, Tensor) and not ids.is_floating_point():
        return ids, ids
    return None, kwargs.get("inputs_embeds")


def _cached(kwargs: Mapping[str, Any]) -> int:
    """Return how many tokens a cache that a pass is given holds already."""
    for name in ("past_key_values", "cache_params"):
        cache: Any = kwargs.get(name)
        if hasattr(cache, "get_seq_length"):
            with suppress(ValueError):  # a recurrent model's cache does not count its tokens
                return int(cache.get_seq_length())
            if cache.has_previous_state():
                raise ConfigError(
                    f"attach: the cache must know how many tokens it holds; `{type(cache).__name__}` of a recurrent "
                    "model does not. Use generate(), or give all tokens at once."
                )
    position = kwargs.get("cache_position")
    return int(position[0]) if isinstance(position, Tensor) and len(position) else 0


def _argument(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], name: str) -> Any:
    """Return an argument of a pass, given by name or by position; None where it is not given."""
    names = list(inspect.signature(module.forward).parameters)
    at = names.index(name) if name in names else len(args)
    return kwargs[name] if name in kwargs else args[at] if at < len(args) else None


def _real(mask: Any, start: int, count: int) -> Tensor | None:
    """Return which of the columns of a pass are no padding; None where there is no mask, or a shorter one.

    Raises
    ------
    ShapeError
        The mask is of another kind: it may hide padding that would be edited.
    """
    if mask is None:
        return None
    if not isinstance(mask, Tensor) or mask.ndim != 2:
        raise ShapeError(
            "attach: `attention_mask` must be a matrix [batch, sequence], 1 where a token is no padding; got "
            f"{f'one of shape {tuple(mask.shape)}' if isinstance(mask, Tensor) else type(mask).__name__}. Give the "
            "tokenizer's, and leave a static cache (`cache_implementation`) out."
        )
    if mask.shape[1] == count:
        return mask > 0
    return mask[:, start : start + count] > 0 if mask.shape[1] >= start + count else None


def _last(real: Tensor | None, start: int, count: int, tokens: Tensor) -> Tensor:
    """Return the column of the last token of each prompt."""
    if real is None:
        return torch.full((tokens.shape[0],), start + count - 1, dtype=torch.int64)
    column = torch.arange(start, start + count, device=real.device)
    return torch.where(real, column, -1).amax(1)


def _of_mask(mask: Tensor, column: Tensor, batch: int) -> Tensor:
    """Return a mask of prompts at some columns; columns behind it are not edited. Rows repeat as generate repeats."""
    if batch % len(mask):
        raise ShapeError(f"attach: the mask `at` must have a row per text, {batch} here; got {len(mask)}.")
    mask = mask.repeat_interleave(batch // len(mask), 0)
    within = column < mask.shape[1]
    return mask[:, column.clamp(max=mask.shape[1] - 1)] & within


@contextmanager
def _generating(root: nn.Module, positions: _Positions) -> Iterator[None]:
    """Let `positions` know when a generation begins and ends; refuse those whose tokens move."""
    original = getattr(root, "generate", None)
    if original is None:
        yield
        return

    def generate(*args: Any, **kwargs: Any) -> Any:
        if threading.get_ident() != positions.thread:
            return original(*args, **kwargs)
        _check_generation(root, args, kwargs)
        positions.in_generate, positions.seen, positions.prompt = True, 0, 0
        try:
            return original(*args, **kwargs)
        finally:
            positions.in_generate = False

    had = root.__dict__.get("generate")
    root.generate = generate  # type: ignore[assignment]
    try:
        yield
    finally:
        if had is None:
            del root.generate
        else:
            root.generate = had  # an attachment around this one


def _check_generation(root: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
    config = kwargs.get("generation_config") or getattr(root, "generation_config", None)

    def setting(name: str) -> Any:
        return kwargs.get(name) if kwargs.get(name) is not None else getattr(config, name, None)

    refused = {
        "num_beams": (setting("num_beams") or 1) > 1,
        "assistant_model": kwargs.get("assistant_model") is not None,
        "prompt_lookup_num_tokens": bool(setting("prompt_lookup_num_tokens")),
        "prefill_chunk_size": bool(setting("prefill_chunk_size")),
    }
    found = [name for name, is_set in refused.items() if is_set]
    if found:
        raise ConfigError(
            f"attach: generation must be greedy or by sampling, token after token; with {listed(found)} tokens have no "
            "fixed positions. Leave it out."
        )
