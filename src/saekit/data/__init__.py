"""Rows of activations: from arrays, a cache on disk, a language model on the fly, or a known dictionary."""

from .capture import Contexts as Contexts
from .capture import StreamRows as StreamRows
from .capture import TokenBatch as TokenBatch
from .capture import capture as capture
from .capture import stream as stream
from .capture import token_batches as token_batches
from .capture import tokenize as tokenize
from .hooks import Hook as Hook
from .hooks import activations as activations
from .hooks import find_hook as find_hook
from .hooks import hook_path as hook_path
from .hooks import splice as splice
from .model import LanguageModel as LanguageModel
from .model import load_model as load_model
from .rows import ArrayRows as ArrayRows
from .rows import Batch as Batch
from .rows import Source as Source
from .shards import ShardRows as ShardRows
from .shards import open_rows as open_rows
from .synthetic import SyntheticRows as SyntheticRows
from .texts import Texts as Texts
from .texts import read_texts as read_texts
