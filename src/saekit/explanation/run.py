"""Explain latents: where they fire, tokens as labels, and how well these hold in documents they were not made of."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import ConfigError, DataError
from ..inputs.records import repeatable
from ..inputs.texts import read_texts
from ..measure.chance import against_chance
from ..measure.fidelity import CHARACTERS_PER_TOKEN, contexts_for
from ..measure.results import Measured
from ..measure.token_statistics import TokenScores, labels_of, shifted, token_detection
from ..models.hooks import activations, find_hook
from ..models.language import LanguageModel
from ..models.loading import load_language_model
from ..places import warnings_on
from ..progress import shows_progress
from ..provenance import facts_of_sae, library_versions, place_of, release
from ..rows.tokens import Contexts, places_of, token_batches
from ..sae.codes import Codes
from ..sae.model import SAE
from ..sae.naming import Given, as_sae, name_of
from ..settings import Progress, silent, suggest_keywords
from .examples import Examples, bin_edges
from .explanation_result import Card, Example, Explanation
from .halves import context_of, is_labelling
from .settings import ExplainSettings

HELD_CODES = 2**25
"""Nonzero codes that are kept from the first pass, 12 bytes each; with more the model runs again for the windows."""

MATCHED = 50
"""Shuffled latents of the nearest density that a detection is compared with."""


@suggest_keywords
@shows_progress
def explain(
    sae: Given,
    model: str | os.PathLike[str] | LanguageModel,
    data: Any,
    *,
    layer: int | None = None,
    hook: str | None = None,
    settings: ExplainSettings = ExplainSettings(),
    progress: Progress | None = None,
) -> Explanation:
    """Show what latents respond to, and score the labels on documents that they were not made of.

    Labels and purity come from one half of the documents (by a hash of their number); ``detection`` is the area under
    the ROC curve of the label's tokens for where the latent fires in the other half. The control shuffles: the codes of
    each latent are moved along the rows of a batch by a random step, labelled and scored in the same way. It needs no
    judge and no key.

    Parameters
    ----------
    sae
        An SAE, or the address of one.
    model, data
        A language model and texts: what `load_model` and `read_texts` take.
    layer, hook
        Where; by default where the SAE's provenance says.
    settings
        How much text, which latents get cards, how many examples.
    progress
        Called as ``progress(stage, done, total)`` with the stages ``"firing"`` and ``"windows"``.

    Returns
    -------
    Explanation
        ``explanation[17]`` is the card of latent 17.

    Raises
    ------
    ConfigError
        No hook, or a latent that the SAE does not have.
    DataError
        The texts give no tokens, or fewer than two documents.
    """
    value = as_sae(sae)
    beyond = [latent for latent in settings.latents or () if latent >= value.n_latents]
    if beyond:
        raise ConfigError(f"explain: latents must lie within 0..{value.n_latents - 1}; got {beyond[0]}.")
    lm = load_language_model(model)
    target = find_hook(lm.model, place_of(value, layer=layer, hook=hook, where="explain"))
    characters = settings.tokens * CHARACTERS_PER_TOKEN
    texts = read_texts(repeatable(data), text=settings.text, columns=(), characters=characters)
    context = context_of(value, lm, settings.context)
    contexts = contexts_for(lm, texts, context, settings.tokens)
    run = _Pass(value, lm, target.name, contexts, settings, progress or silent)
    run.collect()
    cards = run.cards()
    told = [card.is_told for card in cards if card.detection is not None]
    null = run.null[np.isfinite(run.null)]
    found = run.detection[np.isfinite(run.detection)]
    seen = {**lm.info, "hook": target.name, "context": context}
    return Explanation(
        saekit=release(),
        versions=library_versions(True),
        settings={**vars(settings), "latents": None if settings.latents is None else list(settings.latents)},
        sae=facts_of_sae(value),
        model=lm.info,
        hook=target.name,
        data={"name": texts.info["name"], "digest": texts.digest, **run.facts},
        detection=_mean(found, "AUC"),
        detection_null=_mean(null, "AUC"),
        told_fraction=_mean(np.array(told, float), "fraction"),
        fired_fraction=float((run.examples.count > 0).mean()),
        cards=cards,
        warnings=warnings_on([(name_of(value), value)], seen, what="the model given makes"),
    )


def _mean(values: np.ndarray, unit: str) -> Measured:
    """Return a mean over latents; latents are not independent, so there is no interval."""
    value = float(values.mean()) if len(values) else float("nan")
    return Measured(value, unit=unit, reason="no interval: latents of one SAE are not independent")


@dataclass(frozen=True, eq=False)
class _Coded:
    """Codes of a batch, with the place of each row among all tokens."""

    codes: Codes
    place: np.ndarray


class _Pass:
    """What is collected while the model runs over the texts, and the cards that are made of it."""

    def __init__(
        self, sae: SAE, lm: LanguageModel, hook: str, contexts: Contexts, settings: ExplainSettings, report: Progress
    ) -> None:
        self.sae, self.lm, self.hook, self.contexts = sae, lm, hook, contexts
        self.settings, self.report = settings, report
        documents = np.unique(contexts.document)
        labelling = np.array([is_labelling(int(each)) for each in documents], bool)
        if len(documents) < 2 or labelling.all() or not labelling.any():
            raise DataError(
                "explain: there must be documents to label from and others to score on; the texts give "
                f"{len(documents)} documents in all. Give more texts."
            )
        self.is_labelling = labelling[np.searchsorted(documents, contexts.document)]
        n = sae.n_latents
        self.examples = Examples(n, settings.top, settings.sample, settings.seed)
        self.halves = [TokenScores(n), TokenScores(n)]
        self.shuffled = [TokenScores(n), TokenScores(n)]
        self.held: list[_Coded] | None = []
        self.facts: dict[str, Any] = {
            "tokens": int((contexts.position >= 0).sum()),
            "labelling_documents": int(labelling.sum()),
            "scoring_documents": int((~labelling).sum()),
        }

    def coded(self, stage: str) -> Iterator[_Coded]:
        """Yield the codes of all tokens, batch by batch."""
        hook, done = find_hook(self.lm.model, self.hook), 0
        for batch in token_batches(self.lm, self.contexts):
            (hidden,) = activations(self.lm.model, [hook], batch.inputs)
            rows = hidden[batch.keep]
            yield _Coded(self.sae.encode(rows), places_of(self.contexts, batch))
            done += len(rows)
            self.report(stage, done, self.facts["tokens"])

    def collect(self) -> None:
        """Run over the texts once."""
        nnz = 0
        for number, each in enumerate(self.coded("firing")):
            codes, place = each.codes, each.place
            row = place[codes.row_of().cpu().numpy()]
            latent = codes.indices.cpu().numpy()
            self.examples.add(latent, row, self.contexts.document[row], codes.values.float().cpu().numpy())
            self._score(self.halves, codes, place)
            self._score(self.shuffled, shifted(codes, seed=self.settings.seed + number), place)
            nnz += codes.nnz
            self.held = None if self.held is None or nnz > HELD_CODES else [*self.held, each]
        self.detection, self.null = (
            token_detection(*scores, n=self.settings.label_tokens).numpy() for scores in (self.halves, self.shuffled)
        )

    def _score(self, scores: list[TokenScores], codes: Codes, place: np.ndarray) -> None:
        first = self.is_labelling[place]
        for each, mine in zip(scores, (first, ~first), strict=True):
            index = torch.from_numpy(np.flatnonzero(mine))
            where = place[mine]
            if len(where):
                token, document = self.contexts.ids[where].astype(np.int64), self.contexts.document[where]
                magnitude = codes.rows(index.to(codes.indices.device))
                magnitude = Codes(magnitude.offsets, magnitude.indices, magnitude.values.abs(), codes.n_latents)
                each.update(magnitude, torch.from_numpy(token), torch.from_numpy(document))

    def chosen(self) -> list[int]:
        """Return the latents that get a card."""
        if self.settings.latents is not None:
            return sorted(set(self.settings.latents))
        count = self.examples.count
        often = np.argsort(-count, kind="stable")[: self.settings.cards]
        return sorted(int(latent) for latent in often if count[latent])

    def cards(self) -> list[Card]:
        """Return the cards."""
        latents = self.chosen()
        windows = self._windows(latents)
        if not self.halves[0].n_rows:
            raise DataError("explain: the labelling half of the documents must have tokens; it has none.")
        stats = self.halves[0].compute()
        chance = against_chance(self.halves[0], seed=self.settings.seed)["purity"].percentile.numpy()
        labels = labels_of(self.halves[0], lambda token: self.lm.tokenizer.decode([token]), self.settings.label_tokens)
        percentile = self._percentiles()
        neighbours = _neighbours(self.sae, latents, self.settings.neighbours)
        edges, n_tokens = bin_edges(), max(self.facts["tokens"], 1)
        found = []
        for latent, nearest in zip(latents, neighbours, strict=True):
            count, histogram = int(self.examples.count[latent]), self.examples.histogram[latent]
            found.append(
                Card(
                    latent=latent,
                    label=labels[latent],
                    density=count / n_tokens,
                    maximum=float(self.examples.maximum[latent]),
                    mean=float(self.examples.total[latent] / count) if count else 0.0,
                    documents=_finite(stats.spread[latent]),
                    purity=_finite(stats.purity[latent]),
                    purity_percentile=_finite(chance[latent]),
                    detection=_finite(self.detection[latent]),
                    detection_percentile=_finite(percentile[latent]),
                    histogram=[[float(edges[i]), float(histogram[i])] for i in np.flatnonzero(histogram)],
                    top=windows[latent][0],
                    sample=windows[latent][1],
                    neighbours=nearest,
                )
            )
        return found

    def _percentiles(self) -> np.ndarray:
        """Return the fraction of shuffled latents of the nearest density that detect less, ties counted half."""
        count = self.examples.count.astype(np.float64)
        usable = np.flatnonzero(np.isfinite(self.null))
        usable = usable[np.argsort(count[usable], kind="stable")]
        found = np.full(self.sae.n_latents, np.nan)
        if not len(usable):
            return found
        for latent in np.flatnonzero(np.isfinite(self.detection)):
            at = int(np.searchsorted(count[usable], count[latent]))
            start = min(max(0, at - MATCHED // 2), max(0, len(usable) - MATCHED))
            null = self.null[usable[start : start + MATCHED]]
            found[latent] = (null < self.detection[latent]).mean() + (null == self.detection[latent]).mean() / 2
        return found

    def _windows(self, latents: list[int]) -> dict[int, tuple[list[Example], list[Example]]]:
        """Return the examples of every latent with its codes at all their tokens, strongest first."""
        peaks = [(latent, kind, token) for latent in latents for kind in (0, 1) for token in self._peaks(latent, kind)]
        found: dict[int, tuple[list[Example], list[Example]]] = {latent: ([], []) for latent in latents}
        if not peaks:
            return found
        n_tokens = len(self.contexts.ids)
        spans = [self._span(token) for _, _, token in peaks]
        wanted = [np.arange(*span) + latent * n_tokens for (latent, _, _), span in zip(peaks, spans, strict=True)]
        keys = np.unique(np.concatenate(wanted))
        values = self._codes_at(keys)
        for (latent, kind, token), (start, stop), mine in zip(peaks, spans, wanted, strict=True):
            codes = [round(float(code), 5) for code in values[np.searchsorted(keys, mine)]]
            texts = token_texts(self.lm.tokenizer, self.contexts.ids[start:stop].tolist())
            found[latent][kind].append(Example(int(self.contexts.document[token]), token - start, texts, codes))
        return found

    def _codes_at(self, keys: np.ndarray) -> np.ndarray:
        """Return the codes at sorted keys ``latent * n_tokens + token``; 0 where the latent does not fire."""
        values, n_tokens = np.zeros(len(keys), np.float32), len(self.contexts.ids)
        for each in self.held if self.held is not None else self.coded("windows"):
            row, latent = each.place[each.codes.row_of().cpu().numpy()], each.codes.indices.cpu().numpy()
            key = latent * n_tokens + row
            at = np.minimum(np.searchsorted(keys, key), len(keys) - 1)
            hit = keys[at] == key
            values[at[hit]] = each.codes.values.float().cpu().numpy()[hit]
        return values

    def _peaks(self, latent: int, kind: int) -> list[int]:
        token, _ = self.examples.sample(latent) if kind else self.examples.top(latent)
        return [int(each) for each in token]

    def _span(self, token: int) -> tuple[int, int]:
        """Return a window around a token, within its context and its document."""
        context = int(np.searchsorted(self.contexts.offsets, token, side="right")) - 1
        first, last = int(self.contexts.offsets[context]), int(self.contexts.offsets[context + 1])
        start = max(first, token - 2 * self.settings.window // 3)
        stop = min(last, start + self.settings.window)
        return max(first, stop - self.settings.window), stop


def token_texts(tokenizer: Any, ids: Sequence[int]) -> list[str]:
    """Return the text of each token, so that together they are the text of all where the tokenizer allows.

    Some tokenizers drop the space before a word that is decoded alone; what a token adds to the text before it has it.
    """
    found, before = [], ""
    for end in range(1, len(ids) + 1):
        whole = tokenizer.decode(ids[:end])
        added = whole[len(before) :] if whole.startswith(before) and "\ufffd" not in whole[-1:] else ""
        found.append(added or tokenizer.decode(ids[end - 1 : end]))
        before = whole
    return found


def _finite(value: float | Tensor) -> float | None:
    return float(value) if np.isfinite(float(value)) else None


def _neighbours(sae: SAE, latents: list[int], count: int) -> list[list[dict[str, float]]]:
    """Return the latents whose decoder rows point the most alike, by cosine."""
    count = min(count, sae.n_latents - 1)
    if not count:
        return [[] for _ in latents]
    unit = torch.nn.functional.normalize(sae.W_dec.float(), dim=1)
    found = []
    for start in range(0, len(latents), 256):
        index = torch.tensor(latents[start : start + 256], device=unit.device)
        cosine = unit[index] @ unit.T
        cosine[torch.arange(len(index)), index] = -2
        values, nearest = cosine.topk(count, dim=1)
        for row, others in zip(values.tolist(), nearest.tolist(), strict=True):
            found.append([{"latent": float(j), "cosine": round(c, 4)} for j, c in zip(others, row, strict=True)])
    return found
