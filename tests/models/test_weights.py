"""Weights that files do not have: refused where a row or a cross-entropy depends on them, else left aside."""

from __future__ import annotations

import shutil

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import nn

from fixtures.tiny_models import CONTEXT, LAYERS, SIZES, WIDTH, _tokenizer
from saekit.errors import DataError, ModelError
from saekit.models.loading import load_model
from saekit.models.pretrained import Placement, find_model, read_weights
from saekit.models.quiet import quiet_transformers
from saekit.rows.capture import capture

ENCODER_DECODER = {
    **SIZES, "d_model": WIDTH, "encoder_layers": LAYERS, "decoder_layers": 1, "encoder_attention_heads": 2,
    "decoder_attention_heads": 2, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32, "max_position_embeddings": CONTEXT,
}  # fmt: skip


@pytest.fixture(scope="module")
def marian(tmp_path_factory):
    folder = tmp_path_factory.mktemp("marian") / "marian"
    with quiet_transformers(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = transformers.MarianConfig(**ENCODER_DECODER, decoder_start_token_id=0)
        transformers.AutoModel.from_config(config).save_pretrained(folder)
        _tokenizer("bert").save_pretrained(folder)
    return folder


def without(folder, where, parts, change=None):
    """Copy a model without the weights whose names hold one of `parts`, or with them changed; return what was left."""
    shutil.copytree(folder, where)
    weights = load_file(folder / "model.safetensors")
    named = [name for name in weights if any(part in name for part in parts)]
    kept = {name: value for name, value in weights.items() if name not in named}
    if change is not None:
        kept |= {name: change(weights[name]) for name in named}
    save_file(kept, where / "model.safetensors", {"format": "pt"})
    return named


@pytest.mark.parametrize("part", ["layers.1.mlp.up_proj", "embed_tokens", "input_layernorm.weight", "model.norm"])
def test_what_rows_depend_on_must_be_there(folders, tmp_path, part):
    assert without(folders["llama"], tmp_path / "less", [part])
    with pytest.raises(ModelError, match=r"must be complete; .* missing and would be random"):
        load_model(tmp_path / "less")


def test_a_weight_of_a_block_must_be_there_whatever_its_name(folders):
    class Odd(transformers.PreTrainedModel):
        config_class = transformers.LlamaConfig

        def __init__(self, config):
            super().__init__(config)
            self.layers = nn.ModuleList([nn.ModuleDict({"head_norm": nn.Linear(2, 2)})])
            self.head = nn.Linear(2, 2)

        @classmethod
        def from_pretrained(cls, *_, **__):
            with torch.random.fork_rng(devices=[]):
                return cls(transformers.LlamaConfig(num_hidden_layers=1)), {"missing_keys": missing}

    files, how = find_model(folders["llama"]), Placement.checked(None, "cpu", None)
    missing = {"head.weight"}
    assert read_weights(Odd, files, how, ["head"]).ignored == ("head.weight",)
    missing = {"layers.0.head_norm.weight"}
    with pytest.raises(ModelError, match=r"must be complete; `layers\.0\.head_norm.weight`"):
        read_weights(Odd, files, how, ["head"])


def test_without_its_head_a_model_has_rows_and_no_cross_entropy(folders, models, texts, tmp_path):
    assert without(folders["llama"], tmp_path / "less", ["lm_head"]) == ["lm_head.weight"]
    lm = load_model(tmp_path / "less")
    assert models["llama"].is_causal
    assert not lm.is_causal, "what it predicts comes from random numbers"
    assert torch.equal(capture(lm, texts, layer=1).x, capture(models["llama"], texts, layer=1).x)


def test_an_encoder_is_read_without_its_decoder(marian, texts, tmp_path):
    assert without(marian, tmp_path / "less", ["decoder.layers"])
    rows, expected = (capture(folder, texts, layer=1) for folder in (tmp_path / "less", marian))
    assert torch.equal(rows.x, expected.x)


def test_weights_that_are_computed_need_not_be_there(marian, texts, tmp_path):
    assert without(marian, tmp_path / "less", ["embed_positions"])
    rows, expected = (capture(folder, texts, layer=1) for folder in (tmp_path / "less", marian))
    assert torch.equal(rows.x, expected.x)


def test_weights_of_another_shape_or_that_are_nan(folders, texts, tmp_path):
    without(folders["llama"], tmp_path / "other", ["layers.1.mlp.up_proj"], lambda x: x[:-1].clone())
    with pytest.raises(ModelError, match="cannot be loaded"):
        load_model(tmp_path / "other")
    without(folders["llama"], tmp_path / "nan", ["layers.1.mlp.up_proj"], lambda x: x * float("nan"))
    with pytest.raises(DataError, match="must be finite"):
        capture(tmp_path / "nan", texts, layer=1)
