"""Commands from functions: flags, files and --set follow from one declaration."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import pytest
import typer

from saekit.cli.command import Command, Table, command, converted
from saekit.cli.options import Json, Out, Rows, Text
from saekit.errors import ConfigError
from saekit.training.architectures import config_from_dict

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Adam:
    lr: float = 1e-3
    """Learning rate [0.001]."""


@dataclass(frozen=True, kw_only=True)
class Budget:
    C: tuple[float, ...] = (1.0,)
    """Penalties [1]."""


@dataclass(frozen=True, kw_only=True)
class Settings:
    max_rows: int | None = None
    """Maximum number of rows [all]."""
    sizes: tuple[int, ...] = ()
    """Numbers of latents [none]."""
    controls: bool = True
    """Whether to measure controls [yes]."""
    refit: bool = False
    """Whether to refit [no]."""
    by: str | Tensor = "energy"
    """What latents are ranked by [energy]."""
    draws: int = 1000
    """Number of resamples [1000]."""
    text: str = "text"
    """Column of the texts [text]."""
    budget: Budget = field(default_factory=Budget)
    """What may be spent."""


@pytest.fixture
def run():
    """The command as a program that returns what the function got."""
    got: list[dict[str, Any]] = []

    @command(
        "Do it.", "Do it, at length.", flags=("max_rows", "sizes", "controls", "refit"), named={"max_rows": "--limit"}
    )
    def act(
        sae: Annotated[list[str], typer.Argument()],
        *,
        rows: Rows | None = None,
        keep: Annotated[tuple[str, ...] | None, typer.Option("--keep", help="Names to keep.")] = None,
        settings: Settings,
        extra: Annotated[dict[str, Any], Table(kinds=(Adam,), also=("k",))],
        tables: Annotated[list[dict[str, Any]], Table(repeated=True)],
        out: Out,
        json: Json = False,
    ) -> None:
        got.append(dict(locals()))
        got[-1].pop("got")

    app = typer.Typer(rich_markup_mode=None)
    register(app, act)

    def call(*arguments: str) -> dict[str, Any]:
        typer.main.get_command(app).main(args=list(arguments), standalone_mode=False)
        return got.pop()

    return call


def register(app: typer.Typer, each: Command) -> None:
    app.command(each.name, help=each.help, epilog=each.epilog)(each.callback)


def test_nothing_given_is_the_defaults_of_the_class(run):
    found = run("a", "b", "--out", "o")
    assert found["settings"] == Settings()
    assert found["sae"] == ["a", "b"]
    assert found["out"] == Path("o")
    assert found["rows"] is None
    assert (found["extra"], found["tables"], found["json"]) == ({}, [], False)


def test_flags_have_the_types_of_the_fields(run):
    found = run(
        "a", "--out", "o", "--limit", "7", "--sizes", "1, 2", "--no-controls", "--refit", "--json", "--keep", "x,y"
    )
    assert found["settings"] == Settings(max_rows=7, sizes=(1, 2), controls=False, refit=True)
    assert found["keep"] == ("x", "y")
    assert found["json"] is True


def test_a_field_with_the_name_of_a_shared_option_is_that_option(run):
    assert run("a", "--out", "o", "--text", "body")["settings"].text == "body"


def test_set_beats_flags_beat_file(run, tmp_path):
    file = tmp_path / "c.toml"
    file.write_text(
        'out = "o"\nrows = "r"\nmax_rows = 1\nsizes = [1]\nby = "file"\n[budget]\nC = [0.5, 2]\n[extra]\nlr = 1\n'
        "[[tables]]\nany = 3\n"
    )
    found = run(
        "a", "--config", str(file), "--limit", "2", "--set", "sizes=[5]", "--set", "extra.k=2", "--set", "draws=9"
    )
    assert found["settings"] == Settings(max_rows=2, sizes=(5,), by="file", draws=9, budget=Budget(C=(0.5, 2)))
    assert found["extra"] == {"lr": 1, "k": 2}
    assert found["tables"] == [{"any": 3}]
    assert found["rows"] == "r"


def test_a_key_may_be_the_name_of_the_flag(run):
    assert run("a", "--out", "o", "--set", "limit=3")["settings"].max_rows == 3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "`--out` must be given"),
        (("--out", "o", "--set", "drws=3"), "unknown setting `drws`. Did you mean `draws`"),
        (("--out", "o", "--set", "extra.lrr=3"), "unknown setting `extra.lrr`"),
        (("--out", "o", "--set", "budget.c=3"), r"unknown setting `budget.c`. Known: `C`"),
        (("--out", "o", "--sizes", "1,x"), "--sizes must be whole numbers"),
        (("--out", "o", "--set", "json=true"), "unknown setting `json`"),
    ],
)
def test_what_is_refused(run, arguments, message):
    with pytest.raises(ConfigError, match=message):
        run("a", *arguments)


def test_help_has_every_setting(run, capsys):
    run_help = typer.Typer(rich_markup_mode=None)
    register(run_help, _documented)
    typer.main.get_command(run_help).main(args=["--help"], standalone_mode=False)
    out = " ".join(capsys.readouterr().out.split())
    for text in (
        "--limit N Maximum number of rows [all].", "--sizes N,N Numbers of latents [none].",
        "--controls / --no-controls Whether to measure controls [yes].", "--refit Whether to refit [no].",
        "--text COLUMN", "draws Number of resamples [1000].", "by What latents are ranked by [energy].",
        "budget.C Penalties [1].",
    ):  # fmt: skip
        assert text in out


@command("Do it.", "Do it.", flags=("max_rows", "sizes", "controls", "refit"), named={"max_rows": "--limit"})
def _documented(*, settings: Settings) -> None:
    """Nothing."""


def test_flags_must_be_fields():
    with pytest.raises(ConfigError, match="`flags` must name fields of its settings; got `siezs`"):
        command("", "", flags=("siezs",))(_documented.function)


def test_converted():
    assert converted(3, tuple[int, ...], "--sizes") == (3,)
    assert converted([0.5, 1], tuple[float, ...], "--C") == (0.5, 1)
    assert converted("0.5,1", tuple[float, ...], "--C") == (0.5, 1)
    assert converted("a", list[str], "--sae") == ["a"]
    assert converted({"C": 2}, Budget, "budget") == Budget(C=(2,))
    assert converted("none", float | None, "--outliers") is None
    assert converted("none", str | None, "--control") == "none"  # may be a name
    assert config_from_dict({"arch": "topk", "latents": 8, "k": 2, "clip": "none", "scaling": "none"}).clip is None
    with pytest.raises(ConfigError, match="must be a number; got 'none'"):
        converted("none", float, "--C")
    assert Text  # its column is an option of its own


def test_help_says_which_architectures_have_a_setting():
    from saekit.cli.train import train

    help = " ".join(train.epilog.split())
    assert "config.lr Peak learning rate of Adam" in help
    assert "config.levels hierarchical-topk: Latents per row at each level" in help
    assert "config.target_l0 jumprelu, relu, gated, p-anneal: Mean latents per row" in help


@pytest.mark.parametrize(
    ("arguments", "word", "value"),
    [(("--lr", "0.01"), "lr", 0.01), (("--set", "config.lr=0.02"), "lr", 0.02), ((), "lr", None)],
)
def test_the_learning_rate_is_an_option(arguments, word, value, monkeypatch, tmp_path):
    from saekit.cli import app
    from saekit.training import loop

    got = []

    def stop(configs, rows, **rest):
        got.append((configs, rest))
        raise ConfigError("enough")

    with monkeypatch.context() as patch:
        patch.setattr(loop, "train", stop)
        patch.setattr("saekit.rows.shards.open_rows", lambda path: path)
        app.run(
            ["train", "--rows", "R", "--arch", "topk", "--latents", "8", "--k", "2", "--out", str(tmp_path),
             "--batch-rows", "64", "--device", "cpu", *arguments]
        )  # fmt: skip
    [([config], rest)] = got
    assert getattr(config, word) == value
    assert (rest["settings"].batch_rows, rest["settings"].device) == (64, "cpu")
