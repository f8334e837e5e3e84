"""The page: offline, safe, with the numbers of the JSON and nothing else."""

from __future__ import annotations

import copy
import json
import re
from html.parser import HTMLParser

import pytest

from saekit import report
from saekit.errors import ConfigError, DataError, FormatError
from saekit.report import charts, sections
from saekit.report.comparison import across, lighter
from saekit.report.parts import facts, measured_cell
from saekit.report.results_folder import training_log

NASTY = "</script><script>alert(1)</script> $x$ & <b>\u202e"


def measured(value, low=None, high=None, unit="fraction", reason=None):
    plain = {"value": value, "low": low, "high": high, "unit": unit}
    return plain | ({"reason": reason} if reason else {})


def entry(name: str, shift: float) -> dict:
    metrics = {
        "fvu": measured(0.25 + shift, 0.24 + shift, 0.26 + shift),
        "l0": measured(16.0, 15.5, 16.5, "latents per row"),
        "dead_fraction": measured(0.125, None, None, reason=f"one group {NASTY}"),
        "cosine": measured(0.875 + shift, 0.8, 0.9, "cosine"),
        "ce_sae": measured(3.25 + shift, 3.0, 3.5, "nats per token"),
        "kl": measured(None, None, None, "nats per token", "no tokens"),
    }
    control = {
        "metrics": {"fvu": measured(0.75 + shift, 0.7, 0.8)},
        "differences": {"fvu": measured(-0.5, -0.55, -0.45)},
        "about": {"seed": 0},
    }
    return {
        "name": name,
        "sae": {"n_latents": 1024, "rule": {"name": "topk", "k": 16}, "provenance": {"note": NASTY}},
        "on_training_rows": False,
        "metrics": metrics,
        "density": {"log10_edges": [-3.0, -2.0, -1.0, 0.0], "counts": [5, 7, 11], "dead": 1, "n_rows": 12345},
        "controls": {"untrained": control, "pca": copy.deepcopy(control)},
    }


@pytest.fixture
def evaluation() -> dict:
    entries = [entry("topk-1024-k16-seed0", 0.0), entry(NASTY, 0.03125)]
    return {
        "kind": "evaluation",
        "schema": 1,
        "metrics": entries[0]["metrics"],
        "saekit": "0.1.0",
        "versions": {"torch": "2.13.0"},
        "settings": {"seed": 0, "intervals": {"level": 0.95, "by": "document"}},
        "rows": {"model": "builtin", "hook": "layers.2"},
        "n_rows": 12345,
        "language_model": {"model": "builtin", "n_tokens": 1000},
        "entries": entries,
    }


@pytest.fixture
def training() -> dict:
    learners = {
        "topk-0": {"rows": [100, 200], "fvu": [0.5, 0.25], "l0": [16.0, 16.0], "dead_fraction": [0.0, 0.125]},
        "relu-0": {"rows": [100, 200], "fvu": [0.75, None], "l0": [90.0, 32.0], "dead_fraction": [0.0, 0.0]},
    }
    return {
        "kind": "training",
        "schema": 1,
        "run": {"batch_rows": 4096, "configs": [{"arch": "topk"}]},
        "learners": learners,
    }


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
            assert (attributes.get(name) or "#").startswith("#"), (tag, attributes)
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
    assert scripts == [{"type": "application/json", "id": "results"}]
    assert not [tag for tag, _ in page.elements if tag == "b"]


def test_the_embedded_json_is_the_results(evaluation, training):
    page = Page(report.render([evaluation, training]))
    assert json.loads("".join(page.scripts)) == [evaluation, training]


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


def test_controls_and_intervals_are_shown(evaluation):
    text = report.render([evaluation])
    assert text.count("↳ untrained") == 2
    assert text.count("↳ pca") == 2
    assert "0.24 – 0.26" in text
    assert 'class="control"' in text


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


def test_charts_follow_the_colours_of_the_page(evaluation):
    svg = sections.evaluation(evaluation)[0].figures[0].svg
    assert "currentColor" in svg
    assert "#123456" not in svg
    assert "<?xml" not in svg
    assert "metadata" not in svg


