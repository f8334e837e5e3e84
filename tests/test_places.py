"""One guard in every function that puts an SAE onto rows: another place than that of its training is said."""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from fixtures.tiny_models import TEXTS
from fixtures.tiny_models import folders as folders
from fixtures.tiny_models import models as models
from saekit import (
    SAE,
    SAEFeatures,
    Split,
    TopK,
    TrainSettings,
    capture,
    classify,
    compare,
    evaluate,
    measure_sizes,
    orphans,
    progressive,
    prune,
    rank,
    train,
    transfer,
)
from saekit.classification.settings import Budget, ClassifierSettings
from saekit.classification.transfer_features import transfer_features
from saekit.cli import app
from saekit.comparison.consensus import consensus
from saekit.comparison.settings import ComparisonSettings, ConsensusSettings
from saekit.errors import FormatError, PlaceWarning
from saekit.evaluation.settings import EvaluationSettings
from saekit.measure.importance import importance
from saekit.models.language import LanguageModel
from saekit.models.loading import load_model
from saekit.places import CODES, NOTE, Place, Warned, warnings_between, warnings_on
from saekit.rows.settings import CaptureSettings
from saekit.rows.source import Source
from saekit.sae.rules import TopKRule
from saekit.sizes.attribution import attribution
from saekit.sizes.run import study_pruning
from saekit.sizes.settings import ProgressiveSettings, PruneSettings, SizeSettings

LABELLED = [{"text": text, "label": str(at % 2)} for at, text in enumerate(TEXTS * 6)]

FACTS = {
    "model": "gemma", "model_digest": "sha256:1", "hook": "layers.2", "d_in": 8, "row_variance": 3.0,
    "model_dtype": "float32", "dtype": "float32", "context": 128,
    "filters": {"special": {"skipped": True}, "outliers": {"times": 10.0, "n": 5}},
}  # fmt: skip

OTHER = {
    "other_model": {"model_digest": "sha256:2"},
    "other_hook": {"hook": "layers.1"},
    "other_width": {"d_in": 16},
    "other_scale": {"row_variance": 300.0},
    "other_dtype": {"model_dtype": "bfloat16"},
    "other_tokens": {"filters": {"special": {"skipped": False}, "outliers": {"times": 10.0, "n": 5}}},
    "other_context": {"context": 1024},
}


def sae_of(**provenance: Any) -> SAE:
    W = torch.eye(8)
    return SAE(W_enc=W, b_enc=W[0], W_dec=W, b_dec=W[0], rule=TopKRule(2), provenance=provenance)


def codes(found: Sequence[Warned]) -> list[str]:
    return [each.code for each in found]


# ---------------------------------------------------------------------------------------------------- comparing places


@pytest.mark.parametrize("code", OTHER)
def test_every_field_that_differs_has_its_code_in_both_directions(code: str) -> None:
    here, there = FACTS, {**FACTS, **OTHER[code]}
    for one, other in ((here, there), (there, here)):
        assert [found for found, _, _ in Place.of(one).differences(Place.of(other))] == [code]
    assert code in CODES


def test_a_place_differs_neither_from_itself_nor_from_what_is_not_known() -> None:
    for left_out in FACTS:
        known = {key: value for key, value in FACTS.items() if key != left_out}
        for one, other in ((FACTS, known), (known, FACTS), (known, known)):
            assert not list(Place.of(one).differences(Place.of(other))), left_out


def test_the_same_model_elsewhere_and_under_another_name_is_the_same_model() -> None:
    moved = {**FACTS, "model": "copy", "model_path": "/elsewhere/copy"}
    assert warnings_on([("a", sae_of(**FACTS))], moved) == []


def test_what_cannot_differ_is_no_difference() -> None:
    filters = FACTS["filters"]
    for own, other in (
        ({"filters": {**filters, "outliers": {"times": 10.0, "n": 0}}}, {"filters": {**filters, "outliers": None}}),
        ({"context": 128, "model_context": 128}, {"context": 1024}),
        ({"hook": "layers.2"}, {"hook": "model.layers.2"}),  # a path may be another name of the module
        ({"row_variance": 3.0}, {"row_variance": 9.0}),
    ):
        assert warnings_on([("a", sae_of(**{**FACTS, **own}))], {**FACTS, **other}) == []


def test_tokens_of_outlier_norm_that_were_skipped_in_training_only_are_said() -> None:
    everything = {**FACTS, "filters": {"special": {"skipped": True}, "outliers": None}}
    (found,) = warnings_on([("a", sae_of(**FACTS))], everything)
    assert found.code == "other_tokens"
    assert "at most 10 times the median norm" in found.message
    assert "rows of any norm" in found.message


