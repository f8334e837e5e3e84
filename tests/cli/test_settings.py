"""Settings from file, options and --set: order of strength, and what is refused."""

from __future__ import annotations

import pytest

from saekit.cli.settings import merge, required, whole_numbers
from saekit.errors import ConfigError

KNOWN = {"tokens": None, "seeds": None, "lr": None, "config": {"lr": None, "k": None}, "configs": [], "free": {}}


def test_set_beats_options_beat_file(tmp_path):
    file = tmp_path / "run.toml"
    file.write_text("tokens = 1\nseeds = [1]\nlr = 1e-3\n[config]\nk = 3\n[[configs]]\narch = 'topk'\n")
    tree = merge(
        KNOWN, file=file, options={"tokens": 2, "seeds": None}, sets=["tokens=3", "config.lr=0.5", "configs.0.k=9"]
    )
    assert tree == {
        "tokens": 3, "seeds": [1], "lr": 1e-3, "config": {"k": 3, "lr": 0.5}, "configs": [{"arch": "topk", "k": 9}],
    }  # fmt: skip


def test_values_are_toml_and_plain_text_otherwise():
    tree = merge(KNOWN, sets=["tokens=1_000", "seeds=[0, 1]", "lr=bfloat16", "free.x=true", 'free.y="a=b"'])
    assert tree == {"tokens": 1000, "seeds": [0, 1], "lr": "bfloat16", "free": {"x": True, "y": "a=b"}}


def test_set_below_a_value_is_refused():
    with pytest.raises(ConfigError, match="`lr` has the value 'auto' and no settings of its own"):
        merge(KNOWN, options={"lr": "auto"}, sets=["lr.warmup=20"])


def test_set_can_replace_a_table_of_a_list(tmp_path):
    file = tmp_path / "run.toml"
    file.write_text("[[configs]]\narch = 'topk'\n")
    assert merge(KNOWN, file=file, sets=["configs.0={k=9}"]) == {"configs": [{"k": 9}]}
    with pytest.raises(ConfigError, match="`1` must be an index in a list of 1"):
        merge(KNOWN, file=file, sets=["configs.1={k=9}"])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("token=3", r"--set: unknown setting `token`. Did you mean `tokens`\?"),
        ("k=3", r"unknown setting `k`. Did you mean `config.k`\?"),
        ("config.lrr=3", r"unknown setting `config.lrr`. Did you mean `lr`\?"),
        ("tokens", r"must look like name=value; got `tokens`"),
        ("=3", r"must look like name=value"),
        ("config=3", r"`config` must be a table of settings"),
        ("configs=3", r"`configs` must be a list of tables"),
        ("configs.0.k=3", r"`0` must be an index in a list of 0"),
        ("zzz=1", r"Known: `tokens`, `seeds`"),
    ],
)
def test_what_set_refuses(text, message):
    with pytest.raises(ConfigError, match=message):
        merge(KNOWN, sets=[text])


def test_an_item_of_a_list_is_not_replaced(tmp_path):
    file = tmp_path / "run.toml"
    file.write_text("[[configs]]\nk = 1\n")
    with pytest.raises(ConfigError, match="must be a list of tables"):
        merge(KNOWN, file=file, sets=["configs.0=3"])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("tokenz = 1", r"unknown setting `tokenz`. Did you mean `tokens`\?"),
        ("[tokens", "must be TOML"),
        ("configs = [1]", "must be a list of tables"),
    ],
)
def test_what_a_file_may_not_hold(tmp_path, text, message):
    file = tmp_path / "run.toml"
    file.write_text(text)
    with pytest.raises(ConfigError, match=message):
        merge(KNOWN, file=file)


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(ConfigError, match="does not exist"):
        merge(KNOWN, file=tmp_path / "no.toml")


def test_required():
    with pytest.raises(ConfigError, match=r"`--data`, `--batch-rows` must be given with --model"):
        required({"model": "x", "data": None}, "model", "data", "batch_rows", why="with --model")


def test_whole_numbers():
    assert whole_numbers("0, 1,2", "--seeds") == [0, 1, 2]
    with pytest.raises(ConfigError, match="--seeds must be whole numbers"):
        whole_numbers("0,x", "--seeds")
