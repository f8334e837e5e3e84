"""Training: configurations, losses, the one loop, dead-latent revival, checkpoints."""

from .architectures import ARCHITECTURES as ARCHITECTURES
from .architectures import config_from_dict as config_from_dict
from .architectures import config_to_dict as config_to_dict
from .callbacks import CALLBACKS as CALLBACKS
from .callbacks import TensorBoard as TensorBoard
from .callbacks import Trackio as Trackio
from .callbacks import WandB as WandB
from .config import BatchTopK as BatchTopK
from .config import Config as Config
from .config import Gated as Gated
from .config import HierarchicalTopK as HierarchicalTopK
from .config import JumpReLU as JumpReLU
from .config import Matryoshka as Matryoshka
from .config import PAnneal as PAnneal
from .config import Relu as Relu
from .config import TopK as TopK
from .learner import STEPS as STEPS
from .loop import LearnerProgress as LearnerProgress
from .loop import Progress as Progress
from .loop import train as train
from .loop import untrained as untrained
