"""Loading language models."""

from __future__ import annotations

import json

import pytest
import torch

from saekit.models.language import LanguageModel
from saekit.models.loading import load_model


@pytest.mark.parametrize("kind", ["llama", "gpt2", "neox", "bert", "roberta"])
def test_what_is_known_of_a_model(models, kind):
    lm = models[kind]
    assert (lm.d_model, lm.context) == (16, 24)
    assert lm.is_causal == (kind in ("llama", "gpt2", "neox"))
    assert lm.name == f"tiny-{kind}"
    assert not lm.model.training
    assert not any(p.requires_grad for p in lm.model.parameters())
    assert load_model(lm) is lm
    assert json.dumps(lm.info)


def test_real_models(stories, minilm):
    lm = load_model(stories)
    assert (lm.d_model, lm.context, lm.is_causal) == (64, 512, True)
    encoder = load_model(minilm, device="cpu")
    assert (encoder.d_model, encoder.context, encoder.is_causal) == (384, 512, False)


def test_loading_leaves_global_state_alone(folders):
    from transformers.utils import logging

    level, bars, state = logging.get_verbosity(), logging.is_progress_bar_enabled(), torch.random.get_rng_state()
    try:
        logging.set_verbosity_info()
        logging.enable_progress_bar()
        load_model(folders["bert"])
        assert logging.get_verbosity() == logging.INFO
        assert logging.is_progress_bar_enabled()
        assert torch.equal(torch.random.get_rng_state(), state)
    finally:
        logging.set_verbosity(level)
        if not bars:
            logging.disable_progress_bar()


def test_nothing_is_printed(folders, capfd):
    load_model(folders["gpt2"])
    assert capfd.readouterr() == ("", "")


def test_language_model_is_exported():
    import saekit

    assert saekit.load_model is load_model
    assert LanguageModel.__dataclass_params__.frozen
