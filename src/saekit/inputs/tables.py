"""What texts and images have in common: named columns of their table, and a description of their origin."""

from __future__ import annotations

import reprlib
from collections.abc import Iterable
from typing import Any

from ..errors import DataError, InputError, did_you_mean, listed


class Table:
    """Entries in a fixed order, with the other columns of their table."""

    ids: tuple[str, ...]
    columns: dict[str, tuple[Any, ...]]
    info: dict[str, Any]

    @property
    def digest(self) -> str:
        """SHA-256 over all entries, in order."""
        return str(self.info["digest"])

    def check_split(self, split: str | None) -> None:
        """Refuse another split than the one that was read; raises `DataError`."""
        if split is not None and split != self.info.get("split"):
            raise InputError(
                f"`{self.info['name']}` was read with the split {self.info.get('split')}; `{split}` is asked for."
            )

    def column(self, name: str) -> tuple[Any, ...]:
        """Return one column of the table.

        Raises
        ------
        DataError
            There is no such column.
        """
        if name not in self.columns:
            raise no_column(name, self.columns, str(self.info["name"]))
        return self.columns[name]


def no_column(name: str, columns: Iterable[str], where: str, hint: str = "") -> DataError:
    """Return the error about a column that is not there, with the nearest ones, or another hint."""
    columns = [column for column in columns if column != "__id__"]
    near = did_you_mean(name, columns) if columns else ""
    return InputError(
        f"`{where}` must have a column `{name}`; its columns are {listed(columns, 12) if columns else 'none'}. "
        f"{hint or near}".rstrip()
    )


def shortened(value: object, length: int = 80) -> str:
    """Return what a value looks like, cut to a length."""
    shown = value if isinstance(value, str) else reprlib.repr(value)
    return shown if len(shown) <= length else shown[: length - 1] + "…"


def first_line(error: BaseException) -> str:
    """Return the first line of a message without its full stop."""
    return shortened((str(error).strip() or type(error).__name__).splitlines()[0].rstrip("."), 300)
