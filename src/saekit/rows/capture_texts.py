"""Texts to rows: contexts are run through a language model, and hooks give one row per token."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from importlib.metadata import version
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import ConfigError, InputError
from ..inputs.chat import clipped
from ..inputs.texts import Texts, read_texts
from ..models.hooks import Hook, activations, find_hook, in_layer
from ..models.language import LanguageModel
from .outliers import CALIBRATION_TOKENS
from .settings import ReadingSettings
from .source import Columns
from .tokens import CONTEXT, Contexts, TokenBatch, batch_tokens_on, batching_on, special_tokens, token_batches, tokenize

_GROUP_TOKENS = 16_384  # tokens in consecutive contexts that are sorted by length together; the grain of resuming
_TEXTS_AT_ONCE = 512
_CHARACTERS_PER_TOKEN = 12  # how much text is read for a number of tokens before more is fetched


@dataclass(frozen=True)
class Split:
    """One of several processes that run the same contexts through the model, each a part of the forward passes."""

    rank: int
    size: int
    everyones: Callable[[Tensor, Sequence[int]], list[Tensor]]
    """From this process's rows, and how many each process has, to those of all processes."""


@dataclass(frozen=True)
class TextRunner:
    """Turns contexts into rows at several hooks.

    Raises
    ------
    ConfigError
        The context is longer than what the model takes.
    """

    lm: LanguageModel
    hooks: tuple[Hook, ...]
    dtype: torch.dtype
    """Number type of the rows."""
    settings: ReadingSettings

    @cached_property
    def targets(self) -> tuple[Hook, ...]:
        """Where the rows that transcoders predict are taken, one for each hook, in the same pass; empty: none wanted.

        Raises
        ------
        ConfigError
            The target is that of a layer, and a hook lies in none.
        """
        target = self.settings.target
        return () if target is None else tuple(find_hook(self.lm.model, in_layer(target, each)) for each in self.hooks)

    def info(self, hook: Hook) -> dict[str, Any]:
        """Return what is recorded with the rows of a hook about their targets."""
        if not self.targets:
            return {}
        target = self.targets[self.hooks.index(hook)]
        return {"hook_out": target.name, "module_out": target.path}

    def __post_init__(self) -> None:
        wanted = self.settings.context
        if wanted is not None and wanted > self.lm.context:
            raise ConfigError(f"`context` must fit the model, which takes {self.lm.context} tokens; got {wanted}.")

    @property
    def context(self) -> int:
        """Maximum number of tokens in a context."""
        return min(self.settings.context or CONTEXT, self.lm.context)

    @property
    def batch_tokens(self) -> int:
        """Tokens in one forward pass."""
        return self.settings.batch_tokens or batch_tokens_on(self.lm)

    def rows(self, contexts: Contexts, split: Split | None = None) -> list[Columns]:
        """Return the rows of contexts at every hook, in the order of the contexts; added tokens as the settings say.

        Parameters
        ----------
        contexts
            The contexts.
        split
            The processes that share the forward passes; bitwise the same rows for any number of them.
        """
        wanted = self._wanted(contexts)
        # index of each kept token among the kept ones: batches come sorted by length, rows return to the text's order
        place = np.cumsum(wanted) - 1
        stored: list[Tensor] = []

        def store(rows: Sequence[Tensor], target: Tensor) -> None:
            for index, each in enumerate(rows):
                if len(stored) <= index:
                    stored.append(torch.empty(int(wanted.sum()), each.shape[-1], dtype=self.dtype))
                stored[index][target] = each

        targets: list[list[Tensor]] = [[] for _ in range(1 if split is None else split.size)]
        own: list[list[Tensor]] = []
        for number, batch in enumerate(self._batches(contexts)):
            span = np.concatenate([np.arange(contexts.offsets[i], contexts.offsets[i + 1]) for i in batch.index])
            target = torch.from_numpy(place[span[wanted[span]]])
            if split is None:
                store(self._run(batch), target)
                continue
            targets[number % split.size].append(target)
            if number % split.size == split.rank:
                own.append(self._run(batch))
            elif number == 0:
                own.append([each[:0] for each in self._run(batch)])  # a process without a pass must know the widths
        if split is not None:
            joined = [torch.cat(each) for each in zip(*own)]
            counts = [sum(map(len, each)) for each in targets]
            for part, each in zip(zip(*(split.everyones(x, counts) for x in joined)), targets):
                store(part, torch.cat(each) if each else torch.empty(0, dtype=torch.int64))
        token, document, position = (
            torch.from_numpy(column[wanted]) for column in (contexts.ids, contexts.document, contexts.position)
        )
        predicted: list[Tensor | None] = [stored[self._places.index(each)] for each in self.targets]
        return [
            Columns(x, token, document, position, target)
            for x, target in zip(stored, predicted or [None] * len(self.hooks))
        ]

    @cached_property
    def _places(self) -> list[Hook]:
        """The hooks, and behind them the targets that are none of them, each once."""
        return [*self.hooks, *dict.fromkeys(each for each in self.targets if each not in self.hooks)]

    def _batches(self, contexts: Contexts) -> Iterator[TokenBatch]:
        """Yield the inputs of the forward passes."""
        return token_batches(
            self.lm,
            contexts,
            batch_tokens=self.batch_tokens,
            padding=self.settings.padding,
            skip_special=self.settings.skip_special,
        )

    def _run(self, batch: TokenBatch) -> list[Tensor]:
        """Return the rows of one forward pass at every hook, and the rows to predict."""
        return [
            hidden[batch.keep.to(hidden.device)].to("cpu", self.dtype)
            for hidden in activations(self.lm.model, self._places, batch.inputs)
        ]

    def n_rows(self, contexts: Contexts) -> np.ndarray:
        """Return how many rows each context gives before the filter for outliers."""
        ends = np.concatenate([[0], np.cumsum(self._wanted(contexts))])
        return np.diff(ends[contexts.offsets])

    def _wanted(self, contexts: Contexts) -> np.ndarray:
        return contexts.position >= 0 if self.settings.skip_special else np.ones(len(contexts.ids), bool)


