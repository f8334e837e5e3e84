"""Proof of the kernels on the user's own devices: parity with slow references, timing, and a verdict for `auto`.

The training step is compared too, which is why this is no part of the kernels.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from .. import kernels
from ..errors import ConfigError
from ..kernels import reference, verdicts
from ..kernels.verdicts import Check, Timing, Verdict
from ..progress import shows_progress
from ..settings import Progress, silent
from .config import BatchTopK, Config, Gated, HierarchicalTopK, JumpReLU, Matryoshka, ReLU, TopK
from .defaults import resolve
from .fused import fused_step, fuses
from .learner import Learner, initialize_learner, tensors_of
from .step import plain_step

TIME_LIMIT = 240.0
"""Nothing new is begun after that; what was not compared counts as not right. Unit: seconds."""

SLACK = 2.0**-19
"""Maximum error of a pre-activation in fp32, in multiples of ``|x| |w| + |b|``: 32 roundings of 2^-24. Those of a long
sum cancel: their root mean square grows with the root of the width."""

TOLERANCE = 5e-4
"""Maximum relative difference between numbers of a fast step and of a plain one: sums are added in another order."""

WEIGHTS_TOLERANCE = 3e-3
"""The same of weights and moments after some steps, in their L2 norm: Adam turns rounding of gradients near 0 into
steps."""

Shape = tuple[int, int, int, int]
"""Rows, width, latents, codes per row."""


@dataclass(frozen=True)
class CheckSizes:
    """What is computed in a check."""

    encode: Sequence[Shape]
    """Shapes of the encoders that are compared."""
    steps: Shape
    """Shape of the steps that are compared."""
    n_steps: int
    """Steps of each architecture."""
    timed: Sequence[Shape]
    """Shapes that are timed."""
    repetitions: int = 3
    """Measurements of each time, of which the shortest counts."""


SMALL = [(9, 48, 150, 5), (5, 100, 130, 20), (3, 7, 40, 2)]
SIZES = {
    "cuda": CheckSizes(
        [*SMALL, (300, 768, 16384, 32), (70, 64, 40000, 100)],
        (512, 64, 1024, 8),
        10,
        [(2048, 64, 2048, 16), (4096, 768, 16384, 32)],
        5,
    ),
    "cpu": CheckSizes(
        [*SMALL, (300, 768, 4096, 32)], (512, 64, 1024, 8), 5, [(1024, 256, 4096, 16), (1024, 512, 8192, 32)]
    ),
    "mps": CheckSizes([*SMALL, (300, 768, 16384, 32)], (512, 64, 1024, 8), 5, [(1024, 512, 8192, 32)]),
}
"""Sizes by kind of device; odd ones are among them."""


@dataclass(frozen=True)
class Encoders:
    """The three functions of `saekit.kernels` outside of training, by one implementation."""

    topk: Callable[..., tuple[Tensor, Tensor]]
    threshold: Callable[..., tuple[Tensor, Tensor, Tensor]]
    decode: Callable[..., Tensor]


PLAIN = Encoders(reference.topk_encode, reference.threshold_encode, reference.csr_decode)


@dataclass(frozen=True)
class Subject:
    """What is checked."""

    identity: Mapping[str, str]
    """See `saekit.kernels.verdicts.identity`."""
    tensors_on: torch.device
    """Device of the tensors."""
    fast: Encoders | None
    """Fast kernels; None where there are none: then plain torch is compared with itself on the CPU."""
    note: str = ""
    """What is compared, or why there are no fast kernels."""


def subject_of(device: torch.device) -> Subject:
    """Return what there is to check on a device of this machine."""
    known = verdicts.identity(device)
    if device.type == "cuda":
        if not kernels.triton_here():
            return Subject(known, device, None, "Triton is not installed (pip install 'saekit[triton]')")
        from ..kernels.cuda import ops

        return Subject(known, device, Encoders(ops.topk_encode, ops.threshold_encode, ops.csr_decode), "Triton kernels")
    if device.type == "cpu":
        if reason := kernels.unavailable():
            return Subject(known, device, None, reason)
        from ..kernels.cpu import encode

        fast = Encoders(encode.topk_encode, encode.threshold_encode, reference.csr_decode)
        return Subject(known, device, fast, f"compiled loops, {torch.get_num_threads()} threads")
    return Subject(known, device, None, "there are no compiled kernels for this device: plain torch is compared")


def devices_here() -> list[torch.device]:
    """Return the devices of this machine that torch can compute on, GPUs first."""
    found = [torch.device("cuda", index) for index in range(torch.cuda.device_count())]
    if torch.backends.mps.is_available():
        found.append(torch.device("mps"))
    return [*found, torch.device("cpu")]


@shows_progress
def check_kernels(device: str | None = None, *, progress: Progress | None = None) -> dict[str, Verdict]:
    """Compare every kernel with a slow reference on the devices of this machine, time it, and keep the verdict.

    From then on ``auto`` runs the fast kernels where they were right and at no size slower than plain torch, until the
    device or a version changes. Takes less than five minutes per device.

    Parameters
    ----------
    device
        Device, as torch calls it [all: each GPU, then the CPU].
    progress
        Called as ``progress(stage, done, total)`` [shown on stderr; ``False``: none].

    Returns
    -------
    dict
        Verdicts by device.

    Raises
    ------
    ConfigError
        There is no such device.
    StorageError
        The verdict cannot be written.
    """
    devices = devices_here() if device is None else [_device(device)]
    if kernels.mode() == "plain":
        raise ConfigError(
            "check_kernels: kernels must not be forbidden; SAEKIT_KERNELS or saekit.kernels.use says `plain`. "
            "Say `auto`."
        )
    found: dict[str, Verdict] = {}
    for each in devices:
        verdict = check(subject_of(each), SIZES[each.type], partial(_of_device, progress or silent, str(each)))
        verdicts.keep(verdict)
        found[str(each)] = verdict
    return found


def _of_device(progress: Progress, name: str, stage: str, done: int, total: int) -> None:
    progress(f"{stage} ({name})", done, total)


def _device(name: str) -> torch.device:
    """Return a device of this machine by its name."""
    here = devices_here()
    for each in here:
        if name in (str(each), each.type):
            return each
    raise ConfigError(
        f"check_kernels: `device` must be one of this machine ({', '.join(map(str, here))}); got `{name}`. "
        f"torch {torch.__version__} sees no other."
    )


def check(subject: Subject, sizes: CheckSizes, progress: Progress = silent) -> Verdict:
    """Return the verdict on a subject; an error of a kernel is a comparison that failed."""
    until = time.monotonic() + TIME_LIMIT
    asks = list(comparisons(subject, sizes))
    checks: list[Check] = []
    timings: list[Timing] = []
    with kernels.using("fast") if subject.fast is not None else contextlib.nullcontext():
        for number, (name, work, compare) in enumerate(asks):
            progress("parity", number, len(asks))
            checks.append(Check(name, work, *_outcome(compare, until)))
        progress("parity", len(asks), len(asks))
        if all(each.passed for each in checks):
            for number, shape in enumerate(sizes.timed):
                progress("timing", number, len(sizes.timed))
                passed, detail = _outcome(partial(_time, subject, shape, sizes.repetitions, timings), until)
                if not passed:
                    checks += [Check(f"timing of {_words(shape)}", work, passed, detail) for work in verdicts.WORKS]
            progress("timing", len(sizes.timed), len(sizes.timed))
    return Verdict(subject.identity, tuple(checks), tuple(timings), subject.note)


def _outcome(compare: Callable[[], str | None], until: float) -> tuple[bool, str]:
    """Return whether a comparison passed, and what was wrong."""
    if time.monotonic() > until:
        return False, f"not done within {TIME_LIMIT:.0f} seconds"
    try:
        wrong = compare() or ""
    except Exception as error:  # whatever a compiler or a driver raises: the kernel cannot be used here
        wrong = f"{type(error).__name__}: {error}".partition("\n")[0]
    return not wrong, wrong


def comparisons(subject: Subject, sizes: CheckSizes) -> Iterator[tuple[str, str, Callable[[], str]]]:
    """Yield everything that is compared: name, work, and a function that says what is wrong."""
    encoders, device = subject.fast or PLAIN, subject.tensors_on
    for seed, shape in enumerate(sizes.encode):
        rows = 4 if shape[0] == 9 else None  # one in blocks that do not divide the rows
        yield f"largest codes of {_words(shape)}", "encode", partial(_wrong_codes, encoders, seed, shape, rows, device)
    yield "largest codes of ties, zeros and NaN", "encode", partial(wrong_on_hard_rows, encoders, device)
    yield "codes above a threshold", "encode", partial(wrong_above, encoders, device)
    for seed, of in enumerate([(30, 20, 50), (17, 300, 9), (1, 1, 1)]):
        yield f"decoding {of[0]} rows", "encode", partial(wrong_sums, encoders, seed, of, device)
    n, _, n_latents, k = sizes.steps
    for name, config in configurations(n_latents, k, lr=1e-3, dead_after_rows=n).items():
        compare = partial(wrong_steps, config, sizes, device, has_fast=subject.fast is not None)
        yield f"{sizes.n_steps} steps of {name}", "step", compare


def _words(shape: Shape) -> str:
    n, d, n_latents, k = shape
    return f"d {d:,}, n {n_latents:,}, k {k}, {n:,} rows"


# ---------------------------------------------------------------- comparisons: each returns what is wrong, or ""


def problem(seed: int, n: int, d: int, n_latents: int, device: torch.device | str) -> tuple[Tensor, Tensor, Tensor]:
    """Return random rows, an encoder and a bias, the same on every device."""
    g = torch.Generator().manual_seed(seed)
    x, W = torch.randn(n, d, generator=g), torch.randn(n_latents, d, generator=g) / d**0.5
    return x.to(device), W.to(device), (0.3 * torch.randn(n_latents, generator=g)).to(device)


def _exact(x: Tensor, W: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Return pre-activations in float64 (on the CPU: not every device has it), and how far fp32 may be off."""
    x, W, b = (t.cpu().double() for t in (x, W, b))
    slack = SLACK * (x.norm(dim=1, keepdim=True) * W.norm(dim=1) + b.abs())
    return x @ W.T + b, slack


