"""The blocks of a model before a hook: run once for an input, and replayed whenever something is spliced in there."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import ModelError
from .hooks import Hook, blocks


@dataclass
class Prefix:
    """Blocks whose output a splice does not change, and what the last of them gave for an input.

    All else still runs: embeddings, masks, whatever the model computes next to its blocks. Whether a model keeps
    nothing else of these blocks (keys and values that later blocks share, sums over layers) is not known from its
    shape: measure it with `agrees` before use.
    """

    skipped: Sequence[nn.Module]
    """The blocks, in order."""
    _output: list[Any] = field(default_factory=list, repr=False)

    @classmethod
    def before(cls, model: nn.Module, hooks: Sequence[Hook]) -> Prefix:
        """Return the blocks that run before all hooks; a block whose output is the hook is one of them."""
        try:
            root, listing = blocks(model)
        except ModelError:
            return cls(())

        def count(hook: Hook) -> int:
            if hook.layer is None:
                return 0
            whole = hook.path == f"{root}.{hook.layer}" and not hook.is_input
            return hook.layer + 1 if whole else hook.layer

        return cls(tuple(listing[: min(map(count, hooks), default=0)]))

    @contextmanager
    def recorded(self) -> Iterator[None]:
        """Keep what the last block gives in the passes inside the block."""

        def record(forward: Callable[..., Any]) -> Callable[..., Any]:
            def run(*args: Any, **kwargs: Any) -> Any:
                output = forward(*args, **kwargs)
                self._output[:] = [_copied(output)]  # what comes next may write into its input
                return output

            return run

        with _forwards(self.skipped[-1:], record):
            yield

    @contextmanager
    def replayed(self) -> Iterator[None]:
        """Skip the blocks in the passes inside the block: each returns what the last of them gave."""
        with _forwards(self.skipped, lambda _: lambda *args, **kwargs: _copied(self._output[0])):
            yield

    def agrees(self, run: Callable[[], Tensor], tolerance: float = 1e-6) -> bool:
        """Return whether a pass gives the same when it is replayed, relative to its largest value.

        Parameters
        ----------
        run
            A forward pass over the input that was recorded, with something spliced in.
        tolerance
            Maximum difference.
        """
        if not self.skipped:
            return False
        whole = run()
        try:
            with self.replayed():
                resumed = run()
        except Exception:  # whatever a model raises when its blocks leave out what it counts on
            return False
        if resumed.shape != whole.shape:
            return False
        gap, size = (resumed.double() - whole.double()).abs().max(), whole.double().abs().max()
        return torch.equal(resumed, whole) or bool(gap <= tolerance * size)


def _copied(output: Any) -> Any:
    """Return what a block gave with its tensors in new memory."""
    if isinstance(output, Tensor):
        return output.clone()
    if isinstance(output, Mapping):
        return type(output)(**{key: _copied(value) for key, value in output.items()})
    if isinstance(output, tuple | list):
        values = [_copied(value) for value in output]
        return type(output)(*values) if hasattr(output, "_fields") else type(output)(values)
    return output


@contextmanager
def _forwards(
    modules: Sequence[nn.Module], changed: Callable[[Callable[..., Any]], Callable[..., Any]]
) -> Iterator[None]:
    """Run modules by another forward inside the block; hooks on them fire as ever, other threads see no change."""
    thread = threading.get_ident()

    def here_only(own: Callable[..., Any], other: Callable[..., Any]) -> Callable[..., Any]:
        return lambda *args, **kwargs: (other if threading.get_ident() == thread else own)(*args, **kwargs)

    with ExitStack() as stack:
        for module in modules:
            own = module.forward
            stack.callback(_put_back, module, module.__dict__.get("forward"))
            module.forward = here_only(own, changed(own))
        yield


def _put_back(module: nn.Module, forward: Callable[..., Any] | None) -> None:
    """Undo a change of the forward of a module; None where it had none of its own beside that of its class."""
    if forward is None:
        del module.forward
    else:
        module.forward = forward
