"""Tiny random language models, each in a folder as transformers writes it."""

from __future__ import annotations

import warnings

with warnings.catch_warnings():
    # libraries that change warning filters do so when they are first imported; here, before the guard looks
    import datasets  # noqa: F401
    import sympy  # noqa: F401

from pathlib import Path

import pytest
import torch
import transformers
from transformers import PreTrainedTokenizerFast

from saekit.data import LanguageModel, load_model
from saekit.data.quiet import quiet_transformers

WORDS = tuple(
    "the cat sat on a mat and then it saw one big dog run past two old trees near my house today".split()  # noqa: SIM905
)

TEXTS = [
    " ".join(WORDS[(3 * i + j * (i + 1)) % len(WORDS)] for j in range(n))
    for i, n in enumerate([5, 1, 12, 40, 3, 100, 7, 23, 61, 2, 9, 33])
]

SIZES = {"vocab_size": 40, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
WIDTH, LAYERS, CONTEXT = 16, 3, 24


def _config(kind: str) -> transformers.PretrainedConfig:
    common = {**SIZES, "num_hidden_layers": LAYERS, "num_attention_heads": 2, "hidden_size": WIDTH}
    common |= {"intermediate_size": 32, "max_position_embeddings": CONTEXT}
    if kind == "llama":
        return transformers.LlamaConfig(**common, num_key_value_heads=1, architectures=["LlamaForCausalLM"])
    if kind == "neox":
        return transformers.GPTNeoXConfig(**common, architectures=["GPTNeoXForCausalLM"])
    if kind == "gpt2":
        sizes = {"n_embd": WIDTH, "n_layer": LAYERS, "n_head": 2, "n_positions": CONTEXT}
        return transformers.GPT2Config(**SIZES, **sizes, architectures=["GPT2LMHeadModel"])
    if kind == "roberta":
        # RoBERTa numbers positions from padding_idx + 1
        return transformers.RobertaConfig(**{**common, "max_position_embeddings": CONTEXT + 1})
    return transformers.BertConfig(**common)


def _tokenizer(kind: str) -> PreTrainedTokenizerFast:
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    vocabulary = {"<pad>": 0, "<s>": 1, "</s>": 2, "<unk>": 3, **{word: i for i, word in enumerate(WORDS, 4)}}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    around = {"llama": "<s> $A", "bert": "<s> $A </s>", "roberta": "<s> $A </s>"}.get(kind)
    if around:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=around, special_tokens=[("<s>", 1), ("</s>", 2)]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        unk_token="<unk>",
        eos_token="</s>",
        bos_token="<s>",
        model_max_length=CONTEXT,
    )


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folders of tiny models by kind: llama, gpt2, neox (decoders), bert, roberta (encoders)."""
    made = {}
    for kind in ("llama", "gpt2", "neox", "bert", "roberta"):
        folder = tmp_path_factory.mktemp(kind) / f"tiny-{kind}"
        config = _config(kind)
        auto = transformers.AutoModelForCausalLM if config.architectures else transformers.AutoModel
        with quiet_transformers(), torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = auto.from_config(config)
            for parameter in model.parameters():
                # the usual initial values make all blocks nearly alike
                torch.nn.init.normal_(parameter, std=0.3)
            model.save_pretrained(folder)
            _tokenizer(kind).save_pretrained(folder)
        made[kind] = folder
    return made


@pytest.fixture(scope="session")
def models(folders: dict[str, Path]) -> dict[str, LanguageModel]:
    """The tiny models, loaded."""
    return {kind: load_model(folder) for kind, folder in folders.items()}


@pytest.fixture
def texts() -> list[str]:
    """Twelve texts of 1 to 100 words; the context of the tiny models is 24."""
    return list(TEXTS)
