r"""Names, labels, columns, texts and provenance may hold anything: none gets a terminal or a page to do something.

Every text here holds sequences that clear the screen, set the title, colour, and turn the direction of writing; markup
of rich; and the ends of what a page puts around text. Every command is run on them, and fails on them.
"""

from __future__ import annotations

import ast
import json
from html.parser import HTMLParser
from importlib import resources
from pathlib import Path

import numpy as np
import pytest
import torch

import saekit
from fixtures.tiny_models import make_model
from saekit import SAE
from saekit.cli import app
from saekit.errors import SaekitError
from saekit.sae.rules import TopKRule
from saekit.terminal import is_plain

EVIL = "\x1b[2J\x1b]0;x\x07\x9b31m\u202e\u2066[red]"
HTML = '[/]</script><script>alert(1)</script><!--\'"><img src=x onerror=alert(1)>&\u2028 id="x" $\\frac$'
WIDTH = 16
QUICK = ("evaluate", "compare", "predict", "show", "convert", "report", "catalog")
CHEAP = ("--set", "budget.C=[1.0]", "--set", "budget.thresholds=[0.0]", "--pool", "sum", "--arms", "words,sparse,full")


def named(word: str) -> str:
    return f"{word}{EVIL}"


@pytest.fixture
def place(tmp_path) -> Path:
    """A folder with a hostile name that holds a model, rows, SAEs, labelled texts, and files of no use."""
    place = tmp_path / named("in")
    place.mkdir()
    make_model("llama", place / named("model"))
    np.save(place / f"{named('rows')}.npy", np.random.default_rng(0).normal(size=(512, WIDTH)).astype(np.float32))
    for seed in (0, 1):
        W = torch.randn(24, WIDTH, generator=torch.Generator().manual_seed(seed))
        told = {"model": named("m") + HTML, "hook": "layers.1", "seed": seed, "labels": [EVIL],
                "data": {named("key") + HTML: HTML + EVIL}, "latent_order": "energy"}  # fmt: skip
        sae = SAE(W, torch.zeros(24), W.clone(), torch.zeros(WIDTH), TopKRule(4), provenance=told)
        sae.save(place / named(f"sae{seed}") / named("s"))
    labels = [named("good") + HTML, named("bad")]
    lines = [
        {named("text"): f"{('the cat sat', 'on the mat dog')[i % 2]} {i} {EVIL}", named("label"): labels[i % 2],
         named("lang"): (named("en"), named("fr") + HTML)[i // 40], named("group"): f"{i // 2}{EVIL}"}
        for i in range(80)
    ]  # fmt: skip
    (place / f"{named('texts')}.jsonl").write_text("\n".join(map(json.dumps, lines)))
    (place / f"{named('bad')}.jsonl").write_text("{" + EVIL)
    (place / f"{named('bad')}.npy").write_bytes(EVIL.encode())
    (place / named("broken")).mkdir()
    (place / named("broken") / "sae.json").write_text(json.dumps({"schema": EVIL, named("x"): EVIL}))
    return place


def commands(place: Path) -> list[tuple]:
    model, rows, texts = place / named("model"), place / f"{named('rows')}.npy", place / f"{named('texts')}.jsonl"
    saes = [place / named(f"sae{seed}") / named("s") for seed in (0, 1)]
    columns = ("--text", named("text"), "--label", named("label"))
    both = ("--model", model, "--data", texts, "--text", named("text"))
    classify = ("classify", "--model", model, "--sae", saes[0], "--data", texts)
    found, out = place / named("found"), place / named("run")
    return [
        ("capture", *both, "--layer", 1, "--out", place / named("captured")),
        ("train", "--rows", place / named("captured"), "--arch", "topk,relu", "--latents", 16, "--set", "k=2",
         "--seeds", "0,1", "--tokens", 256, "--set", "batch_rows=64", "--out", out),
        ("train", "--rows", place / named("captured"), "--arch", "topk", "--latents", 16, "--k", 2,
         "--set", "batch_rows=64", "--tokens", 256, "--out", place / named("run2")),
        ("evaluate", *saes, "--rows", rows, "--out", out),
        ("compare", *saes, "--rows", rows, "--out", out),
        ("prune", saes[0], "--by", "energy", "--sizes", "4,8", "--rows", rows, "--out", place / named("pruned")),
        ("progressive", place / named("run2"), "--sizes", "4,8", "--rows", rows, "--out", out),
        (*classify, *columns, "--group", named("group"), *CHEAP, "--ks", "2", "--out", found),
        (*classify, *columns, *CHEAP, "--out", found, "--missing"),
        ("predict", found / "classifier", f"the cat {EVIL}", "--explain"),
        ("predict", found / "classifier", f"the cat {EVIL}"),
        ("predict", found / "classifier"),
        ("transfer", "--model", model, "--sae", saes[0], "--data", texts, *columns, "--across", named("lang"),
         *CHEAP, "--out", place / named("moved")),
        ("actions", "--task", "cloze", *both, "--questions", 8, "--set", "words=[1,40]", "--out", named("acts")),
        ("show", *saes), ("show", place / named("pruned") / "8"), ("show", out),
        ("verify", saes[0], *both, "--layer", 1, "--tokens", 64),
        ("convert", saes[0], place / named("converted"), "--to", "saelens"),
        ("report", out, "--title", EVIL + HTML), ("report", found), ("report", place / named("moved")),
        ("show", place / named("nothing")), ("show", place / named("broken")), ("show", EVIL),
        ("evaluate", *saes, "--rows", place / f"{named('bad')}.npy"), ("evaluate", *saes, "--rows", EVIL),
        ("capture", "--model", model, "--data", place / f"{named('bad')}.jsonl", "--layer", 1, "--out", named("c")),
        ("capture", "--model", EVIL, "--data", texts, "--layer", 1, "--out", named("c")),
        ("capture", *both, "--hook", EVIL, "--out", named("c")),
        ("train", "--rows", rows, "--arch", EVIL, "--latents", 16, "--out", named("c")),
        ("train", "--rows", rows, "--arch", "topk", "--latents", 16, "--set", EVIL, "--out", named("c")),
        (*classify, *columns[:2], "--label", EVIL), ("catalog", EVIL), ("report", place / named("broken")),
        (EVIL,), ("show", f"--{EVIL}"), ("show", "a", f"-{EVIL}"),
    ]  # fmt: skip


@pytest.mark.slow
def test_no_command_passes_on_what_moves_a_terminal(place, call):
    failed = []
    for arguments in commands(place):
        for json_too in ((), ("--json",)) if arguments[0] in QUICK else ((),):
            status, out, err = call(*arguments, *json_too)
            shown = [sign for sign in out + err if not (is_plain(sign) or sign in "\n\t")]
            if shown or "Unexpected error" in err:
                failed.append((arguments[0], json_too, status, shown[:3], err[-300:] if "Unexpected" in err else ""))
    assert not failed
    pages = sorted(place.rglob("report.html"))
    assert len(pages) == 3
    for page in pages:
        assert_only_ours(page.read_text(encoding="utf-8"))
    drawings = sorted(place.rglob("*.svg"))
    assert drawings
    for drawing in drawings:
        assert_only_ours(drawing.read_text(encoding="utf-8"))


OURS = {
    "html", "head", "meta", "title", "style", "body", "h1", "h2", "h3", "nav", "a", "section",
    "details", "summary", "p", "div", "table", "caption", "thead", "tbody", "tr", "th", "td",
    "small", "figure", "figcaption", "script", "svg", "g", "path", "rect", "text", "main", "header",
    "article", "ol", "li", "dl", "dt", "dd", "span", "bdi", "code", "b", "form", "label", "input",
    "select", "option", "kbd",
}  # fmt: skip
SCRIPTS = [{"type": "application/json", "id": "results"}, {"type": "application/json", "id": "latents-data"}, {}]


class Tags(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.scripts: list[dict] = []

    def handle_starttag(self, tag, attrs):
        assert tag in OURS
        assert not any(name.startswith("on") or name == "src" for name, _ in attrs)
        if tag == "script":
            self.scripts.append(dict(attrs))

    def handle_comment(self, data):
        raise AssertionError(f"a comment: {data}")


TEMPLATES = [
    resources.files("saekit").joinpath(f"report/templates/{name}.js").read_text(encoding="utf-8").strip()
    for name in ("page", "browser")
]


def assert_only_ours(text: str) -> None:
    """A page or drawing holds no element that a text brought along, and no sign that is not shown as itself."""
    tags = Tags()
    tags.feed(text)
    assert tags.scripts in ([], SCRIPTS, SCRIPTS[::2])
    assert not [sign for sign in text if not (is_plain(sign) or sign in "\n\t")]
    if tags.scripts:
        data = text.split('id="results">')[1].split("</script>")[0]
        assert "<" not in data
        assert json.loads(data)
        own = text.rpartition("<script>")[2].partition("</script>")[0].strip()
        assert own in (TEMPLATES[0], "".join(TEMPLATES))


def test_errors_warnings_and_results_in_python(tmp_path):
    with pytest.raises(SaekitError) as raised:
        SAE.load(tmp_path / named("nothing"))
    W = torch.ones(2, WIDTH)
    sae = SAE(W, torch.zeros(2), W, torch.zeros(WIDTH), TopKRule(1), provenance={"model": EVIL, "hook": EVIL})
    rows = torch.randn(64, WIDTH, generator=torch.Generator().manual_seed(0))
    result = saekit.evaluate(sae, rows)
    for shown in (str(raised.value), repr(sae), repr(result), *map(str, result.warnings)):
        assert all(is_plain(sign) or sign == "\n" for sign in shown)


def test_one_function_prints():
    """What a command prints goes through `saekit.cli.console`, so that no new one can forget."""
    found = []
    for path in sorted(Path(app.__file__).parent.glob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Attribute) and node.attr in ("echo", "secho", "print", "stdout", "stderr"):
                found.append((path.name, ast.unparse(node)))
    assert found == [("app.py", "sys.stdout"), ("console.py", "typer.echo")]
