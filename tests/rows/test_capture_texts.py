"""Rows of texts: those of the bare model, whatever the padding, the batches, the order and the context."""

from __future__ import annotations

import copy
import dataclasses
import json
import subprocess
import sys

import pytest
import torch

import saekit
import saekit.rows.capture_texts as reading
import saekit.rows.stream
from fixtures.row_checks import KINDS, TOLERANCE, everything, same_rows
from saekit.errors import DataError
from saekit.inputs.texts import read_texts
from saekit.rows.capture import capture
from saekit.rows.settings import CaptureSettings
from saekit.rows.tokens import special_tokens, tokenize


@pytest.mark.parametrize("kind", KINDS)
def test_rows_are_those_of_the_bare_model_one_context_at_a_time(models, texts, kind):
    lm = models[kind]
    source = capture(lm, texts, layer=1, settings=CaptureSettings(outliers=None))
    rows = everything(source)
    contexts = tokenize(lm.tokenizer, texts, context=lm.context)
    expected = []
    for i in range(len(contexts)):
        one = contexts.pick([i])
        with torch.no_grad():
            ids = torch.from_numpy(one.ids).long()[None]
            states = lm.model(input_ids=ids, output_hidden_states=True).hidden_states
        expected.append(states[2][0][torch.from_numpy(one.position >= 0)])
    torch.testing.assert_close(rows["x"], torch.cat(expected), **TOLERANCE)
    kept = contexts.position >= 0
    assert rows["token"].tolist() == contexts.ids[kept].tolist()
    assert rows["document"].tolist() == contexts.document[kept].tolist()
    assert rows["position"].tolist() == contexts.position[kept].tolist()


@pytest.mark.parametrize("kind", KINDS)
def test_padding_side_and_batch_size_change_nothing(models, texts, kind):
    base = capture(models[kind], texts, layer=2)
    for settings in ({"padding": "left"}, {"batch_tokens": 1}, {"padding": "left", "batch_tokens": 60}):
        same_rows(base, capture(models[kind], texts, layer=2, settings=CaptureSettings(**settings)))


@pytest.mark.parametrize("name", ["stories", "minilm"])
def test_padding_side_and_batch_size_change_nothing_in_real_models(request, name, shared_data):
    lm = saekit.load_model(request.getfixturevalue(name), dtype="float32", device="cpu")
    texts = read_texts(shared_data / "text" / "tinystories_1000_clean.jsonl.gz", limit=6)
    # lengths that differ much, so that there is much padding
    texts = [text[: 40 + 150 * i] for i, text in enumerate(texts)]
    base = capture(lm, texts, layer=3, settings=CaptureSettings(context=100))
    for settings in ({"padding": "left"}, {"batch_tokens": 1}):
        same_rows(base, capture(lm, texts, layer=3, settings=CaptureSettings(context=100, **settings)))


def test_order_of_texts_changes_no_row(models, texts):
    """Rows of a text do not depend on its neighbours in the batch."""
    forward, backward = (everything(capture(models["llama"], t, layer=1)) for t in (texts, texts[::-1]))
    for document in range(len(texts)):
        one = forward["x"][forward["document"] == document]
        other = backward["x"][backward["document"] == len(texts) - 1 - document]
        torch.testing.assert_close(one, other, **TOLERANCE)


def test_added_tokens_can_be_kept(models, texts):
    source = capture(models["bert"], texts, layer=0, settings=CaptureSettings(skip_special=False, outliers=None))
    contexts = tokenize(models["bert"].tokenizer, texts, context=24)
    assert source.n_rows == len(contexts.ids)
    assert everything(source)["position"].tolist() == contexts.position.tolist()
    skipped = capture(models["bert"], texts, layer=0)
    assert skipped.info["filters"]["special"] == {"skipped": True, "n": 2 * len(contexts)}


def test_more_text_is_read_until_the_tokens_suffice(models, tmp_path, monkeypatch):
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join(json.dumps({"text": "cat " + "x" * 3000}) for _ in range(60)))
    asked = []
    monkeypatch.setattr(reading, "read_texts", lambda *a, **k: asked.append(k["characters"]) or read_texts(*a, **k))
    assert capture(models["llama"], path, layer=1, tokens=100, settings=CaptureSettings(outliers=None)).n_rows == 100
    assert asked == [10_000, 40_000, 160_000]


def test_documents_longer_than_the_context(models):
    text = " ".join(["cat dog"] * 50)
    rows = everything(capture(models["llama"], [text], layer=1))
    assert rows["position"].tolist() == list(range(100))
    # windows of 23 words with a BOS before each: the second begins anew
    torch.testing.assert_close(rows["x"][:22], everything(capture(models["llama"], [text[:-8]], layer=1))["x"][:22])
    first = [everything(capture(models["llama"], [w], layer=1))["x"] for w in ("cat dog", "dog cat")]
    torch.testing.assert_close(rows["x"][0:2], first[0], **TOLERANCE)
    torch.testing.assert_close(rows["x"][23:25], first[1], **TOLERANCE)