def test_saes_that_differ_alike_share_a_warning() -> None:
    named = [(name, sae_of(**FACTS)) for name in "abc"]
    (found,) = warnings_on(named, {**FACTS, "hook": "layers.1"})
    assert found.message.startswith("`a`, `b`, `c` were trained on rows of `layers.2`; these are rows of `layers.1`. ")
    assert not found.is_note
    assert codes(warnings_between([*named, ("d", sae_of(**{**FACTS, "hook": "layers.1"}))])) == ["other_hook"]
    assert warnings_between(named) == []


def test_what_cannot_be_known_is_a_note_of_its_own() -> None:
    foreign = sae_of(model="gemma", hook="layers.2")
    (found,) = warnings_on([("a", foreign)], FACTS)
    assert (found.code, found.is_note) == ("unknown_model", True)
    assert "(`gemma`) without a digest" in found.message
    (found,) = warnings_on([("a", foreign), ("b", sae_of(**FACTS))], {"kind": "array", "digest": "sha256:9"})
    assert (found.code, found.is_note) == ("unknown_rows", True)
    assert warnings_on([("a", sae_of(**FACTS, data_digest="sha256:9"))], {"digest": "sha256:9"}) == []


def test_warnings_are_read_back_and_texts_of_old_files_are_notes() -> None:
    found = Warned("other_hook", "text")
    assert Warned.from_json(json.loads(json.dumps(found.to_json()))) == found
    assert Warned.from_json("a text").is_note
    for wrong in (3, {"code": 1, "message": "x"}, {"code": "x"}):
        with pytest.raises(FormatError, match="must be an object with `code` and `message`"):
            Warned.from_json(wrong)


# ----------------------------------------------------------------------------------------------------- every function


@dataclass(frozen=True)
class Scene:
    """Two seeds of one SAE, and rows of a layer of a model."""

    saes: list[SAE]
    rows: Source
    lm: LanguageModel
    hook: str


@pytest.fixture(scope="module")
def scene(models: dict[str, LanguageModel]) -> Scene:
    lm = models["llama"]
    rows = capture(lm, TEXTS * 6, hook="layers.1")
    # One log record: no curve, which would say that so short a run is undertrained.
    saes = train(TopK(24, k=3), rows, seeds=[0, 1], tokens=640, settings=TrainSettings(batch_rows=64, log_every=10))
    return Scene(saes, rows, lm, "layers.1")


@pytest.fixture(scope="module")
def elsewhere(scene: Scene) -> Scene:
    """The same SAEs, and rows of another layer."""
    return Scene(scene.saes, capture(scene.lm, TEXTS * 6, hook="layers.0"), scene.lm, "layers.0")


def raised(function: Callable[[], Any]) -> list[str]:
    """Return the codes of the Python warnings of a call."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", PlaceWarning)
        function()
    return list(dict.fromkeys(each.message.code for each in caught if isinstance(each.message, PlaceWarning)))


def of_result(function: Callable[[], Any]) -> list[str]:
    """Return the codes in the result of a call and in its JSON, which must be equal."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", PlaceWarning)
        result = function()
    plain = json.loads(json.dumps(result.to_json()))
    assert [each["code"] for each in plain["warnings"]] == codes(result.warnings)
    assert type(result).from_json(plain).warnings == result.warnings
    assert all(str(each) in repr(result) for each in result.warnings)
    return list(dict.fromkeys(code for code in codes(result.warnings) if code != NOTE))


FEW = ClassifierSettings(arms=("majority", "full"), pools=("sum",), shuffles=0, budget=Budget(inner=2))
NO_ORDER = SizeSettings(intervals=False, sample_rows=0, tokens=30)

