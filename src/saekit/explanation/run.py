"""Explain latents: where they fire, what tells where, and how well that holds in documents it was not made of."""

from __future__ import annotations

import dataclasses
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import ConfigError
from ..inputs.records import repeatable
from ..inputs.texts import read_texts
from ..measure.fidelity import characters_for, contexts_for
from ..measure.normal_equations import row_factors
from ..measure.results import Measured, to_plain
from ..measure.token_statistics import shown_token
from ..models.hooks import Hook, activations, blocks, find_hook
from ..models.language import LanguageModel
from ..models.loading import load_language_model
from ..models.randomized import randomized
from ..places import warnings_on
from ..progress import shows_progress
from ..provenance import facts_of_sae, library_versions, place_of, release
from ..randomness import random_order
from ..ranks import Ranks, agreed, alone, check_same, dealt, together
from ..rows.settings import TokenMask
from ..rows.tokens import Contexts, TokenBatch, places_of, token_batches
from ..sae.model import SAE
from ..sae.naming import Given, as_sae, given_saes, name_of, named_saes
from ..settings import Progress, silent, suggest_keywords
from .attach import check_written
from .coactivation import coactive
from .controls import MADE, random_directions, sampled_rows, trained
from .explanation_result import Card, Cluster, Control, Example, Explanation, LogitLists, Written
from .firing_windows import TokenVectors
from .firings import Firings, FiringsWriter, by_fifths, histogram, strongest
from .groups import groups_of, other_explanations, place_of_explanation, scores_by_group, scores_of_others
from .halves import context_of
from .layout import Layout
from .logit_lists import FinalRows, Placed, logit_lists, why_no_lists
from .nulls import SHUFFLED, Scored, compare_scores, percentiles
from .responses import BETTER, KINDS, Named, Responses, responses
from .settings import ExplainSettings
from .surprisal import surprisal
from .window_scores import WindowScores, window_scores

HELD_ROWS = 2**27
"""Numbers in rows that are kept for the controls (0.5 GB); with more the model runs again for each of them."""

CONTROL_LATENTS = 256
"""Latents of each control whose windows are scored."""