@dataclass(frozen=True)
class TextReader:
    """Texts cut into contexts, in groups of consecutive ones."""

    runner: TextRunner
    texts: Texts
    contexts: Contexts = field(repr=False)
    enough: int
    """Contexts that hold the tokens wanted; those behind them replace what the filter for outliers takes out."""
    total: int | None
    """Rows wanted."""

    unit = "rows"

    @cached_property
    def groups(self) -> list[tuple[int, int]]:
        """Ranges of consecutive contexts that are run together; the first `enough` contexts end a group."""
        groups = []
        first = n_tokens = 0
        for last, length in enumerate(self.contexts.lengths(), 1):
            n_tokens += int(length)
            if n_tokens >= _GROUP_TOKENS or last in (self.enough, len(self.contexts)):
                groups.append((first, last))
                first, n_tokens = last, 0
        return groups

    @property
    def n_groups(self) -> int:
        """Number of groups."""
        return len(self.groups)

    def done(self, n_groups: int, n_rows: int) -> int:
        """Return the number of rows."""
        return n_rows

    def sample(self) -> list[Columns]:
        """Return the first rows at every hook."""
        n_rows = np.cumsum(self.runner.n_rows(self.contexts))
        n_contexts = min(int(np.searchsorted(n_rows, CALIBRATION_TOKENS)) + 1, len(self.contexts))
        rows = self.runner.rows(self.contexts.pick(range(n_contexts)))
        return [each.map(lambda column: column[:CALIBRATION_TOKENS]) for each in rows]

    def rows(self, group: int) -> list[Columns]:
        """Return the rows of a group at every hook."""
        return self.runner.rows(self.contexts.pick(range(*self.groups[group])))

    def special(self, n_groups: int) -> dict[str, Any]:
        """Return how many tokens of the first groups were added, and whether they were skipped."""
        end = self.contexts.offsets[self.groups[n_groups - 1][1]] if n_groups else 0
        n_added = int((self.contexts.position[:end] < 0).sum())
        return {"skipped": self.runner.settings.skip_special, "n": n_added}

    @cached_property
    def counts(self) -> dict[str, int]:
        """How many texts are read for the rows wanted, how many of them give no token, how many several contexts.

        Empty texts are left out before that, and counted by themselves.
        """
        document = self.contexts.document[: self.contexts.offsets[self.enough]]
        n_texts = len(self.texts) if self.total is None else int(document.max(initial=-1)) + 1
        n_contexts = np.bincount(document[self.contexts.offsets[: self.enough]], minlength=n_texts)
        packed = self.runner.settings.pack
        return {
            "n_texts": n_texts,
            "n_texts_empty": self.texts.info["n_empty"],
            "n_texts_without_tokens": n_texts - len(np.unique(document)),
            "n_texts_cut": 0 if packed else int((n_contexts > 1).sum()),
        }

    def info(self, hook: Hook) -> dict[str, Any]:
        """Return what is recorded with the rows of a hook: their targets, the data, and how they are read."""
        settings = self.runner.settings
        around = special_tokens(self.runner.lm.tokenizer)
        batching = batching_on(self.runner.lm, settings.padding)
        return {
            **self.runner.info(hook),
            "data": self.texts.info["name"],
            "data_split": self.texts.info.get("split"),
            "data_text": self.texts.info["text"],
            **({"data_path": self.texts.info["path"]} if "path" in self.texts.info else {}),
            "data_digest": self.texts.digest,
            **self.counts,
            "tokens": self.total,
            "context": self.runner.context,
            "pack": settings.pack,
            **({"mask": mask} if (mask := settings.mask.facts()) else {}),
            "padding": settings.padding,
            "batch_tokens": self.runner.batch_tokens,
            **({} if batching == "padded" else {"batching": batching}),
            "added_tokens": {"before": list(around.before), "after": list(around.after)},
            "versions": {name: version(name) for name in ("torch", "transformers")},
        }


