"""Charts: text stays text, many points become counts, what is constant is a sentence."""

from __future__ import annotations

import json
import re
from html import unescape
from xml.etree import ElementTree

import pytest

from fixtures.results import measured
from saekit.report import charts
from saekit.report.parts import Figure
from saekit.terminal import is_plain


def test_a_dollar_sign_in_a_name_is_shown_as_it_is():
    svg = charts.lines({"a $b$": ([1, 2], [1, 2]), "_c": ([1, 2], [2, 1])}, x="x", y="y").svg()
    assert "a $b$" in svg
    assert ">_c<" in svg


def test_logarithmic_axes_have_plain_numbers():
    points = {"a": ([0.001, 0.1], [0.5, 0.9])}
    for svg in (
        charts.scatter(points, x="x", y="y", log_x=True).svg(),
        charts.lines({"a": ([1, 2], [0.02, 0.9])}, x="x", y="y", log_y=True).svg(),
    ):
        assert "mathdefault" not in svg
        assert re.search(">0\\.0?[1-9]<", svg)


def test_many_points_become_counts_per_cell():
    values = [i / 30_000 for i in range(30_000)]
    chart = charts.scatter({"a": (values, values)}, x="x", y="y", threshold=0.7)
    assert len(chart.svg()) < 20_000
    assert sum(row[-1] for row in chart.rows) == 30_000
    assert len(chart.hover) == len(chart.rows) < 100
    assert charts.scatter({"a": ([0.5] * 3000, [0.5] * 3000)}, x="x", y="y", log_x=True).rows[0][-1] == 3000


def test_a_constant_is_a_sentence_and_nothing_is_no_chart():
    same = {"a": ([1, 2, 3], [16.0, 16.0, 16.0]), "b": ([1, 2], [16.0, None])}
    assert Figure(charts.lines(same, x="rows", y="latents per row"), "").sentence == "latents per row is 16 throughout."
    assert not Figure(charts.lines({"a": ([1, 2], [16.0, 16.5])}, x="rows", y="y"), "").sentence
    assert charts.lines({"a": ([1, 2], [None, None])}, x="x", y="y").is_empty
    assert charts.donut([("a", 0.0)], centre="").is_empty
    assert charts.intervals([("a", measured(None), False)], x="x").is_empty
    assert Figure(charts.intervals([("a", measured(0.5), False)], x="AUC"), "").sentence == "AUC is 0.5 throughout."


def test_every_chart_tells_its_numbers_and_gives_its_data():
    value = measured(0.3118, 0.29, 0.3301)
    figure = Figure(charts.curves({"=a": [(2, value), (4, measured(0.5))]}, x="size", y="shared"), "")
    told = [text.splitlines() for _, _, text in figure.chart.hover]
    assert told == [["=a", "size: 2", "shared: 0.312 (0.29 to 0.33)"], ["=a", "size: 4", "shared: 0.5"]]
    assert figure.csv().splitlines() == ["series,size,shared,low,high", "'=a,2,0.3118,0.29,0.3301", "'=a,4,0.5,,"]
    assert json.loads(figure.json())[1] == {"series": "=a", "size": 4, "shared": 0.5, "low": None, "high": None}
    told = re.search('data-hover="([^"]*)"', figure.svg)[1]
    assert [text for _, _, text in json.loads(unescape(told))] == [text for _, _, text in figure.chart.hover]
    long = charts.lines({"": (range(5000), [n / 7 for n in range(5000)])}, x="x", y="y")
    assert len(long.hover) <= 240
    assert long.hover[-1][0] == 4999


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
    assert [text in svg for text in (">(0.50)<", ">0.91<", ">0.12<", ">_b<")] == [True] * 4
    assert ">0.910<" in charts.heat_map(numbers, ["a", "b"], ["c", "d"], x="x", y="y").svg()


DRAWN = {"svg", "style", "g", "path", "rect", "text"}


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
        for svg in (chart.svg(), chart.svg(340), Figure(chart, "").svg):
            assert all(is_plain(sign) or sign == "\n" for sign in svg)
            root = ElementTree.fromstring(svg)
            assert {element.tag.rpartition("}")[2] for element in root.iter()} <= DRAWN
            assert not [element for element in root.iter() if "id" in element.attrib]
        assert chart.png()


def test_files_of_charts_have_plain_names(tmp_path):
    chart = charts.intervals([("a", measured(0.5), False)], x="x")
    written = charts.write_charts({"a/b c": (chart, "")}, tmp_path, "transfer")
    assert [path.name for path in written] == ["transfer-a-b-c.svg", "transfer-a-b-c.png"]


def test_names_too_long_for_the_side_stand_over_their_marks():
    names = ["topk-256-k16-seed0: untrained", "topk-256-k16-seed0: pca"]
    chart = charts.intervals([(name, measured(0.5, 0.4, 0.6), False) for name in names], x="FVU")
    narrow, wide = (Figure(chart, "").drawn(width) for width in (340, 540))
    assert all(f">{name}<" in each for name in names for each in (narrow, wide))
    assert 'text-anchor="start"' in narrow
    assert 'text-anchor="start"' not in wide
    short = Figure(charts.intervals([("SAE", measured(0.5, 0.4, 0.6), False)], x="FVU"), "").drawn(340)
    assert 'text-anchor="start"' not in short
