"""Sparse autoencoders from training to report.

The public names; each is imported from its room when it is first used, so that ``import saekit`` is cheap and loads
none of torch, transformers, datasets, scikit-learn or typer::

    import saekit as sk

    rows = sk.capture("builtin", "builtin", layer=2, tokens=200_000)
    saes = sk.train(sk.TopK(n_latents=1024, k=16), rows, seeds=[0, 1])
    sk.evaluate(saes, rows)
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from .version import __version__

if TYPE_CHECKING:
    from .classification.model_answers import Actions as Actions
    from .classification.model_answers import act as act
    from .classification.model_answers import cloze_task as cloze_task
    from .classification.model_answers import read_task as read_task
    from .classification.result import Classification as Classification
    from .classification.run import classify as classify
    from .classification.text_classifier import load_classifier as load_classifier
    from .classification.transfer import held_out as held_out
    from .classification.transfer import transfer as transfer
    from .classification.transfer import transfer_features as transfer_features
    from .classification.transfer_result import Transfer as Transfer
    from .comparison.consensus import consensus as consensus
    from .comparison.orphans import Orphans as Orphans
    from .comparison.orphans import orphans as orphans
    from .comparison.orphans import principal_angles as principal_angles
    from .comparison.result import Comparison as Comparison
    from .comparison.run import compare as compare
    from .comparison.run import with_stability as with_stability
    from .errors import BusyError as BusyError
    from .errors import ConfigError as ConfigError
    from .errors import DataError as DataError
    from .errors import FormatError as FormatError
    from .errors import MissingExtraError as MissingExtraError
    from .errors import ModelError as ModelError
    from .errors import NonFiniteError as NonFiniteError
    from .errors import OfflineError as OfflineError
    from .errors import SaekitError as SaekitError
    from .errors import ShapeError as ShapeError
    from .estimators.binarize import Binarize as Binarize
    from .estimators.features import HiddenStates as HiddenStates
    from .estimators.features import SAEFeatures as SAEFeatures
    from .estimators.select import SelectLatents as SelectLatents
    from .evaluation.result import Evaluation as Evaluation
    from .evaluation.run import evaluate as evaluate
    from .inputs.images import read_images as read_images
    from .inputs.texts import read_texts as read_texts
    from .matching.matching import match_latents as match_latents
    from .measure.importance import importance as importance
    from .measure.results import Measured as Measured
    from .models.loading import load_model as load_model
    from .rows.arrays import ArrayRows as ArrayRows
    from .rows.capture import capture as capture
    from .rows.settings import CaptureSettings as CaptureSettings
    from .rows.shards import ShardRows as ShardRows
    from .rows.shards import open_rows as open_rows
    from .rows.source import Batch as Batch
    from .rows.source import Source as Source
    from .rows.stream import stream as stream
    from .rows.synthetic import SyntheticRows as SyntheticRows
    from .sae.codes import Codes as Codes
    from .sae.model import SAE as SAE
    from .sae.scaling import Scaling as Scaling
    from .sizes.attribution import attribution as attribution
    from .sizes.power_law import power_law as power_law
    from .sizes.prune import prune as prune
    from .sizes.ranking import rank as rank
    from .sizes.size_curve import SizeCurve as SizeCurve
    from .sizes.size_curve import measure_sizes as measure_sizes
    from .store.native import describe as describe
    from .store.native import load as load
    from .store.native import save as save
    from .training.config import BatchTopK as BatchTopK
    from .training.config import Gated as Gated
    from .training.config import HierarchicalTopK as HierarchicalTopK
    from .training.config import JumpReLU as JumpReLU
    from .training.config import Matryoshka as Matryoshka
    from .training.config import PAnneal as PAnneal
    from .training.config import ReLU as ReLU
    from .training.config import TopK as TopK
    from .training.loop import train as train
    from .training.loop import untrained as untrained

# Module of a room -> the public names that it defines.
_NAMES: dict[str, tuple[str, ...]] = {
    "classification.model_answers": (
        "Actions",
        "act",
        "cloze_task",
        "read_task",
    ),
    "classification.result": ("Classification",),
    "classification.run": ("classify",),
    "classification.text_classifier": ("load_classifier",),
    "classification.transfer": (
        "held_out",
        "transfer",
        "transfer_features",
    ),
    "classification.transfer_result": ("Transfer",),
    "comparison.consensus": ("consensus",),
    "comparison.orphans": (
        "Orphans",
        "orphans",
        "principal_angles",
    ),
    "comparison.result": ("Comparison",),
    "comparison.run": (
        "compare",
        "with_stability",
    ),
    "errors": (
        "BusyError",
        "ConfigError",
        "DataError",
        "FormatError",
        "MissingExtraError",
        "ModelError",
        "NonFiniteError",
        "OfflineError",
        "SaekitError",
        "ShapeError",
    ),
    "estimators.binarize": ("Binarize",),
    "estimators.features": (
        "HiddenStates",
        "SAEFeatures",
    ),
    "estimators.select": ("SelectLatents",),
    "evaluation.result": ("Evaluation",),
    "evaluation.run": ("evaluate",),
    "inputs.images": ("read_images",),
    "inputs.texts": ("read_texts",),
    "matching.matching": ("match_latents",),
    "measure.importance": ("importance",),
    "measure.results": ("Measured",),
    "models.loading": ("load_model",),
    "rows.arrays": ("ArrayRows",),
    "rows.capture": ("capture",),
    "rows.settings": ("CaptureSettings",),
    "rows.shards": (
        "ShardRows",
        "open_rows",
    ),
    "rows.source": (
        "Batch",
        "Source",
    ),
    "rows.stream": ("stream",),
    "rows.synthetic": ("SyntheticRows",),
    "sae.codes": ("Codes",),
    "sae.model": ("SAE",),
    "sae.scaling": ("Scaling",),
    "sizes.attribution": ("attribution",),
    "sizes.power_law": ("power_law",),
    "sizes.prune": ("prune",),
    "sizes.ranking": ("rank",),
    "sizes.size_curve": (
        "SizeCurve",
        "measure_sizes",
    ),
    "store.native": (
        "describe",
        "load",
        "save",
    ),
    "training.config": (
        "BatchTopK",
        "Gated",
        "HierarchicalTopK",
        "JumpReLU",
        "Matryoshka",
        "PAnneal",
        "ReLU",
        "TopK",
    ),
    "training.loop": (
        "train",
        "untrained",
    ),
}
_HOMES = {name: module for module, names in _NAMES.items() for name in names}

__all__ = ["__version__", *_HOMES]


def __getattr__(name: str) -> Any:
    """Import a public name from its room at first use (PEP 562)."""
    try:
        module = _HOMES[name]
    except KeyError:
        raise AttributeError(f"module `saekit` has no attribute `{name}`") from None
    value = getattr(importlib.import_module(f".{module}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