@suggest_keywords
@shows_progress
def explain(
    sae: Given,
    model: str | os.PathLike[str] | LanguageModel,
    data: Any,
    *,
    layer: int | None = None,
    hook: str | None = None,
    nulls: Sequence[Given] = (),
    settings: ExplainSettings = ExplainSettings(),
    progress: Progress | None = None,
) -> Explanation:
    """Show what latents respond to, and score that on documents that it was not made of.

    Labels come from one half of the documents (by a hash of their number, neither half empty); ``detection`` is the
    area under the ROC curve of the label for where the latent fires in the other half, without what repeats the first.
    A label is made of tokens, of those before or after, of the position, or of the tokens around, whichever tells best
    in the first half. Every score is compared with that of latents that mean nothing; which of the scores tell these
    apart is said. It needs no judge and no key.

    Parameters
    ----------
    sae
        An SAE, or the address of one.
    model, data
        A language model and texts: what `load_model` and `read_texts` take.
    layer, hook
        Where; by default where the SAE's provenance says.
    nulls
        Further SAEs of the same hook to compare with, or their addresses: with a frozen decoder, say.
    settings
        How much text, which latents get cards, how many examples, which controls.
    progress
        Called as ``progress(stage, done, total)`` with the stage ``"firing"`` and one for every control.

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
    with together("explain") as ranks:
        return _explained((sae, nulls), model, (data, layer, hook), settings, progress or silent, ranks)


def _explained(
    saes: tuple[Given, Sequence[Given]],
    model: str | os.PathLike[str] | LanguageModel,
    where: tuple[Any, int | None, str | None],
    settings: ExplainSettings,
    report: Progress,
    ranks: Ranks,
) -> Explanation:
    """Explain as one of the ranks; `saes` are the SAE and the nulls, `where` is data, layer and hook."""
    (sae, nulls), (data, layer, hook) = saes, where
    value = as_sae(sae)
    given = given_saes(nulls)
    others = dict(named_saes(given, "explain")) if given else {}
    _check(value, others, settings)
    groups = groups_of(value, settings.groups)
    lm = load_language_model(model)
    if settings.surprisal and not lm.is_causal:
        raise ConfigError(f"explain: `surprisal` needs a causal language model; `{lm.name}` is none. Set it to 0.")
    target = find_hook(lm.model, place_of(value, layer=layer, hook=hook, where="explain"))
    writes = _writes_into(value, lm, target)
    mask = TokenMask.by(value.provenance)
    characters = characters_for(settings.tokens, mask)
    texts = read_texts(repeatable(data), text=settings.text, columns=(), characters=characters)
    here = {"settings": vars(settings), "model": lm.info, "data": {"digest": texts.digest}, "hook": target.name}
    others_explained = other_explanations(value, place_of_explanation(here), settings.groups)
    context = context_of(value, lm, settings.context)
    contexts = contexts_for(lm, texts, context, settings.tokens, mask)
    passes = _Passes(lm, target.name, contexts, settings.seed, ranks)
    if ranks.size > 1:
        _check_same(ranks, {name: each.digest() for name, each in {"": value, **others}.items()}, settings, here)

    def explained() -> Explanation:
        run = _Run(value, passes, writes, settings, report)
        cards = run.cards()
        controls = run.compared(others)
        scores = compare_scores(run.scored, {name: each.scored for name, each in controls.items()})
        cards = run.with_percentiles(cards, {name: each.scored for name, each in controls.items()})
        found = run.scored.scores["detection"]
        null = run.detection_of(controls.get(SHUFFLED))
        told = [card.is_told for card in cards if card.detection_percentile is not None]
        seen = {**lm.info, "hook": target.name, "context": context, "mask": mask.facts()}
        return Explanation(
            saekit=release(),
            versions=library_versions(True),
            settings=to_plain(vars(settings)),
            sae=facts_of_sae(value),
            model=lm.info,
            hook=target.name,
            data={"name": texts.info["name"], "digest": texts.digest, **run.facts},
            detection=_mean(found, "AUC"),
            detection_null=_mean(null, "AUC"),
            told_fraction=_mean(np.array(told, float), "fraction"),
            fired_fraction=float((run.firings.count > 0).mean()),
            cards=cards,
            scores=scores,
            logits=run.logits,
            groups=scores_by_group(run.scored, groups) + scores_of_others(value, run.scored, others_explained),
            controls=[each.described(name) for name, each in controls.items()],
            warnings=warnings_on([(name_of(value), value)], seen, what="the model given makes"),
        )

    if ranks.rank == 0:
        with alone():
            found = explained()
        passes.end()
        return agreed(ranks, lambda: found)
    passes.help()
    return agreed(ranks, explained)


def _check_same(ranks: Ranks, saes: Mapping[str, str], settings: ExplainSettings, here: Mapping[str, Any]) -> None:
    """Refuse ranks that were started for different explanations."""
    versions = {**library_versions(True), "saekit": release()}
    facts = {"versions": versions, "settings": vars(settings), "saes": saes, "data": here["data"], "hook": here["hook"]}
    check_same(ranks, "explain", to_plain({**facts, "model": here["model"]["model_digest"]}))


@dataclass(frozen=True, eq=False)
class _Passes:
    """The passes of the model over all texts, which the ranks share: rank 0 asks for them and has the rows."""

    lm: LanguageModel
    hook: str
    contexts: Contexts
    seed: int
    ranks: Ranks

    def rows(self, lm: LanguageModel, hooks: Sequence[str]) -> Iterator[tuple[list[Tensor], np.ndarray]]:
        """Yield the rows of all tokens at some hooks, batch by batch, with their places; it must be read to its end."""
        agreed(self.ranks, lambda: (lm is not self.lm, list(hooks)))
        yield from self._dealt(lm, hooks)

    def _dealt(self, lm: LanguageModel, hooks: Sequence[str]) -> Iterator[tuple[list[Tensor], np.ndarray]]:
        found = [find_hook(lm.model, hook) for hook in hooks]

        def work(batch: TokenBatch) -> tuple[list[Tensor], np.ndarray]:
            rows = [hidden[batch.keep] for hidden in activations(lm.model, found, batch.inputs)]
            return [each.cpu() for each in rows] if self.ranks.rank else rows, places_of(self.contexts, batch)

        yield from dealt(self.ranks, token_batches(lm, self.contexts), work)

    def help(self) -> None:
        """Run this rank's part of the passes that rank 0 asks for, until it has no more."""
        while (wanted := agreed(self.ranks, _nothing)) is not None:
            is_random, hooks = wanted
            lm = randomized(self.lm, seed=self.seed) if is_random else self.lm
            for _ in self._dealt(lm, hooks):
                pass

    def end(self) -> None:
        """Tell the others that there are no more passes."""
        agreed(self.ranks, _nothing)


