"""Fixtures of these tests."""

from fixtures.known_saes import constant as constant
from fixtures.known_saes import identity as identity
from fixtures.known_saes import oracle as oracle
from fixtures.known_saes import rows as rows
from fixtures.known_saes import synthetic as synthetic
from fixtures.known_saes import thresholded as thresholded
from fixtures.transcoders import perfect as perfect
from fixtures.transcoders import relu_lm as relu_lm
from fixtures.transcoders import relu_model as relu_model
from fixtures.transcoders import rough as rough
