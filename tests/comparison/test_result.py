"""The result of a comparison: its tables and captions say what its numbers are, and a contradiction is refused."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from saekit.comparison.result import Comparison
from saekit.comparison.run import compare
from saekit.comparison.settings import ComparisonSettings
from saekit.errors import FormatError
from saekit.measure.results import Measured
from saekit.sae.model import SAE
from saekit.sae.rules import ReLURule

HEAD = ["", "shared", "equal", "PW-MCC", "cosine enc", "max cosine"]


def sae_of(seed: int) -> SAE:
    W = torch.randn(12, 8, generator=torch.Generator().manual_seed(seed))
    return SAE(W_enc=W, b_enc=torch.zeros(12), W_dec=W, b_dec=torch.zeros(8), rule=ReLURule())


@pytest.fixture(scope="module")
def two() -> Comparison:
    return compare([sae_of(0), sae_of(1)])


@pytest.fixture(scope="module")
def three() -> Comparison:
    x = torch.randn(200, 8, generator=torch.Generator().manual_seed(9))
    return compare([sae_of(0), sae_of(1), sae_of(2)], x, settings=ComparisonSettings(controls=False))


def test_a_pair_has_one_line_and_each_null_another(two):
    lines = two.table()
    assert lines[0] == HEAD
    assert [line[0] for line in lines[1:]] == ["relu-12 | relu-12 (2)", "  random", "  permuted"]
    pair, null = two.pairs[0], two.nulls["random"]
    assert lines[1] == pair.cells()
    assert lines[1][1:] == [
        str(each)
        for each in (
            pair.shared,
            pair.equal,
            pair.decoder.mean_cosine,
            pair.encoder.mean_cosine,
            pair.decoder.max_cosine,
        )
    ]
    assert lines[2][1:] == [str(null.shared), str(null.equal), str(null.mean_cosine), "", str(null.max_cosine)]
    assert all(len(line) == len(HEAD) for line in lines)


def test_several_pairs_come_below_their_mean_and_rows_add_columns(three):
    lines = three.table()
    assert lines[0] == [*HEAD, "shared alive", "correlation", "cka"]
    assert [line[0] for line in lines[1:]] == [
        "3 pairs",
        "relu-12 | relu-12 (2)",
        "relu-12 | relu-12 (3)",
        "relu-12 (2) | relu-12 (3)",
    ]
    assert all(len(line) == len(lines[0]) for line in lines)
    assert lines[1][1:3] == [str(three.shared), str(three.equal)]
    assert lines[1][6:] == [str(three.shared_alive), "", ""]
    seen = three.pairs[2].on_rows
    assert lines[4][6:] == [str(seen.shared_alive), str(seen.correlation), str(seen.cka)]
    assert three.shared.value == pytest.approx(sum(pair.shared.value for pair in three.pairs) / 3)


def test_what_older_files_lack_is_a_dash(three):
    unseen = dataclasses.replace(three.pairs[0], on_rows=None)
    partly = dataclasses.replace(three.pairs[1], on_rows=dataclasses.replace(three.pairs[1].on_rows, shared_alive=None))
    old = dataclasses.replace(three, pairs=[unseen, partly, three.pairs[2]], shared_alive=None)
    lines = old.table()
    assert lines[1][6:] == ["", "", ""]
    assert lines[2][6:] == ["–", "–", "–"]
    assert lines[3][6] == "–"
    assert "of latents that fire" not in old.caption()


def test_the_caption_says_what_counts_as_shared(two, three):
    caption = two.caption()
    assert caption.startswith("shared: decoder and encoder partners agree, both cosines > 0.7; PW-MCC: mean cosine")
    assert "; 95% intervals over" in caption
    assert "in exactly" not in caption  # of two SAEs that is `shared` again
    assert "in exactly 1 … 3 of 3 SAEs: " in three.caption()
    assert f"of latents that fire on the rows {three.shared_alive} are shared" in three.caption()
    loose = dataclasses.replace(two, settings={**two.settings, "strict": False, "threshold": 0.5})
    assert "both cosines >= 0.5;" in loose.caption()
    worst = max(each.gap for each in two.certificate.values())
    assert f"matching exact within {worst:.0e} in all" in caption


def test_pairs_that_began_alike_are_marked_and_not_counted(three):
    first, *rest = three.pairs
    some = dataclasses.replace(three, pairs=[dataclasses.replace(first, same_seed=True), *rest])
    assert (three.n_counted, some.n_counted) == (3, 2)
    assert some.table()[1][0] == "2 pairs"
    assert some.table()[2][0] == "relu-12 | relu-12 (2) *"
    assert some.caption().endswith("* began from the same random weights, no test of stability: not in the means")
    every = dataclasses.replace(three, pairs=[dataclasses.replace(each, same_seed=True) for each in three.pairs])
    assert every.n_counted == 3  # there are no others
    assert every.caption().endswith("no test of stability")
    assert "*" not in three.caption()


def test_it_round_trips_through_json(two, three, tmp_path):
    for result in (two, three):
        result.save(tmp_path / "comparison.json")
        again = Comparison.load(tmp_path / "comparison.json")
        assert again == result
        assert again.to_json() == result.to_json()


@pytest.mark.parametrize(
    "change",
    [
        lambda plain: plain["pairs"].pop(),
        lambda plain: plain["saes"].pop(),
        lambda plain: plain["in_exactly"].pop(),
        lambda plain: plain.update(saes=plain["saes"][:1], pairs=[], in_exactly=plain["in_exactly"][:1]),
    ],
)
def test_a_file_without_every_pair_is_refused(three, change):
    plain = three.to_json()
    change(plain)
    with pytest.raises(FormatError, match="must hold every pair of at least two SAEs"):
        Comparison.from_json(plain)


def test_parts_are_short_in_a_notebook(two):
    assert len(repr(two.pairs[0])) < 700
    assert "partner=" not in repr(two.pairs[0].decoder)
    assert "stability=" not in repr(two.saes[0])
    assert isinstance(two.pairs[0].shared, Measured)
    pandas = pytest.importorskip("pandas")
    frame = two.to_pandas()
    assert isinstance(frame, pandas.DataFrame)
    assert len(frame) == 1
    assert frame["shared"][0] == two.pairs[0].shared.value
