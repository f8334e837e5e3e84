"""Train one peer's SAE on given rows with the peer's own trainer class; runs inside the peers' environment.

``python quality_peer.py '{"peer": ..., "arch": ..., "rows": ..., "held_out": ..., "out": ..., ...}'`` writes
``x_hat.npy`` (reconstruction of the held-out rows) and ``peer.json`` (L0, seconds, settings) into ``out``.
Nothing here computes a score: `quality.py` does that, by one formula for everybody.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

JOB = json.loads(sys.argv[1])
STEPS, BATCH, N, K, SEED = (JOB[key] for key in ("steps", "batch", "latents", "k", "seed"))
LR = JOB.get("lr")
"""Learning rate; None: the peer's own default."""
DECAY = JOB.get("decay", 0.2)
"""Fraction of the steps, the last ones, over which the learning rate falls; eai-sparsify has its own schedule."""
ROWS = np.load(JOB["rows"], mmap_mode="r")
D_IN = ROWS.shape[1]
SIZES = JOB["sizes"]


def batches(steps: int) -> Iterator[torch.Tensor]:
    """Shuffled batches, epoch after epoch, a fresh tensor each (one peer divides its batch in place)."""
    generator = np.random.default_rng(SEED)
    order = np.empty(0, dtype=np.int64)
    for _ in range(steps):
        if len(order) < BATCH:
            order = np.concatenate([order, generator.permutation(len(ROWS))])
        index, order = np.sort(order[:BATCH]), order[BATCH:]
        yield torch.from_numpy(ROWS[index]).float()