def _nothing() -> tuple[bool, list[str]] | None:
    return None


def _check(sae: SAE, others: Mapping[str, SAE], settings: ExplainSettings) -> None:
    """Refuse latents that the SAE does not have, and SAEs of other widths."""
    beyond = [latent for latent in settings.latents or () if latent >= sae.n_latents]
    if beyond:
        raise ConfigError(f"explain: latents must lie within 0..{sae.n_latents - 1}; got {beyond[0]}.")
    for name, other in others.items():
        if other.d_in != sae.d_in:
            raise ConfigError(
                f"explain: `nulls` must read rows of width {sae.d_in}, as the SAE does; `{name}` reads {other.d_in}. "
                "Give an SAE of the same hook."
            )


def _writes_into(sae: SAE, lm: LanguageModel, read: Hook) -> Hook | None:
    """Return the hook that latents write into; None for a transcoder that does not say."""
    if not sae.is_transcoder:
        return read
    out = sae.provenance.get("hook_out")
    return None if out is None else find_hook(lm.model, str(out))


def _mean(values: np.ndarray, unit: str) -> Measured:
    """Return a mean over latents; latents are not independent, so there is no interval."""
    values = values[np.isfinite(values)]
    value = float(values.mean()) if len(values) else float("nan")
    return Measured(value, unit=unit, reason="no interval: latents of one SAE are not independent")


@dataclass(frozen=True, eq=False)
class _Compared:
    """A control and what it scores."""

    what: str
    scored: Scored
    seconds: float

    def described(self, name: str) -> Control:
        return Control(name, self.what, int((self.scored.count > 0).sum()), round(self.seconds, 2))


