"""Commands: a function's parameters are the command's options, each declared once.

::

    @command("Measure SAEs.", HELP, flags=("controls",))
    def evaluate(sae: Saes, *, rows: Rows | None = None, settings: EvaluateSettings, json: Json = False) -> None: ...

A parameter is an argument or an option of `saekit.cli.options` (or an ``Annotated`` one of its own), or a settings
class, whose fields become options: name, type, default and help text are those of the field. The fields that are named
in `flags` or like a shared option become flags; every field can be set by ``--set name=value`` and in the TOML file of
``--config``, and is described in the command's help. An option without a default must be given in one of these ways.
Commands without settings have neither ``--config`` nor ``--set``.
"""

from __future__ import annotations

import copy
import dataclasses
import inspect
import os
import textwrap
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from ..errors import ConfigError
from ..files import check_folder
from ..kinds import called, fits, hints_of, says_none
from ..settings import attribute_docs
from .options import SHARED, ConfigFile, Json, Out, Set
from .settings import floats, merge, required, whole_numbers

_ArgumentInfo, _OptionInfo = type(typer.Argument()), type(typer.Option())


class Interrupted(Exception):
    """Ctrl-C or SIGTERM during a command; typer would end the program without a word."""


METAVARS = {int: "N", float: "X", str: "NAME", Path: "PATH"}
"""What stands for a value of a type in the help."""


@dataclass(frozen=True)
class Table:
    """Marks a parameter that is set as a table of its own, ``[name]`` in a file and ``--set name.key=value``.

    Parameters
    ----------
    kinds
        Classes whose fields are the keys of a mapping; not needed for a settings class.
    also
        Further keys.
    repeated
        Whether it is a list of tables, ``[[name]]``.
    """

    kinds: Sequence[type] = ()
    also: Sequence[str] = ()
    repeated: bool = False

    def fields(self, hint: Any) -> dict[str, _Option]:
        """Return the options of the table."""
        kinds = [hint] if dataclasses.is_dataclass(hint) else self.kinds
        found: dict[str, _Option] = {}
        having: dict[str, list[str]] = {}
        for one in kinds:
            for option in _fields(one):
                found.setdefault(option.name, option)
                having.setdefault(option.name, []).append(getattr(one, "arch", ""))
        for name, owners in having.items():
            if len(owners) < len(kinds):  # a setting of some of the kinds only
                found[name] = dataclasses.replace(found[name], help=f"{', '.join(owners)}: {found[name].help}")
        return found


@dataclass(frozen=True)
class Setting:
    """Marks a parameter that has no flag: it is set by ``--set`` and in files only."""

    help: str


@dataclass(frozen=True)
class Command:
    """One command of the program."""

    function: Callable[..., None]
    """What it does, given the values of its options."""
    short_help: str
    """One line for the list of commands."""
    help: str
    """The text of its own help page."""
    epilog: str
    """The settings that have no flag."""
    callback: Callable[..., None]
    """The function that typer calls; its signature holds all arguments and flags."""
    known: Mapping[str, Any]
    """What a file of settings may hold, as `saekit.cli.settings.merge` takes it."""

    @property
    def name(self) -> str:
        """The word after ``saekit``."""
        return self.function.__name__


def command(
    short_help: str,
    help: str,
    *,
    flags: Sequence[str] = (),
    named: Mapping[str, str] | None = None,
    ranked: bool = False,
) -> Callable[[Callable[..., None]], Command]:
    """Decorate a function to make it a command.

    Parameters
    ----------
    short_help, help
        One line, and the whole text.
    flags
        Fields of settings classes that become flags, in this order.
    named
        Flags whose name is not that of their field: ``{"max_rows": "--limit"}``.
    ranked
        Whether its work is split over the processes that `torchrun` starts; others refuse to be started several times.
    """
    return lambda function: _Builder(function, flags, named or {}).command(short_help, help, ranked)