def wrong_codes(encoders: Encoders, x: Tensor, W: Tensor, b: Tensor, k: int, block_rows: int | None = None) -> str:
    """Compare with the k largest of an exact product, up to entries that fp32 cannot tell apart."""
    values, indices = (t.cpu() for t in encoders.topk(x, W, b, k, block_rows=block_rows))
    exact, slack = _exact(x, W, b)
    if not bool((indices.sort(dim=1).values.diff(dim=1) > 0).all()):
        return "a latent is there twice in a row"
    got = exact.gather(1, indices)
    off, most = (values.double() - got.relu()).abs(), slack.gather(1, indices)
    if not bool((off <= most).all()):
        return f"a code is off by {float((off / most.clamp_min(1e-30)).max()):.3g} times what fp32 may be"
    least = got.min(dim=1, keepdim=True).values
    others = exact.scatter(1, indices, -torch.inf)
    if not bool(((others <= least + 2 * slack.amax(dim=1, keepdim=True)) | (others <= 0)).all()):
        return "a latent that is left out is larger than one that is kept"
    return "" if bool((values.diff(dim=1) <= 0).all()) else "codes are not in order"


def _wrong_codes(encoders: Encoders, seed: int, shape: Shape, block_rows: int | None, device: torch.device) -> str:
    n, d, n_latents, k = shape
    return wrong_codes(encoders, *problem(seed, n, d, n_latents, device), k, block_rows)


