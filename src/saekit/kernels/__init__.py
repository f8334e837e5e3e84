"""The hot loops on plain tensors, each beside its plain torch reference; `use` picks between them."""

from .aux_loss import revive as revive
from .backend import fast_here as fast_here
from .backend import mode as mode
from .backend import unavailable as unavailable
from .backend import use as use
from .backend import using as using
from .cpu.huge_pages import moved_to_large_pages as moved_to_large_pages
from .cpu.onednn_linear import fast_linears as fast_linears
from .cpu.onednn_linear import matmul as matmul
from .dispatch import csr_decode as csr_decode
from .dispatch import step_kernels as step_kernels
from .dispatch import threshold_encode as threshold_encode
from .dispatch import topk_encode as topk_encode
from .dispatch import topk_step as topk_step
from .dispatch import topk_step_runs as topk_step_runs
from .reference import Adam as Adam
from .reference import StepOutcome as StepOutcome
from .reference import TopKSettings as TopKSettings
from .reference import block_rows_for as block_rows_for
from .reference import sparse_decode as sparse_decode
