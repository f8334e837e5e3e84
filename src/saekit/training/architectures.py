"""The table of architectures: configuration, loss, start and end of each.

An architecture is one `Architecture` row. To add one: a configuration in `saekit.training.config`, a loss in
`saekit.training.losses`, a row here.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..errors import ConfigError, did_you_mean
from ..sae import rules
from ..sae.freeze import freeze_batchtopk, freeze_gated
from ..sae.model import SAE
from ..sae.scaling import Scaling
from . import losses
from .config import BatchTopK, Config, Gated, HierarchicalTopK, JumpReLU, Matryoshka, PAnneal, ReLU, TopK
from .initialization import level_of

Tensors = dict[str, Tensor]


@dataclass(frozen=True)
class Architecture:
    """What the training loop needs to know about one architecture."""

    config: type[Any]
    """Its configuration."""
    loss: Callable[[Tensors, Tensor, losses.Context], losses.Outcome]
    """Its objective."""
    finish: Callable[[Any, Tensors, Tensors, dict[str, Any]], SAE]
    """``(config, parameters, state, fields of SAE) -> SAE``: the frozen value."""
    extra: Callable[[Any, Tensors, Tensor], Tensors] = lambda config, parameters, x: {}
    """Parameters beyond the four common ones, from those and centred rows ``[n, d]``; the latent axis first."""
    state: Callable[[Any], dict[str, list[float] | float]] = lambda config: {}
    """First running values (scalars or short vectors; none has a latent axis)."""
    rates: dict[str, float] = field(default_factory=dict)
    """Learning rate of some parameters, as a multiple of the others'."""
    unit_decoder: bool = True
    """Decoder rows are kept at length 1 (the penalty does not see their norms)."""
    batch_threshold: bool = False
    """The frozen SAE uses the running threshold of the batch selection."""


def _finish_topk(config: Any, p: Tensors, state: Tensors, fields: dict[str, Any]) -> SAE:
    return SAE(**_common(p), rule=rules.TopKRule(config.k), **fields)


def _finish_batch(config: Any, p: Tensors, state: Tensors, fields: dict[str, Any]) -> SAE:
    sae = SAE(**_common(p), rule=rules.ReLURule(), **fields)
    return freeze_batchtopk(sae, float(state["threshold"]))


def _finish_matryoshka(config: Matryoshka, p: Tensors, state: Tensors, fields: dict[str, Any]) -> SAE:
    return (_finish_topk if config.over == "topk" else _finish_batch)(config, p, state, fields)


def _finish_relu(config: Any, p: Tensors, state: Tensors, fields: dict[str, Any]) -> SAE:
    return SAE(**_common(p), rule=rules.ReLURule(), **fields)


def _finish_jumprelu(config: Any, p: Tensors, state: Tensors, fields: dict[str, Any]) -> SAE:
    return SAE(**_common(p), rule=rules.JumpReLURule(p["log_threshold"].exp()), **fields)


def _finish_gated(config: Any, p: Tensors, state: Tensors, fields: dict[str, Any]) -> SAE:
    weights = {"W_gate": p["W_enc"], "b_gate": p["b_enc"], "r_mag": p["r_mag"], "b_mag": p["b_mag"]}
    return freeze_gated(**weights, W_dec=p["W_dec"], b_dec=p["b_dec"], b_pre=p["b_dec"].clone(), **fields)


def _common(p: Tensors) -> dict[str, Any]:
    return {name: p[name] for name in ("W_enc", "b_enc", "W_dec", "b_dec")} | {"b_pre": p["b_dec"].clone()}


def _start_threshold(config: JumpReLU, p: Tensors, x: Tensor) -> Tensors:
    """One threshold for all latents, such that the first L0 is the target on these rows."""
    threshold = level_of(x, p["W_enc"], p["b_enc"], config.target_l0).clamp(min=1e-3)
    return {"log_threshold": threshold.log().expand(config.n_latents).clone()}


START_L0 = 2.0
"""First L0 of penalized architectures, as a multiple of `target_l0`."""


def _start_sparse(config: Any, p: Tensors, x: Tensor) -> Tensors:
    """With a target: one negative bias for all latents, such that the first L0 is near it on these rows.

    With a bias of 0 half of all latents fire at first: reconstructions are n_latents / (2 d) times too long, the bias
    has to travel far at Adam's pace, and a coefficient that chases L0 meanwhile crushes the codes.
    """
    if config.target_l0 is None or START_L0 * config.target_l0 >= config.n_latents / 2:
        return {}
    threshold = level_of(x, p["W_enc"], torch.zeros_like(p["b_enc"]), START_L0 * config.target_l0)
    return {"b_enc": (-threshold).expand(config.n_latents).clone()}


def _start_gate(config: Gated, p: Tensors, x: Tensor) -> Tensors:
    zeros = torch.zeros_like(p["b_enc"])
    return {"r_mag": zeros, "b_mag": zeros.clone()} | _start_sparse(config, p, x)