def _as_rank(name: str, ranked: bool) -> AbstractContextManager[object]:
    """Return what a command runs in: as one of the ranks that were launched, where there are several."""
    if "WORLD_SIZE" not in os.environ:  # spare most commands the import of torch
        return nullcontext()
    from ..ranks import refuse, together

    if not ranked:
        refuse(name)
        return nullcontext()
    return together(name)


@dataclass(frozen=True)
class _Option:
    """One option or argument."""

    name: str
    hint: Any
    """Its type, without None."""
    info: Any
    """How typer shows it; None where it has no flag."""
    help: str
    is_required: bool = False
    whole: Any = None
    """Its type as it is annotated, where that says more."""


class _Builder:
    """The options of a function, and the command that they make."""

    def __init__(self, function: Callable[..., None], flags: Sequence[str], named: Mapping[str, str]) -> None:
        self.function, self.named = function, named
        self.arguments: list[_Option] = []
        self.options: dict[str, _Option] = {}
        self.flags: list[str] = []
        """Options that have a flag, in the order of the help."""
        self.settings: dict[str, type] = {}
        """Parameters whose fields are options."""
        self.tables: dict[str, tuple[Any, Table]] = {}
        self.json = False
        hints = typing.get_type_hints(function, include_extras=True)
        self.parameters = inspect.signature(function).parameters
        for name, parameter in self.parameters.items():
            self._add(name, hints[name], parameter.default is inspect.Parameter.empty, flags)
        for flag in {*flags, *named} - {*self.flags}:
            raise ConfigError(f"{function.__name__}: `flags` must name fields of its settings; got `{flag}`.")
        self.aliases = {self._word(name): name for name in self.options}

    def _add(self, name: str, hint: Any, is_required: bool, flags: Sequence[str]) -> None:
        hint, info = _unpacked(hint)
        if isinstance(info, Table):
            self.tables[name] = (hint, info)
        elif info is None:
            self._add_settings(name, hint, flags)
        elif isinstance(info, _ArgumentInfo):
            self.arguments.append(_Option(name, hint, info, "", is_required))
        elif name == "json":
            self.json = True
        elif isinstance(info, Setting):
            self.options[name] = _Option(name, hint, None, info.help, is_required)
        else:
            self.options[name] = _Option(name, hint, info, info.help or "", is_required)
            self.flags.append(name)

    def _add_settings(self, name: str, kind: type, flags: Sequence[str]) -> None:
        """Add the fields of a settings class; a field of two classes is one option."""
        self.settings[name] = kind
        fields = {option.name: option for option in _fields(kind) if option.name not in self.options}
        self.options |= fields
        self.flags += [each for each in flags if each in fields]
        self.flags += [each for each, option in fields.items() if option.info is not None and each not in flags]

    def _word(self, name: str) -> str:
        """Return the flag without dashes, as a key."""
        declared = self.named.get(name)
        info = self.options[name].info
        if declared is None and info is not None:
            declared = info.default if isinstance(info.default, str) else f"--{name}"
        return (declared or name).split("/")[0].lstrip("-").replace("-", "_")

    def command(self, short_help: str, help: str, ranked: bool) -> Command:
        def callback(**given: Any) -> None:
            try:
                with _as_rank(self.function.__name__, ranked):
                    self.function(**self.values(given))
            except KeyboardInterrupt as error:
                raise Interrupted(str(error)) from error

        callback.__name__ = self.function.__name__
        callback.__signature__ = inspect.Signature(self._parameters())  # type: ignore[attr-defined]
        callback.__annotations__ = {each.name: each.annotation for each in self._parameters()}
        return Command(self.function, short_help, help, self._epilog(), callback, self._known())

    def _parameters(self) -> list[inspect.Parameter]:
        found: list[tuple[str, Any, Any]] = []
        for each in self.arguments:
            default = inspect.Parameter.empty if each.is_required else None
            hint = each.hint if each.is_required else each.hint | None
            found.append((each.name, Annotated[hint, _as_given(each.hint, each.info)], default))
        found += [(name, self._annotation(self.options[name]), None) for name in self.flags]
        if self.settings or self.tables or set(self.options) - set(self.flags):
            found += [("config", ConfigFile, None), ("set_", Set, None)]
        if self.json:
            found.append(("json", Json, False))
        kind = inspect.Parameter.KEYWORD_ONLY
        return [inspect.Parameter(name, kind, annotation=hint, default=default) for name, hint, default in found]

    def _annotation(self, option: _Option) -> Any:
        """Return the type and look of a flag."""
        shown: Any = option.hint if option.hint in (int, float, bool, str, Path) else str
        if typing.get_origin(option.hint) is list:
            shown = list[str]
        if option.info is not None:
            return Annotated[shown | None, _as_given(shown, option.info)]
        name = self.named.get(option.name, f"--{option.name.replace('_', '-')}")
        if shown is bool and "/" not in name and option.name in self._true():
            name = f"{name}/--no-{name.removeprefix('--')}"
        metavar = None if shown is bool else METAVARS[shown] if shown is option.hint else _many(option.hint)
        return Annotated[shown | None, _as_given(shown, typer.Option(name, metavar=metavar, help=option.help))]

    def _true(self) -> set[str]:
        fields = [field for each in self.settings.values() for field in dataclasses.fields(each)]
        return {field.name for field in fields if field.default is True}

    def _epilog(self) -> str:
        """Return the list of settings without a flag."""
        rest: dict[str, str] = {}
        for name, option in self.options.items():
            if dataclasses.is_dataclass(option.hint):
                rest |= {f"{name}.{each.name}": each.help for each in _fields(option.hint)}
            elif name not in self.flags:
                rest[name] = option.help
        for name, (hint, table) in self.tables.items():
            rest |= {f"{name}.{key}": option.help for key, option in table.fields(hint).items()}
        if not rest:
            return ""
        width = min(max(map(len, rest)), 24)
        lines = ["Settings without a flag, for --set and --config:"]
        for name, text in rest.items():
            indent = " " * (width + 4)
            wrapped = textwrap.wrap(text, 104 - width) or [""]
            lines += [f"  {name.ljust(width)}  {wrapped[0]}", *(indent + line for line in wrapped[1:])]
        return "\b\n" + "\n".join(lines)

    def _known(self) -> dict[str, Any]:
        """Return what `merge` knows: every option, and every table with its keys."""
        known: dict[str, Any] = {}
        for name, option in self.options.items():
            nested = dataclasses.is_dataclass(option.hint)
            known[name] = {each.name: None for each in _fields(option.hint)} if nested else None
        for name, (hint, table) in self.tables.items():
            known[name] = [] if table.repeated else dict.fromkeys([*table.fields(hint), *table.also])
        return known

    def _values_of(self, tree: Mapping[str, Any]) -> dict[str, Any]:
        """Return the options that were given, as the types they have."""
        words = {name: self._word(name) for name in self.options}
        required(tree, *(name for name, each in self.options.items() if each.is_required), words=words)
        return {
            name: converted(
                tree[name],
                option.whole or option.hint,
                f"--{words[name].replace('_', '-')}" if name in self.flags else f"`{name}` (--set {name}=…)",
            )
            for name, option in self.options.items()
            if tree.get(name) is not None
        }

    def values(self, given: dict[str, Any]) -> dict[str, Any]:
        """Return the arguments of the function, from what typer read."""
        passed: dict[str, Any] = {each.name: _path(given.pop(each.name), each) for each in self.arguments}
        if self.json:
            passed["json"] = given.pop("json")
        file, sets = given.pop("config", None), given.pop("set_", None)
        options = {name: value for name, value in given.items() if value != []}  # an option that repeats, not given
        file = None if file is None else converted(file, Path, "--config")
        tree = merge(self._known(), file=file, options=options, sets=sets, aliases=self.aliases)
        found = self._values_of(tree)
        for name, kind in self.settings.items():
            mine = {field.name for field in dataclasses.fields(kind)}
            passed[name] = kind(**{each: value for each, value in found.items() if each in mine})
        for name, (hint, table) in self.tables.items():
            passed[name] = converted(tree.get(name, [] if table.repeated else {}), hint, name)
        passed |= {name: found[name] for name in self.parameters if name in found}
        if "out" in passed and self.options["out"].info is _unpacked(Out)[1]:
            check_folder(passed["out"])  # now, not after hours
        return passed


