"""An OpenAI-compatible endpoint, by the standard library alone.

The key comes from an environment variable, goes into the header of requests to that one address, and nowhere else: no
redirect is followed, and what the server says is never quoted.
"""

from __future__ import annotations

import http.client
import ipaddress
import json
import os
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence, Set
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from email.utils import parsedate, parsedate_to_datetime
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from ..errors import ConfigError, FormatError, ModelError
from ..files import parse_json
from ..settings import is_number, is_whole
from .prompts import Answer, Prompt, probability_of_yes
from .settings import JudgeSettings

if TYPE_CHECKING:
    from .judge import Keep

LARGEST_REPLY = 2**20
"""Bytes of a reply that are read."""

FIRST_WAIT, LONGEST_WAIT = 0.5, 30.0
"""Seconds before the first repeat, doubled each time; and at most."""

LONGEST_ASKED = 120.0
"""Seconds that are waited at most where the server asks for more: limits are often per minute."""

FRUITLESS = 20
"""Prompts in a row without an answer after which a run ends: the endpoint is not there."""

_FATAL = {
    400: "It does not take such requests; is it OpenAI-compatible, and the model's name right?",
    401: "Is the key right?",
    403: "May this key use this model?",
    404: "Is the address right, up to /v1, and the model's name?",
    405: "Is the address right, up to /v1?",
    422: "It does not take such requests; is it OpenAI-compatible?",
}


def is_endpoint(address: object) -> bool:
    """Return whether an address is that of an endpoint."""
    return isinstance(address, str) and address.lower().startswith(("http://", "https://"))


