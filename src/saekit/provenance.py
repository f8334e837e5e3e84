"""Where things come from: digests of SAEs, versions of saekit and of the libraries."""

from __future__ import annotations

import hashlib
import platform
from importlib.metadata import version
from typing import Any

import torch
from torch import Tensor

from .sae.model import SAE
from .sae.naming import shape_of
from .version import __version__


def sae_digest(sae: SAE) -> str:
    """SHA-256 over every tensor, the rule and the scaling."""
    digest = hashlib.sha256(repr((sae.rule.name, sae.rule.settings(), sae.scaling.settings())).encode())
    for key, tensor in sae.tensors().items():
        digest.update(f"{key} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(tensor_bytes(tensor))
    return "sha256:" + digest.hexdigest()


def tensor_bytes(tensor: Tensor) -> bytes:
    """Return the numbers of a tensor as they lie in memory, row by row."""
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def facts_of_sae(sae: SAE) -> dict[str, Any]:
    """Return what results write down about an SAE: latents, width, rule, digest of all tensors, provenance."""
    return {**shape_of(sae), "digest": sae_digest(sae), "provenance": sae.provenance}


def release() -> str:
    """Return the version of saekit."""
    return __version__


def library_versions(with_model: bool) -> dict[str, str]:
    """Return the versions of Python, torch, numpy and, `with_model`, transformers."""
    packages = ["torch", "numpy", *(["transformers"] if with_model else [])]
    return {"python": platform.python_version(), **{name: version(name) for name in packages}}
