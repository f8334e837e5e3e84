"""What a JSON value must look like before it is used: one statement, one check, one message."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from .errors import FormatError
from .settings import is_number, is_whole


@dataclass(frozen=True)
class Whole:
    """A whole number from `least` to `most`."""

    least: int
    most: int = 2**62

    def __str__(self) -> str:
        return f"a whole number from {self.least}"


COUNT, NATURAL = Whole(1), Whole(0)

_NAMES = {str: "text", float: "a number", bool: "true or false", dict: "an object", list: "a list", None: "null"}


def check_form(value: Any, form: Any, where: object, place: str = "") -> None:
    """Refuse a JSON value of another form.

    Parameters
    ----------
    value
        What was read.
    form
        ``Any``; ``str``, ``float`` (any finite number), ``bool``, ``dict`` or ``list``; `COUNT`, `NATURAL` or another
        `Whole`; None (null); ``[form]``: a list of such values; ``{key: form}``: an object with these keys, and perhaps
        others; a tuple: one of several forms.
    where
        The file, for messages.
    place
        Where in it the value stands, for messages.

    Raises
    ------
    FormatError
        With the first place that does not fit.

    Examples
    --------
    >>> check_form({"rows": 3, "shards": [{"file": "a"}]}, {"rows": COUNT, "shards": [{"file": str}]}, "manifest.json")
    >>> check_form({"rows": "3"}, {"rows": COUNT}, "manifest.json")
    Traceback (most recent call last):
        ...
    saekit.errors.FormatError: `manifest.json`: `rows` must be a whole number from 1; got '3'. Restore ...
    """
    if isinstance(form, dict):
        _check_object(value, form, where, place)
    elif isinstance(form, list):
        _refuse_unless(isinstance(value, list), value, list, where, place)
        for index, each in enumerate(value):
            check_form(each, form[0], where, f"{place}[{index}]")
    else:
        forms = form if isinstance(form, tuple) else (form,)
        _refuse_unless(any(_fits(value, each) for each in forms), value, form, where, place)


def _check_object(value: Any, form: dict[str, Any], where: object, place: str) -> None:
    _refuse_unless(isinstance(value, dict), value, dict, where, place)
    for key, inner in form.items():
        name = f"{place}.{key}" if place else key
        if key not in value:
            raise FormatError(f"`{where}` must hold `{name}`; it is missing. Restore the file from a copy.")
        check_form(value[key], inner, where, name)


def _fits(value: Any, form: Any) -> bool:
    if form is Any:
        return True
    if isinstance(form, Whole):
        return is_whole(value) and form.least <= value <= form.most
    if form is float:
        return is_number(value)
    return value is None if form is None else isinstance(value, form)


def _refuse_unless(fits: bool, value: object, form: object, where: object, place: str) -> None:
    if not fits:
        forms = form if isinstance(form, tuple) else (form,)
        wanted = " or ".join(str(each) if isinstance(each, Whole) else _NAMES[each] for each in forms)
        named = f"`{place}` " if place else "it "
        raise FormatError(
            f"`{where}`: {named}must be {wanted}; got {value!r:.60}. Restore the file from a copy, or make it again."
        )
