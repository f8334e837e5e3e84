"""Settings of steering and of the effect of latents."""

from __future__ import annotations

import re
from dataclasses import dataclass

from ..errors import ConfigError
from ..settings import check_choice, check_whole, is_number, is_whole, suggest_keywords

AT = ("all", "prompt", "generated", "last")
"""Which tokens are edited: all; those of the prompt; those that are generated; the last of the prompt."""

CONTROLS = ("shuffled", "random", "frozen", "randomized")
"""Latents that mean nothing; see `saekit.explanation.controls.MADE`."""


@suggest_keywords
@dataclass(frozen=True, kw_only=True)
class SteerSettings:
    """How a steered text is generated, and what it is compared with."""

    at: str = "all"
    """Tokens that are edited: `all`, those of the `prompt`, its `last`, or those `generated` [all]."""
    new_tokens: int = 40
    """Maximum number of tokens to generate [40]."""
    temperature: float = 0.0
    """Temperature of sampling; 0 takes the most likely token [0]."""
    controls: int = 10
    """Number of other latents whose directions are written at the same tokens, at the same norm [10]."""
    special: bool = False
    """Edit special tokens (BOS) as well [no]."""
    seed: int = 0
    """Random seed of the controls and of sampling [0]."""

    def __post_init__(self) -> None:
        check_choice("steer", AT, at=self.at)
        check_whole("steer", new_tokens=self.new_tokens)
        check_whole("steer", least=0, controls=self.controls, seed=self.seed)
        if not is_number(self.temperature) or self.temperature < 0:
            raise ConfigError(f"steer: `temperature` must be a number from 0; got {self.temperature!r}.")


@suggest_keywords
@dataclass(frozen=True, kw_only=True)
class EffectSettings:
    """On what the effect of latents is measured, and against how many controls."""

    text: str = "text"
    """Name of the text column [text]."""
    tokens: int = 50_000
    """Maximum number of tokens read to find where the latents fire [50000]."""
    context: int | None = None
    """Maximum number of tokens that the model reads at once [as in the SAE's training, else 256]."""
    contexts: int = 40
    """Maximum number of held-out contexts, each of another document, in which a latent is ablated; fewer than 40 give
    no interval [40]."""
    controls: int = 20
    """Number of controls of each kind: other latents of similar density, and directions drawn from the covariance of
    the rows [20]."""
    targets: int = 10
    """Number of tokens that follow the latent in the labelling half, whose probability is followed [10]."""
    doses: tuple[float, ...] = (0.5, 1.0, 2.0, 4.0)
    """Steering strengths, as multiples of the latent's 99th percentile [0.5,1,2,4]."""
    seed: int = 0
    """Random seed of the controls and of the choice of contexts [0]."""

    def __post_init__(self) -> None:
        check_whole("effects", tokens=self.tokens, contexts=self.contexts, controls=self.controls)
        check_whole("effects", least=2, context=self.context)
        check_whole("effects", targets=self.targets)
        check_whole("effects", least=0, seed=self.seed)
        if not all(is_number(dose) and dose > 0 for dose in self.doses):
            raise ConfigError(f"effects: `doses` must be numbers above 0; got {self.doses!r}.")


