"""What is measured of a model by tiny forward passes: sub-layers, shared blocks, layouts, order, randomness."""

from __future__ import annotations

import pytest
import torch
import transformers
from torch import nn
from transformers import PreTrainedTokenizerFast

from fixtures.tiny_models import CONTEXT, LAYERS, SIZES, WIDTH, _tokenizer
from saekit.errors import ModelError
from saekit.models import probe
from saekit.models.hooks import find_hook
from saekit.models.language import LanguageModel
from saekit.models.loading import load_model, load_vision_model
from saekit.models.quiet import quiet_transformers

COMMON = {
    **SIZES, "num_hidden_layers": LAYERS, "num_attention_heads": 2, "hidden_size": WIDTH, "intermediate_size": 32,
    "max_position_embeddings": CONTEXT, "num_key_value_heads": 2, "head_dim": 8,
}  # fmt: skip


def random_model(config, auto=transformers.AutoModel) -> nn.Module:
    with quiet_transformers(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = auto.from_config(config)
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1 or "norm" not in name.lower():
                nn.init.normal_(parameter, std=0.3)
    return model.eval()


@pytest.fixture(scope="module")
def tiny():
    return {
        "gemma2": random_model(transformers.Gemma2Config(**COMMON)),
        "granite": random_model(transformers.GraniteConfig(**COMMON, residual_multiplier=0.3)),
        "bloom": random_model(transformers.BloomConfig(vocab_size=40, hidden_size=WIDTH, n_layer=LAYERS, n_head=2)),
        "albert": random_model(
            transformers.AlbertConfig(
                vocab_size=40, embedding_size=8, hidden_size=WIDTH, num_hidden_layers=3, num_attention_heads=2,
                intermediate_size=32, max_position_embeddings=CONTEXT,
            )
        ),
        "xlnet": random_model(transformers.XLNetConfig(vocab_size=40, d_model=WIDTH, n_layer=3, n_head=2, d_inner=32)),
        "xlm": random_model(transformers.XLMConfig(vocab_size=40, emb_dim=WIDTH, n_layers=3, n_heads=2)),
    }  # fmt: skip


@pytest.mark.parametrize("kind", ["llama", "gpt2", "neox", "bert", "roberta"])
def test_sub_layers_of_ordinary_blocks_are_what_is_added(models, kind):
    for name in ("layers.1.attn", "layers.2.mlp"):
        assert find_hook(models[kind].model, name).name == name


@pytest.mark.parametrize("kind", ["gemma2", "granite", "bloom"])
@pytest.mark.parametrize("name", ["layers.1.attn", "layers.1.mlp"])
def test_a_sub_layer_that_is_scaled_normalized_or_summed_first_has_no_short_name(tiny, kind, name):
    model = tiny[kind]
    with pytest.raises(ModelError, match=rf"`{name}` must be what a sub-layer adds.*Name a module by its path"):
        find_hook(model, name)
    site = name.rpartition(".")[2]
    with pytest.raises(ModelError, match="must be what a sub-layer adds"):
        find_hook(model, layer=1, site=site)


def test_the_refusal_names_what_is_added_and_its_path_is_taken_as_it_is(tiny):
    model = tiny["gemma2"]
    with pytest.raises(ModelError, match=r"`layers\.1\.post_attention_layernorm`"):
        find_hook(model, "layers.1.mlp")
    inner = "layers.1.mlp.down_proj"
    assert find_hook(model, inner).path == inner
    causal = random_model(model.config, transformers.AutoModelForCausalLM)
    hook = find_hook(causal, "model.layers.1.mlp")
    assert hook.name == hook.path == "model.layers.1.mlp", "not the short name, which promises more"
    assert find_hook(causal, hook.name) == hook


def test_a_block_that_runs_several_times_is_refused(tiny):
    with pytest.raises(ModelError, match=r"must run once in a forward pass; .* runs 3 times"):
        find_hook(tiny["albert"], layer=0)


def test_sequence_first_is_refused_whatever_the_sizes(tiny):
    with pytest.raises(ModelError, match="puts the sequence before the batch"):
        find_hook(tiny["xlnet"], layer=1)


def test_a_list_of_sub_layers_is_no_list_of_blocks(tiny):
    with pytest.raises(ModelError, match="must run through its blocks"):
        find_hook(tiny["xlm"], layer=1)


class _Noisy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(4, 4)])

    def forward(self, input_ids):
        return self.layers[0](torch.rand(*input_ids.shape, 4))


