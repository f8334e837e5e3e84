"""What a language model does on a task: which answer it chooses, and whether that is right.

The answers of one model (the *target*) become labels that the features of another (the *reader*) may predict: the
records are an ordinary data set for `classify` and `transfer` (``label="correct"``).
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch

from .. import kernels
from ..errors import ConfigError, DataError, FormatError, did_you_mean, listed
from ..files import digest_bytes, read_json, read_together, replaced_together, write_bytes, write_json
from ..inputs.texts import read_texts
from ..measure.bootstrap import wilson_interval
from ..measure.results import Measured, Result, result_to_json
from ..models.language import LanguageModel
from ..models.loading import load_language_model
from ..models.pretrained import accepts
from ..models.quiet import quiet_transformers
from ..progress import shows_progress
from ..provenance import library_versions, release
from ..randomness import hashed_key, random_order
from ..rows.tokens import Contexts, special_tokens, token_batches

NORMALIZE = ("none", "tokens", "characters")
"""What the log-probability of a choice is divided by before choices are compared."""

RECORDS = "actions.jsonl"
CARD = "actions.json"

Progress = Callable[[str, int, int | None], None]

_SENTENCE = re.compile(r"(?<=[.!?])[\"')\]]*\s+")
_LAST_WORD = re.compile(r"^(.*\S)\s+([A-Za-z]{3,})[.!?]?[\"')\]]*$", re.DOTALL)
_NEIGHBOURS = 40  # words of nearest frequency that distractors are drawn from
_COMMON = 3  # a word must end a sentence this often to be an answer or a distractor


# ---------------------------------------------------------------------------------------------------------- tasks


@dataclass(frozen=True, eq=False)
class Task:
    """Questions with several answers, one of which is right.

    Examples
    --------
    >>> task = Task(("The sky is",), (("blue", "a fish"),), (0,))
    >>> len(task), task.choices[0][task.answers[0]]
    (1, 'blue')
    """

    texts: tuple[str, ...] = field(repr=False)
    """What the model reads before the answer."""
    choices: tuple[tuple[str, ...], ...] = field(repr=False)
    """The answers to choose from, two or more each."""
    answers: tuple[int, ...] = field(repr=False)
    """Number of the right one."""
    columns: dict[str, tuple[Any, ...]] = field(default_factory=dict, repr=False)
    """Further columns, which go into the records: ``document``, say, to group by."""
    info: dict[str, Any] = field(default_factory=dict)
    """Where it comes from (plain JSON): kind, name, digest, seed, …"""

    def __len__(self) -> int:
        return len(self.texts)

    def __post_init__(self) -> None:
        if not self.texts:
            raise DataError("a task must have at least one question; it has none.")
        if not len(self.texts) == len(self.choices) == len(self.answers):
            raise DataError(
                f"a task must have choices and an answer for each of its {len(self.texts)} questions; got "
                f"{len(self.choices)} and {len(self.answers)}."
            )
        for row, (text, choices, answer) in enumerate(zip(self.texts, self.choices, self.answers)):
            _check_question(row, text, choices, answer)


def _check_question(row: int, text: Any, choices: Any, answer: Any) -> None:
    where = f"question {row}"
    if not isinstance(text, str) or not text.strip():
        raise DataError(f"{where}: the text must not be empty; got {text!r}.")
    if isinstance(choices, str) or len(choices) < 2 or not all(isinstance(c, str) and c.strip() for c in choices):
        raise DataError(f"{where}: `choices` must be two texts or more, none empty; got {choices!r}.")
    if len(set(choices)) < len(choices):
        raise DataError(f"{where}: `choices` must differ; got {list(choices)!r}.")
    if isinstance(answer, bool) or not isinstance(answer, int | np.integer) or not 0 <= answer < len(choices):
        raise DataError(f"{where}: `answer` must be the number of a choice, 0 to {len(choices) - 1}; got {answer!r}.")


def read_task(
    data: Any,
    *,
    text: str = "text",
    choices: str = "choices",
    answer: str = "answer",
    split: str | None = None,
    limit: int | None = None,
) -> Task:
    """Read a task from a table.

    Parameters
    ----------
    data
        What `saekit.read_texts` takes: a jsonl, csv or parquet file, a hub data set, a list of dictionaries.
    text, choices, answer
        Columns: what is asked; a list of texts (in a csv, written as JSON); the number of the right one, or its text.
    split, limit
        As for `read_texts`.

    Raises
    ------
    DataError
        A column is missing, or a question has no two different choices or no right answer.
    """
    if not isinstance(data, str | os.PathLike | Sequence):
        data = list(data)  # an iterator can be read only once
    texts = read_texts(data, text=text, split=split, limit=limit, columns=[choices, answer])
    rest = read_texts(data, text=text, split=split, limit=limit).columns
    lists = [_as_list(value, row, choices) for row, value in enumerate(texts.column(choices))]
    right = [_as_number(value, found) for value, found in zip(texts.column(answer), lists)]
    columns = {name: values for name, values in rest.items() if name not in (choices, answer, *_OWN)}
    info = {**texts.info, "kind": "table"}
    return Task(texts.texts, tuple(tuple(found) for found in lists), tuple(right), columns, info)


def _as_list(value: Any, row: int, name: str) -> list[Any]:
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except json.JSONDecodeError:
            value = None
    if not isinstance(value, list | tuple):
        raise DataError(f'question {row}: `{name}` must be a list of texts, in a csv as JSON: ["yes", "no"].')
    return list(value)


def _as_number(value: Any, choices: Sequence[Any]) -> Any:
    """Return the number of the right choice, from its number or its text; the task refuses what is neither."""
    if isinstance(value, str):
        if value in choices:
            return list(choices).index(value)
        return int(value) if value.strip().isdigit() else value
    return int(value) if isinstance(value, float) and value.is_integer() else value


def cloze_task(
    data: Any = "builtin",
    *,
    questions: int = 1000,
    choices: int = 4,
    words: tuple[int, int] = (6, 40),
    text: str = "text",
    split: str | None = None,
    seed: int = 0,
) -> Task:
    """Make a task from real text: which word ends the sentence?

    The last word of a sentence is taken away; the other choices are words that also end sentences of this text, about
    as often. Everything is a function of the texts and the seed.

    Parameters
    ----------
    data
        What `saekit.read_texts` takes.
    questions
        Maximum number of questions; there may be fewer in the text. At most one per sentence and four per text.
    choices
        Answers to choose from.
    words
        Fewest and most words of a sentence.
    text, split
        As for `read_texts`.
    seed
        Which sentences, which distractors, and their order.

    Raises
    ------
    ConfigError
        A setting is out of range.
    DataError
        The text has too few sentences or words.
    """
    if questions < 1 or choices < 2 or not 1 <= words[0] <= words[1]:
        raise ConfigError(
            f"cloze: `questions` must be 1 or more, `choices` 2 or more and `words` an ascending pair; got "
            f"{questions}, {choices} and {tuple(words)}."
        )
    texts = read_texts(data, text=text, split=split, characters=max(questions, 200) * 2000)
    sentences: list[tuple[int, str, str]] = []
    seen: set[str] = set()  # texts repeat each other; a question that is asked twice would be known from training
    for document, whole in enumerate(texts):
        for before, word in _sentences(whole, words):
            if before not in seen:
                seen.add(before)
                sentences.append((document, before, word))
    counts: dict[str, int] = {}
    for _, _, word in sentences:
        counts[word] = counts.get(word, 0) + 1
    # words by how often they end a sentence; equals in the order of the alphabet
    vocabulary = sorted((word for word, count in counts.items() if count >= _COMMON), key=lambda w: (-counts[w], w))
    place = {word: i for i, word in enumerate(vocabulary)}
    if len(vocabulary) <= choices:
        raise DataError(
            f"cloze: `{texts.info['name']}` must have more than {choices} words that end {_COMMON} sentences each; it "
            f"has {len(vocabulary)} in {len(sentences)} sentences. Give more text."
        )
    usable = [sentence for sentence in sentences if sentence[2] in place]
    taken: dict[int, int] = {}
    chosen: list[int] = []
    for i in random_order(len(usable), "cloze", seed):
        document = usable[i][0]
        if len(chosen) < questions and taken.get(document, 0) < 4:
            taken[document] = taken.get(document, 0) + 1
            chosen.append(int(i))
    rows = [_question(usable[i], vocabulary, place, choices, seed) for i in sorted(chosen)]
    body = json.dumps([row[:3] for row in rows], ensure_ascii=False)
    info = {
        "kind": "cloze",
        "name": texts.info["name"],
        "split": texts.info.get("split"),
        "data_digest": texts.digest,
        "questions": len(rows),
        "choices": choices,
        "words": list(words),
        "seed": seed,
        "digest": digest_bytes(body.encode("utf-8", "surrogatepass")),
    }
    columns = {"document": tuple(texts.ids[row[3]] for row in rows)}
    return Task(tuple(r[0] for r in rows), tuple(r[1] for r in rows), tuple(r[2] for r in rows), columns, info)


def _sentences(text: str, words: tuple[int, int]) -> list[tuple[str, str]]:
    """Sentences of a text as what comes before the last word, and the last word."""
    found = []
    for sentence in _SENTENCE.split(" ".join(text.split())):
        match = _LAST_WORD.match(sentence)
        if match and words[0] <= len(sentence.split()) <= words[1] and match[2].islower():
            found.append((match[1], match[2]))
    return found


def _question(
    sentence: tuple[int, str, str], vocabulary: list[str], place: dict[str, int], choices: int, seed: int
) -> tuple[str, tuple[str, ...], int, int]:
    document, before, word = sentence
    at = place[word]
    low = max(0, min(at - _NEIGHBOURS // 2, len(vocabulary) - _NEIGHBOURS - 1))
    near = [other for other in vocabulary[low : low + _NEIGHBOURS + 1] if other != word]
    key = (seed, digest_bytes(f"{document} {before} {word}".encode("utf-8", "surrogatepass")))
    order = random_order(len(near), "distractors", *key)
    options = [near[i] for i in order[: choices - 1]]
    right = hashed_key("place", *key) % choices
    return before, (*options[:right], word, *options[right:]), right, document


# ---------------------------------------------------------------------------------------------------------- actions

_OWN = ("said", "chosen", "correct", "margin", "logprobs", "choice", "asked")


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
            write_json(next_to(CARD), self.to_json())

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
        data = path_of(RECORDS).read_bytes()
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
        Called as ``progress("answers", done, total)`` with the choices scored
        [shown on stderr; ``False``: none].

    Returns
    -------
    Actions

    Raises
    ------
    ConfigError
        A setting is unknown, or the model is no causal language model.
    DataError
        The task cannot be used, or a choice alone is longer than the model's context.
    """
    if normalize not in NORMALIZE:
        raise ConfigError(
            f"`normalize` must be one of {listed(NORMALIZE)}; got {normalize!r}. "
            f"{did_you_mean(str(normalize), NORMALIZE)}"
        )
    task = task if isinstance(task, Task) else read_task(task)
    lm = load_language_model(model)
    if not lm.is_causal:
        raise ConfigError(
            f"the target must be a causal language model, which gives probabilities to answers; `{lm.name}` is an "
            "encoder. Give another --model."
        )
    questions = [_tokens_of(lm, text, choices, joint) for text, choices in zip(task.texts, task.choices)]
    sums, n_truncated = _score(lm, questions, batch_tokens, progress)
    records, at = [], 0
    for row, (text, choices, answer, question) in enumerate(zip(task.texts, task.choices, task.answers, questions)):
        logprobs = sums[at : at + len(choices)]
        at += len(choices)
        lengths = {
            "none": np.ones(len(choices)),
            "tokens": np.array([len(tokens) - question.start for tokens in question.choices]),
            "characters": np.array([len(choice) for choice in choices]),
        }[normalize]
        scores = logprobs / lengths
        best = int(scores.argmax())
        records.append(
            {
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
        )
    right = sum(record["correct"] for record in records)
    most = max(len(choices) for choices in task.choices)
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
        most_chosen={str(i): sum(record["choice"] == i for record in records) for i in range(most)},
        records_digest=digest_bytes(_as_lines(records)),
        records=records,
    )


