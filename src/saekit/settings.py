"""Settings as values: attribute docstrings as help texts, misspelt keywords, checks of arguments, progress.

Settings of a public function are frozen dataclasses. Each attribute has a docstring below it: a noun phrase with its
default, which is also the help text of the command line option of that name.
"""

from __future__ import annotations

import ast
import dataclasses
import difflib
import functools
import inspect
import math
import numbers
import textwrap
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any, Protocol, TypeVar

from .errors import ConfigError, SaekitError, did_you_mean, listed, nearest
from .kinds import LARGEST, called, fits, hints_of

F = TypeVar("F", bound=Callable[..., Any])
S = TypeVar("S")

_SHOWN = 80  # characters of a value in a message


class Progress(Protocol):
    """Called as work advances: ``progress(stage, done, total, note)``."""

    def __call__(self, stage: str, done: int, total: int | None = None, note: str = "") -> None:
        """Tell how far a stage is; `total` is None where it is not known, `note` is shown after the count."""
        ...


def silent(stage: str, done: int, total: int | None = None, note: str = "") -> None:
    """Report no progress."""


class KeywordError(ConfigError, TypeError):
    """A keyword argument that the function does not have; also a TypeError, as Python raises it."""


def brief(value: Any) -> str:
    """Return a dataclass as text: without what is at its default, and of long values only how much they hold.

    For ``__repr__ = brief``.
    """
    fields = [each for each in dataclasses.fields(value) if each.repr and hasattr(value, each.name)]
    shown = [f"{each.name}={_in_brief(getattr(value, each.name))}" for each in fields if not _is_default(value, each)]
    shown[_FIELDS:] = ["…"] if len(shown) > _FIELDS else []
    return f"{type(value).__name__}({', '.join(shown)})"


_FIELDS = 8  # that are shown
_LONG = 60  # characters of a value from which on its size stands for it


def _is_default(value: object, field: dataclasses.Field[Any]) -> bool:
    mine = getattr(value, field.name)
    default = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
    return type(mine) is type(default) and not hasattr(mine, "shape") and bool(mine == default)


def _in_brief(value: object) -> str:
    if hasattr(value, "shape"):
        return f"{type(value).__name__.lower()}{list(value.shape)}"
    if isinstance(value, str) and len(value) > _LONG:
        return repr(f"{value[: _LONG - 1]}…")
    if isinstance(value, dict | list | tuple) and len(repr(value)) > _LONG:
        return f"{type(value).__name__} of {len(value)}"
    if dataclasses.is_dataclass(value):
        return text if len(text := str(value)) <= _LONG else f"{type(value).__name__}(…)"
    return repr(value)


def suggest_keywords(function: F) -> F:
    """Decorate a function or dataclass so that an unknown keyword argument is refused with the nearest known ones.

    A dataclass is shown as `brief` says, and values that are not of the kind of their field are refused.

    >>> @suggest_keywords
    ... def classify(data, *, label="label"):
    ...     return label
    >>> classify([], lable="x")
    Traceback (most recent call last):
    ...
    saekit.settings.KeywordError: classify: unknown argument `lable`. Did you mean `label`?
    """
    if inspect.isclass(function):
        known = _suggesting(function.__init__, function.__name__)
        function.__init__ = _checking(known) if dataclasses.is_dataclass(function) else known  # type: ignore[method-assign]
        if dataclasses.is_dataclass(function):
            function.__repr__ = brief  # type: ignore[method-assign]
        return function
    return _suggesting(function, function.__name__)


def _suggesting(function: F, name: str) -> F:
    parameters = inspect.signature(function).parameters
    known = [each for each in parameters if each != "self"]
    # Settings that are passed as one value: parameter -> its default value.
    values = {each: p.default for each, p in parameters.items() if dataclasses.is_dataclass(p.default)}

    @functools.wraps(function)
    def checked(*args: Any, **kwargs: Any) -> Any:
        for word in kwargs:
            if word not in parameters:
                where = elsewhere(word, type(args[0])) if args and "self" in parameters else ""
                raise KeywordError(f"{name}: unknown argument `{word}`. {where or _where_it_goes(word, known, values)}")
        return function(*args, **kwargs)

    return checked  # type: ignore[return-value]


def _checking(init: F) -> F:
    """Return an ``__init__`` that refuses values of other kinds than the fields have.

    What the class says itself about its values is the better message, so it comes first, unless it fails over them.
    """

    @functools.wraps(init)
    def checked(self: Any, *args: Any, **kwargs: Any) -> None:
        try:
            init(self, *args, **kwargs)
        except SaekitError:
            raise
        except Exception:
            check_kinds(self)
            raise
        check_kinds(self)

    return checked  # type: ignore[return-value]


def check_kinds(settings: Any) -> None:
    """Refuse settings whose values are not of the kind that their fields are annotated with; raises `ConfigError`."""
    kind: Any = type(settings)
    hints = hints_of(kind)
    for field in dataclasses.fields(settings):
        value = getattr(settings, field.name, field.default)  # not there: the call left out what must be given
        if value is not field.default and not fits(value, hints[field.name]):
            name = f"{type(settings).__name__}: `{field.name}`"
            raise ConfigError(f"{name} must be {called(hints[field.name])}; got {_short(value)}.")


