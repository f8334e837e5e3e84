"""Run by every rank of `test_mesh`: ten steps on each mesh, compared with ten steps of one process."""

from __future__ import annotations

import json

import torch
import torch.distributed as dist

from fixtures.learners import ALL, new, rows
from saekit.training.config import Matryoshka, ReLU, TopK
from saekit.training.learner import shard, tensors_of, whole
from saekit.training.mesh import ALONE, join
from saekit.training.step import plain_step

STEPS = 10
LR = 1e-3
MORE = [
    TopK(24, k=3, clip=0.01, dead_after_rows=100),
    Matryoshka(24, k=12, dead_after_rows=100),
    ReLU(24, l1=2.0, resample=True, dead_after_rows=100),
]


def trained(config, mesh, dtype):
    """Return a learner after ten steps, whole, and the statistics of the last one."""
    learner = new(config, steps=40)
    learner.resolved = learner.resolved.__class__(**{**vars(learner.resolved), "lr": LR})
    for group in (learner.parameters, learner.first_moments, learner.second_moments, learner.state):
        group |= {key: t.to(dtype) for key, t in group.items()}
    learner.center, learner.scale = learner.center.to(dtype), learner.scale.to(dtype)
    shard(learner, mesh)
    for x in rows(STEPS):
        statistics = plain_step(learner, mesh.rows_of(x.to(dtype)))
    return whole(learner), statistics


def compare(config, mesh, reference, dtype):
    learner, statistics = trained(config, mesh, dtype)
    alone, expected = reference
    far, counts = 0.0, True
    theirs = tensors_of(alone)
    for key, t in tensors_of(learner).items():
        if t.is_floating_point():
            far = max(far, float((t - theirs[key]).abs().max())) if key.startswith("parameters") else far
        else:
            counts &= bool(torch.equal(t, theirs[key]))
    logged = {
        key: (float(getattr(statistics, key)), float(getattr(expected, key)))
        for key in ("rows", "loss", "error", "fired", "dead", "grad_norm")
    }
    logged |= {key: (float(value), float(expected.parts[key])) for key, value in statistics.parts.items()}
    b_dec = [torch.empty_like(learner.parameters["b_dec"]) for _ in range(mesh.size)]
    dist.all_gather(b_dec, learner.parameters["b_dec"])
    return {"far": far, "counts": counts, "logged": logged, "same": all(torch.equal(b_dec[0], b) for b in b_dec)}


def main():
    found = {}
    meshes = {}
    for shards in (1, 2, 4):
        meshes[shards] = join(shards)
    for dtype in (torch.float32, torch.float64):
        for index, config in enumerate([*ALL, *MORE]):
            if dtype == torch.float64 and not hasattr(config, "k"):
                continue  # dense losses are computed in float32
            reference = trained(config, ALONE, dtype)
            for shards, mesh in meshes.items():
                key = f"{index} {config.arch} latents {shards} {str(dtype).removeprefix('torch.')}"
                found[key] = compare(config, mesh, reference, dtype)
    if dist.get_rank() == 0:
        print(json.dumps(found))
    dist.barrier()
    dist.destroy_process_group()


main()
