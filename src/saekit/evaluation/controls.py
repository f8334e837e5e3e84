"""Which controls each SAE is compared with: an untrained SAE, one with a frozen decoder where there is one, and PCA.

Transcoders are compared with the best affine maps instead: an untrained decoder, or one of components of the rows, has
nothing to do with what they predict.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch

from ..measure.controls import (
    Reconstructor,
    affine_reconstructor,
    latents_used,
    pca_reconstructor,
    reconstructor_of,
    untrained_like,
)
from ..measure.reconstruction import Calibration
from ..sae.digest import bytes_of
from ..sae.model import SAE
from ..sae.naming import shape_of, training_config
from ..sae.rules import TopKRule


@dataclass(frozen=True)
class Reconstructors:
    """Everything that is measured, without repeats: SAEs may share a control, and one may be the control of another."""

    reconstructors: list[Reconstructor]
    """The SAEs, in order, then the controls."""
    controls: list[dict[str, int]]
    """Per SAE: by label the index of each of its controls."""

    _made: dict[tuple[Any, ...], int] = field(default_factory=dict)

    def add(self, sae: int, label: str, key: tuple[object, ...], make: Callable[[], Reconstructor]) -> None:
        """Give an SAE a control: the one made for an equal key, or a new one."""
        if key not in self._made:
            self.reconstructors.append(make())
            self._made[key] = len(self.reconstructors) - 1
        self.controls[sae][label] = self._made[key]


def with_controls(
    named: Sequence[tuple[str, SAE]], frozen: SAE | None, calibration: Calibration | None, seed: int
) -> Reconstructors:
    """Return SAEs and their controls.

    Parameters
    ----------
    named
        SAEs with their names.
    frozen
        An SAE trained with a frozen decoder; None: one among the SAEs whose provenance says so.
    calibration
        What controls are made from; None for no controls.
    seed
        Random seed of the untrained SAEs.
    """
    found = Reconstructors([reconstructor_of(name, sae) for name, sae in named], [{} for _ in named])
    if calibration is None:
        return found
    frozen_at = _frozen_among(named)
    for at, (_, sae) in enumerate(named):
        with torch.no_grad():
            l0 = sae.encode(calibration.sample).l0()
        if not sae.is_transcoder:
            key = ("untrained", *_control_key(sae, l0))
            found.add(at, "untrained", key, partial(_untrained, sae, calibration, l0, seed))
        if frozen is not None:
            make = partial(reconstructor_of, "frozen-decoder", frozen, shape_of(frozen))
            found.add(at, "frozen-decoder", ("frozen",), make)
        elif at not in frozen_at and frozen_at:
            found.controls[at]["frozen-decoder"] = _most_similar(sae, [(j, named[j][1]) for j in frozen_at])
        k = max(1, min(sae.d_in, sae.d_out, round(l0)))
        about = {"fitted_on": calibration.about}
        if calibration.linear is not None:
            for name, best in (("linear", calibration.linear.take(k)), ("affine", calibration.linear)):
                found.add(at, name, (name, len(best.decoder)), partial(affine_reconstructor, name, best, about))
        if calibration.pca is not None:
            found.add(at, "pca", ("pca", k), partial(pca_reconstructor, calibration.pca.take(k), about))
    return found


def _frozen_among(named: Sequence[tuple[str, SAE]]) -> list[int]:
    """Return the indices of the SAEs that were trained with a frozen decoder."""
    return [at for at, (_, sae) in enumerate(named) if training_config(sae).get("control") == "frozen-decoder"]


def _control_key(sae: SAE, l0: float) -> tuple[Any, ...]:
    """SAEs with equal keys share their untrained control: shape, rule, scaling and the L0 to match."""
    scaling = (str(sae.scaling.settings()), *(bytes(bytes_of(tensor)) for tensor in sae.scaling.tensors().values()))
    group = id(sae) if sae.rule.name == "groupmax" else 0
    settings = sae.rule.settings()
    if isinstance(sae.rule, TopKRule):
        settings["k"] = latents_used(l0, sae.n_latents)
    return sae.n_latents, sae.rule.name, str(settings), group, scaling, sae.dtype, None if settings else round(l0, 3)


def _untrained(sae: SAE, calibration: Calibration, l0: float, seed: int) -> Reconstructor:
    blank = untrained_like(sae, calibration.mean, calibration.sample, l0, seed)
    about: dict[str, Any] = {
        "made": "random unit directions about the mean row; one factor and a bias of the decoder by least squares",
        "factor": float(blank.W_dec[0].norm()),
        "seed": seed,
        "fitted_on": calibration.about,
    }
    if "threshold" in blank.rule.tensors():
        about["threshold"] = float(blank.rule.tensors()["threshold"][0])
    return reconstructor_of("untrained", blank, shape_of(blank) | about)


def _most_similar(sae: SAE, others: list[tuple[int, SAE]]) -> int:
    """Return the index of the SAE that is most like `sae` in shape and rule, the first of equals."""

    def likeness(item: tuple[int, SAE]) -> tuple[bool, bool, bool, int]:
        index, other = item
        same_k = other.rule.settings() == sae.rule.settings()
        return (other.n_latents == sae.n_latents, other.rule.name == sae.rule.name, same_k, -index)

    return max(others, key=likeness)[0]
