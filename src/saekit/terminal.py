r"""Text from data on a terminal: without what moves its cursor, colours it, turns its direction or begins a line.

Names of files, models and columns, labels, tokens, and what other programs wrote into a file, may hold anything. What
is printed, raised or warned goes through `plain`.
"""

from __future__ import annotations

import json
import unicodedata
from typing import Any

_JOINERS = "\u200c\u200d"  # parts of words and of emoji


def plain(text: str, keep: str = "") -> str:
    r"""Return text with a question mark for every sign that is no letter, mark, number, symbol or space.

    Parameters
    ----------
    text
        Any text: lone surrogates are replaced too, so that it can be written in UTF-8.
    keep
        Signs that stay: ``"\n"`` in text of several lines.

    Examples
    --------
    >>> plain("a\x1b[31mb\n"), plain("exe.\u202egnp"), plain("日本　語\n", keep="\n")
    ('a?[31mb?', 'exe.?gnp', '日本\u3000語\n')
    """
    if text.isprintable():
        return text
    return "".join(sign if is_plain(sign) or sign in keep else "?" for sign in text)


def is_plain(sign: str) -> bool:
    """Return whether a sign only shows itself."""
    return sign.isprintable() or sign in _JOINERS or unicodedata.category(sign) == "Zs"


def escaped(value: Any, **settings: Any) -> str:
    r"""Return strict JSON text on one line, with what does not show itself as ``\u`` escapes, which JSON reads back.

    >>> escaped({"a": "\u202eb\x9b"})
    '{"a": "\\u202eb\\u009b"}'
    """
    text = json.dumps(value, ensure_ascii=False, allow_nan=False, **settings)
    if text.isprintable():
        return text
    return "".join(sign if is_plain(sign) else json.dumps(sign)[1:-1] for sign in text)
