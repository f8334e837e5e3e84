"""Fixtures of these tests."""

from fixtures.pooling_checks import passes as passes
from fixtures.row_checks import small_groups as small_groups
from fixtures.tiny_models import folders as folders
from fixtures.tiny_models import models as models
from fixtures.tiny_models import texts as texts
from fixtures.tiny_vision import llava as llava
from fixtures.tiny_vision import vision_folders as vision_folders
