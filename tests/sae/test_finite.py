"""What the public functions of an SAE take, and what they refuse: NaN, infinity, and numbers that overflow."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pandas
import pytest
import torch

from fixtures.known_saes import random_sae
from saekit import ArrayRows, SAEFeatures, compare, evaluate, prune, rank
from saekit.errors import DataError, ShapeError
from saekit.sae.model import SAE
from saekit.sae.scaling import Scaling

X = torch.randn(12, 6, generator=torch.Generator().manual_seed(0))

ENTRIES: dict[str, Callable[[SAE, Any], Any]] = {
    "encode": lambda sae, x: sae.encode(x),
    "pre": lambda sae, x: sae.pre(x),
    "reconstruct": lambda sae, x: sae.reconstruct(x),
    "decode": lambda sae, x: sae.decode(sae.encode(X), x),
    "evaluate": lambda sae, x: evaluate(sae, x),
    "compare": lambda sae, x: compare([sae, random_sae(seed=1)], x),
    "rank": lambda sae, x: rank(sae, x),
    "prune": lambda sae, x: prune(sae, x, sizes=[4]),
    "rows": lambda sae, x: ArrayRows(x),
    "SAEFeatures": lambda sae, x: SAEFeatures(None, sae).transform(x),
}


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("name", ENTRIES)
def test_what_is_not_finite_is_refused_by_every_function(name: str, value: float) -> None:
    x = X.clone()
    x[3, 2] = x[7, 0] = value
    with pytest.raises(ValueError, match=r"(?i)row 3 .*2 of these 12 rows are not finite|NaN|infinity") as caught:
        ENTRIES[name](random_sae(), x)
    if name != "SAEFeatures":  # scikit-learn's own check, with its own words
        assert isinstance(caught.value, DataError)
        assert "row 3 of" in str(caught.value)
        assert "2 of these 12 rows are not finite" in str(caught.value)


@pytest.mark.parametrize("scaling", ["none", "scalar", "standardize", "layer_norm"])
@pytest.mark.parametrize("kind", ["array", "float64", "list", "frame"])
def test_arrays_lists_and_frames_are_rows(kind: str, scaling: str) -> None:
    sae = random_sae(scaling=scaling)
    given = {
        "array": X.numpy(), "float64": X.numpy().astype(np.float64), "list": X.tolist(),
        "frame": pandas.DataFrame(X.numpy(), columns=list("abcdef")),
    }[kind]  # fmt: skip
    assert torch.equal(sae.encode(given).to_dense(), sae.encode(X).to_dense())
    assert torch.equal(sae.reconstruct(given), sae.reconstruct(X))
    assert torch.equal(sae.decode(sae.encode(given), given), sae.reconstruct(X))


def test_codes_that_are_not_finite_are_refused() -> None:
    sae = random_sae()
    codes = sae.encode(X)
    values = codes.values.clone()
    values[5] = math.nan
    broken = type(codes)(codes.offsets, codes.indices, values, codes.n_latents)
    with pytest.raises(DataError, match=rf"of row {int(codes.row_of()[5])} has nan, and 1 of {codes.nnz} codes"):
        sae.decode(broken)


@pytest.mark.parametrize(("scaling", "x"), [("none", X.double() * 1e60), ("row_norm", X * 1e30)])
def test_numbers_that_overflow_are_told_to_be_scaled(scaling: str, x: torch.Tensor) -> None:
    with pytest.raises(DataError, match=r"must fit into float32.*12 of 12 rows are too large. Scale the rows"):
        random_sae().replace(scaling=Scaling(scaling)).encode(x)


def test_large_finite_rows_are_fine_where_nothing_overflows() -> None:
    sae = random_sae()
    sae = sae.replace(b_enc=torch.zeros(24), b_pre=None, b_dec=torch.zeros(6))
    large = torch.full((4, 6), 3e37)  # their sum overflows, they do not
    torch.testing.assert_close(sae.encode(large).to_dense(), 3e37 * sae.encode(torch.ones(4, 6)).to_dense())


@pytest.mark.parametrize("given", [["a", "b"], [[1.0, 2.0], [3.0]], pandas.DataFrame({"text": ["a"]})])
def test_what_holds_no_numbers_is_refused(given: Any) -> None:
    with pytest.raises(ShapeError, match="rows must be numbers"):
        random_sae().encode(given)