def wrong_on_hard_rows(encoders: Encoders, device: torch.device) -> str:
    """Compare rows of ties, of zeros and with NaN."""
    x, W, b = problem(9, 8, 32, 130, device)
    W[:] = W[0]  # everything is equal: more candidates than there is room for
    found = [wrong_codes(encoders, x, W, torch.zeros_like(b), 4)]
    x, W, b = problem(10, 8, 50, 130, device)  # no multiple of a tile: no row is read for another
    x[3] = 0
    found += [wrong_codes(encoders, x, W, bias, 4) for bias in (b, torch.zeros_like(b), b - 100)]
    x[5, 2] = torch.nan
    values, _ = encoders.topk(x, W, b, 4)
    others = [i for i in range(8) if i != 5]
    if not bool(values[5].isnan().any()) or not bool(torch.isfinite(values[others]).all()):
        found.append("a row with NaN is not NaN, or another one is")
    W[7, 1] = torch.nan
    if not bool(encoders.topk(x, W, b, 4)[0].isnan().any(dim=1).all()):
        found.append("a latent with NaN is not seen")
    return "; ".join(filter(None, found))


def wrong_above(encoders: Encoders, device: torch.device) -> str:
    """Compare with all exact pre-activations above a threshold."""
    x, W, b = problem(4, 20, 32, 200, device)
    level = 2.2
    offsets, indices, values = (t.cpu() for t in encoders.threshold(x, W, b, torch.full_like(b, level), block_rows=16))
    exact, slack = _exact(x, W, b)
    rows = torch.repeat_interleave(torch.arange(len(x)), offsets.diff())
    if len(rows) != len(indices) or len(rows) <= len(x):
        return f"{len(indices)} codes, and {len(rows)} by their offsets"
    dense = torch.zeros_like(exact)
    dense[rows, indices] = values.double()
    sure, near = exact.where(exact > level + slack, 0), (exact - level).abs() <= slack
    if not bool(((dense - sure).abs() <= slack + (level + 1) * near).all()):
        return f"a code is off by {float((dense - sure).abs().where(~near, 0).max()):.3g}"
    every = torch.full_like(b, -1)  # dense: whoever has no room for them takes the plain kernel
    pairs = zip(encoders.threshold(x, W, b, every), reference.threshold_encode(x, W, b, every))
    return "" if all(len(mine) == len(other) for mine, other in pairs) else "codes above 0 are missing"


