"""Verdicts on kernels: what is kept between processes, what is not believed, and what `auto` does with them."""

from __future__ import annotations

import dataclasses
import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from saekit import kernels
from saekit.files import seal
from saekit.kernels import backend, dispatch, reference, verdicts
from saekit.kernels.verdicts import Check, Timing, Verdict

CPU = torch.device("cpu")
RIGHT = Check("codes", "encode", True)


@pytest.fixture(autouse=True)
def own_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("SAEKIT_CACHE", str(tmp_path))
    monkeypatch.delenv(backend.VARIABLE, raising=False)
    monkeypatch.setattr(backend, "_chosen", None)
    verdicts.verdict_on.cache_clear()
    backend._note.cache_clear()
    yield
    verdicts.verdict_on.cache_clear()
    backend._note.cache_clear()


def verdict(encode: float = 2.0, step: float = 2.0, *checks: Check) -> Verdict:
    timings = (Timing("encode", "s", encode, 1.0), Timing("encode", "t", 9.0, 1.0), Timing("step", "s", step, 1.0))
    return Verdict(verdicts.identity(CPU), (RIGHT, *checks), timings, "a note")


def test_a_verdict_that_was_kept_is_found_again() -> None:
    assert verdicts.verdict_on(CPU) is None
    found = verdict(0.5, 3.0)
    path = verdicts.keep(found)
    assert verdicts.verdict_on(CPU) == found
    assert Verdict.from_json(json.loads(path.read_text())) == found
    assert [each.name for each in path.parent.iterdir()] == [path.name]


@pytest.mark.parametrize(
    ("found", "fast"),
    [
        (verdict, ("encode", "step")),
        (lambda: verdict(0.99), ("step",)),  # the slowest size counts
        (lambda: verdict(2, 0.99), ("encode",)),
        (lambda: verdict(2, 2, Check("steps", "step", False, "off")), ("encode",)),
        (lambda: verdict(2, 2, Check("codes", "encode", False, "off")), ()),  # a step encodes too
        (lambda: dataclasses.replace(verdict(), checks=()), ()),
        (lambda: dataclasses.replace(verdict(), timings=()), ()),
        (lambda: dataclasses.replace(verdict(), timings=(Timing("encode", "s", 1.0, None),)), ()),
    ],
)
def test_fast_is_what_was_right_and_at_no_size_slower(found: Callable[[], Verdict], fast: tuple[str, ...]) -> None:
    assert found().fast == fast
    verdicts.keep(found())
    assert verdicts.verdict_on(CPU).fast == fast  # type: ignore[union-attr]


def test_auto_leaves_to_plain_torch_what_is_not_right_here(caplog: pytest.LogCaptureFixture) -> None:
    if kernels.unavailable():
        pytest.skip("there are no compiled loops here")
    assert kernels.step_kernels(CPU) is not None
    verdicts.keep(verdict(2.0, 0.5))
    with caplog.at_level(logging.WARNING, "saekit.kernels"):
        assert kernels.step_kernels(CPU) is None
    assert "`saekit kernels check` found that step is not right or not faster" in caplog.text
    x, W, b = torch.eye(64), torch.randn(600, 64, generator=torch.Generator().manual_seed(0)), torch.zeros(600)
    assert dispatch._runs([x, W, b], True)
    verdicts.keep(verdict(0.5))
    assert not dispatch._runs([x, W, b], True)
    assert torch.equal(kernels.topk_encode(x, W, b, 4)[0], reference.topk_encode(x, W, b, 4)[0])
    here = kernels.describe().devices[0]
    assert (here.encode, here.step) == ("plain", "fast")
    with kernels.using("fast"):  # whatever was found
        assert dispatch._runs([x, W, b], True)
        assert kernels.step_kernels(CPU) is not None


def changed(**values: Any) -> Callable[[dict[str, Any]], object]:
    return lambda plain: {**plain, **values}


def resealed(change: Callable[[dict[str, Any]], Any]) -> Callable[[dict[str, Any]], object]:
    return lambda plain: seal(change({key: value for key, value in plain.items() if key != "seal"}))


