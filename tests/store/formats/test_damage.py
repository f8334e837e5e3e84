"""Damaged files of other libraries: read as they are, or refused with an error of saekit's; nothing else."""

from __future__ import annotations

import shutil

import pytest
import torch

from fixtures.mutations import mutate_folder
from saekit import SAE
from saekit.errors import SaekitError

from .layouts import CASES

SEEDS = range(12)  # a sample: thousands take minutes


@pytest.mark.parametrize("name", CASES)
def test_damaged_files_are_read_or_refused(name, tmp_path):
    (tmp_path / "whole").mkdir()
    address, _ = CASES[name](tmp_path / "whole", 24, 8)
    inside, x = address.relative_to(tmp_path / "whole"), torch.ones(4, 8)
    for seed in SEEDS:
        shutil.copytree(tmp_path / "whole", tmp_path / "damaged")
        what = mutate_folder(tmp_path / "damaged", seed)
        try:
            sae = SAE.load(tmp_path / "damaged" / inside)
            sae.reconstruct(x)
        except SaekitError:
            pass
        except Exception as error:
            pytest.fail(f"{name}, seed {seed} ({what}): {type(error).__name__}: {error}")
        shutil.rmtree(tmp_path / "damaged")
