"""Finding modules, reading their outputs in one pass, and putting other values in their place."""

from __future__ import annotations

import threading
from dataclasses import dataclass

import pytest
import torch
from torch import nn
from transformers.utils import ModelOutput

from saekit.errors import ConfigError, ModelError, ShapeError
from saekit.models.hooks import activations, find_hook
from saekit.models.intervene import splice
from saekit.rows.tokens import token_batches, tokenize

KINDS = ["llama", "gpt2", "neox", "bert", "roberta"]
# rounding: sums in another order or shape
TOLERANCE = {"atol": 1e-5, "rtol": 1e-4}

PATHS = {
    "llama": ("model.layers.1", "model.layers.1.mlp", "model.layers.1.self_attn"),
    "gpt2": ("transformer.h.1", "transformer.h.1.mlp", "transformer.h.1.attn"),
    "neox": ("gpt_neox.layers.1", "gpt_neox.layers.1.mlp", "gpt_neox.layers.1.attention"),
    "bert": ("encoder.layer.1", "encoder.layer.1.output.dense", "encoder.layer.1.attention.output.dense"),
    "roberta": ("encoder.layer.1", "encoder.layer.1.output.dense", "encoder.layer.1.attention.output.dense"),
}


def inputs(lm, texts, padding="right"):
    contexts = tokenize(lm.tokenizer, texts, context=lm.context)
    return next(token_batches(lm, contexts, batch_tokens=100_000, padding=padding))


@pytest.mark.parametrize("kind", KINDS)
def test_short_names_and_paths(models, kind):
    model = models[kind].model
    for site, path in zip(("resid", "mlp", "attn"), PATHS[kind]):
        by_layer = find_hook(model, layer=1, site=site)
        assert by_layer.path == path
        assert by_layer.layer == 1
        assert by_layer.name == "layers.1" + ("" if site == "resid" else f".{site}")
        assert find_hook(model, by_layer.name) == by_layer
        assert find_hook(model, path) == by_layer
        assert find_hook(model, by_layer.name).path == path
    assert find_hook(model, 1) == find_hook(model, "h.1") == find_hook(model, "blocks.1")


@pytest.mark.parametrize("kind", KINDS)
def test_layer_is_the_output_of_the_block(models, texts, kind):
    """hidden_states[L + 1] is the stream after block L, except that the last one comes after the final norm."""
    lm = models[kind]
    batch = inputs(lm, texts)
    found = activations(lm.model, [find_hook(lm.model, layer=i) for i in range(3)], batch.inputs)
    with torch.no_grad():
        states = lm.model(**batch.inputs, output_hidden_states=True).hidden_states
    for layer in (0, 1):
        torch.testing.assert_close(found[layer][batch.keep], states[layer + 1][batch.keep], **TOLERANCE)
    last, normed = found[2][batch.keep], states[3][batch.keep]
    if kind in ("bert", "roberta"):
        torch.testing.assert_close(last, normed, **TOLERANCE)
    else:
        assert not torch.allclose(last, normed, atol=1e-2), "for the last block this would be the stream after the norm"


@pytest.mark.parametrize("kind", KINDS)
def test_stopping_early_changes_no_value_and_runs_no_later_block(models, texts, kind):
    lm = models[kind]
    batch = inputs(lm, texts)
    hooks = [find_hook(lm.model, name) for name in ("layers.1", "layers.0.mlp", "layers.1.attn")]
    ran = []
    handle = lm.model.get_submodule(find_hook(lm.model, 2).path).register_forward_hook(lambda *_: ran.append(1))
    try:
        early = activations(lm.model, hooks, batch.inputs)
        assert not ran
        full = activations(lm.model, hooks, batch.inputs, stop=False)
        assert ran
    finally:
        handle.remove()
    for one, other in zip(early, full):
        assert torch.equal(one, other)
    alone = activations(lm.model, hooks[1:2], batch.inputs)
    assert torch.equal(alone[0], early[1])


def test_no_hook_stays_behind(models, texts):
    model = models["llama"].model
    batch = inputs(models["llama"], texts)
    hook = find_hook(model, layer=1)

    def count():
        # transformers keeps hooks of its own for output_hidden_states
        return sum(len(module._forward_hooks) for module in model.modules())

    before = count()
    activations(model, [hook], batch.inputs)
    with pytest.raises(ShapeError), splice(model, hook, lambda x: x[:, :3]):
        model(**batch.inputs)
    with pytest.raises(ModelError, match="its forward pass fails"):
        activations(model, [hook], {"input_ids": batch.inputs["input_ids"], "attention_mask": object()})
    assert count() == before


def test_grad_mode_outside_is_kept(models, texts):
    lm = models["llama"]
    (found,) = activations(lm.model, [find_hook(lm.model, layer=0)], inputs(lm, texts).inputs)
    assert torch.is_grad_enabled()
    assert not found.requires_grad
    assert not found.is_inference(), "rows must be usable in autograd later"


# --- modules of every calling convention ------------------------------------------------------------------------------


@dataclass
class _Output(ModelOutput):
    last_hidden_state: torch.Tensor | None = None
    extra: torch.Tensor | None = None


class _Block(nn.Module):
    """Adds its number to the hidden states, and returns them in one of four ways."""

    def __init__(self, number: int, returns: str) -> None:
        super().__init__()
        self.mlp = nn.Identity()
        self.number, self.returns = number, returns

    def forward(self, hidden_states, scale=1.0):
        x = hidden_states + self.number * scale
        return {
            "tensor": x,
            "tuple": (x, "cache"),
            "list": [x, None],
            "output": _Output(last_hidden_state=x, extra=x[..., :1]),
            "flat": x.reshape(-1, x.shape[-1]),
        }[self.returns]


