"""Studies: questions asked of SAEs, each answered by a plain result."""

from __future__ import annotations

from .evaluate import evaluate as evaluate
from .evaluation import Control as Control
from .evaluation import Entry as Entry
from .evaluation import Evaluation as Evaluation
from .evaluation import Metrics as Metrics
