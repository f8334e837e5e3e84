"""Steer: generate while latents are edited, compared with the untouched model and with edits in other directions."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..errors import ConfigError
from ..measure.numbers import decimals
from ..measure.results import Result
from ..measure.token_statistics import shown_token
from ..models.hooks import activations, find_hook
from ..models.language import LanguageModel
from ..models.loading import load_language_model
from ..models.quiet import quiet_transformers
from ..places import warnings_on
from ..progress import shows_progress
from ..provenance import facts_of_sae, library_versions, place_of, release
from ..ranks import refuse_unsplit
from ..sae.model import SAE
from ..sae.naming import Given, as_sae, name_of
from ..settings import Progress, silent, suggest_keywords
from .attach import Attached, attached, written_at
from .directions import other_latents, with_directions, written_rows
from .edits import Edit, Edits, checked_edits, columns_of
from .settings import SteerSettings

SHOWN = 10
"""Tokens that are listed as made more and less likely."""


@dataclass(frozen=True)
class Generated:
    """A continuation, and how the untouched model reads it."""

    text: str
    """What was generated."""
    read_back: float | None
    """Mean code of the edited latents, summed over them, when the untouched model reads the prompt and the text: over
    the text's tokens. None: nothing was generated."""
    perplexity: float | None
    """Perplexity of the text under the untouched model, the prompt not counted."""
    kl: float
    """KL divergence of the edited model's next-token distribution from the untouched one's, in nats: mean over the
    last token of the prompt and those of the untouched continuation."""
    change: float
    """Mean ratio of the norms, edit to hidden state, where something was edited there; 0 where nothing was."""


@dataclass(frozen=True)
class SteeredPrompt:
    """One prompt: its continuation by the untouched model, by the edited one, and by the controls."""

    prompt: str
    """The prompt."""
    clean: Generated
    """By the untouched model."""
    steered: Generated
    """By the edited one."""
    controls: list[Generated]
    """With the directions of other latents: the same codes changed, at the same tokens, at the same norm."""
    raised: list[dict[str, Any]] = field(default_factory=list)
    """Tokens whose probability the edit raises most: ``{"token", "change"}``, mean change of the log-probability."""
    lowered: list[dict[str, Any]] = field(default_factory=list)
    """Those that it lowers most."""

    @property
    def rank(self) -> int:
        """How many controls move the next-token distribution at least as far (KL)."""
        return sum(control.kl >= self.steered.kl for control in self.controls)


@dataclass(frozen=True, repr=False)
class Steered(Result):
    """What edits of latents do to generated texts."""

    KIND: ClassVar[str] = "steered"
    SCHEMA: ClassVar[int] = 1
    PARTS: ClassVar[tuple[str, ...]] = ("prompts",)

    sae: dict[str, Any]
    """Latents, width, rule, digest, provenance."""
    model: dict[str, Any]
    """Name, digest and number type of the model."""
    hook: str
    """Where the SAE was attached."""
    edits: dict[str, str]
    """Latent → edit."""
    prompts: list[SteeredPrompt]
    """One entry per prompt."""

    def table(self) -> list[list[str]]:
        """Return a row per continuation."""
        lines = [["prompt", "by", "kl", "read back", "perplexity", "text"]]
        for each in self.prompts:
            runs = [("untouched", each.clean), ("edited", each.steered)]
            runs += [(f"control {number}", control) for number, control in enumerate(each.controls, 1)]
            for by, run in runs:
                read, lost = ("–" if value is None else decimals(value) for value in (run.read_back, run.perplexity))
                lines.append([each.prompt, by, decimals(run.kl), read, lost, run.text])
        return lines

    def caption(self) -> str:
        """Return how far the edit moves the model, compared with the controls."""
        lines = []
        for each in self.prompts:
            text = f"`{each.prompt}`: the edit is {decimals(each.steered.change)} of the hidden states' norm and moves "
            text += f"the next token by {decimals(each.steered.kl)} nats"
            if each.controls:
                text += f"; of {len(each.controls)} other latents at the same norm, {each.rank} move it as far"
            lines.append(text + ".")
        return "\n".join(lines)


