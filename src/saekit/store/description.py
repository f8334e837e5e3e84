"""What ``sae.json`` says about an SAE: made from a value, and checked when it is read."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import ConfigError, FormatError, SaekitError, did_you_mean, listed
from ..files import SEAL, unsealed
from ..forms import COUNT, check_form
from ..sae.model import SAE
from ..sae.rules import RULES
from ..sae.scaling import Scaling
from ..settings import is_whole
from ..version import __version__
from .blocks import BY_LATENT, SCORES, block_digests, block_rows, shared_digest
from .tensorfile import Entry, Header

SCHEMA = 4
"""Version of the layout that this release writes; it reads this one and all before it."""

TENSORS = "sae.safetensors"
DESCRIPTION = "sae.json"
FORMAT = "saekit-sae"

_MIGRATIONS: dict[int, Callable[[dict[str, Any]], dict[str, Any]]] = {
    1: lambda value: {**value, "schema": 2, "sizes": None},  # schema 2 brought the measured curve of prefixes
    2: lambda value: {**value, "schema": 3},  # schema 3 brought tensors `scores.<name>`
    3: lambda value: {**value, "schema": 4},  # schema 4 brought the seal
}
"""Schema v -> a function from the description in v to the one in v + 1."""

_SEALED = 4  # the schema since which a description must have a seal

_REQUIRED = (*BY_LATENT, "b_dec")

KEYS = (
    "format", "schema", "saekit", "n_latents", "d_in", "d_out", "dtype", "rule", "scaling", "pre_bias", "skip",
    "latent_order", "sizes", "tensors", "content", "file", "blocks", "provenance",
)  # fmt: skip


_FORM = {
    "n_latents": COUNT, "d_in": COUNT, "d_out": COUNT, "dtype": str, "rule": {"name": str}, "scaling": {"kind": str},
    "pre_bias": bool, "skip": bool, "latent_order": str, "tensors": dict, "content": str, "provenance": dict,
    "file": {"name": str, "bytes": COUNT, "digest": str},
    "blocks": {"latents": COUNT, "digests": list, "shared": str},
}  # fmt: skip


def describe_value(sae: SAE, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """Return the description of an SAE whose stored `tensors` are given; ``"file"`` is missing."""
    blocks = block_rows(sae.n_latents)
    digests = list(block_digests(tensors, blocks))
    shared = shared_digest(tensors)
    return {
        "format": FORMAT,
        "schema": SCHEMA,
        "saekit": __version__,
        "n_latents": sae.n_latents,
        "d_in": sae.d_in,
        "d_out": sae.d_out,
        "dtype": str(sae.dtype).removeprefix("torch."),
        "rule": {"name": sae.rule.name, **sae.rule.settings()},
        "scaling": sae.scaling.settings(),
        "pre_bias": sae.b_pre is not None,
        "skip": sae.W_skip is not None,
        "latent_order": sae.provenance.get("latent_order", "none"),
        "sizes": _sizes_of(sae),
        "tensors": {name: _dtype_and_shape(tensor) for name, tensor in tensors.items()},
        "content": sae.digest(),
        "blocks": {"latents": blocks, "digests": digests, "shared": shared},
        "provenance": {key: value for key, value in sae.provenance.items() if key != "sizes"},
    }


def _sizes_of(sae: SAE) -> dict[str, Any] | None:
    """Return the measured curve, up to the latents that are there."""
    curve = sae.provenance.get("sizes")
    if curve is None:
        return None
    check_sizes(curve, "`provenance` of the SAE", ConfigError)
    points = [point for point in curve["points"] if point["latents"] <= sae.n_latents]
    return {**curve, "points": points} if points else None


def check_description(value: Any, path: Path) -> dict[str, Any]:
    """Return the description in the present schema, without its seal; ``"sealed"`` says whether it had one.

    Raises
    ------
    FormatError
        It is not a description of an SAE, of a newer schema, or holds what this release does not know.
    """
    if not isinstance(value, dict) or value.get("format") != FORMAT:
        raise FormatError(f'`{path}` must be the description of a saekit SAE ("format": "{FORMAT}"); it is not.')
    sealed = SEAL in value
    value = _migrated(value, path)
    _same_keys(value, KEYS, path, "")
    _same_keys(value["file"], ("name", "bytes", "digest"), path, "file.")
    check_form(value, _FORM, path)
    _same_keys(value["blocks"], ("latents", "digests", "shared"), path, "blocks.")
    check_form(value["blocks"]["digests"], [str], path, "blocks.digests")
    if value["sizes"] is not None:
        check_sizes(value["sizes"], f"`{path}`", FormatError)
    _check_function(value, path)
    return {**value, "sealed": sealed}


def _migrated(value: dict[str, Any], path: Path) -> dict[str, Any]:
    schema: Any = value.get("schema")
    if not is_whole(schema) or schema < 1:
        raise FormatError(f"`{path}`: `schema` must be a whole number of at least 1; got {schema!r}.")
    if schema > SCHEMA:
        raise FormatError(
            f"`{path}` has schema {schema}; this release of saekit ({__version__}) reads schemas up to {SCHEMA}. "
            f"Install saekit {value.get('saekit', 'of a later version')} or later."
        )
    value = unsealed(value, path, since=_SEALED)
    for version in range(schema, SCHEMA):
        value = _MIGRATIONS[version](value)
    return value


def _check_function(value: Mapping[str, Any], path: Path) -> None:
    """Refuse a rule or a scaling with other settings than it has."""
    rule, scaling = value["rule"], value["scaling"]
    if rule["name"] not in RULES:
        raise FormatError(f"`{path}`: `rule.name` must be one of {listed(RULES)}; got {rule!r:.60}.")
    tensor_names = value["tensors"]
    _known(rule, {"name", *_plain_fields(RULES[rule["name"]], tensor_names, "rule.")}, path, "rule.")
    _known(scaling, _plain_fields(Scaling, tensor_names, "scaling."), path, "scaling.")


def check_sizes(curve: Any, where: str, error: type[SaekitError]) -> None:
    """Refuse a curve of sizes that is not ``{"measured_on": {}, "points": [{"latents": m, "metrics": {...}}]}``.

    Raises
    ------
    SaekitError
        `error`; the message names `where`.
    """
    shape = '{"measured_on": {…}, "points": [{"latents": m, "metrics": {…}}, …]}'
    is_curve = isinstance(curve, dict) and set(curve) == {"measured_on", "points"}
    points = curve["points"] if is_curve and isinstance(curve["points"], list) else []
    sizes = [point["latents"] if _is_point(point) else 0 for point in points]
    if not sizes or min(sizes) < 1 or sizes != sorted(set(sizes)):
        raise error(
            f"{where}: `sizes` must be {shape} with increasing numbers of latents; it is not. Measure the sizes again."
        )


def _is_point(point: Any) -> bool:
    if not isinstance(point, dict) or set(point) != {"latents", "metrics"} or not isinstance(point["metrics"], dict):
        return False
    measured = all(isinstance(value, dict) and "value" in value for value in point["metrics"].values())
    return measured and isinstance(point["latents"], int)


def _plain_fields(of: type, tensor_names: Mapping[str, Any], prefix: str) -> set[str]:
    """Return the fields of a dataclass that stand in the description; the others are tensors in the other file."""
    return {f.name for f in fields(of) if f"{prefix}{f.name}" not in tensor_names}


def _same_keys(value: Any, keys: tuple[str, ...], path: Path, prefix: str) -> None:
    if not isinstance(value, dict):
        raise FormatError(f"`{path}`: `{prefix.rstrip('.')}` must be an object; got {type(value).__name__}.")
    _known(value, set(keys), path, prefix)
    missing = [f"{prefix}{key}" for key in keys if key not in value]
    if missing:
        raise FormatError(f"`{path}` must have the keys {listed(missing)}; they are missing.")


def _known(value: Mapping[str, Any], keys: set[str], path: Path, prefix: str) -> None:
    unknown = [key for key in value if key not in keys]
    if unknown:
        raise FormatError(
            f"`{path}`: unknown key `{prefix}{unknown[0]}`. {did_you_mean(unknown[0], sorted(keys))} "
            "The file may have been edited, or come from another program."
        )


def check_header(description: Mapping[str, Any], header: Header, path: Path) -> None:
    """Refuse a header whose tensors are not those of the description.

    Raises
    ------
    FormatError
        Names, shapes, dtypes or the size of the file differ, or a tensor is not part of an SAE.
    """
    found = {name: _dtype_and_shape(entry) for name, entry in header.entries.items()}
    stated = description["tensors"]
    if found != stated:
        same = {name for name in found if name in stated and found[name] == stated[name]}
        odd = min({*found, *stated} - same)
        raise FormatError(
            f"`{path}`: tensor `{odd}` must be {stated.get(odd, 'absent')}; it is {found.get(odd, 'absent')}. "
            "Copy both files from the same place."
        )
    _check_names(found, path)
    _check_scores(header, description["n_latents"], path)
    shape = (description["n_latents"], description["d_in"])
    if header.entries["W_enc"].shape != shape or description["file"]["bytes"] != header.n_bytes:
        raise FormatError(
            f"`{path}` must hold `W_enc` {shape} in {description['file']['bytes']} bytes; it holds "
            f"{header.entries['W_enc'].shape} in {header.n_bytes}. Copy both files from the same place."
        )


def _check_names(names: Collection[str], path: Path) -> None:
    known = {*_REQUIRED, "b_pre", "W_skip"}
    missing = [name for name in _REQUIRED if name not in names]
    unknown = [name for name in names if name not in known and not name.startswith(("rule.", "scaling.", SCORES))]
    if missing or unknown:
        what = f"must hold {listed(missing)}" if missing else f"holds {listed(unknown)}, which saekit does not know"
        raise FormatError(f"`{path}` {what}. Copy both files again.")


def _check_scores(header: Header, n_latents: int, path: Path) -> None:
    for name, entry in header.entries.items():
        if name.startswith(SCORES) and (entry.shape, entry.dtype) != ((n_latents,), torch.float32):
            raise FormatError(
                f"`{path}`: tensor `{name}` must be float32 ({n_latents},), a number per latent; it is "
                f"{_dtype_name(entry)} {entry.shape}. Copy both files again."
            )


def _dtype_and_shape(tensor: Tensor | Entry) -> dict[str, Any]:
    return {"dtype": _dtype_name(tensor), "shape": list(tensor.shape)}


def _dtype_name(tensor: Tensor | Entry) -> str:
    return str(tensor.dtype).removeprefix("torch.")
