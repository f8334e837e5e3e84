"""What a model does on a task: choices are those of a plain reference, whatever the batches; chance is named."""

from __future__ import annotations

import copy
import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers.normalizers import Lowercase

from saekit.classification.model_answers import Actions, act
from saekit.classification.tasks import Task, cloze_task, read_task
from saekit.errors import ConfigError, DataError, FormatError
from saekit.inputs.texts import read_texts
from saekit.models.loading import load_model

QUESTIONS = [
    ("Returns the square root of", ("x", "the banana", "a number"), 2),
    ("Parameters", ("----------", "a very long answer that has many more tokens than the others", "of"), 0),
    ("This function computes the mean of the", ("array", "arrays along an axis", "moon"), 0),
    ("If True, the result is", ("returned", "blue"), 0),
    ("Raises ValueError when the", ("input", "inputs", "cat", "shape"), 3),
]


@pytest.fixture(scope="module")
def lm():
    return load_model("builtin")


@pytest.fixture(scope="module")
def task() -> Task:
    return Task(*(tuple(column) for column in zip(*QUESTIONS)))


@pytest.fixture(scope="module")
def cloze() -> Task:
    return cloze_task("builtin", questions=120, choices=4, seed=3)


def reference(lm, text: str, choices: tuple[str, ...]) -> list[float]:
    """Log-probability of everything after the text, one choice at a time, without padding or batches."""
    found = []
    bare = lm.tokenizer(text, add_special_tokens=False)["input_ids"]
    full = [lm.tokenizer(f"{text} {choice}", add_special_tokens=False)["input_ids"] for choice in choices]
    before = lm.tokenizer("x", add_special_tokens=True)["input_ids"]
    before = before[: len(before) - len(lm.tokenizer("x", add_special_tokens=False)["input_ids"])]
    start = min(next((i for i, (x, y) in enumerate(zip(bare, ids)) if x != y), len(bare)) for ids in full)
    for ids in full:
        ids = before + ids
        with torch.no_grad():
            logp = lm.model(torch.tensor([ids])).logits[0].double().log_softmax(-1)
        found.append(sum(float(logp[t - 1, ids[t]]) for t in range(start + len(before), len(ids))))
    return found


def test_log_probabilities_are_those_of_a_plain_reference(lm, task):
    result = act(lm, task)
    for record, (text, choices, answer) in zip(result.records, QUESTIONS):
        expected = reference(lm, text, choices)
        assert record["logprobs"] == pytest.approx(expected, abs=2e-4)
        assert record["choice"] == int(np.argmax(expected))
        assert record["chosen"] == choices[record["choice"]]
        assert record["correct"] == (record["choice"] == answer)
        ordered = sorted(expected)
        assert record["margin"] == pytest.approx(ordered[-1] - ordered[-2], abs=4e-4)
        assert record["said"] == f"{text} {record['chosen']}"


def test_batching_does_not_change_what_is_chosen(lm, cloze):
    cloze = Task(cloze.texts[:20], cloze.choices[:20], cloze.answers[:20])
    one = act(lm, cloze, batch_tokens=1)
    for size in (64, 700, None):
        other = act(lm, cloze, batch_tokens=size)
        assert [r["choice"] for r in one.records] == [r["choice"] for r in other.records]
        both = [[p for r in result.records for p in r["logprobs"]] for result in (one, other)]
        assert both[0] == pytest.approx(both[1], abs=1e-3)


def test_the_order_of_the_choices_does_not_matter(lm, task):
    turned = Task(
        task.texts,
        tuple(c[::-1] for c in task.choices),
        tuple(len(c) - 1 - a for c, a in zip(task.choices, task.answers)),
    )
    one, other = act(lm, task), act(lm, turned)
    assert [r["chosen"] for r in one.records] == [r["chosen"] for r in other.records]
    assert one.accuracy == other.accuracy


def test_shuffled_answers_are_at_chance(lm, cloze):
    generator = np.random.default_rng(0)
    shuffled = Task(cloze.texts, cloze.choices, tuple(int(i) for i in generator.integers(0, 4, len(cloze))))
    result = act(lm, shuffled)
    assert result.chance == 0.25
    assert result.accuracy.low < 0.25 < result.accuracy.high


def test_a_model_of_the_text_is_above_chance(lm, cloze):
    result = act(lm, cloze)
    assert result.accuracy.low > 0.25
    assert sum(result.most_chosen.values()) == len(cloze)