def test_texts_without_tokens(models):
    with pytest.raises(DataError, match="must hold at least one text"):
        capture(models["llama"], ["", " "], layer=1)

    class Silent:
        pad_token_id = 0

        def __call__(self, text, add_special_tokens):
            return {"input_ids": [] if isinstance(text, str) else [[] for _ in text]}

    with pytest.raises(DataError, match="must give at least one token; the tokenizer of `tiny-llama` makes none"):
        capture(dataclasses.replace(models["llama"], tokenizer=Silent()), ["cat"], layer=1)


def test_a_model_that_gives_nan(folders, texts):
    lm = saekit.load_model(folders["llama"])
    with torch.no_grad():
        lm.model.get_input_embeddings().weight[lm.tokenizer("dog")["input_ids"][-1]] = float("nan")
    with pytest.raises(DataError, match=r"row \d+ of the capture has nan"):
        capture(lm, ["the cat and the dog", *texts], layer=1)


_MEASURED = """
import resource, sys
import saekit
from saekit.rows.settings import CaptureSettings
lm = saekit.load_model("builtin", device="cpu")
saekit.capture(lm, ["a text " * 3000], layer=1, tokens=2000)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
rows = saekit.capture(lm, sys.argv[1], layer=1, tokens=2000)
print(rows.n_rows, (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)
"""


def test_memory_for_a_few_tokens_of_a_long_line_is_bounded(tmp_path):
    path = tmp_path / "line.txt"
    path.write_text("some words of a line " * 500_000)
    done = subprocess.run([sys.executable, "-c", _MEASURED, str(path)], capture_output=True, text=True, check=True)
    n_rows, mebibytes = map(int, done.stdout.split())
    assert n_rows == 2000
    assert mebibytes < 150


@pytest.mark.parametrize("pack", [False, True])
def test_a_part_of_a_long_text_gives_the_first_rows_of_the_whole(models, texts, monkeypatch, pack):
    monkeypatch.setattr(reading, "_CHARACTERS_PER_TOKEN", 1)
    long = [" ".join(texts) * 300, *texts]
    settings = CaptureSettings(outliers=None, pack=pack)
    whole = capture(models["llama"], long, layer=1, settings=settings)
    for tokens in (10, 2000, 9000):
        part = capture(models["llama"], long, layer=1, tokens=tokens, settings=settings)
        assert part.n_rows == tokens
        torch.testing.assert_close(part.x, whole.x[:tokens], **TOLERANCE)


def test_the_path_of_the_data_is_recorded_and_changes_no_row(models, tmp_path):
    """Data that moved are the same data: a capture goes on, a stream has the same digest."""
    for folder in ("one", "two"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "a.jsonl").write_text('{"text": "the cat sat"}\n{"text": "on a mat"}\n')
    one, two = (tmp_path / folder / "a.jsonl" for folder in ("one", "two"))
    assert capture(models["llama"], one, layer=1).info["data_path"] == str(one)
    assert "data_path" not in capture(models["llama"], ["the cat sat"], layer=1).info
    capture(models["llama"], one, layer=1, out=tmp_path / "rows")
    again = capture(models["llama"], two, layer=1, out=tmp_path / "rows")
    assert again.n_rows == 6
    streams = [saekit.rows.stream.stream(models["llama"], path, layer=1) for path in (one, two)]
    assert streams[0].info["digest"] == streams[1].info["digest"]


@pytest.mark.parametrize("kind", ["llama", "gpt2", "bert"])
def test_texts_that_give_no_row_or_several_contexts_are_counted(models, kind, tmp_path):
    """An empty text, one of blanks, one without tokens, one token, as many as fit, and one more."""
    from tokenizers import normalizers

    lm = dataclasses.replace(models[kind], tokenizer=copy.deepcopy(models[kind].tokenizer))
    lm.tokenizer.backend_tokenizer.normalizer = normalizers.Replace("nothing", "")
    around = special_tokens(lm.tokenizer)
    room = lm.context - len(around.before) - len(around.after)
    texts = ["", "the", "nothing", "   ", " ".join(["cat"] * room), " ".join(["dog"] * (room + 1)), ""]
    settings = CaptureSettings(outliers=None)
    names = ("n_texts", "n_texts_empty", "n_texts_without_tokens", "n_texts_cut")
    rows = capture(lm, texts, layer=1, settings=settings)
    stored = capture(lm, texts, layer=1, out=tmp_path / "rows", settings=settings)
    for info in (rows.info, stored.info):
        assert [info[name] for name in names] == [4, 3, 1, 1]
    assert rows.document.bincount().tolist() == [1, 0, room, room + 1], "no text takes the number of another"
    few = capture(lm, texts, layer=1, tokens=2, settings=settings)
    assert [few.info[name] for name in names] == [3, 3, 1, 0]
