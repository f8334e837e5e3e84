"""Reads the imports: rooms depend downwards only, and what is imported is what pyproject.toml declares."""

from __future__ import annotations

import ast
import functools
import re
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "src" / "saekit"

# A room imports rooms with a lower number only; rooms on one floor do not import each other.
FLOORS = {
    "terminal": -1,
    "errors": 0, "version": 0, "kinds": 0,
    "files": 1, "assets": 1, "randomness": 1, "settings": 1, "hub": 1, "interruption": 1, "variance": 1, "memory": 1,
    "progress": 2, "forms": 2, "grid": 2, "ranks": 2,
    "kernels": 2,
    "sae": 3,
    "provenance": 4, "inputs": 4,
    "places": 5, "models": 5, "store": 5,
    "rows": 6,
    "training": 7, "matching": 7, "estimators": 7,
    "measure": 8,
    "evaluation": 9, "comparison": 9, "sizes": 9, "classification": 9, "explanation": 9,
    "report": 10,
    "cli": 11,
    "__main__": 12,
}  # fmt: skip

# The methods SAE.save, SAE.load and SAE.push_to_hub reach up, inside their bodies.
EXCEPTIONS = {("sae", "store"), ("sae", "report")}

# Third-party packages that only some rooms may use.
REACH = {
    "typer": {"cli"},
    "rich": {"cli", "progress"},
    "jinja2": {"inputs", "report"},
    "matplotlib": {"report"},
    "transformers": {"models", "rows"},
    "datasets": {"inputs"},
    "tokenizers": {"models"},
    "huggingface_hub": {"hub", "inputs", "models", "store"},
}

# Import name -> name in pyproject.toml, where they differ.
DISTRIBUTIONS = {"sklearn": "scikit-learn", "PIL": "pillow", "yaml": "pyyaml"}
# Declared for a reason that no import shows.
NOT_IMPORTED: set[str] = {"scikit-learn", "skops", "pillow"}


def sources() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


def room_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


@functools.cache
def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def imports(path: Path) -> Iterator[tuple[str, int]]:
    """Absolute names of everything a file imports, with line numbers; relative imports are resolved."""
    package = ["saekit", *path.relative_to(PACKAGE).parent.parts]
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            name = ".".join([*base, *([node.module] if node.module else [])])
            if name == "saekit":  # `from .. import kernels`, `from .. import __version__`
                yield from ((f"saekit.{alias.name}", node.lineno) for alias in node.names)
            else:
                yield name, node.lineno


def test_every_room_has_a_floor():
    assert {room_of(path) for path in sources()} - {"__init__"} <= set(FLOORS)


def test_rooms_import_lower_floors_only():
    wrong = []
    for path in sources():
        room = room_of(path)
        if room == "__init__":
            continue
        for name, line in imports(path):
            parts = name.split(".")
            if parts[0] != "saekit" or len(parts) < 2 or parts[1] in (room, "__version__"):
                continue
            allowed = FLOORS.get(parts[1], 99) < FLOORS[room] or (room, parts[1]) in EXCEPTIONS
            if not allowed:
                wrong.append(f"{path.relative_to(ROOT)}:{line}: {room} imports {parts[1]}")
    assert not wrong, "\n".join(wrong)


def test_no_private_name_crosses_rooms():
    wrong = []
    for path in sources():
        package = ["saekit", *path.relative_to(PACKAGE).parent.parts]
        for node in ast.walk(tree_of(path)):
            if not isinstance(node, ast.ImportFrom):
                continue
            base = package[: len(package) - node.level + 1] if node.level else []
            parts = [*base, *(node.module or "").split(".")]
            if parts[0] != "saekit" or parts[1] == room_of(path):
                continue
            private = [each.name for each in node.names if each.name.startswith("_") and each.name != "__version__"]
            wrong += [f"{path.relative_to(ROOT)}:{node.lineno}: {'.'.join(parts)}.{name}" for name in private]
    assert not wrong, "\n".join(wrong)


# Rooms whose `__init__` says what others use.
EXPORTING = {"kernels", "sae", "store", "estimators", "report", "cli", "assets"}


def test_other_rooms_export_nothing():
    """What is in a room is imported from its module, so that a name has one address."""
    for path in PACKAGE.glob("*/__init__.py"):
        body = tree_of(path).body
        assert path.parent.name in EXPORTING or all(isinstance(node, ast.Expr) for node in body), path.parent.name


# Functions with more parameters: kernels and loops that are compiled, constructors of scikit-learn (which reads the
# parameters from the signature), and commands (typer reads the options from it).
MANY = {
    "kernels/cuda",
    "kernels/cpu",
    "matching/assignment_numba.py",
    "matching/top_cosines_numba.py",
    "estimators",
    "cli",
}
MOST_PARAMETERS = 8
# Public functions that keep what people set all the time as parameters, and one step of the search.
WITH_MORE = {"train", "capture", "_inner"}