def test_normalization(lm, task):
    plain = act(lm, task)
    per_character = act(lm, task, normalize="characters")
    for a, b, choices in zip(plain.records, per_character.records, task.choices):
        assert a["logprobs"] == b["logprobs"]
        assert b["choice"] == int(np.argmax([p / len(c) for p, c in zip(a["logprobs"], choices)]))
    assert any(a["choice"] != b["choice"] for a, b in zip(plain.records, per_character.records))
    per_token = act(lm, task, normalize="tokens")
    assert per_token.settings["normalize"] == "tokens"


def test_choices_that_begin_alike(lm):
    """A choice that is the beginning of another keeps a token that is scored."""
    result = act(lm, Task(("The array is",), (("a", "a view"),), (0,)))
    a, b = result.records[0]["logprobs"]
    assert b < a < 0


def test_long_texts_lose_their_beginning(lm):
    text = "the array of numbers " * 400
    task = Task((text,), (("is returned", "moon"),), (0,))
    result = act(lm, task)
    assert result.n_truncated == 1
    assert "1 questions were cut" in repr(result)
    assert all(math.isfinite(p) for p in result.records[0]["logprobs"])
    with pytest.raises(DataError, match="choices must fit the model's"):
        act(lm, Task(("The",), ((text, "x"),), (0,)))


def test_tables_of_questions(tmp_path, lm, task):
    rows = [
        {"text": text, "choices": list(choices), "answer": answer, "document": i}
        for i, (text, choices, answer) in enumerate(QUESTIONS)
    ]
    (tmp_path / "t.jsonl").write_text("\n".join(map(json.dumps, rows)))
    lines = ["text,choices,answer,document"]
    for row in rows:
        choices = json.dumps(row["choices"]).replace('"', '""')
        lines.append(f'"{row["text"]}","{choices}",{row["answer"]},{row["document"]}')
    (tmp_path / "t.csv").write_text("\n".join(lines) + "\n")
    named = [{**row, "answer": row["choices"][row["answer"]]} for row in rows]
    for data in (tmp_path / "t.jsonl", tmp_path / "t.csv", rows, iter(rows), named):
        found = read_task(data)
        assert (found.texts, found.choices, found.answers) == (task.texts, task.choices, task.answers)
        as_cells = str if isinstance(data, Path) and data.suffix == ".csv" else int
        assert found.columns == {"document": tuple(map(as_cells, range(5)))}
    assert act(lm, tmp_path / "t.jsonl").records[0]["document"] == 0


def test_round_trip_and_use_as_data(tmp_path, lm, cloze):
    result = act(lm, cloze)
    result.save(tmp_path)
    again = Actions.load(tmp_path)
    assert again == result
    assert again.records == result.records
    texts = read_texts(tmp_path / "actions.jsonl")
    assert texts.column("correct") == tuple(record["correct"] for record in result.records)
    assert texts.column("document") == cloze.columns["document"]
    assert "<table>" in result._repr_html_()
    assert read_task(tmp_path / "actions.jsonl").choices == cloze.choices  # what one model was asked, another can be
    json.dumps(result.to_json(), allow_nan=False)
    with open(tmp_path / "actions.jsonl", "a") as stream:
        stream.write("{}\n")
    with pytest.raises(FormatError, match="its digest is another"):
        Actions.load(tmp_path)


def test_the_model_is_left_as_it_was(lm, task):
    act(lm, task)
    assert not any(module._forward_hooks for module in lm.model.modules())


def test_what_is_refused(lm, task, minilm):
    with pytest.raises(ConfigError, match=r"`normalize` must be one of .* got 'token'. Did you mean `tokens`"):
        act(lm, task, normalize="token")
    with pytest.raises(ConfigError, match="must be a causal language model"):
        act(minilm, task)


def test_choices_that_the_model_reads_alike_are_refused(lm):
    """To a tokenizer without capitals, say; the first of them would win every time."""
    tokenizer = copy.deepcopy(lm.tokenizer)
    tokenizer.backend_tokenizer.normalizer = Lowercase()
    uncased = replace(lm, tokenizer=tokenizer)
    assert act(lm, Task(("Is it",), (("yes", "Yes", "no"),), (0,))).n_questions == 1
    with pytest.raises(DataError, match="'yes' and 'Yes' are the same to it"):
        act(uncased, Task(("Is it",), (("yes", "Yes", "no"),), (0,)))
