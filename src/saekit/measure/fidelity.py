"""What replacing activations by reconstructions costs a causal language model, in nats per token."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .. import kernels
from ..errors import ConfigError, DataError, ShapeError
from ..inputs.chat import clipped
from ..inputs.records import repeatable
from ..inputs.texts import Texts, read_texts
from ..models.hooks import find_hook
from ..models.intervene import splice
from ..models.language import LanguageModel
from ..models.loading import load_language_model
from ..models.prefix import Prefix
from ..places import Warned, warnings_on
from ..provenance import known_place, place_of, target_of
from ..ranks import ALONE, Ranks, agreed, in_order
from ..rows.opening import warnings_on_rows
from ..rows.settings import TokenMask
from ..rows.source import Source
from ..rows.tokens import CONTEXT, Contexts, TokenBatch, token_batches, tokenize
from ..sae.model import SAE
from ..settings import Progress
from .accumulators import Fidelity
from .controls import Reconstructor
from .intervals import N_GROUPS, Estimate, document_sample
from .metrics import leading_ablation
from .settings import CE_TOKENS as CE_TOKENS
from .settings import TextSettings

CHUNK_NUMBERS = 2**24
"""Log-probabilities that are held at once (float32: 64 MiB), whatever the vocabulary."""

BATCH_TOKENS = 4096
"""Tokens of one forward pass, at most, unless a single context has more."""

LOGITS = 2**26
"""Logits of one forward pass, at most, unless a single context has more."""

CHARACTERS_PER_TOKEN, MASKED = 12, 10
"""How much text is read for a number of tokens, and how many times as much where a mask leaves some of them."""

TEXTS_AT_ONCE = 512
"""Texts that are tokenized together."""


def token_costs(logits: Tensor, targets: Tensor, clean: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Cross-entropy per token, and KL divergence from the clean model.

    Parameters
    ----------
    logits
        ``[n, vocabulary]``, any float type; log-softmax is taken in float32, a few rows at a time.
    targets
        ``int64 [n]`` the tokens that came.
    clean
        Logits of the untouched model; None for a divergence of 0.

    Returns
    -------
    ce, kl
        ``float32 [n]`` each, in nats: ``-log p(target)`` and ``sum_v p_clean (log p_clean - log p)``, never negative.
    """
    ce, kl = torch.empty(len(logits), device=logits.device), torch.zeros(len(logits), device=logits.device)
    step = max(1, CHUNK_NUMBERS // logits.shape[1])
    for start in range(0, len(logits), step):
        part = slice(start, start + step)
        log_p = logits[part].float().log_softmax(1)
        ce[part] = -log_p.gather(1, targets[part, None])[:, 0]
        if clean is not None:
            log_clean = clean[part].float().log_softmax(1)
            # 0 * -inf is 0 here: a token that cannot come adds nothing. Rounding alone could go below zero.
            terms = log_clean.exp() * (log_clean - log_p)
            kl[part] = torch.where(log_clean == -torch.inf, 0.0, terms).sum(1).clamp_min(0)
    return ce, kl


@dataclass(frozen=True)
class Skipped:
    """Which tokens pass through unchanged, as they were skipped when the rows were captured."""

    special: bool = True
    """Tokens that the tokenizer adds: BOS, CLS, SEP."""
    norm: float | None = None
    """Tokens whose activation is longer than this; None for no limit."""

    @classmethod
    def by(cls, info: dict[str, Any]) -> Skipped:
        """Return the filters that a source of rows records."""
        filters = info.get("filters") or {}
        outliers = filters.get("outliers")
        limit = outliers.get("limit") if isinstance(outliers, dict) else None
        special = filters.get("special")
        skipped = special.get("skipped", True) if isinstance(special, dict) else True
        return cls(bool(skipped), None if limit is None else float(limit))

    def facts(self) -> dict[str, Any]:
        """As plain JSON."""
        return {"padding": True, "added_tokens": self.special, "norm_above": self.norm}


@dataclass(frozen=True)
class SplicedModel:
    """A causal language model, the hook whose output reconstructions replace, and the texts it reads."""

    lm: LanguageModel
    """The model."""
    hook: str
    """Short name of the module whose output the SAEs read, and replace."""
    texts: Texts | None
    """Texts, cut into contexts as `capture` cuts them; None where no cross-entropy is measured."""
    tokens: int
    """Predicted tokens, rounded up to a whole context."""
    rows: dict[str, Any]
    """``info`` of the other rows measured: context and filters are taken over from it."""
    target: str | None = None
    """Short name of the module whose output transcoders predict, and replace; None for SAEs."""

    @classmethod
    def of(
        cls,
        model: str | os.PathLike[str] | LanguageModel,
        data: object,
        saes: Sequence[SAE],
        rows: Source | None,
        settings: TextSettings,
        where: str,
    ) -> SplicedModel:
        """Load a model and texts, and find where in the model the SAEs belong.

        Parameters
        ----------
        model, data
            What `load_model` and `read_texts` take.
        saes
            SAEs of one width.
        rows
            The other rows that are measured; they must come from this model, where that is known.
        settings
            Layer or hook, text column, tokens.
        where
            Function that messages name.

        Raises
        ------
        ConfigError
            No hook, SAEs of different hooks, or rows of another model.
        ShapeError
            The model has another width than the SAEs.
        """
        if data is None:
            raise ConfigError(
                f"{where}: `model` must come with `data`, the texts it reads; got none. Pass data='builtin'."
            )
        lm = load_language_model(model)
        info = {} if rows is None else dict(rows.info)
        hook = _hook_of_all(lm, saes, info, settings, where)
        target = target_of(saes[0], info, target=settings.target, where=where)
        if target is not None:
            target = find_hook(lm.model, target).name
        texts = None
        if lm.is_causal and settings.tokens:
            mask = TokenMask.by(saes[0].provenance if rows is None else info)
            characters = characters_for(settings.tokens, mask)
            texts = read_texts(repeatable(data), text=settings.text, columns=(), characters=characters)
        return cls(lm, hook, texts, settings.tokens, info, target)

    @property
    def place(self) -> dict[str, Any]:
        """Model and hook, as the `info` of the rows that they would make."""
        out = {} if self.target is None else {"hook_out": self.target}
        return {**self.lm.info, "hook": self.hook, **out}

    @property
    def status(self) -> str:
        """Whether the cross-entropy is measured, or why not."""
        if not self.lm.is_causal:
            return f"not measured: {self.lm.name} is not a causal language model"
        return "measured" if self.texts is not None else "not measured: tokens = 0"


def place_warnings(named: Sequence[tuple[str, SAE]], rows: Source, spliced: SplicedModel | None) -> list[Warned]:
    """Return what is not as in the training of SAEs that are measured on rows and in a language model."""
    found = warnings_on_rows(named, rows)
    if spliced is not None and rows.info.get("model_digest") is None:
        found += warnings_on(named, spliced.place, what="the model given makes")
    return found


def _hook_of_all(
    lm: LanguageModel, saes: Sequence[SAE], info: dict[str, Any], settings: TextSettings, where: str
) -> str:
    """Return the name of the hook of all SAEs, checked against the model."""
    if settings.layer is not None or settings.hook is not None:
        place = place_of(layer=settings.layer, hook=settings.hook, where=where)
    else:
        found = {known for sae in saes if (known := known_place(sae)) is not None}
        if len(found) > 1:
            raise ConfigError(
                f"{where}: all SAEs must belong to one hook; these belong to {sorted(found)}. Take them one at a time."
            )
        place = found.pop() if found else place_of(saes[0], info, where=where)
    if info.get("model_digest") not in (None, lm.digest):
        raise ConfigError(
            f"{where}: the rows must come from the model given, `{lm.name}`; they were captured from "
            f"`{info.get('model')}` with other weights. Give that model."
        )
    target = find_hook(lm.model, place)
    width = saes[0].d_in
    if re.fullmatch(r"layers\.\d+", target.name) and lm.d_model != width:
        raise ShapeError(
            f"{where}: `{lm.name}` must have the width of the SAEs, {width}; its residual stream has {lm.d_model}. "
            "Were the SAEs trained on another model?"
        )
    return target.name


def measure_fidelity(
    spliced: SplicedModel,
    reconstructors: Sequence[Reconstructor],
    mean: Tensor,
    *,
    intervals: bool,
    progress: Progress | None = None,
    ranks: Ranks = ALONE,
) -> tuple[list[dict[str, Estimate]], dict[str, Any]]:
    """Measure cross-entropies and KL of every reconstructor over the first predicted tokens.

    Parameters
    ----------
    spliced
        Model, hook and texts.
    reconstructors
        What replaces the output of the hook (of the target, for transcoders).
    mean
        ``[d_out]`` row that mean-ablation puts in place of every row.
    intervals
        Whether intervals are asked for.
    progress
        Called as ``progress("tokens", done, total)``.
    ranks
        The ranks that share the forward passes; all get the result, the same for any number of them.

    Returns
    -------
    estimates, facts
        Per reconstructor the metrics of `Fidelity`; and what they were measured on.

    Raises
    ------
    DataError
        The texts give no token to predict, or the model's own output is not finite.
    """
    lm, texts, skipped = spliced.lm, spliced.texts, Skipped.by(spliced.rows)
    replaced, source = (spliced.hook, None) if spliced.target is None else (spliced.target, spliced.hook)
    assert texts is not None
    context = min(spliced.rows.get("context") or CONTEXT, lm.context)
    mask = TokenMask.by(spliced.rows)
    contexts = contexts_for(lm, texts, context, spliced.tokens, mask)
    total = int(predicted_tokens(contexts).sum())
    if not total:
        raise DataError(
            f"`{texts.info['name']}` must hold texts of at least two tokens for a cross-entropy; "
            f"the tokenizer of `{lm.name}` finds none. Give longer texts."
        )
    fidelities = [Fidelity() for _ in reconstructors]
    vocabulary = lm.model.get_output_embeddings().weight.shape[0]  # type: ignore[operator]
    batch_tokens = max(context, min(BATCH_TOKENS, LOGITS // vocabulary))
    prefix = Prefix.before(lm.model, [find_hook(lm.model, each) for each in {spliced.hook, replaced}])
    is_reused: bool | None = None  # measured on the first batch

    def measured(batch: TokenBatch) -> _Costs:
        """Return the costs of the tokens of one forward pass."""
        nonlocal is_reused
        predicted = predicted_positions(batch)
        targets = batch.inputs["input_ids"][:, 1:][predicted]
        groups, group = torch.unique(batch.document[:, 1:][predicted].remainder(N_GROUPS), return_inverse=True)

        def logits(function: Replacement) -> Tensor:
            """``[n, vocabulary]`` at the predicted positions, with the kept rows replaced by `function` of them."""
            sparing = _sparing(function, skipped.norm)
            with torch.no_grad(), kernels.fast_linears(), splice(lm, replaced, sparing, mask=batch.keep, source=source):
                return lm.model(**batch.inputs).logits[:, :-1][predicted]

        with torch.no_grad(), kernels.fast_linears(), prefix.recorded():
            clean = lm.model(**batch.inputs).logits[:, :-1][predicted]
        ce_clean, _ = token_costs(clean, targets)
        if not bool(torch.isfinite(ce_clean).all()):
            raise DataError(
                f"the cross-entropy of `{lm.name}` must be finite; it is not on its own activations. "
                "Load the model in float32 or bfloat16."
            )
        if is_reused is None:
            is_reused = agreed(ranks, lambda: prefix.agrees(lambda: logits(_zero)))
        costs = _Costs(groups.cpu(), [Fidelity(len(groups)) for _ in reconstructors])
        with prefix.replayed() if is_reused else nullcontext():  # else every pass runs the whole model
            ce_zero, _ = token_costs(logits(_zero), targets)
            ce_mean, _ = token_costs(logits(lambda x, y: mean.to(y).expand_as(y)), targets)
            for each, fidelity in zip(reconstructors, costs.fidelities, strict=True):
                ce, kl = token_costs(logits(lambda x, y, each=each: each.forward(x)[0]), targets, clean)  # type: ignore[misc]
                fidelity.update(group, clean=ce_clean, sae=ce, zero=ce_zero, mean=ce_mean, kl=kl)
        return costs

    def parts() -> Iterator[tuple[int, _Costs]]:
        done = 0
        batches = token_batches(lm, contexts, batch_tokens=batch_tokens, skip_special=skipped.special)
        for number, batch in enumerate(batches):
            if ranks.has(number):
                yield number, measured(batch)
            done += int(predicted_positions(batch).sum())
            if progress is not None:
                progress("tokens", done, total)
        if is_reused is None:  # a rank without a batch hears of it too
            agreed(ranks, lambda: False)

    for costs in in_order(ranks, parts()):
        for fidelity, part in zip(fidelities, costs.fidelities, strict=True):
            fidelity.merge(part, costs.groups)
    facts = {
        **lm.info,
        "hook": spliced.hook,
        **({} if spliced.target is None else {"hook_out": spliced.target}),
        "data": texts.info["name"],
        "data_digest": texts.digest,
        "n_tokens": total,
        "n_documents": len(np.unique(contexts.document)),
        "context": context,
        "passed_through": skipped.facts() | ({"mask": mask.facts()} if mask != TokenMask() else {}),
        "blocks_reused": len(prefix.skipped) if is_reused else 0,
    }

    def computed() -> tuple[list[dict[str, Estimate]], dict[str, Any]]:
        sample = document_sample(fidelities[0].tokens_per_group, intervals=intervals)
        estimates = [fidelity.compute(sample) for fidelity in fidelities]
        leading = leading_ablation(*(estimates[0][name].value for name in ("ce_zero", "ce_mean")))
        return estimates, {**facts, "leading_ablation": leading}

    return agreed(ranks, computed)


@dataclass(frozen=True)
class _Costs:
    """What the tokens of one forward pass cost, by the groups of their documents."""

    groups: Tensor
    fidelities: list[Fidelity]
    """Of each reconstructor."""


Replacement = Callable[[Tensor, Tensor], Tensor]
"""From the rows that are read and those that are replaced (the same, but for transcoders) to what replaces these."""


def _zero(x: Tensor, y: Tensor) -> Tensor:
    """Return zeros in place of the rows `y`: zero-ablation."""
    return torch.zeros_like(y)


def _sparing(function: Replacement, norm: float | None) -> Callable[..., Tensor]:
    """Return `function` in float32, except where the row that is read is longer than `norm`: that one stays."""

    def replaced(x: Tensor, y: Tensor | None = None) -> Tensor:
        rows = x.float()
        own = rows if y is None else y.float()
        changed = function(rows, own)
        if not bool(torch.isfinite(changed).all()):
            raise DataError("a reconstruction must be finite; it holds NaN or infinity. Check the weights of the SAE.")
        if norm is None:
            return changed
        return torch.where(rows.norm(dim=1, keepdim=True) > norm, own, changed)

    return replaced


def _tokenized(
    lm: LanguageModel, chunk: Sequence[str], context: int, first: int, tokens: int, mask: TokenMask
) -> Contexts:
    """Return the contexts of texts; of the first long one and what follows it no more than `tokens` tokens need."""
    characters = max(tokens * CHARACTERS_PER_TOKEN, 10_000)
    long = next((i for i, text in enumerate(chunk) if len(clipped(text, characters)) < len(text)), len(chunk))
    shown = [*chunk[:long], *(clipped(text, characters) for text in chunk[long : long + 1])]
    part = tokenize(lm.tokenizer, shown, context=context, first_document=first, mask=mask)
    # the last token of a text that was cut may be another, so it must not be needed
    if long == len(chunk) or predicted_tokens(part).sum() >= tokens + context:
        return part
    return tokenize(lm.tokenizer, chunk, context=context, first_document=first, mask=mask)


def characters_for(tokens: int, mask: TokenMask) -> int:
    """Return how many characters are read for a number of tokens that a mask leaves."""
    return tokens * CHARACTERS_PER_TOKEN * (1 if mask == TokenMask() else MASKED)


def contexts_for(lm: LanguageModel, texts: Texts, context: int, tokens: int, mask: TokenMask = TokenMask()) -> Contexts:
    """Return the first contexts that together predict at least `tokens` tokens; `mask` says which of them count."""
    parts: list[Contexts] = []
    predicted = 0
    for first in range(0, len(texts), TEXTS_AT_ONCE):
        chunk = texts[first : first + TEXTS_AT_ONCE]
        part = _tokenized(lm, chunk, context, first, tokens - predicted, mask)
        reached = predicted + np.cumsum(predicted_tokens(part))
        if len(reached) and reached[-1] >= tokens:
            parts.append(part.pick(np.arange(int(np.searchsorted(reached, tokens)) + 1)))
            break
        parts.append(part)
        predicted = int(reached[-1]) if len(reached) else predicted
    return Contexts.cat(parts)


def predicted_positions(batch: TokenBatch) -> Tensor:
    """Which tokens but the first are predicted, ``bool [contexts, tokens - 1]``: those of the text that follow another.

    With padding on the left the first token of a text follows none.
    """
    return (batch.position[:, 1:] >= 0) & batch.inputs["attention_mask"][:, :-1].bool()


def predicted_tokens(contexts: Contexts) -> np.ndarray:
    """Tokens of the text in each context that have a token before them, ``int64 [contexts]``."""
    real = np.concatenate([[0], np.cumsum(contexts.position >= 0)])
    first_is_real = contexts.position[contexts.offsets[:-1]] >= 0
    return real[contexts.offsets[1:]] - real[contexts.offsets[:-1]] - first_is_real
