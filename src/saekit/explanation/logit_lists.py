"""Tokens that latents write: their direct effect on the logits through the model's own last norm and head.

The effect of latent j is the derivative of the logits along ``z_j W_dec[j]`` at the last residual stream of tokens
where it fires, less its mean over the vocabulary. The model's own tail is differentiated, so that norms, biases, tied
weights and softcaps are what they are. It leaves out what later blocks do with the latent; so the lists are compared
with measured ablation, and are not shown where they do not agree.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..measure.results import Measured
from ..models.hooks import Hook, blocks
from ..models.intervene import splice
from ..models.language import LanguageModel
from ..randomness import random_order
from ..rows.tokens import Contexts, TokenBatch, places_of, token_batches
from ..sae.model import SAE
from .directions import written_rows
from .explanation_result import LogitLists
from .firings import Firings, drawn
from .settings import ExplainSettings

LEAST_AGREEMENT = 0.3
"""Lists that agree less with ablation are not shown."""

LISTED = 10
"""Tokens of either end on a card."""

TESTED = 24
"""Latents whose lists are compared with ablation."""

TESTED_CONTEXTS = 2
"""Contexts in which each of these is ablated."""

LOGITS = 2**26
"""Numbers in logits that are made at once."""


def why_no_lists(lm: LanguageModel, hook: Hook | None) -> str | None:
    """Return why what latents write into this hook has no direct effect on logits; None where it has one.

    `hook` is None for a transcoder that does not say where it writes.
    """
    if not lm.is_causal:
        return "the model has no vocabulary output"
    if hook is None:
        return "the transcoder does not say which module's output it predicts"
    if hook.is_input or hook.layer is None:
        return f"`{hook.name}` is not a place of the residual stream"
    is_part = hook.name in (f"layers.{hook.layer}.mlp", f"layers.{hook.layer}.attn")
    return None if hook.is_residual or is_part else f"what leaves `{hook.name}` is not what the residual stream gets"


class _Stub(nn.Module):
    """Stands for all blocks: gives the residual stream that it was made for, in the form that a block gives it."""

    def __init__(self, block: nn.Module, residual: Tensor, is_tuple: bool) -> None:
        super().__init__()
        self.__dict__["_block"], self.__dict__["_residual"] = block, residual
        self.__dict__["_is_tuple"] = is_tuple

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["_block"], name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Return the residual stream, whatever comes in."""
        residual = self.__dict__["_residual"]
        return (residual,) if self.__dict__["_is_tuple"] else residual


class Tail:
    """The model behind its last block, as a function of the residual stream ``[n, d]``: logits ``[n, vocabulary]``."""

    def __init__(self, lm: LanguageModel) -> None:
        self.model: Any = lm.model
        path, found = blocks(lm.model)
        self.owner = lm.model.get_submodule(path.rpartition(".")[0])
        self.name = path.rpartition(".")[2]
        self.blocks, self.device = found, lm.device
        self.is_tuple = self._gives_tuple()

    def _gives_tuple(self) -> bool:
        seen: list[bool] = []
        handle = self.blocks[-1].register_forward_hook(
            lambda module, args, output: seen.append(isinstance(output, tuple))
        )
        try:
            with torch.no_grad():
                self.model(input_ids=torch.ones(1, 1, dtype=torch.int64, device=self.device), use_cache=False)
        finally:
            handle.remove()
        return seen[-1]

    def __call__(self, residual: Tensor) -> Tensor:
        """Return the logits of rows of the last residual stream."""
        ids = torch.ones(len(residual), 1, dtype=torch.int64, device=self.device)
        with self._stubbed(residual[:, None]):
            return self.model(input_ids=ids, use_cache=False).logits[:, 0]

    @contextmanager
    def _stubbed(self, residual: Tensor) -> Iterator[None]:
        """Put one stub in the place of every block: only the first gives what the last would."""
        stubs = nn.ModuleList([_Stub(block, residual, self.is_tuple) for block in self.blocks])
        setattr(self.owner, self.name, stubs)
        try:
            yield
        finally:
            setattr(self.owner, self.name, self.blocks)

    def derivative(self, residual: Tensor, along: Tensor) -> Tensor:
        """Return the derivative of the logits along a direction of each row."""
        with torch.enable_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # of torch about itself, when it first differentiates
            return torch.func.jvp(self, (residual,), (along,))[1].detach()


