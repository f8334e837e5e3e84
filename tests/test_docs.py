"""What the documentation names exists, and it speaks the language of the field."""

from __future__ import annotations

import ast
import importlib
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "src" / "saekit"
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]

DOTTED = re.compile(r"(?<![\w/.-])(?:sk|saekit)((?:\.[A-Za-z_]\w*)+)")
FILE_ENDINGS = {"toml", "py", "md", "json", "html", "lock"}


def texts_in(path: Path) -> Iterator[tuple[int, str]]:
    """Docstrings of a module, its classes, functions and attributes, with the lines they begin at."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            yield node.lineno, node.value.value


def documents() -> Iterator[tuple[str, str]]:
    """Every page and docstring, with its place."""
    for page in PAGES:
        yield str(page.relative_to(ROOT)), page.read_text(encoding="utf-8")
    for path in sorted(PACKAGE.rglob("*.py")):
        for line, text in texts_in(path):
            yield f"{path.relative_to(ROOT)}:{line}", text


def resolves(name: str) -> bool:
    """Whether ``saekit.a.b.C.d`` is a module, or an attribute (of a class: an annotation) of one."""
    parts = name.split(".")
    found, rest = importlib.import_module("saekit"), parts[1:]
    while rest:
        if hasattr(found, rest[0]):
            found = getattr(found, rest[0])
        elif rest[0] in getattr(found, "__annotations__", {}):
            return len(rest) == 1
        else:
            try:
                found = importlib.import_module(".".join(parts[: len(parts) - len(rest) + 1]))
            except ImportError:
                return False
        rest = rest[1:]
    return True


def test_dotted_names_in_docstrings_and_pages_resolve():
    wrong = [
        f"{where}: saekit{match[1]}"
        for where, text in documents()
        for match in DOTTED.finditer(text)
        if match[1].split(".")[-1] not in FILE_ENDINGS and not resolves(f"saekit{match[1]}")
    ]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize(
    ("name", "is_there"),
    [
        ("saekit.train", True),
        ("saekit.training.loop.train", True),
        ("saekit.SAE.W_enc", True),
        ("saekit.store.native", True),
        ("saekit.trian", False),
        ("saekit.training.loop.trian", False),
        ("saekit.SAE.W_encoder", False),
        ("saekit.nowhere.train", False),
    ],
)
def test_a_wrong_name_would_be_seen(name, is_there):
    assert resolves(name) is is_there