def dictionary_learning(arch: str, steps: int, coefficient: float | None):
    from dictionary_learning.dictionary import AutoEncoder, GatedAutoEncoder, JumpReluAutoEncoder
    from dictionary_learning.trainers.batch_top_k import BatchTopKSAE, BatchTopKTrainer
    from dictionary_learning.trainers.gdm import GatedSAETrainer
    from dictionary_learning.trainers.jumprelu import JumpReluTrainer
    from dictionary_learning.trainers.matryoshka_batch_top_k import MatryoshkaBatchTopKSAE, MatryoshkaBatchTopKTrainer
    from dictionary_learning.trainers.p_anneal import PAnnealTrainer
    from dictionary_learning.trainers.standard import StandardTrainer
    from dictionary_learning.trainers.top_k import AutoEncoderTopK, TopKTrainer
    from dictionary_learning.training import trainSAE

    warmup, decay = max(1, steps // 20), int(steps * (1 - DECAY))
    common = {
        "steps": steps, "activation_dim": D_IN, "dict_size": N, "layer": 0, "lm_name": "rows", "seed": SEED,
        "device": "cpu", "warmup_steps": warmup, "decay_start": decay, **({"lr": LR} if LR else {}),
    }  # fmt: skip
    threshold = {"threshold_start_step": min(1000, steps // 2)}
    extra = {
        "topk": lambda: {"trainer": TopKTrainer, "dict_class": AutoEncoderTopK, "k": K, **threshold},
        "batchtopk": lambda: {"trainer": BatchTopKTrainer, "dict_class": BatchTopKSAE, "k": K, **threshold},
        "matryoshka": lambda: {
            "trainer": MatryoshkaBatchTopKTrainer, "dict_class": MatryoshkaBatchTopKSAE, "k": K, **threshold,
            "group_fractions": [(b - a) / N for a, b in zip([0, *SIZES], SIZES, strict=False)],
        },
        "relu": lambda: {
            "trainer": StandardTrainer, "dict_class": AutoEncoder, "l1_penalty": coefficient,
            "sparsity_warmup_steps": steps // 5,
        },
        "gated": lambda: {
            "trainer": GatedSAETrainer, "dict_class": GatedAutoEncoder, "l1_penalty": coefficient,
            "sparsity_warmup_steps": steps // 5,
        },
        "p-anneal": lambda: {
            "trainer": PAnnealTrainer, "dict_class": AutoEncoder, "initial_sparsity_penalty": coefficient,
            "sparsity_warmup_steps": steps // 5, "anneal_start": steps // 3, "p_end": 0.2,
        },
        "jumprelu": lambda: {
            "trainer": JumpReluTrainer, "dict_class": JumpReluAutoEncoder, "target_l0": float(K),
            "sparsity_warmup_steps": steps // 5,
        },
    }[arch]()  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        # The trainers keep their dictionary; the list is how trainSAE hands it back.
        kept: list = []
        trainer_class = extra.pop("trainer")

        def keeping(**config):
            kept.append(trainer_class(**config))
            return kept[-1]

        data = (batch for batch in batches(steps + 102))
        configs = [{"trainer": keeping, **common, **extra}]
        trainSAE(data, configs, steps=steps, save_dir=folder, normalize_activations=True, device="cpu")
    ae = kept[0].ae
    return lambda x: (ae(x), ae.encode(x) != 0)


def sae_lens(arch: str, steps: int, coefficient: float | None):
    from sae_lens import SAE
    from sae_lens.config import LoggingConfig, SAETrainerConfig
    from sae_lens.saes import batchtopk_sae, gated_sae, jumprelu_sae, matryoshka_batchtopk_sae, standard_sae, topk_sae
    from sae_lens.training.sae_trainer import SAETrainer

    torch.manual_seed(SEED)
    module, name, extra = {
        "relu": (standard_sae, "Standard", {"l1_coefficient": coefficient, "l1_warm_up_steps": steps // 5}),
        "topk": (topk_sae, "TopK", {"k": K, "use_sparse_activations": False}),
        "batchtopk": (batchtopk_sae, "BatchTopK", {"k": K}),
        "jumprelu": (jumprelu_sae, "JumpReLU", {"l0_coefficient": coefficient, "l0_warm_up_steps": steps // 5}),
        "gated": (gated_sae, "Gated", {"l1_coefficient": coefficient, "l1_warm_up_steps": steps // 5}),
        "matryoshka": (matryoshka_batchtopk_sae, "MatryoshkaBatchTopK", {"k": K, "matryoshka_widths": SIZES}),
    }[arch]
    config_class = getattr(module, f"{name}TrainingSAEConfig")
    if arch in ("batchtopk", "matryoshka"):
        extra["use_sparse_activations"] = False
    config = config_class(d_in=D_IN, d_sae=N, normalize_activations="expected_average_only_in", **extra)
    sae = getattr(module, f"{name}TrainingSAE")(config)
    training = SAETrainerConfig(
        total_training_samples=steps * BATCH, train_batch_size_samples=BATCH, lr_end=0.0,
        lr_warm_up_steps=max(1, steps // 20), lr_decay_steps=int(steps * DECAY), n_batches_for_norm_estimate=100,
        logger=LoggingConfig(log_to_wandb=False), **({"lr": LR} if LR else {}),
    )  # fmt: skip
    trained = SAETrainer(training, sae, batches(steps + 101)).fit()
    with tempfile.TemporaryDirectory() as folder:
        trained.save_inference_model(folder)
        inference = SAE.load_from_disk(folder)

    def apply(x):
        codes = inference.encode(x)
        return inference.decode(codes), codes != 0

    return apply


def sparsify(arch: str, steps: int, coefficient: float | None):
    """Its Trainer wants a language model: this one looks its rows up, so the real trainer sees the same rows."""
    from datasets import Dataset
    from sparsify import SparseCoder
    from sparsify.config import SparseCoderConfig, TrainConfig
    from sparsify.trainer import Trainer
    from transformers import PretrainedConfig, PreTrainedModel

    class RowLookup(PreTrainedModel):
        config_class = PretrainedConfig

        def __init__(self, config):
            super().__init__(config)
            self.embed = torch.nn.Embedding.from_pretrained(torch.from_numpy(np.array(ROWS, dtype=np.float32)))

        def forward(self, input_ids):
            return self.embed(input_ids)

    generator = np.random.default_rng(SEED)
    order = np.concatenate([generator.permutation(len(ROWS)) for _ in range(-(-steps * BATCH // len(ROWS)))])
    dataset = Dataset.from_dict({"input_ids": order[: steps * BATCH, None]}).with_format("torch")
    with tempfile.TemporaryDirectory() as folder:
        config = TrainConfig(
            SparseCoderConfig(num_latents=N, k=K), batch_size=BATCH, hookpoints=["embed"], init_seeds=[SEED],
            log_to_wandb=False, save_dir=folder, run_name="run", save_every=10**9, lr=LR,
        )  # fmt: skip
        trainer = Trainer(config, dataset, RowLookup(PretrainedConfig()))
        trainer.fit()
        torch.set_float32_matmul_precision("highest")
        sae = SparseCoder.load_from_disk(next(Path(folder).rglob("sae.safetensors")).parent, device="cpu")

    def apply(x):
        out = sae(x)
        return out.sae_out, torch.zeros(len(x), N).scatter_(1, out.latent_indices, out.latent_acts) != 0

    return apply


def plain_torch(arch: str, steps: int, coefficient: float | None):
    """Train the TopK SAE that anybody would write first: dense codes, autograd, Adam, unit decoder rows."""
    torch.manual_seed(SEED)
    center = torch.from_numpy(np.array(ROWS[:100_000], dtype=np.float32)).mean(0)
    spread = (torch.from_numpy(np.array(ROWS[:10_000], dtype=np.float32)) - center).norm(dim=1).mean()
    W_dec = torch.nn.functional.normalize(torch.randn(N, D_IN), dim=1).requires_grad_()
    W_enc = W_dec.detach().clone().requires_grad_()
    b_enc, b_dec = torch.zeros(N, requires_grad=True), torch.zeros(D_IN, requires_grad=True)
    adam = torch.optim.Adam([W_enc, W_dec, b_enc, b_dec], lr=LR or 1e-3)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        adam, lambda step: min((step + 1) / max(1, steps // 20), 1.0, (steps - step) / max(1, steps * DECAY))
    )

    def encode(u):
        top = torch.topk((u - b_dec) @ W_enc.T + b_enc, K, dim=1)
        return torch.zeros(len(u), N).scatter(1, top.indices, top.values.relu())

    for x in batches(steps):
        u = (x - center) * (D_IN**0.5 / spread)
        loss = (u - encode(u) @ W_dec - b_dec).pow(2).sum(1).mean()
        adam.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_([W_enc, W_dec, b_enc, b_dec], 1.0)
        adam.step()
        schedule.step()
        with torch.no_grad():
            W_dec /= W_dec.norm(dim=1, keepdim=True)

    def apply(x):
        codes = encode((x - center) * (D_IN**0.5 / spread))
        return (codes @ W_dec + b_dec) * (spread / D_IN**0.5) + center, codes != 0

    return apply


PEERS = {
    "plain-torch": plain_torch,
    "dictionary-learning": dictionary_learning,
    "sae-lens": sae_lens,
    "eai-sparsify": sparsify,
}


@torch.no_grad()
def held_out(apply) -> tuple[np.ndarray, float, float]:
    """Reconstructions of the held-out rows, how many latents were not zero per row, and the share that never was."""
    x = torch.from_numpy(np.load(JOB["held_out"])).float()
    parts, fired = [], torch.zeros(N)
    for block in x.split(2048):
        x_hat, active = apply(block)
        parts.append(x_hat.float().numpy())
        fired += active.float().sum(0)
    return np.concatenate(parts), float(fired.double().sum()) / len(x), float((fired == 0).float().mean())


def calibrated(train, arch: str) -> float | None:
    """For penalties: the coefficient whose short run lands nearest to L0 = k (bisection on a log scale)."""
    if not JOB["coefficient_range"]:
        return None
    low, high = (float(np.log(c)) for c in JOB["coefficient_range"])
    for _ in range(JOB["calibration_runs"]):
        middle = (low + high) / 2
        l0 = held_out(train(arch, max(STEPS // 4, 50), float(np.exp(middle))))[1]
        print(f"calibrate: coefficient {np.exp(middle):.4g} gives L0 {l0:.1f}", file=sys.stderr)
        low, high = (middle, high) if l0 > K else (low, middle)
    return float(np.exp((low + high) / 2))


def main() -> None:
    train, arch = PEERS[JOB["peer"]], JOB["arch"]
    torch.manual_seed(SEED)
    coefficient = calibrated(train, arch)
    start = time.process_time()
    apply = train(arch, STEPS, coefficient)
    seconds = time.process_time() - start
    x_hat, l0, dead = held_out(apply)
    out = Path(JOB["out"])
    out.mkdir(parents=True, exist_ok=True)
    np.save(out / "x_hat.npy", x_hat)
    (out / "peer.json").write_text(json.dumps({"l0": l0, "dead": dead, "seconds": seconds, "coefficient": coefficient}))


main()
