"""An SAE as SAEBench's module: what its own base class checks, and what its evaluations read."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch

from saekit.errors import ConfigError
from saekit.sae.model import SAE
from saekit.sae.rules import JumpReLURule, TopKRule
from saekit.sae.scaling import Scaling
from saekit.store.exports import export
from saekit.store.saebench import as_module

N, D = 32, 8


@pytest.fixture
def sae() -> SAE:
    g = torch.Generator().manual_seed(0)
    W_enc, W_dec, b_enc, b_dec = (torch.randn(*shape, generator=g) for shape in ((N, D), (N, D), (N,), (D,)))
    where = {"model": "google/gemma-2-2b", "hook": "layers.12", "layer": 12, "context": 128, "data": "owner/text"}
    scaling = Scaling("standardize", scale=torch.linspace(0.5, 2, D), mean=torch.linspace(-1, 1, D))
    return SAE(W_enc, b_enc, W_dec, b_dec, TopKRule(4), b_pre=b_dec, provenance=where, scaling=scaling)


def x(rows=12):
    return torch.randn(rows, D, generator=torch.Generator().manual_seed(1))


def test_what_the_base_class_of_sae_bench_checks(sae):
    module = as_module(sae)
    assert module.W_dec.shape == (module.cfg.d_sae, module.cfg.d_in)
    assert module.W_enc.shape == (module.cfg.d_in, module.cfg.d_sae)
    torch.testing.assert_close(module.W_dec.data.norm(dim=1), torch.ones(N))
    acts = x(12).view(3, 4, D)
    encoded = module.encode(acts)
    assert encoded.shape == (3, 4, N)
    assert ((encoded > 0).sum(-1) == 4).all()
    torch.testing.assert_close(module(acts.reshape(-1, D)).view(acts.shape), module.decode(encoded))


@pytest.mark.parametrize("rule", [TopKRule(4), JumpReLURule(torch.linspace(0.1, 2, N))])
def test_it_computes_what_the_sae_computes(sae, rule):
    sae = sae.replace(rule=rule)
    module = as_module(sae)
    torch.testing.assert_close(module(x()), sae.reconstruct(x()), rtol=1e-4, atol=1e-4)
    lengths = sae.W_dec / sae.scaling.scale  # in units of the rows
    expected = sae.encode(x()).to_dense() * lengths.norm(dim=1)
    torch.testing.assert_close(module.encode(x()), expected, rtol=1e-4, atol=1e-4)
    # ... and the parameters alone say the same
    pre = (x() - (0 if module.sae.b_pre is None else module.sae.b_pre)) @ module.W_enc + module.b_enc
    torch.testing.assert_close(
        pre.gather(1, expected.argmax(1)[:, None]), module.encode(x()).gather(1, expected.argmax(1)[:, None])
    )


def test_it_moves_as_a_module(sae):
    module = as_module(sae)
    moved = module.to(device="cpu", dtype=torch.bfloat16)
    assert moved is module
    assert {module.dtype, module.W_enc.dtype, module.encode(x()).dtype} == {torch.bfloat16}
    assert (module.cfg.dtype, module.cfg.device) == ("bfloat16", "cpu")
    module.float()
    assert module(x()).dtype == torch.float32
    assert not any(parameter.requires_grad for parameter in module.parameters())
    assert {"W_enc", "W_dec", "b_enc", "b_dec"} == set(module.state_dict())


def test_the_configuration_is_the_one_that_evaluations_read(sae):
    cfg = as_module(sae).cfg
    assert (cfg.model_name, cfg.hook_name, cfg.hook_layer) == ("gemma-2-2b", "blocks.12.hook_resid_post", 12)
    assert (cfg.d_in, cfg.d_sae, cfg.context_size, cfg.hook_head_index) == (D, N, 128, None)
    assert json.loads(json.dumps(cfg.to_dict()))["activation_fn_kwargs"] == {"k": 4}
    cfg.metadata = {"added": "by the evaluation"}
    assert "metadata" not in cfg.to_dict()
    mlp = as_module(sae.replace(provenance={"hook": "layers.3.mlp"}), model_name="gpt2").cfg
    assert (mlp.model_name, mlp.hook_name, mlp.hook_layer) == ("gpt2", "blocks.3.hook_mlp_out", 3)


def test_saes_of_saelens_keep_the_name_of_their_hook(sae, tmp_path):
    export(sae, tmp_path, "saelens")
    known = SAE.load(tmp_path).provenance
    assert known["hook"] == "layers.12"
    assert json.loads((tmp_path / "cfg.json").read_text())["metadata"]["hook_name"] == "blocks.12.hook_resid_post"
    assert as_module(SAE.load(tmp_path)).cfg.hook_name == "blocks.12.hook_resid_post"


def test_what_codes_alone_do_not_decode_is_refused(sae):
    for other, what in (
        (sae.replace(scaling=Scaling("layer_norm")), "scaled each by itself"),
        (sae.replace(scaling=Scaling(), W_skip=torch.eye(D)), "a skip path"),
    ):
        with pytest.raises(ConfigError, match=what):
            as_module(other)
    with pytest.raises(ConfigError, match="`hook_name` must be given"):
        as_module(sae.replace(provenance={"model": "gpt2"}))
    with pytest.raises(ConfigError, match="`model_name` must be given"):
        as_module(sae.replace(provenance={"hook": "layers.1"}))


def test_nothing_imports_it():
    code = "import sys, saekit.cli; saekit.SAE; saekit.evaluate; print('saekit.store.saebench' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "False\n"


def test_the_evaluations_themselves_run(sae):
    """Where sae-bench is installed: losses and sparsity of a small random model with the module in it."""
    core = pytest.importorskip("sae_bench.evals.core.main")
    from sae_bench.sae_bench_utils.general_utils import load_and_format_sae
    from transformer_lens import HookedTransformer, HookedTransformerConfig

    shape = {"n_layers": 2, "d_model": D, "n_ctx": 32, "d_head": 4, "n_heads": 2, "d_vocab": 50, "d_mlp": 16}
    model = HookedTransformer(HookedTransformerConfig(**shape, act_fn="gelu", device="cpu"))
    tokens = torch.randint(3, 50, (4, 32))

    class Texts:
        store_batch_size_prompts, context_size, normalize_activations = 4, 32, "none"

        def get_batch_tokens(self, *_):
            return tokens

        get_batch_tokenized_data = get_batch_tokens

    module = as_module(sae.replace(provenance={**sae.provenance, "hook": "layers.1"}))
    name, module, _ = load_and_format_sae("mine", module, "cpu")
    assert name == "custom_sae"
    module = module.to(device="cpu", dtype=torch.float32)
    losses = core.get_recons_loss(module, model, tokens, Texts(), True, True)
    assert all(bool(torch.isfinite(loss).all()) for loss in losses.values())
    assert len(core.get_featurewise_weight_based_metrics(module)["max_decoder_cosine_sim"]) == N
    metrics, _ = core.get_sparsity_and_variance_metrics(
        module, model, Texts(), 1, compute_l2_norms=True, compute_sparsity_metrics=True,
        compute_variance_metrics=True, compute_featurewise_density_statistics=True, eval_batch_size_prompts=4,
        model_kwargs={},
    )  # fmt: skip
    assert metrics["l0"] == pytest.approx(4)


def test_probes_take_its_codes(sae, monkeypatch):
    """Where sae-probes is installed: what it makes of its module is what saekit encodes."""
    probes = pytest.importorskip("sae_probes.generate_sae_activations")
    train, test = (x(40), [0, 1] * 20), (x(10), [0, 1] * 5)
    monkeypatch.setattr(probes, "get_xy_traintest", lambda *_, **__: (*train, *test))
    monkeypatch.setattr(probes, "DATASET_SIZES", {"d": 200})
    found = probes.generate_sae_activations(
        as_module(sae), "normal", "d", "blocks.12.hook_resid_post", "gemma-2-2b", "cpu", None, None, "", batch_size=16
    )
    torch.testing.assert_close(found.X_train, as_module(sae).encode(train[0]))
