"""What SAEDashboard's own pages of latents cost, beside `explain` over as many tokens: CPU seconds of one thread.

``python benchmarks/explain_dashboard.py PEERS`` with the python of an environment that holds sae-dashboard 0.8.0,
sae-lens 6.12.1, transformer-lens 2.16.1, transformers 4.56.2, datasets 3.6.0 and huggingface-hub 0.36.0 (``--no-deps``:
pip did not finish resolving their pins in ten minutes). SAEDashboard reads models of TransformerLens, so it gets one of
the built-in model's width and depth with random weights, and ReLU latents in random directions; it folds decoder norms,
which sae-lens refuses for TopK.
"""

from __future__ import annotations

import subprocess
import sys
import time

LATENTS, PROMPTS, LENGTH = 256, 100, 64


def dashboard() -> None:
    import torch
    from sae_dashboard.sae_vis_data import SaeVisConfig
    from sae_dashboard.sae_vis_runner import SaeVisRunner
    from sae_lens import StandardSAE, StandardSAEConfig
    from transformer_lens import HookedTransformer, HookedTransformerConfig

    hook = "blocks.2.hook_resid_post"
    shape = {"n_layers": 4, "d_model": 192, "n_ctx": 256, "d_head": 48, "n_heads": 4, "d_mlp": 512, "d_vocab": 4096}
    shape |= {"act_fn": "silu", "gated_mlp": True, "normalization_type": "RMS", "seed": 0}
    model = HookedTransformer(HookedTransformerConfig(**shape, positional_embedding_type="rotary", rotary_dim=48))
    model.tokenizer = tokenizer()
    sae = StandardSAE(StandardSAEConfig(d_in=192, d_sae=LATENTS, device="cpu", dtype="float32"))
    sae.cfg.metadata.hook_name, sae.cfg.metadata.hook_layer = hook, 2
    tokens = torch.randint(0, 4096, (PROMPTS, LENGTH))
    config = SaeVisConfig(
        hook_point=hook,
        features=list(range(LATENTS)),
        minibatch_size_features=64,
        minibatch_size_tokens=64,
        device="cpu",
        dtype="float32",
    )
    torch.set_num_threads(1)
    begin = time.process_time()
    SaeVisRunner(config).run(encoder=sae, model=model, tokens=tokens)
    print(f"SAEDashboard: {time.process_time() - begin:.1f} CPU s")


def tokenizer():
    from pathlib import Path

    from transformers import PreTrainedTokenizerFast

    (file,) = (Path(__file__).parents[1] / "src/saekit/assets").glob("*/tokenizer.json")
    return PreTrainedTokenizerFast(tokenizer_file=str(file), bos_token="<|endoftext|>", pad_token="<|endoftext|>")


def ours() -> None:
    import torch

    from saekit import SAE, load_model
    from saekit.explanation.run import explain
    from saekit.explanation.settings import ExplainSettings
    from saekit.sae.rules import ReLURule

    lm = load_model("builtin")
    W = torch.randn(LATENTS, lm.d_model, generator=torch.Generator().manual_seed(0))
    W /= W.norm(dim=1, keepdim=True)
    place = {"hook": "layers.2", "context": LENGTH}
    sae = SAE(W, torch.zeros(LATENTS), W.clone(), torch.zeros(lm.d_model), ReLURule(), provenance=place)
    settings = ExplainSettings(tokens=PROMPTS * LENGTH, controls=("shuffled",))
    torch.set_num_threads(1)
    begin = time.process_time()
    found = explain(sae, lm, "builtin", settings=settings, progress=False)
    print(f"saekit explain: {time.process_time() - begin:.1f} CPU s, {len(found.cards)} cards")


if __name__ == "__main__":
    if sys.argv[1:] == ["--dashboard"]:
        dashboard()
    else:
        ours()
        subprocess.run([sys.argv[1], __file__, "--dashboard"], check=True)