FUNCTIONS: dict[str, Callable[[Scene], list[str]]] = {
    "evaluate": lambda s: of_result(
        lambda: evaluate(s.saes, s.rows, settings=EvaluationSettings(intervals=False, controls=False))
    ),
    "evaluate, rows of a model": lambda s: of_result(
        lambda: evaluate(
            s.saes, model=s.lm, data=TEXTS,
            settings=EvaluationSettings(intervals=False, controls=False, tokens=30, hook=s.hook),
        )
    ),
    "compare": lambda s: of_result(lambda: compare(s.saes, s.rows, settings=ComparisonSettings(controls=False))),
    "orphans": lambda s: of_result(
        lambda: orphans(
            s.saes, s.rows, comparison=compare(s.saes, settings=ComparisonSettings(controls=False, threshold=0.0))
        )
    ),
    "measure_sizes": lambda s: of_result(lambda: measure_sizes(s.saes[0], s.rows, [12, 24], settings=NO_ORDER)),
    "progressive": lambda s: of_result(
        lambda: progressive(
            s.saes, s.rows, sizes=[12, 24], settings=ProgressiveSettings(intervals=False, sample_rows=0, latents=False)
        )
    ),
    "prune, measured": lambda s: codes(
        quietly(lambda: study_pruning(s.saes[0], s.rows, sizes=[12])).curve.warnings
    ),
    "rank": lambda s: raised(lambda: rank(s.saes[0], s.rows)),
    "rank, greedy": lambda s: raised(lambda: rank(s.saes[0], s.rows, by="forward")),
    "prune": lambda s: raised(lambda: prune(s.saes[0], s.rows, sizes=[12])),
    "prune, refit": lambda s: raised(
        lambda: prune(s.saes[0], s.rows, sizes=[12], by="unsorted", settings=PruneSettings(refit=True))
    ),
    "importance": lambda s: codes(importance(s.saes[0], s.rows).warnings),
    "attribution": lambda s: codes(attribution(s.saes[0], s.lm, TEXTS, hook=s.hook, tokens=30).warnings),
    "consensus": lambda s: raised(
        lambda: consensus(s.saes, s.rows, settings=ConsensusSettings(threshold=0.3, size=8))
    ),
    "warm start": lambda s: raised(
        lambda: train(TopK(24, k=3), s.rows, tokens=64, start=s.saes[0], settings=TrainSettings(batch_rows=64))
    ),
    "SAEFeatures": lambda s: raised(lambda: SAEFeatures(s.lm, s.saes[0], hook=s.hook).transform(TEXTS)),
    "classify": lambda s: of_result(
        lambda: classify(s.saes[:1], model=s.lm, data=LABELLED, split=Split(), settings=with_hook(s))
    ),
    "transfer": lambda s: of_result(lambda: transfer(s.saes[:1], model=s.lm, data=LABELLED, settings=with_hook(s))),
    "transfer between SAEs": lambda s: of_result(
        lambda: transfer_features(s.saes, model=s.lm, data=LABELLED, settings=with_hook(s))
    ),
}  # fmt: skip


def quietly(function: Callable[[], Any]) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", PlaceWarning)
        return function()


def with_hook(scene: Scene) -> ClassifierSettings:
    from dataclasses import replace

    return replace(FEW, hook=scene.hook)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_the_place_of_the_training_gives_no_warning(name: str, scene: Scene) -> None:
    assert FUNCTIONS[name](scene) == []


@pytest.mark.parametrize("name", FUNCTIONS)
def test_another_place_is_said_by_every_function(name: str, elsewhere: Scene) -> None:
    assert FUNCTIONS[name](elsewhere) == ["other_hook"]


def test_saes_of_two_places_are_told_apart(scene: Scene) -> None:
    moved = scene.saes[1].replace(provenance={**scene.saes[1].provenance, "hook": "layers.2"})
    assert codes(compare([scene.saes[0], moved], settings=ComparisonSettings(controls=False)).warnings) == [
        "other_hook"
    ]


def test_arrays_without_origin_are_noted_once_and_their_scale_is_compared(scene: Scene) -> None:
    x = torch.cat([batch.x for batch in scene.rows.batches(4096)])
    settings = EvaluationSettings(intervals=False, controls=False)
    assert codes(evaluate(scene.saes, x[:300], settings=settings).warnings) == ["unknown_rows"]
    assert codes(evaluate(scene.saes, 100 * x[:300], settings=settings).warnings) == ["unknown_rows", "other_scale"]
    features = SAEFeatures(None, scene.saes[0])
    assert raised(lambda: features.transform(x[:300].numpy())) == []
    assert raised(lambda: features.transform(100 * x[:300].numpy())) == ["other_scale"]


def test_another_model_of_equal_width_is_said(scene: Scene, models: dict[str, LanguageModel]) -> None:
    rows = capture(models["gpt2"], TEXTS, hook="layers.1")
    found = evaluate(scene.saes, rows, settings=EvaluationSettings(intervals=False, controls=False)).warnings
    assert "other_model" in codes(found)
    assert "`tiny-llama` (sha256:" in found[0].message
    assert "`tiny-gpt2` (sha256:" in found[0].message


