"""Poolings of rows in batches are their dense definitions, and never make an array of tokens by latents."""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from fixtures.pooling_checks import CLOSE, SPARSE, assert_equal, dense, identity, random_sae, reference
from saekit.errors import DataError
from saekit.kernels.pooling import largest_of_rows, pool_segments
from saekit.rows.pooling import DENSE_POOLS, Ask, pool_batches
from saekit.sae import rules
from saekit.sae.codes import Codes
from saekit.sae.model import SAE


@st.composite
def segments(draw: Any) -> tuple[np.ndarray, list[int]]:
    lengths = draw(st.lists(st.integers(0, 5), min_size=1, max_size=6))
    d = draw(st.integers(1, 7))
    seed = draw(st.integers(0, 10_000))
    rng = np.random.default_rng(seed)
    # few different values: ties; many zeros: rows and segments where nothing fires
    z = rng.integers(1, 4, (sum(lengths), d)) * (rng.random((sum(lengths), d)) < draw(st.sampled_from([0.1, 0.5, 1.0])))
    return z.astype(np.float32), lengths


@given(segments())
def test_segments_are_reduced_as_the_dense_definition_says(case: tuple[np.ndarray, list[int]]) -> None:
    z, lengths = case
    codes = Codes.from_dense(torch.from_numpy(z))
    # the order within a row has no meaning
    backwards = [torch.arange(a, b).flip(0) for a, b in zip(codes.offsets[:-1], codes.offsets[1:])]
    order = torch.cat([torch.zeros(0, dtype=torch.int64), *backwards])
    pooled = pool_segments(
        codes.offsets, codes.indices[order], codes.values[order], torch.tensor(lengths), codes.n_latents
    )
    ends = np.concatenate([[0], np.cumsum(lengths)])
    for name in ("sum", "max", "count"):
        found = Codes(pooled.offsets, pooled.indices, getattr(pooled, name), codes.n_latents).to_dense().numpy()
        for i, (a, b) in enumerate(itertools.pairwise(ends)):
            expected = reference(z[a:b], name) if b > a else np.zeros(z.shape[1])
            np.testing.assert_array_equal(found[i], expected)
    for a, b in zip(pooled.offsets[:-1], pooled.offsets[1:]):
        assert (pooled.indices[a:b].diff() > 0).all()


@given(segments())
def test_places_in_a_row_put_the_largest_first_and_ties_by_latent(case: tuple[np.ndarray, list[int]]) -> None:
    z, _ = case
    codes = Codes.from_dense(torch.from_numpy(z))
    place = largest_of_rows(codes.offsets, codes.indices, codes.values)
    for r in range(len(z)):
        a, b = int(codes.offsets[r]), int(codes.offsets[r + 1])
        order = np.lexsort((codes.indices[a:b].numpy(), -codes.values[a:b].numpy()))
        assert place[a:b][order].tolist() == list(range(b - a))


@given(segments(), st.integers(1, 4), st.booleans())
def test_every_pooling_is_its_dense_definition(case: tuple[np.ndarray, list[int]], step: int, shuffle: bool) -> None:
    """Also when the rows of a document are spread over batches, with other documents between them."""
    z, lengths = case
    z = z - 2.0 * (z == 3)  # states may be negative; codes are then zero
    lengths = [n for n in lengths if n] or [1]
    z = z if len(z) else np.ones((1, z.shape[1]), np.float32)
    document = np.repeat(np.arange(len(lengths)), lengths)
    order = np.arange(len(z))
    if shuffle:  # documents interleave, each keeps the order of its rows
        mixed = np.random.default_rng(0).permutation(document)
        order = np.argsort(np.argsort(mixed, kind="stable"), kind="stable")
        document = mixed
    x = torch.from_numpy(z[order])
    batches = [({"a": x[i : i + step]}, torch.from_numpy(document[i : i + step])) for i in range(0, len(x), step)]
    sparse, states = pool_batches(
        batches, len(lengths), [Ask(SPARSE, identity(z.shape[1]), hook="a"), Ask(DENSE_POOLS, hook="a")]
    )
    for i in range(len(lengths)):
        rows = z[order][document == i]
        for name in SPARSE:
            np.testing.assert_allclose(dense(sparse[name])[i], reference(np.maximum(rows, 0), name), rtol=1e-6)
        for name in DENSE_POOLS:
            np.testing.assert_allclose(states[name][i], reference(rows, name), rtol=1e-6, err_msg=name)
    for matrix in sparse.values():
        assert matrix.dtype == np.float32
        assert matrix.has_canonical_format
        assert (matrix.data != 0).all()


