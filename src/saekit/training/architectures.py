"""The table of architectures: configuration, loss, start and end of each.

An architecture is one `Architecture` row. To add one: a configuration in `saekit.training.config`, a loss in
`saekit.training.losses`, a row here.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

from ..errors import ConfigError, did_you_mean
from ..kinds import hints_of, says_none
from ..sae import rules
from ..sae.freeze import freeze_batchtopk, freeze_gated
from ..sae.model import SAE
from ..sae.naming import name_of_config
from ..sae.scaling import Scaling
from ..settings import elsewhere
from . import losses
from .config import BatchTopK, Config, Gated, HierarchicalTopK, JumpReLU, Matryoshka, PAnneal, Penalized, ReLU, TopK
from .initialization import level_of

Tensors = dict[str, Tensor]
State = dict[str, list[float] | float]
C = TypeVar("C", bound=Config)


@dataclass(frozen=True)
class Architecture(Generic[C]):
    """What the training loop needs to know about one architecture."""

    config: type[C]
    """Class of its configurations."""
    loss: Callable[[Tensors, Tensor, losses.Context[C]], losses.Outcome]
    """Its training loss."""
    finish: Callable[[C, Tensors, Tensors], SAE]
    """``(config, parameters, state) -> SAE``: the frozen value, without scaling and provenance."""
    extra: Callable[[C, Tensors, Tensor], Tensors] = lambda config, parameters, x: {}
    """Parameters beyond the four common ones, from those and centred rows ``[n, d]``; the latent axis first."""
    state: Callable[[C], State] = lambda config: {}
    """Initial running values (scalars or short vectors; none has a latent axis)."""
    rates: dict[str, float] = field(default_factory=dict)
    """Learning rate of some parameters, as a multiple of the others'."""
    unit_decoder: bool = True
    """Decoder rows are kept at length 1 (the penalty does not depend on their norms)."""
    batch_threshold: bool = False
    """The frozen SAE uses the running threshold of the batch selection."""


INITIAL_L0 = 2.0
"""Initial L0 of penalized architectures, as a multiple of `target_l0`: L0 then approaches its target from above, while
many latents still get a gradient."""

LEAST_THRESHOLD = 1e-3
"""Thresholds are trained by their logarithm: smaller ones begin here. Unit: pre-activations of scaled rows."""

TANH_THRESHOLD = 0.1
"""Initial threshold with the tanh penalty. Unit: pre-activations of scaled rows (Anthropic, January 2025)."""

TANH_L0 = 10_000
"""Initial L0 with the tanh penalty and no target (Anthropic, January 2025)."""

TANH_FRACTION = 1 / 16
"""Maximum initial L0 with the tanh penalty, as a fraction of the latents: the SAEs that 10,000 was meant for have
millions."""

SCALAR_RATE = 10.0
"""Learning rate of thresholds and gates, as a multiple of the weights': one number per latent has to travel a distance
of order 1, an entry of a weight vector of norm 1 only one of order ``1 / sqrt(d)``."""


def _finish_topk(config: TopK | HierarchicalTopK | Matryoshka, p: Tensors, state: Tensors) -> SAE:
    return _sae(p, rules.TopKRule(config.k, sign=config.sign if isinstance(config, TopK) else "positive"))


def _finish_batch(config: Config, p: Tensors, state: Tensors) -> SAE:
    sae = freeze_batchtopk(_sae(p, rules.ReLURule()), float(state["threshold"]))
    parts = getattr(config, "parts", None)
    if parts is None:
        return sae
    # What a code is worth in training is the code times these norms, so each latent has a threshold of its own.
    return sae.replace(rule=rules.JumpReLURule(float(state["threshold"]) / losses.part_norms(p["W_dec"], parts)))


def _finish_matryoshka(config: Matryoshka, p: Tensors, state: Tensors) -> SAE:
    return _finish_topk(config, p, state) if config.over == "topk" else _finish_batch(config, p, state)


def _finish_relu(config: Config, p: Tensors, state: Tensors) -> SAE:
    return _sae(p, rules.ReLURule())


