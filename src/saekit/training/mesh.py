"""Ranks of a distributed run: a mesh of data × latents, and the sums that the ranks make together.

Rank (i, j) has the rows ``[i * B, (i + 1) * B)`` of a batch and the latents ``[n * j / T, n * (j + 1) / T)``: their
weights, moments and counters. Every function here returns what it was given where there is one rank, so that the losses
and the step have one text for both.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh

from ..errors import ConfigError
from ..ranks import are_launched, meet

SHARED = ("b_dec", "W_skip")
"""Parameters without a latent axis: every shard of the latents holds all of them."""

_GATHER = getattr(dist, "all_gather_single", None) or getattr(dist, "all_gather_into_tensor", None)
BITS = ((20, 11), (10, 10), (0, 10))
"""Shift and width of the digits of a positive float32, most significant first: one histogram each finds its rank."""


@dataclass(frozen=True)
class Mesh:
    """Where a rank stands. The default is a run of one process."""

    data_rank: int = 0
    data_size: int = 1
    latent_rank: int = 0
    latent_size: int = 1
    data: Any = None
    """Process group of the ranks with the same latents."""
    latents: Any = None
    """Process group of the ranks with the same rows."""

    @property
    def size(self) -> int:
        """Number of ranks."""
        return self.data_size * self.latent_size

    @property
    def rank(self) -> int:
        """Number of this rank."""
        return self.data_rank * self.latent_size + self.latent_rank

    def rows_of(self, x: Tensor) -> Tensor:
        """Return this rank's rows of a batch."""
        n = len(x) // self.data_size
        return x[self.data_rank * n : (self.data_rank + 1) * n]

    def latents_of(self, n_latents: int) -> slice:
        """Return this rank's latents of `n_latents`."""
        n = n_latents // self.latent_size
        return slice(self.latent_rank * n, (self.latent_rank + 1) * n)

    def prefix_of(self, size: int, n_own: int) -> int:
        """Return how many of this rank's `n_own` latents are among the first `size` of all."""
        return min(max(size - self.latent_rank * n_own, 0), n_own)


ALONE = Mesh()


# ---------------------------------------------------------------- sums with a gradient


class _Sum(torch.autograd.Function):
    """Sum over ranks; the gradient passes as it is, because what follows is the same on all of them."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Any, divisor: int) -> Tensor:
        total = x.detach().float() if x.dtype in (torch.bfloat16, torch.float16) else x.detach().clone()
        dist.all_reduce(total, group=group)
        return total / divisor if divisor > 1 else total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return grad, None, None


class _Entering(torch.autograd.Function):
    """The mirror of `_Sum`: as it is, and the gradient is the sum over ranks."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Any) -> Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        total = grad.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total, group=ctx.group)
        return total, None


def over_latents(mesh: Mesh, x: Tensor) -> Tensor:
    """Return the sum over the shards of the latents: reconstructions, penalties, numbers of codes."""
    return x if mesh.latent_size == 1 else _Sum.apply(x, mesh.latents, 1)


def over_rows(mesh: Mesh, x: Tensor) -> Tensor:
    """Return the mean over the ranks with other rows: of means over rows, that over all rows.

    The gradient is that of this rank's rows alone; `reduce_gradients` averages it.
    """
    return x if mesh.data_size == 1 else _Sum.apply(x, mesh.data, mesh.data_size)


def entering(mesh: Mesh, x: Tensor) -> Tensor:
    """Return a value that all shards of the latents take, `b_dec`: its gradient is the sum of theirs."""
    return x if mesh.latent_size == 1 else _Entering.apply(x, mesh.latents)


def least_over_latents(mesh: Mesh, number: int, device: torch.device) -> int:
    """Return the least of the shards' numbers."""
    if mesh.latent_size == 1:
        return number
    least = torch.tensor(number, device=device)
    dist.all_reduce(least, op=dist.ReduceOp.MIN, group=mesh.latents)
    return int(least)


# ---------------------------------------------------------------- selection