def test_a_model_that_draws_random_numbers_is_refused():
    with torch.random.fork_rng(devices=[]):
        noisy = _Noisy()
    state = torch.random.get_rng_state()
    with pytest.raises(ModelError, match="two identical calls must give the same rows"):
        find_hook(noisy, layer=0)
    assert torch.equal(torch.random.get_rng_state(), state), "the probe leaves the random numbers of others alone"


def test_the_probe_leaves_no_hook_and_no_mode_behind():
    model = random_model(transformers.LlamaConfig(**COMMON)).train()
    before = sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())
    find_hook(model, "layers.1.mlp")
    assert sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()) == before
    assert all(module.training for module in model.modules())


def test_it_is_asked_once_per_model():
    model = random_model(transformers.LlamaConfig(**COMMON))
    runs = []
    model.register_forward_hook(lambda *_: runs.append(1))
    for _ in range(3):
        find_hook(model, "layers.1.mlp")
        find_hook(model, layer=2)
    assert len(runs) <= 4


def saved(folder, model, tokenizer: PreTrainedTokenizerFast) -> LanguageModel:
    with quiet_transformers():
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    found = load_model(folder)
    assert isinstance(found, LanguageModel)
    return found


def test_a_model_that_sees_later_tokens_has_no_cross_entropy(tmp_path, models):
    assert models["llama"].is_causal
    assert probe.sees_later_tokens(models["llama"].model) is False
    assert probe.sees_later_tokens(models["bert"].model) is True
    config = transformers.XLMConfig(
        vocab_size=40, emb_dim=WIDTH, n_layers=2, n_heads=2, pad_index=0, max_position_embeddings=CONTEXT
    )
    xlm = random_model(config, transformers.AutoModelForCausalLM)
    assert not saved(tmp_path / "xlm", xlm, _tokenizer("bert")).is_causal


def test_positions_that_begin_behind_the_padding_shorten_the_context(tmp_path):
    config = transformers.RobertaConfig(**{**COMMON, "pad_token_id": 1, "max_position_embeddings": 20})
    tokenizer = _tokenizer("roberta")
    tokenizer.model_max_length = int(1e30)
    assert saved(tmp_path / "roberta", random_model(config), tokenizer).context == 18


def test_a_masked_autoencoder_sees_all_patches_in_their_order(tmp_path):
    from PIL import Image
    from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

    config = transformers.ViTMAEConfig(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, image_size=8, patch_size=2
    )
    with quiet_transformers():
        random_model(config).save_pretrained(tmp_path / "mae")
        ViTImageProcessorPil(size={"height": 8, "width": 8}).save_pretrained(tmp_path / "mae")
    model = load_vision_model(tmp_path / "mae")
    image = Image.new("RGB", (8, 8), (200, 10, 90))
    with torch.no_grad():
        first, second = (model.model(**model.inputs([image])) for _ in range(2))
    assert torch.equal(first.last_hidden_state, second.last_hidden_state)
    assert first.last_hidden_state.shape[1] == 17
    assert first.ids_restore.tolist() == [list(range(16))]


def test_a_model_without_one_width_is_refused(tmp_path):
    from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

    config = transformers.PoolFormerConfig(hidden_sizes=[8, 8, 8, 8], depths=[1, 1, 1, 1])
    with quiet_transformers():
        random_model(config).save_pretrained(tmp_path / "pool")
        ViTImageProcessorPil(size={"height": 32, "width": 32}).save_pretrained(tmp_path / "pool")
    with pytest.raises(ModelError, match="one width"):
        load_vision_model(tmp_path / "pool")