def _finish_jumprelu(config: JumpReLU, p: Tensors, state: Tensors) -> SAE:
    return _sae(p, rules.JumpReLURule(p["log_threshold"].exp()))


def _finish_gated(config: Gated, p: Tensors, state: Tensors) -> SAE:
    return freeze_gated(
        W_gate=p["W_enc"],
        b_gate=p["b_enc"],
        r_mag=p["r_mag"],
        b_mag=p["b_mag"],
        W_dec=p["W_dec"],
        b_dec=p["b_dec"],
        b_pre=_subtracted(p),
        W_skip=p.get("W_skip"),
    )


def _sae(p: Tensors, rule: rules.Rule) -> SAE:
    return SAE(
        W_enc=p["W_enc"],
        b_enc=p["b_enc"],
        W_dec=p["W_dec"],
        b_dec=p["b_dec"],
        rule=rule,
        b_pre=_subtracted(p),
        W_skip=p.get("W_skip"),
    )


def _subtracted(p: Tensors) -> Tensor:
    """Return what is subtracted before the encoder: b_dec, as in the losses; a transcoder brings its own."""
    return p["b_pre"] if "b_pre" in p else p["b_dec"].clone()


def _initial_threshold(config: JumpReLU, p: Tensors, x: Tensor) -> Tensors:
    """Return one threshold for all latents, such that the initial L0 is the target on these rows.

    With `tanh` all begin at `TANH_THRESHOLD`, and a bias makes L0 twice the target, or `TANH_L0`.
    """
    if config.tanh:
        l0 = TANH_L0 if config.target_l0 is None else INITIAL_L0 * config.target_l0
        level = level_of(x, p["W_enc"], p["b_enc"], min(l0, config.n_latents * TANH_FRACTION))
        start = torch.full_like(p["b_enc"], TANH_THRESHOLD)
        return {"log_threshold": start.log(), "b_enc": start - level}
    assert config.target_l0 is not None  # without `tanh` it is required
    threshold = level_of(x, p["W_enc"], p["b_enc"], config.target_l0).clamp(min=LEAST_THRESHOLD)
    return {"log_threshold": threshold.log().expand(config.n_latents).clone()}


def _initial_bias(config: Penalized, p: Tensors, x: Tensor) -> Tensors:
    """Return, with a target, one negative bias for all latents, such that the initial L0 is near it on these rows.

    With a bias of 0 half of all latents fire at first: reconstructions are n_latents / (2 d) times too long, the bias
    has to travel far at Adam's pace, and a coefficient that chases L0 meanwhile crushes the codes.
    """
    if config.target_l0 is None or INITIAL_L0 * config.target_l0 >= config.n_latents / 2:
        return {}
    threshold = level_of(x, p["W_enc"], torch.zeros_like(p["b_enc"]), INITIAL_L0 * config.target_l0)
    return {"b_enc": (-threshold).expand(config.n_latents).clone()}


def _initial_gate(config: Gated, p: Tensors, x: Tensor) -> Tensors:
    zeros = torch.zeros_like(p["b_enc"])
    return {"r_mag": zeros, "b_mag": zeros.clone()} | _initial_bias(config, p, x)


def _threshold_state(config: Config) -> State:
    return {"threshold": 0.0, "threshold_steps": 0.0, "last_smallest": 0.0}


def _penalty_state(config: Penalized) -> State:
    return {"coefficient": config.l1, "distance": 0.0}


def _tanh_state(config: JumpReLU) -> State:
    return {"coefficient": config.tanh, "distance": 0.0} if config.tanh else {}


def _anneal_state(config: PAnneal) -> State:
    return {"coefficient": config.l1, "distance": 0.0, "penalties": [0.0, 0.0]}


