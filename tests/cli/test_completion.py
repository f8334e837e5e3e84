"""What the shell completes, from what is on this machine."""

from __future__ import annotations

import pytest
import typer

from saekit.cli.app import app
from saekit.cli.completion import RANKINGS, models, saes, several_of
from saekit.sizes.attribution import ATTRIBUTIONS
from saekit.sizes.ranking import ORDERS
from saekit.training.architectures import ARCHITECTURES


@pytest.fixture
def place(tmp_path, monkeypatch):
    for name in ("run/topk-seed0/sae.json", "run/run.json", "rows/rows.json", "gpt/config.json", ".git/x"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("{}")
    (tmp_path / "hub" / "models--owner--tiny").mkdir(parents=True)
    with monkeypatch.context() as patch:
        patch.chdir(tmp_path)
        patch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
        yield tmp_path


def test_saes_are_folders(place):
    assert saes("r") == ["rows/", "run", "run/"]
    assert saes("run/") == ["run/topk-seed0"]
    assert saes("run/t") == ["run/topk-seed0"]
    assert saes(f"{place}/ru") == [f"{place}/run", f"{place}/run/"]
    assert saes("nowhere/") == []
    assert ".git/" not in saes("")


def test_models_are_builtin_stored_or_folders(place):
    assert models("b") == ["builtin"]
    assert models("own") == ["owner/tiny"]
    assert models("g") == ["gpt"]
    assert {"builtin", "owner/tiny", "gpt", "run/"} <= set(models(""))


def test_architectures_may_be_several():
    assert several_of(["topk", "relu"])("") == ["topk", "relu"]
    assert several_of(["topk", "relu"])("topk,") == ["topk,topk", "topk,relu"]


def test_rankings_are_those_that_prune_takes():
    assert set(RANKINGS) == {*ORDERS, *ATTRIBUTIONS, "stability"}


def parameter(command: str, name: str):
    commands = typer.main.get_command(app).commands
    return next(each for each in commands[command].params if each.name == name)


@pytest.mark.parametrize(
    ("command", "name", "incomplete", "expected"),
    [
        ("train", "arch", "topk,jump", ["topk,jumprelu"]),
        ("prune", "by", "ene", ["energy"]),
        ("prune", "sae", "run/", ["run/topk-seed0"]),
        ("evaluate", "sae", "run/", ["run/topk-seed0"]),
        ("compare", "sae", "run/", ["run/topk-seed0"]),
        ("progressive", "run", "ru", ["run", "run/"]),
        ("classify", "sae", "run/", ["run/topk-seed0"]),
        ("show", "sae", "run/", ["run/topk-seed0"]),
        *[(each, "model", "buil", ["builtin"]) for each in ("capture", "train", "evaluate", "classify", "transfer",
           "predict", "actions", "demo", "compare", "prune", "progressive")],
    ],
)  # fmt: skip
def test_options_complete(place, command, name, incomplete, expected):
    context = typer.Context(typer.main.get_command(app).commands[command])
    found = [item.value for item in parameter(command, name).shell_complete(context, incomplete)]
    assert found == expected


def test_every_architecture_completes():
    context = typer.Context(typer.main.get_command(app).commands["train"])
    found = [item.value for item in parameter("train", "arch").shell_complete(context, "")]
    assert set(found) == set(ARCHITECTURES)