def _as_given(kind: Any, info: Any) -> Any:
    """Return how typer shows a value; of a path, it hands on the text, for ``Path("")`` is the folder of now."""
    if kind is Path:
        info = copy.copy(info)
        info.path_type = str
    return info


def _path(value: Any, argument: _Option) -> Any:
    return converted(value, Path, argument.info.metavar) if argument.hint is Path and value is not None else value


def converted(value: Any, hint: Any, where: str) -> Any:
    """Return a value from TOML or the command line as the type of an option.

    Texts with commas become tuples, tables become settings classes, and ``none`` becomes None where that can be.

    >>> converted("1,2", tuple[int, ...], "--sizes")
    (1, 2)

    Raises
    ------
    ConfigError
        The value is of another kind.
    """
    if says_none(value, hint):
        return None
    kind, _ = _unpacked(hint)
    if dataclasses.is_dataclass(kind) and isinstance(value, Mapping):
        hints = {option.name: option.whole for option in _fields(kind)}
        make: Any = kind
        return make(**{key: converted(each, hints[key], f"{where}.{key}") for key, each in value.items()})
    found = _as(value, kind, where)
    if not fits(found, hint):
        quotes = ' Put it into quotes: "…".' if called(hint) == "a text" and isinstance(value, int | float) else ""
        raise ConfigError(f"{where} must be {called(hint)}; got {value!r}.{quotes}")
    return found