def _as_lines(records: Sequence[dict[str, Any]]) -> bytes:
    return "".join(json.dumps(record, ensure_ascii=False, allow_nan=False) + "\n" for record in records).encode()


@dataclass(frozen=True)
class _Question:
    """Text and choice as token ids, for each choice; tokens from `start` on are scored, the same index for all."""

    start: int
    choices: list[list[int]]


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
    return _Question(start + len(before), [before + ids for ids in full])


def _shared(a: Sequence[int], b: Sequence[int]) -> int:
    return next((i for i, (x, y) in enumerate(zip(a, b)) if x != y), min(len(a), len(b)))


def _score(
    lm: LanguageModel, questions: Sequence[_Question], batch_tokens: int | None, progress: Progress | None
) -> tuple[np.ndarray, int]:
    """Sum the log-probabilities of all choices, float64; also return the number of questions that had to be cut."""
    pieces, firsts, cut = [], [], 0
    n_before = len(special_tokens(lm.tokenizer).before)
    for question in questions:
        over = max(max(len(ids) for ids in question.choices) - lm.context, 0)
        cut += over > 0
        if over and question.start - over < max(n_before, 1):
            raise DataError(
                f"choices must fit the model's {lm.context} tokens with some text before them; one has "
                f"{max(len(ids) for ids in question.choices) - question.start} tokens. Shorten it."
            )
        for ids in question.choices:
            pieces.append(ids[:n_before] + ids[n_before + over :])
            firsts.append(question.start - over)
    contexts = Contexts(
        np.concatenate([np.array(ids, np.int32) for ids in pieces]),
        np.concatenate([np.full(len(ids), i, np.int64) for i, ids in enumerate(pieces)]),
        np.concatenate([np.arange(len(ids), dtype=np.int32) for ids in pieces]),
        np.concatenate([[0], np.cumsum([len(ids) for ids in pieces])]).astype(np.int64),
    )
    sums = np.zeros(len(pieces))
    done = 0
    for batch in token_batches(lm, contexts, batch_tokens=batch_tokens, padding="left", skip_special=False):
        ids = batch.inputs["input_ids"]
        wanted = max(len(pieces[i]) - firsts[i] for i in batch.index)
        options = dict(batch.inputs)
        if accepts(lm.model, "logits_to_keep"):
            options["logits_to_keep"] = wanted + 1  # the head of a large vocabulary costs most of the memory
        with torch.no_grad(), kernels.fast_linears():
            logits = lm.model(**options).logits[:, -(wanted + 1) : -1]
        targets = ids[:, -wanted:]
        logp = logits.float().log_softmax(-1).gather(-1, targets[..., None].to(logits.device))[..., 0].double().cpu()
        for row, i in enumerate(batch.index):
            sums[i] = float(logp[row, wanted - (len(pieces[i]) - firsts[i]) :].sum())
        done += len(batch.index)
        if progress is not None:
            progress("answers", done, len(pieces))
    if not np.isfinite(sums).all():
        raise DataError("log-probabilities must be finite; some are not. Is the model's number type too small?")
    return sums, cut