DAMAGED: dict[str, Callable[[dict[str, Any]], object]] = {
    "edited": lambda plain: {**plain, "note": "another"},
    "no seal": lambda plain: {key: value for key, value in plain.items() if key != "seal"},
    "a list": lambda plain: [],
    "a newer schema": resealed(changed(schema=2)),
    "another GPU": resealed(lambda plain: {**plain, "device": {**plain["device"], "name": "another"}}),
    "another torch": resealed(lambda plain: {**plain, "device": {**plain["device"], "torch": "1.0"}}),
    "more than it says": resealed(changed(checks=[{"name": "x", "work": "encode", "passed": False, "detail": ""}])),
    "no number": resealed(lambda plain: {**plain, "timings": [{**plain["timings"][0], "plain": "many"}]}),
    "no time": resealed(lambda plain: {**plain, "timings": [{**plain["timings"][0], "fast": 0.0}]}),
    "no check": resealed(changed(checks=[1])),
    "passed, perhaps": resealed(lambda plain: {**plain, "checks": [{**plain["checks"][0], "passed": "no"}]}),
    "no entries": resealed(lambda plain: {"schema": 1}),
}


@pytest.mark.parametrize("damage", DAMAGED)
def test_a_verdict_that_is_damaged_or_about_another_device_is_not_used(
    damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    path = verdicts.keep(verdict())
    path.write_text(json.dumps(DAMAGED[damage](json.loads(path.read_text()))))
    with caplog.at_level(logging.WARNING, "saekit.kernels"):
        assert verdicts.verdict_on(CPU) is None
    assert "a verdict on kernels is not used" in caplog.text


@pytest.mark.parametrize("data", [b"", b"{", b"\xff\x00", b"null", b'"text"'])
def test_what_is_no_json_is_not_used(data: bytes) -> None:
    verdicts.keep(verdict()).write_bytes(data)
    assert verdicts.verdict_on(CPU) is None


def test_a_folder_in_its_place_is_not_used() -> None:
    path = verdicts.keep(verdict())
    path.unlink()
    path.mkdir()
    assert verdicts.verdict_on(CPU) is None


def test_a_verdict_ends_with_the_versions_it_was_found_with(monkeypatch: pytest.MonkeyPatch) -> None:
    verdicts.keep(verdict())
    for name, value in (("__version__", "9.9"), ("_digest_of_source", lambda: "other"), ("_target", lambda: "other")):
        with monkeypatch.context() as patch:
            patch.setattr(verdicts, name, value)
            verdicts.verdict_on.cache_clear()
            assert verdicts.verdict_on(CPU) is None, name
    verdicts.verdict_on.cache_clear()
    assert verdicts.verdict_on(CPU) is not None


def test_the_identity_of_a_gpu_has_its_capability_and_versions(monkeypatch: pytest.MonkeyPatch) -> None:
    capability = (8, 0)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "A GPU")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    gpu = torch.device("cuda", 0)
    known = verdicts.identity(gpu)
    assert {"kind", "name", "torch", "saekit", "kernels", "capability", "cuda", "triton"} <= known.keys()
    verdicts.keep(dataclasses.replace(verdict(), device=known))
    assert verdicts.verdict_on(gpu) is not None
    assert verdicts.verdict_on(CPU) is None
    capability = (9, 0)
    verdicts.verdict_on.cache_clear()
    assert verdicts.verdict_on(gpu) is None


def test_the_machine_is_plain_json() -> None:
    machine = kernels.describe()
    plain = json.loads(json.dumps(machine.to_json(), allow_nan=False))
    assert plain["devices"][0]["device"] == "cpu"
    assert plain["devices"][0]["verdict"] is None
    assert plain["cores"] >= 1
    verdicts.keep(verdict())
    assert kernels.describe().to_json()["devices"][0]["verdict"]["fast"] == ["encode", "step"]
    assert "encode 2.00, step 2.00 times as fast" in repr(kernels.describe())
    with kernels.using("plain"):
        assert "plain torch was asked for" in repr(kernels.describe())


def test_a_processor_of_another_kind_runs_compiled_loops_once_they_were_checked(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if kernels.unavailable():
        pytest.skip("there are no compiled loops here")
    monkeypatch.setattr("platform.machine", lambda: "aarch64")
    assert kernels.step_kernels(CPU) is None
    here = kernels.describe().devices[0]
    assert (here.encode, here.step) == ("plain", "plain")
    assert "no aarch64 processor has run the compiled loops yet: saekit kernels check" in here.why
    with kernels.using("fast"):
        assert kernels.step_kernels(CPU) is not None
    verdicts.keep(verdict())
    assert kernels.step_kernels(CPU) is not None
    assert kernels.describe().devices[0].encode == "fast"


def test_a_processor_that_llvm_does_not_know_has_no_instructions(monkeypatch: pytest.MonkeyPatch) -> None:
    def unknown() -> None:
        raise RuntimeError("failed to get host cpu features")

    monkeypatch.setattr("llvmlite.binding.get_host_cpu_features", unknown)
    backend.has_instructions.cache_clear()
    assert not backend.has_instruction("avx512bf16")
    assert kernels.describe().instructions == ()
    backend.has_instructions.cache_clear()
