"""Several processes that do one piece of work: how they meet, agree, put their parts together, and end together.

A launcher (`torchrun`, say) starts the same command some times and sets ``RANK``, ``WORLD_SIZE``, ``MASTER_ADDR`` and
``MASTER_PORT``. Inside `together` every rank gives a sign of life to the others each second. A rank that fails tells
them why; one that died or was frozen is missed. Where there is one process everything here does nothing.
"""

from __future__ import annotations

import os
import re
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Protocol, TypeVar

import torch
import torch.distributed as dist

from .errors import ConfigError, RankError, SaekitError
from .settings import differences
from .terminal import plain

S = TypeVar("S")
T = TypeVar("T")

START_TIMEOUT = timedelta(seconds=60)
"""How long ranks wait for each other at the start."""
TIMEOUT = timedelta(minutes=10)
"""How long a message of a step, or the next call of a rank, is waited for."""
LONGEST = timedelta(days=7)
"""How long ranks wait for a part of the work, while its rank gives signs of life."""

BEAT = 1.0
"""Seconds between two signs of life."""
SILENT = 40.0
"""Seconds without a sign of life after which a rank counts as lost; a thread of its own gives them during any work."""
IDLE, IDLE_WORK = 45.0, 0.1
"""Where all ranks together use less processor time than that in so many seconds of work, one of them hangs."""
GRACE = 10.0
"""Seconds that a rank has to end by itself once another is lost; a message to that one may never return."""
LINGER = 3.0
"""Seconds that rank 0, which may keep the store, stays at most until the others have read why it ends."""


class Member(Protocol):
    """One of several ranks."""

    @property
    def rank(self) -> int:
        """Its number, from 0."""
        ...

    @property
    def size(self) -> int:
        """How many there are."""
        ...


@dataclass(frozen=True)
class Ranks:
    """Which of several processes this is; the default is a process alone."""

    rank: int = 0
    size: int = 1

    def has(self, number: int) -> bool:
        """Return whether the part with a number is this rank's: parts are dealt in turn."""
        return number % self.size == self.rank


ALONE = Ranks()


# ---------------------------------------------------------------- meeting


def are_launched() -> bool:
    """Return whether several ranks do what is called here: a launcher started them, or they have met already."""
    if not dist.is_available() or _alone or (_watch is not None and _watch.is_alone):
        return False
    return dist.get_world_size() > 1 if dist.is_initialized() else int(os.environ.get("WORLD_SIZE") or 1) > 1


def refuse(where: str) -> None:
    """Refuse ranks for work that is not split; raises `ConfigError`."""
    if are_launched():
        raise ConfigError(
            f"{where}: one process must do this, because its work is not split over ranks; got "
            f"WORLD_SIZE={os.environ.get('WORLD_SIZE')}, and each rank would do and write the same. Start it without "
            "torchrun (or unset WORLD_SIZE); in Python, call it on one rank inside `saekit.ranks.alone()`."
        )


def refuse_unsplit(verb: str) -> None:
    """Refuse ranks for a verb whose work is not split, unless work that is split calls it; raises `ConfigError`."""
    if _watch is None:
        refuse(verb)


def is_first_rank() -> bool:
    """Return whether this process is rank 0, or alone."""
    return not (dist.is_available() and dist.is_initialized()) or dist.get_rank() == 0


def use_own_gpu() -> None:
    """Make ``cuda`` mean the GPU of this rank, where a launcher started one rank for each GPU of a machine."""
    if are_launched() and torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK") or 0) % torch.cuda.device_count())


