"""The control with random weights: same architecture, own digest, found again by its name."""

from __future__ import annotations

import pytest
import torch

from saekit.errors import ConfigError, ModelError
from saekit.models.deferred import defer_model
from saekit.models.loading import load_language_model, load_model
from saekit.models.pretrained import find_model
from saekit.models.randomized import randomized


@pytest.mark.parametrize("kind", ["llama", "gpt2", "bert"])
def test_weights_are_gaussians_of_the_same_mean_and_deviation(models, kind):
    model = models[kind]
    before = {name: p.clone() for name, p in model.model.named_parameters()}
    other = randomized(model, seed=1)
    kept = {id(p) for m in other.model.modules() if isinstance(m, torch.nn.Embedding) for p in m.parameters()}
    for name, p in other.model.named_parameters():
        old = before[name]
        assert torch.equal(dict(model.model.named_parameters())[name], old)  # the model itself is as it was
        if id(p) in kept:
            assert torch.equal(p, old)
            continue
        assert not torch.isclose(p, old).any() or old.std() == 0
        error = 5 * old.std() / old.numel() ** 0.5
        assert abs(p.mean() - old.mean()) <= error
        assert abs(p.std() - old.std()) <= error
    assert {id(p) for p in other.model.parameters()} - kept


def test_a_name_and_a_value_give_the_same_model(folders, models):
    named = load_language_model(f"randomized-3:{folders['llama']}")
    made = randomized(models["llama"], seed=3)
    assert named.digest == made.digest != models["llama"].digest
    assert named.name == made.name == f"randomized-3:{models['llama'].name}"
    assert named.info == made.info
    assert all(torch.equal(a, b) for a, b in zip(named.model.parameters(), made.model.parameters(), strict=True))
    assert named.digest != load_language_model(f"randomized:{folders['llama']}").digest


def test_it_is_found_again_by_its_path(folders):
    loaded = load_model(f"randomized-3:{folders['llama']}")
    again = find_model(loaded.info["model_path"])
    assert again.digest == loaded.digest
    deferred = defer_model(loaded.info["model_path"])
    assert deferred.digest == loaded.digest == deferred.load().digest


def test_a_low_precision_gives_the_same_numbers_rounded(folders):
    wide, low = (load_model(f"randomized:{folders['gpt2']}", dtype=dtype) for dtype in ("float32", "bfloat16"))
    for a, b in zip(wide.model.parameters(), low.model.parameters(), strict=True):
        assert torch.allclose(a, b.float(), rtol=2e-2, atol=2e-3)


def test_what_is_refused(models):
    with pytest.raises(ModelError, match=r"must name one model after `randomized:`, such as randomized:builtin"):
        load_model("randomized:")
    with pytest.raises(ModelError, match="must name one model after `randomized-2:`"):
        randomized(randomized(models["llama"]), seed=2)
    with pytest.raises(ConfigError, match="`seed`"):
        randomized(models["llama"], seed=-1)
    with pytest.raises(ModelError, match="no such folder"):
        load_model("randomized:./nowhere")
