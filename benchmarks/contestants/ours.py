"""saekit as a contestant, and the bare products that nothing can beat. Runs in saekit's own environment."""

from __future__ import annotations

import torch
from gate import DEAD_SCALE, Gate, dead_latents, job, rows

NAME, JOB = job()
D, N, K, BATCH = JOB["d"], JOB["n"], JOB["k"], JOB["batch"]
GATE = Gate()
DEVICE = JOB.get("device", "cpu")
BATCHES = [rows(D, BATCH, seed).to(DEVICE) for seed in range(2)]


def config():
    """The configuration of the workload's architecture, K latents per row."""
    from saekit.training.config import BatchTopK, Gated, JumpReLU, Matryoshka, ReLU, TopK

    kinds = {"topk": TopK, "batchtopk": BatchTopK, "matryoshka": Matryoshka}
    penalized = {"jumprelu": JumpReLU, "relu": ReLU, "gated": Gated}
    arch = JOB.get("arch", "topk")
    return kinds[arch](N, k=K) if arch in kinds else penalized[arch](N, target_l0=K)


def step(kernels: str) -> None:
    """Training steps of an SAE with AuxK (where it has that), clipping and the counters of dead latents."""
    import saekit.kernels
    from saekit.training.defaults import resolve
    from saekit.training.fused import fused_step
    from saekit.training.learner import initialize_learner
    from saekit.training.step import plain_step

    saekit.kernels.use(kernels)
    resolved = resolve(config(), D, 10_000, BATCH)
    sample = BATCHES[0]
    learner = initialize_learner(
        config(),
        0,
        resolved,
        bias=sample.mean(0),
        scale=D**0.5 / sample.norm(dim=1).mean(),
        sample=sample,
        device=DEVICE,
    )
    advance = plain_step if kernels == "plain" else fused_step
    dead = dead_latents(N, JOB.get("dead", 0.0)).to(DEVICE)
    if dead.any():
        learner.step = resolved.total_steps // 2  # before, none can be dead
        learner.parameters["W_enc"][dead] *= DEAD_SCALE
    count = 0
    while True:
        GATE.pause()
        learner.rows_since_fired.masked_fill_(dead, 10**9)
        assert bool(advance(learner, BATCHES[count % 2]).finite)
        count += 1


def dense_step() -> None:
    """What anybody would write first: dense codes, autograd, torch's Adam; the same clipping and counters."""
    W = torch.randn(N, D, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    W /= W.norm(dim=1, keepdim=True)
    b_pre = BATCHES[0].mean(0)
    scale = D**0.5 / (BATCHES[0] - b_pre).norm(dim=1).mean()
    leaves = [
        t.clone().requires_grad_()
        for t in (W.T.contiguous(), torch.zeros(N, device=DEVICE), W, torch.zeros(D, device=DEVICE))
    ]
    W_enc, b_enc, W_dec, b_dec = leaves
    adam = torch.optim.Adam(leaves, lr=2e-4)
    since = torch.zeros(N, dtype=torch.int64, device=DEVICE)
    count = 0
    while True:
        GATE.pause()
        x = (BATCHES[count % 2] - b_pre) * scale
        top = ((x - b_dec) @ W_enc + b_enc).topk(K, dim=-1)
        codes = torch.zeros(BATCH, N, device=DEVICE).scatter(1, top.indices, top.values.relu())
        loss = (codes @ W_dec + b_dec - x).pow(2).sum(1).mean()
        adam.zero_grad()
        loss.backward()
        with torch.no_grad():
            W_dec.grad -= (W_dec.grad * W_dec).sum(1, keepdim=True) * W_dec
        torch.nn.utils.clip_grad_norm_(leaves, 1.0)
        adam.step()
        with torch.no_grad():
            W_dec /= W_dec.norm(dim=1, keepdim=True)
        since = torch.where((codes > 0).any(0), 0, since + BATCH)
        assert bool(torch.isfinite(loss))
        count += 1


def encode(kernels: str) -> None:
    """Rows to compressed sparse codes."""
    import saekit.kernels
    from saekit import SAE
    from saekit.sae.rules import JumpReLURule, ReLURule, TopKRule

    saekit.kernels.use(kernels)
    W = torch.randn(N, D, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    W /= W.norm(dim=1, keepdim=True)
    center = BATCHES[0].mean(0)
    # The threshold, or the bias under ReLU, at which K latents fire on average.
    pre = ((BATCHES[0][:256] - center) @ W.T).flatten()
    level = float(pre.kthvalue(len(pre) - 256 * K).values)
    rules = {
        "topk": TopKRule(K), "jumprelu": JumpReLURule(torch.full((N,), level, device=DEVICE)), "relu": ReLURule(),
    }  # fmt: skip
    arch = JOB.get("arch", "topk")
    b_enc = torch.full((N,), -level if arch == "relu" else 0.0, device=DEVICE)
    sae = SAE(W_enc=W, b_enc=b_enc, W_dec=W, b_dec=center, b_pre=center, rule=rules[arch])
    count = 0
    while True:
        GATE.pause()
        codes = sae.encode(BATCHES[count % 2])
        assert codes.n_rows == BATCH
        count += 1


def product(dtype: torch.dtype, copied: int = 0) -> None:
    """The encoder's product alone, into memory that is used again: the floor of every dense encoder.

    `copied` numbers are copied after it: with 7 of 2 for each weight as much is read and written as by an update that
    reads weights, gradients and both moments once and writes all but the gradients.
    """
    source, target = torch.ones(2, copied, device=DEVICE)  # not zeros: those have no memory yet
    W = torch.randn(N, D, generator=torch.Generator().manual_seed(1)).to(DEVICE, dtype)
    xs = [x.to(dtype) for x in BATCHES]
    block = max(16, min(BATCH, JOB.get("block_bytes", 8 * 2**20) // (N * W.element_size())))
    out = torch.empty(block, N, dtype=dtype, device=DEVICE)
    count = 0
    while True:
        GATE.pause()
        for part in xs[count % 2].split(block):
            torch.mm(part, W.T, out=out[: len(part)])
        target.copy_(source)
        count += 1


{
    # On a GPU the Triton kernels have to be asked for.
    "saekit": lambda: {"step": step, "encode": encode}[JOB["work"]]("auto" if DEVICE == "cpu" else "fast"),
    "saekit plain": lambda: {"step": step, "encode": encode}[JOB["work"]]("plain"),
    "plain torch": dense_step,
    "bf16 product": lambda: product(torch.bfloat16),
    "fp32 product": lambda: product(torch.float32),
    "bf16 product and pass": lambda: product(torch.bfloat16, copied=7 * N * D),
    "fp32 product and pass": lambda: product(torch.float32, copied=7 * N * D),
}[NAME]()
