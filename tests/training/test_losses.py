"""The gradient of every loss term equals autograd on a slow dense reference; what is not chosen gets none."""

import importlib.util
from pathlib import Path

import pytest
import torch

from saekit import kernels
from saekit.training import config as configs
from saekit.training import dense_autograd
from saekit.training import losses as o

_spec = importlib.util.spec_from_file_location("train_reference", Path(__file__).with_name("reference.py"))
ref = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(ref)

N, D, ROWS = 24, 7, 13
CLOSE = {"rtol": 2e-4, "atol": 2e-5}  # float32 sums in another order


def problem(seed=0, extra=(), n=N, d=D, rows=ROWS):
    g = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=g)

    p = {"W_enc": normal(n, d), "b_enc": normal(n) * 0.3, "W_dec": normal(n, d), "b_dec": normal(d)}
    p |= {name: normal(n) * 0.3 for name in extra}
    u = normal(rows, d) + 1.0
    return {name: t.requires_grad_() for name, t in p.items()}, u, normal(d)


def compare(ours, theirs, p):
    """Loss and every gradient agree."""
    names = list(p)
    torch.testing.assert_close(ours, theirs, **CLOSE)
    got = torch.autograd.grad(ours, [p[n] for n in names], allow_unused=True, materialize_grads=True)
    want = torch.autograd.grad(theirs, [p[n] for n in names], allow_unused=True, materialize_grads=True)
    for name, a, b in zip(names, got, want):
        torch.testing.assert_close(a, b, **CLOSE, msg=lambda m, name=name: f"gradient of {name}: {m}")
    return dict(zip(names, got))


def context(config, center, **fields):
    return o.Context(config=config, center=center, **fields)


def scalars(**values):
    return {name: torch.tensor(value) for name, value in values.items()}


BATCH_STATE = {"threshold": 0.0, "threshold_steps": 0.0, "last_smallest": 0.0}


@pytest.mark.parametrize("seed", range(3))
def test_topk_gradients(seed):
    p, u, center = problem(seed)
    c = configs.TopK(N, k=4)
    outcome = o.topk_loss(p, u - center, context(c, center))
    loss, codes = ref.topk(p, u, k=4)
    compare(outcome.loss, loss, p)
    torch.testing.assert_close(outcome.fired, (codes > 0).sum(0).float())


@pytest.mark.parametrize("k", [2, 8])
def test_multi_topk_gradients_and_l0_stays_k(k):
    p, u, center = problem(1)
    c = configs.TopK(N, k=k, multi_topk=0.125)
    outcome = o.topk_loss(p, u - center, context(c, center))
    loss, codes = ref.topk(p, u, k=k, multi=0.125)
    compare(outcome.loss, loss, p)
    assert outcome.fired.sum() == (codes > 0).sum() <= k * ROWS


@pytest.mark.parametrize("k_aux", [2, 50])
def test_aux_gradients_reach_encoder_and_decoder_of_dead_latents_only(k_aux):
    p, u, center = problem(2)
    dead = torch.arange(N) % 3 == 0
    c = configs.TopK(N, k=3, aux_coefficient=0.5)
    outcome = o.topk_loss(p, u - center, context(c, center, dead=dead, k_aux=k_aux))
    loss, _ = ref.topk(p, u, k=3, dead=dead, k_aux=k_aux, aux_coefficient=0.5)
    compare(outcome.loss, loss, p)

    # The auxiliary term alone: encoder gradient for dead latents, none for the others, none through the residual.
    offset = p["b_dec"] - center
    bias = p["b_enc"] - p["W_enc"] @ offset
    residual = torch.randn(ROWS, D, generator=torch.Generator().manual_seed(9), requires_grad=True)
    alone = o.aux_loss(p, u - center, bias, residual, dead=dead, k_aux=k_aux)
    found = compare(alone, ref.aux(p, u, residual, dead, k_aux), p)
    assert found["W_enc"][dead].abs().sum() > 0
    assert found["W_enc"][~dead].abs().sum() == 0
    assert found["W_dec"][~dead].abs().sum() == 0
    assert not torch.autograd.grad(
        o.aux_loss(p, u - center, bias, residual, dead=dead, k_aux=k_aux), residual, allow_unused=True
    )[0]


def test_aux_without_dead_latents_is_zero():
    p, u, center = problem()
    bias = p["b_enc"] - p["W_enc"] @ (p["b_dec"] - center)
    assert o.aux_loss(p, u - center, bias, u, dead=torch.zeros(N, dtype=torch.bool), k_aux=4) == 0


