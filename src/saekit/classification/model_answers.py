"""What a language model does on a task: which answer it chooses, and whether that is right.

The answers of one model (the *target*) become labels that the features of another (the *reader*) may predict: the
records are an ordinary data set for `classify` and `transfer` (``label="correct"``).
"""

from __future__ import annotations

import itertools
import json
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch

from .. import kernels
from ..errors import ConfigError, DataError, FormatError
from ..files import digest_bytes, read_bytes, read_json, read_together, replaced_together, write_bytes, write_sealed
from ..measure.intervals import wilson_interval
from ..measure.results import Measured, Result, result_to_json
from ..models.language import LanguageModel
from ..models.loading import load_language_model
from ..models.pretrained import accepts
from ..models.quiet import quiet_transformers
from ..progress import shows_progress
from ..provenance import library_versions, release
from ..rows.tokens import Contexts, TokenBatch, special_tokens, token_batches
from ..settings import Progress, check_choice, silent
from .tasks import Task, read_task

NORMALIZE = ("none", "tokens", "characters")
"""What the log-probability of a choice is divided by before choices are compared."""

RECORDS = "actions.jsonl"
CARD = "actions.json"


@dataclass(frozen=True, repr=False)
class Actions(Result):
    """What a model did on a task.

    Examples
    --------
    ::

        result = act("builtin", cloze_task("builtin", questions=2000))
        result.accuracy                     # compare with result.chance
        result.save("run")                  # run/actions.jsonl for `saekit classify --label correct`, run/actions.json
    """

    KIND: ClassVar[str] = "actions"
    SCHEMA: ClassVar[int] = 1
    PARTS: ClassVar[tuple[str, ...]] = ("records",)

    target: dict[str, Any]
    """The model: name, digest, number type."""
    task: dict[str, Any]
    """The task: kind, name, digest, …"""
    n_questions: int
    """Questions answered."""
    n_truncated: int
    """Questions whose beginning did not fit the model and was left out."""
    accuracy: Measured
    """Share of right answers, with its Wilson interval."""
    chance: float
    """Share of right answers of a model that draws its answers: mean over questions of 1 / choices."""
    most_chosen: dict[str, int]
    """How often it chose the first, second, … answer: a model that prefers a place is not reading."""
    records_digest: str
    """SHA-256 of the records."""
    records: list[dict[str, Any]] = field(default_factory=list, repr=False, compare=False)
    """One per question: text, said (with the answer it chose), asked (with all answers), choice (its number), chosen,
    correct, margin (nats between the best and the next), logprobs, and the further columns of the task."""

    def to_json(self) -> dict[str, Any]:
        """Plain JSON, without the records."""
        plain = result_to_json(self)
        del plain["records"]
        return plain

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write ``actions.jsonl`` (a data set, one line per question) and ``actions.json`` (what it is)."""
        with replaced_together(folder, CARD, (RECORDS,)) as next_to:
            write_bytes(next_to(RECORDS), _as_lines(self.records))
            write_sealed(next_to(CARD), self.to_json())

    @classmethod
    def load(cls, folder: str | os.PathLike[str]) -> Actions:
        """Read what `save` wrote.

        Raises
        ------
        FormatError
            A file is damaged, or the records are not those of the card.
        FileNotFoundError
            There is no such file.
        """
        return read_together(folder, CARD, (RECORDS,), cls._read)

    @classmethod
    def _read(cls, path_of: Callable[[str], Path]) -> Actions:
        card = cls.from_json(read_json(path_of(CARD)))
        data = read_bytes(path_of(RECORDS))
        if digest_bytes(data) != card.records_digest:
            raise FormatError(
                f"`{path_of(RECORDS)}` must be the records that {CARD} describes; its digest is another. Run the "
                "actions again."
            )
        card.records.extend(json.loads(line) for line in data.decode("utf-8").splitlines())
        return card

    def table(self) -> list[list[str]]:
        """Rows of text, headings first."""
        return [
            ["target", "task", "questions", "accuracy", "chance"],
            [
                str(self.target.get("model")), f"{self.task.get('kind')} of {self.task.get('name')}",
                f"{self.n_questions:,}", str(self.accuracy), f"{self.chance:.3g}",
            ],
        ]  # fmt: skip

    def caption(self) -> str:
        """One line under the table."""
        places = ", ".join(f"{count:,}" for count in self.most_chosen.values())
        cut = f"; {self.n_truncated} questions were cut at the beginning" if self.n_truncated else ""
        return f"answers chosen by place: {places}; compared by log-probability per {self._unit()}{cut}"

    def _unit(self) -> str:
        return {"none": "answer", "tokens": "token", "characters": "character"}[self.settings["normalize"]]


@shows_progress
def act(
    model: str | os.PathLike[str] | LanguageModel,
    task: Task | Any,
    *,
    normalize: str = "none",
    joint: str = " ",
    batch_tokens: int | None = None,
    progress: Progress | None = None,
) -> Actions:
    """Let a causal language model answer a task: it chooses the answer that it finds most probable after the text.

    ::

        score(choice) = Σ_t log p(token t of the choice | text, earlier tokens)   [ / tokens or characters ]

    Parameters
    ----------
    model
        The target: a causal language model; see `saekit.load_model`.
    task
        A `Task`, or what `read_task` takes.
    normalize
        ``"none"``, ``"tokens"`` or ``"characters"``: what the sum is divided by.
    joint
        What stands between text and choice.
    batch_tokens
        Tokens in one forward pass; choices do not depend on it beyond rounding.
    progress
        Called with the stage ``answers`` and the number of choices scored [shown on stderr; ``False``: none].

    Returns
    -------
    Actions

    Raises
    ------
    ConfigError
        A setting is unknown, or the model is no causal language model.
    DataError
        The task cannot be used, a choice alone is longer than the model's context, or the model reads two choices as
        the same tokens.
    """
    check_choice("act", NORMALIZE, normalize=normalize)
    task = task if isinstance(task, Task) else read_task(task)
    lm = load_language_model(model)
    if not lm.is_causal:
        raise ConfigError(
            f"the target must be a causal language model, which gives probabilities to answers; `{lm.name}` is an "
            "encoder. Give another --model."
        )
    questions = [_tokens_of(lm, *question, joint) for question in zip(task.texts, task.choices)]
    pieces, n_truncated = _fitted(lm, questions)
    sums = _score(lm, pieces, batch_tokens, progress or silent)
    logprobs = np.split(sums, np.cumsum([*map(len, task.choices)])[:-1])
    records = [
        _record(task, row, logprobs[row], _lengths(task.choices[row], questions[row], normalize), joint)
        for row in range(len(task))
    ]
    right = sum(record["correct"] for record in records)
    chosen = np.bincount([record["choice"] for record in records], minlength=max(map(len, task.choices)))
    accuracy = wilson_interval(right, len(task))
    return Actions(
        saekit=release(),
        versions=library_versions(True),
        settings={"normalize": normalize, "joint": joint, "context": lm.context},
        target=lm.info,
        task=dict(task.info),
        n_questions=len(task),
        n_truncated=n_truncated,
        accuracy=Measured(accuracy.value, accuracy.low, accuracy.high, "fraction", "over questions (Wilson)"),
        chance=math.fsum(1 / len(choices) for choices in task.choices) / len(task),
        most_chosen={str(i): int(count) for i, count in enumerate(chosen)},
        records_digest=digest_bytes(_as_lines(records)),
        records=records,
    )


def _record(task: Task, row: int, logprobs: np.ndarray, lengths: np.ndarray, joint: str) -> dict[str, Any]:
    """Return what the model did on one question."""
    text, choices, answer = task.texts[row], task.choices[row], task.answers[row]
    scores = logprobs / lengths
    best = int(scores.argmax())
    return {
        "text": text,
        "said": f"{text}{joint}{choices[best]}",
        "asked": f"{text} ({' / '.join(choices)})",
        "choice": best,
        "chosen": choices[best],
        "correct": bool(best == answer),
        "margin": round(float(scores[best] - np.delete(scores, best).max()), 6),
        "choices": list(choices),
        "answer": int(answer),
        "logprobs": [round(float(value), 6) for value in logprobs],
        **{name: values[row] for name, values in task.columns.items()},
    }


def _as_lines(records: Sequence[dict[str, Any]]) -> bytes:
    return "".join(json.dumps(record, ensure_ascii=False, allow_nan=False) + "\n" for record in records).encode()


@dataclass(frozen=True)
class _Question:
    """Text and choice as token ids, for each choice; tokens from `start` on are scored, the same index for all."""

    start: int
    choices: list[list[int]]


def _lengths(choices: Sequence[str], question: _Question, normalize: str) -> np.ndarray:
    """Return what the log-probability of each choice is divided by."""
    if normalize == "none":
        return np.ones(len(choices))
    if normalize == "characters":
        return np.array([len(choice) for choice in choices])
    return np.array([len(tokens) - question.start for tokens in question.choices])


def _tokens_of(lm: LanguageModel, text: str, choices: Sequence[str], joint: str) -> _Question:
    """Text and choices tokenized together, because tokens may reach across the border.

    Scored are the tokens behind the longest beginning that the text alone and all choices share: what lies before is
    equally probable for all of them.
    """
    before = list(special_tokens(lm.tokenizer).before)
    with quiet_transformers():
        whole = lm.tokenizer([text, *(f"{text}{joint}{choice}" for choice in choices)], add_special_tokens=False)
    bare, *full = (list(ids) for ids in whole["input_ids"])
    start = min(_shared(bare, ids) for ids in full)
    # a choice that is the beginning of another must keep a token of its own
    start = min(start, min(len(ids) for ids in full) - 1)
    if start < 1 and not before:
        raise DataError(
            f"a text must give at least one token before its choices; {text[:40]!r} gives none with `{lm.name}`."
        )
    for i, j in itertools.combinations(range(len(full)), 2):
        if full[i] == full[j]:
            raise DataError(
                f"choices must differ in the tokens that `{lm.name}` reads; {choices[i]!r} and {choices[j]!r} are the "
                f"same to it (after {text[:40]!r}), so that nothing could tell them apart. Reword one of them."
            )
    return _Question(start + len(before), [before + ids for ids in full])


def _shared(a: Sequence[int], b: Sequence[int]) -> int:
    return next((i for i, (x, y) in enumerate(zip(a, b)) if x != y), min(len(a), len(b)))


Piece = tuple[list[int], int]
"""Tokens of a text with a choice, and how many of them, at the end, are scored."""


def _fitted(lm: LanguageModel, questions: Sequence[_Question]) -> tuple[list[Piece], int]:
    """Cut what does not fit the model from the beginning of texts; return all choices, and how many texts were cut."""
    pieces, cut = [], 0
    n_before = len(special_tokens(lm.tokenizer).before)
    for question in questions:
        longest = max(len(ids) for ids in question.choices)
        over = max(longest - lm.context, 0)
        cut += over > 0
        if over and question.start - over < max(n_before, 1):
            raise DataError(
                f"choices must fit the model's {lm.context} tokens with some text before them; one has "
                f"{longest - question.start} tokens. Shorten it."
            )
        pieces += [(ids[:n_before] + ids[n_before + over :], len(ids) - question.start) for ids in question.choices]
    return pieces, cut


def _score(lm: LanguageModel, pieces: Sequence[Piece], batch_tokens: int | None, progress: Progress) -> np.ndarray:
    """Sum the log-probabilities of all choices, float64."""
    lengths = [len(ids) for ids, _ in pieces]
    contexts = Contexts(
        np.concatenate([np.array(ids, np.int32) for ids, _ in pieces]),
        np.repeat(np.arange(len(pieces)), lengths),
        np.concatenate([np.arange(length, dtype=np.int32) for length in lengths]),
        np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
    )
    sums = np.zeros(len(pieces))
    done = 0
    for batch in token_batches(lm, contexts, batch_tokens=batch_tokens, padding="left", skip_special=False):
        wanted = max(pieces[i][1] for i in batch.index)
        logp = _log_probabilities(lm, batch, wanted)
        for row, i in enumerate(batch.index):
            sums[i] = float(logp[row, wanted - pieces[i][1] :].sum())
        done += len(batch.index)
        progress("answers", done, len(pieces))
    if not np.isfinite(sums).all():
        raise DataError("log-probabilities must be finite; some are not. Is the model's number type too small?")
    return sums


def _log_probabilities(lm: LanguageModel, batch: TokenBatch, wanted: int) -> torch.Tensor:
    """Return the log-probability of each of the last `wanted` tokens, ``float64 [contexts, wanted]``."""
    options = dict(batch.inputs)
    if accepts(lm.model, "logits_to_keep"):
        options["logits_to_keep"] = wanted + 1  # the head of a large vocabulary costs most of the memory
    with torch.no_grad(), kernels.fast_linears():
        logits = lm.model(**options).logits[:, -(wanted + 1) : -1]
    targets = batch.inputs["input_ids"][:, -wanted:, None].to(logits.device)
    return logits.float().log_softmax(-1).gather(-1, targets)[..., 0].double().cpu()
