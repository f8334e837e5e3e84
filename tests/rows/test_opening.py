"""Rows from sources, arrays and paths."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from saekit.errors import ShapeError
from saekit.rows.arrays import ArrayRows
from saekit.rows.opening import as_source, facts_of


def test_sources_arrays_and_paths_give_the_same_rows(tmp_path):
    x = torch.randn(20, 3, generator=torch.Generator().manual_seed(0))
    np.save(tmp_path / "x.npy", x.numpy())
    source = ArrayRows(x)
    assert as_source(source, 3, "here") is source
    for given in (x, x.numpy(), tmp_path / "x.npy", str(tmp_path / "x.npy")):
        rows = torch.cat([batch.x for batch in as_source(given, 3, "here").batches(7)])
        assert torch.equal(rows, x)


def test_rows_of_another_width_are_refused():
    with pytest.raises(ShapeError, match="here: rows must have the width of the SAE, 4; they have 3"):
        as_source(torch.ones(2, 3), 4, "here")


def test_facts_are_those_that_are_known():
    source = ArrayRows(torch.ones(2, 3))
    assert set(facts_of(source)) <= {"model", "hook", "data", "digest"}
    assert facts_of(source)["digest"] == source.info["digest"]
