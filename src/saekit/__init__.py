"""Sparse autoencoders from training to report.

The public names; each is imported from its room when it is first used, so that ``import saekit`` is cheap and loads
none of torch, transformers, datasets, scikit-learn or typer::

    import saekit as sk

    rows = sk.capture("builtin", "builtin", layer=2, tokens=200_000)
    saes = sk.train(sk.TopK(latents=1024, k=16), rows, seeds=[0, 1])
    sk.evaluate(saes, rows)
"""

from __future__ import annotations

import importlib
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .data import ArrayRows as ArrayRows
    from .data import Batch as Batch
    from .data import ShardRows as ShardRows
    from .data import Source as Source
    from .data import SyntheticRows as SyntheticRows
    from .data import capture_images as capture_images
    from .data import load_model as load_model
    from .data import load_vision_model as load_vision_model
    from .data import open_rows as open_rows
    from .data import read_images as read_images
    from .data import read_texts as read_texts
    from .data import stream as stream
    from .data.capture import capture as capture
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
    from .estimators import Binarize as Binarize
    from .estimators import HiddenStates as HiddenStates
    from .estimators import SAEFeatures as SAEFeatures
    from .estimators import SelectLatents as SelectLatents
    from .measure import Measured as Measured
    from .sae import SAE as SAE
    from .sae import Codes as Codes
    from .sae import Scaling as Scaling
    from .store import describe as describe
    from .store import load as load
    from .store import save as save
    from .study import Actions as Actions
    from .study import Classification as Classification
    from .study import Comparison as Comparison
    from .study import Evaluation as Evaluation
    from .study import Orphans as Orphans
    from .study import SizeCurve as SizeCurve
    from .study import Transfer as Transfer
    from .study import act as act
    from .study import cloze_task as cloze_task
    from .study import load_classifier as load_classifier
    from .study import match_latents as match_latents
    from .study import measure_sizes as measure_sizes
    from .study import power_law as power_law
    from .study import principal_angles as principal_angles
    from .study import rank as rank
    from .study import read_task as read_task
    from .study import with_stability as with_stability
    from .study.attribution import attribution as attribution
    from .study.classify import classify as classify
    from .study.compare import compare as compare
    from .study.consensus import consensus as consensus
    from .study.evaluate import evaluate as evaluate
    from .study.importance import importance as importance
    from .study.orphans import orphans as orphans
    from .study.prune import prune as prune
    from .study.transfer import held_out as held_out
    from .study.transfer import transfer as transfer
    from .study.transfer import transfer_features as transfer_features
    from .train import BatchTopK as BatchTopK
    from .train import Gated as Gated
    from .train import HierarchicalTopK as HierarchicalTopK
    from .train import JumpReLU as JumpReLU
    from .train import Matryoshka as Matryoshka
    from .train import PAnneal as PAnneal
    from .train import Relu as Relu
    from .train import TopK as TopK
    from .train import train as train
    from .train import untrained as untrained

__version__ = "0.1.0"

# Public name -> (room, name there).
_HOMES: dict[str, tuple[str, str]] = {
    **{name: ("sae", name) for name in ("SAE", "Codes", "Scaling")},
    **{
        name: ("data", name)
        for name in (
            "capture", "stream", "open_rows", "read_texts", "load_model",
            "capture_images", "read_images", "load_vision_model",
            "Source", "Batch", "ArrayRows", "ShardRows", "SyntheticRows",
        )
    },
    **{
        name: ("train", name)
        for name in (
            "train", "untrained", "Relu", "TopK", "BatchTopK", "JumpReLU", "Gated", "PAnneal", "Matryoshka",
            "HierarchicalTopK",
        )
    },
    **{
        name: ("study", name)
        for name in (
            "evaluate", "Evaluation", "attribution", "importance", "rank", "power_law", "prune", "measure_sizes",
            "SizeCurve",
            "compare", "Comparison", "match_latents", "act", "Actions", "cloze_task", "read_task",
            "with_stability", "orphans", "Orphans", "principal_angles", "consensus",
            "transfer", "transfer_features", "held_out", "Transfer", "classify", "Classification", "load_classifier",
        )
    },
    # these alone import scikit-learn, when first used
    **{name: ("estimators", name) for name in ("SAEFeatures", "HiddenStates", "Binarize", "SelectLatents")},
    "Measured": ("measure", "Measured"),
    **{name: ("store", name) for name in ("save", "load", "describe")},
    **{
        name: ("errors", name)
        for name in (
            "SaekitError", "ConfigError", "ShapeError", "DataError", "FormatError", "ModelError", "OfflineError",
            "NonFiniteError", "BusyError", "MissingExtraError",
        )
    },
}  # fmt: skip

__all__ = ["__version__", *_HOMES]


def __getattr__(name: str) -> Any:
    """Import a public name from its room at first use (PEP 562)."""
    try:
        room, attribute = _HOMES[name]
    except KeyError:
        raise AttributeError(f"module `saekit` has no attribute `{name}`") from None
    value = getattr(importlib.import_module(f".{room}", __name__), attribute)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


class _Package(ModuleType):
    """Keeps ``saekit.train`` the function: importing the room of the same name would set the module in its place."""

    def __setattr__(self, name: str, value: Any) -> None:
        if isinstance(value, ModuleType) and _HOMES.get(name, ("", ""))[0] == name:
            value = getattr(value, name, value)
        super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
