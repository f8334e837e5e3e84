"""The model as a value: SAE, its sparse Codes, the rules that select them, and input scaling."""

from . import rules as rules
from .codes import Codes as Codes
from .freeze import freeze_batchtopk as freeze_batchtopk
from .freeze import freeze_gated as freeze_gated
from .model import SAE as SAE
from .scaling import Scaling as Scaling
