"""SAEs of other libraries on their first rows: do they do what their files state? A wrong reading shows nowhere else.

What every function that puts SAEs onto rows warns of (`saekit.rows.opening.warnings_on_rows`) includes this; `saekit
verify` measures more, and what could be wrong. SAEs that saekit trained are not looked at.
"""

from __future__ import annotations

import math
import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import SupportsFloat

from torch import Tensor

from ..places import Warned
from ..provenance import known_place
from ..sae.model import SAE
from .source import Source
from .stream import StreamRows

ROWS = 2048
"""Number of rows that an SAE is tried on."""

FEWEST_ROWS = 256
"""Number of rows below which nothing is concluded."""

L0_FACTOR = 3.0
"""A measured L0 more than this many times above or below the stated one is another SAE, or other rows."""

_CAUSES = (
    "Likely: rows of another module or model; rows that must be scaled; special tokens (BOS) among the rows; or the "
    "file is read the wrong way (the input bias, the layout of square matrices)."
)

_known: dict[tuple[str, str, str], tuple[float | None, float]] = {}
"""FVU and L0 by SAE, by model or else rows, and by hook: each is measured once in a process."""


def warnings_on_first_use(
    named: Sequence[tuple[str, SAE]], rows: Callable[[], Tensor], seen: Mapping[str, object]
) -> list[Warned]:
    """Return where SAEs of other libraries do not do on rows what their files state.

    Parameters
    ----------
    named
        SAEs with their names.
    rows
        Makes the rows, ``[n, d_in]``; not called where no SAE is of another library, or all were tried before.
    seen
        ``info`` of the rows.
    """
    found: list[Warned] = []
    made: list[Tensor] = []
    for name, sae in named:
        if not is_foreign(sae):
            continue
        key = (sae.digest(), str(seen.get("model_digest") or seen.get("digest")), str(seen.get("hook")))
        measured = _known.get(key)
        if measured is None:
            made = made or [rows()[:ROWS].float()]
            if len(made[0]) < FEWEST_ROWS or made[0].shape[1] != sae.d_in:
                continue
            measured = _measured(sae, made[0])
            if key[1] != "None":
                _known[key] = measured
        found += [_told(name, sae, doubt, seen) for doubt in doubts_about(*measured, claims_of(sae))]
    return found


def first_rows(source: Source) -> Tensor:
    """Return the first rows of a source; of a stream no more of its contexts than they take are run."""
    if isinstance(source, StreamRows):
        block = max(1, math.ceil(source.block_contexts * ROWS / source.info["block_tokens"]))
        source = replace(source, block_contexts=min(block, source.block_contexts), prefetch=False)
    return next(source.batches(ROWS)).x


def is_foreign(sae: SAE) -> bool:
    """Return whether an SAE was read from a file of another library, now or before it was converted."""
    return bool(sae.provenance.get("library") and sae.provenance.get("address"))


def claims_of(sae: SAE) -> dict[str, float]:
    """Return the numbers that a file states about its SAE: ``l0`` and ``fvu``, where they are numbers."""
    claimed = sae.provenance.get("claimed")
    claimed = claimed if isinstance(claimed, dict) else {}
    k = None if "threshold" in sae.rule.tensors() else sae.rule.settings().get("k")  # a cap is no L0
    known = {**({"l0": k} if k is not None else {}), **claimed}
    return {key: float(known[key]) for key in ("l0", "fvu") if isinstance(known.get(key), int | float)}


def doubts_about(fvu: SupportsFloat | None, l0: SupportsFloat, claimed: Mapping[str, float]) -> list[Warned]:
    """Return what does not fit, as warnings.

    Parameters
    ----------
    fvu, l0
        What was measured: numbers, or `Measured`. An FVU of None was not.
    claimed
        What the file states; see `claims_of`.
    """
    doubts = []
    if fvu is not None and not float(fvu) < 1:
        message = f"FVU {fvu:.3g} is no better than the mean row: wrong rows, or a wrong reading of the file"
        doubts.append(Warned("fvu_above_mean", message))
    stated = claimed.get("l0")
    if stated and not stated / L0_FACTOR <= float(l0) <= stated * L0_FACTOR:
        message = (
            f"{l0:.3g} latents per row are active, and the file states {stated:g}: more than {L0_FACTOR:g} times off"
        )
        doubts.append(Warned("l0_off", message))
    return doubts


def _measured(sae: SAE, x: Tensor) -> tuple[float | None, float]:
    """Return FVU (None of a transcoder, which writes other rows) and L0 on rows."""
    x = x.to(sae.device)
    codes = sae.encode(x)
    if sae.is_transcoder:
        return None, codes.l0()
    x, x_hat = x.double(), sae.decode(codes, x).double()
    spread = float((x - x.mean(0)).square().sum())
    return (float((x - x_hat).square().sum()) / spread if spread else None), codes.l0()


def _told(name: str, sae: SAE, doubt: Warned, seen: Mapping[str, object]) -> Warned:
    """Return a doubt as a warning that says what to do."""
    model, data = (str(seen.get(f"{what}_path") or seen.get(what) or what[0].upper()) for what in ("model", "data"))
    line = ["saekit", "verify", str(sae.provenance["address"]), "--model", model, "--data", data]
    hook = seen.get("hook")
    line += ["--hook", str(hook)] if hook is not None and hook != known_place(sae) else []
    message = (
        f"`{name}`, read as {sae.provenance.get('format')}: {doubt.message}. {_CAUSES} To find out: {shlex.join(line)}"
    )
    return replace(doubt, message=message)