def elsewhere(word: str, kind: type) -> str:
    """Return that a field which a class of settings lacks is one of others of its base; "" where none has it.

    >>> @dataclasses.dataclass
    ... class Shape: pass
    >>> @dataclasses.dataclass
    ... class Circle(Shape):
    ...     radius: float = 1.0
    >>> elsewhere("radius", Shape), elsewhere("colour", Shape)
    ('`radius` is a setting of `Circle` only.', '')
    """
    relatives: set[type] = set()
    waiting = list(kind.__mro__[:-1])
    while waiting:
        relatives.add(each := waiting.pop())
        waiting += set(each.__subclasses__()) - relatives
    having = [each.__name__ for each in relatives if word in _fields_of(each) and not each.__subclasses__()]
    return f"`{word}` is a setting of {listed(sorted(having))} only." if having else ""


def _fields_of(kind: type) -> Collection[str]:
    fields: Mapping[str, Any] = getattr(kind, "__dataclass_fields__", {})
    return fields


def _where_it_goes(word: str, known: list[str], values: dict[str, Any]) -> str:
    """Name the settings that have a field of this name, else the nearest argument, else the nearest field."""
    fields = {each: [f.name for f in dataclasses.fields(value)] for each, value in values.items()}
    every = [name for names in fields.values() for name in names]
    if word in every or not difflib.get_close_matches(word, known, n=1):
        for wanted in [word, *difflib.get_close_matches(word, every, n=1)]:
            for argument, names in fields.items():
                if wanted in names:
                    kind = type(values[argument])
                    return f"Pass {argument}={kind.__name__}({wanted}=…), which is in `{kind.__module__}`."
    return did_you_mean(word, known)


@functools.cache
def attribute_docs(settings: type) -> dict[str, str]:
    """Return the docstring below each attribute of a settings class, joined to one line.

    Parameters
    ----------
    settings
        A class whose source is available; attributes of its base classes are included.
    """
    found: dict[str, str] = {}
    for each in reversed(settings.__mro__[:-1]):
        (body,) = ast.parse(textwrap.dedent(inspect.getsource(each))).body
        assert isinstance(body, ast.ClassDef)
        for attribute, below in zip(body.body, body.body[1:], strict=False):
            if isinstance(attribute, ast.AnnAssign) and isinstance(below, ast.Expr):
                found[ast.unparse(attribute.target)] = " ".join(ast.literal_eval(below.value).split())
    return found


def part_of(settings: object, kind: type[S], **changes: Any) -> S:
    """Return settings of one class from those of a class that has its fields, except for those in `changes`."""
    names = {field.name for field in dataclasses.fields(kind)} - changes.keys()  # type: ignore[arg-type]
    return kind(**{name: getattr(settings, name) for name in names}, **changes)


def differences(then: object, now: object) -> str:
    """Return the settings that differ between two nested values, each with what it was and what it is; "" if none.

    >>> differences({"configs": [{"k": 16}], "seeds": [0]}, {"configs": [{"k": 32}], "seeds": [0]})
    '`configs[0].k` was 16, now 32'
    """
    return "; ".join(f"`{name}` was {_short(old)}, now {_short(new)}" for name, old, new in _differing(then, now, ""))


def _differing(then: object, now: object, name: str) -> Iterator[tuple[str, Any, Any]]:
    """Yield name, old and new value of every setting that differs; what is missing counts as None."""
    if isinstance(then, Mapping) and isinstance(now, Mapping):
        for key in sorted({*then, *now}):
            yield from _differing(then.get(key), now.get(key), f"{name}.{key}" if name else key)
    elif isinstance(then, list) and isinstance(now, list) and len(then) == len(now):
        for index, (old, new) in enumerate(zip(then, now)):
            yield from _differing(old, new, f"{name}[{index}]")
    elif then != now:
        yield name, then, now


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}…"


def is_whole(value: object) -> bool:
    """Return whether a value is a whole number and not a bool."""
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)


def is_number(value: object) -> bool:
    """Return whether a value is a finite real number and not a bool."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def check_whole(where: str, least: int = 1, **values: Any) -> None:
    """Refuse values that are neither None nor whole numbers from `least`.

    Raises
    ------
    ConfigError
        The message names the function or class `where`, the argument, what must hold and what came.
    """
    for name, value in values.items():
        if value is not None and not (is_whole(value) and least <= value <= LARGEST):
            above = " and below 2**63" if is_whole(value) and value > LARGEST else ""
            raise ConfigError(f"{where}: `{name}` must be a whole number from {least}{above}; got {_short(value)}.")


def check_fraction(where: str, **values: Any) -> None:
    """Refuse values that are not numbers strictly between 0 and 1; raises `ConfigError`."""
    for name, value in values.items():
        if not (is_number(value) and 0 < value < 1):
            raise ConfigError(f"{where}: `{name}` must be a number between 0 and 1; got {value!r}.")


def check_choice(where: str, options: Collection[str], **values: Any) -> None:
    """Refuse values that are not among `options`; raises `ConfigError` with the nearest option."""
    for name, value in values.items():
        if value not in options:
            hint = nearest(value, options)
            raise ConfigError(f"{where}: `{name}` must be one of {listed(options, 12)}; got {value!r}.{hint}")
