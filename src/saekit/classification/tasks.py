"""Questions with several answers: read from a table, or made from sentences whose last word is taken away."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from ..errors import ConfigError, InputError
from ..files import digest_bytes
from ..inputs.records import repeatable
from ..inputs.texts import Texts, read_texts
from ..randomness import hashed_key, random_order
from ..settings import check_whole, is_whole

OWN_COLUMNS = ("said", "chosen", "correct", "margin", "logprobs", "choice", "asked")
"""Columns of the records of answers, which a task cannot have."""

PER_TEXT = 4
"""Maximum number of cloze questions of one text."""

_SENTENCE = re.compile(r"(?<=[.!?])[\"')\]]*\s+")
_LAST_WORD = re.compile(r"^(.*\S)\s+([A-Za-z]{3,})[.!?]?[\"')\]]*$", re.DOTALL)
_NEIGHBOURS = 40  # words of nearest frequency that distractors are drawn from
_COMMON = 3  # a word must end a sentence this often to be an answer or a distractor


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
            raise InputError("a task must have at least one question; it has none.")
        if not len(self.texts) == len(self.choices) == len(self.answers):
            raise InputError(
                f"a task must have choices and an answer for each of its {len(self.texts)} questions; got "
                f"{len(self.choices)} and {len(self.answers)}."
            )
        for row, (text, choices, answer) in enumerate(zip(self.texts, self.choices, self.answers)):
            _check_question(row, text, choices, answer)


def _check_question(row: int, text: Any, choices: Any, answer: Any) -> None:
    where = f"question {row}"
    if not _is_text(text):
        raise InputError(f"{where}: the text must not be empty; got {text!r}.")
    if isinstance(choices, str) or len(choices) < 2 or not all(map(_is_text, choices)):
        raise InputError(f"{where}: `choices` must be two texts or more, none empty; got {choices!r}.")
    if len(set(choices)) < len(choices):
        raise InputError(f"{where}: `choices` must differ; got {list(choices)!r}.")
    if not is_whole(answer) or not 0 <= answer < len(choices):
        raise InputError(f"{where}: `answer` must be the number of a choice, 0 to {len(choices) - 1}; got {answer!r}.")


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and bool(value.strip())


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
    data = repeatable(data)
    texts = read_texts(data, text=text, split=split, limit=limit, columns=[choices, answer])
    rest = read_texts(data, text=text, split=split, limit=limit).columns
    lists = [_as_list(value, row, choices) for row, value in enumerate(texts.column(choices))]
    right = [_as_number(value, found) for value, found in zip(texts.column(answer), lists)]
    columns = {name: values for name, values in rest.items() if name not in (choices, answer, *OWN_COLUMNS)}
    info = {**texts.info, "kind": "table"}
    return Task(texts.texts, tuple(tuple(found) for found in lists), tuple(right), columns, info)


def _as_list(value: Any, row: int, name: str) -> list[Any]:
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except json.JSONDecodeError:
            value = None
    if not isinstance(value, list | tuple):
        raise InputError(f'question {row}: `{name}` must be a list of texts, in a csv as JSON: ["yes", "no"].')
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
    check_whole("cloze", questions=questions)
    check_whole("cloze", 2, choices=choices)
    if not 1 <= words[0] <= words[1]:
        raise ConfigError(f"cloze: `words` must be an ascending pair of whole numbers from 1; got {tuple(words)}.")
    texts = read_texts(data, text=text, split=split, characters=max(questions, 200) * 2000)
    sentences = list(_all_sentences(texts, words))
    vocabulary = _common_words(word for _, _, word in sentences)
    place = {word: i for i, word in enumerate(vocabulary)}
    if len(vocabulary) <= choices:
        raise InputError(
            f"cloze: `{texts.info['name']}` must have more than {choices} words that end {_COMMON} sentences each; it "
            f"has {len(vocabulary)} in {len(sentences)} sentences. Give more text."
        )
    usable = [sentence for sentence in sentences if sentence[2] in place]
    rows = [_question(usable[i], vocabulary, place, choices, seed) for i in _drawn(usable, questions, seed)]
    body = json.dumps([row[:3] for row in rows], ensure_ascii=False)
    info = {
        "kind": "cloze", "name": texts.info["name"], "split": texts.info.get("split"), "data_digest": texts.digest,
        "questions": len(rows), "choices": choices, "words": list(words), "seed": seed,
        "digest": digest_bytes(body.encode("utf-8", "surrogatepass")),
    }  # fmt: skip
    asked, options, answers, documents = zip(*rows)
    return Task(asked, options, answers, {"document": tuple(texts.ids[document] for document in documents)}, info)


def _common_words(words: Iterable[str]) -> list[str]:
    """Return words by how often they end a sentence; equals in the order of the alphabet."""
    counts = Counter(words)
    return sorted((word for word, count in counts.items() if count >= _COMMON), key=lambda w: (-counts[w], w))


def _all_sentences(texts: Texts, words: tuple[int, int]) -> Iterator[tuple[int, str, str]]:
    """Yield number of the text, what comes before the last word, and the last word; each beginning once.

    Texts repeat each other; a question that is asked twice would be known from training.
    """
    seen: set[str] = set()
    for document, whole in enumerate(texts):
        for before, word in _sentences(whole, words):
            if before not in seen:
                seen.add(before)
                yield document, before, word


def _drawn(usable: Sequence[tuple[int, str, str]], questions: int, seed: int) -> list[int]:
    """Return which sentences become questions, in the order of the text."""
    taken: Counter[int] = Counter()
    chosen: list[int] = []
    for i in random_order(len(usable), "cloze", seed):
        document = usable[i][0]
        if len(chosen) < questions and taken[document] < PER_TEXT:
            taken[document] += 1
            chosen.append(int(i))
    return sorted(chosen)


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
