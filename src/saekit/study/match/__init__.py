"""Matching of latents: exact, proven, without the matrix of all cosines."""

from __future__ import annotations

from .matching import Certificate as Certificate
from .matching import Matching as Matching
from .matching import match_latents as match_latents
