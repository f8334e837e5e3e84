"""What a language model is asked about labels of latents, and how its answers are read."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from ..terminal import plain

LONGEST_LABEL = 160
"""Characters of a label that is tested; longer ones are rejected."""

LABEL_ANSWER, YES_NO_ANSWER = 60, 4
"""Tokens that an answer may have: a label, a yes or no."""

_REASONING = re.compile(
    r"</?think|^\s*(okay|ok|let me|let's|let us|first,|we need|i need|i think|i'll|the user|looking at|sure[,!.]|"
    r"here is|here's|step 1|to answer)\b",
    re.IGNORECASE,
)
_YES_NO = re.compile(r"\W*(yes|no)\b", re.IGNORECASE)


@dataclass(frozen=True)
class Prompt:
    """One question."""

    text: str
    """What the model reads."""
    max_tokens: int
    """Maximum number of tokens of the answer."""
    is_choice: bool
    """Whether the answer is yes or no."""


@dataclass(frozen=True)
class Answer:
    """What a model said."""

    text: str = ""
    """Its words."""
    yes: float | None = None
    """Probability of yes against no, where the model states probabilities."""
    tokens: tuple[int, int] = (0, 0)
    """Tokens read and written, where the model states them."""
    failure: str = ""
    """Why there is no answer; empty where there is one."""

    @property
    def score(self) -> float | None:
        """From 0 (no) to 1 (yes); None where the answer is missing or is neither."""
        if self.failure:
            return None
        if self.yes is not None and math.isfinite(self.yes):
            return self.yes
        found = _YES_NO.match(self.text)
        return None if found is None else float(found[1].lower() == "yes")


def detection_prompt(label: str, tokens: Sequence[str]) -> Prompt:
    """Return the question whether a description fits anything in a text."""
    return _choice(
        f"A part of a language model was described as {quoted(label)}.\n\nText: {_shown(tokens)}\n\n"
        "Does the description fit any part of this text?"
    )


def fuzzing_prompt(label: str, tokens: Sequence[str], marks: Sequence[bool]) -> Prompt:
    """Return the question whether a description fits the marked words of a text."""
    return _choice(
        f"A part of a language model was described as {quoted(label)}.\n\nText: {_shown(tokens, marks)}\n\n"
        "Does the description fit the words between « and »?"
    )


def _choice(text: str) -> Prompt:
    return Prompt(f"{text} Answer with yes or no only.\nAnswer:", YES_NO_ANSWER, True)


def label_prompt(windows: Iterable[tuple[Sequence[str], Sequence[bool]]]) -> Prompt:
    """Return the question what texts have in common where a latent fires."""
    texts = "\n".join(f"{number}. {_shown(*each)}" for number, each in enumerate(windows, 1))
    return Prompt(
        "A part of a language model is active at the words between « and » in these texts:\n\n"
        f"{texts}\n\nDescribe in at most 12 words what it responds to. Write the description only.\nDescription:",
        LABEL_ANSWER,
        False,
    )


def label_in(answer: Answer) -> str:
    """Return the label that an answer holds: its first line, without quotes around it."""
    lines = [line.strip() for line in answer.text.strip().splitlines() if line.strip()]
    return lines[0].strip("\"'“”*` ") if len(lines) == 1 else answer.text.strip()


def why_rejected(label: str) -> str:
    """Return why a label is not tested; empty for one that is."""
    if not label.strip():
        return "no label"
    if len(label) > LONGEST_LABEL:
        return f"a label of {len(label):,} characters; at most {LONGEST_LABEL} are tested"
    if "\n" in label.strip() or _REASONING.search(label):
        return "a label that holds reasoning"
    return ""


def quoted(label: str) -> str:
    """Return a label in quotes that it cannot leave."""
    return json.dumps(plain(label), ensure_ascii=False)


def _shown(tokens: Sequence[str], marks: Sequence[bool] | None = None) -> str:
    """Return a text on one line, runs of marked tokens between « and »."""
    parts, inside = [], False
    for number, token in enumerate(tokens):
        marked = marks is not None and marks[number]
        if marked != inside:
            parts.append("«" if marked else "»")
            inside = marked
        parts.append(token.replace("«", "‹").replace("»", "›"))
    text = "".join(parts) + ("»" if inside else "")
    return " ".join(plain(text.replace("\n", " ").replace("\t", " ")).split())


def probability_of_yes(logprobs: Mapping[str, float]) -> float | None:
    """Return the probability of yes against no from log-probabilities of first tokens; None without either."""
    sums = {"yes": 0.0, "no": 0.0}
    for token, value in logprobs.items():
        word = token.strip().lower()
        if word in sums and value <= 0:
            sums[word] += math.exp(value)
    total = sum(sums.values())
    return sums["yes"] / total if total > 0 else None
