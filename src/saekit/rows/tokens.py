"""Texts to tokens: contexts of equal length limits, and padded batches of them with document and position."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from ..errors import ConfigError, ModelError, did_you_mean
from ..inputs.chat import Conversation, render, template_of
from ..models.language import LanguageModel
from ..models.pretrained import PretrainedModel, accepts
from ..models.quiet import quiet_transformers
from .batching import Batching, batching_of
from .settings import TokenMask

CONTEXT = 1024
"""Longest context unless given; models with less take less. Unit: tokens."""

BATCH_TOKENS = {"cpu": 2048, "cuda": 16_384}
"""Tokens in one forward pass, padding included, by type of device. On a CPU larger batches leave the cache: measured at
half the speed for 8,192. Unit: tokens."""


@dataclass(frozen=True)
class Contexts:
    """Texts as token ids, cut into pieces that the model takes at once."""

    ids: np.ndarray
    """Token ids of all contexts, int32, one after another."""
    document: np.ndarray
    """Number of the text each token belongs to, int64."""
    position: np.ndarray
    """Place of each token in its text, int32, from 0; -1 for tokens that become no rows: those that were added (BOS,
    CLS, SEP, what a chat template puts around messages), and those that a mask leaves out."""
    offsets: np.ndarray
    """Where each context begins in these arrays, int64, with the end behind."""

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def lengths(self) -> np.ndarray:
        """Return the number of tokens in each context."""
        return np.diff(self.offsets)

    def pick(self, index: Sequence[int] | np.ndarray) -> Contexts:
        """Return the contexts at `index`, in that order."""
        spans = [np.arange(self.offsets[i], self.offsets[i + 1]) for i in index]
        where = np.concatenate(spans) if spans else np.empty(0, np.int64)
        return Contexts(
            self.ids[where],
            self.document[where],
            self.position[where],
            np.concatenate([[0], np.cumsum([len(span) for span in spans])]).astype(np.int64),
        )

    @staticmethod
    def cat(parts: Sequence[Contexts]) -> Contexts:
        """Join contexts one after another."""
        lengths = np.concatenate([part.lengths() for part in parts]) if parts else np.empty(0, np.int64)
        return Contexts(
            np.concatenate([part.ids for part in parts]) if parts else np.empty(0, np.int32),
            np.concatenate([part.document for part in parts]) if parts else np.empty(0, np.int64),
            np.concatenate([part.position for part in parts]) if parts else np.empty(0, np.int32),
            np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
        )


@dataclass(frozen=True)
class TokenBatch:
    """Padded contexts, ready for one forward pass: ``lm.model(**batch.inputs)``.

    All tensors are ``[batch, sequence]`` on the device of the model.
    """

    inputs: dict[str, Any]
    """Arguments of the forward: input_ids, attention_mask, and position_ids when padding is on the left."""
    keep: Tensor
    """True where the token becomes a row (before the filter for outliers): not padding, not an added token."""
    document: Tensor
    """Number of the text, int64; -1 for padding."""
    position: Tensor
    """Place in the text, int32; -1 for padding and added tokens."""
    index: tuple[int, ...]
    """Which contexts these are."""


@dataclass(frozen=True)
class SpecialTokens:
    """What the tokenizer puts around a text."""

    before: tuple[int, ...]
    after: tuple[int, ...]


def special_tokens(tokenizer: Any) -> SpecialTokens:
    """Return the ids that the tokenizer puts before and after a single text, found by asking it."""
    makes_tokens = False
    with quiet_transformers():
        for text in _probe_texts(tokenizer):
            bare = list(tokenizer(text, add_special_tokens=False)["input_ids"])
            full = list(tokenizer(text, add_special_tokens=True)["input_ids"])
            makes_tokens |= bool(bare)
            for start in range(len(full) - len(bare) + 1 if bare else 0):
                if full[start : start + len(bare)] == bare:
                    return SpecialTokens(tuple(full[:start]), tuple(full[start + len(bare) :]))
    if not makes_tokens:  # of any text: whoever needs tokens says so
        return SpecialTokens((), ())
    raise ModelError(
        "it must be clear which tokens the tokenizer adds to a text; none of the texts tried comes back between added "
        f"tokens (`{type(tokenizer).__name__}`). Are the tokenizer files complete?"
    )


def _probe_texts(tokenizer: Any) -> Iterator[str]:
    """Yield short texts; after a few common ones, entries of the vocabulary: not every tokenizer knows ``a``."""
    yield from ("a b", "1 2", ". ,")
    special = set(getattr(tokenizer, "all_special_ids", ()))
    for token in range(min(len(tokenizer) if hasattr(tokenizer, "__len__") else 0, 1000)):
        if token not in special:
            yield tokenizer.decode([token])


def tokenize(
    tokenizer: Any,
    texts: Sequence[str],
    *,
    context: int,
    pack: bool = False,
    first_document: int = 0,
    mask: TokenMask = TokenMask(),
) -> Contexts:
    """Cut texts into contexts.

    A text longer than a context becomes several consecutive ones, each with the added tokens around it. Texts never
    share a context unless `pack`. A `Conversation` is written by the chat template, which adds what it wants; nothing
    is added around its pieces.

    Parameters
    ----------
    tokenizer
        A transformers tokenizer.
    texts
        The texts.
    context
        Maximum number of tokens in a context, added ones included.
    pack
        Fill contexts with text after text instead, the added tokens around each text; tokens then see earlier texts.
    first_document
        Number of the first text.
    mask
        Which tokens become rows. The others stay in their context, with position -1.

    Raises
    ------
    ConfigError
        `context` leaves no room for a token of the text, or the tokenizer does not know a token of the mask.
    ModelError
        A conversation, and no chat template that says where its messages are.
    """
    around = special_tokens(tokenizer)
    room = context - len(around.before) - len(around.after)
    if room < 1:
        raise ConfigError(
            f"`context` must leave room for text beside {context - room} added tokens; got {context}. Give more."
        )
    read = [_read(tokenizer, text, mask) for text in texts] if _are_chats(texts) else None
    with quiet_transformers():
        bare = tokenizer(list(texts), add_special_tokens=False)["input_ids"] if read is None else [r[0] for r in read]
    if read is not None:
        around, room = SpecialTokens((), ()), context
    pieces = list(_pieces(bare, None if pack else room, first_document))
    ids = [np.array([*around.before, *piece, *around.after], np.int32) for _, _, piece in pieces]
    position = [
        np.array([*[-1] * len(around.before), *range(start, start + len(piece)), *[-1] * len(around.after)], np.int32)
        for _, start, piece in pieces
    ]
    for (number, start, piece), inner, places in zip(pieces, ids, position, strict=True):
        if read is not None:
            is_row = read[number - first_document][1][start : start + len(piece)]
            places[~is_row] = -1
        _leave_out(places, inner, mask, tokenizer)
    document = [np.full(len(part), number, np.int64) for (number, _, _), part in zip(pieces, ids)]
    lengths = [len(part) for part in ids]
    if pack:
        total = sum(lengths)
        lengths = [min(context, total - start) for start in range(0, total, context)]
    return Contexts(
        np.concatenate([np.empty(0, np.int32), *ids]),
        np.concatenate([np.empty(0, np.int64), *document]),
        np.concatenate([np.empty(0, np.int32), *position]),
        np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
    )


def _are_chats(texts: Sequence[str]) -> bool:
    """Return whether texts are conversations; raises `ConfigError` for both together."""
    chats = sum(isinstance(text, Conversation) for text in texts)
    if chats and chats < len(texts):
        raise ConfigError(
            f"texts and conversations must not come together; {chats} of {len(texts)} are conversations. Take them "
            "one after the other."
        )
    return bool(chats)


def _read(tokenizer: Any, text: str, mask: TokenMask) -> tuple[list[int], np.ndarray]:
    """Return the tokens of a conversation, and whether each holds content of a message of the wanted roles."""
    assert isinstance(text, Conversation)
    if not getattr(tokenizer, "is_fast", False):
        raise ModelError(
            "the tokenizer must say which characters its tokens are, so that messages can be told apart; "
            f"`{type(tokenizer).__name__}` does not. Use the fast tokenizer of the model."
        )
    rendered = render(tokenizer, text, template_of(mask.chat_template))
    wanted = np.zeros(len(rendered.text), bool)
    for first, last, role in rendered.parts:
        wanted[first:last] = not mask.roles or role in mask.roles
    with quiet_transformers():
        found = tokenizer(rendered.text, add_special_tokens=False, return_offsets_mapping=True)
    return found["input_ids"], np.array([bool(wanted[a:b].any()) for a, b in found["offset_mapping"]], bool)


def _leave_out(position: np.ndarray, ids: np.ndarray, mask: TokenMask, tokenizer: Any) -> None:
    """Set the position of tokens to -1, in place, that become no rows."""
    first, last = mask.range()
    position[(position < first) | (position >= last)] = -1
    if mask.skip_tokens:
        position[np.isin(ids, _ids_of(tokenizer, mask.skip_tokens))] = -1


def _ids_of(tokenizer: Any, tokens: Sequence[str]) -> list[int]:
    """Return the ids of tokens as the tokenizer writes them."""
    known = tokenizer.get_vocab()
    unknown = [token for token in tokens if token not in known]
    if unknown:
        raise ConfigError(
            f"`skip_tokens` must be tokens of the tokenizer, written as in its vocabulary; it has no `{unknown[0]}`. "
            f"{did_you_mean(unknown[0], known)}"
        )
    return [known[token] for token in tokens]


def _pieces(texts: Sequence[list[int]], room: int | None, first_document: int) -> Iterator[tuple[int, int, list[int]]]:
    """Yield number of the text, place of the first token and tokens, at most `room` at once; nothing of empty texts."""
    for number, tokens in enumerate(texts, first_document):
        step = room or max(len(tokens), 1)
        for start in range(0, len(tokens), step):
            yield number, start, tokens[start : start + step]


def token_batches(
    lm: LanguageModel,
    contexts: Contexts,
    *,
    batch_tokens: int | None = None,
    padding: Literal["right", "left"] = "right",
    skip_special: bool = True,
) -> Iterator[TokenBatch]:
    """Yield padded batches of contexts of similar length.

    Contexts are sorted by length, so batches come in another order than contexts; `TokenBatch.index` tells which is
    which.

    Parameters
    ----------
    lm
        The model they are for.
    contexts
        The contexts.
    batch_tokens
        Maximum number of tokens in a batch, padding included; a longer context comes alone. None: `BATCH_TOKENS`.
    padding
        Side of the padding. The values of tokens do not depend on it: a model for which they do, as measured, gets
        batches of equal length.
    skip_special
        Whether added tokens (BOS, CLS, SEP) are left out of `TokenBatch.keep`.

    Raises
    ------
    ModelError
        A token has no row in the embedding of the model.
    """
    _check_vocabulary(lm, contexts)
    batch_tokens = batch_tokens or batch_tokens_on(lm)
    batching = batching_on(lm, padding)
    lengths = contexts.lengths()
    order = np.argsort(-lengths, kind="stable")
    first = 0
    while first < len(order):
        longest = int(lengths[order[first]])
        count = max(1, batch_tokens // longest)
        if batching == "one at a time":
            count = 1
        elif batching == "equal lengths":
            count = min(count, int((lengths == longest).sum()) - int((lengths[order[:first]] == longest).sum()))
        yield _pad(lm, contexts, order[first : first + count], longest, padding, skip_special)
        first += count


def places_of(contexts: Contexts, batch: TokenBatch) -> np.ndarray:
    """Return where the kept tokens of a batch lie among those of all contexts, in the order of ``hidden[keep]``."""
    keep = batch.keep.cpu().numpy()
    mask = batch.inputs["attention_mask"].cpu().numpy().astype(bool)
    first = contexts.offsets[list(batch.index)]
    within = np.cumsum(mask, 1) - 1
    return (first[:, None] + within)[keep]


def batching_on(lm: LanguageModel, padding: Literal["right", "left"]) -> Batching:
    """Return how contexts may share a forward pass of a model; see `saekit.rows.batching`."""

    def make(contexts: Sequence[Sequence[int]]) -> dict[str, Any]:
        lengths = [len(context) for context in contexts]
        ids = np.concatenate([np.asarray(context, np.int32) for context in contexts])
        offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
        plain = Contexts(ids, np.zeros(len(ids), np.int64), np.zeros(len(ids), np.int32), offsets)
        return _pad(lm, plain, np.arange(len(contexts)), max(lengths), padding, False).inputs

    return batching_of(lm.model, padding, make)


def batch_tokens_on(model: PretrainedModel) -> int:
    """Return the usual size of a batch on the device of a model."""
    return BATCH_TOKENS.get(model.device.type, BATCH_TOKENS["cuda"])


def _check_vocabulary(lm: LanguageModel, contexts: Contexts) -> None:
    """Refuse tokens that the model has no embedding of, before one of them ends a forward pass."""
    size, largest = lm.vocabulary, int(contexts.ids.max(initial=0))
    if size is not None and largest >= size:
        token = lm.tokenizer.convert_ids_to_tokens(largest)
        raise ModelError(
            f"every token of the tokenizer must have a row in the embedding of `{lm.name}`, which has {size}; "
            f"`{token}` is token {largest}. Tokens were added to the tokenizer and not to the model "
            "(`resize_token_embeddings`), or it is the tokenizer of another model."
        )


def _padding_id(lm: LanguageModel) -> int:
    """Return what to pad with: a token that has a row in the embedding, be it not the one that the tokenizer names."""
    config = getattr(lm.model, "config", None)
    named = (getattr(lm.tokenizer, "pad_token_id", None), getattr(config, "pad_token_id", None))
    size = lm.vocabulary
    return next((pad for pad in named if isinstance(pad, int) and pad >= 0 and (size is None or pad < size)), 0)


def _pad(
    lm: LanguageModel, contexts: Contexts, index: np.ndarray, longest: int, padding: str, skip_special: bool
) -> TokenBatch:
    shape = (len(index), longest)
    ids = np.full(shape, _padding_id(lm), np.int64)
    mask = np.zeros(shape, np.int64)
    document = np.full(shape, -1, np.int64)
    position = np.full(shape, -1, np.int32)
    for row, i in enumerate(index):
        span = slice(contexts.offsets[i], contexts.offsets[i + 1])
        n = span.stop - span.start
        place = slice(longest - n, longest) if padding == "left" else slice(0, n)
        ids[row, place] = contexts.ids[span]
        mask[row, place] = 1
        document[row, place] = contexts.document[span]
        position[row, place] = contexts.position[span]
    device = lm.device

    def put(array: np.ndarray) -> Tensor:
        return torch.from_numpy(array).to(device)

    inputs: dict[str, Any] = {"input_ids": put(ids), "attention_mask": put(mask)}
    # without padding the model's own numbers are right, whatever they begin with
    if padding == "left" and not mask.all() and _takes_positions(lm):
        inputs["position_ids"] = (inputs["attention_mask"].cumsum(1) - 1).clamp(min=0)
    if accepts(lm.model, "use_cache"):
        inputs["use_cache"] = False
    keep = (position >= 0) if skip_special else mask.astype(bool)
    return TokenBatch(inputs, put(keep), put(document), put(position), tuple(int(i) for i in index))


def _takes_positions(lm: LanguageModel) -> bool:
    """Return whether the model is to be told positions: one of the RoBERTa family skips the padding itself."""
    derives = any(
        hasattr(module, "padding_idx") and hasattr(module, "position_embeddings") for module in lm.model.modules()
    )
    return accepts(lm.model, "position_ids") and not derives
