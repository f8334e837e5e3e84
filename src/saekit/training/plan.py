"""What a distributed run costs: memory, bytes sent and time of a step, as formulas; and the best mesh for some GPUs.

With n latents, width d, k codes per row, B rows per step, D ranks that split the rows and T that split the latents::

    state     16 (2nd/T + n/T + d) + 8 nd/T + block                 weights, gradient, two moments; of one layer's
                                                                    gradient two more while it is made or projected;
                                                                    a block of pre-activations
    products  2 (B/D) n/T d                                         at the speed of matrix products
    passes    4 (B/D) n/T + 16 (B/D) k d/T + (8 + 20 + 56) n/T d    bytes through memory: product, pairs, gradients,
                                                                    projection and unit rows, Adam
    sent      `bytes_per_step`, with gradients of all latents; those of the u used ones are sent where that is less
    model     2 parameters B / GPUs                                 its forward pass, at the speed of products

With L layers on a rank the 12 bytes of weights and moments are there L times. ``block`` is at most ``4 (B/D) n/T`` and
what `saekit.kernels.reference.block_bytes_on` says. All this is the plain step of the top-k family. The others have up
to `DENSE_ARRAYS` arrays of half a block each, at another time than the 4 bytes of the projection's gradients, and five
products for one.

Times are those of hardware at full speed and nothing overlapped; only `bytes_per_step` was measured, on gloo.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from ..kernels.reference import CUDA_PART
from .dense_autograd import BLOCK_PART
from .settings import PlanSettings

DENSE_ARRAYS = 7
"""Maximum number of arrays of some rows by all latents that a step of ReLU, P-anneal, JumpReLU or Gated holds: codes,
gradients, and what both are made of."""


@dataclass(frozen=True)
class MeshCost:
    """What one mesh costs."""

    groups: int
    """Groups of ranks that train different layers."""
    data_size: int
    """Ranks of a group that split the rows."""
    latent_size: int
    """Ranks of a group that split the latents."""
    memory: float
    """Weights, moments, what one gradient takes and a block of pre-activations on a GPU. Unit: bytes."""
    sent: float
    """Sent by a rank in a step. Unit: bytes."""
    compute_seconds: float
    """Training step without messages."""
    wire_seconds: float
    """Messages of a step."""
    model_seconds: float
    """Forward pass of the language model over the rows of a step."""

    @property
    def seconds(self) -> float:
        """A whole step, nothing overlapped."""
        return self.compute_seconds + self.wire_seconds + self.model_seconds


def bytes_per_step(
    n_latents: int,
    d_in: int,
    k: int,
    batch_rows: int,
    data_size: int,
    latent_size: int,
    k_aux: int = 0,
    used: float | None = None,
) -> float:
    """Return the bytes that one rank sends in a step of TopK (ring algorithms, fp32).

    Parameters
    ----------
    n_latents, d_in, k, batch_rows
        Sizes of the SAE and of the step, on all ranks together.
    data_size, latent_size
        Ranks that split the rows, and ranks that split the latents.
    k_aux
        Dead latents per row in AuxK; 0 where none are dead.
    used
        Most latents of a rank that have a gradient in the step; None: all of them.
    """
    return sum(_sent(n_latents, d_in, k, batch_rows, data_size, latent_size, k_aux, used))


def _sent(
    n_latents: int,
    d_in: int,
    k: int,
    batch_rows: int,
    data_size: int,
    latent_size: int,
    k_aux: int = 0,
    used: float | None = None,
) -> tuple[float, float]:
    """Return the bytes sent over the latents, and over the rows."""
    n, d, rows = n_latents / latent_size, d_in, batch_rows / data_size
    latent_part, data_part = (latent_size - 1) / latent_size, (data_size - 1) / data_size
    candidates = 4 * rows * (k + k_aux) * (latent_size - 1)
    reconstructions = 8 * rows * d * latent_part * (2 if k_aux else 1)
    b_dec = 8 * (d + 1) * latent_part
    all_rows = 8 * (2 * n * d + n) * data_part
    rows_used = (data_size - 1) * (n if used is None else used) * (4 * (2 * d + 1) + 4)
    gradients = min(all_rows, rows_used) + 8 * d * data_part
    fired = 8 * n * data_part
    means = 8 * 2 * d * data_part if k_aux else 0
    return candidates + reconstructions + b_dec, gradients + fired + means


def held_bytes(n_latents: float, d_in: int, rows: float, layers: int, block: float, *, dense: bool = False) -> float:
    """Return the bytes of a step in plain torch on one rank.

    Parameters
    ----------
    n_latents, d_in, rows, layers
        What the rank has.
    block
        Upper bound of a block of pre-activations. Unit: bytes.
    dense
        Whether codes are dense: an upper bound for ReLU, P-anneal, JumpReLU and Gated.
    """
    parameters, codes = 2 * n_latents * d_in + n_latents + d_in, 4 * rows * n_latents
    held = 12 * parameters * layers + 8 * n_latents * d_in
    if dense:
        return held + max(4 * parameters, DENSE_ARRAYS * min(block / BLOCK_PART, codes))
    return held + 4 * parameters + min(block, codes)


def cost_of(settings: PlanSettings, groups: int, data_size: int, latent_size: int) -> MeshCost:
    """Return what one mesh costs; shards of the latents are neighbours, so they fill nodes first."""
    s, rows = settings, settings.batch_rows / data_size
    n, d, layers = s.n_latents / latent_size, s.d_in, -(-s.layers // groups)
    products = 2 * rows * n * d / s.flops
    passes = (4 * rows * n + 16 * rows * s.k * d / latent_size + 84 * n * d) / s.bandwidth
    over_latents, over_rows = _sent(s.n_latents, d, s.k, s.batch_rows, data_size, latent_size)
    wire = over_latents / (s.link if latent_size <= s.node else s.network)
    wire += over_rows / (s.link if latent_size * data_size <= s.node else s.network)
    return MeshCost(
        groups=groups,
        data_size=data_size,
        latent_size=latent_size,
        memory=held_bytes(n, d, rows, layers, s.memory / CUDA_PART),
        sent=layers * (over_latents + over_rows),
        compute_seconds=layers * (products + passes),
        wire_seconds=layers * wire,
        model_seconds=2 * s.model_parameters * s.batch_rows / s.gpus / s.flops,
    )


def meshes(settings: PlanSettings) -> list[MeshCost]:
    """Return all meshes that fit into memory, the fastest first."""
    found = [cost_of(settings, *sizes) for sizes in _factors(settings)]
    return sorted(
        (each for each in found if each.memory <= settings.memory),
        key=lambda each: (each.seconds, each.latent_size, each.groups),
    )


def _factors(settings: PlanSettings) -> Iterator[tuple[int, int, int]]:
    """Yield groups × data × latents that use every GPU, and divide latents and rows."""
    for groups in range(1, min(settings.layers, settings.gpus) + 1):
        if settings.gpus % groups:
            continue
        ranks = settings.gpus // groups
        for latent_size in range(1, ranks + 1):
            data_size = ranks // latent_size
            if ranks % latent_size == 0 and not (settings.n_latents % latent_size or settings.batch_rows % data_size):
                yield groups, data_size, latent_size
