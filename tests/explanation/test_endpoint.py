"""An endpoint that answers, refuses, stalls or talks nonsense; and a run that goes on where it was ended."""

from __future__ import annotations

import json
import math
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from email.message import Message
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.error import HTTPError

import pytest

from fixtures.forks import Killed, forked
from fixtures.kills import watched
from saekit.errors import ConfigError, ModelError
from saekit.explanation import endpoint as module
from saekit.explanation.answers import ANSWERS, Answers, key_of
from saekit.explanation.endpoint import Endpoint
from saekit.explanation.prompts import Answer, Prompt
from saekit.explanation.settings import JudgeSettings
from saekit.settings import silent

KEY = "sk-secret-0123456789"
PROMPTS = [Prompt(f"question {i}", 4, True) for i in range(6)]


def completion(text: str, **more) -> bytes:
    choice = {"message": {"role": "assistant", "content": text}, **more}
    return json.dumps({"choices": [choice], "usage": {"prompt_tokens": 7, "completion_tokens": 1}}).encode()


class Fake:
    """A server that answers with what `reply` returns: a status, a body, and headers."""

    def __init__(self) -> None:
        self.seen: list[dict] = []
        self.headers: list[dict] = []
        self.reply: Callable[[dict, int], tuple] = lambda body, count: (200, completion("yes"))
        fake = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                fake.seen.append(body)
                fake.headers.append(dict(self.headers))
                status, data, *rest = fake.reply(body, len(fake.seen))
                self.send_response(status)
                self.send_header("Content-Length", str(len(data) + (9 if "cut" in rest else 0)))
                for name, value in (each for each in rest if isinstance(each, tuple)):
                    self.send_header(name, value)
                self.end_headers()
                with suppress(OSError):  # who asked may have gone
                    for part in [data] if "slowly" not in rest else [data[i : i + 1] for i in range(len(data))]:
                        self.wfile.write(part)
                        if "slowly" in rest:
                            time.sleep(0.05)

            def log_message(self, *_):
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.address = f"http://127.0.0.1:{self.server.server_address[1]}/v1"
        self.thread = threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
        self.thread.start()


@pytest.fixture
def fake(monkeypatch):
    monkeypatch.setattr(module, "FIRST_WAIT", 0.01)
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    monkeypatch.setenv("no_proxy", "*")
    found = Fake()
    yield found
    found.server.shutdown()
    found.server.server_close()


def judge(fake, **settings) -> Endpoint:
    settings = {"judge_model": "m", "retries": 2, "timeout": 5.0, **settings}
    return Endpoint(fake.address, JudgeSettings(**settings))


def ask(endpoint, prompts=PROMPTS) -> list[Answer]:
    kept: list[tuple[int, Answer]] = []
    found = dict(endpoint.ask(prompts, lambda i, answer: kept.append((i, answer))))
    assert dict(kept) == found
    return [found[i] for i in range(len(prompts))]


def test_answers_and_probabilities(fake):
    top = [{"token": "Yes", "logprob": math.log(0.6)}, {"token": " no", "logprob": math.log(0.2)}]
    fake.reply = lambda body, count: (200, completion("Yes", logprobs={"content": [{"top_logprobs": top}]}))
    found = ask(judge(fake))
    assert [each.score for each in found] == pytest.approx([0.75] * 6)
    assert found[0].tokens == (7, 1)
    assert {body["messages"][0]["content"] for body in fake.seen} == {each.text for each in PROMPTS}
    assert all(body["temperature"] == 0 and body["max_tokens"] == 4 and body["logprobs"] for body in fake.seen)
    assert all(each["Authorization"] == f"Bearer {KEY}" for each in fake.headers)
    text = ask(judge(fake), [Prompt("a label, please", 60, False)])
    assert text[0].text == "Yes"
    assert "logprobs" not in fake.seen[-1]


@pytest.mark.parametrize(
    ("text", "score"),
    [
        ("yes", 1.0),
        (" No.", 0.0),
        ("**Yes**", 1.0),
        ("maybe", None),
        ("", None),
        ("The answer is yes", None),
        ("nope", None),
        ("\x00\u202e", None),
    ],
)
def test_an_answer_is_yes_or_no_or_missing(fake, text, score):
    fake.reply = lambda body, count: (200, completion(text))
    assert ask(judge(fake), PROMPTS[:1])[0].score == score


@pytest.mark.parametrize(
    "trouble",
    [
        (429, b"{}", ("Retry-After", "0.01")),
        (500, b"oh"),
        (503, b""),
        (200, b'{"choices": ['),
        (200, b"[]"),
        (200, b"\xff"),
        (200, completion("yes")[:-5], "cut"),
    ],
)
def test_what_may_pass_is_tried_again(fake, trouble):
    fake.reply = lambda body, count: trouble if count <= 2 else (200, completion("yes"))
    assert ask(judge(fake), PROMPTS[:1])[0].score == 1.0
    assert len(fake.seen) == 3
    fake.seen.clear()
    fake.reply = lambda body, count: trouble
    found = ask(judge(fake), PROMPTS[:1])[0]
    assert len(fake.seen) == 3  # once, and two repeats
    assert found.score is None
    assert found.failure


