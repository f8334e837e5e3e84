"""Settings of a run: refused when they are made; the help texts of the command line."""

import dataclasses
import subprocess
import sys

import pytest
import torch

from saekit.errors import ConfigError
from saekit.settings import attribute_docs
from saekit.training.config import TopK
from saekit.training.loop import train
from saekit.training.settings import TrainSettings


@pytest.mark.parametrize(
    "values, match",
    [
        ({"batch_rows": 0}, "`batch_rows` must be a whole number from 1; got 0"),
        ({"log_every": 0}, "`log_every` must be a whole number from 1; got 0"),
        ({"checkpoint_every": 1.5}, "`checkpoint_every` must be a whole number from 1; got 1.5"),
        ({"data_seed": 0.5}, "`data_seed` must be a whole number from 0; got 0.5"),
        ({"precision": "fp16"}, "`precision` must be 'fp32' or 'bf16'; got 'fp16'"),
        ({"batch_row": 8}, "unknown argument `batch_row`. Did you mean `batch_rows`"),
    ],
)
def test_refused(values, match):
    with pytest.raises(ConfigError, match=match):
        TrainSettings(**values)


def test_intervals_follow_the_length():
    settings = TrainSettings()
    assert [settings.log_interval(steps) for steps in (5, 1000, 100_000)] == [1, 10, 100]
    assert [settings.checkpoint_interval(steps) for steps in (5, 1000, 100_000)] == [1, 100, 1000]
    assert TrainSettings(log_every=7).log_interval(5) == 7
    assert TrainSettings(checkpoint_every=7).checkpoint_interval(5) == 7


def test_a_setting_that_is_passed_to_train_is_pointed_to_its_place():
    with pytest.raises(ConfigError, match=r"`batch_rows`. Pass settings=TrainSettings\(batch_rows=…\)"):
        train(TopK(8, k=2), torch.zeros(4, 2), batch_rows=2)


def test_every_setting_has_a_help_text_and_importing_them_loads_no_torch():
    assert set(attribute_docs(TrainSettings)) == {field.name for field in dataclasses.fields(TrainSettings)}
    code = "import sys, saekit.training.settings; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
