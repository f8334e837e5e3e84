"""The page: an answer on the first screen, a part per question, the latents, training, provenance, the words."""

from __future__ import annotations

import base64
import functools
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import DataError, SaekitError, listed
from ..files import check_path, write_bytes
from ..places import Warned
from ..terminal import escaped, plain
from . import browser
from .answers import answers, sentence
from .browser import Browser, browsers
from .classification import classification, classification_summary
from .comparison import across, comparison, orphans, source_comparison, without_lists
from .decisions import classifier, decisions
from .effects import effects, steered
from .evaluation import evaluation, verification
from .explanation import explanation, without_cards
from .glossary import glossary_of
from .label_scores import label_scores
from .model_answers import actions
from .numbers import minus
from .parts import Cell, Section, Table
from .sizes import k_choice, progressive, size_curve
from .training import training
from .transfer import transfer

if TYPE_CHECKING:
    import jinja2

PAGE = "report.html"
CARDS = "report-latents"
"""Folder next to the page with the cards that it has no room for."""

RENDERERS: dict[str, Callable[[Mapping[str, Any]], list[Section]]] = {
    "evaluation": evaluation,
    "verification": verification,
    "training": training,
    "comparison": comparison,
    "orphans": orphans,
    "source_comparison": source_comparison,
    "size_curve": size_curve,
    "k_choice": k_choice,
    "progressive": progressive,
    "classification": classification,
    "classification_summary": classification_summary,
    "transfer": transfer,
    "classifier": classifier,
    "decisions": decisions,
    "actions": actions,
    "explanation": explanation,
    "label_scores": label_scores,
    "effects": effects,
    "steered": steered,
}
"""Kind of result -> the function that shows it: JSON in, sections out. A new kind is one function and one row."""

LIGHTER: dict[str, Callable[[Mapping[str, Any]], Mapping[str, Any]]] = {
    "comparison": without_lists,
    "explanation": without_cards,
}
"""Kind of result -> what leaves out of its JSON what a page has no room for."""

GROUPS = (
    ("faithful", "Are they faithful?", ("evaluation", "verification")),
    ("real", "Are they real?", ("comparison", "orphans", "source_comparison")),
    ("many", "How many are needed?", ("size_curve", "progressive", "k_choice")),
    (
        "useful",
        "Are they useful?",
        ("classification", "classification_summary", "classifier", "decisions", "transfer", "actions"),
    ),
    ("latents", "What do the latents mean and do?", ("explanation", "label_scores", "effects", "steered")),
    ("more", "More results", ()),
    ("training", "How were they trained?", ("training",)),
    ("provenance", "Provenance and settings", ()),
)
"""Parts of the page in the order of the terminal: name, heading, kinds of results. Other kinds are under ``more``."""


@dataclass(frozen=True)
class Group:
    """A part of the page."""

    key: str
    title: str
    sections: list[tuple[str, Section]]
    """With the id of each."""


@dataclass(frozen=True)
class Shown:
    """A result, and what shows it."""

    result: Mapping[str, Any]
    """The result as a JSON object."""
    sections: Sequence[Section]
    """Its sections, its warnings after the first."""

    @classmethod
    def of(cls, result: Any) -> Shown:
        """Return what shows a result: an object with ``to_json()``, what that returned, or one that is shown already.

        Raises
        ------
        DataError
            As `sections_of`.
        """
        if isinstance(result, Shown):
            return result
        plain = result if isinstance(result, Mapping) else result.to_json()
        return cls(plain, sections_of(plain))


@dataclass(frozen=True)
class Unread:
    """A file whose result is not on the page."""

    file: str
    """Its path in the folder."""
    why: str
    """Why it cannot be read or shown."""


