"""How much each latent matters to a language model: its gradient times its activation, in nats of cross-entropy."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..errors import ConfigError, DataError, ShapeError
from ..inputs.texts import Texts, read_texts
from ..measure.accumulators import double
from ..measure.fidelity import CE_TOKENS, CHARACTERS_PER_TOKEN, contexts_for, predicted_places, predicted_tokens
from ..measure.importance import GATHERED_NUMBERS, Importance
from ..measure.normal_equations import column_factors, row_factors
from ..models.hooks import find_hook
from ..models.intervene import splice
from ..models.language import LanguageModel
from ..models.loading import load_language_model
from ..provenance import place_of
from ..rows.tokens import CONTEXT, token_batches
from ..sae.codes import Codes
from ..sae.model import SAE
from ..settings import Progress

ATTRIBUTIONS = {
    "attribution": "sum |z dCE/dz| / tokens, in nats: how much the latent moves the cross-entropy, up or down",
    "cross_entropy": "-sum z dCE/dz / tokens, in nats: to first order, what taking the latent away costs",
}
"""Scores by name, with their formula; CE is the summed next-token cross-entropy of the texts, ``z`` a latent's code."""

AT = ("reconstruction", "activation")


def attribution(
    sae: SAE | str | os.PathLike[str],
    model: str | os.PathLike[str] | LanguageModel,
    data: Any,
    *,
    layer: int | None = None,
    hook: str | None = None,
    text: str = "text",
    tokens: int = CE_TOKENS,
    at: str = "reconstruction",
    context: int | None = None,
    special: bool = True,
    batch_tokens: int = 4096,
    progress: Progress | None = None,
) -> Importance:
    """Gradient attribution of every latent to the cross-entropy of a language model, in one pass over texts.

    One forward and one backward pass per batch serve all latents: with g the gradient of the cross-entropy by the row
    that the SAE writes, the derivative by code z of latent j is ``g . W_dec[j]`` (in units of the rows).

    Parameters
    ----------
    sae
        An SAE with ``d_in = d_out``, or its path.
    model, data, text
        A causal language model and texts, as for `evaluate`.
    layer, hook
        Where in the model the SAE belongs; by default what its provenance says.
    tokens
        Predicted tokens, rounded up to a whole context.
    at
        Where the gradient is taken: ``"reconstruction"`` puts the SAE's rows into the model, which is where prefixes of
        the SAE will be used; ``"activation"`` leaves the model's own rows (the SAE's error is added back).
    context
        Tokens that the model reads at once, at most; by default as `capture`.
    special
        Whether tokens that the tokenizer adds (BOS) pass through unchanged, as capture skips them by default.
    batch_tokens
        Tokens of one forward pass; changes no score beyond rounding.
    progress
        Called as ``progress("attribution", done, total)``.

    Returns
    -------
    Importance
        With the scores `ATTRIBUTIONS`; its rows are predicted tokens. Use it as
        ``rank(sae.with_scores(**found.scores), by="attribution")``.

    Raises
    ------
    ConfigError
        No hook, `at` is something else, the model is not causal, `tokens` below 1.
    ShapeError
        The SAE is a transcoder, or has another width than the hook.
    DataError
        No token to predict, or a gradient that is not finite.
    """
    sae = sae if isinstance(sae, SAE) else SAE.load(sae)
    if at not in AT:
        raise ConfigError(f"attribution: `at` must be 'reconstruction' or 'activation'; got {at!r}.")
    if tokens < 1 or batch_tokens < 1:
        raise ConfigError(f"attribution: `tokens` and `batch_tokens` must be at least 1; got {tokens}, {batch_tokens}.")
    if sae.d_in != sae.d_out:
        raise ShapeError(
            f"attribution: the SAE must write rows of the width it reads; it maps {sae.d_in} to {sae.d_out}."
        )
    lm = load_language_model(model)
    if not lm.is_causal:
        raise ConfigError(f"attribution: the model must predict next tokens; `{lm.name}` is not a causal one.")
    target = find_hook(lm.model, place_of(sae, layer=layer, hook=hook, where="attribution"))
    if not isinstance(data, str | os.PathLike | Sequence):
        data = list(data)
    texts = read_texts(data, text=text, columns=(), characters=tokens * CHARACTERS_PER_TOKEN)
    return _attribution(
        sae, lm, target.name, texts, tokens, at, min(context or CONTEXT, lm.context), special, batch_tokens, progress
    )


