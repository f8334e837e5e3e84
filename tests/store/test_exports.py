"""What is exported computes what it computed, or is refused with what the format lacks."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from saekit import SAE
from saekit.errors import ConfigError, FormatError
from saekit.sae.rules import GroupMaxRule, JumpReLURule, ReLURule, TopKRule
from saekit.sae.scaling import Scaling
from saekit.store.exports import EXPORTS, export, fold_constants

N, D = 24, 8
RULES = {
    "relu": ReLURule(), "topk": TopKRule(4), "abstopk": TopKRule(4, sign="magnitude"),
    "signed": TopKRule(4, sign="signed"), "jumprelu": JumpReLURule(torch.linspace(-0.1, 0.6, N)),
    "groupmax": GroupMaxRule(4), "weighted": TopKRule(4, torch.linspace(0.5, 2, N)),
}  # fmt: skip
SCALINGS = {
    "none": Scaling(), "scalar": Scaling("scalar", torch.tensor(0.3)), "layer_norm": Scaling("layer_norm"),
    "standardize": Scaling("standardize", scale=torch.linspace(0.5, 2, D), mean=torch.linspace(-1, 1, D)),
    "row_norm": Scaling("row_norm"),
}  # fmt: skip
CAN = {  # what each library's classes can express
    "saelens": ({"relu", "topk", "abstopk", "jumprelu"}, set(SCALINGS)),
    "sparsify": ({"topk", "groupmax"}, {"none", "scalar", "standardize"}),
    "dictionary_learning": ({"relu", "topk", "jumprelu"}, {"none", "scalar", "standardize"}),
    "native": (set(RULES), set(SCALINGS)),
}


def make(rule, scaling="none", b_pre="b_dec", d_out=D, skip=False):
    g = torch.Generator().manual_seed(3)
    b_dec = torch.randn(d_out, generator=g) * 0.3
    biases = {"b_dec": b_dec if d_out == D else None, "none": None, "own": torch.randn(D, generator=g) * 0.3}
    return SAE(
        W_enc=torch.randn(N, D, generator=g), b_enc=torch.randn(N, generator=g) * 0.3,
        W_dec=torch.randn(N, d_out, generator=g), b_dec=b_dec, rule=RULES[rule], b_pre=biases[b_pre],
        scaling=SCALINGS[scaling], W_skip=torch.randn(D, d_out, generator=g) * 0.2 if skip else None,
    )  # fmt: skip


@pytest.mark.parametrize("b_pre", ["b_dec", "none", "own"])
@pytest.mark.parametrize("scaling", SCALINGS)
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("to", EXPORTS)
def test_export_is_lossless_or_refused(to, rule, scaling, b_pre, tmp_path):
    sae = make(rule, scaling, b_pre)
    rules, scalings = CAN[to]
    if rule in rules and scaling in scalings:
        assert max(export(sae, tmp_path / "out", to)) < 1e-5
    else:
        with pytest.raises(ConfigError, match=f"the format {to} has no .* Nothing was written"):
            export(sae, tmp_path / "out", to)
        assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("to", "rule"), [("saelens", "relu"), ("saelens", "jumprelu"), ("sparsify", "topk")])
@pytest.mark.parametrize("skip", [False, True])
def test_transcoders(to, rule, skip, tmp_path):
    d_out = D if to == "sparsify" else D + 2  # sparsify's skip and biases are of one width
    sae = make(rule, "none", "none", d_out=d_out, skip=skip)
    assert max(export(sae, tmp_path / "out", to)) < 1e-5


@settings(max_examples=30, deadline=None)
@given(scaling=st.sampled_from(["scalar", "standardize"]), rule=st.sampled_from(sorted(RULES)), skip=st.booleans())
def test_folding_constants_changes_nothing(scaling, rule, skip):
    sae = make(rule, scaling, "own", skip=skip)
    folded = fold_constants(sae)
    assert folded.scaling.kind == "none"
    x = torch.randn(50, D, generator=torch.Generator().manual_seed(9)) * 3
    torch.testing.assert_close(folded.encode(x).to_dense(), sae.encode(x).to_dense(), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(folded.reconstruct(x), sae.reconstruct(x), atol=1e-4, rtol=1e-5)


def test_writing_something_else_is_an_error(tmp_path, monkeypatch):
    def forget_the_bias(sae, folder):
        EXPORTS["native"](sae.replace(b_enc=torch.zeros_like(sae.b_enc)), folder)

    monkeypatch.setitem(EXPORTS, "sparsify", forget_the_bias)
    with pytest.raises(FormatError, match="computes something else"):
        export(make("topk"), tmp_path / "out", "sparsify")


def test_folder_in_use_is_left_alone(tmp_path):
    (tmp_path / "note").write_text("mine")
    with pytest.raises(ConfigError, match="must not exist, or be an empty folder"):
        export(make("topk"), tmp_path, "saelens")
    with pytest.raises(ConfigError, match="`to` must be one of"):
        export(make("topk"), tmp_path / "x", "saelense")


@pytest.mark.parametrize("to", EXPORTS)
def test_tensors_that_share_memory(to, tmp_path):
    W = torch.randn(16, 6, generator=torch.Generator().manual_seed(0))
    tied = SAE(W_enc=W, b_enc=W[:, 0], W_dec=W, b_dec=W[0], rule=TopKRule(3))
    assert max(export(tied, tmp_path / to, to)) < 1e-5