def test_a_document_of_two_parts_is_the_sum_the_maximum_and_the_count_of_its_parts() -> None:
    g = torch.Generator().manual_seed(0)
    a, b = torch.randn(9, 16, generator=g), torch.randn(4, 16, generator=g)
    ask = Ask(("sum", "max", "min", "count", "top2", "first", "last"), random_sae(), hook="h")

    def pooled(*parts: torch.Tensor) -> dict[str, np.ndarray]:
        batches = [({"h": part}, torch.zeros(len(part), dtype=torch.int64)) for part in parts]
        return {name: dense(x)[0] for name, x in pool_batches(batches, 1, [ask])[0].items()}

    whole, first, second = pooled(torch.cat([a, b])), pooled(a), pooled(b)
    np.testing.assert_allclose(whole["sum"], first["sum"] + second["sum"], rtol=1e-5)
    for name in ("count", "top2"):
        np.testing.assert_array_equal(whole[name], first[name] + second[name])
    np.testing.assert_array_equal(whole["max"], np.maximum(first["max"], second["max"]))
    np.testing.assert_array_equal(whole["min"], np.minimum(first["min"], second["min"]))
    np.testing.assert_array_equal(whole["first"], first["first"])
    np.testing.assert_array_equal(whole["last"], second["last"])
    split = pooled(a, b)
    for name, values in whole.items():
        np.testing.assert_allclose(split[name], values, rtol=1e-6)


def test_documents_that_come_out_of_order_or_not_at_all() -> None:
    x = torch.arange(1.0, 7.0).reshape(3, 2)
    batches = [({"h": x}, torch.tensor([2, 0, 0])), ({"h": x[:0]}, torch.zeros(0, dtype=torch.int64))]
    asks = [Ask(("sum", "last", "mean"), identity(2), hook="h"), Ask(("mean", "max"), hook="h")]
    found, states = pool_batches(batches, 4, asks, empty="zero")
    assert dense(found["sum"]).tolist() == [[8, 10], [0, 0], [1, 2], [0, 0]]
    assert dense(found["mean"]).tolist() == [[4, 5], [0, 0], [1, 2], [0, 0]]
    assert dense(found["last"]).tolist() == [[5, 6], [0, 0], [1, 2], [0, 0]]
    assert states["max"].tolist() == [[5, 6], [0, 0], [1, 2], [0, 0]]
    with pytest.raises(DataError, match="images must have at least one token; 2 have none: rows `1`, `3`"):
        pool_batches(batches, 4, asks, what="images")
    nothing, _ = pool_batches([], 2, asks, empty="zero")
    assert nothing["sum"].shape == (2, 2)
    assert nothing["sum"].nnz == 0


class Largest(TorchDispatchMode):
    """Watches the size of every tensor that torch makes."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = function(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else [out]:
            if isinstance(tensor, torch.Tensor):
                self.bytes = max(self.bytes, tensor.numel() * tensor.element_size())
        return out


def test_no_array_of_tokens_by_latents_is_ever_made(monkeypatch: pytest.MonkeyPatch) -> None:
    n_rows, n_latents = 5000, 16_384
    sae = random_sae(n=n_latents, d=8, rule=rules.TopKRule(8))
    x = torch.randn(n_rows, 8, generator=torch.Generator().manual_seed(0))
    document = torch.arange(n_rows) // 10

    def refuse(*_: Any) -> Any:
        raise AssertionError("codes were made dense")

    monkeypatch.setattr(Codes, "to_dense", refuse)
    monkeypatch.setattr(SAE, "pre", refuse)
    with Largest() as largest:
        (found,) = pool_batches([({"h": x}, document)], n_rows // 10, [Ask(SPARSE, sae, hook="h")])
    assert found["sum"].shape == (500, n_latents)
    # the encoder works in blocks of some tens of MiB; a dense array would be eight times the limit here
    assert largest.bytes < 4 * n_rows * n_latents / 8


@pytest.mark.gpu
def test_pooling_on_a_gpu_is_pooling_on_the_cpu() -> None:
    sae, g = random_sae(), torch.Generator().manual_seed(0)
    x, document = torch.randn(500, 16, generator=g), torch.arange(500) // 7
    wanted = [Ask(SPARSE, sae, hook="h"), Ask(DENSE_POOLS, hook="h")]
    there = [dataclasses.replace(ask, sae=ask.sae and ask.sae.to("cuda")) for ask in wanted]
    found = pool_batches([({"h": x.cuda()}, document)], 72, there)
    assert_equal(found, pool_batches([({"h": x}, document)], 72, wanted), **CLOSE)