def meet(where: str) -> Ranks:
    """Meet the other ranks that the launcher started, where that has not happened.

    Messages go by gloo, those between GPUs by NCCL.

    Raises
    ------
    RankError
        Some do not come.
    """
    if not dist.is_initialized():
        address = _address()
        try:
            store, rank, size = next(iter(dist.rendezvous("env://", timeout=START_TIMEOUT)))
            dist.init_process_group(
                "cpu:gloo,cuda:nccl" if torch.cuda.is_available() and dist.is_nccl_available() else "gloo",
                store=dist.PrefixStore(f"attempt-{_attempt()}", store),
                rank=rank,
                world_size=size,
                timeout=TIMEOUT,
            )
        except (RuntimeError, ValueError) as error:
            raise RankError(
                f"{where}: all {os.environ.get('WORLD_SIZE')} ranks must meet at {address} within "
                f"{START_TIMEOUT.seconds} s; rank {os.environ.get('RANK')} does not: {error}. Are all started, with "
                "one MASTER_ADDR and MASTER_PORT that each of them reaches?"
            ) from error
    return Ranks(dist.get_rank(), dist.get_world_size())


def leave() -> None:
    """Wait for all ranks and part from them, where this process is one of several."""
    if dist.is_available() and dist.is_initialized():
        dist.barrier()
        _groups.clear()
        dist.destroy_process_group()


def _address() -> str:
    return f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"


def _attempt() -> str:
    """Return which attempt of the launcher this is: its store still holds the addresses of one that died."""
    return os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")


# ---------------------------------------------------------------- agreeing


_groups: dict[str, Any] = {}
"""Process groups of this module, made once; leaving clears them."""


def patient_group() -> Any:
    """Return the group for messages that may be waited for as long as a rank works; all ranks make it together."""
    if "patient" not in _groups:
        _groups["patient"] = dist.new_group(backend="gloo", timeout=LONGEST)
    return _groups["patient"]


def agreed(ranks: Member, work: Callable[[], T]) -> T:
    """Return what rank 0 makes, on all ranks; where it fails, the same error is raised on all.

    What it calls in `work` is done by it alone.
    """
    if ranks.size == 1:
        return work()
    message: list[Any] = [None, None]
    if ranks.rank == 0:
        try:
            with alone():
                message[0] = work()
        except Exception as error:
            message[1] = error
    dist.broadcast_object_list(message, group=patient_group())
    if message[1] is not None:
        raise message[1]
    result: T = message[0]
    return result


def check_same(ranks: Member, where: str, facts: Mapping[str, Any]) -> None:
    """Refuse ranks that were started with different settings, data or versions; `ConfigError` on all of them."""
    if ranks.size == 1:
        return
    everyone: list[Any] = [None] * ranks.size
    dist.all_gather_object(everyone, dict(facts), group=patient_group())
    for rank, theirs in enumerate(everyone):
        found = differences(everyone[0], theirs).replace(" was ", " is ").replace(", now ", " on rank 0, ")
        if found:
            raise ConfigError(
                f"{where}: all ranks must have the same settings, rows and versions; on rank {rank} {found}. "
                "Start every rank with the same command in the same environment."
            )


def any_of(ranks: Member, flag: bool) -> bool:
    """Return whether a flag is set on any rank."""
    return flag if ranks.size == 1 else any(flags_of(ranks, flag))


def flags_of(ranks: Member, flag: bool) -> list[bool]:
    """Return a flag of every rank."""
    found = torch.zeros(ranks.size, dtype=torch.int32)
    found[ranks.rank] = int(flag)
    if ranks.size > 1:
        dist.all_reduce(found)
    return [bool(each) for each in found]


def dealt(ranks: Member, items: Iterable[S], work: Callable[[S], T]) -> Iterator[T]:
    """Yield what `work` makes of every item on rank 0, in order; the ranks take the items in turn.

    The other ranks yield nothing, but have to go through it. At any time a rank holds one result only.

    Parameters
    ----------
    ranks
        Who takes part.
    items
        The same on all ranks.
    work
        What is done with an item.
    """
    for number, item in enumerate(items):
        worker = number % ranks.size
        if ranks.size == 1 or worker == ranks.rank == 0:
            yield work(item)
        elif worker == ranks.rank:
            dist.send_object_list([work(item)], dst=0, group=patient_group())
        elif ranks.rank == 0:
            found: list[Any] = [None]
            dist.recv_object_list(found, src=worker, group=patient_group())
            yield found[0]


def everyones(ranks: Member, value: T) -> list[T]:
    """Return a value of every rank on rank 0, in their order; on the others nothing."""
    if ranks.size == 1:
        return [value]
    found: list[Any] | None = [None] * ranks.size if ranks.rank == 0 else None
    dist.gather_object(value, found, dst=0, group=patient_group())
    return found or []


