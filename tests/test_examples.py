"""The examples of the documentation run as a reader would run them; what needs a network or a file of theirs is read.

Of every example of a command all words and settings are understood by the program of today. Examples whose words name a
model of the hub, ``hf:``, or a file of the reader's (``M``, ``F``, ``texts.csv``) stop there; the others are run, in
the order of the page, in a folder that holds what the pages take for given.
"""

from __future__ import annotations

import ast
import inspect
import re
import shlex
import textwrap
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import saekit as sk
from saekit import SAE
from saekit.cli import app
from saekit.explanation.explanation_result import Card, Example, Explanation
from saekit.measure.results import Measured
from saekit.provenance import facts_of_sae
from saekit.sae.rules import TopKRule

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted((ROOT / "docs").glob("*.md"))
COMMANDS = {each.name: each for each in app.COMMANDS}
RUN = ("show", "catalog", "convert", "report", "push", "compare")
"""Commands that are run here; the tour of the README runs the others (tests/test_readme.py)."""
NOT_HERE = re.compile(r"hf:(?!me/my-sae --dry-run)|\.pt\b|\bA B C\b|--orphans|--rows|--latent |--along")
"""What an example that is not run names: the hub, a file that a reader has, rows to be made."""


def fences(page: Path, language: str) -> list[str]:
    found = re.findall(r"^```(\w*)\n(.*?)^```$", page.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)
    return [text for kind, text in found if kind == language]


def examples() -> Iterator[str]:
    """Lines of the fences that call a command, without the remark behind them."""
    for page in PAGES:
        text = "\n".join(fences(page, "") + fences(page, "sh")).replace("\\\n", "")
        for line in re.findall(r"^(?: *|.* -m )(saekit [a-z].*)$", text, re.MULTILINE):
            yield re.split(r" {2,}", line)[0]


def understood(line: str) -> dict:
    """Return what a command would be called with."""
    name, *words = shlex.split(line)[1:]
    found: list[dict] = []
    builder = inspect.getclosurevars(COMMANDS[name].callback).nonlocals["self"]
    function, builder.function = builder.function, lambda **values: found.append(values)
    try:
        assert app.run([name, *words]) == 0, line
    finally:
        builder.function = function
    return found[0]


def explained(sae: SAE) -> Explanation:
    """What `saekit explain --out out` leaves, of one latent."""
    unknown = Measured(float("nan"), unit="AUC", reason="one latent")
    example = Example(0, 1, ["the", " cat"], [0.0, 2.0])
    card = Card(17, "`cat`", 0.01, 2.0, 2.0, 1.0, 1.0, None, None, None, top=[example])
    facts = {"saekit": "0", "versions": {}, "settings": {"latents": [17]}}
    where = {"model": {"model": "gpt2"}, "hook": "layers.2", "data": {"name": "texts"}}
    means = {"detection": unknown, "detection_null": unknown, "told_fraction": unknown, "fired_fraction": 1.0}
    return Explanation(**facts, sae=facts_of_sae(sae), **where, **means, cards=[card])


@pytest.fixture
def world(tmp_path, monkeypatch):
    """A folder with what the pages take for given: a run with two SAEs, an SAE, and the TOML file of the help."""
    for seed in (0, 1):
        W = torch.randn(64, 8, generator=torch.Generator().manual_seed(seed))
        sae = SAE(W, torch.zeros(64), W.clone(), torch.zeros(8), TopKRule(16), provenance={"hook": "layers.2"})
        sae.save(tmp_path / f"run/topk-1024-k16-seed{seed}")
    W = torch.randn(5000, 4, generator=torch.Generator().manual_seed(2))
    SAE(W, torch.zeros(5000), W.clone(), torch.zeros(4), TopKRule(16)).save(tmp_path / "sae")
    (tmp_path / "run" / "log.jsonl").write_text('{"rows": 8, "learner": "topk-1024-k16-seed0", "fvu": 0.5}\n' * 2)
    explained(sae).save(tmp_path / "out/explanation.json")
    [toml] = re.findall(r"A TOML file holds.*?:\n(.*?)\n\n", (ROOT / "docs/cli.md").read_text(), re.DOTALL)
    (tmp_path / "run.toml").write_text("\n".join(line.strip() for line in toml.splitlines()))
    with monkeypatch.context() as patch:
        patch.chdir(tmp_path)
        yield tmp_path