def test_a_dollar_sign_in_a_name_is_shown_as_it_is():
    svg = charts.lines({"a $b$": ([1, 2], [1, 2]), "_c": ([1, 2], [2, 1])}, x="x", y="y")
    assert "a $b$" in svg
    assert ">c<" in svg


@pytest.fixture
def comparison() -> dict:
    side = {
        "partner": [1, 0, -1],
        "cosine": [0.875, -0.25, None],
        "mean_cosine": measured(0.3125, 0.3, 0.325, "cosine"),
        "max_cosine": measured(0.4375, 0.4, 0.5, "cosine"),
        "pw_mcc": measured(0.5, 0.4, 0.6, "cosine"),
        "certificate": {"objective": 0.625, "dual": 0.625000001, "gap": 1e-9},
    }
    encoder = {**side, "partner": [1, 2, -1]}
    shared = {"shared": measured(0.5, 0.25, 0.75), "equal": measured(0.75, 0.5, 1.0), "aligned": measured(0.5)}
    on_rows = {"correlation": measured(0.6875), "n_pairs": 2, "cka": measured(0.8125), "rsa": measured(0.9375)}
    pairs = [("a", "b"), ("a", NASTY), ("b", NASTY)]
    null = {"made": "at random", "shared": measured(0.0), "equal": measured(0.125), "mean_cosine": measured(0.0625),
            "max_cosine": measured(0.09375)}  # fmt: skip
    return {
        "kind": "comparison", "schema": 1, "saekit": "0.1.0", "versions": {"torch": "2.13.0"},
        "settings": {"threshold": 0.7, "strict": True, "intervals": {"level": 0.95, "over": "latents"}},
        "rows": None, "n_rows": 0,
        "shared": measured(0.5), "equal": measured(0.75), "mean_cosine": measured(0.3125),
        "mean_cosine_encoder": measured(0.3125), "max_cosine": measured(0.4375),
        "mean_cosine_null": measured(0.0625),
        "in_exactly": [measured(0.25, 0.2, 0.3), measured(0.25), measured(0.5)],
        "saes": [
            {"name": name, "sae": {"n_latents": 3}, "found_in": [], "stability": []} for name in ("a", "b", NASTY)
        ],
        "pairs": [
            {"first": one, "second": two, "same_seed": two == "b", **shared, "decoder": side, "encoder": encoder,
             "on_rows": on_rows if one == "a" else None}
            for one, two in pairs
        ],
        "nulls": {"random": null},
    }  # fmt: skip


def test_comparisons_stand_beside_chance(comparison):
    page = report.render([comparison])
    assert "<script>alert" not in page
    table, proofs = sections.RENDERERS["comparison"](comparison)[:2]
    names = [row[0].text for row in table.tables[0].rows]
    assert names == ["all pairs", "a | b *", f"a | {NASTY}", f"b | {NASTY}", "↳ random"]
    assert table.tables[0].muted == {4}
    assert [cell.text for cell in table.tables[0].rows[1]][1:] == [
        "0.5", "0.75", "0.312", "0.312", "0.438", "–", "0.688", "0.812",
    ]  # fmt: skip
    assert [cell.text for cell in proofs.tables[0].rows[0]][1:] == ["0.625", "0.625000001", "1.0e-09"]
    assert len(table.figures) == 4
    assert "partners differ" in table.figures[1].svg
    two = copy.deepcopy(comparison) | {"saes": comparison["saes"][:2], "nulls": {}, "mean_cosine_null": None}
    assert len(sections.RENDERERS["comparison"](two)[0].figures) == 2


