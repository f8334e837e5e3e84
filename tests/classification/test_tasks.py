"""Tasks: a cloze is a function of texts and seed; tables are read in every form; what makes no sense is refused."""

from __future__ import annotations

import numpy as np
import pytest

from saekit.classification.tasks import Task, cloze_task, read_task
from saekit.errors import ConfigError, DataError


@pytest.fixture(scope="module")
def cloze() -> Task:
    return cloze_task("builtin", questions=120, choices=4, seed=3)


def test_a_cloze_is_a_function_of_its_seed(cloze):
    again = cloze_task("builtin", questions=120, choices=4, seed=3)
    assert (again.texts, again.choices, again.answers, again.info) == (
        cloze.texts,
        cloze.choices,
        cloze.answers,
        cloze.info,
    )
    other = cloze_task("builtin", questions=120, choices=4, seed=4)
    assert other.texts != cloze.texts
    assert len(cloze) == 120
    places = np.bincount(cloze.answers, minlength=4)
    assert places.min() > 10
    for text, choices, answer in zip(cloze.texts, cloze.choices, cloze.answers):
        assert not text.endswith(choices[answer])
        assert len(set(choices)) == 4
    assert len(set(cloze.texts)) == 120
    documents = cloze.columns["document"]
    assert max(documents.count(d) for d in set(documents)) <= 4


def test_distractors_are_about_as_frequent():
    words = [f"word{'abcdefghij'[i % 10]}{'abcdefghij'[i // 10]}" for i in range(100)]
    each = [word for i, word in enumerate(words) for _ in range(103 - i)]
    texts = [f"Number {n} was one more of the very same kind of {word}." for n, word in enumerate(each)]
    task = cloze_task(texts, questions=300, choices=3)
    rank = {word: i for i, word in enumerate(words)}
    gaps = [abs(rank[c] - rank[choices[a]]) for choices, a in zip(task.choices, task.answers) for c in choices]
    assert 0 < max(gaps) <= 40
    assert np.mean(gaps) < 15


def test_a_sentence_is_asked_once():
    texts = [
        f"Number {n % 51} was one more of the very same kind of {('cat', 'dog', 'cow')[n % 3]}." for n in range(200)
    ]
    task = cloze_task(texts, questions=1000, choices=2)
    assert len(task) == len(set(task.texts)) == 51


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"text": " "}, "text must not be empty|must hold at least one text"),
        ({"choices": ["a"]}, "`choices` must be two texts or more"),
        ({"choices": ["a", "a"]}, "`choices` must differ"),
        ({"choices": "yes or no"}, "`choices` must be a list of texts, in a csv as JSON"),
        ({"answer": 2}, "`answer` must be the number of a choice, 0 to 1; got 2"),
        ({"answer": "maybe"}, "`answer` must be the number of a choice, 0 to 1; got 'maybe'"),
        ({"answer": None}, "`answer` must be the number of a choice"),
    ],
)
def test_questions_that_make_no_sense(change, message):
    row = {"text": "Is it?", "choices": ["yes", "no"], "answer": 0} | change
    with pytest.raises(DataError, match=message):
        read_task([row])


def test_what_is_refused():
    with pytest.raises(DataError, match="must have at least one question"):
        Task((), (), ())
    with pytest.raises(DataError, match="choices and an answer for each of its 1 questions; got 1 and 2"):
        Task(("a",), (("b", "c"),), (0, 1))
    with pytest.raises(DataError, match=r"must have a column `choices`"):
        read_task([{"text": "a", "choice": ["b", "c"], "answer": 0}])
    with pytest.raises(ConfigError, match="`choices` must be a whole number from 2; got 1"):
        cloze_task("builtin", choices=1)
    with pytest.raises(ConfigError, match=r"`words` must be an ascending pair .* got \(5, 3\)"):
        cloze_task("builtin", words=(5, 3))
    with pytest.raises(DataError, match="must have more than 4 words that end 3 sentences each; it has 0"):
        cloze_task(["One short sentence about a cat."])
