"""Sparse autoencoders from training to report.

The public names, by what they are for; ``docs/api.md`` lists them with what each does. Everything else is imported from
its room (``saekit.errors``, ``saekit.rows.source``, …). A name is imported when it is first used, so that
``import saekit`` is cheap and loads none of torch, transformers, datasets, scikit-learn or typer::

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
    from .classification.run import classify as classify
    from .classification.text_classifier import load_classifier as load_classifier
    from .classification.transfer import transfer as transfer
    from .comparison.orphans import orphans as orphans
    from .comparison.run import compare as compare
    from .errors import SaekitError as SaekitError
    from .estimators.binarize import Binarize as Binarize
    from .estimators.features import HiddenStates as HiddenStates
    from .estimators.features import SAEFeatures as SAEFeatures
    from .estimators.select import SelectLatents as SelectLatents
    from .evaluation.run import evaluate as evaluate
    from .explanation.attach import attach as attach
    from .explanation.effects import effects as effects
    from .explanation.run import explain as explain
    from .explanation.steering import steer as steer
    from .inputs.images import read_images as read_images
    from .inputs.settings import Split as Split
    from .inputs.texts import read_texts as read_texts
    from .measure.results import Measured as Measured
    from .models.loading import load_model as load_model
    from .report.results_folder import write_report as write_report
    from .rows.arrays import ArrayRows as ArrayRows
    from .rows.capture import capture as capture
    from .rows.shards import open_rows as open_rows
    from .rows.stream import stream as stream
    from .rows.synthetic import SyntheticRows as SyntheticRows
    from .sae.codes import Codes as Codes
    from .sae.model import SAE as SAE
    from .sizes.progressive import progressive as progressive
    from .sizes.prune import prune as prune
    from .sizes.ranking import rank as rank
    from .sizes.size_curve import measure_sizes as measure_sizes
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
    from .training.settings import TrainSettings as TrainSettings

PUBLIC: dict[str, dict[str, str]] = {
    "An SAE and what it computes": {
        "SAE": "sae.model",
        "Codes": "sae.codes",
        "Measured": "measure.results",
    },
    "Rows: activations of a model, or an array": {
        "load_model": "models.loading",
        "read_texts": "inputs.texts",
        "read_images": "inputs.images",
        "capture": "rows.capture",
        "stream": "rows.stream",
        "open_rows": "rows.shards",
        "ArrayRows": "rows.arrays",
        "SyntheticRows": "rows.synthetic",
    },
    "Training": {
        "train": "training.loop",
        "untrained": "training.loop",
        "TrainSettings": "training.settings",
        "TopK": "training.config",
        "BatchTopK": "training.config",
        "ReLU": "training.config",
        "JumpReLU": "training.config",
        "Gated": "training.config",
        "PAnneal": "training.config",
        "Matryoshka": "training.config",
        "HierarchicalTopK": "training.config",
    },
    "Is it faithful? Are its latents real?": {
        "evaluate": "evaluation.run",
        "compare": "comparison.run",
        "orphans": "comparison.orphans",
    },
    "How many latents are needed?": {
        "rank": "sizes.ranking",
        "prune": "sizes.prune",
        "measure_sizes": "sizes.size_curve",
        "progressive": "sizes.progressive",
    },
    "Are its latents useful?": {
        "classify": "classification.run",
        "transfer": "classification.transfer",
        "Split": "inputs.settings",
        "load_classifier": "classification.text_classifier",
    },
    "What is a latent, and what does it do?": {
        "explain": "explanation.run",
        "attach": "explanation.attach",
        "steer": "explanation.steering",
        "effects": "explanation.effects",
    },
    "scikit-learn": {
        "SAEFeatures": "estimators.features",
        "HiddenStates": "estimators.features",
        "SelectLatents": "estimators.select",
        "Binarize": "estimators.binarize",
    },
    "Results": {
        "write_report": "report.results_folder",
    },
    "Errors": {
        "SaekitError": "errors",
    },
}
"""What a group of public names is for -> name -> the module that defines it."""

_HOMES = {name: module for names in PUBLIC.values() for name, module in names.items()}

__all__ = ["__version__", *_HOMES]


def __getattr__(name: str) -> Any:
    """Import a public name from its room at first use (PEP 562)."""
    if name not in _HOMES:
        from .errors import did_you_mean

        raise AttributeError(f"module `saekit` has no attribute `{name}`. {did_you_mean(name, __all__)}")
    value = getattr(importlib.import_module(f".{_HOMES[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
