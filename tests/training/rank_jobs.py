"""Run by `test_mesh` in a process of its own: every job on several ranks, results as JSON."""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
import time
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from fixtures.learners import ALL, new, new_transcoder, rows, target_of
from fixtures.ranks import bytes_sent, fork_ranks, import_all
from fixtures.training_runs import source
from saekit import ranks as saekit_ranks
from saekit.training import checkpoint, dense_autograd, mesh
from saekit.training.config import BatchTopK, JumpReLU, Matryoshka, ReLU, TopK
from saekit.training.defaults import resolve
from saekit.training.learner import initialize_learner, shard, tensors_of, whole
from saekit.training.loop import train
from saekit.training.mesh import ALONE, join
from saekit.training.plan import bytes_per_step
from saekit.training.settings import TrainSettings
from saekit.training.step import STEPS as STEPS_BY_NAME
from saekit.training.step import plain_step

STEPS, LR = 10, 1e-3
MORE = [
    TopK(24, k=3, clip=0.01, dead_after_rows=100),
    Matryoshka(24, k=12, dead_after_rows=100),
    ReLU(24, l1=2.0, resample=True, dead_after_rows=100),
    JumpReLU(24, target_l0=3, density=0.5, l2=0.1, dead_after_rows=100),
    TopK(24, k=3, k_start=12, aligned=True, dead_after_rows=100),
    TopK(24, k=3, control="soft-frozen-decoder", dead_after_rows=100),
    TopK(24, k=3, skip="zero", dead_after_rows=100),
    TopK(24, k=3, sign="magnitude", incoherence=0.3, dead_after_rows=100),
    Matryoshka(24, k=3, sizes=(5, 16, 24), detached=True, aux_per_size=True, dead_after_rows=100),
    BatchTopK(24, k=3, parts=(3, 5), dead_after_rows=100),
    JumpReLU(24, target_l0=3, tanh=0.02, pre_activation=1e-3, dead_after_rows=100),
]
CONFIGS = [TopK(24, k=3), BatchTopK(24, k=3)]
SETTINGS = TrainSettings(batch_rows=64, checkpoint_every=4, log_every=2, step="plain")


# ---------------------------------------------------------------- ten steps


def trained(config, place, dtype, lr=LR):
    """Return a learner after ten steps, whole, and the statistics of the steps."""
    learner = (new_transcoder if config.skip else new)(config, steps=40)
    learner.resolved = replace(learner.resolved, lr=lr)
    learner.parameters["b_enc"][::5] -= 10  # some must be dead
    for group in (learner.parameters, learner.first_moments, learner.second_moments, learner.state):
        group |= {key: t.to(dtype) for key, t in group.items()}
    learner.center, learner.scale = learner.center.to(dtype), learner.scale.to(dtype)
    shard(learner, place)
    batches = ([x, target_of(x)] if config.skip else [x] for x in rows(STEPS))
    statistics = [plain_step(learner, *(place.rows_of(each.to(dtype)) for each in batch)) for batch in batches]
    return whole(learner), statistics


def compared(config, place, alone, dtype, lr=LR):
    (learner, statistics), (other, expected) = trained(config, place, dtype, lr), alone
    mine, theirs = tensors_of(learner), tensors_of(other)
    far = max(float((mine[key] - theirs[key]).abs().max()) for key in mine if key.startswith("parameters"))
    whole_numbers = [key for key, t in mine.items() if not t.is_floating_point()]
    last, expected_last = statistics[-1], expected[-1]
    logged = {name: [float(getattr(last, name)), float(getattr(expected_last, name))] for name in LOGGED}
    logged |= {name: [float(value), float(expected_last.parts[name])] for name, value in last.parts.items()}
    b_dec = [torch.empty_like(learner.parameters["b_dec"]) for _ in range(place.size)]
    dist.all_gather(b_dec, learner.parameters["b_dec"])
    return {
        "far": far,
        "counters": all(torch.equal(mine[key], theirs[key]) for key in whole_numbers),
        "logged": logged,
        "same_b_dec": all(torch.equal(b_dec[0], each) for each in b_dec),
        "dead": max(float(each.dead) for each in statistics),
    }


