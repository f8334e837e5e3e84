"""Language models that test labels, behind one method: of transformers here, or at an address."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from ..errors import ConfigError
from ..models.language import LanguageModel
from ..models.loading import load_language_model
from .endpoint import Endpoint, is_endpoint
from .prompts import Answer, Prompt, probability_of_yes
from .settings import JudgeSettings

BATCH = 8
"""Prompts that a local model reads at once."""


Keep = Callable[[int, Answer], None]
"""What is called with the index of a prompt and its answer, the moment it is there."""


class Judge(Protocol):
    """A language model that answers prompts."""

    @property
    def name(self) -> str:
        """What answers are kept under: it names the model, and never holds a key."""
        ...

    def ask(self, prompts: Sequence[Prompt], keep: Keep) -> Iterator[tuple[int, Answer]]:
        """Yield each answer with the index of its prompt, in any order, as soon as it is there.

        A prompt without an answer gives one that says why; only what no later prompt can cure is raised. `keep` is
        called with the same before anything else is done, from any thread: what was paid for is not lost where the
        run ends, for whatever reason.
        """
        ...


def open_judge(address: str | os.PathLike[str] | Judge, settings: JudgeSettings) -> Judge:
    """Return what answers at an address: an OpenAI-compatible endpoint, or a causal language model of transformers.

    Raises
    ------
    ConfigError
        The endpoint needs a model's name, or the model predicts no next tokens.
    """
    if not isinstance(address, str | os.PathLike):
        return address
    if is_endpoint(address):
        return Endpoint(str(address), settings)
    return LocalJudge(load_language_model(address))


@dataclass(frozen=True)
class LocalJudge:
    """A causal language model: its log-probabilities of yes and no are the answer."""

    lm: LanguageModel

    def __post_init__(self) -> None:
        if not self.lm.is_causal:
            raise ConfigError(
                f"judge: the model must predict next tokens; `{self.lm.name}` is not a causal language model."
            )

    @property
    def name(self) -> str:
        """Name and digest of the model."""
        return f"{self.lm.name} {self.lm.digest}"

    def ask(self, prompts: Sequence[Prompt], keep: Keep) -> Iterator[tuple[int, Answer]]:
        """Yield the answers, of prompts of similar length together."""
        for i, answer in self._answers(prompts):
            keep(i, answer)
            yield i, answer

    def _answers(self, prompts: Sequence[Prompt]) -> Iterator[tuple[int, Answer]]:
        ids = [self._ids(prompt) for prompt in prompts]
        long = [i for i, each in enumerate(ids) if len(each) + prompts[i].max_tokens > self.lm.context]
        for i in long:
            yield i, Answer(failure=f"a prompt of {len(ids[i])} tokens; the model reads {self.lm.context}")
        fit = sorted(set(range(len(prompts))) - set(long), key=lambda i: (len(ids[i]), i))
        choices = [i for i in fit if prompts[i].is_choice]
        for i in sorted(set(fit) - set(choices)):
            yield i, self._text(ids[i], prompts[i].max_tokens)
        for start in range(0, len(choices), BATCH):
            some = choices[start : start + BATCH]
            yield from zip(some, self._choices([ids[i] for i in some]), strict=True)

    def _ids(self, prompt: Prompt) -> list[int]:
        tokenizer = self.lm.tokenizer
        if getattr(tokenizer, "chat_template", None):
            said = [{"role": "user", "content": prompt.text}]
            text = tokenizer.apply_chat_template(said, tokenize=False, add_generation_prompt=True)
            return list(tokenizer(text, add_special_tokens=False)["input_ids"])
        return list(tokenizer(prompt.text)["input_ids"])

    def _choices(self, ids: Sequence[Sequence[int]]) -> list[Answer]:
        """Return the probabilities of yes: no later token changes an earlier one, so padding goes to the right."""
        device, longest = self.lm.device, max(map(len, ids))
        tokens = torch.zeros(len(ids), longest, dtype=torch.int64)
        mask = torch.zeros_like(tokens)
        for row, each in enumerate(ids):
            tokens[row, : len(each)], mask[row, : len(each)] = torch.tensor(each), 1
        with torch.no_grad():
            logits = self.lm.model(input_ids=tokens.to(device), attention_mask=mask.to(device)).logits
        last = logits[torch.arange(len(ids)), mask.sum(1) - 1].float().log_softmax(1).cpu()
        words = self._words()
        return [
            Answer(
                yes=probability_of_yes({word: float(row[token]) for token, word in words.items()}),
                tokens=(len(each), 1),
            )
            for row, each in zip(last, ids, strict=True)
        ]

    def _words(self) -> dict[int, str]:
        """Return the first tokens of the spellings of yes and no, where the two have different ones."""
        found: dict[int, set[str]] = {}
        for spelling in ("yes", "Yes", " yes", " Yes", "no", "No", " no", " No"):
            ids = self.lm.tokenizer(spelling, add_special_tokens=False)["input_ids"]
            if ids:
                found.setdefault(int(ids[0]), set()).add(spelling.strip().lower())
        different = {token: next(iter(words)) for token, words in found.items() if len(words) == 1}
        if set(different.values()) != {"yes", "no"}:
            raise ConfigError(
                f"judge: the tokenizer must tell yes from no by the first token; that of `{self.lm.name}` does not. "
                "Give another model."
            )
        # keys must differ: padded by spaces, which are not read
        return {token: word + " " * number for number, (token, word) in enumerate(sorted(different.items()))}

    def _text(self, ids: Sequence[int], max_tokens: int) -> Answer:
        """Return the most likely continuation."""
        given: Any = torch.tensor([list(ids)], device=self.lm.device)
        with torch.no_grad():
            made = self.lm.model.generate(  # type: ignore[operator]
                input_ids=given, attention_mask=torch.ones_like(given), max_new_tokens=max_tokens, do_sample=False
            )
        new = made[0, len(ids) :].tolist()
        return Answer(self.lm.tokenizer.decode(new, skip_special_tokens=True), tokens=(len(ids), len(new)))
