"""scikit-learn classes: features of an SAE, hidden states, binarization and selection of latents."""

from .binarize import Binarize as Binarize
from .features import HiddenStates as HiddenStates
from .features import SAEFeatures as SAEFeatures
from .select import SelectLatents as SelectLatents
