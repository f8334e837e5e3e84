"""How much each latent matters to a language model: its gradient times its activation, in nats of cross-entropy."""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import Tensor

from ..errors import ConfigError, DataError
from ..inputs.texts import Texts, read_texts
from ..measure.accumulators import double
from ..measure.fidelity import CE_TOKENS, characters_for, contexts_for, predicted_positions, predicted_tokens
from ..measure.importance import GATHERED_NUMBERS, Importance
from ..measure.normal_equations import column_factors, row_factors
from ..models.hooks import find_hook
from ..models.intervene import splice
from ..models.language import LanguageModel
from ..models.loading import load_language_model
from ..places import warnings_on
from ..progress import shows_progress
from ..provenance import place_of, target_of
from ..rows.settings import TokenMask
from ..rows.tokens import CONTEXT, TokenBatch, token_batches
from ..sae.codes import Codes
from ..sae.model import SAE
from ..sae.naming import name_of
from ..settings import Progress, check_whole, silent, suggest_keywords
from .settings import AttributionSettings

ATTRIBUTIONS = {
    "attribution": "sum |z dCE/dz| / tokens, in nats: how much the latent moves the cross-entropy, up or down",
    "cross_entropy": "-sum z dCE/dz / tokens, in nats: to first order, what taking the latent away costs",
}
"""Scores by name, with their formula; CE is the summed next-token cross-entropy of the texts, ``z`` a latent's code."""


@suggest_keywords
@shows_progress
def attribution(
    sae: SAE | str | os.PathLike[str],
    model: str | os.PathLike[str] | LanguageModel,
    data: Any,
    *,
    layer: int | None = None,
    hook: str | None = None,
    tokens: int = CE_TOKENS,
    settings: AttributionSettings = AttributionSettings(),
    progress: Progress | None = None,
) -> Importance:
    """Attribute the cross-entropy of a language model to every latent by gradients, in one pass over texts.

    One forward and one backward pass per batch serve all latents: with g the gradient of the cross-entropy by the row
    that the SAE writes, the derivative by code z of latent j is ``g . W_dec[j]`` (in units of the rows).

    Parameters
    ----------
    sae
        An SAE or a transcoder, or its path.
    model, data
        A causal language model and texts, as for `evaluate`.
    layer, hook
        Where in the model the SAE belongs; by default what its provenance says.
    tokens
        Predicted tokens, rounded up to a whole context.
    settings
        Where the gradient is taken, and how texts are read.
    progress
        Called as ``progress("attribution", done, total)`` [shown on stderr; ``False``: none].

    Returns
    -------
    Importance
        With the scores `ATTRIBUTIONS`; its rows are predicted tokens. Use it as
        ``rank(sae.with_scores(**found.scores), by="attribution")``.

    Raises
    ------
    ConfigError
        No hook, the model is not causal, `tokens` below 1.
    ShapeError
        The SAE has another width than the hook.
    DataError
        No token to predict, or a gradient that is not finite.
    """
    sae = sae if isinstance(sae, SAE) else SAE.load(sae)
    check_whole("attribution", tokens=tokens)
    out = target_of(sae, target=settings.target, where="attribution")
    lm = load_language_model(model)
    if not lm.is_causal:
        raise ConfigError(f"attribution: the model must predict next tokens; `{lm.name}` is not a causal one.")
    place = find_hook(lm.model, place_of(sae, layer=layer, hook=hook, where="attribution")).name
    texts = read_texts(
        data, text=settings.text, columns=(), characters=characters_for(tokens, TokenMask.by(sae.provenance))
    )
    return _Attribution(sae, lm, (place, out), settings).over(texts, tokens, progress or silent)


