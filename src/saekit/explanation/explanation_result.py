"""Explanations of latents: a card for each, numbers for all, and what the numbers would be by chance."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from html import escape
from typing import Any, ClassVar

from ..errors import ConfigError, FormatError
from ..measure.numbers import decimals, percent
from ..measure.results import Measured, Result
from ..terminal import plain

TOLD = 0.95
"""Percentile among shuffled codes from which a label is told from chance."""


@dataclass(frozen=True)
class Example:
    """Some tokens around a firing, with the latent's code at each."""

    document: int
    """Number of the text."""
    peak: int
    """Index in `tokens` of the firing that the example was chosen for."""
    tokens: list[str]
    """Text of the tokens."""
    codes: list[float]
    """The latent's code at each; 0 where it does not fire."""
    quantile: float | None = None
    """Fraction of the latent's nonzero codes that are smaller than this one's; None for one of the strongest."""


@dataclass(frozen=True)
class TokenShare:
    """A token that a latent responds to."""

    token: str
    """Its text, without the space around it."""
    share: float
    """Fraction of the latent's activation that falls on it."""
    rate: float
    """Fraction of the token's occurrences at which the latent fires."""


@dataclass(frozen=True)
class Cluster:
    """Firings of a latent in contexts that are alike."""

    fraction: float
    """Fraction of the firings looked at."""
    tokens: list[str]
    """Tokens that it fires on there, most frequent first."""
    context: list[str] = field(default_factory=list)
    """Tokens that are around these firings more than around others, most typical first."""


@dataclass(frozen=True)
class Written:
    """A token whose logit a latent moves."""

    token: str
    """Its text."""
    value: float
    """Change of its logit, less the mean over all tokens, where the latent fires as it does on average."""


