"""Settings of the sizes room: defaults, and what they refuse."""

from __future__ import annotations

import pytest

from saekit.errors import ConfigError
from saekit.rows.origin import OriginSettings
from saekit.settings import KeywordError, part_of
from saekit.sizes.settings import (
    AttributionSettings,
    ProgressiveSettings,
    ProgressiveStudySettings,
    PruneSettings,
    PruningStudySettings,
    SizeSettings,
)


def test_a_study_has_the_settings_of_its_steps():
    study = PruningStudySettings(refit=True, seed=3, text="body", tokens=100, ce_tokens=50, intervals=False)
    assert part_of(study, PruneSettings) == PruneSettings(refit=True, seed=3)
    assert part_of(study, SizeSettings, tokens=50) == SizeSettings(seed=3, text="body", tokens=50, intervals=False)
    assert part_of(study, OriginSettings) == OriginSettings(text="body", tokens=100, ce_tokens=50)


def test_defaults_of_the_two_studies():
    assert PruningStudySettings().tokens == ProgressiveStudySettings().tokens == 131_072
    assert (PruningStudySettings().ce_tokens, ProgressiveStudySettings().ce_tokens) == (32_768, 8192)
    assert (PruningStudySettings().latents, ProgressiveStudySettings().latents) == (False, True)


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        (PruneSettings, {"selection": "during"}, "must be 'before' or 'after'; got 'during'"),
        (PruneSettings, {"batch_rows": 0}, "`batch_rows` must be"),
        (SizeSettings, {"selection": "during"}, "must be 'before' or 'after'"),
        (SizeSettings, {"sample_rows": 3}, "must be 0 or at least 4; got 3"),
        (ProgressiveSettings, {"sample_rows": -1}, "must be 0 or at least 4"),
        (PruningStudySettings, {"selection": "during"}, "must be 'before' or 'after'"),
        (AttributionSettings, {"at": "here"}, "must be 'reconstruction' or 'activation'"),
        (SizeSettings, {"sample_row": 3}, "Did you mean `sample_rows`"),
    ],
)
def test_what_is_refused(kind, options, message):
    with pytest.raises((ConfigError, KeywordError), match=message):
        kind(**options)
