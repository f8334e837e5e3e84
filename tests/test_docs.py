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


def test_no_page_holds_the_marks_of_a_merge():
    marks = re.compile(r"^(<{7}|>{7}|={7}$)", re.MULTILINE)
    pages = [*PAGES, ROOT / "CHANGELOG.md", *sorted(ROOT.glob("benchmarks/*.md")), *sorted(ROOT.glob("studies/*/*.md"))]
    assert not [str(page) for page in pages if marks.search(page.read_text(encoding="utf-8"))]


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


# ------------------------------------------------------------------ the glossary


def glossary() -> list[tuple[str, re.Pattern[str]]]:
    """Words to write, with the pattern of what is not written."""
    page = (ROOT / "docs" / "glossary.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (.+?) \| .+? \| `(.+)` \|$", page, re.MULTILINE)
    return [(word, re.compile(pattern, re.IGNORECASE | re.MULTILINE)) for word, pattern in rows]


def public_docstrings(path: Path) -> Iterator[tuple[int, str]]:
    """Docstrings of a module and of what is public in it: classes, functions, methods, attributes."""

    def of(body: list[ast.stmt]) -> Iterator[tuple[int, str]]:
        for before, node in zip([None, *body], body, strict=False):
            if (
                isinstance(node, ast.Expr)
                and isinstance(node.value, ast.Constant)
                and isinstance(node.value.value, str)
            ):
                target = getattr(before, "target", None) or (getattr(before, "targets", None) or [None])[0]
                if not (isinstance(target, ast.Name) and target.id.startswith("_")):
                    yield node.lineno, node.value.value
            elif isinstance(node, ast.ClassDef | ast.FunctionDef) and not node.name.startswith("_"):
                yield from of(node.body)

    yield from of(ast.parse(path.read_text(encoding="utf-8")).body)


def prose(text: str) -> str:
    """Text without code: blocks, what stands in backticks, and in docstrings the lines with names of parameters."""
    text = re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)
    text = re.sub(r"^ *[a-z_]+(, [a-z_]+)*$", "", text, flags=re.MULTILINE)
    return re.sub(r"``[^`]+``|`[^`\n]+`", "`code`", text)


def findings(text: str) -> list[str]:
    """What the glossary does not want in a text, with the word to write."""
    return [
        f"{match[0].strip()!r}: write {word}" for word, pattern in glossary() for match in pattern.finditer(prose(text))
    ]


def rooms() -> list[str]:
    return sorted({path.relative_to(PACKAGE).parts[0] for path in PACKAGE.rglob("*.py")})


@pytest.mark.parametrize("room", rooms())
def test_public_docstrings_use_the_words_of_the_glossary(room):
    paths = [PACKAGE / room] if room.endswith(".py") else sorted((PACKAGE / room).rglob("*.py"))
    wrong = [
        f"{path.relative_to(ROOT)}:{line}: {found}"
        for path in paths
        for line, text in public_docstrings(path)
        for found in findings(text)
    ]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize(
    "page",
    [*(page for page in PAGES if page.stem not in ("glossary", "cli", "api")), *sorted(ROOT.glob("studies/*/*.md"))],
    ids=lambda page: str(page.relative_to(ROOT)),
)
def test_pages_use_the_words_of_the_glossary(page):
    wrong = findings(page.read_text(encoding="utf-8"))
    assert not wrong, "\n".join(wrong)


def test_help_uses_the_words_of_the_glossary():
    """`docs/cli.md` is what `--help` prints, in one block."""
    text = re.sub(r"^```$", "", (ROOT / "docs" / "cli.md").read_text(encoding="utf-8"), flags=re.MULTILINE)
    wrong = findings(re.sub(r"\s+", " ", text))
    assert not wrong, "\n".join(wrong)


def test_options_are_noun_phrases():
    text = (ROOT / "docs" / "cli.md").read_text(encoding="utf-8")
    options = re.findall(r"^ +(?:-\w, )?--[\w-]+.*?  +([A-Z].*)$", text, re.MULTILINE)
    assert len(options) > 100
    wrong = [option for option in options if option.startswith(("Of ", "Most ", "Least ", "What ", "How "))]
    assert not wrong, "\n".join(wrong)


def test_a_word_that_is_not_wanted_would_be_seen():
    assert len(glossary()) >= 15
    assert findings("An SAE stands beside its controls.") == ["'beside': write compared with, next to"]
    assert findings("`beside` and ``silence the latents`` are names.") == []
    assert findings("Seed.\n\nOf the split.") == ["'Of t': write random seed for …"]
