"""Places: what decides the rows that an SAE reads, besides the texts; and the one guard that compares two of them.

An SAE has the place that its rows had in training; rows, and a model that is about to make some, have one too. Every
function that puts SAEs onto rows asks `warnings_on`, and every one that compares SAEs `warnings_between`.
"""

from __future__ import annotations

import math
import os
import re
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

from .errors import FormatError, PlaceWarning, listed
from .provenance import known_place
from .sae.model import SAE
from .sae.parts import PARTS
from .terminal import plain

SCALE_LIMIT = 4.0
"""Ratio of the variances of rows above which they are on another scale; texts of one language differ less."""

HALF = ("bfloat16", "float16")
"""Number types with less precision than float32."""

CODES = {
    "other_model": "the weights of the language model are others (by digest)",
    "other_hook": "the rows are taken at another module",
    "other_target": "the rows that a transcoder must predict are taken at another module",
    "other_width": "the rows have another width",
    "other_scale": f"the variance of the rows is more than {SCALE_LIMIT:g} times larger or smaller",
    "other_dtype": "the rows have another precision",
    "other_tokens": "other tokens are skipped: added ones (BOS), or those of outlier norm",
    "other_context": "the model reads another number of tokens at once",
    "unknown_model": "the SAE names no model by digest, so that the model cannot be compared",
    "unknown_rows": "the rows do not say which model and module they come from",
}
"""Codes of the warnings of this module, with their meaning. ``unknown_…`` and ``other_dtype`` (rounding) are notes."""


@dataclass(frozen=True)
class Warned:
    """A warning in a result: what a program reads, and what a person reads."""

    code: str
    """What it is about; see `CODES` for those of this module."""
    message: str
    """One or two sentences."""

    @property
    def is_note(self) -> bool:
        """Whether it says only what could not be compared, or what was done, not that something is wrong."""
        return self.code.startswith("unknown") or self.code in (NOTE, "other_dtype")

    def __str__(self) -> str:
        return plain(f"{'Note' if self.is_note else 'Warning'}: {self.message}")

    @classmethod
    def from_json(cls, plain: Any, where: str = "warnings") -> Self:
        """Return a warning from its JSON object; a plain text, as files of older schemas have it, is a note."""
        if isinstance(plain, str):
            return cls(NOTE, plain)
        if not isinstance(plain, dict) or {type(plain.get("code")), type(plain.get("message"))} != {str}:
            raise FormatError(f"`{where}` must be an object with `code` and `message`; it is {plain!r}.")
        return cls(plain["code"], plain["message"])

    def to_json(self) -> dict[str, str]:
        """Return ``{"code", "message"}``."""
        return {"code": self.code, "message": self.message}


