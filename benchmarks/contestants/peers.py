"""A peer as a contestant: its own trainer class and its own encode. Runs in the environment of `peers.sh`."""

from __future__ import annotations

import itertools
import os
import tempfile
from collections.abc import Iterator

import torch
from gate import DEAD_SCALE, Gate, dead_latents, job, rows

os.environ.update(WANDB_MODE="disabled", HF_HUB_OFFLINE="1", TQDM_DISABLE="1")

NAME, JOB = job()
D, N, K, BATCH = JOB["d"], JOB["n"], JOB["k"], JOB["batch"]
ARCH = JOB.get("arch", "topk")
MANY = 100_000
GATE = Gate()
DEVICE = JOB.get("device", "cpu")
BATCHES = [rows(D, BATCH, seed).to(DEVICE) for seed in range(2)]
DEAD = dead_latents(N, JOB.get("dead", 0.0)).to(DEVICE)
SINCE_FIRED: list[torch.Tensor] = []
"""The trainer's counters, `DEAD` of which are put above every threshold before each step."""


def let_die(weight: torch.Tensor, counter: torch.Tensor) -> None:
    """Make `DEAD` dead, given the encoder ``[n, d]`` and the trainer's counter ``[n]``."""
    weight.data[DEAD] *= DEAD_SCALE
    SINCE_FIRED.append(counter)


def gated() -> Iterator[torch.Tensor]:
    """Endless batches; the trainer stops at the gate before each one."""
    for index in itertools.count():
        GATE.pause()
        for counter in SINCE_FIRED:
            counter.masked_fill_(DEAD, 10**9)
        yield BATCHES[index % 2].clone()


def repeat(work) -> None:
    with torch.no_grad():
        for index in itertools.count():
            GATE.pause()
            work(BATCHES[index % 2])


def dictionary_learning_step() -> None:
    from dictionary_learning.dictionary import AutoEncoder, GatedAutoEncoder, JumpReluAutoEncoder
    from dictionary_learning.trainers.batch_top_k import BatchTopKSAE, BatchTopKTrainer
    from dictionary_learning.trainers.gdm import GatedSAETrainer
    from dictionary_learning.trainers.jumprelu import JumpReluTrainer
    from dictionary_learning.trainers.matryoshka_batch_top_k import MatryoshkaBatchTopKSAE, MatryoshkaBatchTopKTrainer
    from dictionary_learning.trainers.standard import StandardTrainer
    from dictionary_learning.trainers.top_k import AutoEncoderTopK, TopKTrainer
    from dictionary_learning.training import trainSAE

    class Counted(TopKTrainer):
        def __init__(self, *values, **more) -> None:
            super().__init__(*values, **more)
            let_die(self.ae.encoder.weight, self.num_tokens_since_fired)

    shares = [1 / 16, 1 / 16, 1 / 8, 1 / 4, 1 / 2]
    own = {
        "topk": {"trainer": Counted, "dict_class": AutoEncoderTopK, "k": K},
        "batchtopk": {"trainer": BatchTopKTrainer, "dict_class": BatchTopKSAE, "k": K},
        "matryoshka": {
            "trainer": MatryoshkaBatchTopKTrainer, "dict_class": MatryoshkaBatchTopKSAE, "k": K,
            "group_fractions": shares,
        },
        "jumprelu": {"trainer": JumpReluTrainer, "dict_class": JumpReluAutoEncoder, "target_l0": float(K)},
        "relu": {"trainer": StandardTrainer, "dict_class": AutoEncoder},
        "gated": {"trainer": GatedSAETrainer, "dict_class": GatedAutoEncoder},
    }  # fmt: skip
    config = {
        "steps": MANY, "activation_dim": D, "dict_size": N, "layer": 0, "lm_name": "rows", "seed": 0, "device": DEVICE,
        "warmup_steps": 1000, "decay_start": MANY // 2, **own[ARCH],
    }  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        trainSAE(gated(), [config], steps=MANY, save_dir=folder, normalize_activations=False, device=DEVICE)


def level_of(pre: torch.Tensor) -> float:
    """The pre-activation that K latents of a row exceed on average."""
    return float(pre.flatten().kthvalue(pre.numel() - K * len(pre)).values)


@torch.no_grad()
def dictionary_learning_encode() -> None:
    from dictionary_learning.dictionary import AutoEncoder, JumpReluAutoEncoder
    from dictionary_learning.trainers.top_k import AutoEncoderTopK

    if ARCH == "topk":
        ae = AutoEncoderTopK(D, N, K).to(DEVICE)
        repeat(lambda x: ae.encode(x, return_topk=True)[1:3])
    elif ARCH == "relu":
        ae = AutoEncoder(D, N).to(DEVICE)
        ae.encoder.bias -= level_of(ae.encoder(BATCHES[0][:256] - ae.bias))
    else:
        ae = JumpReluAutoEncoder(D, N, device=DEVICE)
        ae.threshold.fill_(level_of(BATCHES[0][:256] @ ae.W_enc + ae.b_enc))
    repeat(lambda x: ae.encode(x).to_sparse_csr())


