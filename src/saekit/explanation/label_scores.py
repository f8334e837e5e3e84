"""Test labels of latents by a language model: does a label tell where its latent fires, in documents not seen before?

The model that tests is asked about one window of tokens at a time and is not told how many windows hold a firing. No
window is seen both by the model that writes a label and by the one that tests it. Each label is tested a second time on
the windows of another latent's: what is left of the score then is no merit of the label.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np

from ..errors import ConfigError
from ..files import check_path, locked_folder
from ..inputs.records import repeatable
from ..inputs.texts import read_texts
from ..measure.fidelity import characters_for, contexts_for
from ..measure.paired_scores import HeldOut, Predictions, score
from ..measure.results import Measured
from ..models.hooks import activations, find_hook
from ..models.language import LanguageModel
from ..models.loading import load_language_model
from ..progress import shows_progress
from ..provenance import library_versions, release
from ..randomness import random_order
from ..rows.settings import TokenMask
from ..rows.tokens import places_of, token_batches
from ..sae.model import SAE
from ..sae.naming import Given, as_sae
from ..settings import Progress, silent, suggest_keywords
from .answers import ANSWERS, Answers, key_of
from .explanation_result import Explanation
from .firings import Firings, FiringsWriter
from .halves import context_of
from .judge import Judge, open_judge
from .label_scores_result import LabelScore, LabelScores, LabelTest
from .label_windows import LabelWindows, Window
from .layout import Layout
from .prompts import (
    LONGEST_LABEL,
    Answer,
    Prompt,
    detection_prompt,
    fuzzing_prompt,
    label_in,
    label_prompt,
    why_rejected,
)
from .run import token_texts
from .settings import ExplainSettings, JudgeSettings

CHARACTERS = 4
"""Characters of a prompt per token, where its cost is estimated."""


@suggest_keywords
@shows_progress
def plan_label_tests(
    explanation: Explanation,
    sae: Given,
    model: str | os.PathLike[str] | LanguageModel,
    data: Any,
    *,
    judge: str | os.PathLike[str] | Judge,
    explain_with: str | os.PathLike[str] | Judge | None = None,
    settings: JudgeSettings = JudgeSettings(),
    progress: Progress | None = None,
) -> LabelTests:
    """Return tests of the labels of an explanation by a language model, with what they cost; nothing is asked yet.

    Parameters
    ----------
    explanation
        What `explain` found for this SAE, model and data.
    sae, model, data
        As they were given to `explain`.
    judge
        Language model that tests: a folder, a hub name, ``builtin``, or the http(s) address of an OpenAI-compatible
        endpoint (its key comes from an environment variable alone); or anything with the method of `Judge`.
    explain_with
        Language model that writes the labels; None: those of the explanation.
    settings
        How many latents and windows, and how an endpoint is asked.
    progress
        Called as ``progress("firing", done, total)``.

    Returns
    -------
    LabelTests
        ``.cost(out)``, ``.run(out)``.

    Raises
    ------
    ConfigError
        The explanation is of something else, or the model cannot test.

    Examples
    --------
    ::

        found = sk.explain(sae, "gpt2", "texts.txt")
        tests = plan_label_tests(found, sae, "gpt2", "texts.txt", judge="http://localhost:8000/v1",
                                 settings=JudgeSettings(judge_model="qwen3"))
        tests.cost()                    # 4,000 prompts, about 800,000 tokens
        tests.run("out")                # answers are kept in out/answers.jsonl: an ended run goes on from there
    """
    tester = open_judge(judge, settings)
    writer = None if explain_with is None else open_judge(explain_with, settings)
    value, lm, seen = as_sae(sae), load_language_model(model), explanation.settings
    how = ExplainSettings(**{name: seen[name] for name in ("text", "tokens", "context", "window", "seed")})
    mask = TokenMask.by(value.provenance)
    texts = read_texts(repeatable(data), text=how.text, columns=(), characters=characters_for(how.tokens, mask))
    known = [explanation.sae["digest"], explanation.data["digest"], explanation.model.get("model_digest")]
    if known != [value.digest(), texts.digest, lm.digest]:
        raise ConfigError(
            "judge: the explanation must be of this SAE, these texts and this model; it is of others. Explain again."
        )
    contexts = contexts_for(lm, texts, context_of(value, lm, how.context), how.tokens, mask)
    order = random_order(len(explanation.cards), "judged latents", how.seed)[: settings.judge_latents]
    latents = sorted(explanation.cards[i].latent for i in order)
    drawn = LabelWindows(Layout.of(contexts), how.window, how.seed)
    firings = _firings(value, lm, explanation.hook, contexts, latents, progress or silent)
    return LabelTests(explanation, lm, tester, writer, settings, latents, drawn, firings)


def _firings(
    sae: SAE, lm: LanguageModel, hook: str, contexts: Any, latents: Sequence[int], report: Progress
) -> Firings:
    """Return where the latents fire."""
    writer = FiringsWriter(sae.n_latents, len(contexts.ids))
    target, done = find_hook(lm.model, hook), 0
    for batch in token_batches(lm, contexts):
        (hidden,) = activations(lm.model, [target], batch.inputs)
        rows = hidden[batch.keep]
        codes = sae.encode(rows)
        latent = codes.indices.cpu().numpy()
        mine = np.isin(latent, latents)
        place = places_of(contexts, batch)[codes.row_of().cpu().numpy()[mine]]
        writer.add(latent[mine], place, codes.values.float().cpu().numpy()[mine])
        done += len(rows)
        report("firing", done, int((contexts.position >= 0).sum()))
    return writer.finish()


@dataclass(frozen=True)
class Cost:
    """What asking costs, about."""

    prompts: int
    """Prompts without a kept answer."""
    tokens: int
    """Tokens of these prompts and of their answers, from their characters."""

    def __str__(self) -> str:
        return f"{self.prompts:,} prompts, about {self.tokens:,} tokens"


@dataclass(frozen=True, eq=False)
class LabelTests:
    """Tests of labels: what is asked, and what came out."""

    explanation: Explanation
    lm: LanguageModel
    judge: Judge
    writer: Judge | None
    settings: JudgeSettings
    latents: list[int]
    drawn: LabelWindows = field(repr=False)
    firings: Firings = field(repr=False)

    @cached_property
    def windows(self) -> dict[int, list[Window]]:
        """Windows to test each latent on; none where it fires too rarely, or nearly everywhere."""
        n = self.settings.judge_windows
        return {latent: self.drawn.scoring_windows(latent, self.firings, n) for latent in self.latents}

    @cached_property
    def label_prompts(self) -> dict[int, Prompt]:
        """Prompts for labels, where a model writes them."""
        if self.writer is None:
            return {}
        found = {}
        for latent in self.latents:
            examples = self.drawn.labelling_windows(latent, self.firings, self.settings.judge_examples)
            if examples and self.windows[latent]:
                found[latent] = label_prompt([(self._tokens(each), each.marks) for each in examples])
        return found

    def cost(self, out: str | os.PathLike[str] | None = None) -> Cost:
        """Return what the run would cost with the answers that are kept in a folder.

        Labels that a model has yet to write are taken to be as long as they may be.
        """
        answers = _answers(out)
        written = self.label_prompts
        labels = {latent: self._offline(latent) for latent in self.latents}
        left: list[Prompt] = []
        if self.writer is not None:
            left = answers.missing(self.writer, written.values())
            labels = {latent: self._kept(answers, prompt) for latent, prompt in written.items()}
        labels = {latent: label for latent, label in labels.items() if not why_rejected(label)}
        questions = [prompt for _, _, _, prompt in self._asked(labels)]
        left += answers.missing(self.judge, questions)
        return Cost(len(left), sum(len(each.text) // CHARACTERS + each.max_tokens for each in left))

    def _kept(self, answers: Answers, prompt: Prompt) -> str:
        """Return the label that was written, or one as long as it may be; both different for every latent."""
        assert self.writer is not None
        found = answers.found.get(key_of(self.writer, prompt))
        return label_in(found) if found is not None else key_of(self.writer, prompt)[:72].ljust(LONGEST_LABEL, "x")

    def run(self, out: str | os.PathLike[str] | None = None, progress: Progress | None = None) -> LabelScores:
        """Ask what has no kept answer, and score the labels."""
        if out is None:
            return self._run(None, progress or silent)
        with locked_folder(out):
            return self._run(out, progress or silent)

    def _run(self, out: str | os.PathLike[str] | None, report: Progress) -> LabelScores:
        answers = _answers(out)
        labels, reasons = self._labels(answers, report)
        asked = list(self._asked(labels))
        given = answers.ask(self.judge, [prompt for *_, prompt in asked], report, "answers")
        said: dict[tuple[int, bool, str], list[Answer]] = {}
        for (latent, is_own, scorer, _), answer in zip(asked, given, strict=True):
            said.setdefault((latent, is_own, scorer), []).append(answer)
        scores = [
            LabelScore(latent, labels.get(latent, ""), self._tests(latent, said), reasons.get(latent))
            for latent in self.latents
        ]
        return self._result(_with_percentiles(scores), given)

    def _labels(self, answers: Answers, report: Progress) -> tuple[dict[int, str], dict[int, str]]:
        """Return the labels to test, and why others are not tested."""
        labels, reasons = {latent: self._offline(latent) for latent in self.latents}, dict[int, str]()
        if self.writer is not None:
            labels, reasons = self._written(answers, report)
        few = "it fires in too few documents of the scoring half, or in nearly all"
        why = {latent: few if not self.windows[latent] else why_rejected(labels[latent]) for latent in self.latents}
        reasons = {latent: each for latent, each in {**why, **reasons}.items() if each}
        return {latent: label for latent, label in labels.items() if latent not in reasons}, reasons

    def _written(self, answers: Answers, report: Progress) -> tuple[dict[int, str], dict[int, str]]:
        """Return the labels that a model writes, and why it wrote none."""
        assert self.writer is not None
        labels, reasons = dict.fromkeys(self.latents, ""), {}
        written = answers.ask(self.writer, list(self.label_prompts.values()), report, "labels")
        for latent, answer in zip(self.label_prompts, written, strict=True):
            labels[latent] = label_in(answer)
            if answer.failure:
                reasons[latent] = f"no label: {answer.failure}"
        return labels, reasons

    def _offline(self, latent: int) -> str:
        return self.explanation[latent].label

    def _other(self, labels: Mapping[int, str], latent: int) -> Iterator[str]:
        """Yield the label of another latent, where there is one that differs."""
        order = list(labels)
        at = order.index(latent)
        others = (labels[each] for each in (*order[at + 1 :], *order[:at]))
        found = next((each for each in others if each != labels[latent]), None)
        if found is not None:
            yield found

    def _asked(self, labels: Mapping[int, str]) -> Iterator[tuple[int, bool, str, Prompt]]:
        """Yield every question with its latent, whether it is about the latent's own label, and the test."""
        for latent in labels:
            for is_own, label in ((True, labels[latent]), *((False, each) for each in self._other(labels, latent))):
                for scorer in self.settings.judge_scores:
                    for window in self.windows[latent]:
                        yield latent, is_own, scorer, self._question(scorer, label, window)

    def _question(self, scorer: str, label: str, window: Window) -> Prompt:
        tokens = self._tokens(window)
        return fuzzing_prompt(label, tokens, window.marks) if scorer == "fuzzing" else detection_prompt(label, tokens)

    def _tokens(self, window: Window) -> list[str]:
        return token_texts(self.lm.tokenizer.decode, self.drawn.layout.ids[window.start : window.stop].tolist())

    def _tests(self, latent: int, said: Mapping[tuple[int, bool, str], list[Answer]]) -> list[LabelTest]:
        windows, found = self.windows[latent], []
        for scorer in self.settings.judge_scores:
            if (latent, True, scorer) not in said:
                continue
            own = _scores(said[latent, True, scorer])
            other = said.get((latent, False, scorer))
            value = math.nan if other is None else _auc(windows, _scores(other)).value
            fires = np.array([each.fires for each in windows])
            hard = [each.fires or each.hard for each in windows]
            found.append(
                LabelTest(
                    scorer=scorer,
                    auc=_auc(windows, own),
                    n=int(np.isfinite(own).sum()),
                    missing=int(np.isnan(own).sum()),
                    least=_known(_area(fires, np.where(np.isnan(own), np.where(fires, -1.0, 2.0), own))),
                    most=_known(_area(fires, np.where(np.isnan(own), np.where(fires, 2.0, -1.0), own))),
                    hard=_known(_area(fires[hard], own[hard])),
                    other_label=_known(value),
                )
            )
        return found

    def _result(self, scores: list[LabelScore], given: Sequence[Answer]) -> LabelScores:
        known = self.explanation
        return LabelScores(
            saekit=release(),
            versions=library_versions(True),
            settings={**vars(self.settings), "judge_scores": list(self.settings.judge_scores)},
            sae=known.sae,
            model=known.model,
            hook=known.hook,
            data=known.data,
            judge={
                "name": self.judge.name,
                "explain_with": None if self.writer is None else self.writer.name,
                "prompts": len(given),
                "missing": sum(each.score is None for each in given),
                "tokens_read": sum(each.tokens[0] for each in given),
                "tokens_written": sum(each.tokens[1] for each in given),
                "requests_without": sorted(getattr(self.judge, "left_out", ())),
            },
            means=_means(scores, self.settings.judge_scores),
            scores=scores,
            warnings=known.warnings,
        )