def write(
    results: Sequence[object],
    folder: str | os.PathLike[str],
    *,
    title: str = "saekit report",
    date: str = "",
    unread: Sequence[Unread] = (),
) -> Path:
    """Write `results` as ``report.html`` into `folder`: a page that needs no network.

    It needs no other file, unless there are more than 4,096 cards of latents: they are then read from the folder
    ``report-latents``, which must stay next to the page.

    Parameters
    ----------
    results
        Result objects with ``to_json()``, or what that returned (JSON objects with a ``kind``), or `Shown`.
    folder
        Created if missing.
    title
        Heading of the page.
    date
        When the results were made; shown on top.
    unread
        Files that should have been results: the page says on top that they are missing, and why.

    Returns
    -------
    Path
        The page.

    Raises
    ------
    DataError
        A result is of an unknown kind, or there is none.
    """
    text, files = _built(results, title=title, date=date, is_whole=False, unread=unread)
    path = check_path(folder) / PAGE
    for name, content in files.items():
        write_bytes(path.parent / name, content.encode())
    write_bytes(path, text.encode())
    return path


def render(results: Sequence[Any], *, title: str = "saekit report", date: str = "") -> str:
    """Return the HTML text of the page, with all cards in it; parameters and errors as in `write`."""
    return _built(results, title=title, date=date, is_whole=True)[0]


def _built(
    results: Sequence[Any], *, title: str, date: str, is_whole: bool, unread: Sequence[Unread] = ()
) -> tuple[str, dict[str, str]]:
    """Return the page, and the files that it reads."""
    if not results:
        raise DataError("a report needs at least one result; got none. Run `saekit evaluate` or `saekit train` first.")
    made = [Shown.of(result) for result in results]
    shown = [each.result for each in made]
    groups = _groups(made)
    found = browsers(shown)
    chunks, files = _placed(found, is_whole)
    first = answers(shown)
    told = " ".join(_texts(groups)) + " ".join(f"{each.unit} {each.how}" for each in first)
    page = _templates().get_template("page.html")
    text = page.render(
        title=title,
        sentence=sentence(shown, date),
        unread=unread,
        answers=first,
        groups=groups,
        linked=_addresses(found),
        browsers=found,
        index=[{"name": each.name, "index": each.index, "chunks": own} for each, own in zip(found, chunks)],
        glossary=glossary_of(told),
        data=embedded([LIGHTER.get(str(each["kind"]), dict)(each) for each in shown]),
    )
    return text, files


@functools.cache
def _templates() -> jinja2.Environment:
    """Return the templates: compiled once for all pages."""
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("saekit", "report/templates"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        finalize=_shown,
        lstrip_blocks=True,
    )
    environment.filters |= {"data_link": _data_link, "prose": _prose}
    return environment


def _groups(results: Sequence[Shown]) -> list[Group]:
    """Return the sections of all results by the question they answer."""
    group_of = {kind: key for key, _, kinds in GROUPS for kind in kinds}
    sections: dict[str, list[Section]] = {key: [] for key, _, _ in GROUPS}
    order = {kind: at for at, kind in enumerate(group_of)}
    for each in sorted(results, key=lambda each: order.get(str(each.result.get("kind")), len(order))):
        for section in each.sections:
            key = "provenance" if section.kind == "provenance" else group_of.get(str(each.result.get("kind")), "more")
            sections[key].append(section)
    sections["real"] += across([each.result for each in results])
    numbers = iter(range(10**6))
    return [
        Group(key, title, [(f"s{next(numbers)}", section) for section in sections[key]])
        for key, title, _ in GROUPS
        if sections[key]
    ]


def _placed(found: Sequence[Browser], is_whole: bool) -> tuple[list[list[str]], dict[str, str]]:
    """Return for each browser its chunks of cards, or the names of the files with them, and these files."""
    n, letters = sum(len(each.latents) for each in found), sum(len(chunk) for each in found for chunk in each.chunks)
    if is_whole or (n <= browser.INLINE and letters <= browser.INLINE_BYTES):
        return [[f"data:{chunk}" for chunk in each.chunks] for each in found], {}
    chunks, files = [], {}
    for number, each in enumerate(found):
        own = []
        for at, chunk in enumerate(each.chunks):
            name = f"{CARDS}/{number}-{at}.js"
            files[name] = f'__cards("{number}-{at}","{chunk}")\n'
            own.append(name)
        chunks.append(own)
    return chunks, files


