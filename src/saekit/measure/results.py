"""What a measurement returns: a value with its interval, and strict JSON for whole results.

A result is a frozen dataclass of plain parts: numbers, strings, booleans, lists, dicts with string keys, `Measured` and
further such dataclasses. It names its ``kind`` and ``schema`` version, and reads back equal to what was written.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import os
import types
import typing
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Self, TypeVar

from ..errors import FormatError, did_you_mean
from ..files import read_json, unsealed, write_sealed
from ..places import Warned
from ..settings import check_choice
from .numbers import decimals
from .tables import html_table, text_table

if TYPE_CHECKING:
    import pandas


@dataclass(frozen=True)
class Measured:
    """A number with its unit and, where available, its interval.

    Parameters
    ----------
    value
        The number. NaN where it is not defined (0 / 0, say); `reason` then says why. JSON holds ``null`` for it.
    low, high
        Ends of the interval (95 % unless the result says otherwise), both None where there is none; `reason` says why.
    unit
        ``"fraction"``, ``"nats per token"``, ``"latents per row"``, ...
    reason
        Why there is no value or no interval, or what the interval comes from when that is not the usual thing.

    Examples
    --------
    >>> print(Measured(0.3118, 0.29, 0.3301, "fraction"))
    0.312 [0.29, 0.33]
    >>> f"{Measured(0.5, None, None, 'fraction', 'one document'):.2f}"
    '0.50'
    """

    value: float
    low: float | None = None
    high: float | None = None
    unit: str = ""
    reason: str | None = None

    def __post_init__(self) -> None:
        # One NaN object for all, so that results with an undefined number still compare equal.
        object.__setattr__(self, "value", math.nan if math.isnan(self.value) else float(self.value))
        for name in ("low", "high"):
            end = getattr(self, name)
            if end is not None:
                object.__setattr__(self, name, None if math.isnan(end) else float(end))

    def __float__(self) -> float:
        return self.value

    def __format__(self, spec: str) -> str:
        if not self.is_defined:
            return "undefined"
        if self.low is None or self.high is None:
            return format(self.value, spec) if spec or not math.isfinite(self.value) else decimals(self.value)
        if spec:
            return f"{format(self.value, spec)} [{format(self.low, spec)}, {format(self.high, spec)}]"
        # As many decimals as tell the ends apart, and no more: the rest is not known.
        ends = _decimals((self.high - self.low) / 4)
        value = self.value
        if not 0 <= ends <= 6:
            return f"{value:.3g} [{self.low:.2g}, {self.high:.2g}]"
        shown = min(6, max(ends, _decimals(value) + 2)) if value else ends
        return f"{value:.{max(shown, 0)}f} [{self.low:.{ends}f}, {self.high:.{ends}f}]"

    def __str__(self) -> str:
        return format(self, "")

    def __repr__(self) -> str:
        unit = f" {self.unit}" if self.unit else ""
        return f"<{self}{unit}{f' ({self.reason})' if self.reason else ''}>"

    @property
    def is_defined(self) -> bool:
        """False where the value is NaN."""
        return not math.isnan(self.value)

    def to_json(self) -> dict[str, Any]:
        """``{"value", "low", "high", "unit"[, "reason"]}``; NaN and infinity become null."""
        plain: dict[str, Any] = {
            "value": self.value if math.isfinite(self.value) else None,
            "low": self.low if self.low is not None and math.isfinite(self.low) else None,
            "high": self.high if self.high is not None and math.isfinite(self.high) else None,
            "unit": self.unit,
        }
        if self.reason is not None:
            plain["reason"] = self.reason
        return plain

    @classmethod
    def from_json(cls, plain: object, where: str = "measured") -> Measured:
        """Return what `to_json` made it from.

        Raises
        ------
        FormatError
            A key is missing or unknown, or a number is not a number.
        """
        if not isinstance(plain, dict):
            raise FormatError(f"`{where}` must be an object with `value`, `low`, `high`, `unit`; it is {plain!r}.")
        _check_keys(plain, ("value", "low", "high", "unit", "reason"), ("value", "low", "high", "unit"), where)
        numbers = {name: _number(plain[name], f"{where}.{name}") for name in ("value", "low", "high")}
        value = numbers["value"]
        return cls(
            math.nan if value is None else value,
            numbers["low"],
            numbers["high"],
            str(plain["unit"]),
            plain.get("reason"),
        )


@dataclass(frozen=True)
class Result:
    """What a question was answered with: settings, versions and numbers that round-trip through JSON.

    A kind of result is a subclass, ``@dataclass(frozen=True, repr=False)``, with `KIND`, `SCHEMA`, further fields and
    `table`; files, text, HTML and pandas follow from these.
    """

    KIND: ClassVar[str]
    """Name of the kind in files."""
    SCHEMA: ClassVar[int]
    """Version of the layout; files of older versions are read, of newer ones refused."""

    saekit: str
    """Version of saekit that made it."""
    versions: dict[str, str]
    """Versions of Python and of the libraries that it ran on."""
    settings: dict[str, Any]
    """What was asked for, with the level and the source of the intervals."""
    warnings: list[Warned] = field(default_factory=list, kw_only=True)
    """What a reader must know before believing the numbers: SAEs on other rows than their own, say."""

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON: ``kind``, ``schema`` and every field."""
        return result_to_json(self)

    @classmethod
    def from_json(cls, plain: Any, where: str = "result") -> Self:
        """Return the result that `to_json` made `plain` from.

        Raises
        ------
        FormatError
            Another kind, a newer schema, a key that is unknown or missing, a value that contradicts another.
        """
        plain = unsealed(plain, where)
        try:
            migrated = cls.migrate(plain) if isinstance(plain, dict) else plain
        except (KeyError, IndexError, TypeError, AttributeError, ValueError) as error:  # old files have no seal
            raise FormatError(
                f"`{where}` must hold what results of schema {plain.get('schema')!r} hold; not so: {error!r:.99}. "
                "The file was altered."
            ) from error
        result = result_from_json(cls, migrated)
        result.check()
        return result

    @classmethod
    def migrate(cls, plain: dict[str, Any]) -> dict[str, Any]:
        """Return the JSON object of an older schema in the layout of this one."""
        return plain

    def check(self) -> None:
        """Raise `FormatError` where fields that were read contradict each other."""

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the JSON file `path`, atomically."""
        write_sealed(path, self.to_json())

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Self:
        """Read a file that `save` wrote.

        Raises
        ------
        FormatError
            See `from_json`.
        FileNotFoundError
            There is no such file.
        """
        return cls.from_json(read_json(path), os.fspath(path))

    def table(self) -> list[list[str]]:
        """Return the main table as rows of text, headings first."""
        raise AssertionError(f"{type(self).__name__} must define `table`")

    def caption(self) -> str:
        """Return the line under the table."""
        return ""

    PARTS: ClassVar[tuple[str, ...]] = ()
    """Parts that `to_pandas` can show, a row per item; the first by default."""

    def footer(self) -> str:
        """Return the caption and the warnings, a line each."""
        return "\n".join([*filter(None, [self.caption()]), *map(str, self.warnings)])

    def to_pandas(self, part: str | None = None) -> pandas.DataFrame:
        """Return a part of the result as a pandas data frame, with a row per item: SAE, arm, cell, pair, size.

        A measured quantity, ``fvu`` say, gives three columns: ``fvu``, ``fvu_low``, ``fvu_high``. Lists and free-form
        facts are left out; they are in the JSON.

        Parameters
        ----------
        part
            One of `PARTS` [the first]; or ``measured`` for every measured quantity of the result, a row each: ``name``
            (its path in the JSON), ``value``, ``low``, ``high``, ``unit``, ``reason``.

        Raises
        ------
        ConfigError
            There is no such part.
        """
        import pandas

        check_choice("to_pandas", (*self.PARTS, "measured"), part=part or (*self.PARTS, "measured")[0])
        if part == "measured" or not self.PARTS:
            columns = ["name", "value", "low", "high", "unit", "reason"]
            return pandas.DataFrame(list(_measured_in(self.to_json(), "")), columns=columns)
        return pandas.DataFrame([flat_row(item) for item in self.items_of(part or self.PARTS[0])])

    def items_of(self, part: str) -> list[Any]:
        """Return the items of one of `PARTS`."""
        return list(getattr(self, part))

    def __repr__(self) -> str:
        return text_table(self.table(), self.footer())

    def _repr_html_(self) -> str:
        return html_table(self.table(), self.footer())


def flat_row(item: Any, prefix: str = "") -> dict[str, Any]:
    """Return numbers and texts of an item (a dataclass or mapping) under flat names; metrics under their own.

    >>> flat_row({"name": "a", "metrics": {"fvu": Measured(0.5, 0.4, 0.6)}, "latents": [1, 2]})
    {'name': 'a', 'fvu': 0.5, 'fvu_low': 0.4, 'fvu_high': 0.6}
    """
    fields = item if isinstance(item, Mapping) else {f.name: getattr(item, f.name) for f in dataclasses.fields(item)}
    row: dict[str, Any] = {}
    for name, value in fields.items():
        key = f"{prefix}{name}"
        if isinstance(value, Measured):
            row |= {key: value.value, f"{key}_low": value.low, f"{key}_high": value.high}
        elif value is None or isinstance(value, str | int | float):
            row[key] = value
        elif dataclasses.is_dataclass(value) or _is_measured_mapping(value):
            row |= flat_row(value, prefix if name == "metrics" else f"{key}_")
    return row


def _is_measured_mapping(value: object) -> bool:
    return isinstance(value, Mapping) and all(isinstance(each, Measured) for each in value.values())


def _measured_in(plain: object, path: str) -> Iterator[dict[str, Any]]:
    """Every measured quantity in a JSON object, with its path."""
    if isinstance(plain, dict) and {"value", "low", "high", "unit"} <= set(plain):
        yield {"name": path, **plain}
    elif isinstance(plain, dict):
        for key, item in plain.items():
            yield from _measured_in(item, f"{path}.{key}" if path else key)
    elif isinstance(plain, list):
        for index, item in enumerate(plain):
            yield from _measured_in(item, f"{path}[{index}]")


R = TypeVar("R")


def result_to_json(result: Any) -> dict[str, Any]:
    """Return a result dataclass as plain JSON: ``{"kind": ..., "schema": ..., <fields>}``.

    Fields whose name starts with ``_`` are left out.
    """
    return {"kind": result.KIND, "schema": result.SCHEMA, **_plain_fields(result)}


def result_from_json(cls: type[R], plain: object) -> R:
    """Build a result of class `cls` from what `result_to_json` made, refusing anything it does not know.

    Raises
    ------
    FormatError
        Another kind, a newer schema, an unknown or missing key, a value of the wrong type.
    """
    kind, schema = cls.KIND, cls.SCHEMA  # type: ignore[attr-defined]
    if not isinstance(plain, dict):
        raise FormatError(f"a saved {kind} must be a JSON object; it is {type(plain).__name__}.")
    plain = dict(plain)
    found = plain.pop("kind", None)
    if found != kind:
        raise FormatError(f"`kind` must be {kind!r}; it is {found!r}. This file holds another kind of result.")
    version = plain.pop("schema", None)
    if not isinstance(version, int) or isinstance(version, bool) or version < 1:
        raise FormatError(f"`schema` of a saved {kind} must be a whole number from 1; it is {version!r}.")
    if version > schema:
        raise FormatError(
            f"this {kind} has schema {version}; this saekit reads up to {schema}. "
            "Install the newer release that wrote it."
        )
    return _build(cls, plain, kind)


def to_plain(value: object) -> Any:
    """Dataclasses, dicts, lists, tuples and whatever has ``to_json`` as plain JSON; anything else unchanged."""
    if hasattr(value, "to_json"):
        return value.to_json()
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return _plain_fields(value)
    if isinstance(value, dict):
        return {str(key): to_plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [to_plain(item) for item in value]
    return value


def _plain_fields(value: Any) -> dict[str, Any]:
    fields = dataclasses.fields(value)
    return {field.name: to_plain(getattr(value, field.name)) for field in fields if not field.name.startswith("_")}


def _build(cls: type[R], plain: object, where: str) -> R:
    """Return a dataclass from a JSON object, by its type hints."""
    if not isinstance(plain, dict):
        raise FormatError(f"`{where}` must be a JSON object; it is {plain!r}.")
    names, required, hints = _layout(cls)  # type: ignore[arg-type]  # a class is hashable
    _check_keys(plain, names, required, where)
    return cls(**{name: _decode(hints[name], item, f"{where}.{name}") for name, item in plain.items()})


@functools.cache
def _layout(cls: type) -> tuple[list[str], list[str], dict[str, Any]]:
    """Return the names of the fields of a dataclass, those without a default, and the type of each."""
    fields = [field for field in dataclasses.fields(cls) if not field.name.startswith("_")]
    required = [
        field.name
        for field in fields
        if field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
    ]
    return [field.name for field in fields], required, typing.get_type_hints(cls)


def _decode(hint: object, item: object, where: str) -> Any:
    """Return `item` as the type `hint` says; raises `FormatError`."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return item
    if origin in (typing.Union, types.UnionType):
        if item is None and type(None) in arguments:
            return None
        return _decode(next(each for each in arguments if each is not type(None)), item, where)
    if hasattr(hint, "from_json"):
        return hint.from_json(item, where)
    if dataclasses.is_dataclass(hint):
        return _build(hint, item, where)  # type: ignore[arg-type]
    if origin in (dict, list, tuple):
        return _decode_all(origin, arguments, item, where)
    return _decode_plain(hint, item, where)