class _Toy(nn.Module):
    """Two blocks called with positional or keyword hidden states."""

    def __init__(self, returns: str, keyword: bool) -> None:
        super().__init__()
        self.layers = nn.ModuleList([_Block(1, returns), _Block(10, returns)])
        self.keyword = keyword

    def forward(self, input_ids):
        x = input_ids[..., None].float().expand(-1, -1, 4)
        for block in self.layers:
            shape = x.shape
            out = block(hidden_states=x, scale=1.0) if self.keyword else block(x, 1.0)
            x = out if isinstance(out, torch.Tensor) else out[0]
            self.rest = out[1:] if isinstance(out, tuple | list) else out
            x = x.reshape(shape)
        return x


@pytest.mark.parametrize("keyword", [False, True])
@pytest.mark.parametrize("returns", ["tensor", "tuple", "list", "output", "flat"])
def test_positional_and_keyword_states_and_all_kinds_of_output(returns, keyword):
    toy = _Toy(returns, keyword)
    ids = torch.arange(6).reshape(2, 3)
    first, second = activations(toy, [find_hook(toy, layer=0), find_hook(toy, layer=1)], {"input_ids": ids})
    base = ids[..., None].float().expand(-1, -1, 4)
    assert torch.equal(first, base + 1)
    assert torch.equal(second, base + 11)
    mask = torch.tensor([[True, False, True], [False, False, True]])
    with splice(toy, 0, lambda x: x * 0 + 100, mask=mask):
        out = toy(ids)
    assert torch.equal(out, torch.where(mask[..., None], 110.0, base + 11))
    if returns == "tuple":
        assert toy.rest == ("cache",)
    if returns == "output":
        assert type(toy.rest) is _Output
        assert toy.rest.extra is not None
    assert torch.equal(toy(ids), base + 11), "after the block all is as before"


# --- splicing into language models ------------------------------------------------------------------------------------


def test_a_pass_of_another_thread_is_not_recorded():
    toy = _Toy("tensor", False)
    plain = toy.forward

    def forward(input_ids):
        if input_ids.shape[0] == 2:
            thread = threading.Thread(target=lambda: toy(torch.full((1, 3), 50)))
            thread.start()
            thread.join()
        return plain(input_ids)

    toy.forward = forward
    ids = torch.arange(6).reshape(2, 3)
    (found,) = activations(toy, [find_hook(toy, layer=0)], {"input_ids": ids})
    assert torch.equal(found, ids[..., None].float().expand(-1, -1, 4) + 1)


# --- what does not exist ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"layer": -1}, ModelError, "between 0 and 2 .* got -1"),
        ({"layer": 3}, ModelError, "between 0 and 2 .* got 3"),
        ({"hook": "layers.7.mlp"}, ModelError, "between 0 and 2 .* got 7"),
        ({"hook": "layers.-1"}, ModelError, "got -1"),
        (
            {"hook": "layers.1.mpl"},
            ModelError,
            r"`layers\.1\.mpl` must be a module.*Did you mean `model\.layers\.1\.mlp`",
        ),
        ({"hook": "model.layers.1.self_atn"}, ModelError, r"Did you mean `model\.layers\.1\.self_attn`"),
        ({"hook": "nonsense"}, ModelError, r"Short forms: `layers\.0` to `layers\.2`"),
        ({"hook": ""}, ModelError, "must be a module"),
        ({"hook": 1.5}, ConfigError, "name or path of a module"),
        ({"layer": "2"}, ConfigError, "`layer` must be an integer"),
        ({"layer": True}, ConfigError, "`layer` must be an integer"),
        ({}, ConfigError, "exactly one of `layer` and `hook`"),
        ({"layer": 1, "hook": "layers.1"}, ConfigError, "exactly one of `layer` and `hook`"),
        ({"layer": 1, "site": "head"}, ConfigError, "`site` must be"),
    ],
)
def test_hooks_that_do_not_exist(models, arguments, error, message):
    with pytest.raises(error, match=message):
        find_hook(models["llama"].model, **arguments)


def test_models_without_blocks_or_parts(models, texts):
    with pytest.raises(ModelError, match="must have a list of blocks"):
        find_hook(nn.Identity(), layer=0)
    toy = _Toy("tensor", False)
    with pytest.raises(ModelError, match="part that is its `attn`"):
        find_hook(toy, layer=0, site="attn")
    with pytest.raises(ModelError, match=r"does not reach `layers.0.mlp`"):
        activations(toy, [find_hook(toy, "layers.0.mlp")], {"input_ids": torch.ones(1, 2, dtype=torch.long)})
    lm = models["llama"]
    with pytest.raises(ModelError, match=r"output of `model.rotary_emb` must be hidden states"):
        activations(lm.model, [find_hook(lm.model, "model.rotary_emb")], inputs(lm, texts).inputs)


def test_blocks_of_a_vision_transformer():
    import transformers

    config = transformers.ViTConfig(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, image_size=8, patch_size=4
    )
    with torch.random.fork_rng(devices=[]):
        model = transformers.ViTModel(config).eval()
    hook = find_hook(model, layer=1)
    pixels = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    (x,) = activations(model, [hook], {"pixel_values": pixels})
    assert x.shape == (2, 5, 16)
    for site in ("mlp", "attn"):
        assert activations(model, [find_hook(model, layer=1, site=site)], {"pixel_values": pixels})[0].shape[-1] == 16
