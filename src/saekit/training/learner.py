"""A learner: one SAE in training, as a value that a step changes in place.

`saekit.training.step` has the step in plain torch, `saekit.training.fused` the fast one.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch
from torch import Tensor

from .. import kernels
from ..rows.joined import ScaledRows
from ..rows.source import Source
from ..sae.model import SAE
from ..sae.scaling import Scaling
from .architectures import ARCHITECTURES, scaling_of
from .config import Config, Selecting, encoder_length
from .defaults import ResolvedConfig
from .initialization import Targets, initial_transcoder, initial_weights, principal_directions
from .mesh import ALONE, SHARED, Mesh, gathered

GENERATORS = ("init", "data", "resample")
"""Random streams of a learner: initial weights; sizes drawn during training; rows that dead latents are pointed at.
Each has a generator of its own, so that a draw from one leaves the others as they are."""


@dataclass
class Learner:
    """Everything that changes while one SAE is trained. Every tensor has the latent axis first, except biases of
    width d_in.
    """

    config: Config
    seed: int
    resolved: ResolvedConfig
    center: Tensor
    """Subtracted from scaled rows before the loss, ``[d_in]``: the initial `b_dec` of an SAE."""
    scale: Tensor | None
    """Factor ``[]`` from rows to scaled rows; None for none."""
    parameters: dict[str, Tensor]
    """fp32 master weights."""
    first_moments: dict[str, Tensor]
    """Adam's running mean of the gradient, by parameter."""
    second_moments: dict[str, Tensor]
    """Adam's running mean of the squared gradient, by parameter."""
    rows_since_fired: Tensor
    """Rows seen since each latent last fired, ``[n_latents]`` int64."""
    state: dict[str, Tensor]
    """Running values of the loss."""
    generators: dict[str, torch.Generator]
    step: int = 0
    """Steps done."""
    peers: list[Learner] = field(default_factory=list, repr=False, compare=False)
    """The other seeds of the configuration, where `mutual` ties them together."""
    mesh: Mesh = field(default=ALONE, repr=False, compare=False)
    """The ranks that train it together; tensors with a latent axis are then this rank's shards."""
    anchor: Tensor | None = None
    """The initial decoder rows ``[n_latents, d_out]``, where they are soft-frozen."""
    target_center: Tensor | None = None
    """Subtracted from scaled targets before the loss, ``[d_out]``; None of an SAE, which has none."""
    target_scale: Tensor | None = None
    """Factor ``[]`` from targets to scaled targets; None for none."""

    @property
    def device(self) -> torch.device:
        """Device of the weights."""
        return self.center.device

    @property
    def is_transcoder(self) -> bool:
        """Whether it is trained to give other rows than those that it reads."""
        return self.target_center is not None

    @property
    def output_scale(self) -> Tensor | None:
        """Factor ``[]`` of the rows that it must give; None for none."""
        return self.target_scale if self.is_transcoder else self.scale

    def goal(self, target: Tensor | None) -> Tensor | None:
        """Return targets ``[n, d_out]`` scaled and centred; None of an SAE, whatever the rows come with."""
        if self.target_center is None or target is None:
            return None
        return (target if self.target_scale is None else target * self.target_scale) - self.target_center

    @property
    def rows_seen(self) -> int:
        """Number of rows in the steps done."""
        return self.step * self.resolved.batch_rows


