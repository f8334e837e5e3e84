"""Rows of a text are the same alone and beside others, for models that padding would change too."""

from __future__ import annotations

import pytest
import torch
import transformers

from fixtures.tiny_models import CONTEXT, LAYERS, SIZES, TEXTS, WIDTH, _tokenizer
from saekit.errors import ModelError
from saekit.models.loading import load_language_model
from saekit.models.quiet import quiet_transformers
from saekit.rows.capture import capture
from saekit.rows.settings import CaptureSettings
from saekit.rows.tokens import batching_on, special_tokens


def language_model(folder, config, kind="bert"):
    with quiet_transformers(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = transformers.AutoModel.from_config(config)
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.3)
        model.save_pretrained(folder)
        _tokenizer(kind).save_pretrained(folder)
    return load_language_model(folder)


@pytest.fixture(scope="module")
def fnet(tmp_path_factory):
    config = transformers.FNetConfig(
        **SIZES, hidden_size=WIDTH, num_hidden_layers=LAYERS, intermediate_size=32, max_position_embeddings=CONTEXT
    )
    return language_model(tmp_path_factory.mktemp("fnet"), config)


@pytest.fixture(scope="module")
def bart(tmp_path_factory):
    config = transformers.BartConfig(
        **SIZES, d_model=WIDTH, encoder_layers=LAYERS, decoder_layers=1, encoder_attention_heads=2,
        decoder_attention_heads=2, encoder_ffn_dim=32, decoder_ffn_dim=32, max_position_embeddings=CONTEXT,
    )  # fmt: skip
    return language_model(tmp_path_factory.mktemp("bart"), config)


@pytest.mark.parametrize("kind", ["llama", "gpt2", "neox", "bert", "roberta"])
@pytest.mark.parametrize("padding", ["right", "left"])
def test_ordinary_models_share_padded_batches(models, kind, padding):
    assert batching_on(models[kind], padding) == "padded"
    rows = capture(models[kind], TEXTS[:2], layer=0, settings=CaptureSettings(padding=padding))
    assert "batching" not in rows.info, "what was recorded before is recorded as before"


@pytest.mark.parametrize(
    ("name", "padding", "batching"),
    [
        ("fnet", "right", "equal lengths"),
        ("fnet", "left", "equal lengths"),
        ("bart", "right", "padded"),
        ("bart", "left", "equal lengths"),
    ],
)
def test_alone_and_beside_others(request, name, padding, batching):
    lm = request.getfixturevalue(name)
    settings = CaptureSettings(padding=padding, outliers=None)
    together = capture(lm, TEXTS, layer=1, settings=settings)
    assert together.info.get("batching", "padded") == batching
    alone = torch.cat([capture(lm, [text], layer=1, settings=settings).x for text in TEXTS])
    torch.testing.assert_close(together.x, alone, atol=1e-4, rtol=1e-4)


class _Words:
    """A tokenizer that knows a few words, and drops all others."""

    all_special_ids = (1, 2)
    words = ("<s>", "</s>", "cat", "dog")

    def __init__(self, keeps: bool = True) -> None:
        self.keeps = keeps

    def __len__(self) -> int:
        return 5

    def decode(self, ids):
        return self.words[ids[0] - 1] if ids[0] else "?"

    def __call__(self, text, add_special_tokens):
        ids = [self.words.index(word) + 1 for word in text.split() if word in self.words[2:]]
        return {"input_ids": [1, *(ids if self.keeps else ids[:-1]), 2] if add_special_tokens else ids}


def test_added_tokens_of_a_tokenizer_that_knows_neither_a_nor_b():
    found = special_tokens(_Words())
    assert (found.before, found.after) == ((1,), (2,))


def test_a_tokenizer_that_changes_texts_is_refused():
    with pytest.raises(ModelError, match="must be clear which tokens the tokenizer adds"):
        special_tokens(_Words(keeps=False))


def window_model(kind):
    """Return a config whose model makes a text longer: padding to whole windows."""
    common = {**SIZES, "attention_window": [8] * LAYERS, "max_position_embeddings": 70}
    if kind == "longformer":
        return transformers.LongformerConfig(
            **{**common, "pad_token_id": 0}, hidden_size=WIDTH, num_hidden_layers=LAYERS, num_attention_heads=2,
            intermediate_size=32,
        )  # fmt: skip
    common |= {"max_encoder_position_embeddings": 70, "max_decoder_position_embeddings": 70}
    return transformers.LEDConfig(
        **common, d_model=WIDTH, encoder_layers=LAYERS, decoder_layers=1, encoder_attention_heads=2,
        decoder_attention_heads=2, encoder_ffn_dim=32, decoder_ffn_dim=32,
    )  # fmt: skip


@pytest.mark.parametrize("kind", ["longformer", "led"])
def test_padding_that_the_model_itself_adds_never_becomes_a_row(tmp_path, kind):
    lm = language_model(tmp_path, window_model(kind))
    texts = TEXTS[:3]  # no length is a whole number of windows
    rows = capture(lm, texts, layer=LAYERS - 2, settings=CaptureSettings(outliers=None))
    alone = []
    for text in texts:
        ids = torch.tensor([lm.tokenizer(text)["input_ids"]])
        with torch.no_grad():
            states = lm.model(input_ids=ids, output_hidden_states=True).hidden_states
        alone.append(states[LAYERS - 1][0, 1 : ids.shape[1] - 1])
    torch.testing.assert_close(rows.x, torch.cat(alone), atol=1e-5, rtol=1e-4)


def test_rows_that_depend_on_random_hashes_are_refused(tmp_path):
    config = transformers.ReformerConfig(
        **SIZES, attn_layers=["local", "lsh"], hidden_size=WIDTH, num_attention_heads=2, attention_head_size=8,
        feed_forward_size=32, axial_pos_embds=False, max_position_embeddings=64, local_attn_chunk_length=8,
        lsh_attn_chunk_length=8, num_buckets=4,
    )  # fmt: skip
    lm = language_model(tmp_path, config)
    with pytest.raises(ModelError, match="sorts tokens by random hashes"):
        capture(lm, TEXTS, layer=0)
