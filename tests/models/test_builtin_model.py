"""The built-in language model: loads like any other, small, and better than a compressor on text it never saw."""

from __future__ import annotations

import json
import lzma
import math
import re

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from saekit.assets import builtin_model_path
from saekit.inputs import corpus

FOLDER = builtin_model_path()


@pytest.fixture(scope="module")
def model():
    return AutoModelForCausalLM.from_pretrained(FOLDER, local_files_only=True).eval()


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(FOLDER, local_files_only=True)


@pytest.fixture(scope="module")
def texts(tokenizer):
    """Some held-out documents, each of which fits into the context."""
    heldout = corpus.docs(split="heldout")[::50]
    return [document.text for document in heldout if len(tokenizer(document.text).input_ids) <= 512]


def test_files_are_small_and_ordinary():
    files = {path.name: path.stat().st_size for path in FOLDER.iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "README.md"} <= set(files)
    assert sum(files.values()) <= 12e6


def test_loads_in_float32_with_tied_embeddings(model):
    assert model.dtype == torch.float32
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert model.config.hidden_size >= 192
    assert model.config.num_hidden_layers >= 4
    assert all(torch.isfinite(parameter).all() for parameter in model.parameters())


def test_tokenizer_prepends_bos_and_round_trips_any_text(tokenizer, model):
    text = "def f(x):\n\treturn x ** 2  # ünïcode 漢字 🙂\r\n\0"
    ids = tokenizer(text).input_ids
    assert ids[0] == tokenizer.bos_token_id == model.config.bos_token_id
    assert tokenizer.bos_token_id not in tokenizer(text, add_special_tokens=False).input_ids
    assert tokenizer.decode(ids, skip_special_tokens=True) == text
    assert len(tokenizer) == model.config.vocab_size
    assert tokenizer.model_max_length == model.config.max_position_embeddings
    assert tokenizer.eos_token_id == model.config.eos_token_id == tokenizer.pad_token_id


@torch.no_grad()
def test_beats_xz_and_uniform_on_held_out_modules(model, tokenizer, texts):
    n_bytes = sum(len(text.encode()) for text in texts)
    assert 4_000 < n_bytes < 40_000
    nats = 0.0
    for text in texts:
        ids = torch.tensor([tokenizer(text).input_ids])
        logits = model(input_ids=ids).logits[0, :-1]
        nats += float(torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="sum"))
    bits_per_byte = nats / math.log(2) / n_bytes
    n_tokens = sum(len(tokenizer(text).input_ids) - 1 for text in texts)
    uniform = math.log2(len(tokenizer)) * n_tokens / n_bytes
    xz = 8 * len(lzma.compress("\0".join(texts).encode(), preset=9 | lzma.PRESET_EXTREME)) / n_bytes
    assert bits_per_byte < 0.5 * uniform
    assert bits_per_byte < 0.75 * xz
    assert bits_per_byte < 1.6


def test_padding_does_not_change_the_prediction(model, tokenizer):
    batch = tokenizer(["Return the", "Compute the mean of all values"], return_tensors="pt", padding=True)
    with torch.no_grad():
        together = model(**batch).logits[0, 2]
        alone = model(**tokenizer("Return the", return_tensors="pt")).logits[0, 2]
    torch.testing.assert_close(together, alone, atol=1e-4, rtol=1e-4)


def test_card_states_the_numbers_of_the_evaluation():
    card = (FOLDER / "README.md").read_text(encoding="utf-8")
    results = json.loads((FOLDER / "evaluation.json").read_text(encoding="utf-8"))
    stated = [float(number) for number in re.findall(r"\| *\**(\d\.\d{3})\** *\|", card)]
    assert stated == [round(value, 3) for value in results["bits_per_byte"].values()]
    assert f"{results['parameters']:,}" in card
    model, five_gram, xz, _ = results["bits_per_byte"].values()
    assert model < five_gram < xz


def test_the_model_was_judged_on_the_held_out_text_that_the_corpus_gives_today():
    heldout = corpus.docs(split="heldout")
    card = json.loads((FOLDER / "evaluation.json").read_text())["heldout"]
    libraries = json.loads((FOLDER / "training.json").read_text())["corpus"]["heldout"]["libraries"]
    versions = {name: library["version"] for name, library in libraries.items()}
    if versions != corpus.library_versions():
        pytest.skip(f"other releases of the documented libraries than the model saw: {corpus.library_versions()}")
    assert len(heldout) == card["documents"]
    assert corpus.corpus_digest(heldout) == card["digest"]
