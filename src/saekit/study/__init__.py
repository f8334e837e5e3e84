"""Studies: questions asked of SAEs, each answered by a plain result."""

from __future__ import annotations

from .compare import compare as compare
from .comparison import Compared as Compared
from .comparison import Comparison as Comparison
from .comparison import Null as Null
from .comparison import OnRows as OnRows
from .comparison import Pair as Pair
from .comparison import Side as Side
from .evaluate import evaluate as evaluate
from .evaluation import Control as Control
from .evaluation import Entry as Entry
from .evaluation import Evaluation as Evaluation
from .evaluation import Metrics as Metrics
from .match import Certificate as Certificate
from .match import Matching as Matching
from .match import match_latents as match_latents