def _answers(out: str | os.PathLike[str] | None) -> Answers:
    return Answers(None if out is None else check_path(out) / ANSWERS)


def _scores(answers: Sequence[Answer]) -> np.ndarray:
    """Return the score of each answer; NaN where it is missing."""
    return np.array([_or_nan(each.score) for each in answers])


def _area(fires: np.ndarray, scores: np.ndarray) -> float:
    """Return the area under the ROC curve of scores, ties counted half; NaN without both kinds."""
    from scipy.stats import rankdata

    known = np.isfinite(scores)
    fires, scores = fires[known], scores[known]
    n = int(fires.sum())
    if not 0 < n < len(fires):
        return math.nan
    return float((rankdata(scores)[fires].sum() - n * (n + 1) / 2) / (n * (len(fires) - n)))


def _auc(windows: Sequence[Window], scores: np.ndarray) -> Measured:
    """Return the AUC of the windows that were answered, with its interval over documents."""
    known = np.flatnonzero(np.isfinite(scores)).tolist()
    fires = np.array([windows[i].fires for i in known], np.int64)
    if len(set(fires.tolist())) < 2:
        return Measured(math.nan, unit="AUC", reason="too few answers")
    rows = HeldOut.over(fires, groups=np.array([windows[i].document for i in known]))
    p = scores[known].astype(np.float32)
    return score(Predictions(np.stack([1 - p, p], 1)), rows, ("auc",)).measured("auc")


