"""Which values fit the annotation of a setting: what comes from a file or a caller may be of any type."""

from __future__ import annotations

import functools
import numbers
import os
import sys
import types
import typing
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

LARGEST = 2**63 - 1
"""The largest whole number: what torch, numpy and files hold."""

_WORDS: dict[Any, tuple[str, str]] = {
    int: ("a whole number below 2**63", "whole numbers"),
    float: ("a number", "numbers"),
    bool: ("true or false", "true or false"),
    str: ("a text", "texts"),
    Path: ("a path", "paths"),
}
"""What a value of a type is called, and several."""


class _Names(dict[str, Any]):
    """Names in annotations of a class; for what is only imported for type checking stands another type."""

    def __init__(self, kind: type, instead: Any) -> None:
        super().__init__()
        self.instead = instead
        self.known = {name for each in kind.__mro__ for name in vars(sys.modules[each.__module__])}

    def __missing__(self, name: str) -> Any:
        if name in self.known:
            raise KeyError(name)
        return self.instead


@functools.cache
def hints_of(kind: Any, instead: Any = Any) -> dict[str, Any]:
    """Return the annotations of a class, `instead` for types that are only imported for type checking."""
    return typing.get_type_hints(kind, localns=_Names(kind, instead), include_extras=True)


def fits(value: Any, hint: Any) -> bool:
    """Return whether a value is of the kind that an annotation says; of classes that are no plain values, all are.

    >>> fits(5, str | None), fits([1, 2], tuple[int, ...]), fits(True, int), fits(10**20, int)
    (False, True, False, False)
    """
    if _is_union(hint):
        return any(fits(value, each) for each in _parts(hint))
    if hint is None or hint is type(None):
        return value is None
    origin = typing.get_origin(hint)
    if origin is Literal:
        return any(type(value) is type(each) for each in typing.get_args(hint))
    return _is_container(value, hint, origin) if isinstance(origin, type) else _is_plain(value, hint)


def says_none(value: Any, hint: Any) -> bool:
    """Return whether a word of a file or the command line stands for None: ``none``, where no text is meant.

    >>> says_none("none", float | None), says_none("none", str | None), says_none("none", float)
    (True, False, False)
    """
    return value in ("none", "None") and fits(None, hint) and not fits(value, hint)


def _is_container(value: Any, hint: Any, origin: type) -> bool:
    """Return whether a value is a mapping, or holds what the annotation of a sequence says."""
    if issubclass(origin, Mapping):
        return isinstance(value, Mapping)
    if not issubclass(origin, Sequence):
        return True
    several = isinstance(value, Iterable) and not isinstance(value, str | bytes | Mapping)
    # One value stands for a sequence of it.
    return all(any(fits(each, part) for part in _parts(hint)) for each in (value if several else [value]))


def _is_plain(value: Any, kind: Any) -> bool:
    is_bool = isinstance(value, bool) or str(getattr(value, "dtype", "")) == "bool"  # numpy's too
    if kind is bool:
        return is_bool
    if kind in (int, float) and isinstance(value, numbers.Integral):
        return not is_bool and abs(int(value)) <= LARGEST
    if kind in (int, float):
        return kind is float and isinstance(value, numbers.Real)
    if kind in (str, Path):
        return isinstance(value, str | os.PathLike)
    return True


def called(hint: Any) -> str:
    """Return what a value of this kind is called.

    >>> called(tuple[int, ...] | None), called(str | None)
    ('whole numbers', 'a text')
    """
    words = [_called(each) for each in _parts(hint) if each is not type(None)] if _is_union(hint) else [_called(hint)]
    return " or ".join(dict.fromkeys(words))


def _called(hint: Any) -> str:
    if _is_union(hint):
        return called(hint)
    origin = typing.get_origin(hint)
    if origin is Literal:
        return " or ".join(f"`{each}`" for each in typing.get_args(hint))
    if isinstance(origin, type) and issubclass(origin, Sequence):
        return " or ".join(dict.fromkeys(_WORDS.get(each, ("", "values"))[1] for each in _parts(hint)))
    return _WORDS.get(hint, ("a table of settings", ""))[0]


def _is_union(hint: Any) -> bool:
    return typing.get_origin(hint) in (typing.Union, types.UnionType, Annotated)


def _parts(hint: Any) -> Iterator[Any]:
    """Yield the members of a union, what is annotated, or the kinds of the items of a sequence."""
    arguments = typing.get_args(hint)
    for each in arguments[:1] if typing.get_origin(hint) is Annotated else arguments:
        if each is Ellipsis:
            continue
        if _is_union(each):
            yield from _parts(each)
        else:
            yield each