@suggest_keywords
@shows_progress
def steer(
    sae: Given,
    model: str | os.PathLike[str] | LanguageModel,
    prompts: str | Sequence[str],
    edits: Edits,
    *,
    layer: int | None = None,
    hook: str | None = None,
    settings: SteerSettings = SteerSettings(),
    progress: Progress | None = None,
) -> Steered:
    """Generate from prompts with latents edited, and the same from the untouched model and with control directions.

    Parameters
    ----------
    sae
        An SAE, or the address of one.
    model
        A causal language model: what `load_model` takes.
    prompts
        One prompt or several.
    edits
        ``{latent: edit}``; see `attach`.
    layer, hook
        Where; by default where the SAE's provenance says.
    settings
        Which tokens are edited, how much is generated and how, how many controls.
    progress
        Called as ``progress("steer", done, total)`` [shown on stderr; ``False``: none].

    Returns
    -------
    Steered
        ``.prompts[0].steered.text``, next to the untouched and the control texts.

    Raises
    ------
    ConfigError
        No prompt, an empty one where the tokenizer adds no token, no edit, a prompt that leaves no room in the model's
        context, a model that is not causal, a transcoder that does not say what it predicts.

    Examples
    --------
    ::

        sk.steer(sae, "builtin", "Once upon a time", {17: 8.0})
    """
    refuse_unsplit("steer")
    value = as_sae(sae)
    changed, texts = _checked(value, prompts, edits)
    out = written_at(value, "steer")
    lm = load_language_model(model)
    if not lm.is_causal:
        raise ConfigError(f"steer: the model must generate texts; `{lm.name}` is not a causal language model.")
    target = find_hook(lm.model, place_of(value, layer=layer, hook=hook, where="steer"))
    find_hook(lm.model, out or target)  # where a transcoder writes must be there before anything runs
    encoded = [_encode(lm, text, settings.new_tokens) for text in texts]
    run = _Steering(lm, value, changed, target.name, settings)
    report, total = progress or silent, len(texts)
    found = []
    for number, (text, ids) in enumerate(zip(texts, encoded, strict=True)):
        report("steer", number, total)
        found.append(run.on(text, ids))
    report("steer", total, total)
    return Steered(
        saekit=release(),
        versions=library_versions(True),
        settings={**vars(settings)},
        sae=facts_of_sae(value),
        model=lm.info,
        hook=target.name,
        edits={str(latent): str(edit) for latent, edit in changed.items()},
        prompts=found,
        warnings=warnings_on([(name_of(value), value)], {**lm.info, "hook": target.name}, what="the model given makes"),
    )


def _checked(sae: SAE, prompts: str | Sequence[str], edits: Edits) -> tuple[Mapping[int, Edit], list[str]]:
    """Return edits and prompts, of which there must be some."""
    changed = checked_edits(sae, edits)
    texts = [prompts] if isinstance(prompts, str) else list(prompts)
    if not isinstance(changed, Mapping) or not changed:
        raise ConfigError("steer: `edits` must name the latents to edit, {17: 8.0} say; got none.")
    if not texts or not all(isinstance(text, str) for text in texts):
        raise ConfigError(f"steer: `prompts` must be a text or several; got {prompts!r}.")
    return changed, texts


def _encode(lm: LanguageModel, text: str, new_tokens: int) -> Tensor:
    """Return the tokens of a prompt, ``[1, length]``, after checking that they and the new ones fit."""
    with quiet_transformers():
        ids = lm.tokenizer(text, return_tensors="pt")["input_ids"].to(lm.device)
    if not ids.shape[1]:
        raise ConfigError(f"steer: a prompt must have at least one token; {text!r} has none.")
    if ids.shape[1] + new_tokens > lm.context:
        raise ConfigError(
            f"steer: the prompt and the new tokens must fit into the {lm.context} tokens that `{lm.name}` reads at "
            f"once; they are {ids.shape[1]} + {new_tokens}. Shorten one of them (new_tokens)."
        )
    return ids