def _with_percentiles(scores: list[LabelScore]) -> list[LabelScore]:
    """Return the tests with the fraction of the labels of other latents that do worse."""
    null: dict[str, list[float]] = {}
    for each in scores:
        for test in each.tests:
            if test.other_label is not None:
                null.setdefault(test.scorer, []).append(test.other_label)

    def percentile(test: LabelTest) -> float | None:
        chance, value = np.array(null.get(test.scorer, [])), test.auc.value
        if not len(chance) or math.isnan(value):
            return None
        return float((chance < value).mean() + (chance == value).mean() / 2)

    return [replace(each, tests=[replace(test, percentile=percentile(test)) for test in each.tests]) for each in scores]


def _means(scores: Sequence[LabelScore], scorers: Sequence[str]) -> dict[str, Measured]:
    """Return the mean AUC over latents of every test, under their own labels and under those of others."""
    means = {}
    for scorer in scorers:
        tests = [test for each in scores for test in each.tests if test.scorer == scorer]
        means[scorer] = _mean([test.auc.value for test in tests])
        means[f"{scorer}_other_label"] = _mean([_or_nan(test.other_label) for test in tests])
    return means


def _mean(values: Sequence[float]) -> Measured:
    known = [each for each in values if math.isfinite(each)]
    value = float(np.mean(known)) if known else math.nan
    return Measured(value, unit="AUC", reason="no interval: latents of one SAE are not independent")


def _known(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None


def _or_nan(value: float | None) -> float:
    return math.nan if value is None else value
