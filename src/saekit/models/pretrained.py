"""What all pretrained transformers models share: finding their files, reading them, and what is known afterwards."""

from __future__ import annotations

import functools
import inspect
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import nn

from ..errors import ConfigError, MissingModelError, ModelError, OfflineError, listed, nearest
from ..files import digest_bytes, digest_file, local_path
from ..hub import Unreachable, ask_hub
from .randomized import prefix_of, randomized_digest, split_prefix

if TYPE_CHECKING:
    from transformers import PretrainedConfig

BUILTIN_FOLDER = Path(__file__).resolve().parents[1] / "assets"
"""Where the built-in model lies: a transformers folder, here or one level below."""

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
"""Number types of models and of stored rows, by name."""

_ALIASES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}
_WEIGHTS = ("*.safetensors", "*.bin")

M = TypeVar("M", bound="PretrainedModel")


@dataclass(frozen=True, eq=False, kw_only=True)
class PretrainedModel:
    """A transformers model, and what is known about it."""

    model: nn.Module = field(repr=False)
    """The model, in eval mode, on its device."""
    name: str
    """The name it was asked for by: a hub name, ``builtin``, or the last part of a path."""
    digest: str
    """SHA-256 over config and weight files, or over the hub revision when no local files are known."""
    d_model: int
    """Width of the residual stream."""
    revision: str | None = None
    """Commit of a hub model."""
    path: str | None = None
    """Folder that it was read from, where it was given as one."""

    @property
    def device(self) -> torch.device:
        """Where the inputs must be: the device of the embedding, or where accelerate puts it when it is needed."""
        first = next(self.model.parameters()).device
        hook: Any = getattr(self.model, "_hf_hook", None)
        return torch.device(hook.execution_device) if first.type == "meta" and hook is not None else first

    @property
    def dtype(self) -> torch.dtype:
        """Number type of the weights."""
        return next(self.model.parameters()).dtype

    @property
    def row_dtype(self) -> torch.dtype:
        """Number type of its rows unless another is asked for: that of the weights, where rows can be stored in it."""
        return self.dtype if self.dtype in DTYPES.values() else torch.float32

    def __deepcopy__(self: M, memo: dict[int, object]) -> M:
        return self  # a value needs no copies: clones of an estimator share it

    @property
    def info(self) -> dict[str, Any]:
        """Name, digest, revision, number type and folder, as plain JSON."""
        return {
            "model": self.name,
            "model_digest": self.digest,
            "model_revision": self.revision,
            "model_dtype": dtype_name(self.dtype),
            **({} if self.path is None else {"model_path": self.path}),
        }


# ------------------------------------------------------------------------------------------ number types and devices


def as_dtype(dtype: str | torch.dtype | None) -> torch.dtype | None:
    """Return a torch dtype by its name.

    Raises
    ------
    ConfigError
        The name is unknown.
    """
    if dtype is None or isinstance(dtype, torch.dtype):
        return dtype
    name = _ALIASES.get(str(dtype), str(dtype))
    if name not in DTYPES:
        raise ConfigError(f"`dtype` must be one of {listed(DTYPES)}; got {dtype!r}.{nearest(name, DTYPES)}")
    return DTYPES[name]


def dtype_name(dtype: torch.dtype) -> str:
    """Return the name of a torch dtype without ``torch.``."""
    return str(dtype).removeprefix("torch.")


def accepts(model: nn.Module, argument: str) -> bool:
    """Return whether the forward of `model` names `argument`."""
    return argument in inspect.signature(model.forward).parameters


@dataclass(frozen=True)
class Placement:
    """Number type and device that a model is loaded with."""

    dtype: torch.dtype | None
    device: torch.device
    device_map: Any

    @staticmethod
    def checked(dtype: str | torch.dtype | None, device: str | torch.device | None, device_map: object) -> Placement:
        """Return the placement that `load_model` is asked for.

        Raises
        ------
        ConfigError
            The number type or the device is unknown, or both a device and a device map are given.
        """
        number_type = as_dtype(dtype)
        if device is not None and device_map is not None:
            raise ConfigError("`device` and `device_map` exclude each other; got both. Give one of them.")
        return Placement(number_type, _as_device(device), device_map)


def _as_device(device: str | torch.device | None) -> torch.device:
    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        found = torch.device(device)
        torch.empty(0, device=found)
    except Exception as error:
        message = str(error).splitlines()[0]
        raise ConfigError(f"`device` must be a device of this machine; got {device!r} ({message}). Use cpu.") from None
    return found


# ------------------------------------------------------------------------------------------------------------- files