class Endpoint:
    """A model at an address that ends with ``/v1``, say ``http://localhost:8000/v1``.

    Raises
    ------
    ConfigError
        No model's name, an address with a password or a query, or a key that would be sent unencrypted.
    """

    def __init__(self, address: str, settings: JudgeSettings) -> None:
        parts = _checked(address)
        base = address.rstrip("/")
        self.url = base if base.endswith("/chat/completions") else f"{base}/chat/completions"
        if not settings.judge_model:
            raise ConfigError(
                f"judge: an endpoint needs the name of a model; got the address `{address}` alone. Give --judge-model."
            )
        self.model, self.settings = settings.judge_model, settings
        self.name = f"{parts.scheme}://{parts.netloc}{parts.path} {self.model}"
        self._key = os.environ.get(settings.judge_key, "").strip()
        if self._key and parts.scheme == "http" and not _is_local(parts.hostname or ""):
            raise ConfigError(
                f"judge: a key must not be sent unencrypted; `{address}` is http, and {settings.judge_key} is set. Use "
                "https, or set judge_key to the name of a variable that is not set."
            )
        if not self._key.isascii() or _has_space(self._key):
            raise ConfigError(f"judge: the key in {settings.judge_key} must be ASCII without spaces; it is not.")
        self.left_out: set[str] = set()
        self._stop = threading.Event()

    def __repr__(self) -> str:
        return f"Endpoint({self.name!r})"

    def ask(self, prompts: Sequence[Prompt], keep: Keep) -> Iterator[tuple[int, Answer]]:
        """Yield the answers as they come, `max_concurrency` requests at a time.

        Where it ends early, requests that are under way are waited for, and their answers are kept.

        Raises
        ------
        ModelError
            The endpoint refuses the requests, or answers none of many.
        """
        self._stop.clear()
        left, running, fruitless = iter(range(len(prompts))), dict[Future[Answer], int](), 0
        with ThreadPoolExecutor(self.settings.max_concurrency, thread_name_prefix="saekit-judge") as pool:
            try:
                while True:
                    while len(running) < self.settings.max_concurrency and (i := next(left, None)) is not None:
                        running[pool.submit(self._kept, prompts[i], i, keep)] = i
                    if not running:
                        return
                    done, _ = wait(running, return_when=FIRST_COMPLETED)
                    for each in done:
                        answer = each.result()
                        fruitless = fruitless + 1 if answer.failure else 0
                        yield running.pop(each), answer
                    if fruitless >= FRUITLESS:
                        raise ModelError(
                            f"judge: `{self.name}` must answer; the last {fruitless} prompts had none "
                            f"({answer.failure}). Run the same call again to go on from what was answered."
                        )
            finally:
                self._stop.set()  # those that wait for a repeat end
                for future in running:
                    future.cancel()

    def _kept(self, prompt: Prompt, i: int, keep: Keep) -> Answer:
        answer = self._answer(prompt)
        keep(i, answer)
        return answer

    def _answer(self, prompt: Prompt) -> Answer:
        """Return the answer to a prompt, after repeats where the trouble may pass."""
        why, waiting = "not asked", 0.0
        for attempt in range(self.settings.retries + 1):
            own = min(FIRST_WAIT * 2 ** (attempt - 1), LONGEST_WAIT)
            if attempt and self._stop.wait(max(min(waiting, LONGEST_ASKED), own)):
                break
            try:
                return self._once(prompt)
            except (OSError, http.client.HTTPException, FormatError) as error:
                why, waiting = self._trouble(error)
        return Answer(failure=why)

    def _once(self, prompt: Prompt) -> Answer:
        """Return the answer to a request; where one is refused for what it holds, to one without that.

        What has to be left out is remembered, so that each is refused once.
        """
        left_out = set(self.left_out)
        while True:
            try:
                answer = _read(self._post(self._body(prompt, left_out)))
            except urllib.error.HTTPError as error:
                cause = _refused(error, prompt, left_out)
                if cause is None:
                    raise
                error.close()
                left_out.add(cause)
            else:
                self.left_out |= left_out
                return answer

    def _trouble(self, error: Exception) -> tuple[str, float]:
        """Return why there is no answer, and the seconds that the server asks to wait.

        Raises
        ------
        ModelError
            No repeat would help.
        """
        if isinstance(error, urllib.error.HTTPError):
            with error:
                if error.code in _FATAL or 300 <= error.code < 400:
                    raise self._refusal(error.code) from None
                return f"status {error.code}", _asked_wait(error)
        cause = error.reason if isinstance(error, urllib.error.URLError) else error
        if isinstance(cause, TimeoutError):
            return f"no reply within {self.settings.timeout:g} s", 0.0
        if isinstance(error, FormatError):
            return "a reply of another form", 0.0
        return "no connection", 0.0

    def _refusal(self, status: int) -> ModelError:
        advice = _FATAL.get(status, "It redirects; give the address that it redirects to.")
        return ModelError(f"judge: `{self.name}` must answer requests; it refuses them with status {status}. {advice}")

    def _body(self, prompt: Prompt, left_out: Set[str]) -> bytes:
        limit = "max_completion_tokens" if "max_tokens" in left_out else "max_tokens"
        body: dict[str, Any] = {
            "model": self.model,
            "messages": [{"role": "user", "content": prompt.text}],
            limit: prompt.max_tokens,
        }
        if "temperature" not in left_out:
            body["temperature"] = 0
        if prompt.is_choice and "logprobs" not in left_out:
            body |= {"logprobs": True, "top_logprobs": 10}
        return json.dumps(body).encode()

    def _post(self, body: bytes) -> bytes:
        headers = {"Content-Type": "application/json", "User-Agent": "saekit"}
        if self._key:
            headers["Authorization"] = f"Bearer {self._key}"
        request = urllib.request.Request(self.url, data=body, headers=headers, method="POST")
        until, found = time.monotonic() + self.settings.timeout, b""
        with urllib.request.build_opener(_NoRedirect).open(request, timeout=self.settings.timeout) as reply:
            while part := reply.read1(LARGEST_REPLY):
                found += part
                if len(found) > LARGEST_REPLY:
                    raise FormatError("the reply is too long.")
                if time.monotonic() > until:  # one that trickles in has no end
                    raise TimeoutError
            if reply.length:  # what is left of the length that was announced
                raise http.client.IncompleteRead(found, reply.length)
        return found


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """Follows no redirect: the key belongs to one address."""

    def redirect_request(self, *_: Any, **__: Any) -> None:
        return None


