"""Settings that measurements share are checked when they are made."""

from __future__ import annotations

import pytest

from saekit.comparison.settings import ComparisonSettings, ConsensusSettings, OrphanSettings
from saekit.errors import ConfigError
from saekit.evaluation.settings import EvaluationSettings
from saekit.settings import attribute_docs

EVERY = (EvaluationSettings, ComparisonSettings, OrphanSettings, ConsensusSettings)


@pytest.mark.parametrize("settings", EVERY)
def test_numbers_out_of_range_are_refused_in_the_name_of_the_function(settings):
    for name in ("max_rows", "batch_rows"):
        with pytest.raises(ConfigError, match=f"^{settings.CALLER}: `{name}` must be a whole number from 1; got 0"):
            settings(**{name: 0})


@pytest.mark.parametrize("settings", EVERY)
def test_every_setting_has_a_help_text(settings):
    docs = attribute_docs(settings)
    assert all(docs[name] for name in settings.__dataclass_fields__)


def test_particular_ranges():
    with pytest.raises(ConfigError, match="evaluate: `tokens` must be a whole number from 0; got -1"):
        EvaluationSettings(tokens=-1)
    for settings in (ComparisonSettings, ConsensusSettings):
        with pytest.raises(ConfigError, match=f"{settings.CALLER}: `threshold` is a cosine"):
            settings(threshold=1.01)
    with pytest.raises(ConfigError, match="consensus: `min_seeds` must be a whole number from 2; got 1"):
        ConsensusSettings(min_seeds=1)