@suggest_keywords
@dataclass(frozen=True, kw_only=True)
class ExplainSettings:
    """On which texts latents are explained, and how much is shown of each."""

    text: str = "text"
    """Name of the text column [text]."""
    tokens: int = 200_000
    """Maximum number of tokens read [200000]."""
    context: int | None = None
    """Maximum number of tokens that the model reads at once [as in the SAE's training, else 256]."""
    latents: tuple[int, ...] | None = None
    """Latents that get a card with contexts; all get numbers [all that fire, up to `cards`]."""
    cards: int = 4096
    """Maximum number of cards: those of the latents that fire most often [4096]."""
    top: int = 8
    """Number of strongest examples on a card, each of another document [8]."""
    sample: int = 10
    """Number of examples drawn from the five fifths of the nonzero codes [10]."""
    window: int = 24
    """Number of tokens of an example [24]."""
    label_tokens: int = 3
    """Number of tokens in a label [3]."""
    neighbours: int = 4
    """Number of latents with the nearest decoder rows, and of those that fire on the same tokens [4]."""
    logit_tokens: int = 4
    """Maximum number of firings at which the effect of a latent on the logits is taken; 0 for no lists [4]."""
    groups: tuple[str, ...] = ()
    """Files or folders of results that tell latents into groups: of `compare`, `prune` or `classify`;
    explanations of other SAEs: what their latents score [none]."""
    surprisal: int = 0
    """Number of latents whose labels are scored by the model itself: by how much less surprising a label makes the
    windows that the latent fires in; about 80 windows of the model for each [0]."""
    controls: tuple[str, ...] = ("shuffled", "random")
    """Controls that scores are compared with, of `shuffled` codes, `random` directions (both cheap), a `frozen` decoder
    and a `randomized` transformer (an SAE is trained for each, and the model runs again) [shuffled,random]."""
    seed: int = 0
    """Random seed of the samples and of the controls [0]."""

    def __post_init__(self) -> None:
        check_whole("explain", least=2, tokens=self.tokens, context=self.context, window=self.window)
        check_whole("explain", top=self.top, cards=self.cards, label_tokens=self.label_tokens)
        check_whole("explain", least=0, logit_tokens=self.logit_tokens, surprisal=self.surprisal)
        for control in self.controls:
            check_choice("explain", CONTROLS, controls=control)
        check_whole("explain", least=0, sample=self.sample, neighbours=self.neighbours, seed=self.seed)
        if self.latents is not None and not all(is_whole(each) and each >= 0 for each in self.latents):
            raise ConfigError(f"explain: `latents` must be whole numbers from 0; got {self.latents!r}.")


@suggest_keywords
@dataclass(frozen=True, kw_only=True)
class JudgeSettings:
    """On how much a language model tests labels, and how an endpoint is asked."""

    judge_model: str | None = None
    """Name of the model, where --judge or --explain-with is the address of an endpoint [none]."""
    judge_latents: int = 50
    """Maximum number of latents whose labels are tested [50]."""
    judge_windows: int = 20
    """Number of windows in which a latent fires, and of as many in which it does not [20]."""
    judge_scores: tuple[str, ...] = ("detection", "fuzzing")
    """Tests: detection (does the label fit the text?), fuzzing (does it fit the marked words?) [detection,fuzzing]."""
    judge_examples: int = 12
    """Number of examples from which a label is written [12]."""
    judge_key: str = "OPENAI_API_KEY"
    """Name of the environment variable with the key of the endpoint, where it needs one [OPENAI_API_KEY]."""
    max_concurrency: int = 4
    """Maximum number of requests at once [4]."""
    timeout: float = 60.0
    """Seconds until a request counts as failed [60]."""
    retries: int = 4
    """Maximum number of repeats of a failed request, after longer and longer waits [4]."""

    def __post_init__(self) -> None:
        check_whole("judge", judge_latents=self.judge_latents, judge_examples=self.judge_examples)
        check_whole("judge", max_concurrency=self.max_concurrency)
        check_whole("judge", 2, judge_windows=self.judge_windows)
        check_whole("judge", 0, retries=self.retries)
        if not self.judge_scores:
            raise ConfigError("judge: `judge_scores` must name at least one test; got none.")
        for each in self.judge_scores:
            check_choice("judge", ("detection", "fuzzing"), judge_scores=each)
        self._check_requests()

    def _check_requests(self) -> None:
        if not re.fullmatch("[A-Z_][A-Z0-9_]*", self.judge_key):  # not quoted: it may be the key itself
            raise ConfigError(
                "judge: `judge_key` must be the name of an environment variable, in capitals; it is none."
            )
        if self.max_concurrency > 256 or self.retries > 20:
            raise ConfigError(
                "judge: `max_concurrency` must be at most 256 and `retries` at most 20; got "
                f"{self.max_concurrency} and {self.retries}."
            )
        if not is_number(self.timeout) or not 0 < self.timeout <= 3600:
            raise ConfigError(f"judge: `timeout` must be seconds from above 0 to 3600; got {self.timeout!r}.")