def test_a_server_that_stalls(fake):
    fake.reply = lambda body, count: (time.sleep(0.6), (200, completion("yes")))[1]
    found = ask(judge(fake, timeout=0.1, retries=0), PROMPTS[:1])[0]
    assert found.failure == "no reply within 0.1 s"


def test_a_reply_that_trickles_in_has_an_end(fake):
    fake.reply = lambda body, count: (200, completion("yes"), "slowly")  # each byte in time, all of them in 7 seconds
    found = ask(judge(fake, timeout=0.3, retries=0), PROMPTS[:1])[0]
    assert found.failure == "no reply within 0.3 s"


def test_waits_are_bounded_and_asked_ones_are_kept(fake, monkeypatch):
    monkeypatch.setattr(module, "LONGEST_ASKED", 0.2)
    fake.reply = lambda body, count: (429, b"", ("Retry-After", "9999")) if count == 1 else (200, completion("no"))
    since = time.monotonic()
    assert ask(judge(fake), PROMPTS[:1])[0].score == 0.0
    assert 0.2 <= time.monotonic() - since < 3


def test_a_wait_may_be_asked_for_by_date():
    def asked(value: str) -> float:
        headers = Message()
        headers["Retry-After"] = value
        return module._asked_wait(HTTPError("", 429, "", headers, None))

    assert 50 < asked(formatdate(time.time() + 60, usegmt=True)) <= 60
    assert [asked(each) for each in ("7", "-7", "nan", "inf", "soon", "", formatdate(0, usegmt=True))] == [7] + [0] * 6


REFUSALS = {
    "max_tokens": b"Unsupported parameter: 'max_tokens' is not supported with this model. Use 'max_completion_tokens'.",
    "temperature": b"Unsupported value: 'temperature' does not support 0 with this model.",
    "logprobs": b"no",
}


@pytest.mark.parametrize(
    "refused", [["max_tokens"], ["temperature", "max_tokens"], ["max_tokens", "logprobs"], list(REFUSALS)]
)
def test_what_an_endpoint_refuses_is_left_out_once_and_for_all(fake, refused):
    def reply(body, count):
        found = next((each for each in refused if each in body), None)
        return (200, completion("no")) if found is None else (400, REFUSALS[found])

    fake.reply = reply
    endpoint = judge(fake, max_concurrency=1, retries=0)
    assert [each.score for each in ask(endpoint)] == [0.0] * 6
    assert len(fake.seen) == 6 + len(refused)
    assert endpoint.left_out == set(refused)
    assert fake.seen[-1].get("max_completion_tokens") == (4 if "max_tokens" in refused else None)
    assert not [body for body in fake.seen if "max_tokens" in body and "max_completion_tokens" in body]


def test_a_refusal_that_names_what_was_left_out_already_ends_the_run(fake):
    fake.reply = lambda body, count: (400, REFUSALS["max_tokens"] + REFUSALS["temperature"])
    with pytest.raises(ModelError, match="status 400"):
        ask(judge(fake, max_concurrency=1))
    assert len(fake.seen) == 4


def test_tokens_that_went_into_reasoning_are_no_answer_and_are_not_paid_again(fake):
    fake.reply = lambda body, count: (200, completion("", finish_reason="length"))
    found = ask(judge(fake), PROMPTS[:1])[0]
    assert "went into reasoning" in found.failure
    assert len(fake.seen) == 1


def test_probabilities_that_are_refused_are_left_out(fake):
    def reply(body, count):
        return (400, b"no logprobs") if "logprobs" in body else (200, completion("no"))

    fake.reply = reply
    assert [each.score for each in ask(judge(fake, max_concurrency=3, retries=0))] == [0.0] * 6
    assert "logprobs" not in fake.seen[-1]


@pytest.mark.parametrize("status", [400, 401, 403, 404, 307, 302])
def test_a_refusal_ends_the_run_and_quotes_nothing(fake, status):
    fake.reply = lambda body, count: (status, KEY.encode(), ("Location", f"{fake.address}/elsewhere"))
    with pytest.raises(ModelError, match=f"status {status}") as caught:
        ask(judge(fake))
    assert KEY not in str(caught.value)
    assert "secret" not in repr(judge(fake))
    assert "secret" not in judge(fake).name


def test_an_endpoint_that_is_not_there_ends_the_run(fake, monkeypatch):
    monkeypatch.setattr(module, "FRUITLESS", 3)
    fake.reply = lambda body, count: (503, b"")
    with pytest.raises(ModelError, match="the last 3 prompts had none"):
        ask(judge(fake, max_concurrency=1, retries=0))
    assert len(fake.seen) == 3