LOGGED = ("rows", "loss", "error", "fired", "dead", "grad_norm")


def steps(rank):
    meshes = {shards: join(shards) for shards in (1, 2, 4)}
    found = {}
    # dense codes in blocks of a few rows, of which the ranks' devices would take different numbers
    dense_autograd.block_rows_of = lambda *_: 5 + rank
    for index, config in enumerate([*ALL, *MORE]):
        alone = trained(config, ALONE, torch.float32)
        # both axes at once for all; each alone for a selection over rows, one over the batch, one that has a target
        for shards in (1, 2, 4) if index < 3 else (2,):
            key = f"{index} {config.arch} {shards} float32"
            found[key] = compared(config, meshes[shards], alone, torch.float32)
    # in float32 rounding moves pairs across thresholds at a high rate
    steep = JumpReLU(24, target_l0=3, tanh=0.02, pre_activation=1e-3, dead_after_rows=100)
    cases = [(config, 2, LR) for config in (ALL[0], *ALL[2:6], ALL[-1])]
    for config, shards, lr in (*cases, (steep, 1, 0.016)):
        alone = trained(config, ALONE, torch.float64, lr)
        found[f"{len(found)} {config.arch} {shards} float64"] = compared(
            config, meshes[shards], alone, torch.float64, lr
        )
    found["bytes"] = [
        traffic(place, n, k, aux)
        for place in meshes.values()
        for n, k, aux in ((1024, 8, False), (1024, 8, True), (4096, 4, False))
    ]
    found["reduced"] = reduced(meshes[1])
    dist.barrier()
    return found


def reduced(place):
    """Return how far gradients of few latents are from those that are summed whole, and whether ranks have the same."""
    found = []
    for pays in (True, False):
        g = torch.Generator().manual_seed(place.rank)
        used = torch.randperm(96, generator=g)[: 5 + place.rank]
        gradients = {"W_enc": torch.zeros(96, 7), "b_enc": torch.zeros(96), "b_dec": torch.ones(7) * place.rank}
        for name in ("W_enc", "b_enc"):
            gradients[name][used] = torch.randn(gradients[name][used].shape, generator=g)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(mesh, "sparse_pays", lambda *_, pays=pays: pays)
            mesh.reduce_gradients(place, gradients)
        found.append(gradients)
    everyone = [None] * place.size
    dist.all_gather_object(everyone, {name: each.tolist() for name, each in found[0].items()})
    far = max(float((found[0][name] - found[1][name]).abs().max()) for name in found[0])
    return {"far": far, "same": all(each == everyone[0] for each in everyone), "size": float(found[0]["W_enc"].norm())}


def traffic(place, n, k, aux):
    """Return the bytes that this rank sends in a step, the formula, and whether the rows of few latents were sent."""
    d, batch, seen = 64, 512, []
    pays = mesh.sparse_pays
    config = TopK(n, k=k, dead_after_rows=1 if aux else None)
    x = torch.randn(batch, d, generator=torch.Generator().manual_seed(0))
    learner = initialize_learner(
        config, 0, resolve(config, d, 40, batch), bias=x.mean(0), scale=None, sample=x, device="cpu"
    )
    shard(learner, place)
    learner.rows_since_fired.fill_(1 if aux else 0)
    learner.step = 1 if aux else 0
    dist.barrier()
    before = bytes_sent()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mesh, "sparse_pays", lambda *given: seen.append((given[2], pays(*given))) or seen[-1][1])
        plain_step(learner, place.rows_of(x))
    sent = torch.tensor(float(bytes_sent() - before))
    dist.all_reduce(sent)
    k_aux = learner.resolved.k_aux if aux else 0
    used, sparse = seen[-1] if seen else (None, False)
    formula = torch.tensor(bytes_per_step(n, d, k, batch, place.data_size, place.latent_size, k_aux, used))
    dist.all_reduce(formula)  # shards of the latents differ in how many are used
    return [float(sent) / place.size, float(formula) / place.size, sparse]


# ---------------------------------------------------------------- runs


