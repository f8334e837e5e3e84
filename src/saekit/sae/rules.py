"""Selection rules: what turns pre-activations into codes. Each works on every row by itself.

Rules that look at a whole batch (BatchTopK) or need further weights (Gated) exist in training only and are frozen into
`JumpReLURule` by `saekit.sae.freeze`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor

from .. import kernels
from ..errors import ConfigError
from .codes import Codes

SIGNS = ("positive", "signed", "magnitude")


class Rule(Protocol):
    """What every rule offers. `take` keeps some of the n_latents latents (an index tensor), in the order given."""

    name: ClassVar[str]

    def codes(self, pre: Tensor) -> Codes:
        """Return the codes of pre-activations ``[n, n_latents]``."""
        ...

    def encode(self, u: Tensor, W_enc: Tensor, b_enc: Tensor, block_rows: int | None) -> Codes:
        """Encode centred rows ``[n, d_in]``."""
        ...

    def take(self, index: Tensor, n_latents: int) -> Rule:
        """Return the rule for some of the latents."""
        ...

    def fold(self, norms: Tensor) -> Rule:
        """Return the rule after the encoder was multiplied by `norms` ``[n_latents]``."""
        ...

    def settings(self) -> dict[str, Any]:
        """Return JSON-able settings."""
        ...

    def tensors(self) -> dict[str, Tensor]:
        """Return the tensors to be stored, with the latent axis first."""
        ...


@dataclass(frozen=True)
class ReLURule:
    """``codes = max(pre, 0)``."""

    name: ClassVar[str] = "relu"

    def codes(self, pre: Tensor) -> Codes:
        """Return the codes of pre-activations ``[n, n_latents]``."""
        return Codes.from_dense(pre.relu())

    def encode(self, u: Tensor, W_enc: Tensor, b_enc: Tensor, block_rows: int | None) -> Codes:
        """Encode centred rows ``[n, d_in]`` by the threshold kernel."""
        return Codes(*kernels.threshold_encode(u, W_enc, b_enc, None, block_rows=block_rows), W_enc.shape[0])

    def take(self, index: Tensor, n_latents: int) -> ReLURule:
        """Return the rule for some of the latents."""
        return self

    def fold(self, norms: Tensor) -> ReLURule:
        """Return the rule after the encoder was multiplied by `norms` ``[n_latents]``."""
        return self

    def settings(self) -> dict[str, Any]:
        """Return JSON-able settings."""
        return {}

    def tensors(self) -> dict[str, Tensor]:
        """Return the tensors to be stored, with the latent axis first."""
        return {}


@dataclass(frozen=True, eq=False)
class TopKRule:
    """Keep the `k` largest pre-activations of a row, then ReLU: one that is not positive has not fired.

    With `rank`, latents are chosen by ``pre * rank`` while the codes stay ``pre``: with the decoder norms as `rank`
    this is the decoder-norm-aware TopK of Llama Scope.
    """

    k: int
    """Latents kept per row, at least 1."""
    rank: Tensor | None = None
    """Positive weights ``[n_latents]`` for the choice; None for equal weights."""
    sign: str = "positive"
    """``positive``: ReLU after the choice. ``signed``: none, so a negative pre-activation among the k largest is a code
    (saev, circuit-tracer). ``magnitude``: the k largest absolute values, sign kept (AbsTopK)."""
    threshold: Tensor | None = None
    """``[n_latents]``, which a code must exceed besides being among the k largest: k is a cap on thresholds then, as in
    latent-sae; None for none."""
    name: ClassVar[str] = "topk"

    def __post_init__(self) -> None:
        _check_k(self.k, "TopKRule")
        if self.sign not in SIGNS:
            raise ConfigError(f"TopKRule: `sign` must be one of {', '.join(SIGNS)}; got {self.sign!r}.")
        if self.threshold is not None and self.sign != "positive":
            raise ConfigError(f"TopKRule: with a `threshold` codes must be positive; got sign={self.sign!r}.")

    def codes(self, pre: Tensor) -> Codes:
        """Return the codes of pre-activations ``[n, n_latents]``."""
        score = pre if self.rank is None else pre * self.rank
        chosen = (score.abs() if self.sign == "magnitude" else score).topk(self.k, dim=-1).indices
        values = self._passed(pre.gather(1, chosen), chosen)
        return Codes.from_topk(values, chosen, pre.shape[1], signed=self.sign != "positive")

    def _passed(self, values: Tensor, chosen: Tensor) -> Tensor:
        """Return the chosen pre-activations, 0 where they do not exceed their threshold."""
        return values if self.threshold is None else values * (values > self.threshold[chosen])

    def encode(self, u: Tensor, W_enc: Tensor, b_enc: Tensor, block_rows: int | None) -> Codes:
        """Encode centred rows ``[n, d_in]`` by the top-k kernel; signed codes block by block."""
        if self.sign != "positive":
            return _blockwise(self.codes, u, W_enc, b_enc, block_rows)
        values, indices = kernels.topk_encode(u, W_enc, b_enc, self.k, rank=self.rank, block_rows=block_rows)
        return Codes.from_topk(self._passed(values, indices), indices, W_enc.shape[0])

    def take(self, index: Tensor, n_latents: int) -> TopKRule:
        """Return the rule for some of the latents: it selects among those kept, so k is at most their number."""
        rank, threshold = (None if t is None else t[index] for t in (self.rank, self.threshold))
        return replace(self, k=min(self.k, len(index)), rank=rank, threshold=threshold)

    def fold(self, norms: Tensor) -> TopKRule:
        """Return the rule that makes the same choice after the encoder was multiplied by `norms`."""
        threshold = None if self.threshold is None else self.threshold * norms
        return replace(self, rank=_folded_rank(self.rank, norms), threshold=threshold)

    def settings(self) -> dict[str, Any]:
        """Return JSON-able settings."""
        return {"k": self.k} if self.sign == "positive" else {"k": self.k, "sign": self.sign}

    def tensors(self) -> dict[str, Tensor]:
        """Return the tensors to be stored, with the latent axis first."""
        named = {"rank": self.rank, "threshold": self.threshold}
        return {name: t for name, t in named.items() if t is not None}


@dataclass(frozen=True, eq=False)
class JumpReLURule:
    """``codes = pre where pre > max(threshold, 0), else 0`` (strictly greater)."""

    threshold: Tensor
    """``[n_latents]``, in the units of the pre-activations."""
    name: ClassVar[str] = "jumprelu"

    def codes(self, pre: Tensor) -> Codes:
        """Return the codes of pre-activations ``[n, n_latents]``."""
        return Codes.from_dense(pre.relu() * (pre > self.threshold))

    def encode(self, u: Tensor, W_enc: Tensor, b_enc: Tensor, block_rows: int | None) -> Codes:
        """Encode centred rows ``[n, d_in]`` by the threshold kernel."""
        return Codes(*kernels.threshold_encode(u, W_enc, b_enc, self.threshold, block_rows=block_rows), W_enc.shape[0])

    def take(self, index: Tensor, n_latents: int) -> JumpReLURule:
        """Return the rule for some of the latents."""
        return JumpReLURule(self.threshold[index])

    def fold(self, norms: Tensor) -> JumpReLURule:
        """Return the rule with thresholds multiplied by `norms`, as the encoder was."""
        return JumpReLURule(self.threshold * norms)

    def settings(self) -> dict[str, Any]:
        """Return JSON-able settings."""
        return {}

    def tensors(self) -> dict[str, Tensor]:
        """Return the tensors to be stored, with the latent axis first."""
        return {"threshold": self.threshold}


@dataclass(frozen=True, eq=False)
class GroupMaxRule:
    """Latents are in groups; the largest pre-activation of each group is kept, then ReLU.

    Without `group` the latents form `k` contiguous groups of equal size (sparsify's ``groupmax``).
    """

    k: int
    """Number of groups, at least 1."""
    group: Tensor | None = None
    """Group of each latent, ``[n_latents]`` int64; None for contiguous groups."""
    rank: Tensor | None = None
    """Positive weights ``[n_latents]`` for the choice within a group; None for equal weights."""
    name: ClassVar[str] = "groupmax"

    def __post_init__(self) -> None:
        _check_k(self.k, "GroupMaxRule")

    def codes(self, pre: Tensor) -> Codes:
        """Return the codes of pre-activations ``[n, n_latents]``."""
        members = _group_members(self._groups(pre.shape[1], pre.device))  # [groups, largest group]
        ranked = pre if self.rank is None else pre * self.rank
        grouped = ranked[:, members.clamp(min=0)].masked_fill(members < 0, -torch.inf)
        best = grouped.argmax(dim=-1)  # [n, groups]
        chosen = members.expand(len(pre), *members.shape).gather(2, best[:, :, None])[:, :, 0]
        return Codes.from_topk(pre.gather(1, chosen), chosen, pre.shape[1])

    def encode(self, u: Tensor, W_enc: Tensor, b_enc: Tensor, block_rows: int | None) -> Codes:
        """Encode centred rows ``[n, d_in]``, block by block."""
        return _blockwise(self.codes, u, W_enc, b_enc, block_rows)

    def take(self, index: Tensor, n_latents: int) -> GroupMaxRule:
        """Return the rule for some of the latents: they stay in their groups; a group without latents is gone."""
        kept = self._groups(n_latents, index.device)[index]
        return GroupMaxRule(len(kept.unique()), kept, None if self.rank is None else self.rank[index])

    def fold(self, norms: Tensor) -> GroupMaxRule:
        """Return the rule that makes the same choice after the encoder was multiplied by `norms`."""
        return GroupMaxRule(self.k, self.group, _folded_rank(self.rank, norms))

    def settings(self) -> dict[str, Any]:
        """Return JSON-able settings."""
        return {"k": self.k}

    def tensors(self) -> dict[str, Tensor]:
        """Return the tensors to be stored, with the latent axis first."""
        named = {"group": self.group, "rank": self.rank}
        return {name: t for name, t in named.items() if t is not None}

    def _groups(self, n_latents: int, device: torch.device) -> Tensor:
        return self.group if self.group is not None else contiguous_groups(n_latents, self.k).to(device)


RULES: dict[str, type[ReLURule] | type[TopKRule] | type[JumpReLURule] | type[GroupMaxRule]] = {
    rule.name: rule for rule in (ReLURule, TopKRule, JumpReLURule, GroupMaxRule)
}
"""Every rule by the name it has in files."""


def contiguous_groups(n_latents: int, k: int) -> Tensor:
    """Return the group of each latent, ``[n_latents]`` int64, for `k` contiguous groups of equal size.

    Raises
    ------
    ConfigError
        n_latents is not a multiple of k.
    """
    if n_latents % k:
        raise ConfigError(
            f"GroupMaxRule: `n_latents` must be a multiple of `k`; got n_latents={n_latents}, k={k}. "
            "Give the group of each latent as `group`."
        )
    return torch.arange(n_latents) // (n_latents // k)


def _group_members(group: Tensor) -> Tensor:
    """Return the latents of each group, ``[groups, largest group]``, in ascending order, padded with -1."""
    _, group, sizes = group.unique(return_inverse=True, return_counts=True)
    order = group.argsort(stable=True)
    starts = sizes.cumsum(0) - sizes
    place = torch.arange(len(group), device=group.device) - torch.repeat_interleave(starts, sizes)
    members = torch.full((len(sizes), int(sizes.max())), -1, device=group.device)
    members[group[order], place] = order
    return members


def _blockwise(
    codes: Callable[[Tensor], Codes], u: Tensor, W_enc: Tensor, b_enc: Tensor, block_rows: int | None
) -> Codes:
    """Encode all rows, one dense block of pre-activations at a time."""
    blocks = u.split(block_rows or kernels.block_rows_for(W_enc.shape[0], u.device)) if len(u) else (u,)
    return Codes.cat([codes(torch.addmm(b_enc, block, W_enc.T)) for block in blocks])


def _folded_rank(rank: Tensor | None, norms: Tensor) -> Tensor | None:
    """Return weights that undo `norms` in the choice; None when all weights are equal."""
    folded = (torch.ones_like(norms) if rank is None else rank) / norms
    return None if bool((folded == folded[0]).all()) else folded


def _check_k(k: int, where: str) -> None:
    if not isinstance(k, int) or k < 1:
        raise ConfigError(f"{where}: `k` must be a whole number of at least 1; got {k!r}.")
