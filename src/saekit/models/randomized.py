"""A control for what SAEs find: the same transformer with random weights, of the size that the trained ones have."""

from __future__ import annotations

import copy
import re
from dataclasses import replace
from typing import TYPE_CHECKING, TypeVar

import torch
from torch import Tensor, nn

from ..errors import ModelError
from ..files import digest_bytes
from ..randomness import hashed_key
from ..settings import check_whole, suggest_keywords

if TYPE_CHECKING:
    from .pretrained import PretrainedModel

M = TypeVar("M", bound="PretrainedModel")

_PREFIX = re.compile(r"randomized(?:-(\d+))?:")


def prefix_of(seed: int) -> str:
    """Return what the names of models with random weights begin with.

    >>> prefix_of(0), prefix_of(3)
    ('randomized:', 'randomized-3:')
    """
    return f"randomized-{seed}:" if seed else "randomized:"


def split_prefix(name: str) -> tuple[str, int | None]:
    """Return the name of a model without the prefix, and the seed of its random weights; None: it is as trained.

    >>> split_prefix("randomized-3:builtin"), split_prefix("builtin")
    (('builtin', 3), ('builtin', None))

    Raises
    ------
    ModelError
        The prefix is there twice.
    """
    found = _PREFIX.match(name)
    if found is None:
        return name, None
    rest = name[found.end() :]
    if not rest or _PREFIX.match(rest):
        raise ModelError(f"`{name}` must name one model after `{found[0]}`, such as {found[0]}builtin.")
    return rest, int(found[1] or 0)


def randomized_digest(digest: str, seed: int) -> str:
    """Return the digest of a model with random weights, from that of the trained model."""
    return digest_bytes(f"{digest} randomized {seed}".encode())


@suggest_keywords
def randomized(model: M, *, seed: int = 0) -> M:
    """Return a copy of a model with random weights, what `load_model("randomized:NAME")` loads (2501.17727).

    Parameters
    ----------
    model
        The trained model; it is not changed.
    seed
        Seed of the random weights, from 0.

    Returns
    -------
    PretrainedModel
        A model of the same kind and architecture; named ``randomized:NAME`` (``randomized-SEED:NAME``), with a digest
        of its own. See `randomize` for its weights.

    Raises
    ------
    ModelError
        The model is a randomized one.
    """
    check_whole("randomized", least=0, seed=seed)
    split_prefix(prefix_of(seed) + model.name)
    return replace(
        model,
        model=randomize(copy.deepcopy(model.model), seed),
        name=prefix_of(seed) + model.name,
        digest=randomized_digest(model.digest, seed),
        path=None if model.path is None else prefix_of(seed) + model.path,
    )


def randomize(module: nn.Module, seed: int) -> nn.Module:
    """Give a model random weights in place, and return it.

    Every parameter outside the embeddings becomes a Gaussian with the mean and the standard deviation of its own
    entries; a constant one stays. Embeddings (every ``nn.Embedding``, and a head that is tied to one) are kept, so that
    rows still depend on their tokens. The numbers depend on the seed and the name of the parameter alone: not on the
    device, the number type or the other parameters.
    """
    kept = {id(p) for each in module.modules() if isinstance(each, nn.Embedding) for p in each.parameters()}
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if id(parameter) not in kept and parameter.is_floating_point():
                parameter.copy_(_gaussian_like(parameter, hashed_key("randomized", seed, name, n_bytes=7)))
    return module


def _gaussian_like(values: Tensor, seed: int) -> Tensor:
    """Return independent Gaussians with the mean and the standard deviation of `values`."""
    wide = values.detach().double()
    noise = torch.randn(values.shape, generator=torch.Generator().manual_seed(seed))
    return noise.to(values.device).mul_(wide.std(correction=0)).add_(wide.mean())
