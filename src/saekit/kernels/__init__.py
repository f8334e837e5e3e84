"""The hot loops on plain tensors: top-k encode and sparse decode, each beside its plain torch reference."""

from .reference import block_rows_for as block_rows_for
from .reference import csr_decode as csr_decode
from .reference import sparse_decode as sparse_decode
from .reference import topk_encode as topk_encode