def test_a_moved_model_is_the_same_and_another_number_type_is_another_precision(
    scene: Scene, folders: dict[str, Path], tmp_path: Path
) -> None:
    shutil.copytree(folders["llama"], tmp_path / "moved")
    settings = EvaluationSettings(intervals=False, controls=False)
    rows = capture(tmp_path / "moved", TEXTS, hook="layers.1")
    assert evaluate(scene.saes, rows, settings=settings).warnings == []
    half = capture(load_model(tmp_path / "moved", dtype="bfloat16"), TEXTS, hook="layers.1")
    assert codes(evaluate(scene.saes, half, settings=settings).warnings) == ["other_dtype"]


def test_skipped_tokens_and_contexts_are_compared(scene: Scene) -> None:
    settings = EvaluationSettings(intervals=False, controls=False)
    for how, code in (
        (CaptureSettings(skip_special=False), "other_tokens"),
        (CaptureSettings(context=8), "other_context"),
    ):
        rows = capture(scene.lm, TEXTS, hook="layers.1", settings=how)
        assert codes(evaluate(scene.saes, rows, settings=settings).warnings) == [code]


# ------------------------------------------------------------------------------------------------ the command line


@pytest.fixture
def run_in(scene: Scene, elsewhere: Scene, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.chdir(tmp_path)
    for at, sae in enumerate(scene.saes):
        sae.save(f"sae{at}")
    capture(scene.lm, TEXTS * 6, hook="layers.0", out="rows")
    yield tmp_path
    monkeypatch.undo()


@pytest.mark.parametrize(
    "command",
    [
        "evaluate sae0 --rows rows --no-controls --set intervals=false",
        "compare sae0 sae1 --rows rows --no-controls",
        "prune sae0 --rows rows --sizes 12 --out small --set intervals=false --set sample_rows=0",
        "progressive sae0 sae1 --rows rows --sizes 12,24 --set intervals=false --set sample_rows=0 --set latents=false",
        "train --rows rows --arch topk --latents 24 --k 3 --tokens 64 --set batch_rows=64 --set start=sae0 --out run",
    ],
)
def test_commands_print_warnings_and_have_them_in_their_json(
    command: str, run_in: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert app.run(command.split()) == 0
    shown = capsys.readouterr()
    told = " ".join((shown.out + shown.err).split())  # a page is 100 columns wide
    assert "trained on rows of `layers.1`; these are rows of `layers.0`" in told
    shutil.rmtree("run", ignore_errors=True)
    assert app.run([*command.split(), "--json"]) == 0
    out = capsys.readouterr()
    assert "other_hook" in [each["code"] for each in json.loads(out.out)["warnings"]]
    assert "PlaceWarning" not in out.err + told


def test_what_training_recorded_is_the_place_of_the_sae(scene: Scene, folders: dict[str, Path]) -> None:
    place = Place.of(scene.saes[0])
    x = torch.cat([batch.x for batch in scene.rows.batches(4096)]).double()
    assert (place.model, place.path) == ("tiny-llama", str(folders["llama"].resolve()))
    assert (place.hook, place.width, place.precision, place.context) == ("layers.1", 16, "float32", 24)
    assert (place.special, place.outliers) == (True, 10.0)
    assert place.scale == pytest.approx(float((x - x.mean(0)).square().sum(1).mean()), rel=0.2)


def test_orphans_that_cannot_be_measured_are_in_the_json(run_in: Path, capsys: pytest.CaptureFixture[str]) -> None:
    whole = SAE.load(run_in / "sae0")
    whole.permute(torch.arange(whole.n_latents).flip(0)).save(run_in / "turned")  # the same latents: none is an orphan
    command = "compare sae0 turned --rows rows --no-controls --orphans --json"
    assert app.run(command.split()) == 0
    told = json.loads(capsys.readouterr().out)["warnings"]
    assert [each["code"] for each in told] == ["other_hook", "orphans_not_measured"]
    assert "an SAE needs at least 2 orphans" in told[1]["message"]


def test_one_commit_is_one_model_whatever_its_digest_was_computed_from():
    seen = {"model": "owner/m", "model_digest": "b" * 64, "model_revision": "c0ffee", "hook": "layers.1"}
    assert not list(Place.of({**seen, "model_digest": "a" * 64}).differences(Place.of(seen)))
    for revision in ("deadbeef", None):
        other = Place.of({**seen, "model_digest": "a" * 64, "model_revision": revision})
        assert [code for code, *_ in other.differences(Place.of(seen))] == ["other_model"]
