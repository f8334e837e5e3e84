"""Fixtures of these tests."""

from fixtures.tiny_models import folders as folders
from fixtures.tiny_models import models as models
from fixtures.tiny_models import texts as texts