@dataclass(frozen=True)
class Card:
    """What one latent responds to."""

    latent: int
    """Number of the latent."""
    label: str
    """Tokens that it responds to more than others, in the labelling half; empty for one that did not fire there."""
    density: float
    """Fraction of tokens at which it fires."""
    maximum: float
    """Largest code, by magnitude."""
    mean: float
    """Mean magnitude of its nonzero codes."""
    documents: float | None
    """Effective number of labelling documents that it fires on: ``1 / sum q_d^2``."""
    purity: float | None
    """Largest fraction of its activation on one token, in the labelling half."""
    purity_percentile: float | None
    """Fraction of density-matched chance samples with a lower purity."""
    detection: float | None
    """Area under the ROC curve of its label's tokens, for where it fires in the other half: 0.5 is chance."""
    detection_percentile: float | None
    """Fraction of shuffled latents of similar density whose labels, made in the same way, detect less."""
    histogram: list[list[float]] = field(default_factory=list)
    """``[lower end, count]`` of the bins of nonzero codes, four per octave."""
    top: list[Example] = field(default_factory=list)
    """Strongest examples, each of another document."""
    sample: list[Example] = field(default_factory=list)
    """Examples of every fifth of its nonzero codes, drawn uniformly within each, strongest first."""
    neighbours: list[dict[str, float]] = field(default_factory=list)
    """``{"latent", "cosine"}`` of the nearest decoder rows."""
    label_kind: str = "token"
    """What the label says about where it fires: on a ``token``, after one (``previous``), before one (``next``), at a
    ``position`` of the text, or in a ``context`` of such tokens."""
    tokens: list[TokenShare] = field(default_factory=list)
    """Tokens that it fires on, largest share first, in the labelling half."""
    previous: list[TokenShare] = field(default_factory=list)
    """The same for the token before."""
    next: list[TokenShare] = field(default_factory=list)
    """The same for the token after."""
    positions: list[list[float]] = field(default_factory=list)
    """``[first position, rate]``: how often it fires at the positions of a text from there to the next entry's."""
    coactive: list[dict[str, float]] = field(default_factory=list)
    """``{"latent", "jaccard"}``: latents that fire on the same tokens, ``n_both / n_either``, most alike first."""
    clusters: list[Cluster] = field(default_factory=list)
    """Groups of contexts that it fires in, largest first; one where they do not fall apart, none where not tried."""
    polysemantic: bool | None = None
    """Whether its contexts fall apart further than one bell-shaped cloud of them would; None where not tried."""
    promoted: list[Written] = field(default_factory=list)
    """Tokens whose logits it raises most through the model's own last norm and head; empty where such lists do not
    agree with ablation (`Explanation.logits`)."""
    suppressed: list[Written] = field(default_factory=list)
    """Tokens whose logits it lowers most."""
    scores: dict[str, float | None] = field(default_factory=dict)
    """All scores by name; `Explanation.scores` says what each is."""
    percentiles: dict[str, dict[str, float]] = field(default_factory=dict)
    """By score, then by control: fraction of the control's latents of the nearest density that score worse, ties
    counted half."""

    @property
    def is_told(self) -> bool:
        """Whether its label detects more than 95% of shuffled latents' labels do."""
        return self.detection_percentile is not None and self.detection_percentile >= TOLD

    def misshapen(self) -> str | None:
        """Return the name of a part that does not have its form; None where all have."""
        pairs = {"neighbours": ("cosine", self.neighbours), "coactive": ("jaccard", self.coactive)}
        for name, (key, listed) in pairs.items():
            if any({"latent", key} - set(each) for each in listed):
                return name
        for name, rows in {"histogram": self.histogram, "positions": self.positions}.items():
            if any(len(row) != 2 for row in rows):
                return name
        for name, examples in {"top": self.top, "sample": self.sample}.items():
            if any(len(each.tokens) != len(each.codes) or not 0 <= each.peak < len(each.tokens) for each in examples):
                return name
        return None

    def text(self, width: int = 100) -> str:
        """Return the card as lines of text."""
        shown = [
            f"latent {self.latent}: {self.label or 'no label'}",
            f"fires at {percent(self.density)} of tokens, mean {decimals(self.mean)}, "
            f"maximum {decimals(self.maximum)}; on about {_number(self.documents)} documents",
            f"label: detects where it fires in held-out documents with AUC {_number(self.detection)} "
            f"(above {_percent(self.detection_percentile)} of shuffled latents); purity {_number(self.purity)} "
            f"(above {_percent(self.purity_percentile)} of chance)",
        ]
        shown += self._facts()
        for title, examples in self._examples():
            shown += [f"{title}:", *(_line(example, width) for example in examples)]
        return "\n".join(shown)

    def _facts(self) -> list[str]:
        """Return a line for each list of tokens or latents that there is."""
        others = (("nearest decoder rows", self.neighbours, "cosine"), ("fires with", self.coactive, "jaccard"))
        lines = [
            f"{title}: " + ", ".join(f"{each['latent']:.0f} ({decimals(each[key])})" for each in listed)
            for title, listed, key in others
            if listed
        ]
        shares = (("on", self.tokens), ("after", self.previous), ("before", self.next))
        told = [f"{title} {' '.join(map(_share, listed[:3]))}" for title, listed in shares if listed]
        lines += [f"fires {', '.join(told)}"] if told else []
        return lines + self._meanings()

    def _meanings(self) -> list[str]:
        """Return the groups of contexts, where there are several, and the tokens that it writes."""
        lines = []
        if self.polysemantic:
            groups = "; ".join(f"{percent(each.fraction)} on {' '.join(each.tokens[:3])}" for each in self.clusters)
            lines.append(f"its contexts fall apart: {groups}")
        for title, written in (("raises", self.promoted), ("lowers", self.suppressed)):
            if written:
                lines.append(f"{title} {', '.join(map(_moved, written[:8]))}")
        return lines

    def __repr__(self) -> str:
        return plain(self.text(), keep="\n")

    def _repr_html_(self) -> str:
        head = "<br>".join(escape(plain(line)) for line in self.text().split("\n")[: 3 + len(self._facts())])
        tables = [
            f"<table><caption style='text-align:left'>{title}</caption>{''.join(map(self._row, examples))}</table>"
            for title, examples in self._examples()
        ]
        return f"<div><p>{head}</p>{''.join(tables)}</div>"

    def _examples(self) -> list[tuple[str, list[Example]]]:
        """Return the examples under their headings."""
        found = [("strongest", self.top), ("from every fifth of its codes", self.sample)]
        return [each for each in found if each[1]]

    def _row(self, example: Example) -> str:
        """Return an example as a row of a table."""
        shown = "".join(map(self._shaded, example.tokens, example.codes))
        code = decimals(example.codes[example.peak])
        return f"<tr><td>{code}</td><td dir='auto' style='text-align:left'>{shown}</td></tr>"

    def _shaded(self, token: str, code: float) -> str:
        """Return a token, the darker the larger the code; black on strong shades, whatever the theme."""
        strength = min(abs(code) / (self.maximum or 1.0), 1.0)
        ink = ";color:#000" if strength > 0.5 else ""
        text = escape(plain(_in_line(token)))
        return f"<span style='background:rgba(230,140,0,{strength:.2f}){ink}'>{text}</span>" if code else text


def _in_line(token: str) -> str:
    """Return a token with signs for what ends a line or leaves a gap."""
    return token.replace("\n", "⏎").replace("\t", "⇥")


