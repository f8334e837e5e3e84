"""One switch: which kernels run, and what happens on a machine without the fast ones."""

from __future__ import annotations

import importlib
import logging
import os
import subprocess
import sys
from pathlib import Path

import llvmlite.binding
import numpy as np
import pytest
import torch

from fixtures.forks import call_in_forks
from saekit import kernels
from saekit.errors import ConfigError, MissingExtraError
from saekit.kernels import backend, dispatch, reference


@pytest.fixture(autouse=True)
def no_choice_yet(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend, "_chosen", None)
    monkeypatch.delenv(backend.VARIABLE, raising=False)


def test_auto_unless_told_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    assert kernels.mode() == "auto"
    monkeypatch.setenv("SAEKIT_KERNELS", "plain")
    assert kernels.mode() == "plain"
    assert kernels.use("auto") == "plain"
    assert kernels.mode() == "auto"


def test_using_restores_what_was_there() -> None:
    with kernels.using("plain"):
        assert kernels.mode() == "plain"
        with kernels.using("auto"):
            assert kernels.mode() == "auto"
        assert kernels.mode() == "plain"
    assert kernels.mode() == "auto"


def test_another_word_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(
        ConfigError, match=r"kernels\.use: must be `auto`, `plain` or `fast`; got 'plane'.*Did you mean `plain`"
    ):
        kernels.use("plane")
    monkeypatch.setenv("SAEKIT_KERNELS", "quick")
    with pytest.raises(ConfigError, match="environment variable SAEKIT_KERNELS: must be"):
        kernels.mode()


