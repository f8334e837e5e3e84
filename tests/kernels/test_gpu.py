"""Triton kernels: run by Triton's interpreter, which needs no GPU, and on a GPU where there is one."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from saekit import kernels
from saekit.kernels import dispatch, switch

CHECKS = Path(__file__).with_name("gpu_checks.py")


def run_checks(device: str, **environment: str) -> None:
    source = str(Path(__file__).resolve().parents[2] / "src")
    path = os.pathsep.join([source, *filter(None, [os.environ.get("PYTHONPATH")])])
    done = subprocess.run(
        [sys.executable, str(CHECKS), device], capture_output=True, text=True,
        env=os.environ | {"PYTHONPATH": path} | environment,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["done"]


@pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="triton is not installed (pip install 'saekit[triton]')"
)
def test_the_kernels_agree_with_the_plain_ones_in_the_interpreter() -> None:
    run_checks("cpu", TRITON_INTERPRET="1")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device here")
def test_the_kernels_agree_with_the_plain_ones_on_the_gpu() -> None:
    run_checks("cuda")


class OnGpu:
    """As much of a CUDA tensor as the dispatch looks at."""

    is_cuda, dtype, requires_grad = True, torch.float32, False


def test_they_run_only_when_asked_for_and_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(switch, "triton_here", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert not dispatch._runs_on_gpu(OnGpu())  # type: ignore[arg-type]
    with kernels.using("fast"):
        assert dispatch._runs_on_gpu(OnGpu())  # type: ignore[arg-type]
        assert not dispatch._runs_on_gpu(OnGpu(), torch.zeros(1))  # type: ignore[arg-type]
        monkeypatch.setattr(switch, "triton_here", lambda: False)
        assert not dispatch._runs_on_gpu(OnGpu())  # type: ignore[arg-type]
