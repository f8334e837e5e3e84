"""What importing costs, and what the package offers."""

from __future__ import annotations

import importlib
import json
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from types import ModuleType

import pytest

import saekit

ROOT = Path(__file__).resolve().parents[1]


def modules_after(code: str) -> set[str]:
    """Top-level modules in sys.modules after `code` ran in a fresh interpreter."""
    report = "sys.stdout.write('\\n' + json.dumps(sorted({m.split('.')[0] for m in sys.modules})))"
    script = f"{code}\nimport json, sys\n{report}"
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src")}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return set(json.loads(done.stdout.splitlines()[-1]))


def test_import_saekit_loads_nothing_heavy():
    loaded = modules_after("import saekit; saekit.__version__; dir(saekit)")
    heavy = {"torch", "numpy", "scipy", "transformers", "datasets", "sklearn", "typer", "matplotlib", "pandas"}
    assert not loaded & heavy


def test_the_public_names_load_none_of_the_edge():
    # the estimators are scikit-learn classes: they alone import it
    others = "[name for name in saekit.__all__ if not saekit._HOMES.get(name, '').startswith('estimators')]"
    loaded = modules_after(f"import saekit\nfor name in {others}: getattr(saekit, name)")
    assert "torch" in loaded
    assert not loaded & {"transformers", "datasets", "sklearn", "typer", "matplotlib", "scipy", "jinja2"}
    assert not modules_after("import saekit; saekit.SAEFeatures") & {"transformers", "datasets", "typer", "matplotlib"}


COMMANDS = (
    "actions", "capture", "classify", "compare", "demo", "evaluate", "predict", "progressive", "prune", "report",
    "show", "train", "transfer",
)  # fmt: skip


def test_help_answers_without_torch():
    """In one process: what a command loads is seen before the help of the next."""
    code = f"""
import sys
from saekit.cli import main
for command in {["", *COMMANDS]}:
    sys.argv = ["saekit", *command.split(), "--help"]
    try:
        main()
    except SystemExit as end:
        assert not end.code, (command, end.code)
    heavy = {{"torch", "numpy", "transformers", "datasets", "sklearn", "matplotlib", "jinja2"}} & set(sys.modules)
    assert not heavy, (command, heavy)
"""
    assert "typer" in modules_after(code)


def test_settings_load_nothing_heavy():
    """`saekit CMD --help` is built from them."""
    rooms = sorted(path.parent.name for path in (ROOT / "src" / "saekit").glob("*/settings.py"))
    assert len(rooms) >= 6
    loaded = modules_after("\n".join(f"import saekit.{room}.settings" for room in rooms))
    assert not loaded & {"torch", "numpy", "scipy", "transformers", "datasets", "sklearn", "matplotlib", "numba"}


def test_the_public_names_are_few_and_documented():
    assert len(saekit.__all__) <= 44
    page = (ROOT / "docs" / "api.md").read_text(encoding="utf-8")
    assert re.findall(r"^\| `(\w+)", page, re.MULTILINE) == saekit.__all__[1:]


def test_every_public_name_is_there_and_typed_the_same():
    for name in saekit.__all__:
        assert getattr(saekit, name) is not None
    assert set(saekit.__all__) <= set(dir(saekit))
    source = (ROOT / "src" / "saekit" / "__init__.py").read_text()
    for name in saekit.__all__[1:]:
        assert f" as {name}\n" in source, f"`{name}` has no import for type checkers"


def test_unknown_name():
    with pytest.raises(AttributeError, match=r"has no attribute `trian`\. Did you mean `train`"):
        saekit.trian  # noqa: B018


def modules() -> list[str]:
    package = ROOT / "src" / "saekit"
    names = [path.relative_to(package.parent).with_suffix("") for path in sorted(package.rglob("*.py"))]
    dotted = [".".join(name.parts).removesuffix(".__init__") for name in names]
    return [name for name in dotted if not name.endswith(("__main__", "triton_kernels", "cuda.ops"))]


@pytest.mark.parametrize("name", modules())
def test_a_dotted_name_is_the_module(name):
    """`import a.b.c as m` follows attributes, so no function or class may stand in the place of a module."""
    importlib.import_module(name)
    found = saekit
    for part in name.split(".")[1:]:
        found = getattr(found, part)
    assert isinstance(found, ModuleType)


def test_version_is_in_one_place_only():
    assert tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"] == saekit.__version__
    assert f"## {saekit.__version__}" in (ROOT / "CHANGELOG.md").read_text()
