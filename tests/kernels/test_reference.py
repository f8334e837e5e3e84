"""Blocks of pre-activations: how large they are on which device."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from saekit.kernels import reference


@pytest.mark.parametrize(("gigabytes", "rows"), [(80, 2384), (8, 238), (1, 64)])
def test_a_block_on_a_gpu_is_a_part_of_its_memory_whatever_is_free(monkeypatch, gigabytes, rows):
    device = torch.device("cuda", 0)
    found = SimpleNamespace(total_memory=gigabytes * 10**9)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda asked: found if asked == device else None)
    assert reference.block_rows_for(131_072, device) == rows
    assert reference.block_rows_for(131_072, torch.device("cpu")) == 64
