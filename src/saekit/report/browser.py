"""The feature browser: an index of all latents in the page, their cards next to it, joined with the other results."""

from __future__ import annotations

import base64
import gzip
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..terminal import escaped
from .numbers import told

INLINE = 4096
"""Cards that stand in the page itself; with more, all of them stand in files next to it."""

INLINE_BYTES = 7_500_000
"""The same as packed text: a page with its cards stays below 10 MB."""

PER_CHUNK = 1024
"""Cards that are packed together, and stand in a file together."""

PEAKS = 12
"""Tokens of a latent's contexts that the search looks at."""

Card = Mapping[str, Any]

_SCALARS = (
    ("density", "density", "fraction of tokens at which it fires"),
    ("detection", "label AUC", "area under the ROC curve of the label, in documents that it was not made of"),
    ("detection_percentile", "above shuffled", "fraction of shuffled latents of similar density whose labels do worse"),
    ("purity", "purity", "largest fraction of its activation on one token"),
    ("purity_percentile", "purity above chance", "fraction of density-matched samples with a lower purity"),
    ("documents", "documents", "effective number of documents that it fires in"),
    ("maximum", "maximum", "largest code"),
    ("mean", "mean code", "mean of its nonzero codes"),
)
_OWN = {"latent", "label", "histogram", "top", "sample", "neighbours", *(name for name, _, _ in _SCALARS)}


@dataclass(frozen=True)
class Column:
    """A number of every latent: what lists show and sort by."""

    key: str
    name: str
    about: str
    values: Sequence[float | None]

    def to_json(self) -> dict[str, Any]:
        """Return it for the script of the page."""
        return {"k": self.key, "n": self.name, "a": self.about, "v": [_short(value) for value in self.values]}


@dataclass(frozen=True)
class Browser:
    """All that a page shows of the latents of one SAE."""

    name: str
    index: str
    """Packed index, for the page."""
    chunks: list[str]
    """Packed cards."""
    latents: Sequence[int]
    """Latents that have one."""
    digest: str
    """Digest of the SAE."""


def browsers(results: Sequence[Mapping[str, Any]]) -> list[Browser]:
    """Return the browser of every explanation, with what the other results say about the same SAE."""
    explained = [each for each in results if each["kind"] == "explanation" and each["cards"]]
    return [_browser(name, each, results) for name, each in zip(names_of(explained), explained, strict=True)]


