"""Settings of a training run. Nothing heavy is imported here: the command line makes its help from this class."""

from __future__ import annotations

from dataclasses import dataclass

from ..errors import ConfigError
from ..settings import check_whole, is_number, suggest_keywords

PRECISIONS = ("fp32", "bf16")


@suggest_keywords
@dataclass(frozen=True, kw_only=True)
class TrainSettings:
    """How a run is done: nothing here says what is trained, except for the order of the rows and the precision."""

    batch_rows: int | None = None
    """Rows per step [the power of two that gives about 1,000 steps, from 256 to 4096]."""
    data_seed: int = 0
    """Random seed of the order of the rows [0]."""
    precision: str = "fp32"
    """``fp32``, or ``bf16``: matrix products in bfloat16 with fp32 master weights [fp32]."""
    device: str | None = None
    """Device to train on, ``cpu`` or ``cuda`` [cuda if there is one]."""
    log_every: int | None = None
    """Steps between log records [1% of the run, from 1 to 100]."""
    checkpoint_every: int | None = None
    """Steps between checkpoints [10% of the run, at most 1000]."""
    snapshots: int = 0
    """Number of snapshots of every SAE that are kept in ``snapshots``: at a half, a quarter, … of the steps [0]."""
    step: str | None = None
    """Implementation of the step, ``plain`` or ``fused``; they differ in the rounding of sums only [fused where the
    compiled kernels run]."""

    latent_shards: int = 1
    """Ranks of a distributed run that the latents of each SAE are split over; the rest of them split the rows [1]."""

    def __post_init__(self) -> None:
        check_whole(
            "TrainSettings",
            latent_shards=self.latent_shards,
            batch_rows=self.batch_rows,
            log_every=self.log_every,
            checkpoint_every=self.checkpoint_every,
        )
        check_whole("TrainSettings", least=0, data_seed=self.data_seed, snapshots=self.snapshots)
        if self.precision not in PRECISIONS:
            raise ConfigError(f"TrainSettings: `precision` must be 'fp32' or 'bf16'; got {self.precision!r}.")

    def log_interval(self, total_steps: int) -> int:
        """Return the steps between log records of a run: about 100 records, but a look at least every 100 steps."""
        return self.log_every or min(max(total_steps // 100, 1), 100)

    def snapshot_steps(self, total_steps: int) -> list[int]:
        """Return the steps after which snapshots are kept: a half, a quarter, … of a run, as many as there are.

        >>> TrainSettings(snapshots=3).snapshot_steps(1000)
        [125, 250, 500]
        """
        steps = {total_steps >> power for power in range(1, self.snapshots + 1)}
        return sorted(steps - {0, total_steps})

    def checkpoint_interval(self, total_steps: int) -> int:
        """Return the steps between checkpoints of a run: a kill costs at most a tenth of it, and 1,000 steps."""
        return self.checkpoint_every or min(max(total_steps // 10, 1), 1000)


@suggest_keywords
@dataclass(frozen=True, kw_only=True)
class PlanSettings:
    """A distributed run on GPUs, as far as its cost depends on it. Nothing is required of this machine."""

    d_in: int = 3584
    """Width of a row [3584]."""
    n_latents: int = 131072
    """Number of latents of each SAE [131072]."""
    k: int = 64
    """Latents per row [64]."""
    batch_rows: int = 4096
    """Rows per step, of all ranks together [4096]."""
    layers: int = 1
    """Number of layers, with one SAE each [1]."""
    gpus: int = 8
    """Number of GPUs [8]."""
    node: int = 8
    """Number of GPUs in a node [8]."""
    model_parameters: float = 9.24e9
    """Parameters of the language model that makes the rows; 0 for rows that are stored [9.24e9]."""
    memory: float = 80e9
    """Memory of a GPU. Unit: bytes [80e9]."""
    flops: float = 700e12
    """Speed of matrix products of a GPU. Unit: 1/s [700e12]."""
    bandwidth: float = 3.35e12
    """Bandwidth of the memory of a GPU. Unit: bytes/s [3.35e12]."""
    link: float = 450e9
    """Bandwidth between GPUs of a node. Unit: bytes/s [450e9]."""
    network: float = 50e9
    """Bandwidth of a GPU to other nodes. Unit: bytes/s [50e9]."""

    def __post_init__(self) -> None:
        names = ("d_in", "n_latents", "k", "batch_rows", "layers", "gpus", "node")
        check_whole("PlanSettings", **{name: getattr(self, name) for name in names})
        for name in ("memory", "flops", "bandwidth", "link", "network"):
            if not (is_number(getattr(self, name)) and getattr(self, name) > 0):
                raise ConfigError(f"PlanSettings: `{name}` must be a positive number; got {getattr(self, name)!r}.")
        if not (is_number(self.model_parameters) and self.model_parameters >= 0):
            raise ConfigError(
                f"PlanSettings: `model_parameters` must be a number from 0; got {self.model_parameters!r}."
            )
        if self.k > self.n_latents:
            raise ConfigError(f"PlanSettings: `k` must be at most n_latents={self.n_latents}; got {self.k}.")
