"""Whether the contexts of a latent fall apart: clusters of them, compared with one bell-shaped cloud of their spread.

As in SigClust (Liu, Hayes, Nobel & Marron 2008): a cloud with the covariance of the contexts is cut into clusters in
the same way. What is cut as well as the contexts themselves has no clusters.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

MOST = 3
"""Largest number of clusters that is tried."""

CLOUDS = 3
"""Clouds that the contexts are compared with."""

LEAST_WINDOWS = 20
"""Fewer contexts than this are not cut."""

LEAST_FRACTION = 0.1
"""Part of the contexts that the second cluster must have."""

EXCESS = 0.05
"""By how much the silhouette of contexts must exceed that of every cloud."""

ITERATIONS = 8


@dataclass(frozen=True, eq=False)
class Separation:
    """Clusters of the contexts of several latents."""

    group: Tensor
    """int64 ``[n, windows]``: cluster of each; 0 for all where they do not fall apart, -1 where there is none."""
    excess: np.ndarray
    """Silhouette less the largest of the clouds'; NaN below `LEAST_WINDOWS`."""
    is_apart: np.ndarray
    """1 where it exceeds `EXCESS` and the clusters are large enough, else 0; NaN below `LEAST_WINDOWS`."""


def separation(vector: Tensor, there: Tensor, seed: int) -> Separation:
    """Cut the contexts ``[n, windows, d]`` of each latent, of which those `there` exist, into clusters."""
    enough = there.sum(1) >= LEAST_WINDOWS
    group = torch.where(there, 0, -1)
    excess = np.full(len(vector), np.nan)
    if not bool(enough.any()):
        return Separation(group, excess, excess.copy())
    x, mask = vector[enough], there[enough]
    count = mask.sum(1)[:, None, None].double()
    x = x * mask[..., None]
    centre = x.sum(1, keepdim=True) / count.float()
    centred = (x - centre) * mask[..., None]
    silhouette, best = _cut(x, mask)
    generator = torch.Generator().manual_seed(seed)
    clouds = torch.full_like(silhouette, -1.0)
    for _ in range(CLOUDS):
        mixed = torch.randn(len(x), x.shape[1], x.shape[1], generator=generator) @ centred / count.sqrt().float()
        cloud = (mixed + centre) * mask[..., None]
        clouds = torch.maximum(clouds, _cut(cloud, mask)[0])
    over = silhouette - clouds
    sizes = torch.stack([((best == k) & mask).sum(1) for k in range(MOST)], 1).sort(1, descending=True).values
    apart = (over > EXCESS) & (sizes[:, 1] >= LEAST_FRACTION * mask.sum(1))
    group[enough] = torch.where(mask, torch.where(apart[:, None], best, 0), -1)
    excess[enough.numpy()] = over.numpy()
    is_apart = np.full(len(vector), np.nan)
    is_apart[enough.numpy()] = apart.double().numpy()
    return Separation(group, excess, is_apart)


def _cut(x: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Return the best mean silhouette over 2 .. `MOST` clusters, and the cluster of each point."""
    gram = x @ x.transpose(1, 2)
    square = gram.diagonal(dim1=1, dim2=2)
    distance = (square[:, :, None] + square[:, None, :] - 2 * gram).clamp_min(0)
    best = torch.full((len(x),), -1.0)
    group = torch.zeros(mask.shape, dtype=torch.int64)
    for k in range(2, MOST + 1):
        found = _clusters(distance, mask, k)
        value = _silhouette(distance.sqrt(), mask, found, k)
        better = value > best + 1e-6
        best, group = torch.where(better, value, best), torch.where(better[:, None], found, group)
    return best, group


def _clusters(distance: Tensor, mask: Tensor, k: int) -> Tensor:
    """Return k-means clusters from squared distances alone; the first centres are points far from each other."""
    far = distance.masked_fill(~mask[:, None, :], 0.0)
    chosen = [far.sum(2).masked_fill(~mask, -1.0).argmax(1)]
    rows = torch.arange(len(distance))
    nearest = distance[rows, chosen[0]]
    for _ in range(k - 1):
        chosen.append(nearest.masked_fill(~mask, -1.0).argmax(1))
        nearest = torch.minimum(nearest, distance[rows, chosen[-1]])
    group = torch.stack([distance[rows, each] for each in chosen], 2).argmin(2)
    for _ in range(ITERATIONS):
        member = torch.nn.functional.one_hot(group, k).float() * mask[..., None]
        count = member.sum(1).clamp_min(1)
        to_all = distance @ member / count[:, None]
        within = (member * to_all).sum(1) / count / 2
        group = (to_all - within[:, None]).argmin(2)
    return group


def _silhouette(distance: Tensor, mask: Tensor, group: Tensor, k: int) -> Tensor:
    """Return the mean silhouette of the points."""
    member = torch.nn.functional.one_hot(group, k).float() * mask[..., None]
    count = member.sum(1)[:, None]
    total = distance @ member
    own = member.bool()
    inside = (total / (count - own.float()).clamp_min(1)).masked_fill(~own, 0.0).sum(2)
    outside = (total / count.clamp_min(1)).masked_fill(own | (count == 0), torch.inf).amin(2)
    value = (outside - inside) / torch.maximum(outside, inside).clamp_min(1e-12)
    alone = (member * (count == 1)).sum(2) > 0
    value = value.nan_to_num(0.0).masked_fill(alone | ~mask, 0.0)
    return value.sum(1) / mask.sum(1).clamp_min(1)