@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("http://", "must be that of an endpoint"),
        ("http://a b/v1", "must be that of"),
        ("https://u:p@h/v1", "no password"),
        ("https://h/v1?key=1", "no password"),
        ("http://example.org/v1", "unencrypted"),
        ("http://h:x/v1", "must be that of"),
    ],
)
def test_addresses_that_are_refused(fake, address, message):
    with pytest.raises(ConfigError, match=message) as caught:
        Endpoint(address, JudgeSettings(judge_model="m"))
    assert KEY not in str(caught.value)
    with pytest.raises(ConfigError, match="needs the name of a model"):
        Endpoint(fake.address, JudgeSettings())


def test_keys_that_cannot_be_sent(fake, monkeypatch):
    with pytest.raises(ConfigError, match="the name of an environment variable") as caught:
        JudgeSettings(judge_key=KEY)
    assert KEY not in str(caught.value)
    monkeypatch.setenv("OPENAI_API_KEY", "a\nb")
    with pytest.raises(ConfigError, match="ASCII without spaces") as caught:
        judge(fake)
    assert "a\nb" not in str(caught.value)
    monkeypatch.delenv("OPENAI_API_KEY")
    ask(judge(fake), PROMPTS[:1])
    assert "Authorization" not in fake.headers[-1]


def test_a_run_that_was_ended_goes_on_without_asking_twice(fake, tmp_path):
    fake.reply = lambda body, count: (200, completion("yes")) if count <= 3 else (401, b"")
    endpoint = judge(fake, max_concurrency=1)
    path = tmp_path / ANSWERS
    with pytest.raises(ModelError):
        Answers(path).ask(endpoint, PROMPTS, silent, "answers")
    assert len(path.read_text().splitlines()) == 3
    path.write_bytes(path.read_bytes() + b'{"key": "sha256:0", "te')  # a kill within a line
    fake.seen.clear()
    fake.reply = lambda body, count: (200, completion("no"))
    found = Answers(path).ask(endpoint, [*PROMPTS, PROMPTS[0]], silent, "answers")
    assert [each.score for each in found] == [1, 1, 1, 0, 0, 0, 1]
    assert len(fake.seen) == 3
    assert KEY not in path.read_text()
    again = Answers(path)
    assert len(again.found) == 6
    assert not again.missing(endpoint, PROMPTS)
    other = judge(fake, judge_model="other")
    assert len(again.missing(other, PROMPTS)) == 6
    assert key_of(other, PROMPTS[0]) != key_of(endpoint, PROMPTS[0])


def test_answers_under_way_are_kept_where_a_run_ends(fake, tmp_path):
    """Three requests at once; the first is refused for good, the others are answered a moment later."""

    def reply(body, count):
        while len(fake.seen) < 3:
            time.sleep(0.01)
        if "question 0" in body["messages"][0]["content"]:
            return 401, b""
        time.sleep(0.3)
        return 200, completion("yes")

    fake.reply = reply
    path = tmp_path / ANSWERS
    with pytest.raises(ModelError, match="status 401"):
        Answers(path).ask(judge(fake, max_concurrency=3), PROMPTS, silent, "answers")
    paid = len(fake.seen) - 1
    assert paid == 2
    fake.reply = lambda body, count: (200, completion("no"))
    found = Answers(path).ask(judge(fake), PROMPTS, silent, "answers")
    assert [each.score for each in found] == [0, 1, 1, 0, 0, 0]
    assert len(fake.seen) == 1 + 2 + 4


def test_kills_at_every_write_lose_no_more_than_what_was_under_way(fake, tmp_path):
    """What was answered before a kill is not asked again, but for the one whose line was being written."""
    endpoint, prompts = judge(fake, max_concurrency=1), PROMPTS[:4]
    path = tmp_path / ANSWERS

    def call(_):
        Answers(path).ask(endpoint, prompts, silent, "answers")

    n_events = forked(lambda: watched(call, tmp_path)).n_events
    assert n_events >= 3 * len(prompts)  # each line: opened, and written by halves
    for number in range(n_events):
        path.unlink()
        fake.seen.clear()
        with pytest.raises(Killed):
            forked(lambda n=number: watched(call, tmp_path, n))
        paid = len(fake.seen)
        kept = len(Answers(path if path.exists() else None).found)
        assert paid - 1 <= kept <= paid
        fake.seen.clear()
        call(tmp_path)
        assert len(fake.seen) == len(prompts) - kept
        assert len(Answers(path).found) == len(prompts)


def test_failures_are_not_kept(fake, tmp_path):
    fake.reply = lambda body, count: (500, b"")
    found = Answers(tmp_path / ANSWERS).ask(judge(fake, retries=0), PROMPTS[:2], silent, "answers")
    assert [each.failure for each in found] == ["status 500"] * 2
    assert not (tmp_path / ANSWERS).exists()