@pytest.mark.parametrize("guess", [0.0, 0.5, 1e9])
def test_batchtopk_gradients_do_not_depend_on_the_guess(guess):
    p, u, center = problem(3)
    dead = torch.arange(N) < 5
    c = configs.BatchTopK(N, k=3, aux_coefficient=0.1)
    state = scalars(**BATCH_STATE | {"last_smallest": guess})
    outcome = o.batchtopk_loss(p, u - center, context(c, center, state=state, dead=dead, k_aux=3))
    loss, codes = ref.batchtopk(p, u, k=3, dead=dead, k_aux=3, aux_coefficient=0.1)
    compare(outcome.loss, loss, p)
    assert outcome.fired.sum() == 3 * ROWS
    torch.testing.assert_close(outcome.updates["threshold"], codes[codes > 0].min().detach(), **CLOSE)


@pytest.mark.parametrize("over", ["topk", "batchtopk"])
@pytest.mark.parametrize("selection", ["fixed", "scaled", "truncated"])
def test_matryoshka_gradients(over, selection):
    p, u, center = problem(4)
    sizes, weights = (6, 12, N), (0.2, 0.3, 0.9)
    c = configs.Matryoshka(N, k=5, sizes=sizes, weights=weights, over=over, k_per_size=selection, aux_coefficient=0)
    outcome = o.matryoshka_loss(p, u - center, context(c, center, state=scalars(**BATCH_STATE)))

    def k_of(size):
        return min(max(1, round(5 * size / N)) if selection == "scaled" else 5, size)

    loss, codes = ref.matryoshka(
        p, u, k_of=k_of, sizes=sizes, weights=weights, over=over, truncated=selection == "truncated"
    )
    compare(outcome.loss, loss, p)
    torch.testing.assert_close(outcome.residual, (u - codes @ p["W_dec"] - p["b_dec"]).detach(), **CLOSE)
    torch.testing.assert_close(outcome.fired, (codes > 0).sum(0).float())


def test_matryoshka_with_one_size_is_topk():
    p, u, center = problem(5)
    one = o.matryoshka_loss(p, u - center, context(configs.Matryoshka(N, k=4, sizes=(N,)), center))
    plain = o.topk_loss(p, u - center, context(configs.TopK(N, k=4), center))
    compare(one.loss, plain.loss, p)


@pytest.mark.parametrize("levels", [None, (5,), (1, 2, 3, 4, 5)])
def test_hierarchical_gradients(levels):
    p, u, center = problem(8)
    dead = torch.arange(N) < 4
    c = configs.HierarchicalTopK(N, k=5, levels=levels, aux_coefficient=0.3)
    outcome = o.hierarchical_loss(p, u - center, context(c, center, dead=dead, k_aux=3))
    loss, codes = ref.hierarchical(p, u, levels=levels or (1, 2, 4, 5), dead=dead, k_aux=3, aux_coefficient=0.3)
    compare(outcome.loss, loss, p)
    torch.testing.assert_close(outcome.fired, (codes > 0).sum(0).float())


def test_hierarchical_weights_count_levels_one_by_one():
    p, u, center = problem(8)

    def loss(weights):
        c = configs.HierarchicalTopK(N, k=5, levels=(2, 5), weights=weights)
        return o.hierarchical_loss(p, u - center, context(c, center)).loss

    torch.testing.assert_close(loss((1.0, 0.0)) + loss((0.0, 1.0)), loss((1.0, 1.0)))
    small = o.topk_loss(p, u - center, context(configs.TopK(N, k=2), center)).loss
    compare(loss((1.0, 0.0)), small, p)


def test_matryoshka_weights_twice_as_large_give_twice_the_loss():
    p, u, center = problem(6)

    def loss(weights):
        c = configs.Matryoshka(N, k=4, sizes=(8, N), weights=weights, aux_coefficient=0)
        return o.matryoshka_loss(p, u - center, context(c, center)).loss

    torch.testing.assert_close(loss((0.6, 1.4)), 2 * loss((0.3, 0.7)))
    torch.testing.assert_close(loss((1.0, 0.0)) + loss((0.0, 1.0)), loss((1.0, 1.0)))


