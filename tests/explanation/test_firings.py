"""What is kept of the firings is what sorting all of them gives, however they come and wherever they lie."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from saekit import kernels
from saekit.explanation import firings as module
from saekit.explanation.firings import FiringsWriter, by_fifths, drawn, histogram, strongest
from saekit.measure.token_statistics import TokenScores
from saekit.sae.codes import Codes

N, TOKENS = 5, 400


@pytest.fixture(scope="module")
def dense():
    generator = np.random.default_rng(0)
    z = generator.standard_normal((TOKENS, N)).astype(np.float32).round(2)
    return np.where(generator.random((TOKENS, N)) < 0.4, np.where(z == 0, np.float32(0.01), z), np.float32(0))


def firings(dense, blocks=1):
    token, latent = np.nonzero(dense)
    order = np.random.default_rng(1).permutation(len(token))
    writer = FiringsWriter(N, TOKENS)
    for index in np.array_split(order, blocks):
        writer.add(latent[index], token[index], dense[token[index], latent[index]])
    return writer.finish()


@pytest.mark.parametrize("mode", ["plain", "auto"])
@pytest.mark.parametrize(("block", "held"), [(10**6, 10**6), (100, 10**6), (64, 200)])
def test_blocks_order_and_the_file_do_not_matter(dense, monkeypatch, mode, block, held):
    monkeypatch.setattr(module, "BLOCK", block)
    monkeypatch.setattr(module, "HELD", held)
    with kernels.using(mode):
        found = firings(dense, blocks=7)
    assert isinstance(found.token, np.memmap) == (held == 200)
    for latent in range(N):
        token, value = found.of(latent)
        assert np.array_equal(token, np.flatnonzero(dense[:, latent]))
        assert np.array_equal(value, dense[token, latent])
        assert np.array_equal(found.codes_at(latent, np.arange(TOKENS)), dense[:, latent])
    assert sum(part.n_latents for _, part in found.parts()) == N


@pytest.mark.parametrize("mode", ["plain", "auto"])
def test_sums_by_token_are_those_of_codes(dense, mode):
    words, document = np.random.default_rng(2).integers(0, 9, TOKENS), np.arange(TOKENS) // 17
    expected = TokenScores(N)
    expected.update(Codes.from_dense(torch.from_numpy(dense)), torch.from_numpy(words), torch.from_numpy(document))
    with kernels.using(mode):
        found = firings(dense).token_scores(words, np.bincount(words).astype(float), document)
    for a, b in zip(found.pairs(), expected.pairs(), strict=True):
        assert a == pytest.approx(b)
    for name, value in found.compute().named().items():
        assert value.numpy() == pytest.approx(getattr(expected.compute(), name).numpy(), nan_ok=True), name
    assert found.top_tokens() == [[(t, pytest.approx(share)) for t, share in each] for each in expected.top_tokens()]


def test_histograms_have_four_bins_per_octave_and_open_ends(dense):
    edges = 2.0 ** (np.arange(-64, 64) / 4)
    for z in [*dense.T, np.array([1e-9, -1e9, 0.5, -1.0, 2.0], np.float32)]:
        values = z[z != 0]
        counts = np.histogram(np.abs(values), [0, *edges[1:], np.inf])[0]
        found = histogram(values)
        assert found == [[edges[i], counts[i]] for i in np.flatnonzero(counts)]
    assert histogram(np.zeros(0, np.float32)) == []


def test_shuffled_codes_keep_all_but_where_they_fell(dense):
    found, tokens = firings(dense), np.arange(50, TOKENS)
    kept = found.where(np.arange(TOKENS) >= 50)
    moved = kept.shifted(tokens, seed=3)
    assert np.array_equal(moved.count, kept.count)
    for latent in range(N):
        assert np.array_equal(np.sort(moved.of(latent)[1]), np.sort(kept.of(latent)[1]))
        assert not np.array_equal(moved.of(latent)[0], kept.of(latent)[0])
        assert moved.of(latent)[0].min() >= 50
        assert (np.diff(moved.of(latent)[0]) > 0).all()


def test_strongest_examples_are_of_different_documents(dense):
    token, value = firings(dense).of(0)
    document = np.arange(TOKENS) // 17
    found = strongest(token, value, document, 4)
    best = {}
    for t, v in zip(token, value, strict=True):
        if document[t] not in best or abs(v) > abs(best[document[t]][1]):
            best[document[t]] = (t, v)
    expected = sorted(best.values(), key=lambda each: (-abs(each[1]), each[0]))[:4]
    assert [(token[i], value[i]) for i in found] == expected


def test_examples_of_every_fifth(dense):
    token, value = firings(dense).of(1)
    found, quantile = by_fifths(token, value, 1, 10, seed=0)
    assert np.bincount((quantile * 5).astype(int), minlength=5).tolist() == pytest.approx([2] * 5, abs=1)
    assert (np.diff(np.abs(value[found])) <= 0).all()
    assert quantile == pytest.approx([(np.abs(value) < abs(v)).mean() for v in value[found]])
    few, _ = by_fifths(token[:3], value[:3], 1, 10, seed=0)
    assert sorted(few) == [0, 1, 2]


def test_the_sample_is_uniform():
    """Over seeds, every firing is kept equally often, and what else fires does not matter."""
    kept, token = np.zeros(200), np.arange(200)
    for seed in range(300):
        kept[drawn(token, 0, 20, seed)] += 1
    assert kept.sum() == 300 * 20
    assert abs(kept - 30).max() < 6 * np.sqrt(30)
    assert set(token[drawn(token, 3, 20, 1)]) & set(range(100)) <= set(token[:100][drawn(token[:100], 3, 20, 1)])


def test_no_firings():
    found = FiringsWriter(3, 10).finish()
    assert found.count.tolist() == [0, 0, 0]
    assert found.codes_at(1, np.arange(10)).tolist() == [0] * 10
