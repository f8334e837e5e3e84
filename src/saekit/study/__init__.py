"""Studies: questions asked of SAEs, each answered by a plain result."""

from __future__ import annotations

from .actions import Actions as Actions
from .actions import Task as Task
from .actions import act as act
from .actions import cloze_task as cloze_task
from .actions import read_task as read_task
from .attribution import attribution as attribution
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
from .halves import Half as Half
from .halves import halves as halves
from .halves import text_halves as text_halves
from .importance import ORDERS as ORDERS
from .importance import Importance as Importance
from .importance import importance as importance
from .importance import rank as rank
from .match import Certificate as Certificate
from .match import Matching as Matching
from .match import match_latents as match_latents
from .powerlaw import PowerLaw as PowerLaw
from .powerlaw import decoder_spectrum as decoder_spectrum
from .powerlaw import power_law as power_law
from .progressive import RANKINGS as RANKINGS
from .progressive import Progressive as Progressive
from .progressive import progressive as progressive
from .prune import prune as prune
from .sizes import SizeCurve as SizeCurve
from .sizes import SizePoint as SizePoint
from .sizes import default_sizes as default_sizes
from .sizes import measure_sizes as measure_sizes
