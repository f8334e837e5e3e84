"""What latents do to a language model, measured against controls of the same size at the same tokens.

A latent is ablated where it fires, in held-out documents, and added in doses elsewhere. The controls write the same
change of codes, at the same tokens and at the same norm, along other directions: those of latents that fire about as
often, and directions drawn from the covariance of the rows (isotropic ones, which the model hardly reads, would be too
easy to beat). What the latent promotes is read off one half of the documents (which tokens follow it), never off the
logits that are tested on the other half.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import ConfigError, DataError
from ..inputs.records import repeatable
from ..inputs.texts import read_texts
from ..measure.fidelity import characters_for, contexts_for, predicted_positions, token_costs
from ..measure.intervals import document_sample
from ..measure.normal_equations import row_factors
from ..measure.results import Measured
from ..measure.token_statistics import shown_token
from ..models.hooks import activations, find_hook
from ..models.intervene import splice
from ..models.language import LanguageModel
from ..models.loading import load_language_model
from ..places import warnings_on
from ..progress import shows_progress
from ..provenance import facts_of_sae, library_versions, place_of, release
from ..randomness import hashed_key, random_order
from ..ranks import refuse_unsplit
from ..rows.settings import TokenMask
from ..rows.tokens import Contexts, TokenBatch, places_of, token_batches
from ..sae.model import SAE
from ..sae.naming import Given, as_sae, name_of
from ..settings import Progress, is_whole, silent, suggest_keywords
from .attach import attached, check_written, written_at
from .directions import covariance_directions, other_latents, with_directions, written_rows
from .edits import Edit, columns_of
from .effects_result import Dose, Effect, Effects, is_promoting, verdict_of
from .halves import context_of, labelling_among
from .settings import EffectSettings

PRIOR = 100.0
"""Weight of the base rates in the log-odds of following tokens, in tokens: an informative Dirichlet prior (Monroe,
Colaresi & Quinn 2008, *Fightin' Words*)."""

NO_FOLLOWERS = Measured(float("nan"), unit="nats", reason="no token follows it more than elsewhere")

LEAST_FIRED = 5
"""Fewer firing tokens than this in either half of the documents, and the latent is not tested."""

DOSED_TOKENS = 32
"""Tokens of the contexts that doses are added to."""


@suggest_keywords
@shows_progress
def effects(
    sae: Given,
    model: str | os.PathLike[str] | LanguageModel,
    data: Any,
    latents: int | Sequence[int],
    *,
    layer: int | None = None,
    hook: str | None = None,
    settings: EffectSettings = EffectSettings(),
    progress: Progress | None = None,
) -> Effects:
    """Measure what ablating and adding latents does to the next-token distribution, against controls.

    With z the latent's code, ablation adds ``-z W_dec[j]`` at every token of held-out contexts where it fires; measured
    there are the KL divergence from the untouched model (nats) and the change of ``log sum_T p``, T being the tokens
    that follow the latent in the other half of the documents. A dose adds a multiple of the 99th percentile of the
    latent's nonzero codes at every token of contexts where it does not fire.

    Parameters
    ----------
    sae
        An SAE, or the address of one.
    model, data
        A causal language model and texts, as for `evaluate`.
    latents
        Which latents.
    layer, hook
        Where; by default where the SAE's provenance says.
    settings
        How much text, how many controls, which doses.
    progress
        Called as ``progress(stage, done, total)`` with the stages ``"firing"`` and ``"effects"``.

    Returns
    -------
    Effects
        ``.effects``, one per latent: numbers with intervals over documents, percentiles among the controls, verdicts.

    Raises
    ------
    ConfigError
        No such latent, no hook, a model that is not causal, a transcoder that does not say what it predicts.
    DataError
        The texts give no tokens.
    """
    refuse_unsplit("effects")
    value = as_sae(sae)
    chosen = _checked(value, latents)
    out = written_at(value, "effects")
    lm = load_language_model(model)
    if not lm.is_causal:
        raise ConfigError(f"effects: the model must predict next tokens; `{lm.name}` is not a causal language model.")
    target = find_hook(lm.model, place_of(value, layer=layer, hook=hook, where="effects"))
    find_hook(lm.model, out or target)  # where a transcoder writes must be there before anything runs
    mask = TokenMask.by(value.provenance)
    characters = characters_for(settings.tokens, mask)
    texts = read_texts(repeatable(data), text=settings.text, columns=(), characters=characters)
    context = context_of(value, lm, settings.context)
    contexts = contexts_for(lm, texts, context, settings.tokens, mask)
    if not len(contexts):
        raise DataError(f"`{texts.info['name']}` must hold texts of at least two tokens; it holds none.")
    report = progress or silent
    firing = _Firing.over(value, lm, target.name, contexts, chosen, settings, report)
    tests = _Tests(value, lm, target.name, contexts, firing, settings)
    found = []
    for number, latent in enumerate(chosen):
        report("effects", number, len(chosen))
        found.append(tests.effect(latent))
    report("effects", len(chosen), len(chosen))
    seen = {**lm.info, "hook": target.name, "context": context, "mask": mask.facts()}
    return Effects(
        saekit=release(),
        versions=library_versions(True),
        settings={**vars(settings), "doses": list(settings.doses)},
        sae=facts_of_sae(value),
        model=lm.info,
        hook=target.name,
        data={"name": texts.info["name"], "digest": texts.digest, "tokens": int(contexts.position.size)},
        effects=found,
        warnings=warnings_on([(name_of(value), value)], seen, what="the model given makes"),
    )


def _checked(sae: SAE, latents: int | Sequence[int]) -> list[int]:
    """Return the latents, which must be different ones of the SAE."""
    chosen = list(latents) if isinstance(latents, Sequence) else [latents]
    if not chosen or len(set(chosen)) < len(chosen):
        raise ConfigError(f"effects: `latents` must be one or several different latents; got {latents!r}.")
    for latent in chosen:
        if not is_whole(latent) or not 0 <= latent < sae.n_latents:
            raise ConfigError(f"effects: latents must lie within 0..{sae.n_latents - 1}; got {latent!r}.")
    return chosen


@dataclass(frozen=True)
class _Firing:
    """Where the latents fire, and what the rows are like."""

    latents: list[int]
    codes: np.ndarray
    """``float32 [tokens of all contexts, latents]``, in the order of the contexts."""
    density: np.ndarray
    """``[n_latents]`` fraction of tokens at which each fires."""
    rows: Tensor
    """A sample of the rows that the latents write into, for directions."""

    @classmethod
    def over(
        cls,
        sae: SAE,
        lm: LanguageModel,
        hook: str,
        contexts: Contexts,
        latents: list[int],
        settings: EffectSettings,
        report: Progress,
    ) -> _Firing:
        codes = np.zeros((len(contexts.ids), len(latents)), np.float32)
        counts = torch.zeros(sae.n_latents, dtype=torch.int64)
        wanted = torch.tensor(latents, device=sae.device)
        sample, n_rows = [], 0
        out = written_at(sae, "effects")
        hooks = [find_hook(lm.model, each) for each in (hook, out) if each is not None]
        for batch in token_batches(lm, contexts):
            hidden = activations(lm.model, hooks, batch.inputs)
            rows = hidden[0][batch.keep]
            check_written(sae, hidden[-1].shape[-1], hooks[-1].name)
            encoded = sae.encode(rows)
            counts += torch.bincount(encoded.indices.cpu(), minlength=sae.n_latents)
            dense = columns_of(encoded, wanted).float().cpu().numpy()
            codes[places_of(contexts, batch)] = dense
            sample.append(hidden[-1][batch.keep].float().cpu()[:: max(1, len(contexts.ids) // SAMPLED_ROWS)])
            n_rows += len(rows)
            report("firing", n_rows, int((contexts.position >= 0).sum()))
        return cls(latents, codes, counts.double().numpy() / max(n_rows, 1), torch.cat(sample))


SAMPLED_ROWS = 8192
"""Rows, about, from whose covariance directions are drawn."""


class _Tests:
    """Ablations and doses of latents in held-out contexts."""

    def __init__(
        self, sae: SAE, lm: LanguageModel, hook: str, contexts: Contexts, firing: _Firing, settings: EffectSettings
    ) -> None:
        self.sae, self.lm, self.hook, self.settings = sae, lm, hook, settings
        self.contexts, self.firing = contexts, firing
        documents = np.unique(contexts.document[contexts.position >= 0])
        self.labelling = np.isin(contexts.document, documents[labelling_among(documents)])
        self.first_document = contexts.document[contexts.offsets[:-1]]
        self.vocabulary = int(lm.model.get_output_embeddings().weight.shape[0])  # type: ignore[operator]

    def effect(self, latent: int) -> Effect:
        """Return the effect of one latent."""
        codes = self.firing.codes[:, self.firing.latents.index(latent)]
        fired = codes != 0
        density = float(self.firing.density[latent])
        n_labelling, n_test = int((fired & self.labelling).sum()), int((fired & ~self.labelling).sum())
        if min(n_labelling, n_test) < LEAST_FIRED:
            return Effect.untested(
                latent,
                density,
                f"it fires at {n_labelling} tokens of the labelling half and {n_test} of the other; at least "
                f"{LEAST_FIRED} are needed in each",
            )
        p99 = float(np.quantile(np.abs(codes[fired]), 0.99)) * float(np.sign(codes[fired].sum()))
        followers = self._followers(fired & self.labelling)
        controls = self._controls(latent)
        ablated = self._ablation(latent, fired, followers, controls)
        doses = [self._dose(latent, dose, dose * p99, fired, followers, controls) for dose in self.settings.doses]
        decode = self.lm.tokenizer.decode
        return Effect(
            latent=latent,
            density=density,
            p99=p99,
            followers=[shown_token(decode([token])) for token in followers],
            doses=[dose for dose in doses if dose is not None],
            **ablated,
        )

    def _controls(self, latent: int) -> dict[str, list[SAE]]:
        count, seed = self.settings.controls, self.settings.seed
        others = other_latents(self.sae, [latent], count, seed, self.firing.density)
        directions = covariance_directions(self.firing.rows, count, hashed_key("effects", seed, latent, n_bytes=7))
        rows = {"latents": written_rows(self.sae, others), "directions": directions}
        return {
            kind: [with_directions(self.sae, [latent], row[None]) for row in each.to(self.sae.W_dec)]
            for kind, each in rows.items()
        }

    def _followers(self, fired: np.ndarray) -> list[int]:
        """Return the tokens that follow firing tokens more than others, by log-odds against all following tokens."""
        ids, document = self.contexts.ids, self.contexts.document
        follows = np.zeros(len(ids), bool)
        same = np.ones(len(ids), bool)
        same[self.contexts.offsets[1:-1]] = False  # the first token of a context follows none
        follows[1:] = same[1:] & (document[1:] == document[:-1]) & (self.contexts.position[1:] >= 0)
        base_tokens = ids[follows & self.labelling]
        after = np.zeros(len(ids), bool)
        after[1:] = fired[:-1]
        tokens = ids[follows & after]
        base = np.bincount(base_tokens, minlength=self.vocabulary).astype(np.float64)
        seen = np.bincount(tokens, minlength=self.vocabulary).astype(np.float64)
        prior = PRIOR * (base + 0.01) / (base + 0.01).sum()
        rest = base - seen

        def log_odds(counts: np.ndarray) -> np.ndarray:
            with_prior = counts + prior
            return np.log(with_prior) - np.log(with_prior.sum() - with_prior)

        z = (log_odds(seen) - log_odds(rest)) / np.sqrt(1 / (seen + prior) + 1 / (rest + prior))
        order = np.argsort(-z, kind="stable")[: self.settings.targets]
        return [int(token) for token in order if seen[token] > 0 and z[token] > 0]

    def _chosen(self, wanted: np.ndarray, purpose: str) -> np.ndarray:
        """Return contexts of the test half in which a token is `wanted`, each of another document."""
        number = np.repeat(np.arange(len(self.contexts)), self.contexts.lengths())
        found = np.unique(number[wanted & ~self.labelling])
        found = found[random_order(len(found), purpose, self.settings.seed)]
        _, first = np.unique(self.first_document[found], return_index=True)
        return found[np.sort(first)][: self.settings.contexts]

    def _ablation(
        self, latent: int, fired: np.ndarray, followers: list[int], controls: Mapping[str, list[SAE]]
    ) -> dict[str, Any]:
        part = self.contexts.pick(self._chosen(fired, "ablated"))
        where = _within(self.contexts, self._chosen(fired, "ablated"), fired)
        run = _Run(self.lm, self.hook, part, followers)
        at, later = where & run.predicts, _after(part, where) & ~where & run.predicts

        def measured(sae: SAE) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
            return run.costs(sae, {latent: Edit.ablate()})

        kl, drop, loss = measured(self.sae)
        null = {kind: [measured(sae) for sae in each] for kind, each in controls.items()}
        mean_kl = mean_over_documents(kl[at], part.document[at], "nats", least=0.0)
        mean_drop = mean_over_documents(-drop[at], part.document[at], "nats") if followers else NO_FOLLOWERS
        predicted = run.predicted
        null_kl, percentiles = _against(
            {kind: [k for k, _, _ in each] for kind, each in null.items()}, at, mean_kl.value
        )
        null_drop, of_drop = _against(
            {kind: [-d for _, d, _ in each] for kind, each in null.items() if followers}, at, mean_drop.value
        )
        return {
            "n_contexts": len(part),
            "n_tokens": int(at.sum()),
            "kl": mean_kl,
            "kl_elsewhere": float(kl[later].mean()) if later.any() else None,
            "kl_null": null_kl,
            "kl_percentile": percentiles,
            "drop": mean_drop,
            "drop_null": null_drop,
            "drop_percentile": of_drop,
            "verdict": verdict_of(percentiles),
            "loss": mean_over_documents(loss[predicted], part.document[predicted], "nats"),
            "loss_expected": run.expected(self.sae, latent) / max(int(predicted.sum()), 1),
            "promotes": bool(followers) and is_promoting(mean_drop, of_drop),
        }

    def _dose(
        self,
        latent: int,
        dose: float,
        strength: float,
        fired: np.ndarray,
        followers: list[int],
        controls: Mapping[str, list[SAE]],
    ) -> Dose | None:
        number = np.repeat(np.arange(len(self.contexts)), self.contexts.lengths())
        silent_ones = ~np.isin(number, np.unique(number[fired]))
        chosen = self._chosen(silent_ones & (self.contexts.position >= 0), "dosed")
        if not len(chosen):
            return None
        part = _cut(self.contexts.pick(chosen), DOSED_TOKENS)
        run = _Run(self.lm, self.hook, part, followers)
        edits = {latent: Edit.add(strength)}
        kl, rise, _ = run.costs(self.sae, edits)
        null = [run.costs(sae, edits) for sae in controls["directions"]]
        at = run.predicts
        null_rise = [float(r[at].mean()) for _, r, _ in null]
        null_kl = [float(k[at].mean()) for k, _, _ in null]
        return Dose(
            dose=dose,
            strength=strength,
            change=run.change,
            kl=mean_over_documents(kl[at], part.document[at], "nats", least=0.0),
            kl_percentile=_percentile(float(kl[at].mean()), null_kl),
            rise=mean_over_documents(rise[at], part.document[at], "nats"),
            rise_null_95=float(np.quantile(null_rise, 0.95)),
            rise_percentile=_percentile(float(rise[at].mean()), null_rise),
        )


class _Run:
    """Forward passes over some contexts: the untouched model once, edited ones against it."""

    def __init__(self, lm: LanguageModel, hook: str, contexts: Contexts, followers: list[int]) -> None:
        self.lm, self.hook, self.contexts, self.followers = lm, hook, contexts, followers
        self.predicts = contexts.position >= 0
        self.targets = np.append(contexts.ids[1:], 0).astype(np.int64)
        self.predicted = np.zeros(len(contexts.ids), bool)
        self.change = 0.0
        self.batches = list(token_batches(lm, contexts))
        self.clean = [self._logits(batch) for batch in self.batches]
        for batch in self.batches:
            before = torch.zeros_like(batch.keep)
            before[:, :-1] = predicted_positions(batch)
            self.predicted[places_of(contexts, batch)] = before[batch.keep].cpu().numpy()

    def costs(self, sae: SAE, edits: Mapping[int, Edit]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return per token, in the order of the contexts: KL from the untouched model, and change of log sum_T p.

        Last the change of the cross-entropy; 0 where no next token is predicted.
        """
        kl, moved, loss = (np.zeros(len(self.contexts.ids)) for _ in range(3))
        change: list[float] = []
        for batch, clean in zip(self.batches, self.clean, strict=True):
            with attached(self.lm, sae, edits, at=batch.keep, hook=self.hook, special=True) as found:
                logits = self._logits(batch)
            change += found.change
            places = places_of(self.contexts, batch)
            targets = torch.from_numpy(self.targets[places]).to(logits.device)
            cost, divergence = token_costs(logits, targets, clean)
            before, _ = token_costs(clean, targets, clean)
            kl[places] = divergence.double().cpu().numpy()
            loss[places] = (cost.double() - before.double()).cpu().numpy()
            moved[places] = self._of_followers(logits) - self._of_followers(clean)
        self.change = float(np.mean(change)) if change else 0.0
        return kl, moved, np.where(self.predicted, loss, 0.0)

    def expected(self, sae: SAE, latent: int) -> float:
        """Return what gradients expect ablating a latent to add to the summed cross-entropy: ``-sum z dCE/dz``."""
        total, direction, out = 0.0, written_rows(sae, [latent])[0].float(), written_at(sae, "effects")
        target, source = (self.hook, None) if out is None else (out, self.hook)
        for batch in self.batches:
            leaves: list[tuple[Tensor, Tensor]] = []

            def noted(read: Tensor, *beside: Tensor, leaves: list[tuple[Tensor, Tensor]] = leaves) -> Tensor:
                x = beside[0] if beside else read
                leaf = torch.zeros_like(x).requires_grad_()
                leaves.append((read.detach(), leaf))
                return x.detach() + leaf

            places = places_of(self.contexts, batch)
            targets = torch.from_numpy(np.where(self.predicted, self.targets, -100)[places]).to(self.lm.device)
            with torch.enable_grad(), splice(self.lm, target, noted, mask=batch.keep, source=source):
                logits = self.lm.model(**batch.inputs).logits[batch.keep].float()
                cost = torch.nn.functional.cross_entropy(logits, targets, reduction="sum", ignore_index=-100)
                (gradient,) = torch.autograd.grad(cost, leaves[0][1])
            rows = leaves[0][0].to(sae.device, sae.dtype)
            z = columns_of(sae.encode(rows), torch.tensor([latent], device=sae.device))[:, 0] * row_factors(sae, rows)
            total -= float((z.double() * (gradient.to(direction).float() @ direction).double()).sum())
        return total

    def _logits(self, batch: TokenBatch) -> Tensor:
        with torch.no_grad():
            return self.lm.model(**batch.inputs).logits[batch.keep]

    def _of_followers(self, logits: Tensor) -> np.ndarray:
        if not self.followers:
            return np.zeros(len(logits))
        return logits.float().log_softmax(1)[:, self.followers].logsumexp(1).double().cpu().numpy()


def _within(contexts: Contexts, index: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Return the values of the tokens of picked contexts."""
    return np.concatenate([values[contexts.offsets[i] : contexts.offsets[i + 1]] for i in index])


def _after(contexts: Contexts, where: np.ndarray) -> np.ndarray:
    """Return which tokens come after one that is marked, in their context."""
    found = np.zeros(len(where), bool)
    for start, stop in zip(contexts.offsets[:-1], contexts.offsets[1:], strict=True):
        found[start:stop] = np.maximum.accumulate(where[start:stop])
    return found


def _cut(contexts: Contexts, length: int) -> Contexts:
    """Return contexts with their first tokens alone."""

    def parts() -> Iterator[Contexts]:
        for i in range(len(contexts)):
            one = contexts.pick([i])
            n = min(length, len(one.ids))
            yield Contexts(one.ids[:n], one.document[:n], one.position[:n], np.array([0, n], np.int64))

    return Contexts.cat(list(parts()))


def mean_over_documents(values: np.ndarray, group: np.ndarray, unit: str, *, least: float | None = None) -> Measured:
    """Return a mean over tokens with its interval over documents."""
    _, place = np.unique(group, return_inverse=True)
    sums, counts = np.bincount(place, values), np.bincount(place).astype(np.float64)
    return document_sample(counts).ratio(sums, counts).measured(unit, least=least)


def _against(
    null: Mapping[str, Sequence[np.ndarray]], at: np.ndarray, value: float
) -> tuple[dict[str, list[float]], dict[str, float]]:
    """Return the means of the controls by kind, and the percentage of them below a value."""
    means = {kind: [float(each[at].mean()) for each in costs] for kind, costs in null.items()}
    return means, {kind: _percentile(value, each) for kind, each in means.items() if each}


def _percentile(value: float, null: Sequence[float]) -> float:
    """Return the percentage of controls below a value, ties counted half."""
    each = np.asarray(null)
    return float(100 * ((each < value).mean() + (each == value).mean() / 2)) if len(each) else float("nan")