def generator(seed: int, name: str) -> torch.Generator:
    """Return the random stream `name` of a seed; streams of neighbouring seeds are unrelated."""
    # This text decides every number that is drawn: changing it changes all results.
    digest = hashlib.sha256(f"saekit.train {name} {seed}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "little"))


def initialize_learner(
    config: Config,
    seed: int,
    resolved: ResolvedConfig,
    *,
    bias: Tensor,
    scale: Tensor | None,
    sample: Tensor,
    device: torch.device | str,
    targets: Targets | None = None,
) -> Learner:
    """Return a learner before its first step.

    Parameters
    ----------
    config
        Configuration of an architecture.
    seed
        Random seed of the initial weights and of every later draw.
    resolved
        From `resolve`.
    bias
        Initial `b_dec` in the units of the rows, ``[d_in]``; of a transcoder what it subtracts from them.
    scale
        From `initial_scale`.
    sample
        Some rows ``[n, d_in]`` in their own units, for initial thresholds.
    device
        Device to train on.
    targets
        What a transcoder must give; None for an SAE.
    """
    streams = {name: generator(seed, name) for name in GENERATORS}
    center = bias if scale is None else bias * scale
    # On the CPU, and moved only then: the same seed gives the same weights on every device.
    row = ARCHITECTURES[config.arch]
    scaled = sample if scale is None else sample * scale
    if targets is None:
        like = scaled if config.control in _RANDOM_DECODER else None
        span = None if config.subspace is None else principal_directions(scaled, config.subspace)
        parameters = initial_weights(config.n_latents, len(bias), streams["init"], like, span)
        parameters["b_dec"] = center.clone()
    else:
        parameters = _transcoder_weights(config, bias, scale, scaled, targets, streams["init"])
    if isinstance(config, Selecting):
        parameters["W_enc"] *= encoder_length(config)
    parameters |= row.extra(config, parameters, scaled - center)
    parameters = {name: kernels.moved_to_large_pages(t.to(device)) for name, t in parameters.items()}
    first, second = (
        {name: kernels.moved_to_large_pages(torch.zeros_like(t)) for name, t in parameters.items()} for _ in range(2)
    )
    state = {name: torch.tensor(value, dtype=torch.float32, device=device) for name, value in row.state(config).items()}
    return Learner(
        config=config,
        seed=seed,
        resolved=resolved,
        center=center.to(device),
        scale=None if scale is None else scale.to(device),
        parameters=parameters,
        first_moments=first,
        second_moments=second,
        rows_since_fired=torch.zeros(config.n_latents, dtype=torch.int64, device=device),
        state=state,
        generators=streams,
        anchor=anchor_of(config, parameters["W_dec"]),
        target_center=None if targets is None else targets.scaled(targets.bias).to(device),
        target_scale=None if targets is None or targets.scale is None else targets.scale.to(device),
    )


_RANDOM_DECODER = ("frozen-decoder", "soft-frozen-decoder")


def _transcoder_weights(
    config: Config,
    bias: Tensor,
    scale: Tensor | None,
    scaled: Tensor,
    targets: Targets,
    stream: torch.Generator,
) -> dict[str, Tensor]:
    """Return the parameters of a transcoder before its first step, from scaled rows ``[n, d_in]``."""
    y = targets.scaled(targets.sample)
    widths = scaled.shape[1], y.shape[1]
    like = y if config.control in _RANDOM_DECODER else None
    spans = None
    if config.subspace is not None:
        spans = principal_directions(scaled, config.subspace), principal_directions(y, config.subspace)
    weights = initial_transcoder(config.n_latents, widths, stream, like, spans)
    weights["b_dec"] = targets.scaled(targets.bias).clone()
    if config.skip == "zero":
        weights["W_skip"] = torch.zeros(widths)
    elif config.skip is not None:
        assert targets.affine is not None  # it is computed for whoever has a skip path
        W, b = targets.affine
        weights["W_skip"] = targets.scaled(W) if scale is None else targets.scaled(W) / scale
        weights["b_dec"] = targets.scaled(bias @ W + b)
    return weights


def anchor_of(config: Config, W_dec: Tensor) -> Tensor | None:
    """Return a copy of the initial decoder rows where they are soft-frozen."""
    return W_dec.clone() if config.control == "soft-frozen-decoder" else None


def latent_parameters(learner: Learner) -> list[str]:
    """Return the names of the parameters with a latent axis."""
    return [name for name in learner.parameters if name not in SHARED]


def shard(learner: Learner, mesh: Mesh) -> None:
    """Leave a whole learner with the latents of this rank, in place."""
    own = mesh.latents_of(learner.config.n_latents)
    names = latent_parameters(learner)
    for tensors in (learner.parameters, learner.first_moments, learner.second_moments):
        tensors |= {name: tensors[name][own].clone() for name in names}
    learner.rows_since_fired = learner.rows_since_fired[own].clone()
    learner.anchor = None if learner.anchor is None else learner.anchor[own].clone()
    learner.mesh = mesh


def whole(learner: Learner) -> Learner:
    """Return a learner with the latents of all ranks, which have to call this together."""
    mesh = learner.mesh
    if mesh.latent_size == 1:
        return learner
    names = latent_parameters(learner)

    def joined(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        return {name: gathered(mesh, t) if name in names else t for name, t in tensors.items()}

    return replace(
        learner,
        parameters=joined(learner.parameters),
        first_moments=joined(learner.first_moments),
        second_moments=joined(learner.second_moments),
        rows_since_fired=gathered(mesh, learner.rows_since_fired),
        anchor=None if learner.anchor is None else gathered(mesh, learner.anchor),
        mesh=ALONE,
    )


def permute(learner: Learner, order: Tensor) -> Learner:
    """Return the same learner with new latent j = old latent ``order[j]``: parameters, both moments and the counter.

    The random streams are shared with the old learner; continue with one of the two only.
    """
    names = latent_parameters(learner)

    def move(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        return {name: t[order] if name in names else t.clone() for name, t in tensors.items()}

    values = {f.name: getattr(learner, f.name) for f in fields(learner)}
    values |= {name: move(values[name]) for name in ("parameters", "first_moments", "second_moments")}
    values |= {"rows_since_fired": learner.rows_since_fired[order], "state": dict(learner.state)}
    values["anchor"] = None if learner.anchor is None else learner.anchor[order]
    return Learner(**values)


def finish(learner: Learner, provenance: dict[str, Any]) -> SAE:
    """Return the learner as an SAE: the training rule frozen into one that works row by row."""
    row = ARCHITECTURES[learner.config.arch]
    parameters = {name: t.detach().clone() for name, t in learner.parameters.items()}
    if not learner.is_transcoder:
        sae = row.finish(learner.config, parameters, learner.state)
        return sae.replace(scaling=scaling_of(learner.scale), provenance=provenance)
    center = learner.center.clone()
    if "W_skip" in parameters:  # an SAE's skip path takes rows that are not centred
        parameters["b_dec"] = parameters["b_dec"] - center @ parameters["W_skip"]
    sae = row.finish(learner.config, {**parameters, "b_pre": center}, learner.state)
    return _with_output_scale(sae, learner.scale, learner.target_scale).replace(
        provenance={**provenance, "transcoder": True}
    )


def unscaled(sae: SAE, source: Source) -> SAE:
    """Return an SAE that was trained on rows after a scaling (`ScaledRows`) as one of the rows before it."""
    if not isinstance(source, ScaledRows):
        return sae
    first = source.scaling
    assert first.scale is not None
    scale = first.scale.to(sae.device)
    if sae.scaling.scale is not None:
        scale = scale * sae.scaling.scale
    mean = None if first.mean is None else first.mean.to(sae.device)
    return sae.replace(scaling=Scaling("standardize", scale=scale, mean=mean))


def _with_output_scale(sae: SAE, scale: Tensor | None, target_scale: Tensor | None) -> SAE:
    """Return a transcoder of scaled rows and targets as one of their own units.

    An SAE has one scale: that of the targets, so that decoder rows keep their length and codes their size; what the
    rows are scaled by otherwise goes into what reads them.
    """
    assert sae.b_pre is not None
    ratio = torch.ones_like(sae.b_dec[0]) if scale is None else scale
    ratio = ratio if target_scale is None else ratio / target_scale
    return sae.replace(
        W_enc=sae.W_enc * ratio,
        b_pre=sae.b_pre / ratio,
        W_skip=None if sae.W_skip is None else sae.W_skip * ratio,
        scaling=scaling_of(target_scale),
    )


def tensors_of(learner: Learner) -> dict[str, Tensor]:
    """Return everything that a checkpoint must hold, by name."""
    groups = {
        "parameters": learner.parameters,
        "first": learner.first_moments,
        "second": learner.second_moments,
        "state": learner.state,
        "generator": {name: stream.get_state() for name, stream in learner.generators.items()},
        "": {"rows_since_fired": learner.rows_since_fired, "center": learner.center},
    }
    if learner.scale is not None:
        groups[""]["scale"] = learner.scale
    optional = {name: getattr(learner, name) for name in ("anchor", "target_center", "target_scale")}
    groups[""] |= {name: t for name, t in optional.items() if t is not None}
    return {f"{group}.{name}".lstrip("."): t for group, tensors in groups.items() for name, t in tensors.items()}


def restore(learner: Learner, tensors: dict[str, Tensor], step: int) -> None:
    """Put back what `tensors_of` returned, in place."""

    def fresh(name: str) -> Tensor:
        # New memory: a file's bytes lie at any address, and sums over unaligned memory can round in another order.
        return tensors[name].to(learner.device, copy=True)

    def group(prefix: str, now: dict[str, Tensor]) -> dict[str, Tensor]:
        return {name: fresh(f"{prefix}.{name}") for name in now}  # in the same order: sums over parameters depend on it

    learner.parameters, learner.state = group("parameters", learner.parameters), group("state", learner.state)
    learner.first_moments = group("first", learner.first_moments)
    learner.second_moments = group("second", learner.second_moments)
    for name, stream in learner.generators.items():
        stream.set_state(tensors[f"generator.{name}"].cpu().clone())
    learner.rows_since_fired, learner.center = fresh("rows_since_fired"), fresh("center")
    learner.scale = fresh("scale") if "scale" in tensors else None
    for name in ("anchor", "target_center", "target_scale"):
        setattr(learner, name, fresh(name) if name in tensors else None)
    learner.step = step
