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


def test_groups_of_any_size_are_split_by_rows():
    generator = np.random.default_rng(0)
    sizes = generator.integers(1, 60, 60)
    rows = [
        {"text": f"text {group} {i}", "label": str(generator.integers(3)), "group": group}
        for group, size in enumerate(sizes)
        for i in range(size)
    ]
    for seed in range(5):
        data = read(rows, group="group", seed=seed)
        assert len(data.test) / len(rows) == pytest.approx(0.25, abs=0.05)
