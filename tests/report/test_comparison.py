"""How comparisons and orphans are shown."""

from __future__ import annotations

import copy

from fixtures.results import NASTY, measured
from saekit import report
from saekit.report.comparison import across, without_lists
from saekit.report.page import RENDERERS


def test_comparisons_stand_beside_chance(comparison):
    page = report.render([comparison])
    assert "<script>alert" not in page
    table, proofs = RENDERERS["comparison"](comparison)[:2]
    names = [row[0].text for row in table.tables[0].rows]
    assert names == ["all pairs", "a | b *", f"a | {NASTY}", f"b | {NASTY}", "↳ random"]
    assert table.tables[0].muted == {4}
    assert [cell.text for cell in table.tables[0].rows[1]][1:] == [
        "0.500", "0.750", "0.312", "0.312", "0.438", "–", "0.688", "0.812",
    ]  # fmt: skip
    assert [cell.text for cell in proofs.tables[0].rows[0]][1:] == ["0.625", "0.625000001", "1.0e-09"]
    assert len(table.figures) == 4
    assert "partners differ" in table.figures[1].svg
    two = copy.deepcopy(comparison) | {"saes": comparison["saes"][:2], "nulls": {}, "mean_cosine_null": None}
    assert len(RENDERERS["comparison"](two)[0].figures) == 2


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
    main, section = RENDERERS["comparison"](many)[:2]
    assert main.tables[0].rows[0][0].text == "pairs without a star"
    assert main.tables[0].rows[0][6].text == "0.625"
    assert section.title == "What 3 SAEs have in common"
    fitted, concepts = section.tables
    assert [[cell.text for cell in row] for row in fitted.rows] == [
        ["with offset", "0.590", "0.920", "0.270", "0.001", "0.002"],
        ["without", "0.725", "0.350", "0", "0.0135", "0.02"],
    ]
    assert "speak for neither" in fitted.caption  # too few SAEs to decide, whatever the file says
    assert [cell.text for cell in concepts.rows[0]] == ["concepts", "5", "3", "1,234", "0.75", "2"]
    assert "number of SAEs" in section.figures[0].svg
    assert "What 3 SAEs have in common" in report.render([many])
    bare = RENDERERS["comparison"](many | {"law": None, "groups": None})[1]
    assert (bare.tables, len(bare.figures)) == ([], 1)


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
    figures = RENDERERS["comparison"](with_rows)[0].figures
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
    assert without_lists(comparison) is comparison
    assert without_lists(large)["pairs"][0]["decoder"]["mean_cosine"] == large["pairs"][0]["decoder"]["mean_cosine"]


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
    assert "7 latents that none of the other SAEs has, compared with 11" in page
    tables = RENDERERS["orphans"](result)[0].tables
    assert [cell.text for cell in tables[0].rows[0]] == ["loss", "0.250", "0.250", "0.250", "0.001", "0.250", "–"]
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
