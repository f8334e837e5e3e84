"""Where things come from: digests of SAEs, the hook that an SAE belongs to, versions of saekit and of the libraries."""

from __future__ import annotations

import platform
from collections.abc import Mapping
from importlib.metadata import version
from typing import Any

from .errors import ConfigError
from .sae.model import SAE
from .sae.naming import shape_of
from .sae.parts import is_crosscoder
from .settings import is_whole
from .version import __version__


def known_place(origin: SAE | Mapping[str, Any] | None) -> str | None:
    """Return the hook that an SAE, or other provenance (the `info` of a source of rows), names; None if it names none.

    >>> known_place({"layer": 2})
    'layers.2'
    """
    known = {} if origin is None else origin.provenance if isinstance(origin, SAE) else origin
    if known.get("hook"):
        return str(known["hook"])
    return None if known.get("layer") is None else f"layers.{known['layer']}"


def place_of(
    *origins: SAE | Mapping[str, Any] | None,
    layer: int | None = None,
    hook: str | None = None,
    where: str = "",
    name: str = "the SAE",
) -> str:
    """Return the hook that an SAE belongs to: the one that is given, else the one that its provenance names.

    Parameters
    ----------
    *origins
        SAEs or other provenance (the `info` of a source of rows); the first that names a hook decides. None: hidden
        states, which name none.
    layer, hook
        At most one of them: number of a block from 0, or the name of a hook. Either overrides `origins`.
    where
        Name of the calling function, for messages.
    name
        What the SAE is called in messages.

    Returns
    -------
    str
        ``layers.2``, ``layers.2.mlp`` or a path; `saekit.models.hooks.find_hook` finds it in a model.

    Raises
    ------
    ConfigError
        Both `layer` and `hook` are given, or nothing says where the SAE belongs.
    """
    prefix = f"{where}: " if where else ""
    given = _given_place(layer, hook, prefix)
    places = [given] if given is not None else [known_place(origin) for origin in origins]
    place = next((place for place in places if place is not None), None)
    if place is None:
        if any(isinstance(origin, SAE) and is_crosscoder(origin) for origin in origins):
            raise ConfigError(
                f"{prefix}{name} must belong to one place in a model; it is a crosscoder, whose rows come from several "
                "places. Measure it on joined rows alone (--rows joined:a=PATH,b=PATH)."
            )
        silent = any(origin is not None for origin in origins)
        raise ConfigError(
            f"{prefix}`layer` or `hook` must say where the rows come from; got neither"
            f"{f', and {name} does not say where in the model it belongs' if silent else ''}. Give layer=2, say."
        )
    return place


def target_of(
    sae: SAE, *origins: Mapping[str, Any] | None, target: str | None = None, where: str = "", name: str = "the SAE"
) -> str | None:
    """Return the hook whose rows a transcoder predicts; None for an SAE, which reconstructs those that it reads.

    Parameters
    ----------
    sae
        An SAE or a transcoder; its provenance is asked first.
    *origins
        Other provenance: the `info` of a source of rows.
    target
        The hook that is given, which overrides all others.
    where, name
        Name of the calling function, and what the SAE is called, for messages.

    Raises
    ------
    ConfigError
        Nothing says which rows a transcoder predicts, or a target is given for an SAE.
    """
    prefix = f"{where}: " if where else ""
    if not sae.is_transcoder:
        if target is not None:
            raise ConfigError(
                f"{prefix}`target` is for transcoders; {name} reconstructs the rows that it reads. Leave it out."
            )
        return None
    known = [target, *(origin.get("hook_out") for origin in (sae.provenance, *origins) if origin is not None)]
    found = next((each for each in known if each is not None), None)
    if found is None:
        stated = sae.provenance.get("hook_out_stated")
        raise ConfigError(
            f"{prefix}`target` must say which rows {name} predicts: it is a transcoder, and its file "
            + (f"calls their module `{stated}`, which is none of saekit's names. " if stated else "names no module. ")
            + "Give target='layers.2.mlp', say."
        )
    return str(found)


def _given_place(layer: int | None, hook: str | None, prefix: str) -> str | None:
    """Return the hook that is given, by name or by layer; None: neither is."""
    if layer is not None and hook is not None:
        raise ConfigError(
            f"{prefix}at most one of `layer` and `hook` may be given; got layer={layer!r} and hook={hook!r}."
        )
    if hook is not None or layer is None:
        return hook
    if not is_whole(layer):
        raise ConfigError(f"{prefix}`layer` must be a whole number, 0 for the first block; got {layer!r}.")
    return f"layers.{layer}"


def facts_of_sae(sae: SAE) -> dict[str, Any]:
    """Return what results write down about an SAE: latents, width, rule, digest of all tensors, provenance."""
    return {**shape_of(sae), "digest": sae.digest(), "provenance": sae.provenance}


def release() -> str:
    """Return the version of saekit."""
    return __version__


def library_versions(with_model: bool) -> dict[str, str]:
    """Return the versions of Python, torch, numpy and, `with_model`, transformers."""
    packages = ["torch", "numpy", *(["transformers"] if with_model else [])]
    return {"python": platform.python_version(), **{name: version(name) for name in packages}}