def _refused(error: urllib.error.HTTPError, prompt: Prompt, left_out: Set[str]) -> str | None:
    """Return what a request must leave out to be taken; None where that is not the reason for the refusal.

    Newer endpoints take ``max_completion_tokens`` in place of ``max_tokens``, and no temperature of reasoning models;
    many state no log-probabilities, and say so in words of their own.
    """
    if error.code not in (400, 422):
        return None
    try:
        said = error.read(LARGEST_REPLY).lower()
    except (OSError, http.client.HTTPException):
        said = b""
    for name, sign in (("max_tokens", b"max_completion_tokens"), ("temperature", b"temperature")):
        if name not in left_out and sign in said:
            return name
    return "logprobs" if prompt.is_choice and "logprobs" not in left_out else None


def _checked(address: str) -> Any:
    """Return the parts of an address.

    Raises
    ------
    ConfigError
        It has no host, or holds more than host and path.
    """
    try:
        parts = urlsplit(address)
        known = bool(parts.hostname) and parts.port != 0 and address.isascii() and not _has_space(address)
    except ValueError:
        known = False
    if not known:
        raise ConfigError(
            f"judge: the address must be that of an endpoint, http://localhost:8000/v1; got `{address!r}`."
        )
    if parts.username or parts.password or parts.query or parts.fragment:
        raise ConfigError(
            "judge: the address must hold no password, query or fragment; it holds one. Put the key into an "
            "environment variable (OPENAI_API_KEY, or that of judge_key)."
        )
    return parts


def _has_space(text: str) -> bool:
    return any(sign.isspace() for sign in text)


def _is_local(host: str) -> bool:
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _asked_wait(error: urllib.error.HTTPError) -> float:
    """Return the seconds that a server asks to wait; 0 where it does not."""
    asked = error.headers.get("Retry-After", "")
    try:
        seconds = float(asked)
    except ValueError:
        date = parsedate_to_datetime(asked) if _is_date(asked) else None
        seconds = 0.0 if date is None else date.timestamp() - time.time()
    return seconds if 0 < seconds < float("inf") else 0.0


def _is_date(text: str) -> bool:
    return parsedate(text) is not None


def _read(reply: bytes) -> Answer:
    """Return the answer in a reply.

    Raises
    ------
    FormatError
        It is no JSON, or of another form.
    """
    found = parse_json(reply, "reply")
    try:
        choice = found["choices"][0]
        text = choice["message"]["content"]
    except (KeyError, IndexError, TypeError):
        raise FormatError("the reply must hold choices[0].message.content; it does not.") from None
    if text is not None and not isinstance(text, str):
        raise FormatError("the content must be text; it is not.")
    if not text and choice.get("finish_reason") == "length":
        return Answer(failure="its tokens went into reasoning; a judge must answer at once")
    usage = found.get("usage")
    return Answer(text or "", _yes(choice), (_count(usage, "prompt_tokens"), _count(usage, "completion_tokens")))


def _yes(choice: dict[str, Any]) -> float | None:
    """Return the probability of yes in the log-probabilities of the first token, where there are any."""
    try:
        top = choice["logprobs"]["content"][0]["top_logprobs"]
        # by index: spellings may repeat
        pairs = {each["token"] + " " * i: each["logprob"] for i, each in enumerate(top)}
    except (KeyError, IndexError, TypeError):
        return None
    return probability_of_yes({token: float(value) for token, value in pairs.items() if is_number(value)})


def _count(usage: object, name: str) -> int:
    value: Any = usage.get(name) if isinstance(usage, dict) else None
    return int(value) if is_whole(value) and value >= 0 else 0
