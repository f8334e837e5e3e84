"""What all readers of foreign formats share: orientation settled by shapes, facts checked, the place translated."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import sqrt
from typing import Any, Literal

import torch
from torch import Tensor

from ...errors import ConfigError, FormatError, listed
from ...sae.model import SAE
from ...sae.rules import JumpReLURule, ReLURule, Rule, TopKRule
from ...settings import check_choice, suggest_keywords
from ..hollow import Hollow

Layout = Literal["latents_first", "width_first"]
LAYOUTS = ("latents_first", "width_first")


@suggest_keywords
@dataclass(frozen=True, kw_only=True)
class Stated:
    """What the caller says about a file, where the file itself does not."""

    format: str | None = None
    """Name of the format; None to recognize it."""
    orientation: str | None = None
    """``latents_first`` or ``width_first``: the layout of ``W_enc`` in a file whose shapes leave it open."""
    k: int | None = None
    """Latents kept per row, for files of TopK SAEs that do not say it."""

    def __post_init__(self) -> None:
        if self.orientation is not None:
            check_choice("SAE.load", LAYOUTS, orientation=self.orientation)


def need(tensors: Mapping[str, Tensor], names: tuple[str, ...], what: str) -> None:
    """Refuse tensors of which one is missing.

    Raises
    ------
    FormatError
        Names what is missing and what is there.
    """
    missing = [name for name in names if name not in tensors]
    if missing:
        raise FormatError(f"{what} must hold the tensors {listed(missing)}; it holds {listed(sorted(tensors), 12)}.")


def only(tensors: Mapping[str, Tensor], names: tuple[str, ...], what: str) -> None:
    """Refuse tensors that nobody would read: they may change what the SAE computes.

    Raises
    ------
    FormatError
        Names the tensors that are not part of the format.
    """
    unknown = [name for name in tensors if name not in names]
    if unknown:
        raise FormatError(
            f"{what} holds {listed(unknown)}, which saekit does not know; it could change the codes, so the file is "
            "not read. Is it a training checkpoint, or of a newer version?"
        )


def latents_first(
    matrix: Tensor,
    name: str,
    *,
    n_latents: int,
    width: int,
    documented: Layout | None,
    stated: Stated,
) -> Tensor:
    """Return a weight matrix with the latent axis first: ``[n_latents, width]``.

    The lengths of the biases decide. Where they are equal both layouts fit: then what the format documents, then what
    the caller states.

    Parameters
    ----------
    matrix, name
        The tensor and what messages call it.
    n_latents, width
        Lengths of the encoder bias and of the rows on the other side.
    documented
        Layout that the format documents for this tensor; None where files of both kinds exist.
    stated
        What the caller says; decides for a square matrix without a documented layout. ``orientation`` there is that
        of the encoder; a decoder is expected the same way round.

    Raises
    ------
    FormatError
        The matrix fits neither way round.
    ConfigError
        It is square and nothing says which axis is which.
    """
    shape = tuple(matrix.shape)
    if shape not in ((n_latents, width), (width, n_latents)):
        raise FormatError(
            f"`{name}` must be ({n_latents}, {width}) or its transpose, as the biases have {n_latents} and {width} "
            f"entries; got {shape}."
        )
    if n_latents != width:
        return matrix if shape == (n_latents, width) else matrix.T
    layout = documented or stated.orientation
    if layout is None:
        raise ConfigError(
            f"`{name}` is square, ({n_latents}, {width}), and nothing in the file says which axis is the latents. "
            'State it: SAE.load(…, orientation="latents_first") for [n_latents, d_in], or orientation="width_first" '
            "(saekit convert SRC DST --orientation latents_first)."
        )
    return matrix if layout == "latents_first" else matrix.T


def build(W_enc: Tensor, b_enc: Tensor, W_dec: Tensor, b_dec: Tensor, rule: Rule, **fields: Any) -> SAE:
    """Return the SAE of canonical tensors, contiguous and in one floating type.

    Raises
    ------
    FormatError
        A number is NaN or infinite, or a tensor is not of a floating type.
    """
    given = {"W_enc": W_enc, "b_enc": b_enc, "W_dec": W_dec, "b_dec": b_dec}
    given |= {name: fields[name] for name in ("b_pre", "W_skip") if fields.get(name) is not None}
    dtype = W_enc.dtype if W_enc.dtype.is_floating_point else torch.float32
    if (k := rule.settings().get("k", 1)) > len(W_enc):
        raise FormatError(
            f"k={k} must be at most the number of latents, and the tensors have {len(W_enc)}. The configuration and "
            "the tensors are of different SAEs, or k was stated wrongly."
        )
    _check_numbers({**given, **{f"rule.{key}": t for key, t in rule.tensors().items()}})
    fields |= {name: t.to(dtype).contiguous() for name, t in given.items()}
    return SAE(rule=_cast(rule, dtype), **fields)


def _check_numbers(tensors: Mapping[str, Tensor]) -> None:
    """Refuse tensors, but for the groups of a rule, that are of no floating type, and numbers that are not finite."""
    for name, tensor in tensors.items():
        if not (tensor.dtype.is_floating_point or name == "rule.group"):
            raise FormatError(f"`{name}` must hold floating-point numbers; it holds {tensor.dtype}.")
        if not all(bool(block.isfinite().all()) for block in tensor.split(4096)):
            bad = int((~tensor.isfinite()).sum())
            raise FormatError(f"`{name}` holds {bad:,} numbers that are NaN or infinite. The file is damaged.")


def _cast(rule: Rule, dtype: torch.dtype) -> Rule:
    if isinstance(rule, JumpReLURule):
        return JumpReLURule(rule.threshold.to(dtype).contiguous())
    if isinstance(rule, TopKRule):
        rank, threshold = (None if t is None else t.to(dtype).contiguous() for t in (rule.rank, rule.threshold))
        return replace(rule, rank=rank, threshold=threshold)
    return rule


def threshold_rule(threshold: Tensor, n_latents: int) -> Rule:
    """Return JumpReLU with a threshold for each latent, or one number for all; ReLU when nothing is cut off.

    Raises
    ------
    FormatError
        Neither one number nor one per latent.
    """
    if threshold.numel() not in (1, n_latents):
        raise FormatError(f"`threshold` must hold 1 or {n_latents} numbers; it has shape {tuple(threshold.shape)}.")
    flat = threshold.detach().reshape(-1)
    if not flat.dtype.is_floating_point:
        flat = flat.float()
    if not isinstance(flat, Hollow) and bool((flat <= 0).all()):
        return ReLURule()  # relu(pre) where pre > threshold, with a threshold below 0
    return JumpReLURule(flat.expand(n_latents).clone() if flat.numel() == 1 else flat)


def topk_rule(k: Any, stated: Stated, *, what: str, sign: str = "positive") -> TopKRule:
    """Return TopK with the k of the file, or the stated one where the file has none.

    Raises
    ------
    FormatError, ConfigError
        `k` is not a whole number of at least 1, or nothing says it.
    """
    value = k if k is not None else stated.k
    if value is None:
        raise ConfigError(
            f"{what}: k is not in the file. State it: SAE.load(…, k=64), or saekit convert SRC DST --k 64."
        )
    whole = _whole(value)
    if whole is None or whole < 1:
        raise FormatError(f"{what}: `k` must be a whole number of at least 1; got {k!r}.")
    return TopKRule(whole, sign=sign)


def _whole(value: Any) -> int | None:
    """Return a whole number that is written as a number, a tensor of one number, or a text; None of anything else."""
    if isinstance(value, Tensor) and value.numel() == 1:
        value = value.item()
    if (isinstance(value, float) and value.is_integer()) or (isinstance(value, str) and value.isdecimal()):
        value = int(value)
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def mapping(config: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    """Return the object under a key of a configuration; an empty one where there is none."""
    value = config.get(key)
    return value if isinstance(value, Mapping) else {}


def agree(what: str, **pairs: tuple[Any, int]) -> None:
    """Refuse a configuration whose numbers are not those of the tensors: ``agree("cfg.json", d_in=(64, 32))``.

    Raises
    ------
    FormatError
        A number that is stated is another than the tensors'.
    """
    for name, (says, found) in pairs.items():
        if says is not None and says != found:
            raise FormatError(f"{what} says {name}={says!r}, and the tensors have {found}. They are of different SAEs.")


def root_scale(norm: Any, width: int, what: str) -> float:
    """Return ``sqrt(width) / norm``: the factor that gives rows of mean norm `norm` the norm sqrt(width).

    Raises
    ------
    FormatError
        `norm` is not a positive number.
    """
    if isinstance(norm, Tensor):
        norm = norm.item() if norm.numel() == 1 else None
    if isinstance(norm, bool) or not isinstance(norm, int | float) or not 0 < norm < float("inf"):
        raise FormatError(f"{what} must be a positive number; got {norm!r}.")
    return sqrt(width) / norm


# ---------------------------------------------------------------------------------------------------------- place

_BLOCK = re.compile(r"(?:^|\.)(?:blocks|layers|layer|h)\.(\d+)(?:\.(?P<rest>.+))?$")
_SITES = {
    "": "", "resid_post": "", "mlp_out": ".mlp", "mlp": ".mlp", "attn_out": ".attn", "self_attn": ".attn",
    "attn": ".attn", "attention": ".attn",
}  # fmt: skip
_SIDES = {"output": "", "hook_out": "", "input": ".input", "hook_in": ".input"}


def hook_of(word: str | None) -> str | None:
    """Return saekit's name of the hook that another library names; None where saekit has none (``hook_z``, the middle
    of a block, a norm before its weights).

    >>> hook_of("blocks.12.hook_resid_post"), hook_of("model.layers.3.output"), hook_of("blocks.4.hook_resid_pre")
    ('layers.12', 'layers.3', 'layers.3')
    >>> hook_of("blocks.4.mlp.hook_in"), hook_of("model.layers.3.self_attn.o_proj.input")
    ('layers.4.mlp.input', 'layers.3.self_attn.o_proj.input')
    >>> hook_of("blocks.4.attn.hook_z") is None
    True
    """
    found = _BLOCK.search(word or "")
    if not found:
        return None
    layer, rest = int(found[1]), found["rest"] or ""
    if rest.removeprefix("hook_") == "resid_pre":  # the stream before block L is the stream after block L - 1
        return f"layers.{layer - 1}" if layer else "layers.0.input"
    within = _within_block(rest)
    return None if within is None else f"layers.{layer}{within}"


def _within_block(rest: str) -> str | None:
    """Return what saekit's name of a hook has after the block, from what another library's has; None for none."""
    inside, _, side = rest.rpartition(".")
    if side not in _SIDES:
        inside, side = rest, ""
    site = _SITES.get(inside.removeprefix("hook_"))
    if site is None and side and "hook_" not in inside:  # a module by its path in the block
        site = f".{inside}"
    return None if site is None else f"{site}{_SIDES.get(side, '')}"


def word_of(hook: str | None, stated: str | None = None) -> str | None:
    """Return TransformerLens' name of a hook, as SAELens writes it: the stated one where it is such a name, or that of
    saekit's; None where there is none.

    >>> word_of("layers.3"), word_of("layers.3.mlp"), word_of(None, "blocks.4.attn.hook_z"), word_of("encoder.x")
    ('blocks.3.hook_resid_post', 'blocks.3.hook_mlp_out', 'blocks.4.attn.hook_z', None)
    """
    if stated is not None and re.match(r"blocks\.\d+\.", stated):
        return stated
    found = re.fullmatch(r"layers\.(\d+)(|\.mlp|\.attn)", hook or "")
    return f"blocks.{found[1]}.hook_{_WORDS[found[2]]}" if found else None


_WORDS = {"": "resid_post", ".mlp": "mlp_out", ".attn": "attn_out"}


def layer_of(word: str) -> int:
    """Return the number of the block in the name of a hook; 0 where there is none."""
    found = re.search(r"\.(\d+)(\.|$)", word)
    return int(found[1]) if found else 0


def place(*, hook: str | None = None, hook_out: str | None = None, **facts: Any) -> dict[str, Any]:
    """Return the provenance of a loaded SAE: what is known, with the hooks in saekit's names and as they were stated.

    Parameters
    ----------
    hook, hook_out
        Where rows come from, and go to (transcoders), in the words of the file.
    **facts
        ``model``, ``context``, ``data``, ``prepend_bos``, ``claimed`` and so on; None means not stated.
    """
    known: dict[str, Any] = {key: value for key, value in facts.items() if value not in (None, {}, "")}
    for name, word in (("hook", hook), ("hook_out", hook_out)):
        if not word or (name == "hook_out" and word == hook):
            continue
        known[f"{name}_stated"] = word
        if (ours := hook_of(word)) is not None:
            known[name] = ours
    block = re.fullmatch(r"layers\.(\d+)", known.get("hook", ""))
    return known | ({"layer": int(block[1])} if block else {})
