"""The check of kernels: right ones pass, each kind of wrong one is found, on a device that is injected."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from saekit import kernels
from saekit.cli import app
from saekit.errors import ConfigError
from saekit.kernels import backend, verdicts
from saekit.training import kernel_check
from saekit.training.kernel_check import PLAIN, CheckSizes, Encoders, Subject

SIZES = CheckSizes([(9, 48, 150, 5)], (6, 8, 48, 4), 1, [(32, 8, 64, 2)], 1)
GPU = {"kind": "cuda", "name": "GPU of a test", "torch": torch.__version__}


@pytest.fixture(autouse=True)
def own_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("SAEKIT_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv(backend.VARIABLE, raising=False)
    monkeypatch.setattr(backend, "_chosen", None)
    verdicts.verdict_on.cache_clear()
    yield
    verdicts.verdict_on.cache_clear()


@pytest.fixture
def call(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """Run a command line; returns exit status, stdout and stderr."""

    def run(*arguments: str) -> tuple[int, str, str]:
        capsys.readouterr()
        return (app.run(arguments), *capsys.readouterr())

    return run


def subject(fast: Encoders | None = PLAIN) -> Subject:
    """A GPU whose kernels are functions of ours, and whose memory is that of the CPU."""
    return Subject(GPU, torch.device("cpu"), fast)


@pytest.fixture
def few_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps of one architecture: those of all of them are in the tests of fused steps."""
    every = kernel_check.configurations
    monkeypatch.setattr(kernel_check, "configurations", lambda *a, **k: {"topk": every(*a, **k)["topk"]})


needs_loops = pytest.mark.skipif(bool(kernels.unavailable()), reason="there are no compiled loops here")


@needs_loops
def test_right_kernels_pass_and_are_timed(few_steps: None) -> None:
    seen: list[tuple[str, int, int]] = []
    found = kernel_check.check(subject(), SIZES, lambda *stage: seen.append(stage))
    assert not found.failed
    assert found.device == GPU
    assert [each.work for each in found.timings] == ["encode", "step"]
    assert all(each.plain > 0 and each.fast is not None and each.fast > 0 for each in found.timings)
    assert {stage for stage, _, _ in seen} == {"parity", "timing"}
    assert kernels.mode() == "auto"


def test_without_fast_kernels_plain_torch_is_compared(few_steps: None) -> None:
    found = kernel_check.check(subject(None), SIZES)
    assert not found.failed
    assert found.fast == ()
    assert all(each.fast is None for each in found.timings)


def one_smaller(x: Any, W: Any, b: Any, k: int, **more: Any) -> Any:
    """The best latent is left out."""
    values, indices = PLAIN.topk(x, W, b, k + 1, **more)
    return values[:, 1:], indices[:, 1:]


def a_little_off(*arguments: Any, **more: Any) -> Any:
    values, indices = PLAIN.topk(*arguments, **more)
    return values * (1 + 1e-4), indices


def twice(*arguments: Any, **more: Any) -> Any:
    values, indices = PLAIN.topk(*arguments, **more)
    return values[:, :1].expand_as(values), indices[:, :1].expand_as(indices)


def blind_to_nan(x: Any, W: Any, *arguments: Any, **more: Any) -> Any:
    return PLAIN.topk(x.nan_to_num(), W.nan_to_num(), *arguments, **more)


def one_missing(x: Any, W: Any, b: Any, threshold: Any, **more: Any) -> Any:
    return PLAIN.threshold(x, W, b, threshold + 0.1, **more)


def a_row_late(offsets: Any, indices: Any, values: Any, W: Any) -> Any:
    return PLAIN.decode(offsets, indices, values, W.roll(1, 0))


def broken(*arguments: Any, **more: Any) -> Any:
    raise RuntimeError("PTX does not assemble\nand much more")


WRONG: dict[str, tuple[Encoders, str]] = {
    "smaller": (replace(PLAIN, topk=one_smaller), "larger than one that is kept"),
    "off": (replace(PLAIN, topk=a_little_off), "a code is off by"),
    "twice": (replace(PLAIN, topk=twice), "twice in a row"),
    "nan": (replace(PLAIN, topk=blind_to_nan), "NaN"),
    "missing": (replace(PLAIN, threshold=one_missing), "a code is off by"),
    "sums": (replace(PLAIN, decode=a_row_late), "a sum is off by"),
    "broken": (replace(PLAIN, topk=broken), "RuntimeError: PTX does not assemble"),
}


@needs_loops
@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_kernel_is_found_and_not_timed(name: str, few_steps: None) -> None:
    fast, words = WRONG[name]
    found = kernel_check.check(subject(fast), SIZES)
    assert any(words in each.detail for each in found.failed), found.failed
    assert all("\n" not in each.detail for each in found.failed)
    assert found.fast == ()
    assert found.timings == ()