def _addresses(found: Sequence[Browser]) -> dict[tuple[str, int], str]:
    """Return the address of the card of every latent, by the digest of its SAE."""
    return {
        (each.digest, latent): f"#f{latent}-{number}" if number else f"#f{latent}"
        for number, each in reversed([*enumerate(found)])
        for latent in each.latents
    }


def _texts(groups: Sequence[Group]) -> Iterator[str]:
    """Yield the words that stand on the page."""
    for group in groups:
        for _, section in group.sections:
            yield from (section.title, section.intro)
            for table in section.tables if section.kind != "provenance" else ():
                yield from (*table.columns, table.caption, *(row[0].text for row in table.rows))
            yield from (figure.caption for figure in section.figures)


class _Markup(str):
    """Text of our own that stands in the page as it is."""

    def __html__(self) -> str:
        return self


def _prose(text: str) -> _Markup:
    """Return text with what stands between backticks as code, and intervals in words."""
    safe = escape(plain(text, keep="\n\t"))
    parts = _INTERVAL.sub(_in_words, safe).split("`")
    if len(parts) % 2 == 0:  # an odd backtick is a sign of its own
        return _Markup("`".join(parts))
    return _Markup("".join(f"<code>{part}</code>" if at % 2 else part for at, part in enumerate(parts)))


_INTERVAL = re.compile(r"(?:(?<![\w.])([-+]?[\d.]+) )?\[([-+]?[\d.]+), ([-+]?[\d.]+)\]")


def _in_words(found: re.Match[str]) -> str:
    value = "" if found[1] is None else f"{minus(found[1])} "
    return f"{value}[{minus(found[2])} to {minus(found[3])}]"


def _data_link(text: str, kind: str) -> str:
    """Return the address of data that a reader may save."""
    return f"data:{kind};base64,{base64.b64encode(text.encode()).decode()}"


def _shown(value: object) -> Any:
    """Return text without signs that turn or hide what stands on the page; markup of our own as it is."""
    return plain(value, keep="\n\t") if type(value) is str else value


def sections_of(result: Mapping[str, object]) -> Sequence[Section]:
    """Return the sections of one result, its warnings after the first.

    Raises
    ------
    DataError
        It is of an unknown kind, or does not hold what results of its kind hold.
    """
    kind = result.get("kind")
    if kind not in RENDERERS:
        raise DataError(f"a report shows results of the kinds {listed(RENDERERS)}; got {kind!r}.")
    try:
        main, *rest = RENDERERS[kind](result)
        answers([result])  # what it says on the first screen must be there too
        return [main, *_warnings(result), *rest]
    except (KeyError, IndexError, TypeError, AttributeError, ValueError, ArithmeticError, RecursionError) as error:
        if isinstance(error, SaekitError):
            raise
        raise DataError(
            f"a result of kind {kind!r} must hold what such results hold; it cannot be shown: {error!r:.200}. "
            "Make it again."
        ) from error


def _warnings(result: Mapping[str, Any]) -> list[Section]:
    """Show the warnings of a result; older files have plain texts, some of them in `notes`."""
    told = [Warned.from_json(each) for name in ("notes", "warnings") for each in result.get(name) or ()]
    if not told:
        return []
    heading = "Notes" if all(each.is_note for each in told) else "Warnings"
    return [Section(heading, "", [Table(("",), [[Cell(str(each))] for each in told])], kind="warnings")]


def embedded(value: object) -> str:
    r"""Return JSON text that may stand inside a ``<script>``: nothing in it can end the element.

    >>> embedded({"token": "</script>"})
    '{"token":"\\u003c/script>"}'
    """
    return escaped(value, separators=(",", ":")).replace("<", "\\u003c")
