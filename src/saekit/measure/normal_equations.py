"""Sums of products of codes: what least squares and greedy selection need to know about any number of rows.

With the codes fixed, the squared error is a quadratic function of the decoder, and of which latents are kept. Its
coefficients are sums over rows, gathered in one pass; after that neither question needs the rows again.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from ..errors import ConfigError
from ..sae.codes import Codes
from ..sae.model import SAE
from ..sae.parts import is_crosscoder

MOST_LATENTS = 16_384
"""Widest SAE that products of latents with each other are gathered for: a table of 2 GiB."""

RIDGE = 1e-9
"""Pull toward the old decoder in a refit, as a fraction of the mean diagonal: rare latents keep their rows."""


class NormalEquations:
    """Sums over rows of ``[z, 1]^T [z, 1]`` and ``[z, 1]^T v``, with ``v`` the target of the decoder.

    The target is the scaled row (of a transcoder the row that it predicts, scaled) without the skip path. An SAE that
    scales every row by its own deviation counts each row with the square of that deviation, so that the error is the
    one of the rows themselves.

    Parameters
    ----------
    n_latents
        Width of the codes.
    d
        Width of the rows.

    Raises
    ------
    ConfigError
        More latents than a table of all pairs can hold.
    """

    def __init__(self, n_latents: int, d: int) -> None:
        if n_latents > MOST_LATENTS:
            raise ConfigError(
                f"greedy selection and decoder refits work on SAEs of at most {MOST_LATENTS:,} latents (they hold a "
                f"table of all pairs); this one has {n_latents:,}. Rank by energy and keep fewer first."
            )
        self.n_latents = n_latents
        self.n_rows = 0
        self._A = np.zeros((n_latents + 1, n_latents + 1))
        self._B = np.zeros((n_latents + 1, d))
        self._v: list[float | np.ndarray] = [0.0, np.zeros(d), np.zeros(d)]  # sum of weights, of v, of v^2

    def update(self, sae: SAE, codes: Codes, x: Tensor, *, target: Tensor | None = None) -> None:
        """Add rows ``[n, d_in]`` with their codes; of a transcoder with the rows ``[n, d]`` that it predicts."""
        import scipy.sparse

        u, context = sae.scaling.apply(x)
        wanted = u if target is None else sae.scaling.scaled(target, context)
        v = wanted if sae.W_skip is None else wanted - u @ sae.W_skip
        v_rows = v.detach().double().cpu().numpy()
        weight = np.ones(len(x)) if context is None else context[1].detach().double().cpu().numpy()[:, 0]
        z = scipy.sparse.diags_array(weight) @ codes.to_scipy().astype(np.float64)
        pairs = scipy.sparse.coo_array(z.T @ z)
        n = self.n_latents
        self._A[pairs.row, pairs.col] += pairs.data
        sums = np.asarray(z.T @ weight)
        self._A[:n, n] += sums
        self._A[n, :n] += sums
        self._A[n, n] += float(weight @ weight)
        self._B[:n] += z.T @ (weight[:, None] * v_rows)
        self._B[n] += (weight**2) @ v_rows
        self._v = [
            self._v[0] + float(weight @ weight),
            self._v[1] + (weight**2) @ v_rows,
            self._v[2] + (weight**2) @ np.square(v_rows),
        ]
        self.n_rows += len(x)

    def refit(self, sae: SAE) -> tuple[Tensor, Tensor]:
        """Return the decoder ``[n_latents, d]`` and bias ``[d]`` with the least squared error for these codes.

        A latent that never fired keeps its row.
        """
        from scipy.linalg import cho_factor, cho_solve

        old = np.concatenate([sae.W_dec.double().cpu().numpy(), sae.b_dec.double().cpu().numpy()[None]])
        ridge = RIDGE * max(float(self._A.diagonal().mean()), 1e-300)
        factor = cho_factor(self._A + ridge * np.eye(len(self._A)), lower=True)
        new = torch.from_numpy(old + cho_solve(factor, self._B - self._A @ old)).to(sae.W_dec)
        return new[:-1].clone(), new[-1].clone()

    def quadratic(self, sae: SAE) -> tuple[np.ndarray, np.ndarray, float]:
        """``(Q, a, c)`` such that keeping the latents s (a 0/1 vector) has the squared error ``s'Qs - 2 a's + c``.

        Means over rows, in squared units of the rows; of a crosscoder of the scaled rows (`error_factors`).
        """
        n = self.n_latents
        columns = np.broadcast_to(error_factors(sae).double().cpu().numpy(), (self._B.shape[1],))
        W = sae.W_dec.double().cpu().numpy() * columns
        b = sae.b_dec.double().cpu().numpy()
        Q = self._A[:n, :n] * (W @ W.T)
        a = ((self._B[:n] - self._A[:n, n][:, None] * b) * columns * W).sum(1)
        weight, first, second = self._v
        c = float((np.square(columns) * (second - 2 * first * b + weight * np.square(b))).sum())
        return Q / self.n_rows, a / self.n_rows, c / self.n_rows


def greedy_order(Q: np.ndarray, a: np.ndarray, c: float, direction: str) -> tuple[Tensor, np.ndarray]:
    """Latents in the order of greedy selection, and the squared error of every prefix of that order.

    Parameters
    ----------
    Q, a, c
        As `NormalEquations.quadratic` gives them.
    direction
        ``"forward"``: start from nothing and add; ``"backward"``: start from all and remove. Equal choices fall on
        the latent that is stored first (forward) or last (backward).

    Returns
    -------
    order, losses
        ``int64 [n_latents]``; ``float64 [n_latents + 1]``, from no latent to all.
    """
    n, adds = len(a), direction == "forward"
    kept = np.full(n, not adds)
    product = np.zeros(n) if adds else Q.sum(1)  # Q s
    loss = c if adds else float(product.sum() - 2 * a.sum() + c)
    own = Q.diagonal()
    order, losses = [], [loss]
    for _ in range(n):
        change = own + 2 * (product - a) if adds else own - 2 * (product - a)
        change = np.where(kept == adds, np.inf, change)
        # The last of equal ones goes first when removing, so that ties stay in stored order.
        chosen = int(change.argmin()) if adds else n - 1 - int(change[::-1].argmin())
        loss += float(change[chosen])
        product += Q[chosen] if adds else -Q[chosen]
        kept[chosen] = adds
        order.append(chosen)
        losses.append(loss)
    if not adds:
        order.reverse()
        losses.reverse()
    return torch.tensor(order), np.array(losses)


def column_factors(sae: SAE) -> Tensor:
    """``[d_out]`` or ``[]``: what one unit of decoder output is in the rows, by column (scalar, standardize)."""
    scale = sae.scaling.scale
    return torch.ones((), device=sae.device, dtype=sae.dtype) if scale is None else 1 / scale.to(sae.W_dec)


def error_factors(sae: SAE) -> Tensor:
    """``[d_out]`` or ``[]``: what one unit of decoder output counts, by column, in errors that latents are ranked by.

    It is what it is in the rows; of a crosscoder 1, so that all sources count the same, as in training.
    """
    return torch.ones((), device=sae.device, dtype=sae.dtype) if is_crosscoder(sae) else column_factors(sae)


def row_factors(sae: SAE, x: Tensor) -> Tensor:
    """``[n]``: the same by row (layer_norm, row_norm)."""
    context = sae.scaling.apply(x)[1]
    return x.new_ones(len(x)) if context is None else context[1].squeeze(-1)
