"""A label scored by the model itself: whether it makes the windows that the latent fires in less surprising."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from ..models.language import LanguageModel
from .firing_windows import windows_of
from .firings import Firings
from .layout import SCORING, Layout
from .settings import ExplainSettings
from .window_scores import auc_of

BEFORE = "The following text is about {}:\n"
"""What stands before a window, with the label."""


def surprisal(
    lm: LanguageModel,
    firings: Firings,
    latents: np.ndarray,
    labels: list[str],
    layout: Layout,
    settings: ExplainSettings,
) -> np.ndarray:
    """Return for each latent the AUC of ``CE(window) - CE(window | label)`` for whether it fires in the window.

    Windows are of the scoring half; those without a firing have the length of those with one.
    """
    windows = windows_of(firings, latents, layout, settings.window, settings.seed)
    windows = windows.pick(windows.half == SCORING)
    less = np.zeros(len(windows.row))
    plain = _ids(lm, BEFORE.format("many things"))
    for row, label in enumerate(labels):
        mine = np.flatnonzero(windows.row == row)
        for length in np.unique(windows.length[mine]):
            some = mine[windows.length[mine] == length]
            tokens = layout.ids[windows.start[some][:, None] + np.arange(length)]
            less[some] = _cost(lm, plain, tokens) - _cost(lm, _ids(lm, BEFORE.format(label.replace("`", ""))), tokens)
    return auc_of(windows, less, len(latents))


def _ids(lm: LanguageModel, text: str) -> list[int]:
    return list(lm.tokenizer(text)["input_ids"])


def _cost(lm: LanguageModel, before: list[int], tokens: np.ndarray) -> np.ndarray:
    """Return the mean cross-entropy of the tokens ``[n, length]`` behind some others, in nats."""
    before = before[: max(1, lm.context - tokens.shape[1])]
    ids = torch.from_numpy(tokens).to(lm.device)
    first = torch.tensor(before, device=lm.device).expand(len(ids), -1)
    with torch.no_grad():
        logits: Tensor = lm.model(input_ids=torch.cat([first, ids], 1), use_cache=False).logits
    told = logits[:, len(before) - 1 : -1].float().log_softmax(2).gather(2, ids[..., None])
    return -told[..., 0].mean(1).double().cpu().numpy()