def run(out, latent_shards=1, *, resume=False, callbacks=(), **more):
    """Train, and return the SAEs as lists of numbers."""
    settings = replace(SETTINGS, latent_shards=latent_shards)
    saes = train(
        CONFIGS, source(1280), out=out, resume=resume, settings=settings, callbacks=callbacks, progress=False, **more
    )
    return [{name: t.tolist() for name, t in sae.tensors().items()} for sae in saes]


def dies_at(step):
    def log(record):
        if record["step"] == step:
            raise OSError("no space left on this disk")

    return [log]


def kills_itself(rank):
    def step(learner, x):
        if rank == 1 and learner.step == 12:
            os.kill(os.getpid(), signal.SIGKILL)
        return plain_step(learner, x)

    STEPS_BY_NAME["plain"] = step
    run(None)


def with_nan(rank):
    def step(learner, x):
        return plain_step(learner, x * float("nan") if rank == 1 and learner.step == 5 else x)

    STEPS_BY_NAME["plain"] = step
    run(None)


def full_disk(rank, folder):
    def write(*args, **more):
        raise OSError(28, "No space left on device")

    checkpoint.write = write
    run(folder)


def waits_for_another(rank):
    os.environ["WORLD_SIZE"] = "2"
    saekit_ranks.START_TIMEOUT = timedelta(seconds=1)
    run(None)


def refused(rank):
    """Return what is said about calls that cannot work, one after another."""
    cases = {
        "settings": lambda: train(TopK(24, k=3, lr=1e-3 * (1 + rank)), source(1280), settings=SETTINGS),
        "rows": lambda: train(CONFIGS, source(1280 + 64 * rank), settings=SETTINGS, tokens=1280),
        "batch": lambda: train(CONFIGS, source(1280), settings=replace(SETTINGS, batch_rows=65)),
        "shards": lambda: run(None, 3),
        "latents": lambda: train(TopK(25, k=3), source(1280), settings=replace(SETTINGS, latent_shards=2)),
        "step": lambda: train(CONFIGS, source(1280), settings=replace(SETTINGS, step="fused")),
        "orthogonal": lambda: train(
            TopK(24, k=3, orthogonal=0.1), source(1280), settings=replace(SETTINGS, latent_shards=2)
        ),
        "mutual": lambda: train(TopK(24, k=3, mutual=0.1), source(1280), seeds=[0, 1], settings=SETTINGS),
    }
    found = {}
    for name, call in cases.items():
        try:
            call()
        except Exception as error:
            found[name] = [type(error).__name__, str(error)]
    saekit_ranks.leave()  # a rank that is refused by itself may be done before the other has joined for the last call
    return found


def joins_late(rank):
    """Train on rank 1 when rank 0 has gone."""
    join()
    dist.barrier()
    time.sleep(0.3 if rank == 0 else 1)  # rank 0 stays until rank 1 has heard it
    if rank:
        run(None)


def main(folder):
    torch.set_num_threads(1)
    import_all()
    found = {"steps": fork_ranks(4, steps, folder / "steps")}

    def ranks(name, job, n=2):
        found[name] = fork_ranks(n, job, folder / "jobs" / name)

    ranks("alone", lambda rank: run(None), n=1)
    ranks("rows", lambda rank: run(folder / "rows"))
    ranks("latents", lambda rank: run(None, 2))
    ranks("cut", lambda rank: run(folder / "cut", callbacks=dies_at(14)))
    for name in ("as latents", "as one"):
        shutil.copytree(folder / "cut", folder / name)
    ranks("resumed", lambda rank: run(folder / "cut", resume=True))
    ranks("as latents", lambda rank: run(folder / "as latents", 2, resume=True))
    ranks("as one", lambda rank: run(folder / "as one", resume=True), n=1)
    ranks("read back", lambda rank: run(folder / "rows", resume=True))
    ranks("killed", kills_itself)
    ranks("nan", with_nan)
    ranks("full disk", lambda rank: full_disk(rank, folder / "full"))
    ranks("missing", waits_for_another, n=1)
    ranks("refused", refused)
    ranks("late", joins_late)
    (folder / "found.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