class _Steering:
    """Everything about a steered prompt that does not depend on the prompt."""

    def __init__(
        self, lm: LanguageModel, sae: SAE, edits: Mapping[int, Edit], hook: str, settings: SteerSettings
    ) -> None:
        self.lm, self.sae, self.edits, self.hook, self.settings = lm, sae, edits, hook, settings
        self.latents = sorted(edits)
        others = other_latents(sae, self.latents, settings.controls * len(edits), settings.seed)
        groups = [others[i : i + len(edits)] for i in range(0, len(others) - len(edits) + 1, len(edits))]
        self.controls = [with_directions(sae, self.latents, written_rows(sae, group)) for group in groups]

    def on(self, prompt: str, ids: Tensor) -> SteeredPrompt:
        """Return what the edits do to one prompt."""
        whole = self._generate(ids, None)
        clean = self._log_probabilities(whole, ids.shape[1], None)[0]
        runs = []
        for sae in (None, self.sae, *self.controls):
            log_p, change = self._log_probabilities(whole, ids.shape[1], sae)
            generated = whole if sae is None else self._generate(ids, sae)
            read, lost = self._read(generated, ids.shape[1])
            kl = float((clean.exp() * (clean - log_p)).nan_to_num(0.0).sum(1).clamp_min(0).mean())
            runs.append(Generated(self._text(generated, ids), read, lost, kl, change))
            if sae is self.sae:
                moved = (log_p - clean).mean(0)
        raised, lowered = (self._tokens(sign * moved, sign) for sign in (1, -1))
        return SteeredPrompt(prompt, runs[0], runs[1], runs[2:], raised, lowered)

    def _attached(self, sae: SAE, at: str | Tensor) -> AbstractContextManager[Attached]:
        return attached(self.lm, sae, self.edits, at=at, hook=self.hook, special=self.settings.special)

    def _generate(self, ids: Tensor, sae: SAE | None) -> Tensor:
        settings = self.settings
        how: dict[str, Any] = {
            "max_new_tokens": settings.new_tokens,
            "num_beams": 1,
            "attention_mask": ids.new_ones(ids.shape),
        }
        how["do_sample"] = settings.temperature > 0
        if settings.temperature > 0:
            how["temperature"] = settings.temperature
        if self.lm.tokenizer.pad_token_id is not None:
            how["pad_token_id"] = self.lm.tokenizer.pad_token_id
        model: Any = self.lm.model
        with quiet_transformers(), torch.no_grad(), torch.random.fork_rng(devices=[]):
            torch.manual_seed(settings.seed)
            if sae is None:
                return model.generate(ids, **how)
            with self._attached(sae, settings.at):
                return model.generate(ids, **how)

    def _log_probabilities(self, whole: Tensor, n_prompt: int, sae: SAE | None) -> tuple[Tensor, float]:
        """Return log-probabilities behind the prompt and each generated token, and how large the edits were."""
        change: list[float] = []
        with torch.no_grad():
            if sae is None:
                logits = self.lm.model(input_ids=whole).logits
            else:
                with self._attached(sae, self._mask(whole.shape[1], n_prompt)) as found:
                    logits = self.lm.model(input_ids=whole).logits
                change = found.change
        log_p = logits[0, n_prompt - 1 :].float().log_softmax(-1)
        return log_p, float(sum(change) / len(change)) if change else 0.0

    def _mask(self, length: int, n_prompt: int) -> Tensor:
        column = torch.arange(length)[None]
        return {
            "all": column >= 0,
            "prompt": column < n_prompt,
            "generated": column >= n_prompt,
            "last": column == n_prompt - 1,
        }[self.settings.at]

    def _read(self, whole: Tensor, n_prompt: int) -> tuple[float | None, float | None]:
        """Return mean code and perplexity of a continuation, read by the untouched model."""
        new = whole[0, n_prompt:]
        if not len(new):
            return None, None
        hook = find_hook(self.lm.model, self.hook)
        (hidden,) = activations(self.lm.model, [hook], {"input_ids": whole})
        codes = columns_of(self.sae.encode(hidden[0, n_prompt:]), torch.tensor(self.latents, device=self.sae.device))
        with torch.no_grad():
            log_p = self.lm.model(input_ids=whole).logits[0, n_prompt - 1 : -1].float().log_softmax(-1)
        return float(codes.sum(1).mean()), float((-log_p.gather(1, new[:, None]).mean()).exp())

    def _text(self, whole: Tensor, ids: Tensor) -> str:
        decode = self.lm.tokenizer.decode
        prompt, text = (decode(each[0], skip_special_tokens=True) for each in (ids, whole))
        return text.removeprefix(prompt) if text.startswith(prompt) else decode(whole[0, ids.shape[1] :])

    def _tokens(self, moved: Tensor, sign: int) -> list[dict[str, Any]]:
        known = min(len(moved), len(self.lm.tokenizer))  # some models have rows that are no token
        values, order = moved[:known].topk(min(SHOWN, known))
        decode = self.lm.tokenizer.decode
        return [
            {"token": shown_token(decode([token])), "change": round(sign * float(value), 4)}
            for token, value in zip(order.tolist(), values, strict=True)
        ]