_ROWS: tuple[Architecture[Any], ...] = (
    # The penalty counts decoder norms, so rows of any length are equally expensive: no need to fix them.
    Architecture(ReLU, losses.relu_loss, _finish_relu, extra=_initial_bias, state=_penalty_state, unit_decoder=False),
    Architecture(TopK, losses.topk_loss, _finish_topk),
    Architecture(HierarchicalTopK, losses.hierarchical_loss, _finish_topk),
    Architecture(BatchTopK, losses.batchtopk_loss, _finish_batch, state=_threshold_state, batch_threshold=True),
    Architecture(
        JumpReLU,
        losses.jumprelu_loss,
        _finish_jumprelu,
        extra=_initial_threshold,
        state=_tanh_state,
        rates={"log_threshold": SCALAR_RATE},
    ),
    # Unit rows: the gate's reconstruction sees a fixed decoder; shorter rows would only cheapen its penalty.
    Architecture(
        Gated,
        losses.gated_loss,
        _finish_gated,
        extra=_initial_gate,
        state=_penalty_state,
        rates={"r_mag": SCALAR_RATE, "b_mag": SCALAR_RATE},
    ),
    Architecture(
        PAnneal, losses.p_anneal_loss, _finish_relu, extra=_initial_bias, state=_anneal_state, unit_decoder=False
    ),
    Architecture(Matryoshka, losses.matryoshka_loss, _finish_matryoshka, state=_threshold_state, batch_threshold=True),
)
ARCHITECTURES: dict[str, Architecture[Any]] = {row.config.arch: row for row in _ROWS}
"""Every architecture by its name on the command line and in files."""

IN_FILES = {"n_latents": "latents"}
"""Fields that files and the command line call otherwise than Python does: those names are older."""


def config_to_dict(config: Config) -> dict[str, Any]:
    """Return a configuration as plain JSON: its ``arch`` and every field, by the names that files use."""
    fields = {IN_FILES.get(f.name, f.name): getattr(config, f.name) for f in dataclasses.fields(config)}
    plain = {name: list(value) if isinstance(value, tuple) else value for name, value in fields.items()}
    return {"arch": config.arch, **plain}


def config_from_dict(settings: Mapping[str, Any]) -> Config:
    """Return the configuration that `settings` describe: ``arch`` and fields of that architecture.

    ``latents`` (in files and on the command line) and ``n_latents`` (in Python) are the same field.

    Raises
    ------
    ConfigError
        ``arch`` is missing or unknown, a key is unknown or missing, or a value cannot work.
    """
    named = _by_field(settings)
    arch = named.pop("arch", None)
    if not isinstance(arch, str) or arch not in ARCHITECTURES:
        raise ConfigError(
            f"`arch` must be the name of an architecture; got {arch!r}. {did_you_mean(str(arch), ARCHITECTURES)}"
        )
    kind: type[Config] = ARCHITECTURES[arch].config
    fields = {f.name: f for f in dataclasses.fields(kind)}
    for name in named:
        if name not in fields:
            where = elsewhere(name, kind) or did_you_mean(name, fields)
            raise ConfigError(f"unknown setting `{name}` of {kind.__name__}. {where}")
    missing = [n for n, f in fields.items() if f.default is dataclasses.MISSING and n not in named]
    if missing:
        raise ConfigError(f"`{kind.__name__}.{missing[0]}` must be given; got {sorted(named)}. Add {missing[0]}=...")
    hints = hints_of(kind)  # type: ignore[arg-type]
    values: dict[str, Any] = {name: None if says_none(each, hints[name]) else each for name, each in named.items()}
    return kind(**values)


def _by_field(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return settings by the names of the fields in Python."""
    for name, in_file in IN_FILES.items():
        if name in settings and in_file in settings:
            raise ConfigError(f"`{in_file}` and `{name}` are the same setting; got both. Drop one of the two.")
    in_python = {in_file: name for name, in_file in IN_FILES.items()}
    return {in_python.get(name, name): value for name, value in settings.items()}


def name_of(config: Config) -> str:
    """Return ``<arch>-<latents>-<what sets the sparsity>[-<control>]``: the start of a run folder's name."""
    return name_of_config(config_to_dict(config), config.n_latents)


def scaling_of(scale: Tensor | None) -> Scaling:
    """Return the scaling value for a factor; None for no scaling."""
    return Scaling() if scale is None else Scaling("scalar", scale=scale.clone())