NOTE = "note"
"""Code of what a reader must know about the data or the fit."""


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where rows come from. None: not known."""

    model: str | None = None
    """Name of the model."""
    path: str | None = None
    """Folder of a local model when the rows were made."""
    digest: str | None = None
    """Digest of the model's files (config and weights): the same wherever they lie and in whatever number type they
    are loaded; another for a copy that was saved again in another number type."""
    revision: str | None = None
    """Commit of a hub model: the same commit is the same model, whatever its digest was computed from."""
    hook: str | None = None
    """Module whose output the rows are."""
    target: str | None = None
    """Module whose rows a transcoder predicts."""
    width: int | None = None
    """Width of the rows."""
    scale: float | None = None
    """Mean squared distance of the rows from their mean."""
    precision: str | None = None
    """Number type of the rows, or of the model where that has less precision."""
    special: bool | None = None
    """Whether tokens that the tokenizer adds are skipped."""
    outliers: float | None = None
    """Norm above which tokens are skipped, in medians; infinite where none are."""
    n_outliers: int | None = None
    """Number of tokens that this norm skipped."""
    mask: str | None = None
    """Which tokens become rows: what roles, positions and other masks leave, in words."""
    context: int | None = None
    """Tokens that the model reads at once."""
    limit: int | None = None
    """Tokens that the model can read at once."""

    @classmethod
    def of(cls, origin: SAE | Mapping[str, Any]) -> Self:
        """Return the place of an SAE, or of rows by their `info`."""
        known = origin.provenance if isinstance(origin, SAE) else origin
        filters = _mapping(known.get("filters"))
        special, outliers = _mapping(filters.get("special")), _mapping(filters.get("outliers"))
        precision = known.get("model_dtype") if known.get("model_dtype") in HALF else known.get("dtype")
        return cls(
            model=known.get("model"),
            path=known.get("model_path"),
            digest=known.get("model_digest"),
            revision=known.get("model_revision"),
            hook=known_place(known),
            target=known.get("hook_out"),
            width=origin.d_in if isinstance(origin, SAE) else known.get("d_in"),
            scale=known.get("row_variance"),
            precision=precision,
            special=special.get("skipped"),
            outliers=outliers.get("times", float("inf")) if "outliers" in filters else None,
            n_outliers=outliers.get("n", outliers.get("n_above")) if "outliers" in filters else None,
            mask=_mask_text(_mapping(known.get("mask"))),
            context=known.get("context"),
            limit=known.get("model_context"),
        )

    @property
    def is_unknown(self) -> bool:
        """Whether neither the model nor the module is known."""
        return self.model is None and self.digest is None and self.hook is None

    def differences(self, other: Place) -> Iterator[tuple[str, str, str]]:
        """Yield a code of `CODES`, what this place has and what the other has, for every field known to differ."""
        for code, is_other, text in _COMPARED:
            if is_other(self, other):
                yield code, f"rows {text(self, other)}", f"rows {text(other, self)}"


def warnings_on(named: Sequence[tuple[str, SAE]], seen: Mapping[str, Any], *, what: str = "these are") -> list[Warned]:
    """Return what is not as in training when SAEs are put onto rows.

    Parameters
    ----------
    named
        SAEs with their names.
    seen
        ``info`` of the rows, or what is known of rows that a model is about to make.
    what
        How messages begin to say what is seen.
    """
    fresh = [(name, sae) for name, sae in named if not _trained_on(sae, seen)]
    if seen.get(PARTS):
        return _about_parts(fresh, seen[PARTS], what)
    other = Place.of(seen)
    if other.is_unknown:
        found = [] if not fresh else [UNKNOWN_ROWS]
        return found + _told(fresh, other, what)
    nameless = [name for name, sae in fresh if sae.provenance.get("model_digest") is None]
    found = [] if not nameless or other.digest is None else [_unknown_model(nameless, named, other)]
    return _told(fresh, other, what) + found


def _about_parts(named: Sequence[tuple[str, SAE]], parts: Sequence[Mapping[str, Any]], what: str) -> list[Warned]:
    """Return in what the sources of joined rows differ from those of the training of crosscoders."""
    groups: dict[tuple[str, str, str, str], list[str]] = {}
    known = [Place.of(part) for part in parts]
    for name, sae in named:
        for own, place in zip(sae.provenance.get(PARTS) or (), known):
            for difference in Place.of(own).differences(place):
                groups.setdefault((str(own["name"]), *difference), []).append(name)
    found = [
        Warned(code, f"{_names(names)} trained on {own} as `{part}`; there {what} {theirs}. {_PART_ADVICE}")
        for (part, code, own, theirs), names in groups.items()
    ]
    return found + ([UNKNOWN_ROWS] if named and all(place.is_unknown for place in known) else [])


_PART_ADVICE = "Join the rows of the training's places, in its order."


def warnings_between(named: Sequence[tuple[str, SAE]]) -> list[Warned]:
    """Return in what the places of SAEs differ from that of the first."""
    (first, sae), *rest = named
    return _told(rest, Place.of(sae), f"`{first}` on")


def warn(found: Sequence[Warned], *, stacklevel: int = 3) -> None:
    """Issue what is wrong as Python warnings, where no result can carry it; notes are left out."""
    for each in found:
        if not each.is_note:
            warnings.warn(PlaceWarning(each.message, each.code), stacklevel=stacklevel)


def _told(named: Sequence[tuple[str, SAE]], other: Place, what: str) -> list[Warned]:
    """Return a warning per difference; SAEs that differ alike share one."""
    groups: dict[tuple[str, str, str], list[str]] = {}
    for name, sae in named:
        for difference in Place.of(sae).differences(other):
            groups.setdefault(difference, []).append(name)
    return [
        Warned(code, f"{_names(names)} trained on {own}; {what} {theirs}. {_ADVICE[code]}")
        for (code, own, theirs), names in groups.items()
    ]


_ADVICE = {
    "other_model": "Directions of one model mean nothing in another: give the model or the rows of the training.",
    "other_hook": "Leave `layer` and `hook` out to use the module of the training.",
    "other_target": "Leave `target` out to use the module of the training.",
    "other_width": "Rows of another width are another space.",
    "other_scale": "Scale the rows as they were scaled for the training.",
    "other_dtype": "Small differences may be rounding.",
    "other_tokens": "Such tokens have other norms than the rest, and weigh on every mean.",
    "other_context": "Tokens late in a long context are new to an SAE of short ones.",
}


UNKNOWN_ROWS = Warned(
    "unknown_rows",
    "the rows do not say which model and module they come from: whether they are like those of the training was not "
    "checked.",
)


def _unknown_model(names: Sequence[str], named: Sequence[tuple[str, SAE]], other: Place) -> Warned:
    said = {str(sae.provenance["model"]) for name, sae in named if name in names and sae.provenance.get("model")}
    of = f"names its model ({listed(sorted(said))}) without a digest" if said else "names no model"
    who = listed([*names])
    return Warned(
        "unknown_model", f"{who} {of}, so whether it is {_name_of_model(other)} could not be checked by its weights."
    )


def _names(names: Sequence[str]) -> str:
    return f"{listed(names)} {'was' if len(names) == 1 else 'were'}"


def _name_of_model(place: Place) -> str:
    name = "a model" if place.model is None else f"`{place.model}`"
    return f"{name} ({place.digest[:15]}…)" if place.digest else name


def _trained_on(sae: SAE, seen: Mapping[str, Any]) -> bool:
    """Return whether these are the very rows of the training."""
    return seen.get("digest") is not None and sae.provenance.get("data_digest") == seen["digest"]


def _other_model(one: Place, other: Place) -> bool:
    return _differ(one.digest, other.digest) and (one.revision is None or one.revision != other.revision)


def _other_module(one: str | None, other: str | None) -> bool:
    # A path in the model may be another name of the same module.
    short = [hook is not None and re.match(r"layers\.\d+", hook) is not None for hook in (one, other)]
    return _differ(one, other) and short[0] == short[1]


def _other_hook(one: Place, other: Place) -> bool:
    return _other_module(one.hook, other.hook)


def _other_target(one: Place, other: Place) -> bool:
    return _other_module(one.target, other.target)


def _other_scale(one: Place, other: Place) -> bool:
    if not one.scale or not other.scale:
        return False
    return not 1 / SCALE_LIMIT <= other.scale / one.scale <= SCALE_LIMIT


def _other_outliers(one: Place, other: Place) -> bool:
    return _differ(one.outliers, other.outliers) and bool(one.n_outliers or other.n_outliers)


def _outlier_text(place: Place, other: Place) -> str:
    none = place.outliers is None or math.isinf(place.outliers)
    return "of any norm" if none else f"of at most {place.outliers:g} times the median norm"


def _context(place: Place, other: Place) -> int | None:
    """Return the tokens that the model reads at once at this place; longer contexts than it can read are no longer."""
    known = [limit for limit in (place.limit, other.limit) if limit is not None]
    return None if place.context is None else min([place.context, *known])


def _mask_text(mask: Mapping[str, Any]) -> str:
    """Return which tokens a mask leaves, in words; "all tokens" without one."""
    chosen = [
        f"{name} {', '.join(map(str, value)) if isinstance(value, list) else value}"
        for name, value in mask.items()
        if name != "chat_template"
    ]
    return f"tokens of {', '.join(chosen)}" if chosen else "all tokens"


def _differ(one: Any, other: Any) -> bool:
    return one is not None and other is not None and one != other


_COMPARED: tuple[tuple[str, Callable[[Place, Place], bool], Callable[[Place, Place], str]], ...] = (
    ("other_model", _other_model, lambda a, b: f"of {_name_of_model(a)}"),
    ("other_hook", _other_hook, lambda a, b: f"of `{a.hook}`"),
    ("other_target", _other_target, lambda a, b: f"to predict `{a.target}`"),
    ("other_width", lambda a, b: _differ(a.width, b.width), lambda a, b: f"of width {a.width}"),
    ("other_scale", _other_scale, lambda a, b: f"of variance {a.scale:.3g}"),
    ("other_dtype", lambda a, b: _differ(a.precision, b.precision), lambda a, b: f"in {a.precision}"),
    (
        "other_tokens",
        lambda a, b: _differ(a.special, b.special),
        lambda a, b: f"{'without' if a.special else 'with'} the tokens that the tokenizer adds",
    ),
    ("other_tokens", _other_outliers, _outlier_text),
    ("other_tokens", lambda a, b: _differ(a.mask, b.mask), lambda a, b: f"of {a.mask}"),
    (
        "other_context",
        lambda a, b: _differ(_context(a, b), _context(b, a)),
        lambda a, b: f"of contexts of {_context(a, b)} tokens",
    ),
)
"""Code, whether two places differ in it, and what one of them has."""


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


LOCATIONS = ("model_path", "data_path", "rows_path")
"""Entries of the `info` of rows that say where files lie: they help to find them, and decide no number."""


def without_locations(info: Mapping[str, Any]) -> dict[str, Any]:
    """Return `info` without what changes when a file or folder moves."""
    return {key: value for key, value in info.items() if key not in LOCATIONS}


_LOCAL_PATH = re.compile(
    r"""(?<![\w.:/\\])                        # not inside a word, an address or another path
        (?:file://+|~[\w.-]*[/\\]|[A-Za-z]:[\\/]|\\\\|/)(?=[\w.~-])
        [^\s`'"<>|,;)]*""",
    re.VERBOSE,
)


def without_local_paths(value: Any) -> Any:
    """Return plain JSON without paths of this machine: without `LOCATIONS`, and of absolute paths the last name.

    >>> without_local_paths({"model": "/home/me/models/gemma", "rows_path": "/data/rows", "data": "owner/name"})
    {'model': 'gemma', 'data': 'owner/name'}
    >>> without_local_paths("rows of `/home/me/rows`; 3 nats/token, https://host/a/b")
    'rows of `rows`; 3 nats/token, https://host/a/b'
    """
    if isinstance(value, Mapping):
        return {
            without_local_paths(key): without_local_paths(item) for key, item in value.items() if key not in LOCATIONS
        }
    if isinstance(value, list | tuple):
        return [without_local_paths(item) for item in value]
    return _bare(value) if isinstance(value, str) else value


def _bare(text: str) -> str:
    whole = text.strip()
    if os.path.isabs(whole) and "\n" not in whole:  # all of it is a path, which may hold spaces
        return _last(whole)
    return _LOCAL_PATH.sub(lambda found: _last(found[0]), text)


def _last(path: str) -> str:
    return re.split(r"[/\\]", path.rstrip("/\\"))[-1]


def place_facts(info: Mapping[str, Any]) -> dict[str, Any]:
    """Return the entries of the `info` of rows that say where they come from, as an SAE's provenance records them."""
    return {key: info[key] for key in RECORDED if info.get(key) is not None}


RECORDED = (
    "model", "model_digest", "model_revision", "model_dtype", "model_context", "hook", "hook_out", "layer", "dtype",
    "context", "filters", "mask", "data", *LOCATIONS,
)  # fmt: skip
"""Entries of the `info` of rows that the provenance of an SAE records."""