def test_what_many_saes_have_in_common(comparison):
    law = {
        "amplitude": measured(0.59, 0.5, 0.7, ""), "exponent": measured(0.92, 0.8, 1.0, ""),
        "offset": measured(0.27, 0.2, 0.3, ""), "plain_amplitude": measured(0.725, 0.7, 0.8, ""),
        "plain_exponent": measured(0.35, 0.3, 0.4, ""), "error": 0.001, "plain_error": 0.0135, "aic_difference": None,
        "held_out": 0.002, "plain_held_out": 0.02, "verdict": "offset",
    }  # fmt: skip
    groups = {"of": [], "size": [], "consistency": [], "count": [5, 3, 1234], "mean_consistency": 0.75, "contested": 2}
    many = comparison | {
        "schema": 3, "only_in_one": [measured(0.6, 0.5, 0.7), measured(0.4)], "law": law, "groups": groups,
        "shared_alive": measured(0.625, 0.5, 0.75),
    }  # fmt: skip
    main, section = sections.RENDERERS["comparison"](many)[:2]
    assert main.tables[0].rows[0][0].text == "pairs without a star"
    assert main.tables[0].rows[0][6].text == "0.625"
    assert section.title == "What 3 SAEs have in common"
    fitted, concepts = section.tables
    assert [[cell.text for cell in row] for row in fitted.rows] == [
        ["with offset", "0.59", "0.92", "0.27", "0.001", "0.002"],
        ["without", "0.725", "0.35", "0", "0.0135", "0.02"],
    ]
    assert "speak for an offset" in fitted.caption
    assert [cell.text for cell in concepts.rows[0]] == ["concepts", "5", "3", "1,234", "0.75", "2"]
    assert "number of SAEs" in section.figures[0].svg
    assert "What 3 SAEs have in common" in report.render([many])
    bare = sections.RENDERERS["comparison"](many | {"law": None, "groups": None})[1]
    assert (bare.tables, len(bare.figures)) == ([], 1)


def test_logarithmic_axes_have_plain_numbers():
    points = {"a": ([0.001, 0.1], [0.5, 0.9])}
    for svg in (
        charts.cloud(points, x="x", y="y", log_x=True).svg(),
        charts.lines({"a": ([1, 2], [0.02, 0.9])}, x="x", y="y", log_y=True),
    ):
        assert "mathdefault" not in svg
        assert re.search(">0\\.0?[1-9]<", svg)


def test_overlap_by_width_where_comparisons_differ_in_it(comparison):
    def of(width: int, k: int) -> dict:
        sae = {"n_latents": width, "provenance": {"config": {"arch": "topk", "k": k}, "hook": NASTY}}
        return comparison | {"saes": [each | {"sae": sae} for each in comparison["saes"]]}

    assert across([comparison, comparison]) == []
    [section] = across([of(64, 4), of(128, 4), of(256, 8)])
    assert [figure.caption.split(",")[0] for figure in section.figures] == ["Shared latents by latents"]
    page = report.render([of(64, 4), of(128, 4)])
    assert "How overlap changes" in page
    assert "<script>alert" not in page


def test_alignment_against_frequency_and_clouds_of_very_many(comparison):
    each = {
        "found_in": [3, 1, 2],
        "alignment": [0.9, 0.2, None],
        "frequency": [0.5, 0.0, 0.1],
        "stability": [1, 0, 0.5],
    }
    with_rows = comparison | {"saes": [one | each for one in comparison["saes"]]}
    figures = sections.RENDERERS["comparison"](with_rows)[0].figures
    assert len(figures) == 5
    assert "in all SAEs" in figures[4].svg
    many = 10_000
    wide = {"found_in": [3] * many, "alignment": [0.5] * many, "frequency": [0.1] * many, "stability": [1.0] * many}
    side = {"partner": list(range(many)), "cosine": [0.5 + place / (2 * many) for place in range(many)]}
    large = comparison | {
        "saes": [one | wide for one in comparison["saes"]],
        "pairs": [
            pair | {"decoder": pair["decoder"] | side, "encoder": pair["encoder"] | side}
            for pair in comparison["pairs"]
        ],
    }
    page = report.render([large])
    assert len(page) < 1_000_000
    assert '"left_out":10000' in page
    assert lighter(comparison) is comparison
    assert lighter(large)["pairs"][0]["decoder"]["mean_cosine"] == large["pairs"][0]["decoder"]["mean_cosine"]


