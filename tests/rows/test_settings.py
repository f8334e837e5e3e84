"""Settings of capturing, streaming and pooling: every attribute is described, and what cannot work is refused."""

from __future__ import annotations

import dataclasses

import pytest

from saekit.errors import ConfigError
from saekit.rows.settings import CaptureSettings, PatchSettings, PoolingSettings, StreamSettings
from saekit.settings import attribute_docs

CLASSES = [CaptureSettings, StreamSettings, PatchSettings, PoolingSettings]


@pytest.mark.parametrize("kind", CLASSES)
def test_every_attribute_is_described_with_its_default(kind):
    docs = attribute_docs(kind)
    for field in dataclasses.fields(kind):
        assert docs[field.name].rstrip().endswith("]."), field.name


@pytest.mark.parametrize(
    ("kind", "values", "message"),
    [
        (CaptureSettings, {"context": 0}, "CaptureSettings: `context` must be a whole number from 1; got 0"),
        (CaptureSettings, {"shard_rows": 1.5}, "`shard_rows` must be a whole number from 1; got 1.5"),
        (CaptureSettings, {"outliers": 1}, "`outliers` must be above 1"),
        (StreamSettings, {"block_tokens": 0}, "StreamSettings: `block_tokens` must be a whole number from 1"),
        (StreamSettings, {"padding": "middle"}, "`padding` must be one of `right`, `left`; got 'middle'"),
        (PatchSettings, {"batch_images": 0}, "`batch_images` must be a whole number from 1"),
        (PoolingSettings, {"empty": "skip"}, "`empty` must be one of `refuse`, `zero`; got 'skip'"),
        (CaptureSettings, {"outlier": None}, "unknown argument `outlier`. Did you mean `outliers`?"),
    ],
)
def test_settings_that_cannot_work(kind, values, message):
    with pytest.raises(ConfigError) as caught:
        kind(**values)
    assert message in str(caught.value)


def test_what_concerns_images_is_a_part_of_a_capture():
    settings = CaptureSettings(skip_special=False, special=2, prompt="<image>", batch_images=3)
    assert settings.patches == PatchSettings(skip_special=False, special=2, prompt="<image>", batch_images=3)
