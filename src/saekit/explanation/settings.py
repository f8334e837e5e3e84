"""Settings of steering and of the effect of latents."""

from __future__ import annotations

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
    contexts: int = 24
    """Maximum number of held-out contexts, each of another document, in which a latent is ablated [24]."""
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
    controls: tuple[str, ...] = ("shuffled", "random")
    """What scores are compared with, of `shuffled` codes, `random` directions (both cheap), a `frozen` decoder and a
    `randomized` transformer (an SAE is trained for each, and the model runs again) [shuffled,random]."""
    seed: int = 0
    """Random seed of the samples and of the controls [0]."""

    def __post_init__(self) -> None:
        check_whole("explain", least=2, tokens=self.tokens, context=self.context, window=self.window)
        check_whole("explain", top=self.top, cards=self.cards, label_tokens=self.label_tokens)
        for control in self.controls:
            check_choice("explain", CONTROLS, controls=control)
        check_whole("explain", least=0, sample=self.sample, neighbours=self.neighbours, seed=self.seed)
        if self.latents is not None and not all(is_whole(each) and each >= 0 for each in self.latents):
            raise ConfigError(f"explain: `latents` must be whole numbers from 0; got {self.latents!r}.")
