"""Labelled data: what is refused or left out, equal texts stay on one side."""

from __future__ import annotations

import numpy as np
import pytest

from fixtures.worded_classes import read, table
from saekit.errors import ConfigError, DataError


@pytest.fixture(scope="module")
def rows() -> list[dict]:
    return table(160)


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
    assert read([*rare, *rows], min_rows=4, max_rows=60).classes == ("bad", "good")  # one rare row is left by the draw
    with pytest.raises(DataError, match="two classes with 4 rows of the 6 that `max_rows` leaves"):
        read([*rare, *rows], min_rows=4, max_rows=6)
    with pytest.raises(DataError, match=r"at least two classes with 81 rows \(min_rows\); there are 0 of 2"):
        read(rows, min_rows=81)
    with pytest.raises(ConfigError, match="`min_rows` must be"):
        read(rows, min_rows=0)