def test_orphans_are_shown(tmp_path):
    numbers = {name: measured(0.25, 0.2, 0.3) for name in ("orphans", "shared", "auc", "auc_matched")}
    result = {
        "kind": "orphans", "n_orphans": [3, 4], "n_shared": [5, 6], "settings": {"threshold": 0.7},
        "properties": [{"name": "loss", "meaning": NASTY, "p": 0.001, "p_matched": None, **numbers}],
        "silenced": [{"latents": "all orphans", "n_latents": 3.5, "fvu": measured(0.1), "ce": None}],
        "spans": [{"rank": 4, "orphans": measured(0.6), "shared": measured(0.7), "null": measured(0.1), "rows": None}],
    }  # fmt: skip
    page = report.render([result])
    assert "<script>alert" not in page
    assert "7 latents that none of the other SAEs has, beside 11" in page
    tables = sections.RENDERERS["orphans"](result)[0].tables
    assert [cell.text for cell in tables[0].rows[0]] == ["loss", "0.25", "0.25", "0.25", "0.001", "0.25", "–"]
    assert [cell.text for cell in tables[2].rows[0]] == ["4", "0.6", "0.7", "0.1", "–"]


def test_charts_as_files(comparison, tmp_path):
    written = report.write_figures(comparison, tmp_path)
    assert [path.name for path in written][:2] == ["comparison-cosines.svg", "comparison-cosines.png"]
    before = [path.read_bytes() for path in written]
    report.write_figures(comparison, tmp_path)
    assert [path.read_bytes() for path in written] == before
    assert before[0].startswith(b"<svg")
    assert b'xmlns="http://www.w3.org/2000/svg"' in before[0]
    assert before[1].startswith(b"\x89PNG")


def test_many_points_become_an_image():
    values = [i / 3000 for i in range(3000)]
    svg = charts.scatter({"a": (values, values)}, x="x", y="y", at=0.7).svg()
    assert "data:image/png" in svg
    assert len(svg) < 200_000


def test_without_a_language_model_or_controls(evaluation):
    evaluation["language_model"] = None
    for each in evaluation["entries"]:
        each["controls"] = {}
        each["metrics"].pop("ce_sae")
    assert "CE with SAE" not in report.render([evaluation])


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


def test_a_number_that_is_not_measured():
    with pytest.raises(DataError, match=r"`metrics.fvu` must be a measured quantity"):
        measured_cell(0.5, where="metrics.fvu")


def test_nested_settings_get_dotted_names():
    assert [row[0].text for row in facts({"a": {"b": {"c": 1}}, "d": None}).rows] == ["a.b.c", "d"]


# ------------------------------------------------------------------ folders


def test_collect_finds_results_and_logs(tmp_path, evaluation):
    (tmp_path / "evaluation.json").write_text(json.dumps(evaluation))
    (tmp_path / "other.json").write_text("[1]")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "run.json").write_text('{"batch_rows": 8}')
    (tmp_path / "run" / "log.jsonl").write_text(LOG)
    found = report.collect(tmp_path)
    assert [each["kind"] for each in found] == ["evaluation", "training"]
    assert found[1]["run"] == {"batch_rows": 8}
    assert found[1]["learners"]["topk-8-k2-seed0"]["fvu"] == [0.5, 0.25]
    report.write(found, tmp_path)


LOG = "".join(
    json.dumps(
        {"step": s, "rows": 8 * s, "learners": {"topk-8-k2-seed0": {"fvu": 1 / 2**s, "l0": 2.0, "dead_fraction": 0.0}}}
    )
    + "\n"
    for s in (1, 2)
)


def test_a_cut_off_last_line_is_left_out(tmp_path):
    path = tmp_path / "log.jsonl"
    path.write_text(LOG + '{"step": 3, "ro')
    assert training_log(path)["learners"]["topk-8-k2-seed0"]["rows"] == [8, 16]
    path.write_text("{oops\n" + LOG)
    with pytest.raises(FormatError, match="line 1 must be a JSON object"):
        training_log(path)


def test_folders_without_results(tmp_path):
    with pytest.raises(ConfigError, match="is not a folder"):
        report.collect(tmp_path / "nowhere")
    with pytest.raises(ConfigError, match="must hold results"):
        report.collect(tmp_path)
