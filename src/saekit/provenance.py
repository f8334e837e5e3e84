"""Where things come from: digests of SAEs, versions of saekit and of the libraries."""

from __future__ import annotations

import platform
from importlib.metadata import version

from .sae.model import SAE
from .version import __version__


def sae_digest(sae: SAE) -> str:
    """Return `SAE.digest`."""
    return sae.digest()


def release() -> str:
    """Return the version of saekit."""
    return __version__


def library_versions(with_model: bool) -> dict[str, str]:
    """Return the versions of Python, torch, numpy and, `with_model`, transformers."""
    packages = ["torch", "numpy", *(["transformers"] if with_model else [])]
    return {"python": platform.python_version(), **{name: version(name) for name in packages}}
