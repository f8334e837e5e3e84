"""Fixtures of these tests."""

from fixtures.results import comparison as comparison
from fixtures.results import evaluation as evaluation
from fixtures.results import training as training
