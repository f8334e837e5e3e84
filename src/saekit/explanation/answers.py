"""Answers of language models, kept as they come, so that a run that was ended goes on without asking twice."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path

from ..errors import FormatError
from ..files import append_text, digest_bytes, parse_json, read_bytes
from ..forms import NATURAL, check_form
from ..settings import Progress
from .judge import Judge
from .prompts import Answer, Prompt

ANSWERS = "answers.jsonl"
"""The file in the output folder: a line per answer."""


class Answers:
    """Answers by the digest of prompt and model; lines are added to the file, never changed.

    A line that a kill cut off, or that does not read, is left out; its question is asked again.
    """

    def __init__(self, path: Path | None) -> None:
        self.path, self.found = path, dict[str, Answer]()
        self._one_at_a_time = threading.Lock()
        if path is None or not path.is_file():
            return
        data = read_bytes(path)
        for line in data.splitlines():
            try:
                plain = parse_json(line, path)
                check_form(plain, {"key": str, "text": str, "yes": (float, None), "tokens": [NATURAL]}, path)
            except FormatError:
                continue
            self.found[plain["key"]] = Answer(plain["text"], plain["yes"], (plain["tokens"] + [0, 0])[:2])
        if data and not data.endswith(b"\n"):
            append_text(path, "\n")

    def add(self, key: str, answer: Answer) -> None:
        """Keep an answer, from any thread; one that failed is not kept, so that it is asked for again."""
        if answer.failure:
            return
        about = {name: value for name, value in asdict(answer).items() if name != "failure"}
        with self._one_at_a_time:
            self.found[key] = answer
            if self.path is not None:
                append_text(self.path, json.dumps({"key": key, **about}) + "\n")

    def missing(self, judge: Judge, prompts: Iterable[Prompt]) -> list[Prompt]:
        """Return the prompts that have no answer yet, each once."""
        return [each for each in dict.fromkeys(prompts) if key_of(judge, each) not in self.found]

    def ask(self, judge: Judge, prompts: Sequence[Prompt], progress: Progress, stage: str) -> list[Answer]:
        """Return an answer for each prompt; those that are not kept yet are asked for."""
        left = self.missing(judge, prompts)
        failed: dict[Prompt, Answer] = {}
        progress(stage, 0, len(left))
        replies = judge.ask(left, lambda i, answer: self.add(key_of(judge, left[i]), answer))
        for done, (i, answer) in enumerate(replies, 1):
            if answer.failure:
                failed[left[i]] = answer
            progress(stage, done, len(left))
        return [failed[each] if each in failed else self.found[key_of(judge, each)] for each in prompts]


def key_of(judge: Judge, prompt: Prompt) -> str:
    """Return the digest of a prompt and the model that it is for."""
    return digest_bytes(json.dumps([judge.name, prompt.text, prompt.max_tokens, prompt.is_choice]).encode())