def test_every_example_is_understood(world, capsys):
    lines = list(examples())
    assert len(lines) > 60
    for line in lines:
        understood(line)
    assert capsys.readouterr().err == ""


def test_examples_run_in_their_order(world, capsys):
    ran = [line for line in examples() if shlex.split(line)[1] in RUN and not NOT_HERE.search(line)]
    assert {shlex.split(line)[1] for line in ran} == {*RUN}
    for line in ran:
        if line == "saekit report demo":
            Path("run").rename("demo")
        capsys.readouterr()
        assert app.run(shlex.split(line)[1:]) == 0, f"{line}\n{capsys.readouterr().err}"
        assert capsys.readouterr().out.strip(), line


@pytest.mark.parametrize("page", [page for page in PAGES if fences(page, "python")], ids=lambda page: page.name)
def test_python_runs_in_its_order(world, page):
    names: dict = {}
    for code in fences(page, "python"):
        *before, last = ast.parse(code).body
        exec(compile(ast.Module([*before, last], []), page.name, "exec"), names)
        if isinstance(last, ast.Expr):
            assert "SAE(4,096 latents" in repr(eval(compile(ast.Expression(last.value), page.name, "eval"), names))


def docstring_examples() -> Iterator[tuple[str, str]]:
    """Where a docstring has an example that calls saekit, and the example."""
    for file in sorted((ROOT / "src").rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef | ast.ClassDef | ast.Module) and (text := ast.get_docstring(node)):
                for block in re.findall(r"::\n\n((?: {4}.*\n?|\n)+)", text + "\n"):
                    if "sk." in block:
                        yield f"{file.name}: {getattr(node, 'name', 'module')}", textwrap.dedent(block)


def test_examples_of_docstrings_call_what_exists():
    """They parse, and name functions with arguments that these take."""
    calls = 0
    for where, code in docstring_examples():
        for node in ast.walk(ast.parse(code, where)):
            if isinstance(node, ast.Attribute) and getattr(node.value, "id", None) == "sk":
                assert hasattr(sk, node.attr), f"{where}: sk.{node.attr}"
            if not isinstance(node, ast.Call) or getattr(getattr(node.func, "value", None), "id", None) != "sk":
                continue
            words = {each.arg: None for each in node.keywords if each.arg}
            try:
                inspect.signature(getattr(sk, node.func.attr)).bind(*node.args, **words)
            except TypeError as wrong:
                pytest.fail(f"{where}: {ast.unparse(node)}: {wrong}")
            calls += 1
    assert calls > 20


def test_no_fence_is_left_out():
    """Every fence is Python, commands for a shell, a manifest that holds one, the help of a command, or a formula."""
    for page in PAGES:
        kinds = set(re.findall(r"^```(\w+)$", page.read_text(encoding="utf-8"), re.MULTILINE))
        assert kinds <= {"python", "sh", "yaml"}
        calls = fences(page, "sh") + fences(page, "yaml")
        assert all(re.search(r"(^|-m )saekit\b", text, re.MULTILINE) for text in calls)
        for text in fences(page, ""):
            assert text.startswith(("Usage: saekit", "u     = scaled x")), f"{page.name}: {text[:60]}"


def test_options_in_running_text_exist():
    for page in (ROOT / "README.md", ROOT / "CHANGELOG.md", ROOT / "CONTRIBUTING.md", *PAGES):
        for name, rest in re.findall(r"`saekit ([a-z]+)([^`]*)`", page.read_text(encoding="utf-8")):
            flags = app.typer.main.get_command(app.app).commands[name].params
            known = {flag for each in flags for flag in (*each.opts, *each.secondary_opts)} | {"--help"}
            assert {*re.findall(r"--[a-z][a-z-]*", rest)} <= known, f"{page.name}: saekit {name}{rest}"