class _Run:
    """What is collected while the model runs over the texts, and what is made of it."""

    def __init__(
        self, sae: SAE, passes: _Passes, writes: Hook | None, settings: ExplainSettings, report: Progress
    ) -> None:
        lm, hook, contexts = passes.lm, passes.hook, passes.contexts
        self.sae, self.lm, self.hook, self.contexts, self.passes = sae, lm, hook, contexts, passes
        self.settings, self.report = settings, report
        self.layout = Layout.of(contexts)
        self.real = np.flatnonzero(contexts.position >= 0)
        self.facts: dict[str, Any] = {"tokens": len(self.real), **self.layout.facts()}
        self.vectors = TokenVectors(lm, self.layout)
        self.decode = _Decoder(lm.tokenizer)
        self.held: list[tuple[Tensor, np.ndarray]] | None = None
        self.final = _FinalRows.for_lists(lm, writes, contexts, settings)
        factor = np.ones(len(contexts.ids), np.float32) if sae.scaling.per_row else None
        self.placed = None if writes is None else Placed(sae, lm, writes.name, contexts, factor)
        self.firings = self.fired(lm, sae, "firing", factor)
        self.latents = self.chosen()
        named = Named(self.latents, lambda token: self.decode([token]))
        self.responses = responses(self.firings, self.layout, settings.label_tokens, settings.seed, named)
        self.windows = self.window_scores(self.firings, self.latents)
        self.kind = label_kinds(self.responses, self.windows)
        self.scored = scored(self.firings, self.responses, self.windows, self.kind)
        self.surprise()

    def rows(self, lm: LanguageModel, stage: str) -> Iterator[tuple[Tensor, np.ndarray]]:
        """Yield the rows of all tokens, batch by batch, with their places among all tokens."""
        if lm is not self.lm:
            yield from self._batches(lm, stage)
        elif self.held is not None:
            yield from self.held
        elif len(self.contexts.ids) * self.sae.d_in > HELD_ROWS:
            yield from self._batches(lm, stage, self.final)
        else:
            held = []
            for each in self._batches(lm, stage, self.final):
                held.append(each)
                yield each
            self.held = held

    def _batches(
        self, lm: LanguageModel, stage: str, final: _FinalRows | None = None
    ) -> Iterator[tuple[Tensor, np.ndarray]]:
        """Run a model over the texts; `final` takes its last residual stream, the first time."""
        hooks, done = [self.hook], 0
        if final is not None and final.is_wanted:
            hooks.append(final.last)
        for (rows, *last), place in self.passes.rows(lm, hooks):
            rows = rows.to(self.lm.device)
            for each in last:
                assert final is not None
                check_written(self.sae, each.shape[-1], final.last)
                final.keep(each, place)
            yield rows, place
            done += len(rows)
            self.report(stage, done, self.facts["tokens"])
        if final is not None:
            final.is_wanted = False

    def fired(self, lm: LanguageModel, sae: SAE, stage: str, factor: np.ndarray | None = None) -> Firings:
        """Return all firings of an SAE; `factor` gets by what its scaling multiplies what is written at each token."""
        writer = FiringsWriter(sae.n_latents, len(self.contexts.ids))
        for rows, place in self.rows(lm, stage):
            codes = sae.encode(rows)
            token = place[codes.row_of().cpu().numpy()]
            if factor is not None:
                factor[place] = row_factors(sae, rows.to(sae.device, sae.dtype)).float().cpu().numpy()
            writer.add(codes.indices.cpu().numpy(), token, codes.values.float().cpu().numpy())
        return writer.finish()

    def window_scores(self, firings: Firings, latents: np.ndarray) -> WindowScores:
        """Return the scores of windows of some latents."""
        return window_scores(firings, latents, self.layout, self.vectors, self.settings.window, self.settings.seed)

    def chosen(self) -> np.ndarray:
        """Return the latents that get a card."""
        if self.settings.latents is not None:
            return np.array(sorted(set(self.settings.latents)), np.int64)
        count = self.firings.count
        often = np.argsort(-count, kind="stable")[: self.settings.cards]
        return np.sort(often[count[often] > 0])

    def surprise(self) -> None:
        """Score labels by the model itself, those of random latents that have a card."""
        n = self.settings.surprisal
        if not n:
            return
        chosen = np.sort(random_order(len(self.latents), "surprisal", self.settings.seed)[:n])
        latents = self.latents[chosen]
        labels = [self.label(int(row), int(self.kind[latent])) for row, latent in zip(chosen, latents, strict=True)]
        score = surprisal(self.lm, self.firings, latents, labels, self.layout, self.settings)
        self.scored.scores["surprisal"] = np.full(self.sae.n_latents, np.nan)
        self.scored.scores["surprisal"][latents] = score

    # ---------------------------------------------------------------------------------------------------- controls

    def compared(self, others: Mapping[str, SAE]) -> dict[str, _Compared]:
        """Return the scores of every control."""
        found: dict[str, _Compared] = {}
        for name in (*self.settings.controls, *others):
            begin = time.perf_counter()
            firings = self.fired(self.lm, others[name], name) if name in others else self.control(name)
            scored = self.scores_of(firings)
            what = MADE.get(name, "an SAE that was given")
            found[name] = _Compared(what, scored, time.perf_counter() - begin)
        return found

    @staticmethod
    def detection_of(control: _Compared | None) -> np.ndarray:
        """Return the detection of the latents of a control; nothing where it was not asked."""
        return np.zeros(0) if control is None else control.scored.scores["detection"]

    def control(self, name: str) -> Firings:
        """Return the firings of a control that is made here."""
        seed = self.settings.seed
        if name == SHUFFLED:
            return self.firings.shifted(self.real, seed)
        lm = randomized(self.lm, seed=seed) if name == "randomized" else self.lm
        rows = sampled_rows(self.rows(lm, f"{name}: rows"), len(self.contexts.ids), seed)
        if name == "random":
            sae = random_directions(self.sae, rows, self.firings.count / max(len(self.real), 1), seed)
        else:
            k = round(len(self.firings.token) / max(len(self.real), 1))
            sae = trained(rows, self.sae.n_latents, k, "frozen-decoder" if name == "frozen" else None, seed)
        return self.fired(lm, sae, name)

    def scores_of(self, firings: Firings) -> Scored:
        """Return the scores of a control's latents; those of windows of a sample of them."""
        found = responses(firings, self.layout, self.settings.label_tokens, self.settings.seed)
        alive = np.flatnonzero(firings.count)
        sample = np.sort(alive[random_order(len(alive), "control", self.settings.seed)[:CONTROL_LATENTS]])
        windows = self.window_scores(firings, sample)
        return scored(firings, found, windows, label_kinds(found, windows))

    def with_percentiles(self, cards: list[Card], controls: Mapping[str, Scored]) -> list[Card]:
        """Return the cards with the percentiles of their scores among those of the controls."""
        found: dict[str, dict[str, np.ndarray]] = {}
        for name, value in self.scored.scores.items():
            for control, null in controls.items():
                if name in null.scores:
                    each = percentiles(value, self.scored.count, null.scores[name], null.count)
                    found.setdefault(name, {})[control] = each
        made = []
        for card in cards:
            mine = {name: _known(of, card.latent) for name, of in found.items()}
            mine = {name: of for name, of in mine.items() if of}
            shuffled = mine.get("detection", {}).get(SHUFFLED)
            made.append(dataclasses.replace(card, percentiles=mine, detection_percentile=shuffled))
        return made

    # ------------------------------------------------------------------------------------------------------- cards

    def lists(self) -> tuple[LogitLists | None, dict[int, tuple[list[Written], list[Written]]]]:
        """Return whether there are lists of the tokens that latents write, and those of each latent."""
        if not self.settings.logit_tokens:
            return None, {}
        final, reason = self.final.found(), self.final.reason
        if final is None or self.placed is None:
            return LogitLists(_mean(np.zeros(0), "rank correlation"), False, 0, reason), {}
        told, found = logit_lists(self.placed, self.firings, final, self.latents, self.settings)
        return told, {latent: self.written(*each) for latent, each in found.items()}

    def written(self, tokens: list[int], values: list[float]) -> tuple[list[Written], list[Written]]:
        """Return the two ends of a list: raised, most first, and lowered, most first."""
        shown = [Written(t, round(v, 4)) for t, v in zip(self.shown(tokens), values, strict=True)]
        half = len(shown) // 2
        return shown[:half], shown[half:][::-1]

    def cards(self) -> list[Card]:
        """Return the cards, without percentiles among controls."""
        neighbours = _neighbours(self.sae, self.latents.tolist(), self.settings.neighbours)
        together = coactive(self.firings, self.latents, self.settings.neighbours, self.settings.seed)
        self.logits, lists = self.lists()
        return [
            self.card(row, latent, nearest, others, lists.get(latent, ([], [])))
            for row, (latent, nearest, others) in enumerate(
                zip(self.latents.tolist(), neighbours, together, strict=True)
            )
        ]

    def card(
        self,
        row: int,
        latent: int,
        neighbours: list[dict[str, float]],
        together: list[dict[str, float]],
        lists: tuple[list[Written], list[Written]],
    ) -> Card:
        token, value = self.firings.of(latent)
        size, found = np.abs(value), self.responses
        top, sample = self.examples(latent)
        kind = int(self.kind[latent])
        scores = {name: _finite(each[latent]) for name, each in self.scored.scores.items()}
        return Card(
            latent=latent,
            label=self.label(row, kind),
            label_kind=(*KINDS, "context")[kind],
            density=len(token) / max(self.facts["tokens"], 1),
            maximum=float(size.max()) if len(size) else 0.0,
            mean=float(size.mean(dtype=np.float64)) if len(size) else 0.0,
            documents=scores["documents"],
            purity=scores["purity"],
            purity_percentile=_finite(found.purity_percentile[latent]),
            detection=scores["detection"],
            detection_percentile=None,
            histogram=histogram(value),
            top=top,
            sample=sample,
            neighbours=neighbours,
            tokens=found.shares["token"][row],
            previous=found.shares["previous"][row],
            next=found.shares["next"][row],
            positions=found.positions[row],
            coactive=together,
            clusters=[
                Cluster(fraction, self.shown(fired), self.shown(around))
                for fraction, fired, around in self.windows.clusters[row]
            ],
            polysemantic=None if (apart := _finite(self.windows.is_polysemantic[row])) is None else bool(apart),
            scores=scores,
            promoted=lists[0],
            suppressed=lists[1],
        )

    def label(self, row: int, kind: int) -> str:
        """Return the label of a latent."""
        if kind < len(KINDS):
            return self.responses.labels[KINDS[kind]][row]
        return "near " + " · ".join(f"`{text}`" for text in self.shown(self.windows.context_tokens[row]))

    def shown(self, tokens: Sequence[int]) -> list[str]:
        """Return the texts of some tokens, without the space around them."""
        return [shown_token(self.decode([token])) for token in tokens]

    def examples(self, latent: int) -> tuple[list[Example], list[Example]]:
        """Return the strongest examples of a latent, and those of every fifth of its codes."""
        token, value = self.firings.of(latent)
        token = token.astype(np.int64)
        best = strongest(token, value, self.contexts.document, self.settings.top)
        drawn, quantile = by_fifths(token, value, latent, self.settings.sample, self.settings.seed)
        top = [self.example(latent, int(each)) for each in token[best]]
        return top, [self.example(latent, int(t), float(q)) for t, q in zip(token[drawn], quantile, strict=True)]

    def example(self, latent: int, token: int, quantile: float | None = None) -> Example:
        """Return the tokens around a firing with the latent's codes."""
        start, stop = self.span(token)
        codes = self.firings.codes_at(latent, np.arange(start, stop))
        texts = token_texts(self.decode, self.contexts.ids[start:stop].tolist())
        place = None if quantile is None else round(quantile, 4)
        return Example(
            int(self.contexts.document[token]), token - start, texts, [round(float(c), 5) for c in codes], place
        )

    def span(self, token: int) -> tuple[int, int]:
        """Return a window around a token, within its context and its document."""
        context = int(np.searchsorted(self.contexts.offsets, token, side="right")) - 1
        first, last = int(self.contexts.offsets[context]), int(self.contexts.offsets[context + 1])
        start = max(first, token - 2 * self.settings.window // 3)
        stop = min(last, start + self.settings.window)
        return max(first, stop - self.settings.window), stop


class _FinalRows:
    """The last residual stream of some tokens, collected while the model runs: for the lists of tokens written."""

    def __init__(self, last: str, reason: str | None, places: np.ndarray) -> None:
        self.last, self.reason, self.places = last, reason, places
        self.is_wanted = reason is None
        self.parts: list[tuple[Tensor, np.ndarray]] = []

    @classmethod
    def for_lists(
        cls, lm: LanguageModel, writes: Hook | None, contexts: Contexts, settings: ExplainSettings
    ) -> _FinalRows:
        """Return what collects the rows of at most `HELD_ROWS` numbers, of random tokens."""
        reason = "not asked" if not settings.logit_tokens else why_no_lists(lm, writes)
        kept = np.zeros(len(contexts.ids), bool)
        if reason is None:
            kept[random_order(len(kept), "final rows", settings.seed)[: HELD_ROWS // lm.d_model]] = True
        return cls("" if reason else f"layers.{len(blocks(lm.model)[1]) - 1}", reason, kept)

    def keep(self, rows: Tensor, place: np.ndarray) -> None:
        """Take the rows of a batch."""
        mine = self.places[place]
        self.parts.append((rows[torch.from_numpy(mine).to(rows.device)].float().cpu(), place[mine]))

    def found(self) -> FinalRows | None:
        """Return what was collected; None where there are no lists."""
        if not self.parts:
            return None
        place = np.full(len(self.places), -1, np.int64)
        order = np.concatenate([each for _, each in self.parts])
        place[order] = np.arange(len(order))
        return FinalRows(torch.cat([rows for rows, _ in self.parts]), place)


def label_kinds(found: Responses, windows: WindowScores) -> np.ndarray:
    """Return what the label of every latent is made of: an index in `KINDS`, their number for the context.

    It is the kind that tells best in the labelling half; the context must be clearly better than the others.
    """
    kind = found.kind.copy()
    best = np.max([np.nan_to_num(each) for each in found.labelling.values()], axis=0)[windows.latents]
    kind[windows.latents[np.nan_to_num(windows.context_labelling) > best + BETTER]] = len(KINDS)
    return kind


def scored(firings: Firings, found: Responses, windows: WindowScores, kind: np.ndarray) -> Scored:
    """Return all scores of latents; `kind` is what the label of each is made of."""
    detection = np.full(firings.n_latents, np.nan)
    for index, name in enumerate(KINDS):
        detection = np.where(kind == index, found.by_kind[name], detection)
    scores = {"detection": detection, **found.scores}
    for name, value in windows.scores.items():
        scores[name] = np.full(firings.n_latents, np.nan)
        scores[name][windows.latents] = value
    by_context = kind[windows.latents] == len(KINDS)
    detection[windows.latents[by_context]] = windows.context_detection[by_context]
    return Scored(firings.count, scores)


class _Decoder:
    """Texts of tokens; those of single tokens are remembered."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._known: dict[int, str] = {}

    def __call__(self, ids: Sequence[int]) -> str:
        if len(ids) != 1:
            return self._tokenizer.decode(ids)
        if ids[0] not in self._known:
            self._known[ids[0]] = self._tokenizer.decode(ids)
        return self._known[ids[0]]


def token_texts(decode: Callable[[Sequence[int]], str], ids: Sequence[int]) -> list[str]:
    """Return the text of each token, so that together they are the text of all where the tokenizer allows.

    Some tokenizers drop the space before a word that is decoded alone; what a token adds to the text before it has it.
    """
    alone = [decode([token]) for token in ids]
    if "".join(alone) == decode(ids):
        return alone
    found, before = [], ""
    for end in range(1, len(ids) + 1):
        whole = decode(ids[:end])
        added = whole[len(before) :] if whole.startswith(before) and "\ufffd" not in whole[-1:] else ""
        found.append(added or alone[end - 1])
        before = whole
    return found


def _known(of: Mapping[str, np.ndarray], latent: int) -> dict[str, float]:
    return {name: round(float(each[latent]), 4) for name, each in of.items() if np.isfinite(each[latent])}


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
