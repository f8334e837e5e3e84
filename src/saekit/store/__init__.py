"""SAEs in files: the native folder (``sae.safetensors`` and ``sae.json``), on disk or in a hub repository."""

from .native import describe as describe
from .native import save as save
from .opening import load as load
