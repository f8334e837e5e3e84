"""Does an SAE do on real rows what its file or card says? And if not, which misunderstanding fits?"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from math import sqrt
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..errors import ConfigError, ModelError, SaekitError, ShapeError
from ..measure.accumulators import fvu
from ..measure.reconstruction import interval_facts, measure_saes
from ..measure.results import Measured, Result
from ..measure.settings import MeasureSettings
from ..models.hooks import blocks, find_hook
from ..models.language import LanguageModel
from ..models.loading import load_model
from ..places import Warned
from ..progress import shows_progress
from ..provenance import facts_of_sae, known_place, library_versions, place_of, release, target_of
from ..rows.capture import capture
from ..rows.first_use import claims_of, doubts_about
from ..rows.opening import check_targets, target_rows
from ..rows.settings import CaptureSettings, TokenMask
from ..rows.source import Columns, Source
from ..sae.model import SAE
from ..sae.naming import Given, as_sae
from ..sae.scaling import Scaling
from ..settings import Progress, silent, suggest_keywords
from ..terminal import plain

_CLEARLY = 0.9  # an alternative is a cause when its FVU is at most this fraction of the measured one, and below 1
_MATTERS = 0.95  # above this, what is measured now is not questioned


@dataclass(frozen=True)
class Cause:
    """A misunderstanding that would explain the numbers: measured, not guessed."""

    what: str
    """What to change."""
    fvu: float
    """FVU with the change."""
    l0: float
    """Latents per row with the change."""


@dataclass(frozen=True, repr=False)
class Verification(Result):
    """What an SAE does on rows of the place that it states, compared with what its file states."""

    KIND: ClassVar[str] = "verification"
    SCHEMA: ClassVar[int] = 1

    sae: dict[str, Any]
    """Latents, width, rule, digest, provenance."""
    hook: str
    """Where the rows come from."""
    rows: dict[str, Any]
    """What the rows are."""
    n_rows: int
    """Number of rows."""
    l0: Measured
    """Mean number of active latents per row."""
    fvu: Measured
    """Fraction of variance unexplained; the mean row scores 1."""
    dead_fraction: Measured
    """Fraction of latents that never fired on these rows; falls with more rows."""
    claimed: dict[str, float]
    """What the file, its configuration or its address state: ``l0``, ``fvu``."""
    fits: bool
    """Whether the FVU is below 1 and what is claimed is met within a factor of three."""
    likely_causes: list[Cause] = field(default_factory=list)
    """Changes under which the SAE explains clearly more, best first."""

    @property
    def place(self) -> str:
        """Where the rows come from and, of a transcoder, where those are that it predicts."""
        out = self.rows.get("hook_out")
        return self.hook if out is None else f"{self.hook} to {out}"

    def table(self) -> list[list[str]]:
        """Return the measured numbers next to the claimed ones, then the causes."""
        lines = [["", "measured", "stated"]]
        for name in ("fvu", "l0", "dead_fraction"):
            stated = self.claimed.get(name)
            lines.append([name, f"{getattr(self, name)}", "–" if stated is None else f"{stated:g}"])
        return lines

    def __repr__(self) -> str:
        verdict = "fits" if self.fits else "DOES NOT FIT"
        causes = "".join(f"\n  {cause.what}: FVU {cause.fvu:.3g}, L0 {cause.l0:.3g}" for cause in self.likely_causes)
        numbers = f"FVU {self.fvu}, L0 {self.l0}, dead {self.dead_fraction}"
        shown = f"{verdict} at {self.place}: {numbers}" + (f"\nwould fit better with{causes}" if causes else "")
        return plain(shown, keep="\n")


@suggest_keywords
@shows_progress
def verify(
    sae: Given,
    model: str | os.PathLike[str] | LanguageModel,
    data: object,
    *,
    layer: int | None = None,
    hook: str | None = None,
    tokens: int = 4000,
    settings: CaptureSettings = CaptureSettings(),
    progress: Progress | None = None,
) -> Verification:
    """Measure an SAE on real rows, compare with what it claims, and try what could be wrong.

    Each likely misunderstanding is measured on the same texts: scaled rows, an input bias subtracted or not, transposed
    square matrices, rows of special tokens, neighbouring hooks; and every layer and sub-layer when the FVU is near or
    above 1, or L0 is more than three times off.

    Parameters
    ----------
    sae
        An SAE, or the address of one. A transcoder is measured against the rows that it predicts.
    model, data
        Model and texts, as `capture` takes them.
    layer, hook
        Where the rows are taken; None: where the SAE says it belongs. An SAE that says nothing is tried at every layer,
        a transcoder must be told, as ``settings.target`` tells what it predicts.
    tokens
        Number of rows.
    settings
        How the model reads the texts.
    progress
        Called as ``progress(stage, done, total)``.

    Returns
    -------
    Verification
        ``.fits``, the numbers with intervals, and ``.likely_causes``, best first.

    Raises
    ------
    ConfigError
        No layer of the model has rows of the SAE's width.
    """
    value = as_sae(sae)
    out = target_of(value, target=settings.target, where="verify")
    lm = _language_model(model, settings)
    mask = vars(TokenMask.by(value.provenance)) if settings.mask == TokenMask() else {}
    settings = replace(settings, target=None if out is None else find_hook(lm.model, out).name, **mask)
    taker = _Taker(lm, data, tokens, settings, progress or silent)
    stated = hook is not None or layer is not None or known_place(value) is not None
    place = place_of(value, layer=layer, hook=hook, where="verify") if stated else _best_layer(value, taker)
    source = _rows_for(value, taker, place)
    found = measure_saes([value], source, settings=MeasureSettings(), progress=progress)
    metrics = found.metrics(0)
    claimed = claims_of(value)
    doubts = doubts_about(metrics["fvu"], metrics["l0"], claimed)
    if not doubts and metrics["fvu"].value > _MATTERS:
        doubts.append(Warned("fvu_near_mean", f"FVU {metrics['fvu']}: almost nothing is explained"))
    causes = _likely_causes(value, taker, place, metrics["fvu"], doubts)
    if not stated:
        doubts.append(Warned("place_not_stated", f"the file names no hook; {place} fits best"))
    return Verification(
        saekit=release(),
        versions=library_versions(True),
        settings={"tokens": tokens, "intervals": interval_facts(True)},
        sae=facts_of_sae(value),
        hook=place,
        rows=dict(source.info),
        n_rows=found.n_rows,
        l0=metrics["l0"],
        fvu=metrics["fvu"],
        dead_fraction=metrics["dead_fraction"],
        claimed=claimed,
        fits=not any(doubt.code in _FAILS for doubt in doubts),
        likely_causes=causes,
        warnings=doubts,
    )


_FAILS = ("fvu_above_mean", "l0_off", "other_fits_better")


def _language_model(model: Any, settings: CaptureSettings) -> LanguageModel:
    """Return the language model that is given or named."""
    lm = model if isinstance(model, LanguageModel) else load_model(model, **settings.placement)
    if not isinstance(lm, LanguageModel):
        raise ConfigError("verify: `model` must be a language model; it is a vision model.")
    return lm


def _likely_causes(sae: SAE, taker: _Taker, place: str, now: Measured, doubts: list[Warned]) -> list[Cause]:
    """Return what would explain the numbers; what fits clearly better than numbers that nobody doubted is a doubt."""
    causes = _causes(sae, taker, place, now.value, everywhere=bool(doubts))
    if causes and not doubts:  # something near fits better: what fits best may be further away
        causes = _causes(sae, taker, place, now.value, everywhere=True)
    if causes and not any(doubt.code in _FAILS for doubt in doubts):
        message = f"the SAE explains clearly more with {causes[0].what}: FVU {causes[0].fvu:.3g}, here {now}"
        doubts.append(Warned("other_fits_better", message))
    return causes


# -------------------------------------------------------------------------------------------------------- alternatives


@dataclass(frozen=True)
class _Taker:
    """Rows of a model at any hook, of the same texts; each is taken once."""

    lm: LanguageModel
    data: Any
    tokens: int
    settings: CaptureSettings
    progress: Progress
    known: dict[str, Source] = field(default_factory=dict)

    def take(self, hooks: Sequence[str]) -> None:
        """Take the rows of several hooks in one pass of the model."""
        hooks = [hook for hook in hooks if f"{hook} {{}}" not in self.known]
        if hooks:
            found = capture(
                self.lm, self.data, hook=hooks, tokens=self.tokens, settings=self.settings, progress=self.progress
            )
            self.known.update({f"{hook} {{}}": source for hook, source in found.items()})

    def source(self, hook: str, **changed: Any) -> Source:
        """Return the rows at a hook, with some settings changed."""
        key = f"{hook} {changed}"
        if key not in self.known:
            settings = replace(self.settings, **changed)
            self.known[key] = capture(
                self.lm, self.data, hook=hook, tokens=self.tokens, settings=settings, progress=self.progress
            )
        return self.known[key]

    def rows(self, hook: str, **changed: Any) -> Columns:
        """Return the same, read."""
        return Columns.cat(list(self.source(hook, **changed).batches(4096)))


def _best_layer(sae: SAE, taker: _Taker) -> str:
    """Return the layer at which an SAE that names no place explains most."""
    if sae.is_transcoder:
        raise ConfigError(
            "verify: `layer` or `hook` must say which rows a transcoder reads; got neither, and its file names none of "
            "saekit's modules. Give hook='layers.2.mlp.input', say."
        )
    found: dict[str, float] = {}
    layers = [f"layers.{layer}" for layer in range(len(blocks(taker.lm.model)[1]))]
    taker.take(layers)
    for layer in layers:
        rows = taker.rows(layer)
        if rows.x.shape[1] == sae.d_in:
            found[layer] = _measured(sae, rows)[0]
    if not found:
        raise ConfigError(
            f"verify: the SAE reads rows of width {sae.d_in}, and no layer of the model has them. Is it of another?"
        )
    return min(found, key=lambda place: found[place])


def _measured(sae: SAE, rows: Columns) -> tuple[float, float]:
    """Return FVU and L0 of an SAE on rows."""
    codes, wanted = sae.encode(rows.x), target_rows(rows, sae)
    return fvu(wanted, sae.decode(codes, rows.x).to(wanted)), codes.l0()


def _causes(sae: SAE, taker: _Taker, place: str, now: float | None, *, everywhere: bool) -> list[Cause]:
    """Return the changes that explain clearly more; without `everywhere`, only near places are tried."""
    causes = []
    for what, changed, other in _alternatives(sae, taker, place, everywhere=everywhere):
        value, l0 = _measured(changed, other)
        if value < 1 and (now is None or value <= _CLEARLY * now):
            causes.append(Cause(what, value, l0))
    return sorted(causes, key=lambda cause: cause.fvu)


def _rows_for(sae: SAE, taker: _Taker, place: str) -> Source:
    """Return the rows of a hook; refuse those that the SAE cannot read or reconstruct."""
    source = taker.source(place)
    if source.d_in != sae.d_in:
        raise ShapeError(f"verify: rows at {place} must have width {sae.d_in}; they have {source.d_in}.")
    check_targets(sae, source, "verify")
    return source


def _alternatives(sae: SAE, taker: _Taker, place: str, *, everywhere: bool) -> Iterator[tuple[str, SAE, Columns]]:
    """Yield what could have been misunderstood, with the SAE and the rows as they would be then."""
    rows = taker.rows(place)
    readings = _other_inputs(sae, rows.x) if sae.is_transcoder else _other_readings(sae, rows.x)
    yield from ((what, changed, rows) for what, changed in readings)
    yield from ((f"{what}, at {place}", changed, rows) for what, changed in _transposed(sae))
    yield from ((what, sae, other) for what, other in _rows_elsewhere(sae, taker, place, everywhere=everywhere))
    if taker.settings.skip_special:
        try:
            yield "special tokens (BOS) among the rows", sae, taker.rows(place, skip_special=False, outliers=None)
        except SaekitError:
            return


def _rows_elsewhere(sae: SAE, taker: _Taker, place: str, *, everywhere: bool) -> Iterator[tuple[str, Columns]]:
    """Yield rows of other hooks that the SAE could read, then those that a transcoder could predict."""
    hooks = list(_other_hooks(taker.lm, place, everywhere))
    taker.take(hooks)
    for hook in hooks:
        if taker.source(hook).d_in == sae.d_in:
            yield f"rows of {hook} instead of {place}", taker.rows(hook)
    target = taker.settings.target
    for hook in [] if target is None else _other_hooks(taker.lm, target, False):
        if taker.source(place, target=hook).info["d_out"] == sae.d_out:
            yield f"rows of {hook} predicted instead of {target}", taker.rows(place, target=hook)


def _other_inputs(sae: SAE, rows: Tensor) -> Iterator[tuple[str, SAE]]:
    """Yield the transcoder with its rows scaled or centred before the encoder; what it writes stays."""
    yield "rows scaled to a mean norm of sqrt(d)", sae.replace(W_enc=sae.W_enc * (sqrt(sae.d_in) / _mean_norm(rows)))
    yield "rows scaled to a mean norm of 1", sae.replace(W_enc=sae.W_enc / _mean_norm(rows))
    mean = rows.mean(0).to(sae.dtype)
    yield "rows centred by their mean", sae.replace(b_pre=mean if sae.b_pre is None else sae.b_pre + mean)


def _mean_norm(rows: Tensor) -> float:
    return float(rows.norm(dim=1).mean())


def _other_readings(sae: SAE, rows: Tensor) -> Iterator[tuple[str, SAE]]:
    """Yield the SAE with another scaling or input bias."""
    if sae.scaling.kind == "none":
        s = torch.tensor(sqrt(sae.d_in) / _mean_norm(rows), dtype=sae.dtype)
        yield "rows scaled to a mean norm of sqrt(d)", sae.replace(scaling=Scaling("scalar", s))
        unit = torch.tensor(1 / float(rows.square().sum(1).mean().sqrt()), dtype=sae.dtype)
        yield "rows scaled to a mean square norm of 1", sae.replace(scaling=Scaling("scalar", unit))
        yield "rows standardized each by itself (layer norm)", sae.replace(scaling=Scaling("layer_norm"))
        yield "each row scaled to norm sqrt(d)", sae.replace(scaling=Scaling("row_norm"))
        mean = rows.mean(0).to(sae.dtype)
        centred = Scaling("standardize", scale=torch.ones_like(mean), mean=mean)
        yield "rows centred by their mean", sae.replace(scaling=centred)
    else:
        yield "rows not scaled", sae.replace(scaling=Scaling())
    if sae.b_pre is None:
        yield "b_dec subtracted before the encoder", sae.replace(b_pre=sae.b_dec)
    else:
        yield "nothing subtracted before the encoder", sae.replace(b_pre=None)
    norms = sae.W_dec.norm(dim=1, keepdim=True)
    if float((norms - 1).abs().max()) > 0.01:
        yield "decoder rows of length 1", sae.replace(W_dec=sae.W_dec / norms.clamp(min=1e-12))


def _transposed(sae: SAE) -> Iterator[tuple[str, SAE]]:
    """Yield the other ways round of square matrices."""
    if sae.n_latents == sae.d_in == sae.d_out:
        encoder, decoder = sae.W_enc.T.contiguous(), sae.W_dec.T.contiguous()
        yield "the encoder transposed", sae.replace(W_enc=encoder)
        yield "the decoder transposed", sae.replace(W_dec=decoder)
        yield "encoder and decoder transposed", sae.replace(W_enc=encoder, W_dec=decoder)


def _other_hooks(lm: LanguageModel, place: str, everywhere: bool) -> Iterator[str]:
    """Yield the other places of the model: layers, and what their sub-layers add; the nearest, or all of them."""
    own = find_hook(lm.model, place).layer
    for layer in range(len(blocks(lm.model)[1])):
        if everywhere or own is None or abs(layer - own) <= 1:
            sites = ("", ".mlp", ".attn") if everywhere or layer == own else ("",)
            for hook in (f"layers.{layer}{site}" for site in sites):
                with suppress(ModelError):  # the family has no such place, or it is not what the sub-layer adds
                    if find_hook(lm.model, hook).name != place:
                        yield hook
