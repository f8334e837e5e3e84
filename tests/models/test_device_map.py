"""Models larger than one device: what accelerate spreads or offloads gives the same rows, and the same SAEs."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

import saekit as sk
from saekit.models.pretrained import PretrainedModel
from saekit.rows.settings import StreamSettings
from saekit.training.settings import TrainSettings

ON_DISK = {
    **{f"model.layers.{layer}": "disk" for layer in range(4)},
    **{"model.embed_tokens": "disk", "lm_head": "disk", "model.norm": "cpu", "model.rotary_emb": "cpu"},
}


def rows(**placement):
    return sk.stream("builtin", "builtin", layer=2, tokens=3000, settings=StreamSettings(**placement))


@pytest.mark.parametrize("device_map", ["auto", ON_DISK], ids=["auto", "disk"])
def test_rows_and_saes_are_those_of_a_model_on_one_device(device_map):
    pytest.importorskip("accelerate")
    whole, spread = rows(device="cpu"), rows(device_map=device_map)
    for mine, other in zip(spread.batches(512), whole.batches(512), strict=True):
        assert torch.equal(mine.x, other.x)
    settings = TrainSettings(batch_rows=256, device="cpu")
    [mine], [other] = (
        sk.train(sk.TopK(64, k=4), each, tokens=1024, settings=settings, progress=False) for each in (spread, whole)
    )
    assert torch.equal(mine.W_dec, other.W_dec)
    assert spread.seconds["lm"] > 0  # a thread of its own made the rows meanwhile


def test_inputs_of_an_offloaded_model_go_where_it_computes():
    model = torch.nn.Linear(2, 2, device="meta")
    model._hf_hook = SimpleNamespace(execution_device="cpu")
    assert PretrainedModel.device.fget(SimpleNamespace(model=model)) == torch.device("cpu")
