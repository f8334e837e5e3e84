"""Charts: text stays text, many points become an image."""

from __future__ import annotations

import re

import pytest

from fixtures.results import measured
from saekit.report import charts
from saekit.terminal import is_plain


def test_a_dollar_sign_in_a_name_is_shown_as_it_is():
    svg = charts.lines({"a $b$": ([1, 2], [1, 2]), "_c": ([1, 2], [2, 1])}, x="x", y="y").svg()
    assert "a $b$" in svg
    assert ">c<" in svg


def test_logarithmic_axes_have_plain_numbers():
    points = {"a": ([0.001, 0.1], [0.5, 0.9])}
    for svg in (
        charts.scatter(points, x="x", y="y", log_x=True).svg(),
        charts.lines({"a": ([1, 2], [0.02, 0.9])}, x="x", y="y", log_y=True).svg(),
    ):
        assert "mathdefault" not in svg
        assert re.search(">0\\.0?[1-9]<", svg)


def test_many_points_become_an_image():
    values = [i / 3000 for i in range(3000)]
    svg = charts.scatter({"a": (values, values)}, x="x", y="y", threshold=0.7).svg()
    assert "data:image/png" in svg
    assert len(svg) < 200_000


def test_bars_side_by_side():
    groups = {"sum": {"sae": measured(0.5, 0.4, 0.6), "dense": measured(0.75)}, "mean": {"dense": measured(None)}}
    svg = charts.bars(groups, y="macro-F1").svg()
    assert [svg.count(f">{name}<") for name in ("sum", "mean", "sae", "dense")] == [1, 1, 1, 1]
    assert ">sae<" not in charts.bars({"1": {"sae": measured(0.5)}}, y="y").svg()


def test_numbers_stand_in_the_cells_of_a_heat_map():
    numbers = [[0.5, None], [0.91, 0.125]]
    svg = charts.heat_map(
        numbers, ["a", "_b"], ["c", "d"], x="x", y="y", centred=True, bracketed=[[1, 0], [0, 0]]
    ).svg()
    assert [text in svg for text in (">(0.50)<", ">0.91<", ">0.12<", ">b<")] == [True] * 4
    assert ">0.910<" in charts.heat_map(numbers, ["a", "b"], ["c", "d"], x="x", y="y").svg()


@pytest.mark.parametrize(
    "name", ["日本語のラベル", "🧪" * 9, "a" * 300, "\x1b[31m\u202e" * 30, ' id="x" url(#x) ', "_" * 9, ""]
)
def test_any_name_leaves_room_and_stays_text(name):
    """Nothing is warned about, and nothing but the name's own signs is drawn."""
    value = measured(0.5)
    drawn = (
        charts.heat_map([[0.5, 0.6]], [name], [name, "b"], x=name, y=name),
        charts.bars({name: {name: value}}, x=name, y=name),
        charts.intervals([(name, value, False)], x=name),
        charts.donut([(name, 1.0), ("b", 2.0)], centre=name),
        charts.lines({name: ([1, 2], [1, 2]), "b": ([1], [1])}, x=name, y=name),
        charts.curves({name: [(1, value)]}, x=name, y=name),
        charts.histogram({name: [1.0]}, [0, 1, 2], x=name, y=name, marks={name: 1.0}),
        charts.scatter({name: ([1.0], [2.0])}, x=name, y=name, threshold=0.5),
    )
    for chart in drawn:
        svg = charts.with_own_ids(chart.svg(), "p-")
        assert all(is_plain(sign) or sign == "\n" for sign in svg)
        assert 'p-x"' not in svg
        assert "p-x)" not in svg
        assert chart.png()


def test_files_of_charts_have_plain_names(tmp_path):
    chart = charts.intervals([("a", measured(0.5), False)], x="x")
    written = charts.write_charts({"a/b c": (chart, "")}, tmp_path, "transfer")
    assert [path.name for path in written] == ["transfer-a-b-c.svg", "transfer-a-b-c.png"]
