"""Fast kernels run in these tests wherever the machine has them."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from saekit import kernels


@pytest.fixture
def fast() -> Iterator[None]:
    reason = kernels.unavailable()
    if reason:
        pytest.skip(f"no fast kernels here: {reason}")
    from saekit.kernels.cpu import buffers

    buffers.release()  # nothing is remembered of other tests
    with kernels.using("fast"):
        yield
