"""Crosscoders measured source by source: each as if its columns were all of the row."""

from __future__ import annotations

import pytest
import torch

from fixtures.known_saes import random_sae
from fixtures.row_checks import whole
from saekit import ArrayRows, evaluate
from saekit.errors import ConfigError
from saekit.evaluation.result import Evaluation
from saekit.evaluation.settings import EvaluationSettings
from saekit.measure.accumulators import Reconstruction
from saekit.measure.intervals import N_GROUPS, document_sample, row_groups
from saekit.measure.reconstruction import as_metrics
from saekit.report.page import sections_of
from saekit.rows.joined import JoinedRows, join_rows
from saekit.sae.model import SAE

WIDTHS = {"quiet": 4, "loud": 6}
PARTS = [{"name": name, "width": width} for name, width in WIDTHS.items()]
SETTINGS = EvaluationSettings(batch_rows=77)


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def crosscoder(parts: object = PARTS, seed: int = 0) -> SAE:
    return random_sae(d=10, seed=seed).replace(provenance={"parts": parts})


def joined() -> JoinedRows:
    document = torch.arange(600) // 5
    quiet, loud = randn(600, 4, seed=1) + 1, 100 * randn(600, 6, seed=2)
    return join_rows({"quiet": ArrayRows(quiet, document=document), "loud": ArrayRows(loud, document=document)})


def test_what_is_measured_of_a_source_is_that_of_its_columns_evaluated_by_hand():
    rows, sae = joined(), crosscoder()
    [entry] = evaluate(sae, rows, settings=SETTINGS).entries
    assert list(entry.sources) == ["quiet", "loud"]
    group, _ = row_groups(whole(rows).document, 0, len(whole(rows).x))
    sample = document_sample(torch.bincount(group, minlength=N_GROUPS).numpy())
    at = 0
    for name, width in WIDTHS.items():
        own = slice(at, at + width)
        at += width
        by_hand = Reconstruction(width, centre=whole(rows).x[:, own].mean(0))
        by_hand.update(whole(rows).x[:, own], sae.reconstruct(whole(rows).x)[:, own], group)
        expected = as_metrics(by_hand.compute(sample))
        assert set(entry.sources[name]) == set(expected) >= {"fvu", "cosine", "mse"}
        for metric, wanted in expected.items():
            found = entry.sources[name][metric]
            for end in ("value", "low", "high"):
                assert getattr(found, end) == pytest.approx(getattr(wanted, end), rel=1e-6), (name, metric, end)
    # errors and variances add up to those of the whole row, to whose variance the quiet source adds nearly nothing
    errors, fvus = ([each[metric].value for each in entry.sources.values()] for metric in ("mse", "fvu"))
    variances = [error / fvu for error, fvu in zip(errors, fvus, strict=True)]
    assert sum(errors) == pytest.approx(entry.metrics.mse.value)
    assert sum(errors) / sum(variances) == pytest.approx(entry.metrics.fvu.value)
    assert variances[0] < 1e-3 * variances[1]


def test_baselines_are_measured_source_by_source_too():
    [entry] = evaluate(crosscoder(), joined(), settings=SETTINGS).entries
    for control in entry.controls.values():
        parts = [control.sources[name]["mse"].value for name in WIDTHS]
        assert sum(parts) == pytest.approx(control.metrics.mse.value)


def test_other_saes_are_measured_as_ever_and_next_to_a_crosscoder_source_by_source():
    rows, plain = joined(), crosscoder().replace(provenance={})
    alone, own = (evaluate(each, rows, settings=SETTINGS) for each in (plain, crosscoder()))
    assert (alone.entries[0].sources, alone.sources_table()) == ({}, [])
    assert alone.entries[0].metrics.to_json() == own.entries[0].metrics.to_json()  # bit for bit
    both = evaluate([plain, crosscoder()], rows, settings=SETTINGS)
    assert both.entries[0].sources["quiet"].to_json() == own.entries[0].sources["quiet"].to_json()


def test_the_result_is_read_back_and_shown(tmp_path):
    result = evaluate(crosscoder(), joined(), settings=SETTINGS)
    result.save(tmp_path / "evaluation.json")
    assert Evaluation.load(tmp_path / "evaluation.json") == result
    headings, first, *others = result.sources_table()
    assert headings[1:] == ["quiet: fvu", "quiet: cosine", "loud: fvu", "loud: cosine"]
    assert first[1] == str(result.entries[0].sources["quiet"].fvu)
    assert len(others) == len(result.controls)
    [shown] = [each for each in sections_of(result.to_json()) if each.title == "Each source of the rows"]
    assert shown.tables[0].columns[1] == "quiet: FVU"
    assert len(shown.tables[0].rows) == 1 + len(others)
    old = result.to_json() | {"schema": 4}
    for each in (old["entries"][0], *old["entries"][0]["controls"].values()):
        del each["sources"]
    assert Evaluation.from_json(old).entries[0].sources == {}
    assert [each for each in sections_of(old) if each.title == "Each source of the rows"] == []


def test_rows_of_other_sources_are_refused():
    rows = joined()
    quiet, loud = whole(rows).x.split((4, 6), 1)
    assert (
        evaluate(crosscoder(), whole(rows).x, settings=SETTINGS).entries[0].sources
    )  # arrays do not say what they are
    for wrong in ({"loud": loud, "quiet": quiet}, {"quiet": loud, "loud": quiet}, {"a": quiet, "b": loud}):
        for given in ([crosscoder()], [crosscoder().replace(provenance={}), crosscoder()]):
            with pytest.raises(ConfigError, match=r"joined ones of the sources `quiet` \(4 wide\), `loud` \(6 wide\)"):
                evaluate(given, join_rows(wrong))
    with pytest.raises(ConfigError, match=r"they are of layers\.1"):
        evaluate(crosscoder(), ArrayRows(whole(rows).x, info={"hook": "layers.1"}))
    with pytest.raises(ConfigError, match="joined ones of the sources"):
        evaluate(crosscoder(), rows, fit=join_rows({"loud": loud, "quiet": quiet}))
    with pytest.raises(ConfigError, match="all crosscoders must have the same sources in the same order"):
        evaluate([crosscoder(), crosscoder(PARTS[::-1], seed=1)], whole(rows).x)
    for broken in ([{"name": "a"}], [{"name": "a", "width": 3}], "ab", [*PARTS[:1], *PARTS[:1]]):
        with pytest.raises(ConfigError, match="must give name and width of each source, 10 together"):
            evaluate(crosscoder(broken), rows)
