"""Lists of tokens that latents write are the derivative of the model's own tail, whatever its norm and head are."""

from __future__ import annotations

import pytest
import torch
import transformers

from fixtures.tiny_models import SIZES
from saekit.explanation.logit_lists import Tail, direct_effects, spearman
from saekit.models.quiet import quiet_transformers

WIDTH = 16
SHAPE = {**SIZES, "num_hidden_layers": 2, "hidden_size": WIDTH, "num_attention_heads": 2, "intermediate_size": 24}
CONFIGS = {
    "llama": lambda: transformers.LlamaConfig(**SHAPE, num_key_value_heads=1),
    "gpt2": lambda: transformers.GPT2Config(**SIZES, n_embd=WIDTH, n_layer=2, n_head=2, n_positions=24),
    "neox": lambda: transformers.GPTNeoXConfig(**SHAPE),
    "gemma2": lambda: transformers.Gemma2Config(
        **SHAPE, num_key_value_heads=1, head_dim=8, final_logit_softcapping=2.0, layer_types=["full_attention"] * 2
    ),
}


class Plain:
    """What `Tail` needs of a language model."""

    def __init__(self, model):
        self.model, self.device = model, torch.device("cpu")


@pytest.fixture(scope="module", params=sorted(CONFIGS))
def lm(request):
    with quiet_transformers(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = transformers.AutoModelForCausalLM.from_config(CONFIGS[request.param]()).eval()
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.4)
    return Plain(model)


def test_the_tail_is_what_the_model_does_after_its_last_block(lm):
    tail = Tail(lm)
    ids = torch.randint(4, 40, (2, 5), generator=torch.Generator().manual_seed(0))
    seen = []
    handle = tail.blocks[-1].register_forward_hook(
        lambda module, args, output: seen.append(output[0] if isinstance(output, tuple) else output)
    )
    with torch.no_grad():
        logits = lm.model(input_ids=ids).logits
    handle.remove()
    with torch.no_grad():
        assert tail(seen[0].flatten(0, 1)) == pytest.approx(logits.flatten(0, 1), abs=1e-4)
        assert lm.model(input_ids=ids).logits == pytest.approx(logits, abs=1e-5)  # the model is as it was


def test_the_derivative_is_a_finite_difference(lm):
    tail = Tail(lm)
    lm.model.double()
    try:
        generator = torch.Generator().manual_seed(1)
        rows = torch.randn(6, WIDTH, generator=generator, dtype=torch.float64) * 2
        along = torch.randn(6, WIDTH, generator=generator, dtype=torch.float64)
        with torch.no_grad():
            step = 1e-3
            difference = (tail(rows + step * along) - tail(rows - step * along)) / (2 * step)
        # norms are computed in single precision whatever the model is in
        assert tail.derivative(rows, along) == pytest.approx(
            difference, rel=1e-3, abs=2e-3 * float(difference.abs().max())
        )
    finally:
        lm.model.float()


def test_effects_are_means_over_firings_less_the_mean_over_tokens(lm):
    tail = Tail(lm)
    generator = torch.Generator().manual_seed(2)
    rows, written = torch.randn(3, 4, WIDTH, generator=generator), torch.randn(3, WIDTH, generator=generator)
    codes, there = torch.rand(3, 4, generator=generator) + 0.5, torch.ones(3, 4, dtype=torch.bool)
    there[1, 2:] = False
    found = direct_effects(tail, rows, codes, written, there)
    assert found.mean(1) == pytest.approx(torch.zeros(3), abs=1e-5)
    one = torch.stack([tail.derivative(rows[1, [t]], codes[1, t] * written[[1]])[0] for t in range(2)]).mean(0)
    assert found[1] == pytest.approx(one - one.mean(), abs=1e-5)


def test_rank_correlation():
    a = torch.tensor([3.0, 1.0, 2.0])
    assert spearman(a, a * 2) == pytest.approx(1)
    assert spearman(a, -a) == pytest.approx(-1)
