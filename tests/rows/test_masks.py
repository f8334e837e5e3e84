"""Masks: the rows of some tokens are those rows of the whole, bit for bit, in every verb that reads texts."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

import saekit as sk
from fixtures.tiny_models import WORDS
from saekit.errors import ConfigError, InputError, ModelError
from saekit.explanation.settings import ExplainSettings
from saekit.rows.capture import capture
from saekit.rows.settings import CaptureSettings, StreamSettings, TokenMask
from saekit.rows.stream import stream
from saekit.rows.tokens import tokenize

TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}[ {{ m['role'] }} ] {{ m['content'] | trim }} {{ eos_token }}{% endfor %}"
)


@pytest.fixture(scope="module")
def lm(models):
    return models["llama"]


def conversation(n: int) -> list[dict[str, str]]:
    said = [" ".join(WORDS[(3 * n + i + j) % len(WORDS)] for j in range(2 + (n + i) % 4)) for i in range(4)]
    return [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(said)]


CHATS = [{"messages": conversation(n)} for n in range(12)]


def rows_of(lm, **settings):
    how = CaptureSettings(chat_template=TEMPLATE, outliers=None, **settings)
    return capture(lm, CHATS, layer=1, text="messages", settings=how, progress=False)


def columns(rows):
    [batch] = rows.batches(10_000)
    return batch


def test_rows_of_a_role_are_those_rows_of_the_whole_conversation(lm):
    whole = columns(rows_of(lm, skip_special=False))
    own = {role: columns(rows_of(lm, roles=(role,))) for role in ("user", "assistant")}
    both = columns(rows_of(lm))
    # by hand: which words of the whole belong to whom
    speaker, expected = [], []
    for token in lm.tokenizer.convert_ids_to_tokens(whole.token.tolist()):
        speaker.append(token)
    for chat in CHATS:
        expected += ["<s>"]
        for message in chat["messages"]:
            header = lm.tokenizer.tokenize(f"[ {message['role']} ]")
            expected += [*header, *((message["role"], word) for word in message["content"].split()), "</s>"]
    assert len(expected) == len(speaker)
    for role, rows in own.items():
        mine = torch.tensor([isinstance(each, tuple) and each[0] == role for each in expected])
        assert torch.equal(rows.x, whole.x[mine])
        assert torch.equal(rows.token, whole.token[mine])
    content = torch.tensor([isinstance(each, tuple) for each in expected])
    assert torch.equal(both.x, whole.x[content])
    assert len(own["user"].x) + len(own["assistant"].x) == len(both.x) < len(whole.x)


def test_positions_and_tokens_are_masked_in_plain_texts_too(lm):
    texts = [" ".join(WORDS[n : n + 9]) for n in range(8)]
    whole = columns(capture(lm, texts, layer=1, settings=CaptureSettings(outliers=None), progress=False))
    late = columns(
        capture(lm, texts, layer=1, settings=CaptureSettings(outliers=None, positions="2:6"), progress=False)
    )
    kept = (whole.position >= 2) & (whole.position < 6)
    assert torch.equal(late.x, whole.x[kept])
    assert torch.equal(late.position, whole.position[kept])
    skipping = CaptureSettings(outliers=None, skip_tokens=("cat", "mat"))
    rest = columns(capture(lm, texts, layer=1, settings=skipping, progress=False))
    ids = lm.tokenizer.convert_tokens_to_ids(["cat", "mat"])
    assert torch.equal(rest.x, whole.x[~torch.isin(whole.token, torch.tensor(ids))])


def test_long_conversations_are_cut_without_losing_their_mask(lm):
    long = sk.read_texts([{"m": conversation(1) * 4}], text="m")
    mask = TokenMask(chat_template=TEMPLATE, roles=("assistant",))
    whole = tokenize(lm.tokenizer, long, context=10_000, mask=mask)
    cut = tokenize(lm.tokenizer, long, context=7, mask=mask)
    assert len(cut) > 3
    assert np.array_equal(cut.ids, whole.ids)
    assert np.array_equal(cut.position, whole.position)


def test_a_stream_has_the_rows_of_the_capture(lm):
    how = StreamSettings(chat_template=TEMPLATE, outliers=None, roles=("assistant",))
    streamed = stream(lm, CHATS, layer=1, text="messages", settings=how)
    assert torch.equal(columns(streamed).x, columns(rows_of(lm, roles=("assistant",))).x)


def test_the_mask_goes_with_the_sae_into_evaluation_and_explanation(lm):
    rows = rows_of(lm, roles=("assistant",))
    assert rows.info["mask"] == {"roles": ["assistant"], "chat_template": TEMPLATE}
    [sae] = sk.train(sk.TopK(8, k=2), rows, tokens=64, settings=sk.TrainSettings(batch_rows=16), progress=False)
    assert TokenMask.by(sae.provenance) == TokenMask(roles=("assistant",), chat_template=TEMPLATE)
    from saekit.evaluation.settings import EvaluationSettings

    settings = EvaluationSettings(controls=False, intervals=False, text="messages", tokens=10_000)
    result = sk.evaluate(sae, model=lm, data=CHATS, settings=settings, progress=False)
    assert result.n_rows == rows.n_rows
    assert result.metrics.fvu.value == pytest.approx(
        sk.evaluate(
            sae, rows, settings=EvaluationSettings(controls=False, intervals=False), progress=False
        ).metrics.fvu.value
    )
    assert result.language_model["n_tokens"] <= rows.n_rows
    assert result.language_model["passed_through"]["mask"]["roles"] == ["assistant"]
    found = sk.explain(
        sae, lm, CHATS, settings=ExplainSettings(text="messages", tokens=10_000, controls=()), progress=False
    )
    assert found.data["tokens"] == rows.n_rows
    other = sk.evaluate(sae, rows_of(lm), settings=EvaluationSettings(controls=False, intervals=False), progress=False)
    assert any("tokens of roles assistant" in each.message and each.code == "other_tokens" for each in other.warnings)


def test_what_cannot_be_is_refused(lm, tmp_path):
    with pytest.raises(ModelError, match="conversations need a chat template, and the tokenizer has none"):
        capture(lm, CHATS, layer=1, text="messages", progress=False)
    with pytest.raises(InputError, match=r"none is left by \{'roles': \['asistant'\]"):
        rows_of(lm, roles=("asistant",))
    with pytest.raises(ConfigError, match=r"`skip_tokens` must be tokens of the tokenizer.*`zebra`"):
        rows_of(lm, skip_tokens=("zebra",))
    with pytest.raises(ConfigError, match="`skip_special` must stay true"):
        CaptureSettings(skip_special=False, roles=("user",))
    with pytest.raises(ConfigError, match="`positions` must be FIRST:LAST"):
        TokenMask(positions="4:2")
    with pytest.raises(ConfigError, match=r"`roles` must be texts, such as \('assistant',\); got 'assistant'"):
        TokenMask(roles="assistant")
    with pytest.raises(ConfigError, match="texts and conversations must not come together"):
        capture(lm, [*CHATS[:1], {"messages": "a text"}], layer=1, text="messages", progress=False)


def test_on_the_command_line(folders, tmp_path):
    from saekit.cli.app import run

    (tmp_path / "chats.jsonl").write_text("".join(json.dumps(each) + "\n" for each in CHATS))
    (tmp_path / "chat.jinja").write_text(TEMPLATE)
    call = ["capture", "--model", str(folders["llama"]), "--data", str(tmp_path / "chats.jsonl"), "--text", "messages"]
    call += ["--roles", "assistant", "--chat-template", str(tmp_path / "chat.jinja"), "--layer", "1"]
    run([*call, "--out", str(tmp_path / "rows")])
    assert sk.open_rows(tmp_path / "rows").info["mask"]["roles"] == ["assistant"]