def direct_effects(tail: Tail, rows: Tensor, codes: Tensor, written: Tensor, there: Tensor) -> Tensor:
    """Return the effect of latents on the logits, mean over tokens where they fire, ``[n, vocabulary]``.

    Parameters
    ----------
    tail
        The model behind its last block.
    rows, codes, there
        ``[n, tokens, d]`` last residual stream where each latent fires, its code, and which of the entries exist.
    written
        ``[n, d]`` what one unit of each writes.
    """
    along = codes[..., None] * written[:, None, :] * there[..., None]
    effect = tail.derivative(rows.flatten(0, 1), along.flatten(0, 1)).float()
    mean = effect.unflatten(0, rows.shape[:2]).sum(1) / there.sum(1).clamp_min(1)[:, None]
    return mean - mean.mean(1, keepdim=True)


@dataclass(frozen=True, eq=False)
class FinalRows:
    """Last residual stream of some tokens."""

    rows: Tensor
    """``[n, d]``."""
    place: np.ndarray
    """int64 ``[tokens]``: row of each token, -1 where it is not kept."""


@dataclass(frozen=True, eq=False)
class Placed:
    """An SAE in a model that reads texts."""

    sae: SAE
    lm: LanguageModel
    hook: str
    """Where the latents write: of a transcoder not where it reads."""
    contexts: Contexts
    factor: np.ndarray | None
    """float32 ``[tokens]``: by what the scaling multiplies what is written at each token; None: by one number."""

    def amounts(self, token: np.ndarray, codes: np.ndarray) -> np.ndarray:
        """Return codes at some tokens in units of what one unit of a latent writes: see `written_rows`."""
        return codes if self.factor is None else codes * self.factor[token]


@dataclass(frozen=True, eq=False)
class _Effects:
    """Effects of latents on the logits."""

    tail: Tail
    at: Placed
    firings: Firings
    final: FinalRows
    n_tokens: int

    def of(self, latents: Sequence[int], seed: int) -> Tensor:
        """Return the mean effect of each latent, ``[n, vocabulary]``; zeros where no firing of it is kept."""
        d = self.final.rows.shape[1]
        rows, codes = torch.zeros(len(latents), self.n_tokens, d), torch.zeros(len(latents), self.n_tokens)
        there = torch.zeros(codes.shape, dtype=torch.bool)
        for i, latent in enumerate(latents):
            token, value = self.firings.of(latent)
            kept = np.flatnonzero(self.final.place[token] >= 0)
            kept = kept[drawn(token[kept], latent, self.n_tokens, seed)]
            n = len(kept)
            rows[i, :n] = self.final.rows[torch.from_numpy(self.final.place[token[kept]])]
            codes[i, :n], there[i, :n] = torch.from_numpy(self.at.amounts(token[kept], value[kept])), True
            rows[i, n:] = self.final.rows[0]  # a norm has no derivative at 0
        device = self.tail.device
        written = written_rows(self.at.sae, latents).float().to(device)
        return direct_effects(self.tail, rows.to(device), codes.to(device), written, there.to(device)).cpu()


def logit_lists(
    at: Placed, firings: Firings, final: FinalRows, latents: np.ndarray, settings: ExplainSettings
) -> tuple[LogitLists, dict[int, tuple[list[int], list[float]]]]:
    """Return whether lists agree with ablation, and tokens and values of each latent, from most raised to most lowered.

    Tokens are ordered by how unusual their change is among latents: the same rare tokens would top every list.
    """
    effects = _Effects(Tail(at.lm), at, firings, final, settings.logit_tokens)
    fired = latents[(firings.count[latents] > 0)]
    order = fired[random_order(len(fired), "lists", settings.seed)]
    sample = effects.of(order[: 4 * TESTED].tolist(), settings.seed)
    agreement = _agreement(at, firings, order[:TESTED].tolist(), sample[:TESTED])
    is_shown = agreement.is_defined and agreement.value >= LEAST_AGREEMENT
    reason = None if is_shown else "the lists do not agree with what ablating the latents does"
    if not agreement.is_defined:
        reason = "no latent fires, or ablating them changes nothing"
    told = LogitLists(agreement, is_shown, min(TESTED, len(order)), reason)
    return told, dict(_ends(effects, fired, sample, len(at.lm.tokenizer), settings.seed)) if is_shown else {}


