"""Splits: what is drawn depends on names and seed alone, groups stay on one side."""

from __future__ import annotations

import numpy as np
import pytest

from fixtures.worded_classes import read, table
from saekit.inputs.split import draw_rows


@pytest.fixture(scope="module")
def rows() -> list[dict]:
    return table(160)


def test_rows_are_drawn_by_class_and_by_group():
    y = np.repeat([0, 1, 2], [60, 30, 10])
    keys = [f"text {row}" for row in range(100)]
    drawn = draw_rows(keys, y, 50, is_grouped=False, seed=0)
    assert np.bincount(y[drawn]).tolist() == [30, 15, 5]
    assert set(draw_rows(keys, y, 20, is_grouped=False, seed=0)) <= set(drawn)
    pairs = [f"pair {row // 2}" for row in range(100)]
    half = draw_rows(pairs, y, 50, is_grouped=True, seed=0)
    assert len({pairs[row] for row in half}) == 25
    assert draw_rows(keys, y, 200, is_grouped=False, seed=0).tolist() == list(range(100))
    order = np.random.default_rng(0).permutation(100)
    turned = draw_rows([keys[row] for row in order], y[order], 50, is_grouped=False, seed=0)
    assert sorted(order[turned]) == drawn.tolist()


def test_the_drawn_split_keeps_classes_on_both_sides_and_groups_whole(rows):
    data = read(rows, label="label", group="pair")
    ((train, test),) = data.parts
    assert data.groups is not None
    assert not set(data.groups[train]) & set(data.groups[test])
    for seed in range(5):
        small = read([*table(8), *[{"text": f"rare {i}", "label": "rare"} for i in range(2)]], seed=seed)
        assert all(min(counts) >= 1 for counts in small.counts().values())
    limited = read(rows, label="label", split_column="split", train_rows=40, test_rows=20)
    assert (limited.about["n_train"], limited.about["n_test"]) == (40, 20)
    assert limited.digest() != data.digest()
    assert read(rows, label="label", group="pair").digest() == data.digest()


def test_a_drawn_split_depends_on_texts_and_seed_alone(rows):
    order = np.random.default_rng(0).permutation(len(rows))
    for settings in ({}, {"group": "pair"}, {"folds": 4}, {"group": "pair", "max_rows": 80}, {"train_rows": 50}):
        one, other = read(rows, **settings), read([rows[i] for i in order], **settings)
        for (train, test), (same_train, same_test) in zip(one.parts, other.parts, strict=True):
            for mine, theirs in ((train, same_train), (test, same_test)):
                assert sorted(one.texts[i] for i in mine) == sorted(other.texts[i] for i in theirs)
        assert read(rows, **settings, seed=1).digest() != one.digest()


def heavy_rows(seed: int, n_groups: int = 60) -> list[dict]:
    """Groups of Pareto sizes, a few with most of the rows, each with classes of its own."""
    generator = np.random.default_rng(seed)
    sizes = np.ceil(5 * (1 + generator.pareto(1.1, n_groups))).astype(int).clip(max=250)
    mix = generator.dirichlet(np.ones(3), n_groups)
    return [
        {"text": f"text {group} {i}", "label": str(generator.choice(3, p=mix[group])), "group": group}
        for group, size in enumerate(sizes)
        for i in range(size)
    ]


@pytest.mark.parametrize("share", [0.25, 0.5])
def test_groups_of_any_size_are_split_by_rows_and_classes(share):
    """A few heavy groups: the test set has the fraction of the rows that was asked for, of every class."""
    for seed in range(12):
        rows = heavy_rows(seed)
        data = read(rows, group="group", seed=seed, test_share=share)
        assert len(data.test) / len(rows) == pytest.approx(share, abs=0.03)
        for c in range(3):
            assert (data.y[data.test] == c).sum() / (data.y == c).sum() == pytest.approx(share, abs=0.1)


def test_folds_of_groups_of_any_size_are_balanced():
    for seed in range(6):
        rows = heavy_rows(seed, 200)
        data = read(rows, group="group", seed=seed, folds=4)
        largest = np.bincount(data.groups).max() / len(rows)
        for _, test in data.parts:
            assert len(test) / len(rows) <= max(0.25, largest) + 0.03
            assert len(set(data.y[test])) == 3


def test_seeds_draw_other_groups():
    rows = heavy_rows(0)
    tests = [frozenset(data.groups[data.test]) for data in (read(rows, group="group", seed=s) for s in range(8))]
    assert len(set(tests)) == 8
    assert len(frozenset.union(*tests)) > 30
