"""Top-k encoding: the fast kernel returns the codes of the plain one, whatever the shape and the numbers."""

from __future__ import annotations

import contextlib
import functools
import itertools
import math
import re
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from saekit import SAE, kernels
from saekit.kernels import reference
from saekit.sae import rules

pytestmark = pytest.mark.usefixtures("fast")


def problem(seed: int, n: int, d: int, n_latents: int, kind: str = "plain") -> tuple[Tensor, Tensor, Tensor]:
    stream = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=stream)

    x, W, b = draw(n, d), draw(n_latents, d) / d**0.5, 0.3 * draw(n_latents)
    if kind == "mean":  # a large common part: pre-activations of many latents are close together
        x = x + 8 * draw(d)
    elif kind == "twins":  # latents that differ by less than bf16 can see
        W = W[torch.arange(n_latents) // 4] * (1 + 1e-4 * draw(n_latents, 1))
        b = torch.zeros(n_latents)
    elif kind == "scales":  # latents of very different length
        W = W * torch.logspace(-3, 3, n_latents)[:, None]
    elif kind == "negative":  # almost nothing is positive
        b = b - 4.0
    elif kind == "biased":
        b = 1000 * b
    return x, W, b


def assert_top_k(values: Tensor, indices: Tensor, x: Tensor, W: Tensor, b: Tensor, k: int) -> None:
    """`values` and `indices` are a top k of the exact pre-activations, up to the rounding of an fp32 product."""
    assert values.shape == indices.shape == (len(x), k)
    assert (values >= 0).all()
    assert (indices.sort(1).values.diff(dim=1) > 0).all(), "each latent once per row"
    assert (values.diff(dim=1) <= 0).all(), "largest first"
    exact = x.double() @ W.double().T + b.double()
    # fp32: a few units in the last place of the largest partial sums.
    slack = 2.0**-20 * (x.double().norm(dim=1, keepdim=True) * W.double().norm(dim=1) + b.double().abs())
    chosen = exact.gather(1, indices)
    assert ((values.double() - chosen.relu()).abs() <= slack.gather(1, indices)).all()
    low = (chosen.relu() + slack.gather(1, indices)).min(1).values
    rest = (exact - slack).scatter(1, indices, -torch.inf)
    assert (rest.max(1).values <= low).all(), "a latent that was left out is larger than one that was kept"


@contextlib.contextmanager
def whole_by(which: int) -> Iterator[None]:
    """Multiply whole numbers by the product that is so far behind the fastest one here."""
    from saekit.kernels.cpu import low_bit_matmul

    product = low_bit_matmul.byte_products()[which]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(low_bit_matmul, "byte_products", lambda: (product,))
        yield


@contextlib.contextmanager
def without_bf16() -> Iterator[None]:
    """Encode as on a processor that multiplies no bf16."""
    from saekit.kernels.cpu import encode, rounded

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rounded, "multiplies_bf16", lambda: False)
        patch.setattr(encode, "FP32_LATENTS", 128)
        yield


shapes = st.tuples(st.integers(1, 40), st.integers(1, 70), st.integers(1, 300))
kinds = st.sampled_from(["plain", "mean", "twins", "scales", "negative", "biased"])


