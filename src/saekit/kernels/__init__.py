"""The hot loops on plain tensors, each with its plain torch reference; `use` picks between them."""

from .aux_loss import AuxK as AuxK
from .aux_loss import revive as revive
from .backend import bf16_unavailable as bf16_unavailable
from .backend import fast_here as fast_here
from .backend import mode as mode
from .backend import unavailable as unavailable
from .backend import use as use
from .backend import using as using
from .cpu.huge_pages import moved_to_large_pages as moved_to_large_pages
from .cpu.onednn_linear import fast_linears as fast_linears
from .cpu.onednn_linear import matmul as matmul
from .description import describe as describe
from .dispatch import csr_decode as csr_decode
from .dispatch import step_kernels as step_kernels
from .dispatch import step_pays as step_pays
from .dispatch import threshold_encode as threshold_encode
from .dispatch import topk_encode as topk_encode
from .reference import block_rows_for as block_rows_for
from .step_interface import Adam as Adam
from .step_interface import Encoder as Encoder
from .step_interface import Fit as Fit
from .step_interface import Gradients as Gradients
from .step_interface import Pairs as Pairs
from .step_interface import Revived as Revived
from .step_interface import StepKernels as StepKernels
from .step_interface import Terms as Terms
