"""Labelled data: what is drawn depends on names and seed alone, groups and equal texts stay on one side."""

from __future__ import annotations

import numpy as np
import pytest

from fixtures.worded_classes import read, table
from saekit.errors import ConfigError, DataError
from saekit.inputs.labelled import draw_rows


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


def test_a_class_that_is_drawn_out_of_training_is_refused(rows):
    rare = [{"text": f"rare {i}", "label": "rare"} for i in range(8)]
    with pytest.raises(DataError, match="`rare` are only in test"):
        read([*rows, *rare], label="label", train_rows=8)


def test_equal_texts_stay_together_unless_the_split_is_given(rows):
    drawn = read([*rows, *rows], label="label", seed=1)
    ((train, test),) = drawn.parts
    assert not {drawn.texts[row] for row in train} & {drawn.texts[row] for row in test}
    assert any("texts occur before; they are kept on one side of the split" in each for each in drawn.warnings)
    marked = [{**row, "split": "test"} for row in rows]
    given = read([*rows, *marked], label="label", split_column="split")
    assert any("are in the training rows word for word" in warning for warning in given.warnings)


def test_rare_classes_are_left_out_when_asked(rows):
    rare = [{"text": f"rare {i}", "label": "rare", "pair": f"r{i // 2}", "split": "train"} for i in range(4)]
    new = [{"text": f"new {i}", "label": "new", "pair": "n", "split": "test"} for i in range(9)]
    found = read([*rare, *rows], min_rows=5)
    assert found.classes == ("bad", "good")
    assert [found.texts[row] for row in range(len(found.texts))] == [row["text"] for row in rows]
    assert found.warnings[0] == "1 of 3 classes have fewer than 5 rows and were left out, 4 of 164 rows: `rare`"
    assert read([*rare, *rows], min_rows=4).classes == ("bad", "good", "rare")
    with_groups = read([*rare, *rows], group="pair", min_rows=3)
    assert with_groups.classes == ("bad", "good")
    assert "fewer than 3 groups" in with_groups.warnings[0]
    assert len(np.unique(with_groups.groups)) == 40
    split = read([*rare, *rows, *new], split_column="split", min_rows=1)
    assert split.classes == ("bad", "good", "rare")
    assert "fewer than 1 training rows" in split.warnings[0]
    limited = read([*rare, *rows], min_rows=5, max_rows=60)
    assert (limited.classes, len(limited.texts)) == (("bad", "good"), 60)
    with pytest.raises(DataError, match=r"at least two classes with 81 rows \(min_rows\); there are 0 of 2"):
        read(rows, min_rows=81)
    with pytest.raises(ConfigError, match="`min_rows` must be"):
        read(rows, min_rows=0)


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