def open_texts(
    runner: TextRunner, data: str | os.PathLike[str] | Iterable[object], *, text: str, tokens: int | None
) -> TextReader:
    """Read texts and cut them into contexts, until they give enough tokens.

    Raises
    ------
    DataError
        The texts cannot be read or give no token.
    """
    spare = 0 if tokens is None else tokens + tokens // 8 + CALIBRATION_TOKENS
    for texts, characters in _growing(data, text, runner.settings.split, tokens):
        contexts = _cut(runner, texts, characters, None if tokens is None else spare)
        count = int(runner.n_rows(contexts).sum())
        # where a text was cut, its last token may be another: there must be enough without it
        if tokens is None or count >= (spare if _is_longer(texts, characters) else tokens):
            break
    if not count:
        if mask := runner.settings.mask.facts():
            raise InputError(f"`{texts.info['name']}` must give at least one token; none is left by {mask}.")
        raise InputError(
            f"`{texts.info['name']}` must give at least one token; the tokenizer of `{runner.lm.name}` makes none of "
            f"its {len(texts)} texts. Is it the tokenizer for this language?"
        )
    enough = len(contexts)
    if tokens is not None:
        enough = min(int(np.searchsorted(np.cumsum(runner.n_rows(contexts)), tokens)) + 1, len(contexts))
    return TextReader(runner, texts, contexts, enough, tokens)


def _cut(runner: TextRunner, texts: Texts, characters: int | None, rows: int | None) -> Contexts:
    """Cut texts, of each that many characters, into contexts that give that many rows; None: all."""
    parts: list[Contexts] = []
    count = 0
    for first in range(0, len(texts), _TEXTS_AT_ONCE):
        part = tokenize(
            runner.lm.tokenizer,
            [clipped(each, characters) for each in texts[first : first + _TEXTS_AT_ONCE]],
            context=runner.context,
            pack=runner.settings.pack,
            first_document=first,
            mask=runner.settings.mask,
        )
        parts.append(part)
        count += int(runner.n_rows(part).sum())
        if rows is not None and count >= rows:
            break
    return Contexts.cat(parts)


def _growing(
    data: str | os.PathLike[str] | Iterable[object], text: str, split: str | None, tokens: int | None
) -> Iterator[tuple[Texts, int | None]]:
    """Yield the texts, and how many characters of each; first as many as should do, then ever more of them."""
    characters = None if tokens is None else max(tokens * _CHARACTERS_PER_TOKEN, 10_000)
    while True:
        found = read_texts(data, text=text, split=split, columns=(), characters=characters)
        yield found, characters
        if characters is None or (found.info["complete"] and not _is_longer(found, characters)):
            return
        characters *= 4


def _is_longer(texts: Texts, characters: int | None) -> bool:
    """Return whether a text has more characters."""
    return characters is not None and any(len(clipped(text, characters)) < len(text) for text in texts)