def test_functions_take_few_parameters():
    wrong = []
    for path in sources():
        inside = path.relative_to(PACKAGE).as_posix()
        for node in ast.walk(tree_of(path)):
            if not isinstance(node, ast.FunctionDef) or any(inside.startswith(part) for part in MANY):
                continue
            every = [each.arg for each in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)]
            count = len([name for name in every if name not in ("self", "cls")])
            if count > MOST_PARAMETERS and node.name not in WITH_MORE:
                wrong.append(f"{path.relative_to(ROOT)}:{node.lineno}: {node.name} takes {count} parameters")
    assert not wrong, "\n".join(wrong)


def test_the_exception_is_inside_function_bodies():
    tree = ast.parse((PACKAGE / "sae" / "model.py").read_text(encoding="utf-8"))
    top = [node for node in tree.body if isinstance(node, ast.ImportFrom)]
    assert not any({"store", "report"} & set((node.module or "").split(".")) for node in top)


def third_party() -> dict[str, set[str]]:
    """Top-level third-party modules -> rooms that import them."""
    found: dict[str, set[str]] = {}
    for path in sources():
        for name, _ in imports(path):
            top = name.split(".")[0]
            if top != "saekit" and top not in sys.stdlib_module_names:
                found.setdefault(top, set()).add(room_of(path))
    return found


def test_third_party_packages_stay_in_their_rooms():
    wrong = {
        module: sorted(rooms - REACH[module])
        for module, rooms in third_party().items()
        if rooms - REACH.get(module, rooms)
    }
    assert not wrong


def declared() -> tuple[set[str], set[str]]:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]

    def names(requirements: list[str]) -> set[str]:
        return {re.split(r"[ <>=!~\[;]", requirement, maxsplit=1)[0].lower() for requirement in requirements}

    extras = [name for group in project["optional-dependencies"].values() for name in names(group)]
    return names(project["dependencies"]), set(extras)


def test_declared_dependencies_are_the_imported_ones():
    imported = {DISTRIBUTIONS.get(module, module) for module in third_party()}
    required, extras = declared()
    assert imported - required - extras == set(), "imported but not declared"
    assert required - imported - NOT_IMPORTED == set(), "declared but not imported"


def test_every_required_package_is_pinned():
    pins = (ROOT / "constraints.txt").read_text().splitlines()
    assert all(re.fullmatch(r"[A-Za-z0-9_.-]+==[A-Za-z0-9.]+", pin) for pin in pins if not pin.startswith("#"))
    pinned = {pin.split("==")[0].lower().replace("_", "-") for pin in pins if not pin.startswith("#")}
    assert {name.replace("_", "-") for name in declared()[0]} <= pinned


def test_no_floor_violation_goes_unseen(tmp_path, monkeypatch):
    """The reader of imports sees every way to write one."""
    folder = tmp_path / "saekit" / "sae"
    folder.mkdir(parents=True)
    file = folder / "x.py"
    file.write_text(
        "from .. import measure\nfrom ..training import loop\nimport saekit.cli.app\n"
        "from saekit import rows\ndef f():\n    from ..report import html\n"
    )
    monkeypatch.setattr(sys.modules[__name__], "PACKAGE", tmp_path / "saekit")
    assert [name for name, _ in imports(file)] == [
        "saekit.measure", "saekit.training", "saekit.cli.app", "saekit.rows", "saekit.report",
    ]  # fmt: skip


@pytest.mark.parametrize("word", ["pickle", "joblib", "trust_remote_code=True", "weights_only=False"])
def test_nothing_that_runs_downloaded_code(word):
    pattern = re.compile(rf"^(?!\s*#).*\b(import {word}|{re.escape(word)}\.load|{re.escape(word)})\b", re.MULTILINE)
    code = {path: path.read_text(encoding="utf-8") for path in sources()}
    used = [str(path.relative_to(ROOT)) for path, text in code.items() if pattern.search(_without_strings(text))]
    assert not used


@functools.cache
def _without_strings(text: str) -> str:
    """Source without docstrings and string constants, which may mention what the code must not do."""
    tree = ast.parse(text)
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            node.value = ""
    return ast.unparse(tree)


def test_the_inner_loop_touches_every_room():
    """`make test-fast` runs files that exist, of every folder of tests."""
    from conftest import FAST

    tests = ROOT / "tests"
    missing = [f"{room}/{name}" for room, names in FAST.items() for name in names
               if not (tests / room / f"test_{name}.py").is_file()]  # fmt: skip
    assert not missing
    assert {path.parent.name for path in tests.glob("*/test_*.py")} <= set(FAST)