@dataclass(frozen=True)
class ModelFiles:
    """A model that exists: in a local folder, or on the hub."""

    name: str
    """The name it was asked for by."""
    folder: str
    """What transformers is given: a folder or a hub name."""
    revision: str | None
    """Commit of a hub model."""
    is_local: bool
    """Whether only local files may be used."""
    seed: int | None = None
    """Seed of the random weights that the model gets once it is read; None: it stays as it was trained."""

    @property
    def options(self) -> dict[str, Any]:
        """Keyword arguments for every ``from_pretrained``."""
        pinned = {"revision": self.revision} if self.revision is not None and not self.is_local else {}
        # without a word about code, transformers asks the terminal whether to run it
        return {"local_files_only": self.is_local, "trust_remote_code": False, **pinned}

    @property
    def short_name(self) -> str:
        """The hub name, ``builtin``, or the last part of a path."""
        return self.prefix + (self.name if self._folder is None else self._folder.name)

    @property
    def prefix(self) -> str:
        """What the name begins with: ``randomized:`` where the model gets random weights."""
        return "" if self.seed is None else prefix_of(self.seed)

    @property
    def address(self) -> str:
        """The name that finds these files again."""
        return self.prefix + self.name

    @property
    def path(self) -> str | None:
        """The folder, resolved, where the model was asked for by its folder; with its prefix."""
        return None if self._folder is None else f"{self.prefix}{self._folder}"

    @property
    def _folder(self) -> Path | None:
        given = local_path(self.name)
        is_path = self.is_local and self.name != "builtin" and os.path.exists(given)
        return given.resolve() if is_path else None

    @property
    def stored(self) -> Path | None:
        """The folder of the files on this machine, of a hub model in the cache; None: they are still to be downloaded.

        With and without network it is the same one, and so are the digests of what is in it.
        """
        from huggingface_hub import snapshot_download

        if self.is_local:
            return Path(self.folder)
        try:
            folder = Path(snapshot_download(self.name, revision=self.revision, local_files_only=True))
        except Exception:  # not in the cache, or no cache to look into
            return None
        return folder if (folder / "config.json").is_file() and _weights_in(folder) else None

    @property
    def stamp(self) -> tuple[tuple[str, int, int], ...]:
        """Names, sizes and times of the files: when they are as before, so is the digest."""
        folder = self.stored
        files = sorted(folder.iterdir()) if folder is not None and folder.is_dir() else []
        return tuple((file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files if file.is_file())

    @property
    def digest(self) -> str:
        """SHA-256 over the digests of config and weights; of the revision when the files are not at hand."""
        digest = _digest(str(self.stored or self.folder), self.revision, self.stamp)
        return randomized_digest(digest, self.seed) if self.seed is not None else digest


@functools.lru_cache(maxsize=16)
def _digest(folder: str, revision: str | None, stamp: tuple[tuple[str, int, int], ...]) -> str:
    path = Path(folder)
    if not path.is_dir():
        return digest_bytes(f"{folder}@{revision}".encode())
    return digest_files([path / "config.json", *_weights_in(path)])


def _weights_in(folder: Path) -> list[Path]:
    return sorted(file for pattern in _WEIGHTS for file in folder.glob(pattern))


def digest_files(files: Sequence[Path]) -> str:
    """Return the SHA-256 over the names and digests of files."""
    return digest_bytes("\n".join(f"{file.name} {digest_file(file)}" for file in files).encode())


def find_model(model: str | os.PathLike[str]) -> ModelFiles:
    """Find the files of a model: ``builtin``, a folder, or a hub name; ``randomized:`` may stand before it.

    Raises
    ------
    OfflineError
        The model would have to be downloaded and the hub cannot be reached.
    ModelError
        There is no such model, or it is gated.
    """
    name, seed = split_prefix(os.fspath(model))
    files = _find(name)
    return files if seed is None else replace(files, seed=seed)


def _find(name: str) -> ModelFiles:
    if name == "builtin":
        return _find_builtin()
    path = local_path(name)
    if os.path.isdir(path):
        if not (path / "config.json").is_file():
            raise MissingModelError(
                f"`{name}` must be a folder that `save_pretrained` wrote; it has no config.json. Check the path."
            )
        return ModelFiles(name, str(path), None, True)
    parts = name.split("/")
    if name.startswith((".", "/", "~")) or len(parts) > 2 or not all(parts) or os.path.exists(path):
        raise MissingModelError(
            f"`{name}` must be a model folder or a hub name; there is no such folder. Check the path."
        )
    return _find_on_hub(name)


def _find_builtin() -> ModelFiles:
    candidates = [BUILTIN_FOLDER, *sorted(path for path in BUILTIN_FOLDER.glob("*") if path.is_dir())]
    for folder in candidates:
        if (folder / "config.json").is_file():
            return ModelFiles("builtin", str(folder), None, True)
    raise ModelError(
        f"the built-in model must lie in `{BUILTIN_FOLDER.name}` of the package; it is not there. "
        "Install saekit again, or give another model (--model PATH)."
    )


def _find_on_hub(name: str) -> ModelFiles:
    """Ask the hub; without an answer, look into the cache."""
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import GatedRepoError, HFValidationError, RepositoryNotFoundError

    try:
        info = ask_hub("model", name)
        if info.gated:
            HfApi().auth_check(name)
        return ModelFiles(name, name, info.sha, False)
    except GatedRepoError:
        raise ModelError(
            f"the model `{name}` is gated: its owner must give access. Accept its terms on the hub and log in with "
            "`hf auth login`, or give a local folder (--model PATH)."
        ) from None
    except (RepositoryNotFoundError, HFValidationError):
        raise ModelError(
            f"the model `{name}` must exist on the hub; there is none of that name, or it is private. "
            "Check the name, log in with `hf auth login`, or give a local folder (--model PATH)."
        ) from None
    except Unreachable as why:
        try:
            folder = snapshot_download(name, local_files_only=True)
        except Exception:
            raise OfflineError(
                f"the model `{name}` must be downloaded and the hub cannot be reached ({why}); it is not in the cache "
                "either. Give a local folder (--model PATH) or `--model builtin`."
            ) from None
        return ModelFiles(name, folder, Path(folder).name, True)


# ----------------------------------------------------------------------------------------------------------- reading


@contextmanager
def readable(files: ModelFiles, needed: str) -> Iterator[None]:
    """Turn errors of transformers inside the block into a `ModelError` that names the files that are `needed`."""
    try:
        yield
    except ModelError:
        raise
    except Exception as error:
        # transformers raises OSError, ValueError, KeyError, SafetensorError, ImportError ... for files that do not fit
        if "trust_remote_code" in str(error):
            raise ModelError(
                f"the model `{files.name}` must be one that transformers itself can build; it needs code that lies "
                "with its files, and such code is never run (no `trust_remote_code`). Give a model without `auto_map` "
                "in its config.json and tokenizer_config.json: a version converted to transformers, where there is one."
            ) from None
        message = " ".join(str(error).split())[:300] or type(error).__name__
        raise ModelError(
            f"the model `{files.name}` cannot be loaded: {message} "
            f"Check that the folder is complete: config.json, {needed} and weights as safetensors."
        ) from error


def read_config(files: ModelFiles) -> PretrainedConfig:
    """Read the config of a model.

    Raises
    ------
    ModelError
        It cannot be read.
    """
    from transformers import AutoConfig

    with readable(files, "tokenizer or image processor files"):
        return AutoConfig.from_pretrained(files.folder, **files.options)


@dataclass(frozen=True)
class Weights:
    """A model with the weights of its files."""

    model: Any
    ignored: tuple[str, ...]
    """Weights that the files do not have and no row comes from: random numbers in a head."""


def read_weights(loader: Any, files: ModelFiles, how: Placement, heads: Sequence[str]) -> Weights:
    """Read a model with one of the ``Auto`` classes of transformers.

    Parameters
    ----------
    loader
        The class.
    files, how
        What is read, and into which number type.
    heads
        Parts of names of weights outside the blocks that may be missing, because no row comes from them.

    Raises
    ------
    ModelError
        Weights are missing.
    """
    model, report = loader.from_pretrained(
        files.folder,
        dtype="auto" if how.dtype is None else how.dtype,
        device_map=how.device_map,
        output_loading_info=True,
        **files.options,
    )
    inside = _paths_of_rows(model)
    missing = {key for key in report["missing_keys"] if not (model.config.is_encoder_decoder and "decoder." in key)}
    ignored = {key for key in missing if any(part in key for part in heads) and not key.startswith(inside)}
    random = sorted(_random(model, missing - ignored))
    if random:
        raise ModelError(
            f"the weights of `{files.name}` must be complete; {listed(random, 8)} are missing and would be random "
            "numbers. Are these files of the model that config.json describes?"
        )
    return Weights(model, tuple(sorted(ignored)))


def _paths_of_rows(model: Any) -> tuple[str, ...]:
    """Return beginnings of names of weights that rows come from whatever they are called: those of the blocks."""
    from .hooks import blocks

    try:
        return (f"{blocks(model)[0]}.",)
    except ModelError:
        return ()


def _random(model: Any, names: set[str]) -> set[str]:
    """Return which of some weights are drawn, or are what training begins with, rather than computed (sinusoids)."""
    if not names:
        return set()
    found = model.state_dict()
    drawn = {name for name in names if name not in found or found[name].unique().numel() <= 2}
    for seed in (1, 2):
        if names - drawn:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(seed)
                again = type(model)(model.config).state_dict()
            drawn |= {name for name in names - drawn if not torch.equal(again[name].to(found[name]), found[name])}
    return drawn


def settle(model: nn.Module, how: Placement) -> nn.Module:
    """Put a model onto its device, in eval mode, without gradients of its parameters."""
    if how.device_map is None:
        model = model.to(how.device)
    return model.eval().requires_grad_(False)


def width(config: PretrainedConfig, model: nn.Module) -> int:
    """Return the width of the residual stream."""
    for name in ("hidden_size", "d_model", "n_embd", "dim"):
        found = getattr(config, name, None)
        if isinstance(found, int):
            return found
    embedding: Any = model.get_input_embeddings
    try:
        return int(embedding().weight.shape[1])
    except (AttributeError, NotImplementedError):
        raise ModelError(
            f"`{type(model).__name__}` must have a residual stream of one width; neither its config nor its embedding "
            "says one. Convolutional models and models in stages of several widths cannot be read."
        ) from None