@needs_loops
@pytest.mark.parametrize("field", ["loss", "grad_norm"])
def test_a_wrong_step_is_found(field: str, few_steps: None, monkeypatch: pytest.MonkeyPatch) -> None:
    right = kernel_check.fused_step
    monkeypatch.setattr(
        kernel_check, "fused_step", lambda *a: replace(s := right(*a), **{field: getattr(s, field) * 1.01})
    )
    found = kernel_check.check(subject(), SIZES)
    assert [(each.work, f"`{field}`" in each.detail) for each in found.failed] == [("step", True)]


@needs_loops
def test_a_step_that_leaves_other_weights_is_found(few_steps: None, monkeypatch: pytest.MonkeyPatch) -> None:
    right, calls = kernel_check.fused_step, []

    def step(learner: Any, x: Any) -> Any:
        found = right(learner, x)
        calls.append(1)
        learner.parameters["W_dec"][3] *= 1 + 0.1 * len(calls)
        return found

    monkeypatch.setattr(kernel_check, "fused_step", step)
    found = kernel_check.check(subject(), SIZES)
    assert [each.work for each in found.failed] == ["step"]
    assert "W_dec" in found.failed[0].detail


def test_what_takes_too_long_does_not_count_as_right(few_steps: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel_check, "TIME_LIMIT", -1.0)
    found = kernel_check.check(subject(None), SIZES)
    assert len(found.failed) == len(found.checks)
    assert "not done within" in found.failed[0].detail


def test_ctrl_c_keeps_nothing(few_steps: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def pressed(*_: Any, **__: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(kernel_check, "subject_of", lambda device: subject(replace(PLAIN, threshold=pressed)))
    monkeypatch.setitem(kernel_check.SIZES, "cpu", SIZES)
    with pytest.raises(KeyboardInterrupt):
        kernel_check.check_kernels("cpu", progress=False)
    assert not (tmp_path / "cache").exists()
    assert kernels.mode() == "auto"


def test_the_command_from_check_to_auto(call: Any, few_steps: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(kernel_check.SIZES, "cpu", SIZES)
    status, out, err = call("kernels", "check")
    assert status == 0, err
    assert "There is no GPU" in out or torch.cuda.is_available()
    assert "comparisons passed" in out
    found = verdicts.verdict_on(torch.device("cpu"))
    assert found is not None
    status, out, _ = call("kernels", "check", "--device", "cpu", "--json")
    plain = json.loads(out)["devices"]["cpu"]
    assert status == 0
    assert Path(plain["file"]).is_file()
    assert {"device", "fast", "checks", "timings", "note"} <= plain.keys()
    status, out, _ = call("show", "--machine", "--json")
    assert json.loads(out)["devices"][0]["verdict"]["checks"] == plain["checks"]


def test_a_wrong_kernel_makes_the_command_fail(call: Any, few_steps: None, monkeypatch: pytest.MonkeyPatch) -> None:
    known = verdicts.identity(torch.device("cpu"))
    mine = replace(subject(replace(PLAIN, topk=broken)), identity=known)
    monkeypatch.setattr(kernel_check, "subject_of", lambda device: mine)
    monkeypatch.setitem(kernel_check.SIZES, "cpu", SIZES)
    status, out, _ = call("kernels", "check", "--device", "cpu")
    assert status == 1
    assert "wrong: " in out
    assert "encode plain, step plain" in out


@pytest.mark.parametrize("device", ["cuda:7", "mps:1", "tpu", ""])
def test_a_device_that_is_not_here_is_refused(device: str, call: Callable[..., Any]) -> None:
    status, out, err = call("kernels", "check", "--device", device)
    assert (status, out) == (2, "")
    assert "`device` must be one of this machine (" in err


def test_wrong_calls(call: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    status, _, err = call("kernels", "chek")
    assert (status, "Did you mean `check`" in err) == (2, True)
    monkeypatch.setenv(backend.VARIABLE, "plain")
    status, _, err = call("kernels", "check")
    assert (status, "must not be forbidden" in err) == (2, True)
    with pytest.raises(ConfigError, match="must not be forbidden"):
        kernel_check.check_kernels()
    monkeypatch.delenv(backend.VARIABLE)
    status, _, err = call("show")
    assert (status, "SAEs, or --machine, must be given." in err) == (2, True)
    status, _, err = call("show", "--machine", "x")
    assert (status, "must be given alone" in err) == (2, True)


def test_a_cache_that_cannot_be_written_is_told(
    call: Callable[..., Any], few_steps: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("SAEKIT_CACHE", str(tmp_path / "file"))
    monkeypatch.setattr(kernel_check, "subject_of", lambda device: subject(None))
    monkeypatch.setitem(kernel_check.SIZES, "cpu", SIZES)
    status, _, err = call("kernels", "check")
    assert (status, "cannot be written" in err) == (1, True)
