"""Language models that are loaded only when they are needed; their files alone say what their rows depend on."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import ConfigError
from ..files import read_json
from .language import LanguageModel
from .loading import load_language_model
from .pretrained import ModelFiles, digest_files, dtype_name, find_model

_TOKENIZER = ("tokenizer*", "vocab*", "merges.txt", "special_tokens_map.json", "*.model")


@dataclass(frozen=True)
class DeferredModel:
    """A model that is loaded when it is needed, and what must be known of it before."""

    name: str
    """What it is called; see `PretrainedModel.name`."""
    digest: str
    """SHA-256 over config and weights; see `PretrainedModel.digest`."""
    about: dict[str, Any]
    """What decides its rows (plain JSON): digests of the model and of its tokenizer, number type."""
    load: Callable[[], LanguageModel]
    """Returns the model."""


def defer_model(model: LanguageModel | str | os.PathLike[str]) -> DeferredModel:
    """Return a language model by value or by name; by name only its files are read, for their digest.

    Raises
    ------
    ModelError, OfflineError
        There is no such model.
    ConfigError
        `model` is neither a model nor a name.
    """
    if isinstance(model, LanguageModel):
        folder = str(getattr(model.tokenizer, "name_or_path", "") or "")
        about = {"model": model.digest, "dtype": dtype_name(model.dtype), "tokenizer": _digest_tokenizer(folder)}
        return DeferredModel(model.name, model.digest, about, lambda: model)
    if not isinstance(model, str | os.PathLike):
        raise ConfigError(f"`model` must be a LanguageModel, a folder or a name; got {type(model).__name__}.")
    files = find_model(model)
    if files.stored is None:  # it has to be downloaded before its files have a digest
        load_language_model(files.name)
    digest, folder = files.digest, str(files.stored or files.folder)
    about = {"model": digest, "dtype": _dtype_in(folder), "tokenizer": _digest_tokenizer(folder)}
    return DeferredModel(files.short_name, digest, about, lambda: _loaded(files.address, digest))


@functools.lru_cache(maxsize=1)
def _loaded(name: str, digest: str) -> LanguageModel:
    """Load the model of that name and content: the last one stays loaded, for the next fold of a cross-validation."""
    return load_language_model(name)


def _dtype_in(folder: str) -> str:
    """Return the number type that a model folder is loaded in."""
    path = Path(folder) / "config.json"
    config = read_json(path, finite=False) if path.is_file() else {}
    return str(config.get("dtype") or config.get("torch_dtype") or "float32")


def _digest_tokenizer(folder: str) -> str | None:
    """Return the SHA-256 over the files of a tokenizer; None when they are not at hand."""
    if not folder or not Path(folder).is_dir():
        return None
    return _digest_tokenizer_files(folder, ModelFiles(folder, folder, None, True).stamp)


@functools.lru_cache(maxsize=16)
def _digest_tokenizer_files(folder: str, stamp: tuple[tuple[str, int, int], ...]) -> str:
    return digest_files(
        sorted({file for pattern in _TOKENIZER for file in Path(folder).glob(pattern) if file.is_file()})
    )
