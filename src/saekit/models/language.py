"""Language models as they are in transformers: a folder, a hub name, or the built-in one."""

from __future__ import annotations

import inspect
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..errors import ConfigError, ModelError, OfflineError, did_you_mean, listed
from ..files import digest_bytes, digest_file
from .quiet import quiet_transformers

BUILTIN_FOLDER = Path(__file__).resolve().parents[1] / "assets"
"""Where the built-in model lies: a transformers folder, here or one level below."""

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
"""Number types of models and of stored rows, by name."""

_ALIASES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}
_HUB_TIMEOUT = 6.0  # seconds to find out whether the hub can be reached at all
_HEADS = ("pooler", "classifier", "lm_head", "cls.", "score", "head")  # parts that no row comes from
_WEIGHTS = ("*.safetensors", "*.bin")


@dataclass(frozen=True, eq=False)
class LanguageModel:
    """A transformers model with its tokenizer, and what is known about both."""

    model: nn.Module = field(repr=False)
    """The model, in eval mode, on its device; the encoder alone of an encoder-decoder."""
    tokenizer: Any = field(repr=False)
    """Its tokenizer."""
    name: str
    """The name it was asked for by: a hub name, ``builtin``, or the last part of a path."""
    digest: str
    """SHA-256 over config and weight files, or over the hub revision when no local files are known."""
    d_model: int
    """Width of the residual stream."""
    context: int
    """Tokens that the model can take at once."""
    is_causal: bool
    """True for a causal LM with its head: then there is a cross-entropy."""
    revision: str | None = None
    """Commit of a hub model."""

    @property
    def device(self) -> torch.device:
        """Where the token ids must be: the device of the embedding."""
        return next(self.model.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """Number type of the weights."""
        return next(self.model.parameters()).dtype

    @property
    def n_layers(self) -> int:
        """Number of blocks."""
        from .hooks import blocks

        return len(blocks(self.model)[1])

    def __deepcopy__(self, memo: dict[int, Any]) -> LanguageModel:
        return self  # a value needs no copies: clones of an estimator share it

    @property
    def info(self) -> dict[str, Any]:
        """Name, digest, revision and number type, as plain JSON."""
        return {
            "model": self.name,
            "model_digest": self.digest,
            "model_revision": self.revision,
            "model_dtype": dtype_name(self.dtype),
        }


def load_model(
    model: str | os.PathLike[str] | LanguageModel,
    *,
    dtype: str | torch.dtype | None = None,
    device: str | torch.device | None = None,
    device_map: Any = None,
) -> LanguageModel:
    """Load a transformers model, decoder or encoder, with its tokenizer.

    Parameters
    ----------
    model
        ``"builtin"``, a folder in the layout of ``save_pretrained``, or a hub name ``owner/name``. A `LanguageModel`
        is returned as it is.
    dtype
        ``"float32"``, ``"bfloat16"``, ``"float16"`` or a torch dtype; None: as the weights are stored.
    device
        A torch device; None: the GPU where there is one, else the CPU.
    device_map
        Passed to transformers, for models larger than one device (needs accelerate); then `device` must be None.

    Returns
    -------
    LanguageModel
        In eval mode, with gradients of its parameters switched off.

    Raises
    ------
    OfflineError
        The model would have to be downloaded and the hub cannot be reached.
    ModelError
        There is no such model, it is gated, its files are damaged or incomplete.
    ConfigError
        A setting cannot work.
    """
    if isinstance(model, LanguageModel):
        return model
    dtype = as_dtype(dtype)
    if device is not None and device_map is not None:
        raise ConfigError("`device` and `device_map` exclude each other; got both. Give one of them.")
    place = _as_device(device)
    name = os.fspath(model)
    folder, revision, local = find_model(name)
    with quiet_transformers(), torch.random.fork_rng(devices=[]):
        loaded, tokenizer, is_causal = _load(name, folder, revision, local, dtype, device_map)
    if device_map is None:
        loaded = loaded.to(place)
    loaded = loaded.eval().requires_grad_(False)
    config: Any = loaded.config
    config = config.get_text_config()
    return LanguageModel(
        model=loaded,
        tokenizer=tokenizer,
        name=Path(name).expanduser().resolve().name if local and name != "builtin" and Path(name).exists() else name,
        digest=digest_of(folder, revision),
        d_model=_width(config, loaded),
        context=_context(config, tokenizer),
        is_causal=is_causal,
        revision=revision,
    )


def as_dtype(dtype: str | torch.dtype | None) -> torch.dtype | None:
    """A torch dtype from its name.

    Raises
    ------
    ConfigError
        The name is unknown.
    """
    if dtype is None or isinstance(dtype, torch.dtype):
        return dtype
    name = _ALIASES.get(str(dtype), str(dtype))
    if name not in DTYPES:
        raise ConfigError(f"`dtype` must be one of {listed(DTYPES)}; got {dtype!r}. {did_you_mean(name, DTYPES)}")
    return DTYPES[name]


def dtype_name(dtype: torch.dtype) -> str:
    """The name of a torch dtype without ``torch.``."""
    return str(dtype).removeprefix("torch.")


def _as_device(device: str | torch.device | None) -> torch.device:
    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        place = torch.device(device)
        torch.empty(0, device=place)
    except Exception as error:
        message = str(error).splitlines()[0]
        raise ConfigError(f"`device` must be a device of this machine; got {device!r} ({message}). Use cpu.") from None
    return place


def find_model(name: str) -> tuple[str, str | None, bool]:
    """What to hand to transformers, the revision, and whether only local files may be used."""
    if name == "builtin":
        candidates = [BUILTIN_FOLDER, *sorted(path for path in BUILTIN_FOLDER.glob("*") if path.is_dir())]
        for folder in candidates:
            if (folder / "config.json").is_file():
                return str(folder), None, True
        raise ModelError(
            f"the built-in model must lie in `{BUILTIN_FOLDER.name}` of the package; it is not there. "
            "Install saekit again, or give another model (--model PATH)."
        )
    path = Path(name).expanduser()
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise ModelError(
                f"`{name}` must be a folder that `save_pretrained` wrote; it has no config.json. Check the path."
            )
        return str(path), None, True
    parts = name.split("/")
    if name.startswith((".", "/", "~")) or len(parts) > 2 or not all(parts) or path.exists():
        raise ModelError(f"`{name}` must be a model folder or a hub name; there is no such folder. Check the path.")
    return _find_on_hub(name)


def _find_on_hub(name: str) -> tuple[str, str | None, bool]:
    """One quick question to the hub instead of many slow retries; without an answer, the cache."""
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

    try:
        info = HfApi().model_info(name, timeout=_HUB_TIMEOUT)
        if info.gated:
            HfApi().auth_check(name)
        return name, info.sha, False
    except GatedRepoError:
        raise ModelError(
            f"the model `{name}` is gated: its owner must give access. Accept its terms on the hub and log in with "
            "`hf auth login`, or give a local folder (--model PATH)."
        ) from None
    except RepositoryNotFoundError:
        raise ModelError(
            f"the model `{name}` must exist on the hub; there is none of that name, or it is private. "
            "Check the name, log in with `hf auth login`, or give a local folder (--model PATH)."
        ) from None
    except Exception:
        # no route, no name service, offline mode, a proxy in the way: whatever it is, the hub is out of reach
        try:
            folder = snapshot_download(name, local_files_only=True)
        except Exception:
            raise OfflineError(
                f"the model `{name}` must be downloaded and the hub cannot be reached (no network, or offline mode); "
                "it is not in the cache either. Give a local folder (--model PATH) or `--model builtin`."
            ) from None
        return folder, Path(folder).name, True


def _load(
    name: str, folder: str, revision: str | None, local: bool, dtype: torch.dtype | None, device_map: Any
) -> tuple[nn.Module, Any, bool]:
    from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer

    options: dict[str, Any] = {"local_files_only": local}
    if revision is not None and not local:
        options["revision"] = revision
    try:
        config = AutoConfig.from_pretrained(folder, **options)
        tokenizer = AutoTokenizer.from_pretrained(folder, **options)
        is_causal = _is_causal(config)
        kind = AutoModelForCausalLM if is_causal else AutoModel
        loader: Any = kind
        model, report = loader.from_pretrained(
            folder,
            dtype="auto" if dtype is None else dtype,
            device_map=device_map,
            output_loading_info=True,
            **options,
        )
    except ModelError:
        raise
    except Exception as error:
        # transformers raises OSError, ValueError, KeyError, SafetensorError, ImportError ... for files that do not fit
        message = " ".join(str(error).split())[:300] or type(error).__name__
        raise ModelError(
            f"the model `{name}` cannot be loaded: {message} "
            "Check that the folder is complete: config.json, tokenizer files and weights as safetensors."
        ) from error
    missing = [key for key in report["missing_keys"] if not any(part in key for part in _HEADS)]
    if missing:
        raise ModelError(
            f"the weights of `{name}` must be complete; {listed(missing)} are missing and would be random numbers. "
            "Are these files of the model that config.json describes?"
        )
    if model.config.is_encoder_decoder:
        model = model.get_encoder()
    return model, tokenizer, is_causal


def _is_causal(config: Any) -> bool:
    """True when the checkpoint holds a causal LM: its architecture is the one AutoModelForCausalLM would build."""
    from transformers.models.auto.modeling_auto import (
        MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as causal,
    )
    from transformers.models.auto.modeling_auto import (
        MODEL_FOR_MASKED_LM_MAPPING_NAMES as masked,
    )

    if config.model_type not in causal or config.is_encoder_decoder:
        return False
    if config.architectures:
        return causal[config.model_type] in config.architectures
    return config.model_type not in masked


def digest_of(folder: str, revision: str | None) -> str:
    """SHA-256 over the digests of config and weights; of the revision when the files are not at hand."""
    path = Path(folder)
    if not path.is_dir():
        return digest_bytes(f"{folder}@{revision}".encode())
    files = [path / "config.json", *sorted(file for pattern in _WEIGHTS for file in path.glob(pattern))]
    return digest_bytes("\n".join(f"{file.name} {digest_file(file)}" for file in files).encode())


def _width(config: Any, model: nn.Module) -> int:
    for name in ("hidden_size", "d_model", "n_embd", "dim"):
        width = getattr(config, name, None)
        if isinstance(width, int):
            return width
    embedding: Any = model.get_input_embeddings
    return int(embedding().weight.shape[1])


def _context(config: Any, tokenizer: Any) -> int:
    """The smaller of what the position embedding and the tokenizer allow; 2048 where neither says."""
    limits = [getattr(config, name, None) for name in ("max_position_embeddings", "n_positions", "max_sequence_length")]
    limits.append(getattr(tokenizer, "model_max_length", None))
    # tokenizers without a limit say 1e30
    return min((int(n) for n in limits if isinstance(n, int | float) and 0 < n < 10**8), default=2048)


def accepts(model: nn.Module, argument: str) -> bool:
    """True when the forward of `model` names `argument`."""
    return argument in inspect.signature(model.forward).parameters
