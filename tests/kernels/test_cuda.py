"""Triton kernels: run by Triton's interpreter and compiled, which need no GPU, and run on a GPU where there is one."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest
import torch

from saekit import kernels
from saekit.kernels import backend, dispatch, verdicts

HERE = Path(__file__).parent
TRITON = importlib.util.find_spec("triton") and tuple(map(int, metadata.version("triton").split(".")[:2]))
needs_triton = pytest.mark.skipif(not TRITON, reason="triton is not installed (pip install 'saekit[triton]')")
interprets = pytest.mark.skipif(
    bool(TRITON) and TRITON < (3, 7), reason="the interpreter of Triton before 3.7 does not work with numpy 2.4"
)
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device here")


def run(script: str, *arguments: str, given: str = "", **environment: str) -> list[str]:
    """Words that a script beside this file prints."""
    source = str(HERE.parents[1] / "src")
    path = os.pathsep.join([source, *filter(None, [os.environ.get("PYTHONPATH")])])
    done = subprocess.run(
        [sys.executable, str(HERE / script), *arguments], input=given, capture_output=True, text=True,
        env=os.environ | {"PYTHONPATH": path} | environment,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


@needs_triton
@interprets
def test_the_kernels_agree_with_the_plain_ones_in_the_interpreter_and_compile_for_gpus(tmp_path: Path) -> None:
    launches = tmp_path / "launches"
    assert run("gpu_checks.py", "cpu", "kernels", str(launches), TRITON_INTERPRET="1") == ["done"]
    # What the interpreter runs need not compile: it does not look at types.
    compiled = run("gpu_compile.py", given=launches.read_text(), TRITON_CACHE_DIR=str(tmp_path / "cache"))
    names = {
        "round_rows", "select", "rescore", "best_of", "best_of_all", "weighted_sums", "reconstruct",
        "gradient_of_segments", "gradient_of_parts", "update_latents", "adam_vector",
    }  # fmt: skip
    assert set(compiled[::3]) == names
    assert set(compiled[1::3]) == {"80", "90"}
    assert all(int(size) > 1000 for size in compiled[2::3])


@needs_triton
@interprets
def test_steps_of_every_architecture_are_the_plain_ones_in_the_interpreter() -> None:
    assert run("gpu_checks.py", "cpu", "learners", TRITON_INTERPRET="1") == ["done"]


@needs_triton
@interprets
def test_a_gpu_that_was_checked_is_used_by_auto(tmp_path: Path) -> None:
    done = run("gpu_checks.py", "cpu", "verdict", TRITON_INTERPRET="1", SAEKIT_CACHE=str(tmp_path))
    assert done == ["done"]
    (path,) = (tmp_path / "kernels").iterdir()
    assert json.loads(path.read_text())["device"]["name"] == "GPU of a test"


@pytest.mark.gpu
@needs_gpu
@needs_triton
@pytest.mark.parametrize("what", ["kernels", "learners"])
def test_they_agree_on_the_gpu(what: str) -> None:
    assert run("gpu_checks.py", "cuda", what) == ["done"]


class OnGpu:
    """As much of a CUDA tensor as the dispatch looks at."""

    is_cuda, dtype, requires_grad, device = True, torch.float32, False, torch.device("cuda")


def test_they_run_only_when_asked_for_and_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    device = torch.device("cuda")
    monkeypatch.setattr(backend, "triton_here", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    found: list[verdicts.Verdict | None] = [None]
    monkeypatch.setattr(verdicts, "verdict_on", lambda device: found[0])
    assert not dispatch._runs_on_gpu(OnGpu())  # type: ignore[arg-type]
    assert kernels.step_kernels(device) is None
    with kernels.using("fast"):
        assert dispatch._runs_on_gpu(OnGpu())  # type: ignore[arg-type]
        assert not dispatch._runs_on_gpu(OnGpu(), torch.zeros(1))  # type: ignore[arg-type]
        assert kernels.step_kernels(device).__name__ == "saekit.kernels.cuda.ops"  # type: ignore[union-attr]
        monkeypatch.setattr(backend, "triton_here", lambda: False)
        assert not dispatch._runs_on_gpu(OnGpu())  # type: ignore[arg-type]
        assert kernels.step_kernels(device) is None
    # Or once a check has found them right and faster.
    monkeypatch.setattr(backend, "triton_here", lambda: True)
    found[0] = verdict("encode")
    assert dispatch._runs_on_gpu(OnGpu())  # type: ignore[arg-type]
    assert kernels.step_kernels(device) is None
    found[0] = verdict("step")
    assert not dispatch._runs_on_gpu(OnGpu())  # type: ignore[arg-type]
    assert kernels.step_kernels(device) is not None
    with kernels.using("plain"):
        assert kernels.step_kernels(device) is None


def verdict(fast: str) -> verdicts.Verdict:
    timings = (verdicts.Timing(fast, "", 2.0, 1.0),)
    return verdicts.Verdict({}, (verdicts.Check("codes", "encode", True),), timings)
