"""Foreign formats, one module each: ``matches`` (file names and keys), ``read``, and ``canonical``, a pure function.

The order of `FORMATS` is that of the questions: the most specific first.
"""

from __future__ import annotations

from importlib import import_module
from typing import Protocol, cast

from ...errors import ConfigError, FormatError, did_you_mean, listed
from ...sae.model import SAE
from ..listing import Listing
from .canonical import Stated

FORMATS = (
    "latent_sae", "sparsify", "dictionary_learning", "batchtopk", "gemma_scope_2", "gemma_scope", "llama_scope",
    "llamascopium", "sentence_transformers", "mlsae", "saelens", "circuit_tracer", "saev", "openai", "hypothesaes",
    "e2e_sae", "hook_z", "qwen_scope", "single_file",
)  # fmt: skip


class Format(Protocol):
    """What every module of this room offers."""

    NAME: str
    LIBRARY: str

    def matches(self, listing: Listing) -> bool:
        """Return whether the files are those of this format."""
        ...

    def read(self, listing: Listing, stated: Stated) -> SAE:
        """Return the SAE."""
        ...


def named(name: str) -> Format:
    """Return the module of a format.

    Raises
    ------
    ConfigError
        There is no such format.
    """
    if name not in FORMATS:
        raise ConfigError(f"`format` must be one of {', '.join(FORMATS)}; got {name!r}. {did_you_mean(name, FORMATS)}")
    return cast(Format, import_module(f"{__name__}.{name}"))


def recognize(listing: Listing, stated: Stated) -> Format:
    """Return the format of the files at an address: the stated one, or the first whose files and keys they are.

    Raises
    ------
    ConfigError
        The address holds several SAEs, or no file of weights.
    FormatError
        The files are of a kind that saekit does not read (says which and why), or of none that it knows.
    """
    if stated.format is not None:
        return named(stated.format)
    for name in FORMATS:
        if (found := named(name)).matches(listing):
            return found
    raise _unknown(listing)


def _unknown(listing: Listing) -> Exception:
    from .refused import recognized

    known = recognized(listing)
    if known is not None:
        return FormatError(f"`{listing.address}` is {known[0]}, which saekit does not read: {known[1]}.")
    weights = listing.weights()
    if len(weights) > 1:
        return ConfigError(
            f"`{listing.address}` must be the address of one SAE; it holds {len(weights)} files of weights: "
            f"{listed(weights)}. Name one of them."
        )
    if not weights:
        inside = sorted({name.split("/")[0] for name in listing.names if "/" in name})
        what = f"it holds folders: {listed(inside)}. Name one of them." if inside else "it holds no file of weights."
        return ConfigError(f"`{listing.address}` must be the address of one SAE; {what}")
    return FormatError(
        f"`{listing.address}` is no format that saekit knows: `{weights[0]}` holds "
        f"{listed(sorted(listing.shapes(weights[0])), 12)}. It reads {', '.join(FORMATS)} and its own."
    )
