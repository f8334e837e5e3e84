"""What replacing activations by reconstructions costs a causal language model, in nats per token."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .. import kernels
from ..errors import DataError
from ..inputs.texts import Texts
from ..models.intervene import splice
from ..models.language import LanguageModel
from ..rows.tokens import Contexts, TokenBatch, token_batches, tokenize
from .accumulators import Fidelity
from .bootstrap import N_GROUPS, DocumentBootstrap, Estimate
from .controls import Arm

CHUNK_NUMBERS = 2**24
"""Log-probabilities that are held at once (float32: 64 MiB), whatever the vocabulary."""

BATCH_TOKENS = 4096
"""Tokens of one forward pass, at most, unless a single context has more."""

LOGITS = 2**26
"""Logits of one forward pass, at most, unless a single context has more."""

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
        """The filters that a source of rows records."""
        filters = info.get("filters") or {}
        outliers = filters.get("outliers")
        limit = outliers.get("limit") if isinstance(outliers, dict) else None
        special = filters.get("special")
        skipped = special.get("skipped", True) if isinstance(special, dict) else True
        return cls(bool(skipped), None if limit is None else float(limit))

    def facts(self) -> dict[str, Any]:
        """As plain JSON."""
        return {"padding": True, "added_tokens": self.special, "norm_above": self.norm}


def measure_fidelity(
    lm: LanguageModel,
    hook: str,
    texts: Texts,
    arms: list[Arm],
    *,
    mean: Tensor,
    tokens: int,
    context: int,
    skipped: Skipped,
    draws: int,
    seed: int,
    progress: Callable[[str, int, int | None], None] | None,
) -> tuple[list[dict[str, Estimate]], dict[str, Any]]:
    """Cross-entropies and KL of every arm over the first `tokens` predicted tokens, rounded up to a whole context.

    Parameters
    ----------
    lm, hook
        A causal language model and the short name of the module whose output is replaced.
    texts
        What it reads; texts longer than `context` tokens are cut as `capture` cuts them.
    mean
        ``[d]`` row that mean-ablation puts in place of every row.
    skipped
        Tokens that pass through unchanged, under the ablations too.

    Returns
    -------
    estimates, facts
        Per arm the metrics of `Fidelity`; and what they were measured on.

    Raises
    ------
    DataError
        The texts give no token to predict, or the model's own output is not finite.
    """
    contexts = contexts_for(lm, texts, context, tokens)
    total = int(predicted_tokens(contexts).sum())
    if not total:
        raise DataError(
            f"`{texts.info['name']}` must hold texts of at least two tokens for a cross-entropy; "
            f"the tokenizer of `{lm.name}` finds none. Give longer texts."
        )
    fidelities = [Fidelity() for _ in arms]
    vocabulary = lm.model.get_output_embeddings().weight.shape[0]  # type: ignore[operator]
    batch_tokens = max(context, min(BATCH_TOKENS, LOGITS // vocabulary))
    done = 0
    for batch in token_batches(lm, contexts, batch_tokens=batch_tokens, skip_special=skipped.special):
        predicted = predicted_places(batch)
        targets = batch.inputs["input_ids"][:, 1:][predicted]
        group = batch.document[:, 1:][predicted].remainder(N_GROUPS)

        def logits(function: Callable[[Tensor], Tensor] | None) -> Tensor:
            """``[n, vocabulary]`` at the predicted places, with the kept rows replaced by `function` of them."""
            with torch.no_grad(), kernels.fast_linears():
                if function is None:
                    return lm.model(**batch.inputs).logits[:, :-1][predicted]  # noqa: B023
                with splice(lm, hook, _sparing(function, skipped.norm), mask=batch.keep):  # noqa: B023
                    return lm.model(**batch.inputs).logits[:, :-1][predicted]  # noqa: B023

        clean = logits(None)
        ce_clean, _ = token_costs(clean, targets)
        if not bool(torch.isfinite(ce_clean).all()):
            raise DataError(
                f"the cross-entropy of `{lm.name}` must be finite; it is not on its own activations. "
                "Load the model in float32 or bfloat16."
            )
        ce_zero, _ = token_costs(logits(torch.zeros_like), targets)
        ce_mean, _ = token_costs(logits(lambda x: mean.to(x).expand_as(x)), targets)
        for arm, fidelity in zip(arms, fidelities, strict=True):
            ce, kl = token_costs(logits(lambda x, arm=arm: arm.forward(x)[0]), targets, clean)  # type: ignore[misc]
            fidelity.update(group, clean=ce_clean, sae=ce, zero=ce_zero, mean=ce_mean, kl=kl)
        done += len(targets)
        if progress is not None:
            progress("tokens", done, total)
    bootstrap = DocumentBootstrap.over(fidelities[0].tokens_per_group, draws=draws, seed=seed)
    facts = {
        **lm.info,
        "hook": hook,
        "data": texts.info["name"],
        "data_digest": texts.digest,
        "n_tokens": done,
        "n_documents": len(np.unique(contexts.document)),
        "context": context,
        "passed_through": skipped.facts(),
    }
    return [fidelity.compute(bootstrap) for fidelity in fidelities], facts


def _sparing(function: Callable[[Tensor], Tensor], norm: float | None) -> Callable[[Tensor], Tensor]:
    """`function` in float32, except for rows longer than `norm`, which stay as they are."""

    def replaced(x: Tensor) -> Tensor:
        rows = x.float()
        changed = function(rows)
        if not bool(torch.isfinite(changed).all()):
            raise DataError("a reconstruction must be finite; it holds NaN or infinity. Check the weights of the SAE.")
        if norm is None:
            return changed
        return torch.where(rows.norm(dim=1, keepdim=True) > norm, rows, changed)

    return replaced


def contexts_for(lm: LanguageModel, texts: Texts, context: int, tokens: int) -> Contexts:
    """The first contexts that together predict at least `tokens` tokens."""
    parts: list[Contexts] = []
    predicted = 0
    for first in range(0, len(texts), TEXTS_AT_ONCE):
        chunk = texts[first : first + TEXTS_AT_ONCE]
        part = tokenize(lm.tokenizer, chunk, context=context, first_document=first)
        reached = predicted + np.cumsum(predicted_tokens(part))
        if len(reached) and reached[-1] >= tokens:
            parts.append(part.pick(np.arange(int(np.searchsorted(reached, tokens)) + 1)))
            break
        parts.append(part)
        predicted = int(reached[-1]) if len(reached) else predicted
    return Contexts.cat(parts)


def predicted_places(batch: TokenBatch) -> Tensor:
    """Which tokens but the first are predicted, ``bool [contexts, tokens - 1]``: those of the text that follow another.

    With padding on the left the first token of a text follows none.
    """
    return (batch.position[:, 1:] >= 0) & batch.inputs["attention_mask"][:, :-1].bool()


def predicted_tokens(contexts: Contexts) -> np.ndarray:
    """Tokens of the text in each context that have a token before them, ``int64 [contexts]``."""
    real = np.concatenate([[0], np.cumsum(contexts.position >= 0)])
    first_is_real = contexts.position[contexts.offsets[:-1]] >= 0
    return real[contexts.offsets[1:]] - real[contexts.offsets[:-1]] - first_is_real