def _threshold_state(config: Any) -> dict[str, list[float] | float]:
    return {"threshold": 0.0, "threshold_steps": 0.0, "last_smallest": 0.0}


def _penalty_state(config: Any) -> dict[str, list[float] | float]:
    return {"coefficient": config.l1, "distance": 0.0}


def _anneal_state(config: PAnneal) -> dict[str, list[float] | float]:
    return {"coefficient": config.l1, "distance": 0.0, "penalties": [0.0, 0.0]}


ARCHITECTURES: dict[str, Architecture] = {
    row.config.arch: row
    for row in (
        Architecture(
            ReLU, losses.relu_loss, _finish_relu, extra=_start_sparse, state=_penalty_state, unit_decoder=False
        ),
        Architecture(TopK, losses.topk_loss, _finish_topk),
        Architecture(HierarchicalTopK, losses.hierarchical_loss, _finish_topk),
        Architecture(BatchTopK, losses.batchtopk_loss, _finish_batch, state=_threshold_state, batch_threshold=True),
        Architecture(
            JumpReLU, losses.jumprelu_loss, _finish_jumprelu, extra=_start_threshold, rates={"log_threshold": 10.0}
        ),
        # Unit rows: the gate's reconstruction sees a fixed decoder; shorter rows would only cheapen its penalty.
        Architecture(
            Gated,
            losses.gated_loss,
            _finish_gated,
            extra=_start_gate,
            state=_penalty_state,
            rates={"r_mag": 10.0, "b_mag": 10.0},
        ),
        Architecture(
            PAnneal, losses.p_anneal_loss, _finish_relu, extra=_start_sparse, state=_anneal_state, unit_decoder=False
        ),
        Architecture(
            Matryoshka, losses.matryoshka_loss, _finish_matryoshka, state=_threshold_state, batch_threshold=True
        ),
    )
}
"""Every architecture by its name on the command line and in files."""


IN_FILES = {"n_latents": "latents"}
"""Fields that files and the command line call otherwise than Python does: those names are older."""


def config_to_dict(config: Config) -> dict[str, Any]:
    """Return a configuration as plain JSON: its ``arch`` and every field, by the names that files use."""
    fields = {IN_FILES.get(f.name, f.name): getattr(config, f.name) for f in dataclasses.fields(config)}
    plain = {name: list(value) if isinstance(value, tuple) else value for name, value in fields.items()}
    return {"arch": config.arch, **plain}


def config_from_dict(settings: Mapping[str, Any]) -> Any:
    """Return the configuration that `settings` describe: ``arch`` and fields of that architecture.

    ``latents`` (in files and on the command line) and ``n_latents`` (in Python) are the same field.

    Raises
    ------
    ConfigError
        ``arch`` is missing or unknown, a key is unknown or missing, or a value cannot work.
    """
    in_python = {name: field for field, name in IN_FILES.items()}
    for name, own in in_python.items():
        if name in settings and own in settings:
            raise ConfigError(f"`{name}` and `{own}` are the same setting; got both. Drop one of the two.")
    settings = {in_python.get(name, name): value for name, value in settings.items()}
    arch = settings.pop("arch", None)
    if not isinstance(arch, str) or arch not in ARCHITECTURES:
        raise ConfigError(
            f"`arch` must be the name of an architecture; got {arch!r}. {did_you_mean(str(arch), ARCHITECTURES)}"
        )
    kind = ARCHITECTURES[arch].config
    fields = {f.name: f for f in dataclasses.fields(kind)}
    for name in settings:
        if name not in fields:
            raise ConfigError(f"unknown setting `{name}` of {kind.__name__}. {did_you_mean(name, fields)}")
    missing = [n for n, f in fields.items() if f.default is dataclasses.MISSING and n not in settings]
    if missing:
        raise ConfigError(f"`{kind.__name__}.{missing[0]}` must be given; got {sorted(settings)}. Add {missing[0]}=...")
    return kind(**settings)


def name_of(config: Any) -> str:
    """``<arch>-<latents>-<what sets the sparsity>[-<control>]``: the start of a run folder's name."""
    if getattr(config, "k", None) is not None:
        sparsity = f"k{config.k}"
    elif config.target_l0 is not None:
        sparsity = f"l0-{config.target_l0:g}"
    else:
        sparsity = f"l1-{config.l1:g}"
    parts = [config.arch, str(config.n_latents), sparsity, *([config.control] if config.control else [])]
    parts += [f"mutual{config.mutual:g}"] if config.mutual else []
    return "-".join(parts)


def scaling_of(scale: Tensor | None) -> Scaling:
    """The scaling value for a factor; None for no scaling."""
    return Scaling() if scale is None else Scaling("scalar", scale=scale.clone())
