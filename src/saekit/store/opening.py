"""An SAE by its address, whatever library wrote it: a folder, a file of weights, or a place on the hub."""

from __future__ import annotations

import os
from dataclasses import replace
from typing import Any

import torch

from ..errors import ConfigError, FormatError, SaekitError
from ..files import check_path
from ..sae.model import SAE
from ..settings import is_whole
from . import native
from .catalog import corrections, resolve
from .description import DESCRIPTION
from .formats import recognize
from .formats.canonical import Stated
from .listing import HEADER, Listing, Part, list_local

HUB = "hf:"


def load(
    address: str | os.PathLike[str],
    *,
    latents: int | None = None,
    fvu: float | None = None,
    dtype: torch.dtype | str | None = None,
    device: torch.device | str | None = None,
    stated: Stated | None = None,
) -> SAE:
    """Read an SAE of saekit's or of any format in `saekit.store.formats`.

    Parameters
    ----------
    address
        A folder, a file of weights, or ``hf:owner/name/folder[@revision]``, of which only what is needed is
        downloaded.
    latents, fvu
        Read a prefix of the latents; see `saekit.store.native.load`. Of a foreign safetensors file only their rows are
        read where a matrix has the latents first; other foreign files are read whole. None knows an FVU.
    dtype, device
        Where the tensors go; None for the file's type, on the CPU.
    stated
        What the file itself does not say: its format, the orientation of a square encoder, k.

    Returns
    -------
    SAE
        Its provenance says the format, the address, and where in which model the SAE belongs, as far as it is stated.

    Raises
    ------
    ConfigError
        Nothing is there, there are several SAEs, or something must be stated.
    FormatError
        The file is damaged, or of a kind that saekit does not read; the message says which and why.
    """
    stated = stated or Stated()
    given, address = os.fspath(address), resolve(os.fspath(address))
    if stated == Stated() and _is_native(address):
        sae = native.load(address, latents=latents, fvu=fvu)
    else:
        if fvu is not None:
            raise ConfigError(
                "load: `fvu` picks a size from those that saekit measured into its own file; give `latents`."
            )
        listing = replace(listing_of(address), corrections=corrections(given))
        sae = read_foreign(listing if latents is None else _first(listing, stated, latents), stated)
        sae = sae if latents is None else sae.take(latents)
    return sae if dtype is None and device is None else sae.to(device, _dtype(dtype))


def describe(address: str | os.PathLike[str]) -> dict[str, Any]:
    """Return what a file says about its SAE: shapes, rule, dtype, provenance; JSON-able, ``"path"`` is the address.

    No weights are read: shapes come from the headers. Vectors (biases, thresholds) of foreign files are, because they
    say how the matrices lie. Raises as `load` does.
    """
    given, address = os.fspath(address), resolve(os.fspath(address))
    if _is_native(address):
        return native.describe(address)
    listing = replace(listing_of(address), part=HEADER, corrections=corrections(given))
    sae = read_foreign(listing, Stated())
    rule, tensors = {"name": sae.rule.name, **sae.rule.settings()}, sae.tensors()
    return {
        "path": address, "n_latents": sae.n_latents, "d_in": sae.d_in, "d_out": sae.d_out,
        "dtype": str(sae.dtype).removeprefix("torch."), "rule": rule, "scaling": sae.scaling.settings(),
        "latent_order": "none", "sizes": None, "tensors": {name: list(t.shape) for name, t in tensors.items()},
        "provenance": sae.provenance,
    }  # fmt: skip


def _first(listing: Listing, stated: Stated, latents: int) -> Listing:
    """Return a listing of which only the rows of the first latents are read, where that can be told from the shapes."""
    shown = read_foreign(replace(listing, part=HEADER), stated)
    is_part = is_whole(latents) and 1 <= latents < shown.n_latents and shown.n_latents not in (shown.d_in, shown.d_out)
    return replace(listing, part=Part(shown.n_latents, latents)) if is_part else listing


def read_foreign(listing: Listing, stated: Stated) -> SAE:
    """Return the SAE in a foreign format. Errors of the value itself become errors of the file.

    Raises
    ------
    ConfigError, FormatError
        As `load`.
    """
    found = recognize(replace(listing, part=HEADER), stated)
    try:
        sae = found.read(listing, stated)
    except (ConfigError, FormatError):
        raise
    except (
        SaekitError,
        KeyError,
        TypeError,
        ValueError,
        IndexError,
        RuntimeError,
        AttributeError,
        ArithmeticError,
    ) as error:
        raise FormatError(
            f"`{listing.address}` cannot be read as {found.NAME} ({found.LIBRARY}): {type(error).__name__}: {error}"
        ) from error
    origin: dict[str, Any] = {"format": found.NAME, "library": found.LIBRARY, "address": listing.address}
    return sae.replace(provenance={**origin, **sae.provenance})


def listing_of(address: str | os.PathLike[str]) -> Listing:
    """Return the files at an address; from the hub their names alone.

    Raises
    ------
    ConfigError
        Nothing is there.
    OfflineError, ModelError
        The hub cannot be reached, or does not have it.
    """
    text = os.fspath(address)
    if text.startswith(HUB):
        from .hub import list_hub

        return list_hub(text)
    return list_local(text)


def _is_native(address: str | os.PathLike[str]) -> bool:
    text = os.fspath(address)
    if text.startswith(HUB):
        from .hub import holds

        return holds(text, DESCRIPTION)
    path = check_path(text)
    return native.is_native(path)


def _dtype(dtype: torch.dtype | str | None) -> torch.dtype | None:
    if dtype is None or isinstance(dtype, torch.dtype):
        return dtype
    found = getattr(torch, dtype, None)
    if not isinstance(found, torch.dtype) or not found.is_floating_point:
        raise ConfigError(f"load: `dtype` must be a floating type such as float32 or bfloat16; got {dtype!r}.")
    return found