def _attribution(
    sae: SAE,
    lm: LanguageModel,
    hook: str,
    texts: Texts,
    tokens: int,
    at: str,
    context: int,
    special: bool,
    batch_tokens: int,
    progress: Progress | None,
) -> Importance:
    contexts = contexts_for(lm, texts, context, tokens)
    total = int(predicted_tokens(contexts).sum())
    if not total:
        raise DataError(
            f"`{texts.info['name']}` must hold texts of at least two tokens for a cross-entropy; "
            f"the tokenizer of `{lm.name}` finds none. Give longer texts."
        )
    sums = torch.zeros(3, sae.n_latents, dtype=torch.float64)  # fires, |z dCE/dz|, -z dCE/dz
    W = sae.W_dec * column_factors(sae)  # decoder rows in the units of the rows
    W = W if W.dtype == torch.float64 else W.float()
    done = 0
    for batch in token_batches(lm, contexts, batch_tokens=max(context, batch_tokens), skip_special=special):
        predicted = predicted_places(batch)
        targets = batch.inputs["input_ids"][:, 1:][predicted]
        seen: list[tuple[Tensor, Codes, Tensor]] = []

        def reconstructed(x: Tensor) -> Tensor:
            with torch.no_grad():
                rows = x.to(sae.device, sae.dtype)
                codes = sae.encode(rows)
                written = sae.decode(codes, rows) if at == "reconstruction" else rows
                leaf = written if written.dtype == torch.float64 else written.float()
            leaf = leaf.detach().requires_grad_()
            seen.append((rows, codes, leaf))  # noqa: B023
            return leaf.to(x)

        with torch.enable_grad():
            with splice(lm, hook, reconstructed, mask=batch.keep):
                logits = lm.model(**batch.inputs).logits[:, :-1][predicted]
            logits = logits if logits.dtype == torch.float64 else logits.float()
            loss = torch.nn.functional.cross_entropy(logits, targets, reduction="sum")
            rows, codes, leaf = seen[-1]
            (gradient,) = torch.autograd.grad(loss, leaf)
        if not bool(torch.isfinite(gradient).all()):
            raise DataError(
                f"attribution: gradients of `{lm.name}` must be finite; they are not. Load it in float32 or bfloat16."
            )
        moves = _moves(sae, rows, codes, gradient, W)
        latent = codes.indices.cpu()
        for row, values in zip(sums, (torch.ones_like(moves), moves.abs(), -moves), strict=True):
            row.index_add_(0, latent, values)
        done += len(targets)
        if progress is not None:
            progress("attribution", done, total)
    means = sums / total
    facts = {"model": lm.name, "hook": hook, "data": texts.info["name"], "digest": texts.digest, "at": at}
    return Importance({"frequency": means[0], "attribution": means[1], "cross_entropy": means[2]}, total, facts)


def _moves(sae: SAE, x: Tensor, codes: Codes, gradient: Tensor, W: Tensor) -> Tensor:
    """``z dCE/dz`` of every code, ``float64 [nnz]`` on the CPU."""
    latent, row = codes.indices, codes.row_of()
    along = torch.empty(len(latent), dtype=W.dtype, device=W.device)
    step = max(1, GATHERED_NUMBERS // sae.d_in)
    for start in range(0, len(latent), step):
        part = slice(start, start + step)
        along[part] = (W[latent[part]] * gradient[row[part]]).sum(1)
    return (double(codes.values) * double(row_factors(sae, x)[row]) * double(along)).cpu()
