"""Fixtures of these tests."""

import numpy as np
import pytest

from fixtures.tiny_models import WORDS
from fixtures.tiny_models import folders as folders
from fixtures.tiny_models import models as models
from fixtures.tiny_models import texts as texts


@pytest.fixture(scope="session")
def corpus() -> list[str]:
    """Eighty short texts of random words."""
    generator = np.random.default_rng(0)
    return [" ".join(generator.choice(WORDS, generator.integers(8, 20))) for _ in range(80)]
