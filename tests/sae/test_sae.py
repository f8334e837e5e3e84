"""Laws of the SAE value, its rules and its codes."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from saekit.errors import ConfigError, ShapeError
from saekit.kernels.dispatch import topk_encode
from saekit.sae import rules
from saekit.sae.codes import Codes
from saekit.sae.freeze import freeze_batchtopk, freeze_gated
from saekit.sae.model import SAE
from saekit.sae.scaling import Scaling

RULES = ["relu", "topk", "topk-ranked", "topk-capped", "jumprelu", "groupmax", "groupmax-ranked"]


def make_sae(rule: str, seed: int = 0, n: int = 24, d: int = 7, scaling: str = "none", skip: bool = False) -> SAE:
    g = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    rank = draw(n).exp()
    made = {
        "relu": lambda: rules.ReLURule(),
        "topk": lambda: rules.TopKRule(3),
        "topk-ranked": lambda: rules.TopKRule(3, rank),
        "topk-capped": lambda: rules.TopKRule(3, threshold=rank.abs() / 4),
        "jumprelu": lambda: rules.JumpReLURule(draw(n).abs()),
        "groupmax": lambda: rules.GroupMaxRule(4),
        "groupmax-ranked": lambda: rules.GroupMaxRule(4, torch.randint(4, (n,), generator=g), rank),
    }[rule]()
    kinds = {
        "none": lambda: Scaling(),
        "scalar": lambda: Scaling("scalar", scale=torch.tensor(0.3, dtype=torch.float64)),
        "standardize": lambda: Scaling("standardize", scale=draw(d).exp(), mean=draw(d)),
        "layer_norm": lambda: Scaling("layer_norm"),
        "row_norm": lambda: Scaling("row_norm"),
    }
    return SAE(
        W_enc=draw(n, d), b_enc=draw(n), W_dec=draw(n, d), b_dec=draw(d), b_pre=draw(d), rule=made,
        scaling=kinds[scaling](), W_skip=draw(d, d) if skip else None,
    )  # fmt: skip


def rows(seed: int = 1, n: int = 9, d: int = 7) -> torch.Tensor:
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def dense_codes(sae: SAE, x: torch.Tensor) -> torch.Tensor:
    """The definition, one row and one latent at a time."""
    out = torch.zeros(len(x), sae.n_latents, dtype=x.dtype)
    for r, pre in enumerate(sae.pre(x)):
        settings_ = sae.rule.settings()
        tensors = sae.rule.tensors()
        weighted = pre * tensors["rank"] if "rank" in tensors else pre
        if sae.rule.name == "topk":
            keep = weighted.sort(descending=True).indices[: settings_["k"]].tolist()
            keep = [j for j in keep if pre[j] > tensors.get("threshold", pre - 1)[j]]
        elif sae.rule.name == "groupmax":
            group = tensors.get("group", rules.contiguous_groups(sae.n_latents, settings_["k"]))
            members = [(group == g).nonzero()[:, 0] for g in group.unique()]
            keep = [int(m[weighted[m].argmax()]) for m in members]
        elif sae.rule.name == "jumprelu":
            keep = (pre > tensors["threshold"]).nonzero()[:, 0].tolist()
        else:
            keep = range(sae.n_latents)
        for j in keep:
            out[r, j] = max(pre[j], 0.0)
    return out


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("scaling", ["none", "scalar", "standardize", "layer_norm", "row_norm"])
def test_encode_and_decode_are_the_formula(rule: str, scaling: str) -> None:
    sae, x = make_sae(rule, scaling=scaling, skip=True), rows()
    z = dense_codes(sae, x)
    torch.testing.assert_close(sae.encode(x).to_dense(), z)
    u, context = sae.scaling.apply(x)
    expected = sae.scaling.undo(z @ sae.W_dec + sae.b_dec + u @ sae.W_skip, context)
    torch.testing.assert_close(sae.reconstruct(x), expected)


@pytest.mark.parametrize("rule", RULES)
def test_encoding_a_row_never_depends_on_its_neighbours(rule: str) -> None:
    sae, x = make_sae(rule), rows(n=11)
    together = sae.encode(x)
    torch.testing.assert_close(Codes.cat([sae.encode(r[None]) for r in x]).to_dense(), together.to_dense())
    torch.testing.assert_close(sae.encode(x, block_rows=4).to_dense(), together.to_dense())


@pytest.mark.parametrize("rule", RULES)
def test_permuting_latents_changes_nothing_but_their_order(rule: str) -> None:
    sae, x = make_sae(rule), rows()
    order = torch.randperm(sae.n_latents, generator=torch.Generator().manual_seed(3))
    permuted = sae.permute(order)
    torch.testing.assert_close(permuted.reconstruct(x), sae.reconstruct(x))
    torch.testing.assert_close(permuted.encode(x).to_dense(), sae.encode(x).to_dense()[:, order])
    torch.testing.assert_close(sae.encode(x).permute(order).to_dense(), sae.encode(x).to_dense()[:, order])


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("scaling", ["none", "scalar"])
def test_folding_norms_keeps_reconstruction_and_l0(rule: str, scaling: str) -> None:
    sae, x = make_sae(rule, scaling=scaling), rows(n=50)
    folded = sae.fold_norms()
    torch.testing.assert_close(folded.W_dec.norm(dim=1), torch.ones(sae.n_latents, dtype=torch.float64))
    torch.testing.assert_close(folded.reconstruct(x), sae.reconstruct(x))
    assert torch.equal(folded.encode(x).to_dense() != 0, sae.encode(x).to_dense() != 0)


def test_a_norm_aware_topk_folds_into_a_plain_one() -> None:
    sae = make_sae("topk")
    aware = sae.replace(rule=rules.TopKRule(3, sae.W_dec.norm(dim=1)))
    folded = aware.fold_norms()
    torch.testing.assert_close(folded.reconstruct(rows()), aware.reconstruct(rows()))
    torch.testing.assert_close(
        folded.rule.rank, torch.ones_like(folded.b_enc)
    ) if folded.rule.rank is not None else None


@pytest.mark.parametrize("rule", ["relu", "jumprelu"])
def test_a_prefix_of_an_elementwise_sae_zeroes_the_rest(rule: str) -> None:
    sae, x = make_sae(rule), rows()
    small = sae.take(10)
    torch.testing.assert_close(small.encode(x).to_dense(), sae.encode(x).to_dense()[:, :10])
    torch.testing.assert_close(small.reconstruct(x), sae.decode(sae.encode(x).take(10)))


def test_before_and_after_selection_differ_for_topk() -> None:
    sae, x = make_sae("topk"), rows(n=40)
    before, after = sae.take(10).encode(x), sae.encode(x).take(10)
    assert before.n_latents == after.n_latents == 10
    assert after.nnz < before.nnz
    # Choosing first among all keeps a subset of what choosing among the prefix keeps.
    assert ((after.to_dense() != 0) <= (before.to_dense() != 0)).all()


def test_take_lowers_k_to_the_latents_left() -> None:
    small = make_sae("topk").take(2)
    assert small.rule.k == 2
    assert small.encode(rows()).n_latents == 2


def test_a_kept_value_that_is_not_positive_has_not_fired() -> None:
    sae = make_sae("topk")
    quiet = sae.replace(b_enc=sae.b_enc - 100)
    assert quiet.encode(rows()).nnz == 0
    torch.testing.assert_close(quiet.reconstruct(rows()), quiet.b_dec.expand(9, -1))


def test_frozen_gated_unit_computes_the_gated_codes() -> None:
    g = torch.Generator().manual_seed(5)
    n, d = 30, 6
    W, W_dec = (torch.randn(n, d, generator=g, dtype=torch.float64) for _ in range(2))
    b_gate, r, b_mag = (torch.randn(n, generator=g, dtype=torch.float64) for _ in range(3))
    sae = freeze_gated(W_gate=W, b_gate=b_gate, r_mag=r, b_mag=b_mag, W_dec=W_dec, b_dec=W_dec[0])
    x = rows(n=64, d=d)
    gated = ((x @ W.T + b_gate) > 0) * torch.relu(r.exp() * (x @ W.T) + b_mag)
    torch.testing.assert_close(sae.encode(x).to_dense(), gated)
    assert (sae.rule.tensors()["threshold"] >= 0).all()


@pytest.mark.parametrize("kind", ["none", "scalar", "standardize", "layer_norm", "row_norm"])
def test_scaling_is_its_formula_and_undo_undoes_it(kind: str) -> None:
    scaling, x = make_sae("relu", scaling=kind).scaling, rows()
    u, context = scaling.apply(x)
    expected = {
        "none": lambda: x,
        "scalar": lambda: 0.3 * x,
        "standardize": lambda: (x - scaling.mean) * scaling.scale,
        "layer_norm": lambda: (x - x.mean(1, keepdim=True)) / (x.std(1, keepdim=True) + 1e-5),
        "row_norm": lambda: x * 7**0.5 / x.norm(dim=1, keepdim=True),
    }[kind]()
    torch.testing.assert_close(u, expected)
    if kind == "layer_norm":  # as in every library, eps is added on the way in and not taken back
        torch.testing.assert_close(scaling.undo(u, context), u * x.std(1, keepdim=True) + x.mean(1, keepdim=True))
    else:
        torch.testing.assert_close(scaling.undo(u, context), x)


def test_topk_encode_returns_no_negative_value() -> None:
    values, _ = topk_encode(rows(), -torch.eye(7, dtype=torch.float64), torch.zeros(7, dtype=torch.float64), 7)
    assert (values >= 0).all()


def test_frozen_batchtopk_has_one_threshold() -> None:
    sae = freeze_batchtopk(make_sae("topk"), 0.7)
    z, pre = sae.encode(rows()).to_dense(), sae.pre(rows())
    torch.testing.assert_close(z, torch.where(pre > 0.7, pre, 0.0))


@given(n=st.integers(0, 12), m=st.integers(1, 9), seed=st.integers(0, 1000))
@settings(max_examples=40, deadline=None)
def test_codes_round_trip_and_row_selection(n: int, m: int, seed: int) -> None:
    g = torch.Generator().manual_seed(seed)
    z = torch.randn(n, m, generator=g) * (torch.rand(n, m, generator=g) < 0.4)
    codes = Codes.from_dense(z)
    assert torch.equal(codes.to_dense(), z)
    assert (codes.to_scipy().toarray() == z.numpy()).all()
    assert codes.l0() == pytest.approx(float((z != 0).sum()) / max(n, 1))
    assert torch.equal(Codes.cat([codes, codes]).to_dense(), torch.cat([z, z]))
    which = torch.randint(0, n, (5,), generator=g) if n else torch.zeros(0, dtype=torch.int64)
    assert torch.equal(codes.rows(which).to_dense(), z[which])
    assert torch.equal(codes.rows(slice(1, None, 2)).to_dense(), z[1::2])
    half = (m + 1) // 2
    assert torch.equal(codes.take(half).to_dense(), z[:, :half])


@pytest.mark.parametrize("rule", RULES)
def test_copies_and_casts_are_the_same_sae(rule: str) -> None:
    sae, x = make_sae(rule), rows()
    for twin in (copy.deepcopy(sae), pickle.loads(pickle.dumps(sae)), sae.to("cpu")):
        assert torch.equal(twin.reconstruct(x), sae.reconstruct(x))
    assert sae.to(dtype=torch.float32).reconstruct(x).dtype == torch.float32


def test_public_calls_leave_their_input_alone() -> None:
    sae, x = make_sae("jumprelu", scaling="standardize"), rows()
    before = {name: t.clone() for name, t in sae.tensors().items()} | {"x": x.clone()}
    sae.reconstruct(x), sae.fold_norms(), sae.take(3), sae.permute(torch.arange(24).flip(0))
    assert all(torch.equal(t, (sae.tensors() | {"x": x})[name]) for name, t in before.items())


def test_an_sae_never_requires_grad() -> None:
    sae = make_sae("relu")
    again = sae.replace(W_enc=sae.W_enc.clone().requires_grad_())
    assert not again.W_enc.requires_grad


def test_any_leading_axes() -> None:
    sae, x = make_sae("topk"), rows(n=12)
    torch.testing.assert_close(sae.reconstruct(x.reshape(3, 4, 7)), sae.reconstruct(x).reshape(3, 4, 7))
    torch.testing.assert_close(sae.reconstruct(x[0]), sae.reconstruct(x)[0])
    assert sae.reconstruct(x[:0]).shape == (0, 7)


def test_scores_follow_their_latents() -> None:
    sae, x = make_sae("topk"), rows()
    scored = sae.with_scores(place=range(24)).with_scores(half=[latent / 2 for latent in range(24)])
    assert scored.scores["place"].dtype == torch.float32
    assert torch.equal(scored.reconstruct(x), sae.reconstruct(x))
    order = torch.randperm(24, generator=torch.Generator().manual_seed(0))
    assert torch.equal(scored.permute(order).scores["place"], order.float())
    assert torch.equal(scored.permute(order).take(5).scores["half"], order[:5] / 2)
    assert scored.take(7).scores["place"].tolist() == list(range(7))
    for other in (scored.to(dtype=torch.bfloat16), scored.fold_norms(), copy.deepcopy(scored)):
        assert torch.equal(other.scores["place"], scored.scores["place"])
    assert sae.scores == {}


def test_what_does_not_fit_is_refused() -> None:
    sae = make_sae("topk")
    with pytest.raises(ShapeError, match=r"`scores\['stability'\]` must hold one number per latent, \(24,\)"):
        sae.with_scores(stability=[1.0])
    with pytest.raises(ConfigError, match=r"the name of a score must be letters, digits and underscores; got 'a\.b'"):
        sae.replace(scores={"a.b": range(24)})
    with pytest.raises(ShapeError, match=r"rows must have width d_in=7; got \(2, 8\)"):
        sae.encode(torch.zeros(2, 8))
    with pytest.raises(ShapeError, match="`W_dec` must be"):
        sae.replace(W_dec=sae.W_dec.T.contiguous())
    with pytest.raises(ConfigError, match="`k` must be at most n_latents=24; got k=25"):
        sae.replace(rule=rules.TopKRule(25))
    with pytest.raises(ConfigError, match="`k` must be a whole number"):
        rules.TopKRule(0)
    with pytest.raises(ConfigError, match="take: must keep 1 to n_latents=24"):
        sae.take(25)
    with pytest.raises(ConfigError, match="`order` must hold each of"):
        sae.permute(torch.zeros(24, dtype=torch.int64))
    with pytest.raises(ConfigError, match="multiple of `k`"):
        rules.contiguous_groups(10, 4)
    with pytest.raises(ShapeError, match="at most n_latents=24 latents; got 30"):
        sae.decode(Codes.from_dense(torch.ones(2, 30)))
    with pytest.raises(ShapeError, match="needs the rows"):
        make_sae("relu", skip=True).decode(sae.encode(rows()))
    with pytest.raises(ShapeError, match="needs the rows"):
        make_sae("relu", scaling="layer_norm").decode(sae.encode(rows()))
    with pytest.raises(ConfigError, match="`kind` must be one of"):
        Scaling("minmax")
    with pytest.raises(ConfigError, match="needs `scale`"):
        Scaling("scalar")
    with pytest.raises(ShapeError, match="same n_latents"):
        Codes.cat([Codes.from_dense(torch.ones(1, 2)), Codes.from_dense(torch.ones(1, 3))])
    with pytest.raises(ShapeError, match="`offsets` must be"):
        Codes(torch.zeros(1, dtype=torch.int64), torch.zeros(2, dtype=torch.int64), torch.zeros(3), 4)


def test_repr_says_what_it_is() -> None:
    sae = make_sae("topk").replace(provenance={"model": "<b>", "hook": "layers.2"})
    assert repr(sae) == "SAE(24 latents on width 7, topk(k=3), <b> at layers.2)"
    assert "&lt;b&gt;" in sae._repr_html_()


def test_with_k_changes_the_number_of_latents_per_row_and_nothing_else():
    sae = make_sae("topk")
    x = torch.randn(20, sae.d_in, generator=torch.Generator().manual_seed(0))
    one = sae.with_k(1)
    assert one.encode(x).l0() <= 1
    assert torch.equal(sae.with_k(sae.rule.k).reconstruct(x), sae.reconstruct(x))
    pre = sae.pre(x)
    best = torch.zeros_like(pre).scatter(1, pre.argmax(1, keepdim=True), pre.amax(1, keepdim=True).relu())
    torch.testing.assert_close(one.encode(x).to_dense(), best)
    with pytest.raises(ConfigError, match="the rule must be TopK; it is relu"):
        make_sae("relu").with_k(2)
    for k in (0, sae.n_latents + 1, 2.0, True):
        with pytest.raises(ConfigError, match=r"with_k: `k` must be a whole number within 1\.\."):
            sae.with_k(k)


# ------------------------------------------------------------------ digest


def test_the_digest_names_the_function():
    sae = make_sae("topk", scaling="scalar")
    assert sae.digest() == make_sae("topk", scaling="scalar").digest()
    assert sae.digest().startswith("sha256:")
    assert sae.replace(provenance={"seed": 1}).with_scores(energy=range(24)).digest() == sae.digest()
    others = [
        sae.with_k(4), sae.to(dtype=torch.float32), sae.take(23), sae.replace(scaling=Scaling()),
        sae.replace(rule=rules.ReLURule()), sae.replace(b_pre=None), sae.replace(b_dec=sae.b_dec + 1),
    ]  # fmt: skip
    assert len({each.digest() for each in [sae, *others]}) == len(others) + 1


def test_the_digest_is_computed_once(monkeypatch):
    sae = make_sae("relu")
    digest = sae.digest()
    monkeypatch.setattr("saekit.sae.model.compute_digest", None)
    assert sae.digest() == pickle.loads(pickle.dumps(sae)).digest() == digest
