"""``saekit plan``: what distributed training on GPUs costs, from formulas."""

from __future__ import annotations

import dataclasses

from ..errors import ConfigError
from ..training.settings import PlanSettings
from .command import command
from .console import print_json, print_table, tell
from .options import Json

HELP = """Print memory, traffic and time of a training step on every mesh of GPUs that fits, the fastest first.

\b
  saekit plan --d-in 3584 --latents 131072 --k 64 --gpus 8                  Gemma-2-9B, one layer
  saekit plan --d-in 3584 --latents 131072 --k 64 --gpus 64 --layers 42

Times come from formulas, at the full speed of H100 GPUs; nothing is measured. docs/scale.md has the formulas.
"""
SHOWN = 8
"""Number of meshes that are printed."""


@command(
    "Memory, traffic and time of distributed training.",
    HELP,
    flags=("d_in", "n_latents", "k", "batch_rows", "layers", "gpus"),
    named={"n_latents": "--latents", "layers": "--layers"},
)
def plan(*, settings: PlanSettings, json: Json = False) -> None:
    """Print what the fastest meshes cost."""
    from ..training.plan import meshes

    found = meshes(settings)
    if not found:
        raise ConfigError(
            f"plan: a mesh of {settings.gpus} GPUs must hold the SAEs and divide {settings.n_latents:,} latents and "
            f"{settings.batch_rows:,} rows; none does. Give more GPUs, fewer layers, or fewer latents."
        )
    if json:
        print_json({"meshes": [{**dataclasses.asdict(each), "seconds": each.seconds} for each in found]})
        return
    lines = [["groups × data × latents", "GB/GPU", "sent MB", "step ms", "wire ms", "model ms", "total ms", "rows/s"]]
    for each in found[:SHOWN]:
        lines.append(
            [
                f"{each.groups} × {each.data_size} × {each.latent_size}",
                f"{each.memory / 1e9:.1f}",
                f"{each.sent / 1e6:,.0f}",
                *(f"{1e3 * t:.1f}" for t in (each.compute_seconds, each.wire_seconds, each.model_seconds)),
                f"{1e3 * each.seconds:.1f}",
                f"{settings.batch_rows / each.seconds:,.0f}",
            ]
        )
    print_table(lines)
    best = found[0]
    tell(
        "\nFormulas at full speed, nothing overlapped. In saekit: as many ranks as GPUs of a group, with "
        f"--set latent_shards={best.latent_size}; a command for each group of layers."
    )
