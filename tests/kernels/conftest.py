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


@pytest.fixture
def whole_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Products of whole numbers are tried, also where torch's own product in bf16 is faster."""
    reason = kernels.unavailable()
    if reason:
        pytest.skip(f"no fast kernels here: {reason}")
    from saekit.kernels.cpu import low_bit_matmul

    if not low_bit_matmul.byte_products():
        pytest.skip("no instructions for products of bytes")
    monkeypatch.setattr(low_bit_matmul, "pays", lambda: True)
