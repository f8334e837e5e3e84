"""A file of settings may hold a value of any type for any option: it works, or is refused by the option's name."""

from __future__ import annotations

import json
from typing import Any

import pytest

from saekit.cli import app

# What each command needs besides the option that is tried; nothing of it is there, and nothing is read.
NEEDED: dict[str, tuple[list[str], dict[str, Any]]] = {
    "capture": ([], {"model": "m", "data": "d", "layer": 1, "out": "o"}),
    "train": ([], {"rows": "r", "arch": "topk", "latents": 16, "k": 4, "out": "o"}),
    "evaluate": (["sae"], {"rows": "r"}),
    "compare": (["sae", "sae1"], {}),
    "sources": (["sae"], {"rows": "r"}),
    "prune": (["sae"], {"rows": "r", "sizes": [4], "out": "o"}),
    "progressive": (["sae"], {"rows": "r"}),
    "classify": ([], {"model": "m", "data": "d", "sae": ["s"], "out": "o"}),
    "transfer": ([], {"model": "m", "data": "d", "sae": ["s"], "across": "c", "out": "o"}),
    "actions": ([], {"model": "m", "out": "o"}),
    "verify": (["sae"], {"model": "m", "data": "d"}),
    "plan": ([], {"gpus": 7}),
    "explain": (["sae"], {"model": "m", "data": "d"}),
    "steer": (["sae", "text"], {"model": "m", "latent": ["3"], "strength": 1.0}),
}
WRONG = ("2020-01-01", "{a = 1}", "10000000000000000000000000000000")
TABLES = ("stream.device_map", "device_map")
TEXTS = {"rows", "model", "data", "text", "hook", "images", "out", "device", "split", "start", "by", "frozen", "fit"}
OPTIONS = {each.name: each.known for each in app.COMMANDS if each.known}


def test_every_command_with_settings_is_tried():
    assert {name for name in OPTIONS if "config" in command(name).callback.__annotations__} == NEEDED.keys()


def command(name: str):
    return next(each for each in app.COMMANDS if each.name == name)


@pytest.mark.parametrize("name", NEEDED)
def test_a_value_of_another_type_is_refused_by_its_name(name, call, tmp_path):
    arguments, needed = NEEDED[name]
    wrong = []
    for option, value in tries(OPTIONS[name]):
        (tmp_path / "c.toml").write_text(toml(needed, option, value))
        status, out, err = call(name, *arguments, "--config", "c.toml")
        if status != 2 or out or "Unexpected" in err or not err.startswith("error: "):
            wrong.append((option, value, status, err))
    assert not wrong


def tries(known: dict[str, Any]):
    """Options with values that none of them takes."""
    for name, inner in known.items():
        names = [name, *(f"{name}.{key}" for key in inner)] if isinstance(inner, dict) else [name]
        for option in names:
            for value in WRONG:
                if not (value == "{a = 1}" and (option in TABLES or inner is not None)):
                    yield option, value
        if name in TEXTS:
            yield from ((name, value) for value in ("5", "1.5", "true"))


def toml(needed: dict[str, Any], option: str, value: str) -> str:
    name, _, key = option.partition(".")
    lines = [f"{each} = {json.dumps(given)}" for each, given in needed.items() if each != name]
    return "\n".join([*lines, f"[{name}]\n{key} = {value}" if key else f"{name} = {value}"]) + "\n"
