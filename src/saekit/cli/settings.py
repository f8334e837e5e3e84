"""Settings from a TOML file, options and ``--set``, in this order of strength, checked against what a command knows."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

from ..errors import ConfigError, FormatError, did_you_mean, listed
from ..files import read_bytes


def merge(
    known: Mapping[str, Any],
    *,
    file: Path | None = None,
    options: Mapping[str, Any] | None = None,
    sets: Sequence[str] | None = None,
    aliases: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """Return one tree of settings.

    Parameters
    ----------
    known
        What the command takes: name -> None for a value, a mapping for a table of values (an empty one takes any
        name), a list for a list of tables.
    file
        A TOML file.
    options
        Command line options; those that are None were not given.
    sets
        ``a.b=value`` texts; the value is read as TOML, and as plain text when it is none.
    aliases
        Other words for names of `known`.

    Raises
    ------
    ConfigError
        The file cannot be read, a name is unknown, or a table stands where a value must.
    """
    words = aliases or {}
    tree: dict[str, Any] = _read(file) if file is not None else {}
    tree = {words.get(name, name): value for name, value in tree.items()}
    _check(tree, known, f"`{file}`", "")
    for name, value in (options or {}).items():
        if value is not None:
            tree[name] = value
    for text in sets or ():
        path, value = _assignment(text)
        path[0] = words.get(path[0], path[0])
        _check(_nested(path, value), known, "--set", "")
        _put(tree, path, value, text)
    return tree


def required(tree: Mapping[str, Any], *names: str, why: str = "", words: Mapping[str, str] | None = None) -> None:
    """Raise `ConfigError` unless every one of `names` has a value; `words` says how they are called in flags."""
    missing = [f"--{(words or {}).get(name, name).replace('_', '-')}" for name in names if tree.get(name) is None]
    if missing:
        raise ConfigError(f"{listed(missing)} must be given{f' {why}' if why else ''}; see --help for examples.")


def whole_numbers(text: str, option: str) -> list[int]:
    """Return ``"0,1,2"`` as numbers.

    >>> whole_numbers("0,1", "--seeds")
    [0, 1]

    Raises
    ------
    ConfigError
        Something between the commas is no whole number.
    """
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise ConfigError(f"{option} must be whole numbers with commas between them; got `{text}`.") from None


def layers_of(text: str) -> list[int] | Literal["all"]:
    """Return ``"4,8,12"`` as layers, and ``"all"`` as it is; raises `ConfigError` for anything else."""
    return "all" if text == "all" else whole_numbers(text, "--layers")


def floats(text: str, option: str) -> list[float]:
    """Return ``"0.1,1"`` as numbers; raises `ConfigError` where something between the commas is none."""
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise ConfigError(f"{option} must be numbers with commas between them; got `{text}`.") from None


def _read(file: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(read_bytes(file).decode("utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"--config must name a TOML file; `{file}` does not exist.") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, RecursionError, FormatError) as error:
        raise ConfigError(f"`{file}` must be TOML; {error}.") from None


def _assignment(text: str) -> tuple[list[str], Any]:
    """Return the path and the value of ``a.b=value``."""
    name, equals, value = text.partition("=")
    if not equals or not name.strip():
        raise ConfigError(f"--set must look like name=value; got `{text}`. Example: --set config.lr=1e-3")
    return name.strip().split("."), _value(value.strip())


def _value(text: str) -> Any:
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text


def _nested(path: Sequence[str], value: Any) -> dict[str, Any]:
    tree = value
    for name in reversed(path):
        tree = [tree] if name.isdigit() else {name: tree}
    return tree if isinstance(tree, dict) else {path[0]: value}


def _check(tree: Any, known: Any, where: str, prefix: str) -> None:
    """Refuse names of `tree` that are not in `known`, and values where `known` has tables or lists."""
    if isinstance(known, list):
        if not _is_list_of_tables(tree):
            raise ConfigError(f"{where}: `{prefix}` must be a list of tables, written [[{prefix}]]; got {tree!r}.")
        return
    if not isinstance(tree, dict):
        raise ConfigError(f"{where}: `{prefix}` must be a table of settings, written [{prefix}]; got {tree!r}.")
    for name, value in tree.items():
        dotted = f"{prefix}.{name}" if prefix else name
        if name in known:
            if known[name] is not None:
                _check(value, known[name], where, dotted)
        elif known or not prefix:
            raise ConfigError(f"{where}: unknown setting `{dotted}`. {_hint(name, known)}")


def _is_list_of_tables(tree: Any) -> bool:
    """Return whether a value is what ``[[name]]`` in a file gives."""
    return isinstance(tree, list) and all(isinstance(item, dict) for item in tree)


def _hint(name: str, known: Mapping[str, Any]) -> str:
    """Return which names were probably meant: those of the same word in a table, or the nearest."""
    deeper = [f"{table}.{name}" for table, inner in known.items() if isinstance(inner, dict) and name in inner]
    return f"Did you mean {listed(deeper)}?" if deeper else did_you_mean(name, known)


def _put(tree: dict[str, Any], path: Sequence[str], value: Any, text: str) -> None:
    at: Any = tree
    for name, following in pairwise(path):
        if isinstance(at, list):
            at = _item(at, name, text)
        else:
            at = at.setdefault(name, [] if following.isdigit() else {})
        if not isinstance(at, dict | list):
            raise ConfigError(f"--set {text}: `{name}` has the value {at!r} and no settings of its own; see --help.")
    if isinstance(at, list):
        _item(at, path[-1], text)
        at[int(path[-1])] = value
    else:
        at[path[-1]] = value


def _item(items: list[Any], name: str, text: str) -> Any:
    if not name.isdigit() or int(name) >= len(items):
        raise ConfigError(f"--set {text}: `{name}` must be an index in a list of {len(items)}, counted from 0.")
    return items[int(name)]