@pytest.mark.parametrize("dead", [None, torch.arange(N) < 6])
def test_jumprelu_gradients_follow_the_straight_through_formulas(dead):
    p, u, center = problem(7, extra=("log_threshold",))
    c = configs.JumpReLU(N, target_l0=4, sparsity=0.7, bandwidth=0.9, aux_coefficient=0.25)
    outcome = o.jumprelu_loss(p, u - center, context(c, center, dead=dead, k_aux=3))
    loss, codes, want = ref.jumprelu_gradients(p, u, target=4, sparsity=0.7, bandwidth=0.9)
    if dead is not None:
        e = outcome.residual
        extra = 0.25 * ref.variance(u) * ref.aux(p, u, e, dead, 3)
        more = torch.autograd.grad(extra, [p[n] for n in want], allow_unused=True, materialize_grads=True)
        want = {name: g + m for (name, g), m in zip(want.items(), more)}
        loss = loss + extra.detach()
    torch.testing.assert_close(outcome.loss.detach(), loss, **CLOSE)
    got = torch.autograd.grad(outcome.loss, [p[name] for name in want])
    for name, gradient in zip(want, got):
        torch.testing.assert_close(gradient, want[name], **CLOSE, msg=lambda m, name=name: f"{name}: {m}")
    assert (outcome.fired == (codes > 0).sum(0)).all()


def test_relu_gradients():
    p, u, center = problem(8)
    c = configs.ReLU(N, l1=0.7)
    outcome = o.relu_loss(p, u - center, context(c, center, state=scalars(coefficient=0.7, distance=0.0)))
    compare(outcome.loss, ref.relu(p, u, l1=0.7)[0], p)
    assert outcome.updates == {}


def test_gated_gradients_and_frozen_decoder():
    p, u, center = problem(9, extra=("r_mag", "b_mag"))
    c = configs.Gated(N, l1=0.7)
    outcome = o.gated_loss(p, u - center, context(c, center, state=scalars(coefficient=0.7, distance=0.0)))
    loss, codes = ref.gated(p, u, l1=0.7)
    compare(outcome.loss, loss, p)
    torch.testing.assert_close(outcome.fired, (codes > 0).sum(0).float())


@pytest.mark.parametrize("arch", ["relu", "gated", "p-anneal", "jumprelu"])
@pytest.mark.parametrize("block", [1, 4, ROWS])
def test_dense_codes_have_the_gradients_of_autograd_in_float64(arch, block, monkeypatch):
    """In blocks of so many rows, of which the last may be short."""
    monkeypatch.setattr(dense_autograd, "block_rows_of", lambda *_: block)
    extra = {"gated": ("r_mag", "b_mag"), "jumprelu": ("log_threshold",)}.get(arch, ())
    p, u, center = problem(16, extra=extra)
    p, u, center = {name: t.detach().double().requires_grad_() for name, t in p.items()}, u.double(), center.double()
    state = {name: torch.tensor(0.7 if name == "coefficient" else 0.0).double() for name in ("coefficient", "distance")}
    state["penalties"] = torch.zeros(2).double()
    later = {"state": state, "step": 60, "total_steps": 100}
    if arch == "jumprelu":
        c = configs.JumpReLU(N, target_l0=4, sparsity=0.7, bandwidth=0.9)
        outcome = o.jumprelu_loss(p, u - center, context(c, center, **later))
        loss, _, want = ref.jumprelu_gradients(p, u, target=4, sparsity=0.7, bandwidth=0.9)
    else:
        c = {"relu": configs.ReLU, "gated": configs.Gated, "p-anneal": configs.PAnneal}[arch](N)
        of = {"relu": o.relu_loss, "gated": o.gated_loss, "p-anneal": o.p_anneal_loss}[arch]
        outcome = of(p, u - center, context(c, center, **later))
        if arch == "p-anneal":
            loss, _ = ref.p_anneal(p, u, coefficient=state["coefficient"], exponent=o.p_value(c, o.p_index(c, 60, 100)))
        else:
            loss, _ = {"relu": ref.relu, "gated": ref.gated}[arch](p, u, l1=state["coefficient"])
        want = dict(zip(p, torch.autograd.grad(loss, list(p.values()))))
    torch.testing.assert_close(outcome.loss, loss, rtol=1e-12, atol=0)
    got = dict(zip(want, torch.autograd.grad(outcome.loss, [p[name] for name in want])))
    for name, each in want.items():
        torch.testing.assert_close(got[name], each, rtol=1e-12, atol=1e-12 * float(each.abs().max()), msg=name)