def ranks(mesh: Mesh, values: Tensor, k: int) -> Tensor | None:
    """Return the rank of each of this shard's largest values among those of all shards, from 0; None for one shard.

    Larger values first; of equal ones the lower latent. Exact: the k largest of a row are among the k largest of the
    shards.

    Parameters
    ----------
    values
        ``[n, m]``, from 0, the largest first, ``m <= k``.
    k
        Width that is sent; the same on all shards.
    """
    if mesh.latent_size == 1:
        return None
    n, m = values.shape
    own = torch.nn.functional.pad(values, (0, k - m)).contiguous()
    everyone = own.new_empty(mesh.latent_size, n, k)
    assert _GATHER is not None
    _GATHER(everyone.view(mesh.latent_size * n, k), own, group=mesh.latents)

    def before(those: Tensor, right: bool) -> Tensor:
        """Return how many of `those` are larger than each own value; with `right` as large at least."""
        negated = -those.transpose(0, 1).reshape(n, -1)
        return torch.searchsorted(negated.sort(1).values, -own, right=right)

    earlier = everyone[: mesh.latent_rank]
    ties = before(earlier, True) - before(earlier, False) if len(earlier) else 0
    among_equals = torch.arange(k, device=own.device) - before(own[None], False)
    return (before(everyone, False) + ties + among_equals)[:, :m]


def smallest_of_largest(mesh: Mesh, values: Tensor, count: int) -> Tensor:
    """Return the smallest of the `count` largest positive values on all ranks, of all where there are fewer; or 0.

    Parameters
    ----------
    values
        float32 of any shape, different ones on each rank.
    count
        How many are kept on all ranks together.
    """
    flat = values.reshape(-1)
    bits = flat[flat > 0].view(torch.int32).long()  # as numbers they sort like these bits
    found, left = torch.zeros((), dtype=torch.int64, device=values.device), torch.tensor(count, device=values.device)
    for shift, width in BITS:
        digits = (bits >> shift) & (2**width - 1)
        histogram = torch.bincount(digits, minlength=2**width)
        dist.all_reduce(histogram)
        from_top = histogram.flip(0).cumsum(0)
        left = torch.minimum(left, from_top[-1])  # only of the first digit there can be too few
        at = torch.searchsorted(from_top, left)
        if int(left) == 0:
            return flat.new_zeros(())
        left = left - (from_top[at] - histogram.flip(0)[at])
        digit = 2**width - 1 - at
        found = found + (digit << shift)
        bits = bits[digits == digit]
    return found.to(torch.int32).view(torch.float32)


# ---------------------------------------------------------------- sums of a step


def reduce_gradients(mesh: Mesh, gradients: dict[str, Tensor]) -> None:
    """Average gradients over the ranks with other rows, in place; of latents that did nothing, nothing is sent.

    Where few latents of every rank have a gradient, their numbers and rows are gathered and added in the order of the
    ranks; else everything is summed. See `sparse_pays`. Where the biases alone say that it does not pay, rows are not
    looked through.
    """
    if mesh.data_size == 1:
        return
    of_latents = {name: g.reshape(len(g), -1) for name, g in gradients.items() if name not in SHARED}
    dense = list(gradients)
    if of_latents:
        widths = [g.shape[1] for g in of_latents.values()]
        first = next(iter(of_latents.values()))
        n, used = len(first), None
        count = max(int(g.count_nonzero()) if width == 1 else 0 for g, width in zip(of_latents.values(), widths))
        if sparse_pays(n, sum(widths), count, mesh.data_size):
            used = torch.stack([(g != 0).any(1) for g in of_latents.values()]).any(0).nonzero()[:, 0]
            count = len(used)
        most = torch.tensor(count, device=first.device)
        dist.all_reduce(most, op=dist.ReduceOp.MAX, group=mesh.data)
        if used is not None and sparse_pays(n, sum(widths), int(most), mesh.data_size):
            whole = _sum_of_rows(mesh, of_latents, used, int(most)).div_(mesh.data_size)
            for name, part in zip(of_latents, whole.split(widths, dim=1)):
                gradients[name] = part.contiguous().view(gradients[name].shape)
            dense = [name for name in gradients if name in SHARED]
    for name in dense:
        total = gradients[name].contiguous()
        dist.all_reduce(total, group=mesh.data)
        gradients[name] = total.div_(mesh.data_size)


