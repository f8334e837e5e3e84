"""Texts to one row each: the codes of an SAE (or the hidden states) pooled over the tokens of a text.

One pass of the model serves every pooling, every layer and every SAE that is asked for. Codes stay sparse from the
encoder to the result: memory is O(tokens of a batch · active latents) and the pooled rows themselves.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor

from ..errors import InputError, ShapeError, listed
from ..inputs.records import one_column
from ..models.deferred import DeferredModel, defer_model
from ..models.hooks import Hook, activations, find_hook
from ..models.language import LanguageModel
from ..places import warn
from ..ranks import current, dealt
from ..settings import Progress, check_whole, silent
from . import pooling_cache
from .asks import DENSE_POOLS as DENSE_POOLS
from .asks import POOLS as POOLS
from .asks import Ask, warnings_on_pooling
from .asks import check_pool as check_pool
from .document_pools import DocumentPools, Part, Pooled, check_empty
from .document_pools import pool_batches as pool_batches
from .pooling_cache import Computed
from .settings import PoolingSettings
from .tokens import CONTEXT, Contexts, TokenBatch, token_batches, tokenize


def pool_texts(
    lm: LanguageModel | str | os.PathLike[str],
    texts: Sequence[str],
    asks: Sequence[Ask],
    *,
    max_tokens: int | None = None,
    cache: str | os.PathLike[str] | None = None,
    settings: PoolingSettings = PoolingSettings(),
    progress: Progress = silent,
) -> list[Pooled]:
    """Run a language model over texts once and pool its rows for every ask; see `pool_batches` for the poolings.

    A text that is longer than a context (what the model takes, and no more than `saekit.rows.tokens.CONTEXT`, as in
    training) is read in consecutive windows, each with its own BOS, CLS and SEP, and pooled as one; equal texts once.

    The rows of a text do not depend on the order of the texts, bit for bit. On which other texts are there they depend
    through padding only, that is up to rounding: about 1e-6 of a value in float32, and a latent at the very edge of a
    selection may change sides.

    Parameters
    ----------
    lm
        The model: a `LanguageModel`, or what `load_model` takes. By name it is loaded only when a text must be run, and
        stays loaded until another is asked for.
    texts
        The texts.
    asks
        What is wanted; all are served by one pass, which ends after the last hook.
    max_tokens
        Maximum number of tokens of a text, added ones not counted; a warning tells how much was cut. None: all.
    cache
        Folder for pooled rows; see `saekit.rows.pooling_cache`. A text that is there is not run again, and when all are
        there, the model is not loaded. The key holds the digests of the model and of the SAE's encoder, the hook, the
        pooling and the settings.
    settings
        Which tokens become rows, and how they are read. Padding is never a row.
    progress
        Called as ``progress("tokens", done, total)`` after every forward pass.

    Returns
    -------
    list of dict
        For each ask, pooling -> matrix with a row per text; see `pool_batches`. Of several ranks rank 0 gets them.

    Raises
    ------
    DataError
        A text is no string or has no tokens; an activation is NaN or infinite.
    ConfigError, ShapeError
        A setting cannot work, or an SAE is for rows of another width.
    ModelError, OfflineError
        The model or a hook is not available.

    Warns
    -----
    UserWarning
        Texts were cut, or an SAE was trained on another model.
    """
    check_whole("pool_texts", max_tokens=max_tokens)
    texts = check_texts(texts)
    deferred = defer_model(lm)
    warn(warnings_on_pooling(asks, place_of_pooling(deferred, skip_special=bool(settings.skip_special))))
    run = _TextRun(deferred, texts, max_tokens, settings, progress)
    about = {
        **deferred.about, "unit": "text", "context": CONTEXT, "max_tokens": max_tokens,
        "skip_special": bool(settings.skip_special),
    }  # fmt: skip
    digests = [pooling_cache.digest_of(text) for text in texts]
    found, n_rows, n_tokens = pooling_cache.through_cache(digests, asks, about, cache, run)
    if current().rank:
        return found
    check_empty(np.flatnonzero(n_rows == 0), settings.empty, "texts")
    if max_tokens is not None and (n_tokens > max_tokens).any():
        long = n_tokens > max_tokens
        lost = int((n_tokens[long] - max_tokens).sum())
        warnings.warn(
            f"max_tokens={max_tokens} cuts {int(long.sum()):,} of {len(texts):,} texts and loses {lost:,} of "
            f"{int(n_tokens.sum()):,} tokens ({lost / n_tokens.sum():.1%}). Pass max_tokens=None to read them whole.",
            stacklevel=2,
        )
    return found


def check_texts(texts: object) -> list[str]:
    """Return the texts as a list, every one a string.

    Raises
    ------
    DataError
        They are not strings, one string, or none.
    """
    if isinstance(texts, str):
        raise InputError("texts must be a list of strings; got one string. Put it in a list: [text].")
    texts = one_column(texts)
    wrong = [i for i, text in enumerate(texts) if not isinstance(text, str)]
    if wrong:
        first = texts[wrong[0]]
        raise InputError(
            f"texts must be strings; {len(wrong)} of {len(texts)} are not: rows {listed(wrong, 8)} (row {wrong[0]} is "
            f"{first!r}, {type(first).__name__}). Remove or fill them."
        )
    if not texts:
        raise InputError("there must be at least one text; got none.")
    return texts


@dataclass(frozen=True)
class _TextRun:
    """Computes pooled rows of some of the texts; the model is loaded when it is needed."""

    deferred: DeferredModel
    texts: Sequence[str]
    max_tokens: int | None
    settings: PoolingSettings
    progress: Progress

    def __call__(self, chosen: Sequence[int], asks: Sequence[Ask]) -> Computed:
        """Pool the texts at `chosen` for every ask in one pass."""
        model = self.deferred.load()
        hooks = {ask.place: find_hook(model.model, ask.place) for ask in asks}
        _check_widths(asks, hooks, model.d_model)
        contexts = tokenize(model.tokenizer, [self.texts[i] for i in chosen], context=min(CONTEXT, model.context))
        n_tokens = np.bincount(contexts.document[contexts.position >= 0], minlength=len(chosen))
        if self.max_tokens is not None:
            contexts = _cut(contexts, self.max_tokens)
        pools, done = DocumentPools(asks, len(chosen), chosen, "texts"), 0
        batches = token_batches(
            model, contexts, batch_tokens=self.settings.batch_tokens, skip_special=self.settings.skip_special
        )

        def work(batch: TokenBatch) -> tuple[Part | None, int]:
            return pools.part(*self._rows(model, batch, hooks)), int((batch.document >= 0).sum())

        for part, n in dealt(current(), batches, work):
            pools.add(part)
            done += n
            self.progress("tokens", done, len(contexts.ids))
        return *pools.finish(), n_tokens

    def _rows(
        self, lm: LanguageModel, batch: TokenBatch, hooks: Mapping[str, Hook]
    ) -> tuple[dict[str, Tensor], Tensor]:
        """Return the rows of a batch at every hook, and their documents; the model stops after the last hook.

        Batches come sorted by length, longest first; the windows of a text stay in their order, because all but the
        last are full and sorting is stable.
        """
        hidden = activations(lm.model, list(hooks.values()), batch.inputs)
        states = {name: x[batch.keep.to(x.device)] for name, x in zip(hooks, hidden)}
        return states, batch.document[batch.keep]


def _check_widths(asks: Sequence[Ask], hooks: Mapping[str, Hook], d_model: int) -> None:
    """Refuse an SAE that cannot read the residual stream before the model runs."""
    for ask in asks:
        hook = hooks[ask.place]
        if ask.sae is not None and hook.is_residual and ask.sae.d_in != d_model:
            raise ShapeError(
                f"the SAE must read rows of width {d_model} at `{hook.name}`; its d_in is {ask.sae.d_in}. "
                "Was it trained on another model?"
            )


def place_of_pooling(deferred: DeferredModel, *, skip_special: bool = True) -> dict[str, Any]:
    """Return what is known of the rows that `pool_texts` makes of texts, but for the hook, as the `info` of rows."""
    return {
        "model": deferred.name,
        "model_digest": deferred.digest,
        "model_dtype": deferred.about["dtype"],
        "dtype": deferred.about["dtype"],
        "context": CONTEXT,
        "filters": {"special": {"skipped": skip_special}, "outliers": None},
    }


def _cut(contexts: Contexts, max_tokens: int) -> Contexts:
    """Return the first `max_tokens` tokens of every text, with the added tokens of the windows that are left."""
    window = np.repeat(np.arange(len(contexts)), contexts.lengths())
    kept = (contexts.position >= 0) & (contexts.position < max_tokens)
    alive = np.bincount(window[kept], minlength=len(contexts)) > 0
    kept |= (contexts.position < 0) & alive[window]
    lengths = np.bincount(window[kept], minlength=len(contexts))
    return Contexts(
        contexts.ids[kept],
        contexts.document[kept],
        contexts.position[kept],
        np.concatenate([[0], np.cumsum(lengths[lengths > 0])]).astype(np.int64),
    )