@given(shape=shapes, share=st.floats(0, 1), seed=st.integers(0, 2**20), kind=kinds, fp32=st.booleans())
@settings(max_examples=120)
def test_codes_are_those_of_the_plain_kernel(
    shape: tuple[int, int, int], share: float, seed: int, kind: str, fp32: bool
) -> None:
    n, d, n_latents = shape
    k = max(1, math.ceil(share**3 * n_latents))
    x, W, b = problem(seed, n, d, n_latents, kind)
    with without_bf16() if fp32 else contextlib.nullcontext():
        values, indices = kernels.topk_encode(x, W, b, k)
    assert_top_k(values, indices, x, W, b, k)
    torch.testing.assert_close(values, reference.topk_encode(x, W, b, k)[0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["plain", "mean", "twins", "scales"])
@pytest.mark.parametrize("n, d, n_latents, k", [(70, 64, 2048, 16), (40, 257, 1531, 32), (33, 768, 4096, 7)])
def test_exact_where_bf16_alone_is_not(kind: str, n: int, d: int, n_latents: int, k: int) -> None:
    x, W, b = problem(1, n, d, n_latents, kind)
    values, indices = kernels.topk_encode(x, W, b, k)
    assert_top_k(values, indices, x, W, b, k)
    low = ((x.bfloat16() @ W.bfloat16().T).float() + b).topk(k).indices
    assert not torch.equal(indices.sort(1).values, low.sort(1).values), "bf16 chooses the same: the problem is too easy"


def test_inexact_is_a_setting_and_its_values_are_fp32() -> None:
    x, W, b = problem(1, 70, 64, 2048)
    values, indices = kernels.topk_encode(x, W, b, 16, exact=False)
    torch.testing.assert_close(values, (x @ W.T + b).gather(1, indices).relu())
    agree = (indices[:, :, None] == reference.topk_encode(x, W, b, 16)[1][:, None]).any(2).float().mean()
    assert agree > 0.95


@given(shape=shapes, seed=st.integers(0, 2**20), kind=kinds, scale=st.sampled_from([1.0, 1e-18, 1e12]))
@settings(max_examples=60)
def test_the_bound_holds(shape: tuple[int, int, int], seed: int, kind: str, scale: float) -> None:
    """The bf16 product is never further from the exact one than the kernel assumes."""
    from saekit.kernels.cpu import rounded, selection_numba

    n, d, n_latents = shape
    x, W, b = problem(seed, n, d, n_latents, kind)
    x = x * scale
    rows, latents = rounded.round_rows(x, "x"), rounded.round_latents(W, "W")
    bias_reach = rounded.with_bias(latents, b)
    product = (matrix(rows) @ matrix(latents).T).double()
    exact = x.double() @ W.double().T + b.double()
    reach = bound(rows, latents, d) + torch.from_numpy(bias_reach)
    assert ((product - exact).abs() <= float(selection_numba.ROUNDING) * product.abs() + reach).all()


@given(shape=shapes, seed=st.integers(0, 2**20), kind=kinds, scale=st.sampled_from([1.0, 1e-18, 1e12]))
@settings(max_examples=60)
def test_the_bound_of_a_product_in_fp32_holds(shape: tuple[int, int, int], seed: int, kind: str, scale: float) -> None:
    """The same of a product that is narrowed to bf16 afterwards; the largest of each whole lane is there as well."""
    from saekit.kernels.cpu import rounded, rounding_numba, selection_numba

    n, d, n_latents = shape
    x, W, b = problem(seed, n, d, n_latents, kind)
    x = x * scale
    rows, latents = rounded.rows_as_they_are(x, "x"), rounded.latents_as_they_are(W, "W")
    bias_reach = rounded.with_bias(latents, b)
    P = torch.zeros((n, n_latents + 5), dtype=torch.bfloat16)
    best = torch.zeros((n, n_latents // 64 * 8 + 1), dtype=torch.int16)
    half = n_latents // 128 * 64
    for part in (slice(0, half), slice(half, n_latents)):
        product = (rows.copy @ latents.copy[part].T).numpy()
        given = product, latents.bias[part], part.start
        rounding_numba.narrow_product(*given, P.view(torch.int16).numpy(), best.numpy())
    got = P[:, :n_latents].double()
    exact = x.double() @ W.double().T + b.double()
    reach = bound(rows, latents, d) + torch.from_numpy(bias_reach)
    assert ((got - exact).abs() <= float(selection_numba.ROUNDING) * got.abs() + reach).all()
    whole = n_latents // 64
    largest = P[:, : 64 * whole].reshape(n, whole, 8, 8).amax(2).view(n, -1)
    bits = best[:, : 8 * whole].int()
    assert torch.equal(torch.where(bits < 0, bits ^ 0x7FFF, bits).to(torch.int16).view(torch.bfloat16), largest)
    assert not best[:, 8 * whole :].any()
    # Nothing but the rounding of sums: far less than that of bf16.
    assert bound(rows, latents, d).max() <= 2.0**-18 * (d + 8) * x.norm(dim=1).max() * W.norm(dim=1).max() + 1e-30


def matrix(rounded: Any) -> Tensor:
    """A bf16 copy as ``[n, width]``."""
    if rounded.copy.ndim == 2:
        return rounded.copy
    pairs = rounded.copy.shape[1]
    return rounded.copy.permute(0, 2, 1, 3).reshape(-1, 2 * pairs)[: len(rounded.facts.norm)]


def bound(rows: Any, latents: Any, d: int) -> Tensor:
    """What the kernels assume of the product without its own rounding and the bias, ``[n, n_latents]``."""
    from saekit.kernels.cpu import rounded

    reach = np.outer(rounded.row_reach(rows.facts, d), latents.facts.norm) + np.outer(
        rows.facts.norm, latents.facts.residual
    )
    return torch.from_numpy(reach).double()


@given(
    shape=shapes,
    seed=st.integers(0, 2**20),
    kind=kinds,
    scale=st.sampled_from([1.0, 1e-18, 1e-11, 1e12]),
    uneven=st.booleans(),
    which=st.integers(0, 2),
)
@settings(max_examples=80)
def test_the_bound_of_whole_numbers_holds(
    shape: tuple[int, int, int], seed: int, kind: str, scale: float, uneven: bool, which: int
) -> None:
    """The same of their product, whose columns are balanced before."""
    from saekit.kernels.cpu import low_bit_matmul, rounded, selection_numba

    if which >= len(low_bit_matmul.byte_products()):
        pytest.skip("no instructions for products of bytes")
    n, d, n_latents = shape
    x, W, b = problem(seed, n, d, n_latents, kind)
    x = x * scale * (torch.logspace(-2, 2, d) if uneven else 1.0)
    with whole_by(which):
        latents = rounded.round_latents8(W, "W", rounded.balance(x, W))
    rows = rounded.round_rows8(x, "x", latents.factor)
    bias_reach = rounded.with_bias(latents, b)
    width = low_bit_matmul.PANEL * len(latents.copy)
    room = -(-n // low_bit_matmul.ROWS) * low_bit_matmul.ROWS
    P = torch.zeros((room, width), dtype=torch.bfloat16)
    best = torch.zeros((room, width // low_bit_matmul.LANE), dtype=torch.int16)
    low_bit_matmul.multiply8(n, rows.whole, latents.whole, P.view(torch.int16).numpy(), best.numpy())
    largest = P.view(room, len(latents.copy), low_bit_matmul.LANE, -1).amax(2).view(room, -1)[:n]
    bits = best[:n].int()
    assert torch.equal(torch.where(bits < 0, bits ^ 0x7FFF, bits).to(torch.int16).view(torch.bfloat16), largest)
    got = P[:n, :n_latents].double()
    exact = x.double() @ W.double().T + b.double()
    reach = bound(rows, latents, d) + torch.from_numpy(bias_reach)
    assert ((got - exact).abs() <= float(selection_numba.ROUNDING) * got.abs() + reach).all()
    # What was lost is what is said to be lost, and 127 steps are made use of.
    factor = torch.from_numpy(latents.factor).double()
    whole = (rows.copy[:, :d].double() - 128) * torch.from_numpy(rows.whole.scale[:n]).double()[:, None]
    lost = (x.double() * factor - whole).norm(dim=1)
    assert (lost <= torch.from_numpy(rows.facts.residual).double()).all()
    if scale in (1.0, 1e12):
        assert (rows.copy[:, :d].int() - 128).abs().amax(1).eq(127).all()


@pytest.mark.parametrize("of_row", [True, False])
@pytest.mark.usefixtures("whole_numbers")
def test_a_latent_that_rounding_hides_as_well_as_it_can_is_found(monkeypatch: pytest.MonkeyPatch, of_row: bool) -> None:
    """What is lost lies along the other factor: whole numbers give 0, and the bound is reached."""
    from saekit.kernels.cpu import rounded

    monkeypatch.setattr(rounded, "balance", lambda x, W: np.ones(x.shape[1], np.float32))
    monkeypatch.setattr(rounded, "FARTHER", 0.0)
    signs = torch.where(torch.rand(64, generator=torch.Generator().manual_seed(0)) < 0.5, -1.0, 1.0)
    hidden, plain = torch.zeros(65), torch.zeros(65)
    hidden[0], hidden[1:] = 127.0, 0.49 * signs  # one step is 1
    plain[1:] = signs
    x, special = (hidden, plain) if of_row else (plain, hidden)
    W = torch.zeros(600, 65)
    W[300] = special
    others = slice(100, 104)  # exact as whole numbers, with a value of 20
    W[others] = 20.0 * (torch.eye(65)[0] / 127.0 if of_row else plain / 64.0)
    values, indices = kernels.topk_encode(x.expand(40, 65), W, torch.zeros(600), 4)
    assert (indices[:, 0] == 300).all()
    torch.testing.assert_close(values[:, 0], torch.full((40,), 0.49 * 64))
    offsets, latents, _ = kernels.threshold_encode(x.expand(40, 65), W, torch.zeros(600), torch.full((600,), 25.0))
    assert offsets.tolist() == list(range(41))
    assert (latents == 300).all()


@pytest.mark.parametrize("d", [64, 67])
@pytest.mark.usefixtures("whole_numbers")
def test_whole_numbers_as_large_as_they_get_are_multiplied_exactly(d: int) -> None:
    """Sums of all largest bytes of one sign: whatever adds them up in too few bits, or stops at a largest, shows."""
    from saekit.kernels.cpu import low_bit_matmul, rounded

    x = torch.full((7, d), 127.0)
    x[1::2] *= -1
    x[2] = torch.arange(d) % 128 - 64.0
    x[2, 0] = 127.0
    W = torch.zeros(70, d)  # the sizes of two columns side by side sum to 127 at most: `PAIRED` has those as they are
    W[:, 0::2], W[:, 1 : d - d % 2 : 2] = 127.0, 0.0
    W[20:40, 0::2], W[20:40, 1::2] = 64.0, 63.0
    W[40:] = -W[5:35]
    W[69, 5:] = 0.0
    for which in range(len(low_bit_matmul.byte_products())):
        with whole_by(which):
            latents = rounded.round_latents8(W, "W", np.ones(d, np.float32))
        latents.whole.scale[:70], latents.whole.bias[:] = 1.0, 0.0
        rows = rounded.round_rows8(x, "x", np.ones(d, np.float32))
        P, best = torch.zeros((12, 128), dtype=torch.bfloat16), torch.zeros((12, 16), dtype=torch.int16)
        low_bit_matmul.multiply8(7, rows.whole, latents.whole, P.view(torch.int16).numpy(), best.numpy())
        paired = low_bit_matmul.byte_products()[which].in_pairs
        by_steps = W if paired else W * (127 / W.abs().amax(1))[:, None]
        numbers = by_steps.add(0.5 * by_steps.sign()).trunc()  # as `rounding_numba._whole`
        assert torch.equal(P[:7, :70], (x.double() @ numbers.double().T).bfloat16()), which


@pytest.mark.usefixtures("whole_numbers")
def test_vnni_without_avx512_is_the_short_form_on_256_bits() -> None:
    """As LLVM compiles it for an Alder Lake: it is not run."""
    import llvmlite.binding as llvm
    from numba import njit, typeof

    from saekit.kernels.cpu import low_bit_matmul

    if low_bit_matmul.NARROW not in low_bit_matmul.byte_products():
        pytest.skip("LLVM would have to compile it for this processor first")
    floats, words = np.zeros(64, np.float32), np.zeros((1, 4, 4, 16), np.int32)
    x = low_bit_matmul.WholeRows(words[0, 0], floats)
    W = low_bit_matmul.WholeLatents(words, np.zeros(64, np.int32), floats, floats)
    types = tuple(typeof(each) for each in (6, x, W, np.zeros((6, 64), np.int16), np.zeros((6, 8), np.int16)))
    compiled = njit(low_bit_matmul.multiply8.py_func)
    compiled.compile(types)
    machine = llvm.Target.from_default_triple().create_target_machine(cpu="alderlake", opt=2)
    code = machine.emit_assembly(llvm.parse_assembly(compiled.inspect_llvm(types)))
    products = re.findall(r"(.*)\tvpdpbusd\t(.*)", code)
    assert len(products) >= 4 * 12  # the tiles of a panel
    assert all(form.strip() == "{vex}" and "%ymm" in registers for form, registers in products)
    assert not re.search(r"%zmm|%ymm(1[6-9]|2[0-9]|3[01])", code)


@pytest.mark.usefixtures("whole_numbers")
def test_columns_of_very_different_size_are_balanced() -> None:
    from saekit.kernels.cpu import rounded

    x, W, _ = problem(0, 64, 768, 512)
    x[:, 5] *= 300.0
    latents = rounded.round_fastest(W, "W", x)
    rows = rounded.round_rows8(x, "x", latents.factor)
    plain = rounded.round_rows8(x, "y", np.ones(768, np.float32))
    error = bound(rows, latents, 768).mean()
    assert error < 0.3 * np.mean(np.outer(plain.facts.residual, W.norm(dim=1).numpy()))


@given(seed=st.integers(0, 2**20), scale=st.sampled_from([1e-30, 1e-3, 1.0, 3e4, 1e15]))
@settings(max_examples=30)
def test_the_bias_costs_the_product_16_of_its_24_bits(seed: int, scale: float) -> None:
    from saekit.kernels.cpu import rounded

    b = scale * torch.randn(500, generator=torch.Generator().manual_seed(seed))
    latents = rounded.round_latents(torch.zeros(500, 1), "W")
    reach = torch.from_numpy(rounded.with_bias(latents, b)).double()
    parts = matrix(latents)[:, 1:].double().sum(1)
    assert ((parts - b.double()).abs() <= reach).all()
    assert (reach <= b.double().abs() * 2.0**-14 + 1e-30).all()


@functools.cache
def compiled_keys() -> tuple[Callable[[np.int16], int], Callable[[np.float32], int]]:
    """The keys' functions, callable from here."""
    numba = pytest.importorskip("numba")
    from saekit.kernels.cpu import intrinsics_numba, selection_numba

    ordered, below = intrinsics_numba.ordered, selection_numba._key_below
    return numba.njit(lambda bits: ordered(bits)), numba.njit(lambda bar: below(bar))


@given(bits=st.lists(st.integers(0, 2**16 - 1), min_size=2, max_size=60), bar=st.floats(-(2.0**99), 2.0**99, width=32))
@settings(max_examples=100)
def test_keys_sort_like_the_numbers(bits: list[int], bar: float) -> None:
    numbers = torch.tensor(bits, dtype=torch.int32).to(torch.uint16).view(torch.bfloat16)
    numbers = numbers[numbers.isfinite()]
    ordered, below = compiled_keys()
    keys = np.array([ordered(b) for b in numbers.view(torch.int16).numpy()], np.int64)
    floats = numbers.double().numpy()
    assert (np.diff(floats[np.argsort(keys, kind="stable")]) >= 0).all()
    assert (keys >= below(np.float32(bar)))[floats >= bar].all()


def test_a_lane_has_the_largest_of_its_latents() -> None:
    numba = pytest.importorskip("numba")
    from saekit.kernels.cpu import selection_numba

    inner = selection_numba._lane_maxima
    maxima = numba.njit(lambda P, n, lane_size, best: inner(P, 1, n, lane_size, 0, best))
    for n, lane_size in itertools.product((1, 63, 64, 200), (1, 2, 4, 8)):
        product = torch.randn((3, n + 5), generator=torch.Generator().manual_seed(n)).bfloat16()
        best, panels, apart = np.full(512, 99, np.int16), -(-n // 64), 64 // lane_size
        assert maxima(product.view(torch.int16).numpy(), n, lane_size, best) == -(-panels * apart // 32) * 32
        padded = torch.full((64 * panels,), -torch.inf)
        padded[:n] = product[1, :n].float()
        keys = best[: panels * apart]
        found = torch.from_numpy(np.where(keys < 0, keys ^ 0x7FFF, keys).astype(np.int16)).view(torch.bfloat16)
        # The key of a lane without latents is no number.
        expected = padded.view(panels, lane_size, apart).amax(1).flatten()
        assert torch.equal(found.float().nan_to_num(-torch.inf), expected)


def test_bound_is_worth_having() -> None:
    """Few latents are multiplied again: the bound is about as tight as bf16 allows."""
    from saekit.kernels.cpu import rounded

    x, W, _ = problem(0, 64, 768, 512)
    reach = bound(rounded.round_rows(x, "x"), rounded.round_latents(W, "W"), 768)
    relative = float(reach.max()) / float(x.norm(dim=1).max() * W.norm(dim=1).max())
    assert relative < 2.0**-8


def dense(values: Tensor, indices: Tensor, n_latents: int) -> Tensor:
    """Codes ``[n, n_latents]``: which latents have the value 0 means nothing."""
    return torch.zeros(len(values), n_latents).scatter(1, indices, values)


@given(shape=shapes, share=st.floats(0, 1), seed=st.integers(0, 2**20), kind=kinds)
@settings(max_examples=60)
def test_without_order_the_same_latents_are_chosen(
    shape: tuple[int, int, int], share: float, seed: int, kind: str
) -> None:
    from saekit.kernels.cpu import encode, ops

    n, d, n_latents = shape
    x, W, b = problem(seed, n, d, n_latents, kind)
    k = max(1, int(share * n_latents))
    pairs = ops.topk_pairs_of_some(x, W, b, k)
    assert pairs.offsets.tolist() == list(range(0, n * k + 1, k))
    values, indices = encode.topk_encode(x, W, b, k)
    assert torch.equal(
        dense(torch.from_numpy(pairs.values).view(n, k), torch.from_numpy(pairs.latents).view(n, k), n_latents),
        dense(values, indices, n_latents),
    )


def test_ties_go_to_the_smaller_latent() -> None:
    W = torch.eye(4).repeat_interleave(100, 0)
    values, indices = kernels.topk_encode(torch.tensor([[3.0, 1.0, 2.0, 0.0]]), W, torch.zeros(400), 3)
    assert values.tolist() == [[3.0, 3.0, 3.0]]
    assert indices.tolist() == [[0, 1, 2]]


def test_more_ties_than_there_is_room_for() -> None:
    W = torch.ones(5000, 8)
    values, indices = kernels.topk_encode(torch.ones(2, 8), W, torch.zeros(5000), 4)
    assert values.tolist() == [[8.0] * 4] * 2
    assert all(len(set(row)) == 4 for row in indices.tolist())


def test_rows_of_zero_take_the_bias() -> None:
    b = torch.full((600,), -1.0)
    b[[7, 300]] = torch.tensor([2.0, 5.0])
    values, indices = kernels.topk_encode(torch.zeros(3, 5), torch.randn(600, 5, generator=torch.Generator()), b, 3)
    assert values.tolist() == [[5.0, 2.0, 0.0]] * 3
    assert indices[:, :2].tolist() == [[300, 7]] * 3
    assert (indices[:, 2] == 0).all()


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 1e30, 3e38])
@pytest.mark.parametrize("where", ["row", "W_enc", "b_enc"])
def test_extreme_numbers_come_out_as_from_the_plain_kernel(value: float, where: str) -> None:
    x, W, b = problem(3, 40, 16, 700)
    {"row": x[5], "W_enc": W[11], "b_enc": b[3:4]}[where][0] = value
    values, indices = kernels.topk_encode(x, W, b, 4)
    expected, expected_indices = reference.topk_encode(x, W, b, 4)
    torch.testing.assert_close(values, expected, equal_nan=True)
    clean = ~expected.isnan().any(1)
    assert torch.equal(indices[clean], expected_indices[clean])


def test_a_row_does_not_depend_on_rows_beside_it_nor_on_blocks_nor_on_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    from saekit.kernels.cpu import threads

    x, W, b = problem(4, 150, 48, 1000, "mean")
    values, indices = kernels.topk_encode(x, W, b, 12)
    for count, block_rows in [(1, None), (2, 7), (3, 64)]:
        monkeypatch.setattr(threads, "thread_count", lambda count=count: count)
        again = kernels.topk_encode(x, W, b, 12, block_rows=block_rows)
        assert torch.equal(again[0], values)
        assert torch.equal(again[1], indices)
    for row in (0, 77, 149):
        alone = kernels.topk_encode(x[row : row + 1], W, b, 12)
        assert torch.equal(alone[0], values[row : row + 1])
        assert torch.equal(alone[1], indices[row : row + 1])


@pytest.mark.parametrize("kind", ["plain", "twins"])
@pytest.mark.usefixtures("whole_numbers")
def test_codes_do_not_depend_on_whether_rows_share_what_they_read(monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    from saekit.kernels.cpu import encode, rounded

    monkeypatch.setattr(rounded, "FARTHER", 0.0)  # whole numbers, however many candidates they leave
    x, W, b = problem(4, 150, 48, 1000, kind)
    found, together = [], set()
    lists = encode._lists
    monkeypatch.setattr(encode, "_lists", lambda *sizes: (made := lists(*sizes), together.add(len(made.latents)))[0])
    for cached in (encode.CACHED, 0):
        monkeypatch.setattr(encode, "CACHED", cached)
        found += [kernels.topk_encode(x, W, b, 12, block_rows=rows) for rows in (None, 64)]
    assert together >= {1, 64}
    for values, indices in found[1:]:
        assert torch.equal(values, found[0][0])
        assert torch.equal(indices, found[0][1])


def test_takes_views_and_no_rows() -> None:
    x, W, b = problem(5, 60, 40, 640)
    expected = kernels.topk_encode(x, W, b, 5)
    wide = torch.zeros(60, 80)
    wide[:, ::2] = x
    for view in (wide[:, ::2], x.T.contiguous().T):
        got = kernels.topk_encode(view, W.T.contiguous().T, b, 5)
        assert torch.equal(got[0], expected[0])
        assert torch.equal(got[1], expected[1])
    values, indices = kernels.topk_encode(x[:0], W, b, 5)
    assert values.shape == indices.shape == (0, 5)


def test_inputs_are_not_changed_and_results_are_not_shared() -> None:
    x, W, b = problem(6, 50, 32, 600)
    copies = x.clone(), W.clone(), b.clone()
    first = kernels.topk_encode(x, W, b, 5)
    kept = first[0].clone(), first[1].clone()
    kernels.topk_encode(x.flip(0), W, b, 5)
    assert all(torch.equal(a, c) for a, c in zip((x, W, b), copies))
    assert all(torch.equal(a, c) for a, c in zip(first, kept))


def test_what_the_loops_cannot_take_goes_to_plain_torch() -> None:
    x, W, b = problem(7, 40, 16, 600)
    for dtype in (torch.float64, torch.bfloat16):
        values, _ = kernels.topk_encode(x.to(dtype), W.to(dtype), b.to(dtype), 4)
        assert values.dtype == dtype
    values, _ = kernels.topk_encode(x.requires_grad_(), W, b, 4)
    assert values.requires_grad
    rank = torch.rand(600, generator=torch.Generator()) + 0.5
    got = kernels.topk_encode(x.detach(), W, b, 4, rank=rank)
    assert torch.equal(got[1], reference.topk_encode(x.detach(), W, b, 4, rank=rank)[1])


def test_an_sae_encodes_the_same_with_both_kernels() -> None:
    x, W, b = problem(8, 90, 64, 1024, "mean")
    sae = SAE(W_enc=W, b_enc=b, W_dec=W, b_dec=torch.zeros(64), rule=rules.TopKRule(16))
    fast = sae.encode(x).to_dense()
    with kernels.using("plain"):
        plain = sae.encode(x).to_dense()
    torch.testing.assert_close(fast, plain, rtol=1e-5, atol=1e-5)


@given(shape=st.tuples(st.integers(1, 30), st.integers(1, 40), st.integers(1, 300)), seed=st.integers(0, 2**20))
@settings(max_examples=40)
def test_the_compiled_product_and_the_largest_of_its_lanes(shape: tuple[int, int, int], seed: int) -> None:
    from saekit.kernels.cpu import low_bit_matmul, rounded

    if reason := kernels.bf16_unavailable():
        pytest.skip(reason)
    n, d, n_latents = shape
    x, W, b = problem(seed, n, d, n_latents)
    rows, latents = rounded.round_rows(x, "x"), rounded.round_latents(W, "W", packed=True)
    rounded.with_bias(latents, b)
    assert torch.equal(matrix(latents)[:, :d], W.bfloat16())
    panels = latents.panels
    room = -(-n // low_bit_matmul.ROWS) * low_bit_matmul.ROWS
    P = torch.zeros((room, low_bit_matmul.PANEL * len(panels)), dtype=torch.bfloat16)
    best = torch.zeros((room, low_bit_matmul.PANEL // low_bit_matmul.LANE * len(panels)), dtype=torch.int16)
    low_bit_matmul.multiply(n, rows.words, panels, P.view(torch.int16).numpy(), best.numpy())
    expected = matrix(rows).double() @ matrix(latents).double().T
    torch.testing.assert_close(P[:n, :n_latents].double(), expected, rtol=2.0**-7, atol=1e-4)
    largest = P[:n].view(n, len(panels), low_bit_matmul.LANE, -1).amax(2).view(n, -1)
    bits = best[:n].int()
    assert torch.equal(torch.where(bits < 0, bits ^ 0x7FFF, bits).to(torch.int16).view(torch.bfloat16), largest)


@pytest.mark.parametrize("kind", ["plain", "mean", "twins", "scales", "negative"])
@pytest.mark.parametrize("n, d, n_latents, k", [(70, 64, 2048, 16), (40, 257, 1531, 32), (33, 48, 700, 60)])
def test_codes_are_bitwise_the_same_with_any_product(
    monkeypatch: pytest.MonkeyPatch, n: int, d: int, n_latents: int, k: int, kind: str
) -> None:
    """Whole numbers, however coarse, bf16 of ours and of torch, and fp32 rule latents out; what is left decides."""
    from saekit.kernels.cpu import low_bit_matmul, rounded

    x, W, b = problem(2, n, d, n_latents, kind)
    x[: n // 2] *= torch.logspace(-1.5, 1.5, d)
    codes = []
    bf16 = kernels.bf16_unavailable() is None
    ways = [((each,), True, False) for each in low_bit_matmul.byte_products()]
    for whole, packed, fp32 in (*ways, ((), True, False), ((), False, False), ((), False, True)):
        monkeypatch.setattr(rounded, "multiplies_bf16", lambda fp32=fp32: not fp32 and bf16)
        monkeypatch.setattr(low_bit_matmul, "pays", lambda packed=packed: packed)
        monkeypatch.setattr(low_bit_matmul, "byte_products", lambda whole=whole: whole)
        monkeypatch.setattr(rounded, "FARTHER", 0.0)
        offsets, indices, values = kernels.threshold_encode(x, W, b - 3, None)
        order = (indices + n_latents * torch.repeat_interleave(torch.arange(n), offsets.diff())).argsort()
        top, latents = kernels.topk_encode(x, W, b, k)  # which latents have the value 0 means nothing
        codes.append((top, latents.where(top > 0, 0), offsets, indices[order], values[order]))
    for others in codes[1:]:
        for mine, other in zip(codes[0], others, strict=True):
            assert torch.equal(mine, other)


@pytest.mark.usefixtures("whole_numbers")
def test_which_rows_are_left_out_does_not_depend_on_the_product(monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps that are left to plain torch for a dense row are the same ones in a run that has chosen another format."""
    from saekit.kernels.cpu import encode, low_bit_matmul, rounded

    x, W, b = problem(3, 60, 24, 640)
    exact = (x @ W.T + b > 1.0).sum(1)
    monkeypatch.setattr(rounded, "FARTHER", 0.0)
    for whole in (True, False):
        monkeypatch.setattr(low_bit_matmul, "whole_numbers_pay", lambda whole=whole: whole)
        for room in range(int(exact.min()), int(exact.max()) + 1):
            latents = rounded.round_fastest(W, "W", x)
            found = encode.encode_above(x, W, b, latents, torch.ones(640), room=room)
            assert found is not None
            assert found.left_out.tolist() == (exact > room).nonzero()[:, 0].tolist()


@pytest.mark.usefixtures("whole_numbers")
def test_rows_that_whole_numbers_tell_too_little_of_are_left_to_bf16_or_fp32() -> None:
    from saekit.kernels.cpu import rounded

    finer = torch.bfloat16 if rounded.multiplies_bf16() else torch.float32
    x, W, _ = problem(0, 64, 300, 600)
    latents = rounded.round_fastest(W, "W", x)
    rows, same = rounded.round_alike(x, W, latents, 1)
    assert rows.whole is not None
    assert same is latents
    for kept, exact in ((1, False), (30, True)):
        rows, other = rounded.round_alike(x, W, latents, kept, exact)
        assert rows.whole is None
        assert other.whole is None
        assert torch.equal(matrix(other)[:, :300], W.to(finer))
    for _ in range(rounded.NOT_AGAIN):  # remembered for a while
        assert rounded.round_fastest(W, "W", x).whole is None
    assert rounded.round_fastest(W, "W", x).whole is not None


@given(
    width=st.integers(30, 70), n=st.integers(2, 70), value=st.sampled_from([math.nan, math.inf, -math.inf, 1e30]),
    seed=st.integers(0, 2**20), fp32=st.booleans(),
)  # fmt: skip
@settings(max_examples=60)
def test_a_row_that_is_not_finite_leaves_its_neighbours_alone(
    width: int, n: int, value: float, seed: int, fp32: bool
) -> None:
    """A product in bf16 may read into the next row; the codes of all others are those that each has alone."""
    x, W, b = problem(seed, n, width, 640)
    bad = torch.rand(n, generator=torch.Generator().manual_seed(seed)) < 0.3
    x[bad, seed % width] = value
    threshold = torch.full((640,), 3.0)  # no row is dense: such rows are the plain kernel's
    with without_bf16() if fp32 else contextlib.nullcontext():
        values, latents = kernels.topk_encode(x, W, b, 9)
        offsets, above, codes = kernels.threshold_encode(x, W, b, threshold)
    for row in (~bad).nonzero()[:, 0].tolist():
        own = x[row : row + 1]
        assert all(torch.equal(a[0], c[row]) for a, c in zip(kernels.topk_encode(own, W, b, 9), (values, latents)))
        span = slice(int(offsets[row]), int(offsets[row + 1]))
        for a, c in zip(kernels.threshold_encode(own, W, b, threshold)[1:], (above[span], codes[span])):
            assert torch.equal(a, c)


@pytest.mark.parametrize("count", [1, 2, 5])
@pytest.mark.parametrize("form", ["packed", "bf16", "fp32"])
@pytest.mark.parametrize("block_rows", [None, 7, 1000])
def test_blocks_cover_the_rows_and_get_smaller(
    monkeypatch: pytest.MonkeyPatch, count: int, block_rows: int | None, form: str
) -> None:
    from saekit.kernels.cpu import encode, threads

    monkeypatch.setattr(threads, "thread_count", lambda: count)
    for n in (1, 6, 63, 500, 4096):
        edges = encode._edges(n, 16384, block_rows, form)
        sizes = np.diff(edges)
        assert (edges[0], edges[-1]) == (0, n)
        assert (sizes > 0).all()
        assert (np.diff(sizes) <= 0).all()
        assert sizes.max() <= (block_rows or n)
