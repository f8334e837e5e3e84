"""Files that ship with saekit: the built-in language model, an ordinary transformers folder."""

from __future__ import annotations

from pathlib import Path


def builtin_model_path() -> Path:
    """Return the folder of the built-in language model, what ``--model builtin`` stands for.

    >>> (builtin_model_path() / "config.json").is_file()
    True
    """
    return Path(__file__).parent / "docs-lm"
