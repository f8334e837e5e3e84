"""Fixtures of these tests."""

from fixtures.known_saes import constant as constant
from fixtures.known_saes import identity as identity
from fixtures.known_saes import oracle as oracle
from fixtures.known_saes import rows as rows
from fixtures.known_saes import synthetic as synthetic
from fixtures.known_saes import thresholded as thresholded
from fixtures.tiny_models import folders as folders
from fixtures.tiny_models import models as models