def summed(ranks: Member, x: torch.Tensor) -> torch.Tensor:
    """Return the sum over all ranks of a tensor of whole numbers, which the order of the ranks does not change."""
    if ranks.size == 1:
        return x
    total = x.cpu().clone()
    dist.all_reduce(total, group=patient_group())
    return total.to(x.device)


def in_order(ranks: Member, parts: Iterable[tuple[int, T]]) -> Iterator[T]:
    """Yield the parts of all ranks on rank 0, in the order of their numbers; on the others nothing.

    One process yields each part as it comes. So what is put together from parts in this order has the same bits for
    any number of ranks.

    Parameters
    ----------
    ranks
        Who takes part.
    parts
        This rank's parts, each with its number among all.
    """
    if ranks.size == 1:
        yield from (part for _, part in parts)
        return
    every = [each for theirs in everyones(ranks, list(parts)) for each in theirs]
    yield from (part for _, part in sorted(every, key=lambda each: each[0]))


# ---------------------------------------------------------------- ending together


@contextmanager
def together(where: str) -> Iterator[Ranks]:
    """Do the work of the block as one of the ranks that were launched: what ends one of them ends all.

    Inside another such block this is part of that one.

    Raises
    ------
    RankError
        Another rank failed, died or does not respond; within a minute.
    ConfigError
        The ranks are called for different things.
    """
    global _watch
    if _watch is not None or not are_launched():
        yield current()
        return
    watch: _Watch | None = None
    try:
        ranks = meet(where)
        use_own_gpu()
        with _told(where, None):
            patient_group()
            watch = _watch = _Watch(where, ranks)
            watch.start()
        with _told(where, watch):
            yield ranks
            watch.meet("done")
    finally:
        _watch = None
        if watch is not None:
            watch.stop()


_watch: _Watch | None = None
_calls = 0
_alone = 0
"""How many blocks of `alone` this process is in, outside those of `together`."""


@contextmanager
def alone() -> Iterator[None]:
    """Do what is called in the block by this rank alone, as one process does it."""
    global _alone
    if _watch is None:
        _alone += 1
        try:
            yield
        finally:
            _alone -= 1
        return
    if _watch.is_alone:
        yield
        return
    _watch.is_alone = True
    try:
        yield
    finally:
        if _watch is not None:
            _watch.is_alone = False


@contextmanager
def working() -> Iterator[None]:
    """Say that this rank needs nothing but processors in this block: where all say so and none works, one hangs."""
    if _watch is None:
        yield
        return
    _watch.is_working += 1
    try:
        yield
    finally:
        if _watch is not None:
            _watch.is_working -= 1


def current() -> Ranks:
    """Return the ranks that do the work which calls this; outside a block of `together` this process alone."""
    return ALONE if _watch is None or _watch.is_alone else _watch.ranks


@contextmanager
def _told(where: str, watch: _Watch | None) -> Iterator[None]:
    """Raise `RankError` where another rank is the reason for an error, and tell the others of one of this rank."""
    try:
        yield
    except BaseException as error:
        lost = isinstance(error, RuntimeError) and not isinstance(error, SaekitError) and _is_loss(error)
        lost = lost and are_launched()
        if watch is None:
            if lost:
                raise RankError(_lost(where, " ".join(str(error).split())[:160])) from error
            raise
        if lost or isinstance(error, KeyboardInterrupt):
            watch.found.wait(2 * BEAT)  # the others may be about to say why
        watch.over.set()  # from here on nobody needs to end this rank
        if watch.reason is not None and (lost or isinstance(error, KeyboardInterrupt)):
            raise RankError(watch.reason) from error
        reason = RankError(_lost(where, " ".join(str(error).split())[:160])) if lost else error
        watch.tell(reason)
        if lost:
            raise reason from error
        raise


