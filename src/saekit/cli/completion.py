"""What the shell completes: values of options, from what is on this machine. Nothing heavy is imported."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

RANKINGS = (
    "energy", "weighted_energy", "frequency", "mean", "loss", "forward", "backward", "attribution", "cross_entropy",
    "stability", "alignment_self", "encoder_norm", "random", "unsorted",
)  # fmt: skip
"""What latents are ranked by in ``--by``."""

_MOST = 200  # folders that are looked into


def one_of(values: Iterable[str]) -> Callable[[str], list[str]]:
    """Return a completion of one of these words."""
    known = list(values)
    return lambda incomplete: [value for value in known if value.startswith(incomplete)]


def several_of(values: Sequence[str]) -> Callable[[str], list[str]]:
    """Return a completion of words with commas between them.

    >>> several_of(["topk", "relu"])("topk,r")
    ['topk,relu']
    """

    def complete(incomplete: str) -> list[str]:
        before, comma, word = incomplete.rpartition(",")
        return [f"{before}{comma}{value}" for value in values if value.startswith(word)]

    return complete


def models(incomplete: str) -> list[str]:
    """Return ``builtin``, local folders with a model, and models of the hub that are stored on this machine."""
    named = [name for name in ("builtin", *_stored_models()) if name.startswith(incomplete)]
    return [*named, *_folders(incomplete, ("config.json",))]


def saes(incomplete: str) -> list[str]:
    """Return local folders with an SAE or a training run, and folders to look into."""
    return _folders(incomplete, ("sae.json", "run.json"))


def _folders(incomplete: str, holding: Sequence[str]) -> list[str]:
    """Return folders whose path begins so: those that hold one of these files, else with a slash at the end."""
    parent, _, start = incomplete.rpartition("/")
    place = Path(f"{parent}/" if parent or incomplete.startswith("/") else ".")
    prefix = f"{parent}/" if "/" in incomplete else ""
    try:
        inside = sorted(each.name for each in os.scandir(place) if each.is_dir() and each.name.startswith(start))
    except OSError:
        return []
    shown = [name for name in inside if start or not name.startswith(".")][:_MOST]
    found = []
    for name in shown:
        is_one = any((place / name / file).is_file() for file in holding)
        found += [f"{prefix}{name}"] if is_one else []
        found += [f"{prefix}{name}/"] if not is_one or (place / name / "run.json").is_file() else []
    return found


def _stored_models() -> Iterator[str]:
    """Yield names of models in the cache of the hub, as ``huggingface_hub`` lays it out."""
    home = os.environ.get("HF_HOME", os.path.join(os.environ.get("XDG_CACHE_HOME", "~/.cache"), "huggingface"))
    cache = Path(os.environ.get("HF_HUB_CACHE", os.path.join(home, "hub"))).expanduser()
    if cache.is_dir():
        for each in sorted(cache.glob("models--*")):
            yield "/".join(each.name.split("--")[1:])