class _Attribution:
    """Sums over texts of every latent's firing and of its part in the cross-entropy."""

    def __init__(
        self, sae: SAE, lm: LanguageModel, hooks: tuple[str, str | None], settings: AttributionSettings
    ) -> None:
        self.sae, self.lm, self.settings = sae, lm, settings
        self.hook, self.target = hooks  # where the SAE reads; where a transcoder writes
        W = sae.W_dec * column_factors(sae)  # decoder rows in the units of the rows
        self.W = W if W.dtype == torch.float64 else W.float()
        self.sums = torch.zeros(3, sae.n_latents, dtype=torch.float64)  # fires, |z dCE/dz|, -z dCE/dz

    def over(self, texts: Texts, tokens: int, progress: Progress) -> Importance:
        """Return the scores over the first `tokens` predicted tokens of the texts."""
        settings, lm = self.settings, self.lm
        context = min(settings.context or CONTEXT, lm.context)
        mask = TokenMask.by(self.sae.provenance)
        contexts = contexts_for(lm, texts, context, tokens, mask)
        total = int(predicted_tokens(contexts).sum())
        if not total:
            raise DataError(
                f"`{texts.info['name']}` must hold texts of at least two tokens for a cross-entropy; "
                f"the tokenizer of `{lm.name}` finds none. Give longer texts."
            )
        done, batch_tokens = 0, max(context, settings.batch_tokens)
        for batch in token_batches(lm, contexts, batch_tokens=batch_tokens, skip_special=settings.special):
            done += self._add(batch)
            progress("attribution", done, total)
        means = self.sums / total
        about = {"model": lm.name, "hook": self.hook, "data": texts.info["name"], "digest": texts.digest}
        scores = {"frequency": means[0], "attribution": means[1], "cross_entropy": means[2]}
        filters = {"special": {"skipped": settings.special}}
        out = {} if self.target is None else {"hook_out": self.target}
        seen = {**lm.info, "hook": self.hook, **out, "context": context, "filters": filters, "mask": mask.facts()}
        warnings = warnings_on([(name_of(self.sae), self.sae)], seen, what="the model given makes")
        return Importance(scores, total, {**about, "at": settings.at}, warnings)

    def _add(self, batch: TokenBatch) -> int:
        """Add a batch; returns the number of tokens predicted."""
        predicted = predicted_positions(batch)
        targets = batch.inputs["input_ids"][:, 1:][predicted]
        seen: list[tuple[Tensor, Codes, Tensor]] = []

        def reconstructed(x: Tensor, y: Tensor | None = None) -> Tensor:
            sae, own = self.sae, x if y is None else y
            with torch.no_grad():
                rows = x.to(sae.device, sae.dtype)
                codes = sae.encode(rows)
                written = sae.decode(codes, rows) if self.settings.at == "reconstruction" else own.to(rows)
                leaf = written if written.dtype == torch.float64 else written.float()
            leaf = leaf.detach().requires_grad_()
            seen.append((rows, codes, leaf))
            return leaf.to(own)

        with torch.enable_grad():
            read = None if self.target is None else self.hook
            with splice(self.lm, self.target or self.hook, reconstructed, mask=batch.keep, source=read):
                logits = self.lm.model(**batch.inputs).logits[:, :-1][predicted]
            logits = logits if logits.dtype == torch.float64 else logits.float()
            loss = torch.nn.functional.cross_entropy(logits, targets, reduction="sum")
            rows, codes, leaf = seen[-1]
            (gradient,) = torch.autograd.grad(loss, leaf)
        if not bool(torch.isfinite(gradient).all()):
            raise DataError(
                f"attribution: gradients of `{self.lm.name}` must be finite; they are not. "
                "Load it in float32 or bfloat16."
            )
        moves = self._moves(rows, codes, gradient)
        latent = codes.indices.cpu()
        for row, values in zip(self.sums, (torch.ones_like(moves), moves.abs(), -moves), strict=True):
            row.index_add_(0, latent, values)
        return len(targets)

    def _moves(self, x: Tensor, codes: Codes, gradient: Tensor) -> Tensor:
        """Return ``z dCE/dz`` of every code, ``float64 [nnz]`` on the CPU."""
        latent, row, W = codes.indices, codes.row_of(), self.W
        along = torch.empty(len(latent), dtype=W.dtype, device=W.device)
        step = max(1, GATHERED_NUMBERS // self.sae.d_out)
        for start in range(0, len(latent), step):
            part = slice(start, start + step)
            along[part] = (W[latent[part]] * gradient[row[part]]).sum(1)
        return (double(codes.values) * double(row_factors(self.sae, x)[row]) * double(along)).cpu()
