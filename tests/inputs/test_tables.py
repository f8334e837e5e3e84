"""Columns of texts and of images."""

from __future__ import annotations

import numpy as np
import pytest

from saekit.errors import DataError
from saekit.inputs.images import read_images
from saekit.inputs.tables import first_line
from saekit.inputs.texts import read_texts


@pytest.mark.parametrize(
    "table",
    [
        read_texts([{"text": "a", "label": 1}, {"text": "b", "label": 2}]),
        read_images(np.zeros((2, 4, 4), np.uint8)).with_columns(label=[1, 2]),
    ],
)
def test_columns_by_name(table):
    assert table.column("label") == (1, 2)
    assert table.digest == table.info["digest"]
    with pytest.raises(DataError, match=r"must have a column `lable`; its columns are `label`. Did you mean `label`"):
        table.column("lable")


def test_the_first_line_of_an_error():
    assert first_line(ValueError("one.\ntwo")) == "one"
    assert first_line(ValueError()) == "ValueError"