def _lost(where: str, detail: str) -> str:
    rank, size = os.environ.get("RANK"), os.environ.get("WORLD_SIZE")
    if dist.is_initialized():
        rank, size = str(dist.get_rank()), str(dist.get_world_size())
    return (
        f"{where}: every rank must answer; rank {rank} of {size} gets no answer from another, which has ended or does "
        f"not respond: the first message of the ranks says which and why ({detail}). {_AGAIN.get(where, _BEGIN)}"
    )


_BEGIN = "Start all ranks again."
_AGAIN = {
    "train": "Start all ranks again, with --resume to go on from the last checkpoint.",
    "capture": "Start all ranks again; they go on where they stopped.",
    "classify": "Start all ranks again; they go on where they stopped.",
}


def _is_loss(error: RuntimeError) -> bool:
    return isinstance(error, dist.DistError) or bool(re.search("gloo|onnection|imed out", str(error)))


class _Watch:
    """Signs of life of all ranks in one call, and what is done when one of them is missed."""

    def __init__(self, where: str, ranks: Ranks) -> None:
        global _calls
        _calls += 1
        self.where, self.ranks = where, ranks
        self.reason: str | None = None
        """Why this rank must end."""
        self.found, self.over = threading.Event(), threading.Event()
        self.is_working = 0
        self.is_alone = False
        address, port = os.environ.get("MASTER_ADDR"), os.environ.get("MASTER_PORT")
        self.store: Any = None
        if address and port:  # else somebody else made the ranks meet, in another way
            client = dist.TCPStore(address, int(port), is_master=False, wait_for_workers=False, timeout=START_TIMEOUT)
            self.store = dist.PrefixStore(f"saekit/{_attempt()}/{_calls}", client)
        self.main = threading.main_thread().ident if threading.current_thread() is threading.main_thread() else None
        self.looked = time.monotonic()
        self.threads = [threading.Thread(target=each, name="saekit-ranks", daemon=True) for each in self._jobs()]

    def _jobs(self) -> list[Callable[[], None]]:
        return [] if self.store is None else [self._look, self._guard]

    def start(self) -> None:
        """Wait for all ranks to begin the same call, then watch them."""
        if self.store is None:
            return
        self.store.set(f"where-{self.ranks.rank}", self.where)
        self._beat(0)
        self._wait_for("where", time.monotonic() + TIMEOUT.total_seconds())
        names = [each.decode() for each in self.store.multi_get(self._keys("where"))]
        for rank, name in enumerate(names):
            if name != names[0]:
                raise ConfigError(
                    f"{names[0]}: all ranks must be called for the same; rank {rank} was called for {name}. "
                    "Start every rank with the same command."
                )
        for each in self.threads:
            each.start()

    def meet(self, what: str) -> None:
        """Wait until all ranks are as far as this, however long they work."""
        if self.store is not None:
            self.store.set(f"{what}-{self.ranks.rank}", "1")
            self._wait_for(what, time.monotonic() + LONGEST.total_seconds())
            self._part()

    def _wait_for(self, what: str, limit: float) -> None:
        pause = 0.002
        while not self.store.check(self._keys(what)):
            if self.reason is not None:
                raise RankError(self.reason)
            if time.monotonic() > limit:
                missing = [rank for rank, key in enumerate(self._keys(what)) if not self.store.check([key])]
                raise RankError(_lost(self.where, f"rank {missing} has not called {self.where}"))
            time.sleep(pause)
            pause = min(2 * pause, 0.2)

    def _keys(self, what: str) -> list[str]:
        return [f"{what}-{rank}" for rank in range(self.ranks.size)]

    def tell(self, error: BaseException) -> None:
        """Let the others know why this rank ends."""
        if self.store is None:
            return
        try:
            if not self.store.check(["failed"]):
                said = plain(" ".join(str(error).split()))[:600]
                self.store.set("failed", f"{self.ranks.rank}:{type(error).__name__}: {said}")
            self._part()
        except RuntimeError:  # the store is gone: they know
            return

    def _part(self) -> None:
        """Say that this rank needs the store no longer; rank 0, which may keep it, waits for the others."""
        self.store.set(f"parted-{self.ranks.rank}", "1")
        limit = time.monotonic() + LINGER
        while self.ranks.rank == 0 and time.monotonic() < limit and not self.store.check(self._keys("parted")):
            time.sleep(0.01)

    def stop(self) -> None:
        """End the watch."""
        self.over.set()
        for each in self.threads:
            if each.is_alive():
                each.join(GRACE)

    # ------------------------------------------------------------ in threads

    def _beat(self, number: int) -> None:
        """Give a sign of life: its number, the processor time used, whether it works, and the messages so far."""
        worked = time.process_time() - time.thread_time() if number else 0.0
        n_messages = sum(group._get_sequence_number_for_group() for group in (dist.group.WORLD, *_groups.values()))
        self.store.set(f"beat-{self.ranks.rank}", f"{number} {worked:.3f} {int(self.is_working > 0)} {n_messages}")

    def _look(self) -> None:
        """Give signs of life and look at those of the others, until one is missed."""
        signs = [_Sign() for _ in range(self.ranks.size)]
        number = 0
        try:
            while not self.over.wait(BEAT):
                number += 1
                self._beat(number)
                if self.store.check(["failed"]):
                    rank, _, said = self.store.get("failed").decode().partition(":")
                    self.store.set(f"parted-{self.ranks.rank}", "1")
                    if int(rank) != self.ranks.rank:
                        self._end(f"rank {rank} of {self.ranks.size} has ended with an error: {said}")
                    return
                now = time.monotonic()
                for sign, value in zip(signs, self.store.multi_get(self._keys("beat"))):
                    sign.see(value.decode(), now)
                self.looked = now
                if missed := self._missed(signs, now):
                    self._end(missed)
                    return
        except RuntimeError as error:
            if not self.over.is_set():
                said = f"rank 0, or the launcher that keeps the store of the ranks at {_address()}, has ended"
                self._end(f"{said} ({' '.join(str(error).split())[:100]})")

    def _missed(self, signs: list[_Sign], now: float) -> str:
        """Return which rank is missed, and how that shows; nothing where none is."""
        silent = [rank for rank, sign in enumerate(signs) if now - sign.changed > SILENT]
        if silent:
            return f"rank {silent[0]} of {len(signs)} has given no sign of life for {SILENT:.0f} s"
        if all(sign.is_working and now - sign.worked_at > IDLE for sign in signs):
            behind = min(range(len(signs)), key=lambda rank: signs[rank].n_messages)
            return (
                f"no rank has worked for {IDLE:.0f} s: all wait for rank {behind} of {len(signs)}, which is alive and "
                "does nothing"
            )
        return ""

    def _end(self, said: str) -> None:
        if not self.over.is_set():
            again = _AGAIN.get(self.where, _BEGIN)
            self.reason = f"{self.where}: every rank must finish its part; {said}. {again}"
            self.found.set()

    def _guard(self) -> None:
        """End this rank where another is missed: by an error, or at once where that does not get through."""
        while not self.over.is_set() and not self.found.wait(BEAT):
            if time.monotonic() - self.looked > SILENT:  # the thread that looks is held up by the store itself
                self._end(f"the store of the ranks at {_address()} does not answer")
        if self.over.wait(BEAT):
            return
        if self.main is not None and hasattr(signal, "pthread_kill"):
            signal.pthread_kill(self.main, signal.SIGINT)
        if not self.over.wait(GRACE):  # a message to the rank that is missed may never return
            sys.stderr.write(f"error: {self.reason}\n")
            sys.stderr.flush()
            os._exit(1)


class _Sign:
    """What is known of a rank by its signs of life."""

    def __init__(self) -> None:
        self.changed = self.worked_at = time.monotonic()
        self.is_working, self.n_messages = False, 0
        self._value, self._worked = "", 0.0

    def see(self, value: str, now: float) -> None:
        """Note the newest sign."""
        if value == self._value:
            return
        self._value, self.changed = value, now
        _, worked, is_working, n_messages = value.split()
        self.is_working, self.n_messages = is_working == "1", int(n_messages)
        if not self.is_working or float(worked) - self._worked > IDLE_WORK:
            self._worked, self.worked_at = float(worked), now