def sae_lens_model():
    from sae_lens.saes import batchtopk_sae, gated_sae, jumprelu_sae, matryoshka_batchtopk_sae, standard_sae, topk_sae

    module, name, own = {
        "topk": (topk_sae, "TopK", {"k": K, "use_sparse_activations": False}),
        "batchtopk": (batchtopk_sae, "BatchTopK", {"k": K, "use_sparse_activations": False}),
        "matryoshka": (
            matryoshka_batchtopk_sae, "MatryoshkaBatchTopK",
            {"k": K, "use_sparse_activations": False, "matryoshka_widths": [N // 16, N // 8, N // 4, N // 2, N]},
        ),
        "jumprelu": (jumprelu_sae, "JumpReLU", {}),
        "relu": (standard_sae, "Standard", {}),
        "gated": (gated_sae, "Gated", {}),
    }[ARCH]  # fmt: skip
    config = getattr(module, f"{name}TrainingSAEConfig")(d_in=D, d_sae=N, device=DEVICE, **own)
    return getattr(module, f"{name}TrainingSAE")(config)


def sae_lens_step() -> None:
    from sae_lens.config import LoggingConfig, SAETrainerConfig
    from sae_lens.training.sae_trainer import SAETrainer

    config = SAETrainerConfig(
        total_training_samples=MANY * BATCH, train_batch_size_samples=BATCH, device=DEVICE, lr_end=0.0,
        lr_warm_up_steps=1000, lr_decay_steps=1000, logger=LoggingConfig(log_to_wandb=False),
    )  # fmt: skip
    trainer = SAETrainer(config, sae_lens_model(), gated())
    let_die(trainer.sae.W_enc.T, trainer.n_forward_passes_since_fired)
    trainer.fit()


@torch.no_grad()
def sae_lens_encode() -> None:
    sae = sae_lens_model()
    if ARCH != "topk":
        sae.b_enc -= level_of(BATCHES[0][:256] @ sae.W_enc + sae.b_enc)
    repeat(lambda x: sae.encode(x).to_sparse_csr())


def sparsify_step() -> None:
    """Its trainer wants a language model: this one hands out rows, so that the real hook and the real step run."""
    from datasets import Dataset
    from sparsify.config import SparseCoderConfig, TrainConfig
    from sparsify.trainer import Trainer
    from transformers import PretrainedConfig, PreTrainedModel

    source = gated()

    class Rows(torch.nn.Module):
        def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
            return next(source)[:, None] if len(input_ids) == BATCH else torch.zeros(*input_ids.shape, D, device=DEVICE)

    class Model(PreTrainedModel):
        config_class = PretrainedConfig

        def __init__(self, config: PretrainedConfig) -> None:
            super().__init__(config)
            self.rows = Rows()
            self.anchor = torch.nn.Parameter(torch.zeros(1))  # tells the trainer device and dtype

        def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
            return self.rows(input_ids)

    ids = torch.zeros(200 * BATCH, 1, dtype=torch.int32).numpy()
    dataset = Dataset.from_dict({"input_ids": ids}).with_format("torch")
    with tempfile.TemporaryDirectory() as folder:
        config = TrainConfig(
            SparseCoderConfig(num_latents=N, k=K), batch_size=BATCH, hookpoints=["rows"], optimizer="adam",
            auxk_alpha=1 / 32, log_to_wandb=False, save_dir=folder, run_name="run", save_every=10**9,
        )  # fmt: skip
        trainer = Trainer(config, dataset, Model(PretrainedConfig()).to(DEVICE))
        for name, sae in trainer.saes.items():
            let_die(sae.encoder.weight, trainer.num_tokens_since_fired[name])
        trainer.fit()


def sparsify_encode() -> None:
    from sparsify import SparseCoder
    from sparsify.config import SparseCoderConfig

    sae = SparseCoder(D, SparseCoderConfig(num_latents=N, k=K), device=DEVICE)
    repeat(lambda x: sae.encode(x)[:2])


torch.manual_seed(0)
{
    ("dictionary-learning", "step"): dictionary_learning_step,
    ("dictionary-learning", "encode"): dictionary_learning_encode,
    ("sae-lens", "step"): sae_lens_step,
    ("sae-lens", "encode"): sae_lens_encode,
    ("eai-sparsify", "step"): sparsify_step,
    ("eai-sparsify", "encode"): sparsify_encode,
}[NAME, JOB["work"]]()