def _as(value: Any, kind: Any, where: str) -> Any:
    """Return a value as another type where TOML or the shell has none: paths, lists of one, tuples."""
    if kind is Path and isinstance(value, str):
        if not value:
            raise ConfigError(f"{where} must be a path; got an empty text. `.` is the folder that you are in.")
        return Path(value)
    if typing.get_origin(kind) is list and isinstance(value, str):
        return [value]
    if _is_sequence(kind):
        if isinstance(value, str):
            return tuple(_split(value, kind, where))
        return tuple(value) if isinstance(value, list | tuple) else (value,)
    return value


def _split(text: str, hint: Any, where: str) -> list[Any]:
    kind = typing.get_args(hint)[0]
    if kind is int:
        return whole_numbers(text, where)
    return floats(text, where) if kind is float else [part.strip() for part in text.split(",")]


def _is_sequence(hint: Any) -> bool:
    origin = typing.get_origin(hint)
    return isinstance(origin, type) and issubclass(origin, Sequence) and origin is not list


def _many(hint: Any) -> str:
    """Return what stands for several values."""
    if not _is_sequence(hint):
        return "NAME"
    return {int: "N,N", float: "X,X"}.get(typing.get_args(hint)[0], "A,B")


def _unpacked(hint: Any) -> tuple[Any, Any]:
    """Return a type without None and its annotation."""
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        rest = [each for each in typing.get_args(hint) if each is not type(None)]
        if len(rest) > 1:
            kinds = [each for each in rest if _is_sequence(each)]
            return (kinds or rest)[0], None
        hint = rest[0]
    if typing.get_origin(hint) is Annotated:
        kind, info = typing.get_args(hint)[:2]
        return _unpacked(kind)[0], info
    return hint, None


def _fields(kind: Any) -> list[_Option]:
    """Return the options that a settings class declares."""
    docs, hints = attribute_docs(kind), hints_of(kind, str)
    found = []
    for field in dataclasses.fields(kind):
        hint, info = _unpacked(SHARED.get(field.name, hints[field.name]))
        text = docs.get(field.name, "").replace("``", "`")
        if info is not None and text:  # the flag is the shared one; what it is for, and its default, says the field
            info = copy.copy(info)
            info.help = text
        found.append(_Option(field.name, hint, info, text, whole=hints[field.name]))
    return found
