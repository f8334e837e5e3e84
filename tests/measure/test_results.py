"""Measured values and strict JSON of results."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from typing import Any, ClassVar

import pytest
from hypothesis import given
from hypothesis import strategies as st

from saekit.errors import FormatError
from saekit.files import dump_json
from saekit.measure.metrics import METRICS
from saekit.measure.results import Measured, Result, result_from_json, result_to_json


@dataclass(frozen=True)
class Part:
    name: str
    share: Measured
    sizes: list[int]


@dataclass(frozen=True)
class Sample:
    KIND: ClassVar[str] = "sample"
    SCHEMA: ClassVar[int] = 2
    parts: list[Part]
    settings: dict[str, Any]
    ratio: float = 0.0
    note: str | None = None
    metrics: dict[str, Measured] = field(default_factory=dict)


SAMPLE = Sample(
    [Part("a", Measured(0.3, 0.2, 0.4, "fraction"), [1, 2])],
    {"k": 3, "deep": {"list": [1.5, None]}},
    ratio=2.0,
    metrics={"fvu": Measured(math.nan, None, None, "fraction", "0 / 0")},
)


def test_result_round_trips_through_json_text():
    text = dump_json(result_to_json(SAMPLE))
    assert result_from_json(Sample, json.loads(text)) == SAMPLE


def test_measured_json_has_the_fixed_keys():
    assert Measured(0.5, 0.4, 0.6, "fraction").to_json() == {"value": 0.5, "low": 0.4, "high": 0.6, "unit": "fraction"}
    undefined = Measured(math.nan, None, None, "fraction", "one document").to_json()
    assert undefined == {"value": None, "low": None, "high": None, "unit": "fraction", "reason": "one document"}


def test_measured_prints_value_and_interval():
    measured = Measured(0.3118, 0.29, 0.3301, "fraction")
    assert str(measured) == "0.312 [0.29, 0.33]"
    assert str(Measured(0.4329, 0.4259, 0.4402)) == "0.433 [0.426, 0.440]"
    assert str(Measured(13.9645, 13.8690, 14.0645)) == "13.96 [13.87, 14.06]"
    assert str(Measured(1234.5, 1100.0, 1400.0)) == "1.23e+03 [1.1e+03, 1.4e+03]"
    assert str(Measured(0.0, 0.0, 0.0)) == "0 [0, 0]"
    assert f"{measured:.1%}" == "31.2% [29.0%, 33.0%]"
    assert repr(measured) == "<0.312 [0.29, 0.33] fraction>"
    assert str(Measured(0.5)) == "0.5"
    assert float(Measured(0.5)) == 0.5
    assert str(Measured(math.nan, reason="0 / 0")) == "undefined"


def test_measured_cannot_be_changed():
    with pytest.raises(AttributeError):
        Measured(0.5).value = 1.0  # type: ignore[misc]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda plain: plain.update(schema=3), "reads up to 2. Install the newer release"),
        (lambda plain: plain.update(schema="2"), "must be a whole number"),
        (lambda plain: plain.update(kind="other"), "`kind` must be 'sample'"),
        (lambda plain: plain.update(setings={}), "unknown key `setings` in `sample`. Did you mean `settings`"),
        (lambda plain: plain.pop("parts"), "must hold `parts`"),
        (lambda plain: plain.update(ratio="high"), "`sample.ratio` must be of type float"),
        (lambda plain: plain.update(note=3), "`sample.note` must be of type str"),
        (lambda plain: plain.update(metrics=[]), "`sample.metrics` must be a JSON object"),
        (lambda plain: plain.update(parts={}), "`sample.parts` must be a JSON list"),
        (lambda plain: plain.update(parts=[3]), r"`sample.parts\[0\]` must be a JSON object"),
        (lambda plain: plain["parts"][0].update(sizes=[True]), r"`sample.parts\[0\].sizes\[0\]` must be of type int"),
        (lambda plain: plain["parts"][0]["share"].pop("low"), "must hold `low`"),
        (lambda plain: plain["parts"][0]["share"].update(value="x"), "must be a number or null"),
        (lambda plain: plain["parts"][0].update(share=0.3), "must be an object with `value`"),
    ],
)
def test_anything_unknown_is_refused(change, message):
    plain = json.loads(dump_json(result_to_json(SAMPLE)))
    change(plain)
    with pytest.raises(FormatError, match=message):
        result_from_json(Sample, plain)


def test_not_an_object_is_refused():
    with pytest.raises(FormatError, match="must be a JSON object"):
        result_from_json(Sample, [1])


def test_every_metric_is_declared_in_full():
    for name, metric in METRICS.items():
        assert metric.name == name
        assert metric.formula
        assert metric.unit
        assert metric.since
        assert metric.better in ("lower", "higher", "neither")


# ---------------------------------------------------------------- the base class of results


@dataclass(frozen=True, repr=False)
class Counted(Result):
    KIND: ClassVar[str] = "counted"
    SCHEMA: ClassVar[int] = 3

    n: int
    share: Measured
    parts: list[Part] = field(default_factory=list)

    @classmethod
    def migrate(cls, plain: dict[str, Any]) -> dict[str, Any]:
        """Schema 1 called `n` `count`."""
        if plain.get("schema") == 1:
            plain = {("n" if key == "count" else key): value for key, value in plain.items()}
        return plain

    def check(self) -> None:
        if self.n < 0:
            raise FormatError("`counted.n` must not be negative.")

    def table(self) -> list[list[str]]:
        return [["n", "share"], [str(self.n), str(self.share)]]

    def caption(self) -> str:
        return f"{len(self.parts)} parts <here>"


def counted(n: int = 3, share: Measured | None = None, parts: list[Part] | None = None) -> Counted:
    return Counted("0.2", {"python": "3.11"}, {"seed": 0}, n, share or Measured(0.5, 0.4, 0.6, "fraction"), parts or [])


numbers = st.floats(allow_nan=True, allow_infinity=False, width=64)
texts = st.text(max_size=8)
values = st.builds(
    Measured, numbers, st.none() | st.floats(-9, 0), st.none() | st.floats(0, 9), texts, st.none() | texts
)
results = st.builds(
    Counted,
    texts,
    st.dictionaries(texts, texts, max_size=2),
    st.dictionaries(texts, st.none() | st.booleans() | st.integers() | texts | st.lists(st.integers()), max_size=3),
    st.integers(0, 2**60),
    values,
    st.lists(st.builds(Part, texts, values, st.lists(st.integers(), max_size=3)), max_size=3),
)


@given(result=results)
def test_any_result_reads_back_equal_to_what_was_written(result):
    plain = json.loads(dump_json(result.to_json()))
    assert (plain["kind"], plain["schema"]) == ("counted", 3)
    assert Counted.from_json(plain) == result


def test_a_result_survives_its_file(tmp_path):
    result = counted(parts=[Part("a", Measured(1.0), [1])])
    result.save(tmp_path / "deep" / "counted.json")
    assert Counted.load(tmp_path / "deep" / "counted.json") == result
    with pytest.raises(FileNotFoundError):
        Counted.load(tmp_path / "none.json")


def test_newer_schemas_other_kinds_and_contradictions_are_refused():
    plain = counted().to_json()
    with pytest.raises(FormatError, match=r"schema 4; this saekit reads up to 3\. Install the newer release"):
        Counted.from_json(plain | {"schema": 4})
    with pytest.raises(FormatError, match="`kind` must be 'counted'; it is 'sample'"):
        Counted.from_json(plain | {"kind": "sample"})
    with pytest.raises(FormatError, match="must not be negative"):
        Counted.from_json(plain | {"n": -1})
    with pytest.raises(FormatError, match="must be a JSON object"):
        Counted.from_json([plain])
    for schema in (0, True, "3", None):
        with pytest.raises(FormatError, match="must be a whole number from 1"):
            Counted.from_json(plain | {"schema": schema})


def test_older_schemas_are_migrated():
    plain = counted(7).to_json()
    plain["count"] = plain.pop("n")
    assert Counted.from_json(plain | {"schema": 1}).n == 7
    with pytest.raises(FormatError, match="unknown key `count`"):
        Counted.from_json(plain)


def test_pandas_shows_every_measured_quantity():
    pytest.importorskip("pandas")
    result = counted(parts=[Part("a", Measured(0.25, None, None, "ratio", "no interval: one"), [])])
    table = result.to_pandas()
    assert table.columns.tolist() == ["name", "value", "low", "high", "unit", "reason"]
    assert table.name.tolist() == ["share", "parts[0].share"]
    assert table.value.tolist() == [0.5, 0.25]
    assert table.low[0] == 0.4
    assert table.reason[1] == "no interval: one"


def test_text_and_html_show_the_table_and_the_caption():
    assert repr(counted()) == "n  share\n3  0.500 [0.40, 0.60]\n0 parts <here>"
    page = counted()._repr_html_()
    assert "<td>3</td>" in page
    assert "0 parts &lt;here&gt;" in page
