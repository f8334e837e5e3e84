"""Orphans and shared latents of equal frequency."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from saekit.comparison.orphan_properties import frequency_matched


@given(n=st.integers(1, 200), share=st.floats(0, 1), seed=st.integers(0, 99))
def test_matched_latents_have_equal_frequencies(n, share, seed):
    generator = np.random.default_rng(seed)
    frequency = np.where(generator.random(n) < 0.1, 0, generator.random(n) ** 3)
    shared = generator.random(n) < share
    orphan, mate = frequency_matched(frequency, shared, generator)
    assert len(orphan) == len(mate) == len(set(orphan.tolist())) == len(set(mate.tolist()))
    assert not shared[orphan].any()
    assert shared[mate].all()
    assert (frequency[orphan] > 0).all()
    ratio = np.sort(frequency[orphan]) / np.sort(frequency[mate])
    assert ((ratio > 2**-0.2501) & (ratio < 2**0.2501)).all()
