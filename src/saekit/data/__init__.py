"""Rows of activations: from arrays, from a cache on disk, from a language model on the fly, or made from a known dictionary."""

from .rows import ArrayRows as ArrayRows
from .rows import Batch as Batch
from .rows import Source as Source
from .synthetic import SyntheticRows as SyntheticRows
