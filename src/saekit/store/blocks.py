"""Blocks of latents: the digests that let a reader verify what it read without reading the rest."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from torch import Tensor

from ..files import digest_bytes
from ..sae.digest import bytes_of

# Tensors of which a prefix load reads only the first rows, and all `scores.<name>` after them, in order of names; the
# others (biases, thresholds) are small and read whole.
BY_LATENT = ("W_enc", "b_enc", "W_dec")
SCORES = "scores."
_MAX_BLOCKS = 256


def block_rows(n_latents: int) -> int:
    """Return the latents per verified block: at least 64, and at most 256 blocks."""
    return max(64, -(-n_latents // _MAX_BLOCKS))


def block_digests(tensors: Mapping[str, Tensor], rows: int) -> Iterator[str]:
    """Yield one digest per block of latents, over the bytes of its rows of each matrix."""
    for start in range(0, len(tensors["W_enc"]), rows):
        digest = hashlib.sha256()
        for name in by_latent(tensors):
            digest.update(bytes_of(tensors[name][start : start + rows]))
        yield digest.hexdigest()


def by_latent(names: Iterable[str]) -> list[str]:
    """Return the tensors that have a row (or a number) per latent and are read in part."""
    return [*BY_LATENT, *sorted(name for name in names if name.startswith(SCORES))]


def shared_digest(tensors: Mapping[str, Tensor]) -> str:
    """Return the digest of the names of scores, and of names and bytes of all tensors that are read whole."""
    digest = hashlib.sha256()
    in_part = by_latent(tensors)
    for name in in_part[len(BY_LATENT) :]:
        digest.update(f"{name}\n".encode())
    for name in sorted(set(tensors) - set(in_part)):
        digest.update(f"{name}\n".encode())
        digest.update(bytes_of(tensors[name]))
    return digest.hexdigest()


def blocks_digest(description: Mapping[str, Any]) -> str:
    """Return the digest of the digests of all blocks: what a description belongs to, `content` in files of 0.1."""
    blocks = description["blocks"]
    return digest_bytes("\n".join([*blocks["digests"], blocks["shared"]]).encode())