def wrong_sums(encoders: Encoders, seed: int, shape: tuple[int, int, int], device: torch.device) -> str:
    """Compare sums of weighted decoder rows (`shape`: rows, width, latents) with those in float64."""
    n, d, n_latents = shape
    g = torch.Generator().manual_seed(seed)
    counts = torch.randint(0, 6, (n,), generator=g)
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), counts.cumsum(0)])
    indices = torch.randint(0, n_latents, (int(offsets[-1]),), generator=g)
    weights, W = torch.randn(len(indices), generator=g), torch.randn(n_latents, d, generator=g)
    exact = reference.csr_decode(offsets, indices, weights.double(), W.double())
    mine = encoders.decode(*(t.to(device) for t in (offsets, indices, weights, W))).cpu().double()
    off = float((mine - exact).abs().max()) if exact.numel() else 0.0
    return "" if off <= 1e-4 and mine.shape == exact.shape else f"a sum is off by {off:.3g}"


def configurations(n: int, k: int, **more: Any) -> dict[str, Config]:
    """Return a configuration of every architecture that has a fast step."""
    target = {"target_l0": float(k), **more}
    more = {"k": k, **more}
    quarter = n // 4
    return {
        "topk": TopK(n, **more),
        "batchtopk": BatchTopK(n, **more),
        "jumprelu": JumpReLU(n, bandwidth=0.1, **target),
        "relu": ReLU(n, **target),
        "gated": Gated(n, **target),
        "matryoshka": Matryoshka(n, sizes=(quarter, n), **more),
        "matryoshka-truncated": Matryoshka(n, sizes=(quarter, n), k_per_size="truncated", **more),
        "matryoshka-batch": Matryoshka(n, sizes=(quarter, n), over="batchtopk", **more),
        "hierarchical": HierarchicalTopK(n, levels=(k // 2, k), **more),
    }


def _rows(n: int, d: int) -> Tensor:
    """Return rows that are sums of few of 40 directions, off the origin."""
    stream = torch.Generator().manual_seed(0)
    basis = torch.randn(40, d, generator=stream)
    codes = torch.rand(n, 40, generator=stream) * (torch.rand(n, 40, generator=stream) < 0.1)
    return codes @ basis + 0.5


def _learner(config: Config, x: Tensor, n: int, device: torch.device) -> Learner:
    return initialize_learner(
        config,
        0,
        resolve(config, x.shape[1], 40, n),
        bias=x.mean(0).to(device),
        scale=torch.tensor(2.0, device=device),
        sample=x.to(device),
        device=device,
    )


def wrong_steps(config: Config, sizes: CheckSizes, device: torch.device, *, has_fast: bool) -> str:
    """Compare steps with plain ones: fast ones on the same device and once more, plain ones with those of the CPU."""
    n, d, _, _ = sizes.steps
    x = _rows(sizes.n_steps * n, d)
    mine, again = _learner(config, x, n, device), _learner(config, x, n, device)
    home = device if has_fast else torch.device("cpu")
    plain, step = _learner(config, x, n, home), fused_step if has_fast else plain_step
    if has_fast and not fuses(mine):
        return "the fast step does not take this architecture"
    for number, part in enumerate(x.split(n), start=1):
        a, b = step(mine, part.to(device)), plain_step(plain, part.to(home))
        if a.parts.keys() != b.parts.keys():
            return f"terms of the loss are {list(a.parts)} instead of {list(b.parts)}"
        for name in ("loss", "error", "fired", "dead", "grad_norm"):
            u, v = float(getattr(a, name)), float(getattr(b, name))
            if not abs(u - v) <= TOLERANCE * (1 + abs(v)):
                return f"step {number}: `{name}` is {u:.7g} instead of {v:.7g}"
        step(again, part.to(device))
    for key, t in tensors_of(mine).items():
        if not torch.equal(t, tensors_of(again)[key]):
            return f"done again, `{key}` has other bits"
        u64, v64 = t.cpu().double(), tensors_of(plain)[key].cpu().double()
        if not float((u64 - v64).norm()) <= WEIGHTS_TOLERANCE * float(v64.norm()) + 1e-9:
            return f"`{key}` is off by {float((u64 - v64).norm() / v64.norm()):.3g} of its norm"
    return ""


# ---------------------------------------------------------------- time


def _time(subject: Subject, shape: Shape, repetitions: int, into: list[Timing]) -> None:
    """Add the times of encoding and of a TopK step of this shape."""
    n, d, n_latents, k = shape
    device, fast = subject.tensors_on, subject.fast
    x, W, b = problem(1, n, d, n_latents, device)
    time_of = partial(_seconds, device=device, repetitions=repetitions)
    plain_encode = time_of(lambda: reference.topk_encode(x, W, b, k))
    fast_encode = None if fast is None else time_of(lambda: fast.topk(x, W, b, k))
    config = TopK(n_latents, k=k)

    def steps(step: Callable[[Learner, Tensor], Any]) -> float:
        learner = _learner(config, x, n, device)
        return time_of(lambda: step(learner, x))

    plain_steps, fast_steps = steps(plain_step), None if fast is None else steps(fused_step)
    into.append(Timing("encode", _words(shape), plain_encode, fast_encode))
    into.append(Timing("step", _words(shape), plain_steps, fast_steps))


def _seconds(work: Callable[[], Any], device: torch.device, repetitions: int) -> float:
    """Return the shortest of some times, after a call that compiles what has to be."""
    times = []
    for turn in range(repetitions + 1):
        _synchronize(device)
        before = time.perf_counter()
        work()
        _synchronize(device)
        if turn:
            times.append(time.perf_counter() - before)
    return min(times)


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()