def _line(example: Example, width: int) -> str:
    """Return an example on one line, the peak in ⟦⟧, cut at both ends around it."""
    parts = [_in_line(token) for token in example.tokens]
    before, peak, after = "".join(parts[: example.peak]), parts[example.peak], "".join(parts[example.peak + 1 :])
    room = max(10, width - 12 - len(peak))
    left = before[-(room // 2) :] if before else ""
    right = after[: room - len(left)]
    return f"  {decimals(example.codes[example.peak]):>8}  {left}⟦{peak}⟧{right}"


def _share(each: TokenShare) -> str:
    return f"`{each.token}` {percent(each.share)}"


def _moved(each: Written) -> str:
    return f"`{each.token}` {'+' * (each.value > 0)}{decimals(each.value)}"


def _number(value: float | None) -> str:
    return "unknown" if value is None else decimals(value)


def _percent(value: float | None) -> str:
    return "an unknown part" if value is None else percent(value)


@dataclass(frozen=True)
class Null:
    """A score of latents that mean nothing."""

    control: str
    """Name of the control, one of `Explanation.controls`."""
    value: Measured
    """Mean of the score over the control's latents, at the densities of the SAE's."""
    difference: Measured
    """The SAE's mean less that one."""
    verdict: str
    """``better``, ``worse``, or ``undecided`` where the interval holds 0; all of the scores are decided together.
    ``undefined`` where there is no difference."""


@dataclass(frozen=True)
class Score:
    """One score of all latents, compared with the controls."""

    name: str
    """Name, as in `Card.scores`."""
    meaning: str
    """What it is, in words."""
    value: Measured
    """Mean over the latents that have it."""
    is_higher_better: bool = True
    """Whether a larger value is the more coherent one."""
    nulls: list[Null] = field(default_factory=list)
    """The same of each control."""
    tells_random_apart: bool | None = None
    """Whether it is better than for every control but the shuffled codes: those of a dictionary or a model that learned
    nothing. None without such a control. False: the score says nothing about what was learned."""

    @property
    def tells_trained_apart(self) -> bool | None:
        """Whether it is better than for a randomized transformer; see `tells_trained_apart`."""
        return tells_trained_apart({null.control: null.verdict for null in self.nulls})


RANDOMIZED = "randomized"
"""Control that is made of a transformer with random weights."""


def tells_trained_apart(verdicts: Mapping[str, str]) -> bool | None:
    """Return whether a score tells a trained model from a random one, from its verdicts by control; None: not known."""
    word = verdicts.get(RANDOMIZED, "undefined")
    return None if word == "undefined" else word == "better"


def about_random_models(tells: Mapping[str, bool | None]) -> str:
    """Say which scores, by name, tell a trained model from a random one, and which do not; nothing without scores."""
    names = {word: [name.replace("_", " ") for name, each in tells.items() if each is word] for word in (True, False)}
    if not tells:
        return ""
    if not names[True] and not names[False]:
        return (
            "Whether a score tells a trained model from a random one was not asked: it needs the control `randomized` "
            "(--controls shuffled,random,randomized)."
        )
    if not names[True]:
        return "No score tells the trained model from one of the same architecture with random weights."
    others = f"; these do not: {', '.join(names[False])}" if names[False] else ""
    return (
        "Scores that tell the trained model from one of the same architecture with random weights: "
        f"{', '.join(names[True])}{others}."
    )


@dataclass(frozen=True)
class Control:
    """Latents that the SAE's are compared with."""

    name: str
    """``shuffled``, ``random``, ``frozen``, ``randomized`` or the name of an SAE that was given."""
    what: str
    """How it was made."""
    n_latents: int
    """Latents of it that fire."""
    seconds: float
    """What it cost."""


@dataclass(frozen=True)
class LogitLists:
    """Whether the lists of tokens that latents write agree with what ablating the latents does."""

    agreement: Measured
    """Spearman correlation over the vocabulary of a list with the measured change of the logits under ablation: median
    over latents."""
    is_shown: bool
    """Whether cards have the lists: from an agreement of 0.3."""
    n_latents: int
    """Latents that were ablated."""
    reason: str | None = None
    """Why there are no lists."""


@dataclass(frozen=True)
class Group:
    """Scores of some of the latents."""

    by: str
    """What the groups differ in: ``sharing``, ``size``, ``architecture``, ``selection``."""
    name: str
    """Name of the group: ``shared``, ``orphan``, ``1-64``, …"""
    n_latents: int
    """Latents of it that fire."""
    scores: dict[str, Measured] = field(default_factory=dict)
    """Mean of each score over them."""


@dataclass(frozen=True, repr=False)
class Explanation(Result):
    """What the latents of an SAE respond to."""

    KIND: ClassVar[str] = "explanation"
    SCHEMA: ClassVar[int] = 2
    PARTS: ClassVar[tuple[str, ...]] = ("cards", "scores", "groups")

    sae: dict[str, Any]
    """Latents, width, rule, digest, provenance."""
    model: dict[str, Any]
    """Name, digest and number type of the model."""
    hook: str
    """Where the codes come from."""
    data: dict[str, Any]
    """Name and digest of the texts, tokens, documents in either half."""
    detection: Measured
    """Mean over latents of the held-out AUC of their labels."""
    detection_null: Measured
    """The same for shuffled codes: each latent's firings moved to other rows."""
    told_fraction: Measured
    """Fraction of the labels that detect more than 95% of the shuffled latents' labels do; 0.05 is chance."""
    fired_fraction: float
    """Fraction of the latents that fire at all."""
    cards: list[Card]
    """A card per latent, in the order of their numbers."""
    scores: list[Score] = field(default_factory=list)
    """Every score compared with every control. Empty in files of schema 1."""
    controls: list[Control] = field(default_factory=list)
    """What the scores are compared with."""
    logits: LogitLists | None = None
    """Whether cards list the tokens that latents write; None where that was not asked."""
    groups: list[Group] = field(default_factory=list)
    """Scores by group of latents, where groups were given."""

    def check(self) -> None:
        """Raise `FormatError` where a card does not hold what lists and pictures of it need."""
        for card in self.cards:
            wrong = card.misshapen()
            if wrong is not None:
                raise FormatError(
                    f"`{wrong}` of the card of latent {card.latent} must be as saekit writes it; it is not. The file "
                    "was altered: explain again."
                )

    def __getitem__(self, latent: int) -> Card:
        """Return the card of a latent."""
        for card in self.cards:
            if card.latent == latent:
                return card
        raise ConfigError(
            f"latent {latent} must have a card; there are {len(self.cards)}, of latents that fire. "
            "Ask for it: ExplainSettings(latents=(…,))."
        )

    def table(self) -> list[list[str]]:
        """Return a row per card, best-told labels first."""
        lines = [["latent", "label", "density", "auc", "above", "purity", "documents"]]
        order = sorted(self.cards, key=lambda card: -(card.detection if card.detection is not None else -math.inf))
        for card in order[:SHOWN]:
            above = "–" if card.detection_percentile is None else percent(card.detection_percentile)
            numbers = [percent(card.density), _number(card.detection), above, _number(card.purity)]
            label = card.label if len(card.label) <= LABEL else f"{card.label[: LABEL - 1]}…"
            lines.append([str(card.latent), label, *numbers, _number(card.documents)])
        return lines

    def score_table(self) -> list[list[str]]:
        """Return a row per score: its mean, that of each control, and whether it tells random latents apart."""
        names = [control.name for control in self.controls]
        lines = [["score", "mean", *names, "tells random apart", "random model"]]
        for score in self.scores:
            nulls = {null.control: null for null in score.nulls}
            cells = [str(nulls[name].value) if name in nulls else "–" for name in names]
            tells = {None: "not tested", True: "yes", False: "no"}[score.tells_random_apart]
            model = {None: "not asked", True: "told apart", False: "not told"}[score.tells_trained_apart]
            lines.append([score.name, str(score.value), *cells, tells, model])
        return lines

    def group_table(self) -> list[list[str]]:
        """Return a row per group of latents."""
        names = [name for name in GROUP_SCORES if any(name in group.scores for group in self.groups)]
        return [
            ["by", "group", "latents", *names],
            *(
                [each.by, each.name, f"{each.n_latents:,}", *(str(each.scores.get(name, "–")) for name in names)]
                for each in self.groups
            ),
        ]

    def caption(self) -> str:
        """Return what the labels are worth."""
        more = f"\n{len(self.cards) - SHOWN:,} more cards." if len(self.cards) > SHOWN else ""
        return (
            f"Labels are made in one half of the documents; their AUC for where the latent fires in the other half "
            f"is {self.detection} on average, {self.detection_null} for shuffled codes. The fraction of the labels "
            f"that detect more than 95% of the shuffled ones do is {self.told_fraction}. {self._not_told()}Coherent "
            f"firing is not meaning: a frozen decoder has it too.{self._of_random_models()}{more}"
        )

    def _of_random_models(self) -> str:
        """Return what the scores say of a model with random weights."""
        told = about_random_models({score.name: score.tells_trained_apart for score in self.scores})
        return f"\n{told}" if told else ""

    def _not_told(self) -> str:
        """Return which scores do not tell the latents from those of a dictionary or model that learned nothing."""
        names = [score.name for score in self.scores if score.tells_random_apart is False]
        if not names:
            return ""
        return f"Not shown to be better than for random latents, and so no sign of learning: {', '.join(names)}. "


SHOWN = 25
"""Rows of the table."""

LABEL = 36
"""Characters of a label in it."""

GROUP_SCORES = ("detection", "lexical", "context", "embedding", "embedding_masked", "cohesion", "intruder", "purity")
"""Scores of the table of groups."""
