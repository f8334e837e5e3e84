"""What is kept of the firings is what sorting all of them gives, however they come."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from saekit.explanation import examples as module
from saekit.explanation.examples import Examples, bin_edges

N = 5


def firings(seed, n=400):
    generator = np.random.default_rng(seed)
    token = np.repeat(np.arange(n), 2)
    latent = np.stack([generator.permutation(N)[:2] for _ in range(n)]).ravel()
    value = generator.standard_normal(2 * n).astype(np.float32).round(2)
    value[value == 0] = 0.01
    return latent, token, token // 17, value


def filled(parts, n_top=4, n_sample=6):
    found = Examples(N, n_top, n_sample)
    for part in parts:
        found.add(*part)
    return found


@given(seed=st.integers(0, 30), blocks=st.integers(1, 9))
def test_blocks_and_their_order_do_not_matter(seed, blocks):
    whole = firings(seed)
    order = np.random.default_rng(seed).permutation(len(whole[0]))
    parts = [tuple(each[index] for each in whole) for index in np.array_split(order, blocks)]
    old, module.PENDING = module.PENDING, 100
    try:
        one, many = filled([whole]), filled(parts)
        for latent in range(N):
            for name in ("top", "sample"):
                for a, b in zip(getattr(one, name)(latent), getattr(many, name)(latent), strict=True):
                    assert np.array_equal(a, b)
        assert np.array_equal(one.histogram, many.histogram)
        assert np.array_equal(one.count, many.count)
    finally:
        module.PENDING = old


@given(seed=st.integers(0, 30))
def test_top_examples_are_the_strongest_of_each_document(seed):
    latent, token, document, value = firings(seed)
    found = filled([(latent, token, document, value)])
    for j in range(N):
        tokens, values = found.top(j)
        mine = latent == j
        best = {}
        for t, d, v in zip(token[mine], document[mine], value[mine], strict=True):
            if d not in best or abs(v) > abs(best[d][1]):
                best[d] = (t, v)
        expected = sorted(best.values(), key=lambda each: (-abs(each[1]), each[0]))[:4]
        assert [(int(t), float(v)) for t, v in zip(tokens, values, strict=True)] == [
            (int(t), float(v)) for t, v in expected
        ]
        assert found.count[j] == mine.sum()
        assert found.maximum[j] == pytest.approx(np.abs(value[mine]).max())
        assert found.total[j] == pytest.approx(np.abs(value[mine]).sum(), rel=1e-5)
        counts, _ = np.histogram(np.abs(value[mine]), [*bin_edges(), np.inf])
        assert np.array_equal(found.histogram[j], counts)


def test_the_sample_is_uniform():
    """Over seeds, every firing is kept equally often."""
    kept = np.zeros(200)
    token = np.arange(200)
    for seed in range(300):
        found = Examples(1, 1, 20, seed)
        found.add(np.zeros(200, np.int64), token, token, np.ones(200, np.float32))
        kept[found.sample(0)[0]] += 1
    assert kept.sum() == 300 * 20
    assert abs(kept - 30).max() < 6 * np.sqrt(30)


def test_latents_that_never_fire_have_none():
    found = filled([])
    assert len(found.top(0)[0]) == len(found.sample(3)[0]) == 0