@pytest.mark.parametrize("step", [0, 45, 99])
def test_p_anneal_gradients_at_every_exponent(step):
    p, u, center = problem(10)
    c = configs.PAnneal(N, l1=0.7)
    state = scalars(coefficient=0.7, distance=0.0) | {"penalties": torch.zeros(2)}
    outcome = o.p_anneal_loss(p, u - center, context(c, center, state=state, step=step, total_steps=100))
    exponent = o.p_value(c, o.p_index(c, step, 100))
    compare(outcome.loss, ref.p_anneal(p, u, coefficient=0.7, exponent=exponent)[0], p)


def test_p_goes_from_one_to_its_end():
    c = configs.PAnneal(N, p_end=0.2, p_start_fraction=0.3, p_updates=4)
    values = [o.p_value(c, o.p_index(c, step, 1000)) for step in range(1000)]
    assert values[0] == values[299] == 1
    assert values[-1] == pytest.approx(0.2)
    assert len(set(values)) == 5
    assert values == sorted(values, reverse=True)


def test_p_change_keeps_the_penalty():
    p, u, center = problem(11)
    c = configs.PAnneal(N, l1=0.7, p_updates=3, p_start_fraction=0)
    state = scalars(coefficient=0.7, distance=0.0) | {"penalties": torch.zeros(2)}
    before = o.p_anneal_loss(p, u - center, context(c, center, state=state, step=24, total_steps=100))
    after = context(c, center, state=state | before.updates, step=25, total_steps=100)
    changed = o.p_anneal_loss(p, u - center, after)
    assert changed.parts["p"] < before.parts["p"]
    torch.testing.assert_close(changed.parts["sparsity"], before.parts["sparsity"])


def test_penalty_coefficient_twice_as_large_gives_twice_the_term():
    p, u, center = problem(12)

    def term(l1):
        state = scalars(coefficient=l1, distance=0.0)
        return o.relu_loss(p, u - center, context(configs.ReLU(N, l1=l1), center, state=state)).parts["sparsity"]

    torch.testing.assert_close(term(1.4), 2 * term(0.7))


def test_controller_raises_the_coefficient_when_l0_is_too_high():
    p, u, center = problem(13)
    for target, sign in ((1.0, 1), (20.0, -1)):
        c = configs.ReLU(N, l1=1.0, target_l0=target)
        state = scalars(coefficient=1.0, distance=0.0)
        update = o.relu_loss(p, u - center, context(c, center, state=state)).updates["coefficient"]
        assert sign * (update - 1) > 0


def test_zero_valued_choices_get_no_gradient_and_have_not_fired():
    p, u, center = problem(14)
    with torch.no_grad():
        p["b_enc"].fill_(-100.0)  # every pre-activation is negative, top-k still has to choose
    outcome = o.topk_loss(p, u - center, context(configs.TopK(N, k=4), center))
    got = torch.autograd.grad(outcome.loss, [p["W_enc"], p["b_enc"], p["W_dec"]])
    assert all(g.abs().sum() == 0 for g in got)
    assert outcome.fired.sum() == 0


def test_threshold_average_begins_with_the_first_value():
    c = configs.BatchTopK(N, k=3)
    state = scalars(**BATCH_STATE)
    for step, smallest, expected in ((9, 5.0, None), (10, 2.0, 2.0), (11, 4.0, 2.2)):
        ctx = context(c, torch.zeros(D), state=state, step=step, threshold_start=10, threshold_decay=0.9)
        updates = o.threshold_updates(ctx, torch.tensor(smallest))
        assert ("threshold" in updates) == (expected is not None)
        state = state | updates
        if expected is not None:
            assert float(state["threshold"]) == pytest.approx(expected)


def test_bf16_autocast_is_near_fp32():
    p, u, center = problem(15, n=64, d=16, rows=64)
    for c, loss, state in (
        (configs.TopK(64, k=8), o.topk_loss, {}),
        (configs.ReLU(64), o.relu_loss, scalars(coefficient=0.5, distance=0.0)),
    ):
        with kernels.using("plain"):  # the fast ones are exact under autocast too
            full = loss(p, u - center, context(c, center, state=state)).loss.detach()
            with torch.autocast("cpu", torch.bfloat16):
                low = loss(p, u - center, context(c, center, state=state)).loss.detach()
        assert low.dtype == torch.float32
        assert float(low) != float(full)
        assert float(low) == pytest.approx(float(full), rel=0.02)
