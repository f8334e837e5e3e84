"""A table of results as plain text (in a terminal) and as HTML (in a notebook)."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from ..terminal import plain


def text_table(lines: Sequence[Sequence[str]], caption: str) -> str:
    """Columns in line, two spaces apart; `lines` begin with the heading and have equal lengths."""
    lines = [[plain(cell) for cell in line] for line in lines]
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    rows = ("  ".join(cell.ljust(width) for cell, width in zip(line, widths)).rstrip() for line in lines)
    return "\n".join([*rows, plain(caption, keep="\n")])


def html_table(lines: Sequence[Sequence[str]], caption: str) -> str:
    """Return the same as one ``<table>``; every cell is plain and escaped, indentation is kept.

    >>> html_table([["a"], ["<b>"]], "c")
    '<table><caption>c</caption><thead><tr><th>a</th></tr></thead><tbody><tr><td>&lt;b&gt;</td></tr></tbody></table>'
    """
    heading, *others = lines
    head = "".join(f"<th>{_safe(cell)}</th>" for cell in heading)
    body = "".join(
        "<tr>" + "".join(f"<td>{_safe(cell).replace('  ', '&nbsp;&nbsp;')}</td>" for cell in line) + "</tr>"
        for line in others
    )
    return f"<table><caption>{_safe(caption)}</caption><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def _safe(text: str) -> str:
    """Return text without signs that turn or hide what stands around it, as HTML."""
    return escape(plain(text, keep="\n"))
