"""How much of a known dictionary an SAE has found: its directions, and when they fire.

After 2602.14687, with a one-to-one matching next to each latent's own best feature. Two references stand next to it: a
linear probe of the rows that is told the labels, which is no ceiling (features that interfere compete in an SAE, but
not in a probe), and matching pursuit on the true dictionary that is told how many features fire, which is meant as one.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from ..errors import ConfigError
from ..matching.matching import match_latents
from ..matching.top_cosines import Directions, best
from ..measure.intervals import measured_mean, wilson_interval
from ..measure.results import Measured
from ..rows.source import Source
from ..rows.synthetic import SyntheticRows
from ..sae.model import SAE
from ..sae.rules import TopKRule
from .pursuit import pursue

if TYPE_CHECKING:
    import scipy.sparse

TRUTH = {
    "mcc": "mean cosine of decoder rows and true directions, matched one to one; absolute where codes have signs",
    "recovered": "fraction of the features whose match has a cosine above 0.8",
    "unique": "different features that latents are closest to, as a fraction of the latents that fire",
    "f1": "F1 of when a latent fires, for the feature that it is closest to: mean over the latents that fire",
    "f1_matched": "F1 of when the match of a feature fires: mean over the features that fire",
    "f1_probe": "F1 of a linear probe of the rows (ridge, best threshold) for a feature, on rows that it did not see: "
    "a baseline, no ceiling",
    "f1_ceiling": "F1 of when a feature fires by non-negative matching pursuit on the true dictionary, told the number",
    "absorbed": "how much more often the match of a recovered parent is silent where a child fires than where it fires "
    "alone: mean over parents",
}
"""What is measured, by name."""

RECOVERED = 0.8
"""Cosine from which a feature counts as recovered."""

TRUTH_ROWS = 8192
"""Rows on which latents and features are compared; the probe is fitted on one half of them and tested on the other."""

PROBED = 64
"""Maximum number of features that are probed, evenly over their frequencies."""

RIDGE = 1e-3
"""Ridge of the probe, as a fraction of the mean variance of the rows."""


def known_dictionary(rows: Source | None) -> SyntheticRows:
    """Return rows that know their dictionary; raises `ConfigError` for any others."""
    if not isinstance(rows, SyntheticRows):
        raise ConfigError(
            "evaluate: `truth` needs rows with a known dictionary, `SyntheticRows`; these have none. Leave it out, or "
            "give --rows synthetic:d_in=32,n_features=64."
        )
    return rows


def against_truth(sae: SAE, rows: SyntheticRows) -> dict[str, Measured]:
    """Return how much of the dictionary of `rows` an SAE has found, by the names of `TRUTH`."""
    n = min(TRUTH_ROWS, rows.n_rows or TRUTH_ROWS)
    x, fires = rows.rows(0, n), rows.codes(0, n) > 0
    with torch.no_grad():
        codes = sae.encode(x.to(sae.device)).to("cpu").to_scipy() != 0
    latents = codes.astype(np.float64)
    truth = fires.double().numpy()
    alive, present = np.asarray(latents.sum(0)).ravel() > 0, truth.sum(0) > 0
    both = np.asarray(latents.T @ truth)  # [n_latents, n_features]
    counts = np.asarray(latents.sum(0)).ravel(), truth.sum(0)
    W = sae.W_dec.detach().float().cpu()
    matching = match_latents(rows.dictionary, W, either_sign=sae.has_signs)
    partner, cosine = matching.partner.numpy(), matching.cosine.numpy()
    matched = np.flatnonzero(partner >= 0)
    closest = _closest(W, rows.dictionary)
    of_latents = _f1(both[np.arange(len(W)), closest], counts[0], counts[1][closest])
    features = matched[present[matched]]
    of_features = np.zeros(int(present.sum()))
    places = np.cumsum(present) - 1
    of_features[places[features]] = _f1(
        both[partner[features], features], counts[0][partner[features]], counts[1][features]
    )
    return {
        "mcc": measured_mean(cosine[matched], "cosine", least=-1.0, most=1.0),
        "recovered": wilson_interval(int((cosine[matched] > RECOVERED).sum()), rows.n_features),
        "unique": wilson_interval(len(np.unique(closest[alive])), max(int(alive.sum()), 1)),
        "f1": measured_mean(of_latents[alive], "F1", least=0.0, most=1.0),
        "f1_matched": measured_mean(of_features, "F1", least=0.0, most=1.0),
        "f1_probe": probe_f1(x, fires),
        "f1_ceiling": ceiling_f1(rows, x, fires),
        **({"absorbed": absorbed(rows, fires, codes, partner, cosine)} if rows.trees else {}),
    }


def ceiling_f1(rows: SyntheticRows, x: Tensor, fires: Tensor) -> Measured:
    """Return the F1 of when features fire that the true dictionary allows, mean over the features that fire.

    Rows are encoded by non-negative orthogonal matching pursuit, which is told how many features fire in each. The best
    subset is not sought, so that this is a ceiling in practice only.
    """
    n, d = rows.dictionary.shape
    known = SAE(
        W_enc=rows.dictionary, b_enc=torch.zeros(n), W_dec=rows.dictionary, b_dec=rows.offset, rule=TopKRule(min(n, d))
    )
    found = pursue(known, x, fires.sum(1)).to_scipy() != 0
    truth = fires.double().numpy()
    present = truth.sum(0) > 0
    both = np.asarray(found.astype(np.float64).multiply(truth).sum(0)).ravel()
    each = _f1(both, np.asarray(found.sum(0)).ravel(), truth.sum(0))[present]
    return measured_mean(each, "F1", least=0.0, most=1.0)


def absorbed(
    rows: SyntheticRows, fires: Tensor, codes: scipy.sparse.csr_matrix, partner: np.ndarray, cosine: np.ndarray
) -> Measured:
    """Return how much of their parents' firings latents of children take over, mean over recovered parents.

    The fraction of the rows on which a child fires and the match of its parent is silent, minus the same fraction of
    the rows on which the parent fires and none of its children does. A feature counts that has a match with a cosine
    above `RECOVERED`, and rows of both kinds.

    Parameters
    ----------
    rows
        With trees of features.
    fires
        Whether each feature fires, ``bool [n, n_features]``.
    codes
        Whether each latent fires, ``bool [n, n_latents]``.
    partner, cosine
        Matched latent of each feature, -1 for none, and the cosine.
    """
    true = fires.numpy()
    parent, columns = rows.parent.numpy(), codes.tocsc()
    found = []
    for feature in np.unique(parent[parent >= 0]):
        if partner[feature] < 0 or cosine[feature] <= RECOVERED:
            continue
        child = true[:, parent == feature].any(1)
        silent = ~columns[:, [partner[feature]]].toarray().ravel()
        alone = true[:, feature] & ~child
        if child.any() and alone.any():
            found.append(silent[child].mean() - silent[alone].mean())
    if not found:
        return Measured(math.nan, None, None, "fraction", "undefined: no parent of a tree is recovered")
    return measured_mean(np.array(found), "fraction", least=-1.0, most=1.0)


def _closest(W: Tensor, dictionary: Tensor) -> np.ndarray:
    """Return the feature whose direction each decoder row is closest to, whatever the sign."""
    prices = torch.zeros(len(dictionary), dtype=torch.float64)
    own = torch.arange(len(W))
    found = []
    for sign in (1, -1):
        found.append(best(Directions.of(sign * W, "a"), own, Directions.of(dictionary, "b"), prices, 1, exact=False))
    (high, at), (low, opposite) = ((values[:, 0], columns[:, 0]) for values, columns in found)
    return torch.where(high >= low, at, opposite).cpu().numpy()


def _f1(both: np.ndarray, one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """Return ``2 |A and B| / (|A| + |B|)``, 0 where neither fires."""
    return 2 * both / np.maximum(one + other, 1)


def probe_f1(x: Tensor, fires: Tensor) -> Measured:
    """Return what a linear probe of rows reaches: fitted on the first half, threshold included, tested on the second.

    Parameters
    ----------
    x
        Rows ``[n, d]``.
    fires
        Whether each feature fires, ``bool [n, n_features]``.
    """
    half = len(x) // 2
    seen = (fires[:half].sum(0) > 1) & (fires[half:].sum(0) > 0)
    features = seen.nonzero().squeeze(1)
    if not len(features):
        return Measured(math.nan, None, None, "F1", "undefined: no feature fires in both halves of the rows")
    features = features[torch.linspace(0, len(features) - 1, min(PROBED, len(features))).round().long()]
    mean = x[:half].double().mean(0)
    train, test = (part.double() - mean for part in (x[:half], x[half:]))
    labels = fires[:, features].double()
    gram = train.T @ train
    gram += RIDGE * float(gram.diagonal().mean()) * torch.eye(len(gram), dtype=torch.float64)
    weights = torch.linalg.solve(gram, train.T @ (labels[:half] - labels[:half].mean(0)))
    found = []
    for column in range(len(features)):
        scores, answers = train @ weights[:, column], labels[:half, column]
        threshold = _best_threshold(scores.numpy(), answers.numpy())
        guesses, told = (test @ weights[:, column] > threshold).numpy(), labels[half:, column].numpy() > 0
        found.append(2 * (guesses & told).sum() / max(guesses.sum() + told.sum(), 1))
    return measured_mean(np.array(found), "F1", least=0.0, most=1.0)


def _best_threshold(scores: np.ndarray, labels: np.ndarray) -> float:
    """Return the threshold of largest F1: a score counts that exceeds it."""
    order = np.argsort(-scores, kind="stable")
    hits = np.cumsum(labels[order])
    f1 = 2 * hits / (np.arange(1, len(hits) + 1) + labels.sum())
    last = int(f1.argmax())
    edges = scores[order]
    return float((edges[last] + edges[last + 1]) / 2) if last + 1 < len(edges) else float(edges[-1] - 1)