def names_of(explained: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return the names of the SAEs of explanations, told apart where they are alike: by digest, else by number."""
    found = [name_of(each) for each in explained]
    digests = [str(each["sae"].get("digest") or "").removeprefix("sha256:")[:8] for each in explained]
    for marks in (digests, [str(number) for number in range(1, len(found) + 1)]):
        alike = [found.count(name) > 1 for name in found]
        found = [f"{name} ({mark})" if twice else name for name, mark, twice in zip(found, marks, alike, strict=True)]
    return found


def _browser(name: str, result: Mapping[str, Any], results: Sequence[Mapping[str, Any]]) -> Browser:
    cards, digest = result["cards"], result["sae"].get("digest")
    about = _Others(digest, results)
    latents = [card["latent"] for card in cards]
    columns = [*_own_columns(cards), *about.columns(latents)]
    index = {
        "name": name,
        "of": result["sae"].get("n_latents"),
        "model": result["model"].get("model"),
        "data": result["data"].get("name"),
        "ids": latents,
        "labels": [card["label"] for card in cards],
        "peaks": [_peaks(card) for card in cards],
        "columns": [column.to_json() for column in columns if any(value is not None for value in column.values)],
        "per": PER_CHUNK,
        "seeds": about.n_saes,
        "classes": about.classes,
        "logits": result.get("logits"),
    }
    chunks = [_chunk(cards[at : at + PER_CHUNK], about) for at in range(0, len(cards), PER_CHUNK)]
    return Browser(index["name"], pack(index), chunks, latents, digest or "")


def name_of(result: Mapping[str, Any]) -> str:
    """Return what the SAE of an explanation is called: its training, and the place it reads."""
    known = result["sae"].get("provenance") or {}
    rule = result["sae"].get("rule") or {}
    kind = (known.get("config") or {}).get("arch") or rule.get("name") or "SAE"
    seed = "" if known.get("seed") is None else f", seed {known['seed']}"
    return f"{kind}, {result['sae'].get('n_latents', 0):,} latents, {result['hook']}{seed}"


def pack(value: object) -> str:
    """Return JSON as base64 of gzip: a fifth of the bytes, and no letter that could end a script."""
    return base64.b64encode(gzip.compress(escaped(value, separators=(",", ":")).encode(), 6, mtime=0)).decode()


def _own_columns(cards: Sequence[Card]) -> list[Column]:
    """Return the numbers of the cards: those known by name, then every other one, then scores."""
    found = [Column(key, name, about, [card.get(key) for card in cards]) for key, name, about in _SCALARS]
    others = dict.fromkeys(
        key for card in cards for key, value in card.items() if key not in _OWN and _is_number(value)
    )
    found += [Column(key, key.replace("_", " "), "", [card.get(key) for card in cards]) for key in others]
    scores = dict.fromkeys(key for card in cards for key in card.get("scores") or ())
    known = {column.key for column in found}
    return found + [
        Column(f"scores.{key}", key.replace("_", " "), "", [(card.get("scores") or {}).get(key) for card in cards])
        for key in scores
        if key not in known
    ]


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _short(value: Any) -> Any:
    """Return a number with five digits, or with all where what is shown of five would differ from what is of all."""
    if not isinstance(value, float) or not math.isfinite(value) or abs(value) >= 1e4:
        return value
    text = f"{value:.4e}"
    return value if text.partition("e")[0].endswith("50") else float(text)


def _peaks(card: Card) -> list[str]:
    found = dict.fromkeys(
        example["tokens"][example["peak"]].strip()[:40] for example in (*card["top"], *card["sample"])
    )
    return [token for token in found if token][:PEAKS]


def _chunk(cards: Sequence[Card], others: _Others) -> str:
    """Return cards whose contexts refer to one list of tokens."""
    numbers: dict[str, int] = {}

    def token(text: str) -> int:
        return numbers.setdefault(text, len(numbers))

    def context(example: Mapping[str, Any]) -> list[Any]:
        codes = [[at, _short(code)] for at, code in enumerate(example["codes"]) if code]
        found = [example["document"], example["peak"], [token(text) for text in example["tokens"]], codes]
        return found if example.get("quantile") is None else [*found, _short(example["quantile"])]

    shown = [
        {
            "histogram": [[_short(low), count] for low, count in card["histogram"]],
            "top": [context(each) for each in card["top"]],
            "sample": [context(each) for each in card["sample"]],
            "neighbours": [[int(each["latent"]), _short(each["cosine"])] for each in card["neighbours"]],
            "more": {key: value for key, value in card.items() if key not in _OWN and value not in (None, [], {}, "")},
            **others.of(card["latent"]),
        }
        for card in cards
    ]
    return pack({"tokens": list(numbers), "cards": shown})


def _compared(comparisons: Sequence[Mapping[str, Any]], digest: str | None) -> tuple[Any, int | None]:
    """Return what the first comparison of an SAE says about it, and of how many SAEs it is; None without one."""
    for each in comparisons:
        for sae in each["saes"]:
            if sae["sae"].get("digest") == digest and sae["found_in"]:
                return sae, len(each["saes"])
    return None, None


class _Others:
    """What other results say about the latents of an SAE, by its digest."""

    def __init__(self, digest: str | None, results: Sequence[Mapping[str, Any]]) -> None:
        kinds: dict[str, list[Mapping[str, Any]]] = {}
        for each in results if digest else ():
            kinds.setdefault(each["kind"], []).append(each)
        self.compared: Any
        self.n_saes: int | None
        self.compared, self.n_saes = _compared(kinds.get("comparison", ()), digest)

        def mine(kind: str) -> list[Mapping[str, Any]]:
            return [each for each in kinds.get(kind, ()) if each["sae"].get("digest") == digest]

        self.sizes = next(([point["size"] for point in each["points"]] for each in mine("size_curve")), [])
        self.effects = {each["latent"]: each for result in mine("effects") for each in result["effects"]}
        self.judged = {each["latent"]: each for result in mine("label_scores") for each in result["scores"]}
        self.weights: dict[int, list[list[Any]]] = {}
        self.classes: dict[str, list[int]] = {}
        for result in mine("classifier"):
            self._add_weights(result["top_latents"])
        self.selected: dict[int, list[list[Any]]] = {}
        for result in kinds.get("classification", ()):
            self._add_selected(result, {sae["name"] for sae in result["saes"] if sae.get("digest") == digest})

    def _add_selected(self, result: Mapping[str, Any], sources: set[str]) -> None:
        for arm in result["arms"]:
            for rank, latent in enumerate(arm["selected"] if arm["source"] in sources else (), start=1):
                self.selected.setdefault(latent, []).append([result["name"], arm["name"], rank])

    def _add_weights(self, top: Mapping[str, Sequence[Mapping[str, Any]]]) -> None:
        for name, found in top.items():
            self.classes[name] = [each["latent"] for each in found]
            for each in found:
                self.weights.setdefault(each["latent"], []).append([name, each["weight"]])

    def columns(self, latents: Sequence[int]) -> list[Column]:
        """Return what they say in numbers."""
        found = []

        def column(key: str, name: str, about: str, value: Callable[[int], float | None]) -> None:
            found.append(Column(key, name, about, [value(latent) for latent in latents]))

        if self.compared is not None:
            column("found_in", "found in", "number of SAEs that have it", lambda j: _at(self.compared["found_in"], j))
            column("stability", "stability", "fraction of the other SAEs that have it", self._stability)
            column(
                "alignment", "alignment", "mean cosine with its partners in the other SAEs",
                lambda j: _at(self.compared["alignment"], j),
            )  # fmt: skip
        if self.sizes:
            column("size", "in size", "smallest size of the SAE that has it", self._size)
        if self.selected:
            column(
                "rank", "selected", "best rank among the latents that a classifier selected",
                lambda j: min((rank for _, _, rank in self.selected.get(j, ())), default=None),
            )  # fmt: skip
        for name in dict.fromkeys(test["scorer"] for each in self.judged.values() for test in each["tests"]):
            column(f"judge.{name}", f"{name} (judge)", "AUC of the label by a language model", self._judged_by(name))
        if self.effects:
            column("kl", "effect (KL)", "change of the next-token distribution when it is ablated, in nats", self._kl)
        return found

    def _stability(self, latent: int) -> float | None:
        return None if self.compared is None else _at(self.compared["stability"], latent)

    def _judged_by(self, scorer: str) -> Callable[[int], float | None]:
        def auc(latent: int) -> float | None:
            tests = self.judged.get(latent, {}).get("tests", ())
            return next((test["auc"]["value"] for test in tests if test["scorer"] == scorer), None)

        return auc

    def _size(self, latent: int) -> float | None:
        return next((size for size in self.sizes if latent < size), None)

    def _kl(self, latent: int) -> float | None:
        effect = self.effects.get(latent)
        return effect["kl"]["value"] if effect and effect.get("kl") else None

    def of(self, latent: int) -> dict[str, Any]:
        """Return what a card shows of them."""
        found: dict[str, Any] = {}
        if latent in self.selected:
            found["selected"] = self.selected[latent][:12]
        if latent in self.judged:
            found["judged"] = self.judged[latent]["label"]
        if latent in self.weights:
            found["weights"] = self.weights[latent]
        if latent in self.effects:
            found["effect"] = _with_texts(self.effects[latent])
        return found


def _with_texts(value: Any) -> Any:
    """Return JSON in which measured quantities have their text, as it stands everywhere else."""
    if isinstance(value, Mapping):
        found = {key: _with_texts(each) for key, each in value.items()}
        return {**found, "text": told(found)} if {"value", "low", "high"} <= set(found) else found
    return [_with_texts(each) for each in value] if isinstance(value, list) else value


def _at(values: Sequence[Any], latent: int) -> Any:
    return values[latent] if latent < len(values) else None