def _decode_all(origin: type, arguments: tuple[object, ...], item: object, where: str) -> Any:
    """Return every member of a dict, list or tuple decoded."""
    if origin is dict:
        if not isinstance(item, dict):
            raise FormatError(f"`{where}` must be a JSON object; it is {item!r}.")
        return {key: _decode(arguments[1], each, f"{where}.{key}") for key, each in item.items()}
    if not isinstance(item, list):
        raise FormatError(f"`{where}` must be a JSON list; it is {item!r}.")
    if arguments[0] in (float, str) and all(type(each) is arguments[0] for each in item):
        return origin(item)  # the same, for long lists
    return origin(_decode(arguments[0], each, f"{where}[{index}]") for index, each in enumerate(item))


def _decode_plain(hint: object, item: object, where: str) -> Any:
    """Return a number, text or truth value; whole numbers become floats where those are wanted."""
    if hint is float and isinstance(item, int) and not isinstance(item, bool):
        return float(item)
    if isinstance(hint, type) and (not isinstance(item, hint) or (hint is not bool and isinstance(item, bool))):
        raise FormatError(f"`{where}` must be of type {hint.__name__}; it is {item!r}.")
    return item


def _check_keys(plain: dict[str, Any], known: typing.Iterable[str], required: typing.Iterable[str], where: str) -> None:
    known = list(known)
    for key in plain:
        if key not in known:
            raise FormatError(f"unknown key `{key}` in `{where}`. {did_you_mean(key, known)}")
    missing = [key for key in required if key not in plain]
    if missing:
        raise FormatError(f"`{where}` must hold `{missing[0]}`; it is missing. The file was cut or altered.")


def _decimals(number: float) -> int:
    """Return the decimal place of the first digit of `number`: 2 for 0.05, -1 for 30; 99 for 0."""
    return -math.floor(math.log10(abs(number))) if number and math.isfinite(number) else 99


def _number(value: object, where: str) -> float | None:
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise FormatError(f"`{where}` must be a number or null; it is {value!r}.")
    return float(value)
