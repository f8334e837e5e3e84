"""Charts: text stays text, many points become an image."""

from __future__ import annotations

import re

from fixtures.results import measured
from saekit.report import charts


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


def test_files_of_charts_have_plain_names(tmp_path):
    chart = charts.intervals([("a", measured(0.5), False)], x="x")
    written = charts.write_charts({"a/b c": (chart, "")}, tmp_path, "transfer")
    assert [path.name for path in written] == ["transfer-a-b-c.svg", "transfer-a-b-c.png"]
