"""The page: offline, safe, with the numbers of the JSON and nothing else."""

from __future__ import annotations

import copy
import json
import re
from html.parser import HTMLParser

import pytest

from fixtures.results import NASTY, measured
from saekit import report
from saekit.errors import DataError


class Page(HTMLParser):
    """What a browser would see: elements, attributes, the embedded JSON, numbers by row."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict]] = []
        self.values: list[float] = []
        self.scripts: list[str] = []
        self._inside: str | None = None
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        self._inside = tag
        if "data-value" in dict(attrs):
            self.values.append(float(dict(attrs)["data-value"]))

    def handle_data(self, data):
        if self._inside == "script":
            self.scripts.append(data)

    def handle_endtag(self, tag):
        self._inside = None


def test_the_page_needs_nothing_from_outside(evaluation, training):
    text = report.render([evaluation, training])
    page = Page(text)
    for tag, attributes in page.elements:
        assert tag not in ("link", "iframe", "img", "object", "embed", "base"), tag
        for name in ("src", "href", "xlink:href", "action"):
            assert (attributes.get(name) or "#").startswith(("#", "data:")), (tag, attributes)
    styles = " ".join(re.findall(r"url\(([^)]*)\)", text))
    assert all(target.startswith("#") for target in styles.split())
    assert "@import" not in text
    outside = set(re.findall(r"https?://[^\s\"'<>]*", text)) - {
        "http://www.w3.org/2000/svg",
        "http://www.w3.org/1999/xlink",
    }
    assert not outside
    assert "default-src 'none'" in text


def test_no_text_becomes_markup(evaluation, training):
    page = Page(report.render([evaluation, training], title=NASTY))
    scripts = [attributes for tag, attributes in page.elements if tag == "script"]
    assert scripts == [{"type": "application/json", "id": "results"}, {}]
    assert not [tag for tag, _ in page.elements if tag == "b"]


def test_the_embedded_json_is_the_results(evaluation, training):
    page = Page(report.render([evaluation, training]))
    assert json.loads(page.scripts[0]) == [evaluation, training]


def numbers(value):
    if isinstance(value, dict):
        return {n for item in value.values() for n in numbers(item)}
    if isinstance(value, list):
        return {n for item in value for n in numbers(item)}
    return {float(value)} if isinstance(value, int | float) and not isinstance(value, bool) else set()


def test_every_number_on_the_page_is_in_the_json(evaluation, training):
    page = Page(report.render([evaluation, training]))
    sums = {float(sum(each["density"]["counts"])) for each in evaluation["entries"]}
    assert set(page.values) <= numbers(evaluation) | numbers(training) | sums
    shown = {m["value"] for e in evaluation["entries"] for m in e["metrics"].values() if m["value"] is not None}
    assert shown <= set(page.values)


def test_same_results_same_bytes(evaluation, training, tmp_path):
    first = report.write([evaluation, training], tmp_path / "a").read_bytes()
    second = report.write([copy.deepcopy(evaluation), training], tmp_path / "b").read_bytes()
    assert first == second
    assert len(first) < 1_000_000  # bytes


def test_ids_are_unique(evaluation, training):
    ids = [
        attributes["id"] for _, attributes in Page(report.render([evaluation, training])).elements if "id" in attributes
    ]
    assert len(ids) == len(set(ids))


def test_objects_with_to_json(evaluation):
    class Result:
        def to_json(self):
            return evaluation

    assert report.render([Result()]) == report.render([evaluation])


def test_no_result():
    with pytest.raises(DataError, match="needs at least one result"):
        report.render([])


def test_unknown_kind():
    with pytest.raises(DataError, match=r"of the kinds .*`evaluation`.*; got 'tea'"):
        report.render([{"kind": "tea"}])


def test_prose_has_code_and_intervals_in_words_and_no_markup_of_others(evaluation):
    evaluation["warnings"] = [
        {"code": "x", "message": f"`a<b` rose by [-0.511, -0.381] {NASTY}; a ` alone; -0.017 [-0.1, +0.2]"}
    ]
    text = report.render([evaluation])
    assert "rose by [−0.511 to −0.381]" in text
    assert "a ` alone; −0.017 [−0.1 to +0.2]" in text
    evaluation["warnings"][0]["message"] = "see `a<b` and `c`"
    assert "see <code>a&lt;b</code> and <code>c</code>" in report.render([evaluation])
    assert not [tag for tag, _ in Page(text).elements if tag == "b"]


def test_parts_come_in_the_order_of_the_questions(evaluation, training, comparison):
    page = Page(report.render([training, comparison, evaluation]))
    ids = [attributes["id"] for tag, attributes in page.elements if tag == "section" and "id" in attributes]
    assert [each for each in ids if not each.startswith("s")] == [
        "answers", "faithful", "real", "training", "provenance", "glossary",
    ]  # fmt: skip


def without_values(plain):
    """The same result, of which no number is defined."""
    if isinstance(plain, dict) and {"value", "low", "high"} <= plain.keys():
        return {**plain, "value": None, "low": None, "high": None}
    if isinstance(plain, dict):
        return {key: without_values(each) for key, each in plain.items()}
    return [without_values(each) for each in plain] if isinstance(plain, list) else plain


def test_numbers_that_are_not_defined_are_shown_as_such(evaluation, comparison):
    for result in (
        evaluation,
        comparison,
        {**comparison, "in_exactly": [measured(0.5)] * 3, "saes": comparison["saes"] * 2},
    ):
        text = report.render([without_values(result)]).split('<script type="application/json"')[0]
        assert not re.search(r">\s*(nan|None|inf)\s*<", text)


def test_a_column_in_which_nobody_has_a_value_is_left_out(evaluation):
    for each in evaluation["entries"]:
        each["metrics"]["cosine"] = measured(None)
        for control in each["controls"].values():
            control["metrics"].pop("cosine", None)
    heads = re.findall(r'<th scope="col"[^>]*>([^<]*)', report.render([evaluation]))
    assert "FVU" in heads
    assert "cosine" not in heads