def sparse_pays(n_latents: int, width: int, used: int, data_size: int) -> bool:
    """Return whether the rows of the latents with a gradient are fewer bytes than all rows (ring algorithms, fp32).

    ``(D - 1) u (4 w + 4) < 8 n w (D - 1) / D``, where each of D ranks has n rows of width w, u of them not zero.
    """
    return used * (4 * width + 4) * data_size < 8 * n_latents * width


def _sum_of_rows(mesh: Mesh, gradients: dict[str, Tensor], used: Tensor, most: int) -> Tensor:
    """Return the sum over the ranks of gradients side by side, from `most` rows of each rank.

    A rank with fewer sends rows of 0 for latent 0.
    """
    first = next(iter(gradients.values()))
    at = used.new_zeros(most, dtype=torch.int32)
    at[: len(used)] = used.int()
    rows = first.new_zeros(most, sum(g.shape[1] for g in gradients.values()))
    torch.cat([g[used] for g in gradients.values()], dim=1, out=rows[: len(used)])
    places, everyone = gathered(mesh, at, "data").long(), gathered(mesh, rows, "data")
    total = first.new_zeros(len(first), rows.shape[1])
    for place, theirs in zip(places.split(most), everyone.split(most)):  # of one rank no latent comes twice
        total.index_add_(0, place, theirs)
    return total


def sum_over_rows(mesh: Mesh, x: Tensor) -> Tensor:
    """Return the sum over the ranks with other rows, without gradient."""
    return x if mesh.data_size == 1 else over_rows(mesh, x.detach()) * mesh.data_size


def norm_of(mesh: Mesh, gradients: dict[str, Tensor]) -> Tensor:
    """Return the norm of gradients of which all but those of `SHARED` are shards."""
    if mesh.latent_size == 1:
        return torch.nn.utils.get_total_norm(list(gradients.values()))
    sharded = torch.nn.utils.get_total_norm([g for name, g in gradients.items() if name not in SHARED]).pow(2)
    whole = sum(gradients[name].pow(2).sum() for name in SHARED if name in gradients)
    return (over_latents(mesh, sharded) + whole).sqrt()


def gathered(mesh: Mesh, x: Tensor, group: str = "latents") -> Tensor:
    """Return the shards of all ranks one after another: along the latents, or along the rows (``"data"``)."""
    size = getattr(mesh, f"{'latent' if group == 'latents' else 'data'}_size")
    if size == 1:
        return x
    whole = x.new_empty(size * len(x), *x.shape[1:])
    assert _GATHER is not None
    _GATHER(whole, x.contiguous(), group=getattr(mesh, group))
    return whole


# ---------------------------------------------------------------- joining


def join(latent_size: int = 1, device: str = "cpu") -> Mesh:
    """Return this process's place on a mesh of all ranks, which meet first where that has not happened.

    Parameters
    ----------
    latent_size
        Shards of the latents; the rest of the ranks is for rows.
    device
        Type of the device: gloo on a CPU, NCCL on a GPU (and gloo for what stays on the CPU).

    Raises
    ------
    ConfigError
        The number of ranks is no multiple of `latent_size`.
    """
    size = meet("train").size
    if latent_size < 1 or size % latent_size:
        raise ConfigError(
            f"train: `latent_shards` must divide the number of ranks, {size}; got {latent_size}. "
            "Start another number of processes, or give another number of shards."
        )
    mesh = init_device_mesh(device, (size // latent_size, latent_size), mesh_dim_names=("data", "latents"))
    return Mesh(
        data_rank=mesh.get_local_rank("data"),
        data_size=size // latent_size,
        latent_rank=mesh.get_local_rank("latents"),
        latent_size=latent_size,
        data=mesh.get_group("data"),
        latents=mesh.get_group("latents"),
    )


def launched(latent_size: int, device: str) -> Mesh:
    """Return the mesh of the ranks that a launcher (`torchrun`, say) started; of one process where none did."""
    if not are_launched():
        if latent_size > 1:
            raise ConfigError(
                f"train: `latent_shards` needs that many ranks; got {latent_size} and one process. "
                f"Start it with torchrun --nproc-per-node {latent_size} -m saekit train."
            )
        return ALONE
    return join(latent_size, device)
