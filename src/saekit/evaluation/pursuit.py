"""What a better encoder would make of the same decoder: codes by orthogonal matching pursuit, next to the SAE's own.

The pursuit takes, row by row, as many latents as the SAE does, each time the one that explains most of what is left,
and fits their sizes anew. It looks at the reconstruction while it encodes, which no SAE can: where it is much better,
the error is the encoder's, not the dictionary's.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from ..measure.accumulators import Moments, Reconstruction
from ..measure.intervals import N_GROUPS, document_sample, row_groups
from ..measure.results import Measured
from ..rows.source import Source
from ..sae.codes import Codes
from ..sae.model import SAE
from ..sae.parts import in_equal_parts

PURSUIT = {
    "fvu_encoder": "FVU of the SAE on these rows; of a crosscoder in the units of its training, in which sources weigh "
    "alike",
    "fvu_pursuit": "FVU of its decoder with codes by matching pursuit, as many latents per row as the SAE used",
    "fvu_gap": "fvu_encoder - fvu_pursuit",
    "jaccard": "latents that both use, as a fraction of those that either uses: mean over rows",
    "code_r2": "squared correlation of the codes of both, over the (row, latent) pairs that either uses",
}
"""What is measured, by name."""

GATHERED_NUMBERS = 2**23
"""Entries of decoder rows that are gathered at a time (float32: 32 MiB)."""

RIDGE = 1e-6
"""Added to the diagonal of the products of unit atoms, which may be equal."""


def against_pursuit(sae: SAE, rows: Source, n_rows: int) -> dict[str, Measured]:
    """Return how codes by matching pursuit compare with those of an SAE on the first rows, by the names of `PURSUIT`.

    Not for transcoders and SAEs with a skip path, whose decoder alone does not reconstruct.
    """
    moments = Moments(sae.d_out)
    own, other = (Reconstruction(sae.d_out, moments=moments) for _ in range(2))
    shares = np.zeros((2, N_GROUPS))
    pairs: list[np.ndarray] = []
    done, is_known = 0, True
    for batch in rows.batches(1024):
        x = batch.x[: n_rows - done].to(sae.device, sae.dtype)
        document = None if batch.document is None else batch.document[: len(x)]
        group, by_document = row_groups(document, done, len(x))
        is_known &= by_document
        with torch.no_grad():
            codes = sae.encode(x)
            found = pursue(sae, x, codes.offsets.diff())
            wanted = in_equal_parts(sae, x)
            moments.update(wanted, group)
            for each, values in ((own, codes), (other, found)):
                each.update(wanted, in_equal_parts(sae, sae.decode(values, x)).float(), group)
        both, jaccard = _paired(codes, found)
        pairs.append(both)
        shares[0] += np.bincount(group.numpy(), jaccard, minlength=N_GROUPS)
        shares[1] += np.bincount(group.numpy(), minlength=N_GROUPS)
        done += len(x)
        if done >= n_rows:
            break
    sample = document_sample(moments.rows_per_group, is_known=is_known)
    encoder, pursuit = own.compute(sample)["fvu"], other.compute(sample)["fvu"]
    return {
        "fvu_encoder": encoder.measured("fraction", least=0.0),
        "fvu_pursuit": pursuit.measured("fraction", least=0.0),
        "fvu_gap": encoder.minus(pursuit).measured("fraction"),
        "jaccard": sample.ratio(shares[0], shares[1]).measured("fraction", least=0.0, most=1.0),
        "code_r2": Measured(_r2(np.concatenate(pairs, 1)), None, None, "fraction", "no interval: pooled over all rows"),
    }


def pursue(sae: SAE, x: Tensor, wanted: Tensor) -> Codes:
    """Return the codes of rows by non-negative orthogonal matching pursuit on the decoder rows of an SAE.

    Parameters
    ----------
    sae
        Its decoder, bias and scaling count; its encoder does not. Where its codes have signs, so do these.
    x
        Rows ``[n, d_in]``.
    wanted
        Maximum number of latents of each row, ``[n]``; fewer where none that is left explains anything.
    """
    u = sae.scaling.apply(x)[0] - sae.b_dec
    lengths = sae.W_dec.norm(dim=1).clamp(min=1e-12)
    atoms = sae.W_dec / lengths[:, None]
    signed = sae.rule.settings().get("sign", "positive") != "positive"
    most = max(int(wanted.max()) if len(wanted) else 0, 1)
    block = max(1, GATHERED_NUMBERS // (most * sae.d_out + sae.n_latents))
    rows, latents, values = [], [], []
    for start in range(0, len(u), block):
        part = slice(start, start + block)
        chosen, sizes = _pursue(u[part], atoms, wanted[part].to(u.device), signed)
        row, place = (sizes != 0).nonzero(as_tuple=True)
        rows.append(start + row)
        latents.append(chosen[row, place])
        values.append(sizes[row, place] / lengths[chosen[row, place]])
    row, latent, value = (torch.cat(each) for each in (rows, latents, values))
    order = (row * sae.n_latents + latent).argsort()
    offsets = torch.searchsorted(row[order], torch.arange(len(u) + 1, device=row.device))
    return Codes(offsets, latent[order], value[order], sae.n_latents)


def _pursue(u: Tensor, atoms: Tensor, wanted: Tensor, signed: bool) -> tuple[Tensor, Tensor]:
    """Return latents ``[n, k]`` and the sizes of their unit atoms, 0 where none was taken."""
    n, most = len(u), int(wanted.max()) if len(wanted) else 0
    chosen = torch.zeros(n, most, dtype=torch.int64, device=u.device)
    sizes = u.new_zeros(n, most)
    taken = torch.zeros(n, len(atoms), dtype=torch.bool, device=u.device)
    residual = u
    for step in range(most):
        products = residual @ atoms.T
        products = (products.abs() if signed else products).masked_fill(taken, -torch.inf)
        best, at = products.max(1)
        goes_on = (wanted > step) & (best > 0)
        chosen[:, step] = at
        taken[torch.arange(n, device=u.device), at] |= goes_on
        used = taken.gather(1, chosen[:, : step + 1])
        used[:, step] = goes_on
        sizes[:, : step + 1] = _fitted(u, atoms[chosen[:, : step + 1]], used, signed)
        residual = u - (sizes[:, : step + 1, None] * atoms[chosen[:, : step + 1]]).sum(1)
    return chosen, sizes


def _fitted(u: Tensor, atoms: Tensor, used: Tensor, signed: bool) -> Tensor:
    """Return least-squares sizes of the atoms used; those below 0 are dropped and the others fitted once more."""
    eye = torch.eye(atoms.shape[1], device=u.device, dtype=u.dtype)
    for _ in range(1 if signed else 2):
        kept = atoms * used[..., None]
        gram = kept @ kept.transpose(1, 2) + (RIDGE + (~used).to(u.dtype))[:, :, None] * eye
        sizes = torch.linalg.solve(gram, (kept @ u[..., None]))[..., 0] * used
        if not signed:
            used = used & (sizes > 0)
    return sizes if signed else sizes.clamp(min=0)


def _paired(one: Codes, other: Codes) -> tuple[np.ndarray, np.ndarray]:
    """Return both codes of the pairs that either has ``[2, pairs]``, and the overlap of the latents of each row."""
    a, b = (codes.to("cpu").to_scipy().astype(np.float64) for codes in (one, other))
    shared = np.asarray((a != 0).multiply(b != 0).sum(axis=1)).ravel().astype(np.float64)
    either = np.diff(a.indptr) + np.diff(b.indptr) - shared
    union = ((a != 0) + (b != 0)).tocoo()
    both = np.stack([np.asarray(each.tocsr()[union.row, union.col]).ravel() for each in (a, b)])
    return both, np.where(either > 0, shared / np.maximum(either, 1), 1.0)


def _r2(both: np.ndarray) -> float:
    if both.shape[1] < 2 or not (both.std(1) > 0).all():
        return math.nan
    return float(np.corrcoef(both)[0, 1] ** 2)