def _ends(
    effects: _Effects, latents: np.ndarray, sample: Tensor, n_tokens: int, seed: int
) -> Iterator[tuple[int, tuple[list[int], list[float]]]]:
    """Yield latents with the tokens at both ends of their lists, those that the tokenizer does not have left out."""
    vocabulary = min(n_tokens, sample.shape[1])
    n = min(LISTED, vocabulary // 2)
    usual, spread = sample.mean(0), sample.std(0, correction=0)
    spread = spread.clamp_min(1e-3 * float(spread.max()) + 1e-12)
    at_once = max(1, LOGITS // (sample.shape[1] * effects.n_tokens))
    for start in range(0, len(latents), at_once):
        some = latents[start : start + at_once].tolist()
        effect = effects.of(some, seed)
        unusual = (effect - usual) / spread if len(sample) >= TESTED else effect
        for latent, value, rank in zip(some, effect, unusual[:, :vocabulary], strict=True):
            if bool(value.any()):
                ends = torch.cat([rank.topk(n).indices, rank.topk(n, largest=False).indices.flip(0)])
                yield latent, (ends.tolist(), value[ends].tolist())


def _agreement(at: Placed, firings: Firings, latents: list[int], effect: Tensor) -> Measured:
    """Return the median over latents of the rank correlation of their lists with what ablation does."""
    moved = _ablated(at, firings, latents, effect.shape[1])
    each = [spearman(a, b) for a, b in zip(effect, moved, strict=True)]
    known = np.sort([value for value in each if np.isfinite(value)])
    if not len(known):
        return Measured(float("nan"), unit="rank correlation", reason="undefined: ablation changes nothing")
    half = 0.98 * np.sqrt(len(known))  # of a binomial distribution: an interval of the median
    low, high = (int(np.clip(np.round(len(known) / 2 + s * half), 0, len(known) - 1)) for s in (-1, 1))
    return Measured(float(np.median(known)), float(known[low]), float(known[high]), "rank correlation", "over latents")


def _ablated(at: Placed, firings: Firings, latents: list[int], vocabulary: int) -> Tensor:
    """Return by how much ablating each latent lowers the logits where it fires, less the mean, ``[n, vocabulary]``."""
    moved = torch.zeros(len(latents), vocabulary)
    picked = [firings.of(latent)[0] for latent in latents]
    picked = [token[drawn(token, latent, TESTED_CONTEXTS, 1)] for token, latent in zip(picked, latents, strict=True)]
    owner = np.repeat(np.arange(len(latents)), [len(token) for token in picked])
    if not len(owner):
        return moved
    offsets = at.contexts.offsets
    spans = [
        np.arange(offsets[np.searchsorted(offsets, end, side="right") - 1], end + 1) for end in np.concatenate(picked)
    ]
    part = _parts(at.contexts, spans)
    codes = np.concatenate(
        [at.amounts(span, firings.codes_at(latents[n], span)) for n, span in zip(owner, spans, strict=True)]
    )
    row = torch.from_numpy(np.repeat(owner, [len(span) for span in spans]))
    written = written_rows(at.sae, latents).float()
    for batch in token_batches(at.lm, part):
        place = places_of(part, batch)
        delta = torch.from_numpy(codes[place])[:, None].to(written) * written[row[place].to(written.device)]
        change = _last_logits(at, batch, None) - _last_logits(at, batch, delta)
        for context, value in zip(batch.index, change.cpu(), strict=True):
            moved[owner[context]] += value - value.mean()
    return moved


def _parts(contexts: Contexts, spans: list[np.ndarray]) -> Contexts:
    """Return spans of tokens as contexts."""
    where = np.concatenate(spans)
    offsets = np.concatenate([[0], np.cumsum([len(span) for span in spans])]).astype(np.int64)
    return Contexts(contexts.ids[where], contexts.document[where], contexts.position[where], offsets)


def _last_logits(at: Placed, batch: TokenBatch, less: Tensor | None) -> Tensor:
    """Return the logits at the last token of every context, with something taken away from the rows at the hook."""
    last = batch.inputs["attention_mask"].sum(1) - 1
    taken = 0.0 if less is None else less
    with torch.no_grad(), splice(at.lm, at.hook, lambda x: x - taken, mask=batch.keep):
        return at.lm.model(**batch.inputs).logits[torch.arange(len(last), device=last.device), last].float()


def spearman(a: Tensor, b: Tensor) -> float:
    """Return the rank correlation of two lists; NaN where one of them is constant."""
    ranks = [each.argsort().argsort().double() for each in (a, b)]
    if not bool(a.any()) or not bool(b.any()):
        return float("nan")
    return float(torch.corrcoef(torch.stack(ranks))[0, 1])
