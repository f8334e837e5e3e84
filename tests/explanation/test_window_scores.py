"""Scores of windows find what was planted, and nothing where nothing is; the windows themselves give nothing away."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.metrics import roc_auc_score

from explanation.planted_texts import NO_TABLE, TOPIC, contexts, firings_of, planted
from saekit.explanation.coactivation import coactive
from saekit.explanation.firing_windows import TokenVectors, windows_of
from saekit.explanation.layout import SCORING, Layout
from saekit.explanation.responses import Named, responses
from saekit.explanation.run import label_kinds, scored
from saekit.explanation.window_scores import window_scores

WORD, AFTER, BEFORE, ABOUT, START, BOTH = range(6)


@pytest.fixture(scope="module")
def layout():
    return Layout.of(contexts())


@pytest.fixture(scope="module")
def found(layout):
    """Scores of the planted latents, and of the same with shuffled codes."""
    firings = planted(layout)
    tokens = np.flatnonzero(layout.half >= 0)
    vectors = TokenVectors(NO_TABLE, layout)
    each = []
    for some in (firings, firings.shifted(tokens, seed=1)):
        latents = np.arange(some.n_latents)
        scores = window_scores(some, latents, layout, vectors, 16, seed=0)
        each.append((responses(some, layout, 3, 0, Named(latents, lambda token: f"w{token}")), scores))
    return each


def test_words_neighbours_topics_and_positions_are_named_and_detected(found):
    (told, windows), (shuffled, chance) = found
    for latent, kind, label in (
        (WORD, "token", "`w7`"),
        (AFTER, "previous", "after `w3`"),
        (BEFORE, "next", "before `w5`"),
        (START, "position", "position 0"),
    ):
        assert told.labels[kind][latent].startswith(label)
        assert told.by_kind[kind][latent] >= 0.95, kind
        assert told.labelling[kind][latent] == max(each[latent] for each in told.labelling.values())
        assert told.by_kind[kind][latent] - shuffled.by_kind[kind][latent] > 0.3
    assert windows.scores["embedding_masked"][ABOUT] >= 0.95
    assert windows.scores["context"][ABOUT] >= 0.95
    assert windows.context_detection[ABOUT] >= 0.95
    assert windows.context_labelling[ABOUT] > max(each[ABOUT] for each in told.labelling.values())
    assert np.mean([40 <= token < 60 for token in windows.context_tokens[ABOUT]]) >= 0.9
    for name in ("embedding", "embedding_masked", "context"):
        assert np.nanmean(chance.scores[name]) == pytest.approx(0.5, abs=0.1)
    assert np.nanmean(chance.scores["intruder"]) == pytest.approx(0.2, abs=0.1)
    assert windows.scores["intruder"][ABOUT] > 0.5
    assert windows.scores["cohesion"][ABOUT] > np.nanmax(chance.scores["cohesion"]) + 0.05


def test_scores_rank_what_is_planted_above_what_is_shuffled():
    """Ten latents each of words, of words after and before one, of topics and of positions."""
    layout = Layout.of(contexts(240))
    generator = np.random.default_rng(1)
    words = generator.permutation(40)[:30]
    on = [layout.ids == word for word in words[:10]]
    on += [layout.previous == word for word in words[10:20]]
    on += [layout.next == word for word in words[20:30]]
    rates = generator.uniform(0.15, 0.5, 10)
    on += [
        (layout.document % TOPIC == i % TOPIC) & (generator.random(len(layout.ids)) < r) for i, r in enumerate(rates)
    ]
    on += [layout.position == i for i in range(4)] + [layout.position < i for i in range(2, 8)]
    firings, latents = firings_of(on), np.arange(50)
    vectors = TokenVectors(NO_TABLE, layout)
    auc, kinds = [], []
    for some in (firings, firings.shifted(np.flatnonzero(layout.half >= 0), seed=2)):
        told = responses(some, layout, 3, 0)
        windows = window_scores(some, latents, layout, vectors, 16, seed=0)
        kinds.append(label_kinds(told, windows))
        auc.append(scored(some, told, windows, kinds[-1]).scores["detection"])
    assert [np.bincount(kinds[0][i : i + 10], minlength=5).argmax() for i in range(0, 50, 10)] == [0, 1, 2, 4, 3]
    for kind in range(5):
        mine = auc[0][10 * kind : 10 * kind + 10]
        assert roc_auc_score([1] * 10 + [0] * 50, [*mine, *auc[1]]) >= 0.95, kind
        assert np.mean(mine) >= 0.95, kind
    assert np.mean(auc[1]) == pytest.approx(0.5, abs=0.1)


def test_a_latent_of_two_unrelated_words_is_flagged_and_its_meanings_told(found):
    (_, windows), (_, chance) = found
    assert windows.is_polysemantic[BOTH] == 1
    assert sorted(cluster[1][0] for cluster in windows.clusters[BOTH]) == [25, 47]
    assert not windows.is_polysemantic[[WORD, ABOUT]].any()
    assert np.nanmean(chance.is_polysemantic) <= 0.2


def test_offset_and_length_tell_nothing_and_negatives_are_silent(layout):
    firings = planted(layout)
    windows = windows_of(firings, np.arange(6), layout, 16, seed=0)
    scoring = windows.pick(windows.half == SCORING)
    for score in (scoring.offset, scoring.length, scoring.offset / scoring.length):
        assert roc_auc_score(scoring.is_positive, score) == pytest.approx(0.5, abs=0.05)
    inside = [
        firings.fires_within(row, np.array([start]), np.array([start + length]))[0]
        for row, start, length in zip(windows.row, windows.start, windows.length, strict=True)
    ]
    assert np.array_equal(inside, windows.is_positive)
    ends = windows.start + windows.length
    assert (windows.start >= layout.first[windows.start]).all()
    assert (ends <= layout.stop[windows.start]).all()
    assert (layout.half[windows.start + windows.offset] == windows.half).all()


def test_latents_that_fire_together(layout):
    on = layout.ids == 7
    part = on & (layout.document % 3 > 0)
    firings = firings_of([on, part, layout.ids == 8, on & ~part])
    found = coactive(firings, np.arange(4), 2, 0)
    assert found[0][0] == {"latent": 1.0, "jaccard": pytest.approx(part.sum() / on.sum(), abs=1e-4)}
    assert [each["latent"] for each in found[3]] == [0.0]
    assert found[2] == []
