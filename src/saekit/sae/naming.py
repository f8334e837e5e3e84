"""What tables call SAEs, what results write down about them, and which sets of them can be measured together."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..errors import ConfigError, DataError, ShapeError
from .model import SAE

Given = SAE | str | os.PathLike[str]
"""An SAE, or a path that `SAE.load` takes."""


def as_sae(sae: Given) -> SAE:
    """Return an SAE, loaded where a path is given."""
    return sae if isinstance(sae, SAE) else SAE.load(sae)


def given_saes(saes: Given | Sequence[Given]) -> list[Given]:
    """Return SAEs one by one: a folder that holds several, such as a training run, stands for all of them."""
    from ..store.address import sae_paths

    found: list[Given] = []
    for item in [saes] if isinstance(saes, SAE | str | os.PathLike) else saes:
        found += [item] if isinstance(item, SAE) else sae_paths(item)
    return found


def named_saes(saes: Given | Sequence[Given], where: str) -> list[tuple[str, SAE]]:
    """Return SAEs with a unique name for each: of a path its last part, of a value what `name_of` says.

    Parameters
    ----------
    saes
        One SAE or several: values or paths; a folder that holds several, such as a training run, stands for all.
    where
        Function that messages name.

    Raises
    ------
    ConfigError
        There is none.
    """
    given = given_saes(saes)
    if not given:
        raise ConfigError(f"{where}: at least one SAE must be given; got an empty list.")
    named: dict[str, SAE] = {}
    for item in given:
        sae = as_sae(item)
        name = name_of(sae) if isinstance(item, SAE) else os.path.basename(os.fspath(item).rstrip("/\\")) or "sae"
        unique, count = name, 1
        while unique in named:
            count += 1
            unique = f"{name} ({count})"
        named[unique] = sae
    return list(named.items())


def name_of(sae: SAE) -> str:
    """Return what tables call an SAE: architecture, latents, k, control, seed, as far as they are known.

    >>> from saekit.sae.rules import TopKRule
    >>> W = torch.eye(4)
    >>> name_of(SAE(W_enc=W, b_enc=W[0], W_dec=W, b_dec=W[0], rule=TopKRule(2), provenance={"seed": 0}))
    'topk-4-k2-seed0'
    """
    config = {"arch": sae.rule.name, **sae.rule.settings(), **training_config(sae)}
    if sae.provenance.get("rows_seen") == 0 and not config.get("control"):
        config["control"] = "untrained"
    parts = [name_of_config(config, sae.n_latents)]
    parts += ["consensus"] if sae.provenance.get("consensus") else []
    parts += [f"seed{sae.provenance['seed']}"] if sae.provenance.get("seed") is not None else []
    return "-".join(parts)


def name_of_config(config: Mapping[str, object], n_latents: int) -> str:
    """Return ``<arch>-<latents>[-<what sets the sparsity>][-<control>]`` of a training configuration as plain JSON.

    >>> name_of_config({"arch": "relu", "target_l0": 16.0, "l1": 2.0}, 1024)
    'relu-1024-l0-16'
    """
    parts = [str(config["arch"]), str(n_latents)]
    for key, form in {"k": "k{:g}", "target_l0": "l0-{:g}", "l1": "l1-{:g}", "tanh": "tanh{:g}"}.items():
        if config.get(key) is not None:
            parts.append(form.format(config[key]))
            break
    parts += [str(config["control"])] if config.get("control") else []
    numbers = {
        "tanh": "tanh" if config.get("target_l0") is not None else "",
        "pre_activation": "pre-activation",
        "mutual": "mutual",
        "l2": "l2-",
        "orthogonal": "orthogonal",
        "subspace": "subspace",
        "density": "density",
        "incoherence": "incoherence",
    }
    parts += ["magnitude"] if config.get("sign") == "magnitude" else []
    parts += [f"{word}{config[key]:g}" for key, word in numbers.items() if word and config.get(key)]
    parts += [word for word in ("aligned", "detached") if config.get(word)]
    parts += ["aux-per-size"] if config.get("aux_per_size") else []
    parts += [f"skip-{config['skip']}"] if config.get("skip") else []
    parts += [f"from{config['k_start']:g}"] if config.get("k_start") else []
    parts += [f"balance{config['balance']:g}"] if config.get("balance") is not None else []
    return "-".join(parts)


def training_config(sae: SAE) -> dict[str, Any]:
    """Return the configuration that an SAE was trained with; empty where it is not known."""
    config = sae.provenance.get("config")
    return config if isinstance(config, dict) else {}


def shape_of(sae: SAE) -> dict[str, Any]:
    """Return latents, width and rule of an SAE as plain JSON."""
    return {"n_latents": sae.n_latents, "d_in": sae.d_in, "rule": {"name": sae.rule.name, **sae.rule.settings()}}


def common_width(named: Sequence[tuple[str, SAE]], where: str) -> int:
    """Return the one width of the rows that all SAEs read; they write rows of one width, too.

    Raises
    ------
    ShapeError
        Two widths.
    ConfigError
        SAEs and transcoders together, or transcoders of different modules.
    DataError
        NaN or infinity in weights.
    """
    for name, sae in named:
        check_alike(name, sae, named[0][1], where)
    return named[0][1].d_in


def check_alike(name: str, sae: SAE, first: SAE, where: str) -> None:
    """Refuse an SAE of other rows than `first` has, or with weights that are not finite; see `common_width`."""
    if (sae.d_in, sae.d_out) != (first.d_in, first.d_out):
        raise ShapeError(
            f"{where}: all SAEs must have one width; `{name}` has {_width(sae)}, others {_width(first)}. Take them one "
            "at a time."
        )
    check_same_target(name, sae, first, where)
    check_finite(name, sae.tensors())


def check_same_target(name: str, sae: SAE, first: SAE, where: str) -> None:
    """Refuse an SAE and a transcoder together, or transcoders of different modules; raises `ConfigError`."""
    kinds = [_kind(each) for each in (sae, first)]
    if kinds[0] != kinds[1]:
        raise ConfigError(
            f"{where}: all must predict the same rows; `{name}` is {kinds[0]}, the first is {kinds[1]}. Latents of "
            "different spaces have nothing in common: take those of one kind and one module."
        )


def _width(sae: SAE) -> str:
    return f"{sae.d_in}" if sae.d_in == sae.d_out else f"{sae.d_in} in and {sae.d_out} out"


def _kind(sae: SAE) -> str:
    if not sae.is_transcoder:
        return "an SAE, which reconstructs the rows that it reads"
    out = sae.provenance.get("hook_out")
    return f"a transcoder{f' to `{out}`' if out else ''}"


def check_finite(name: str, tensors: Mapping[str, Tensor]) -> None:
    """Refuse weights that hold NaN or infinity; raises `DataError`."""
    for key, tensor in tensors.items():
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise DataError(
                f"`{name}` must have finite weights; `{key}` holds NaN or infinity. Its training went wrong."
            )