def test_without_the_fast_kernels_the_plain_ones_run_with_one_note(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(backend, "unavailable", lambda: "no such processor")
    monkeypatch.setitem(sys.modules, "saekit.kernels.cpu.ops", None)  # importing it would fail
    backend._note.cache_clear()
    x, W = torch.eye(64), torch.randn(600, 64, generator=torch.Generator().manual_seed(0))
    with caplog.at_level(logging.WARNING, "saekit.kernels"):
        for _ in range(3):
            values, _ = kernels.topk_encode(x, W, torch.zeros(600), 4)
    assert torch.equal(values, reference.topk_encode(x, W, torch.zeros(600), 4)[0])
    assert [record.message for record in caplog.records] == [
        "plain torch kernels (slower, same results): no such processor"
    ]
    backend._note.cache_clear()
    with pytest.raises(MissingExtraError, match="`fast` cannot run on this machine: no such processor"):
        kernels.use("fast")


def test_auto_is_plain_where_fast_does_not_pay(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend, "fast_here", lambda: pytest.fail("asked"))
    W = torch.randn(600, 8, generator=torch.Generator().manual_seed(0))
    kernels.topk_encode(torch.ones(dispatch.FEWEST_ROWS - 1, 8), W, torch.zeros(600), 4)
    kernels.topk_encode(torch.ones(64, 8), W[:100], torch.zeros(100), 4)
    kernels.topk_encode(torch.ones(64, 8), W, torch.zeros(600), 500)
    kernels.topk_encode(torch.ones(64, 8).double(), W.double(), torch.zeros(600).double(), 4)


def test_importing_saekit_does_not_import_the_compiler() -> None:
    code = "import sys, saekit.kernels, saekit.sae; print('numba' in sys.modules, 'llvmlite' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=_environment())
    assert done.stdout.split() == ["False", "False"]


def _environment() -> dict[str, str]:
    return os.environ | {"PYTHONPATH": str(Path(__file__).resolve().parents[2] / "src")}


LOOP = """
from typing import NamedTuple
import numpy as np
from saekit.kernels.cpu.intrinsics_numba import compiled

class {name}(NamedTuple):
    values: np.ndarray

@compiled
def total(numbers):
    return {factor} * numbers.values.sum()
"""


@pytest.mark.usefixtures("fast")
def test_machine_code_is_remembered_for_the_sources_that_it_was_made_of(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from saekit.kernels.cpu import intrinsics_numba

    source = tmp_path / "remembered_loop.py"
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)

    def run(sources: str, name: str, factor: int) -> tuple[float, int]:
        monkeypatch.setattr(intrinsics_numba, "_sources", lambda: sources)
        monkeypatch.delitem(sys.modules, source.stem, raising=False)
        source.write_text(LOOP.format(name=name, factor=factor))
        os.utime(source, (0, 0))  # numba looks at the time and size of the file, which are the same
        importlib.invalidate_caches()
        loop = importlib.import_module(source.stem)
        return loop.total(getattr(loop, name)(np.ones(3))), sum(loop.total.stats.cache_hits.values())

    assert run("old", "Numbers", 1) == (3.0, 0)
    assert run("old", "Numbers", 1) == (3.0, 1)
    assert run("new", "Figures", 2) == (6.0, 0)  # the class that the index of the old ones names is gone


@pytest.mark.usefixtures("fast")
def test_the_sources_of_machine_code_are_all_modules_of_the_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from saekit.kernels.cpu import intrinsics_numba

    (tmp_path / "a.py").write_text("1")
    monkeypatch.setattr(intrinsics_numba, "__file__", str(tmp_path / "b.py"))
    before = intrinsics_numba._sources.__wrapped__()
    (tmp_path / "a.py").write_text("2")
    assert intrinsics_numba._sources.__wrapped__() != before


PROCESSOR = llvmlite.binding.get_host_cpu_features()
"""What this processor has: code with instructions that it lacks would be killed."""


def _format(product: str, *instructions: str) -> str:
    """Return what a target gives: on a processor without its instructions only the format is asked for."""
    return product if all(PROCESSOR.get(name, False) for name in instructions) else f"{product}, not run"


# What numba may be told to compile for: (environment, format of the product where the processor has them all).
TARGETS = [
    ({"NUMBA_CPU_NAME": "generic"}, "fp32"),
    ({"NUMBA_CPU_NAME": "haswell", "NUMBA_CPU_FEATURES": "+avx2,+fma,-avx512f"}, "fp32"),
    (
        {"NUMBA_CPU_NAME": "haswell", "NUMBA_CPU_FEATURES": "+avx2,+fma,+avxvnni,-avx512f"},
        _format("fp32", "avxvnni"),
    ),
    (
        {"NUMBA_CPU_NAME": "haswell"},
        "bf16, not run",
    ),  # an order of instructions; the features are still the processor's own
    ({"NUMBA_CPU_FEATURES": "+avx512bf16,-avx512bw"}, "fp32, not run"),
    (
        {"NUMBA_CPU_FEATURES": "+avx512bf16,+avx512bw,+avx512f,-avx512vnni"},
        _format("bf16", "avx512f", "avx512bw"),
    ),
    ({"NUMBA_CPU_FEATURES": "no sign"}, "none"),
]

ENCODE = """
import os, sys
import scipy.optimize, torch  # noqa
from saekit import kernels
from saekit.kernels import backend, reference
from saekit.matching.top_cosines import Directions, cosines

assert "numba" not in sys.modules  # it reads the environment when it is imported

def steps(x):
    # Ten steps of both kinds from the same start.
    from saekit.training.fused import fused_step, fuses
    from saekit.training.config import TopK
    from saekit.training.defaults import resolve
    from saekit.training.learner import initialize_learner, tensors_of
    from saekit.training.step import plain_step

    config = TopK(640, k=8, lr=1e-3, warmup_steps=2, dead_after_rows=192)
    start = {"bias": x.mean(0), "scale": torch.tensor(1.0), "sample": x, "device": "cpu"}
    mine, plain = (initialize_learner(config, 0, resolve(config, 64, 40, 96), **start) for _ in range(2))
    assert fuses(mine)
    for _ in range(10):
        a, b = fused_step(mine, x), plain_step(plain, x)
        assert int(a.fired) == int(b.fired)
        torch.testing.assert_close(torch.as_tensor(a.loss), torch.as_tensor(b.loss), check_dtype=False)
    for name, t in tensors_of(mine).items():
        off = (t.double() - tensors_of(plain)[name].double()).abs().max()
        assert off <= 2e-3 * 1e-3, (name, float(off))

def work(environment, expected):
    os.environ.update(environment)
    if expected.endswith("not run"):
        return f"{'fp32' if backend.bf16_unavailable() else 'bf16'}, not run"
    torch.manual_seed(0)
    x, W, b = torch.randn(96, 64), torch.randn(640, 64), torch.zeros(640)
    wanted = reference.topk_encode(x, W, b, 8)
    can = backend.unavailable() is None
    bf16 = backend.bf16_unavailable() is None
    for pays in (True, False) if bf16 else (True,):  # the product that this processor would not choose, too
        if can:
            from saekit.kernels.cpu import low_bit_matmul
            assert bf16 or low_bit_matmul.pays()  # also beside AMX, whose product is one in bf16
            low_bit_matmul.pays = lambda: pays
        values, latents = kernels.topk_encode(x, W, b, 8)
        assert torch.equal(latents, wanted[1])
        assert torch.allclose(values, wanted[0], rtol=1e-5, atol=1e-5)
    every, one = torch.arange(640), Directions.of(W, "W")
    assert torch.allclose(cosines(one, every, one, every), torch.ones(640, dtype=torch.float64))
    if can and not bf16:
        steps(x)
    return "none" if not can else "bf16" if bf16 else "fp32"
"""


@pytest.fixture(scope="module")
def found() -> dict[str, str]:
    """What happened, by the environment."""
    answers = call_in_forks(ENCODE, TARGETS)
    return {str(environment): answer for (environment, _), answer in zip(TARGETS, answers)}


@pytest.mark.slow
@pytest.mark.parametrize(("environment", "expected"), TARGETS, ids=[" ".join(each.values()) for each, _ in TARGETS])
def test_whatever_numba_compiles_for_codes_and_steps_are_the_plain_ones(
    found: dict[str, str], environment: dict[str, str], expected: str
) -> None:
    if backend.bf16_unavailable():  # this processor has no bf16, whatever numba is told
        expected = expected.replace("bf16", "fp32")
    assert found[str(environment)] == expected
