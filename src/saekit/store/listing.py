"""What is at an address: the names of its files first, then one file at a time, read without running any code."""

from __future__ import annotations

import os
import re
import zipfile
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from math import prod
from pathlib import Path, PurePosixPath
from typing import IO, Any

import torch
from torch import Tensor

from ..errors import ConfigError, FormatError
from ..files import check_path, read_json
from . import tensorfile
from .hollow import Hollow, hollowed, is_matrix

PICKLED = (".pt", ".pth", ".bin", ".ckpt")
WEIGHTS = (".safetensors", ".npz", *PICKLED)
_MAX_NAMES = 20_000  # more entries than any release has; a home folder given by mistake ends here
_MAX_EXPANSION = 50  # decompressed bytes per byte of file; weights hardly compress, a bomb does a thousandfold
_MAX_TEXT = 10_000_000  # bytes of a configuration


@dataclass(frozen=True)
class Part:
    """Which rows of the matrices are read, where the layout of a file allows to read some of them."""

    n_latents: int = 0
    """Length of the axis of latents; 0: no matrix is read, each is hollow."""
    latents: int = 0
    """Number of latents whose rows are read; the others are zero. Matrices with another first axis are read whole."""

    def rows_of(self, shape: tuple[int, ...]) -> int | None:
        """Return the number of rows of a matrix that are read; None for all."""
        first, *others = shape
        return self.latents if first == self.n_latents and self.n_latents not in others else None


HEADER = Part()
"""No matrix is read: their shapes alone, and vectors and numbers."""


@dataclass(frozen=True)
class Listing:
    """The files at one address. Nothing is read, or downloaded, before it is asked for."""

    address: str
    """What was asked for, for messages and for facts that only the path states (layer, L0)."""
    names: tuple[str, ...]
    """Names of the files relative to the folder, with ``/``; two levels deep."""
    fetch: Callable[[str], Path]
    """Return the local path of one of `names`; downloads it when the address is a hub's."""
    open: Callable[[str], IO[bytes]]
    """Open one of `names` for reading; a hub sends only what is read."""
    focus: str | None = None
    """The file that the address names, where it names one."""
    part: Part | None = None
    """What of the matrices is read; None: all."""
    corrections: Mapping[str, Any] = field(default_factory=dict)
    """Entries of the configuration that are known to be others than those of the file."""

    def has(self, *names: str) -> bool:
        """Return whether all of these files are there."""
        return all(name in self.names for name in names)

    def weights(self) -> list[str]:
        """Return the names of the files that may hold tensors: the one that the address names, or all."""
        if self.focus is not None and self.focus.endswith(WEIGHTS):
            return [self.focus]
        return [name for name in self.names if "/" not in name and name.endswith(WEIGHTS)]

    def json(self, name: str) -> dict[str, Any]:
        """Return the object in a JSON file.

        Raises
        ------
        FormatError
            The file is no JSON object.
        """
        value = read_json(self._small(name), finite=False)
        if not isinstance(value, dict):
            raise FormatError(f"`{name}` of `{self.address}` must be a JSON object; it is {type(value).__name__}.")
        return {**value, **self.corrections}

    def yaml(self, name: str) -> dict[str, Any]:
        """Return the mapping in a YAML file: plain values only.

        Raises
        ------
        FormatError
            The file is no YAML mapping of plain values.
        """
        import yaml

        try:
            value = yaml.safe_load(self._small(name).read_text(encoding="utf-8"))
        except (yaml.YAMLError, UnicodeDecodeError, ValueError, RecursionError) as error:
            raise FormatError(f"`{name}` of `{self.address}` must be plain YAML; got {_first_line(error)}") from None
        if not isinstance(value, dict):
            raise FormatError(f"`{name}` of `{self.address}` must be a YAML mapping; it is {type(value).__name__}.")
        return value

    def shapes(self, name: str) -> dict[str, tuple[int, ...]]:
        """Return the shape of every tensor in a weights file, from its headers; arrays of a ``.pt`` in nested dicts
        are named with dots.

        Raises
        ------
        FormatError
            The file is damaged, or would have to be unpickled.
        """
        if name.endswith(".safetensors"):
            with self.open(name) as stream:
                header = tensorfile.parse_header(stream, self._called(name))
            return {key: entry.shape for key, entry in header.entries.items()}
        if name.endswith(".npz"):
            return {key: shape for key, (shape, _) in _npz_headers(self.fetch(name)).items()}
        return {key: tuple(t.shape) for key, t in tensors_in(self.stored(name)).items()}

    def tensors(self, name: str) -> dict[str, Tensor]:
        """Return every tensor of a weights file by name, on the CPU; see `shapes`, and `part`.

        Raises
        ------
        FormatError
            The file is damaged, would have to be unpickled, or expands beyond what weights can.
        """
        if name.endswith(".safetensors"):
            if self.part is None:
                return _read_safetensors(self.fetch(name))
            with self.open(name) as stream:
                return _read_part(stream, self._called(name), self.part)
        if name.endswith(".npz"):
            return _read_npz(self.fetch(name), self.part == HEADER)
        return tensors_in(self.stored(name))

    def stored(self, name: str) -> Any:
        """Return what ``torch.save`` put into a file: tensors and plain values; nothing is unpickled.

        Raises
        ------
        FormatError
            The file is damaged, or holds objects that need unpickling.
        """
        path = self.fetch(name)
        return hollowed(read_pickled(path, path, mapped=True)) if self.part == HEADER else read_pickled(path, path)

    def _called(self, name: str) -> Path:
        """Return what messages call a file."""
        return Path(self.address) if self.focus == name else Path(self.address) / name

    def _small(self, name: str) -> Path:
        path = self.fetch(name)
        if path.stat().st_size > _MAX_TEXT:
            raise FormatError(
                f"`{name}` of `{self.address}` must be a configuration; it has {path.stat().st_size:,} bytes."
            )
        return path


def list_local(address: str) -> Listing:
    """Return the listing of a local folder, or of the folder of a local file.

    Raises
    ------
    ConfigError
        Nothing is there, or far more files than an SAE has.
    """
    path = check_path(address)
    if not path.exists():
        raise ConfigError(
            f"an SAE must be a folder, a file of weights, or `hf:owner/name/folder`; `{address}` does not exist. "
            "`saekit catalog` lists addresses that are known."
        )
    folder, focus = (path, None) if path.is_dir() else (path.parent, path.name)

    def fetch(name: str) -> Path:
        return _inside(folder, name)

    def opened(name: str) -> IO[bytes]:
        return open(_inside(folder, name), "rb", buffering=0)

    return Listing(address, tuple(sorted(_names_below(folder))), fetch, opened, focus)


def _names_below(folder: Path) -> Iterable[str]:
    """Yield the files of a folder and of the folders in it."""
    count = 0
    for here in (folder, *(Path(entry.path) for entry in os.scandir(folder) if os.path.isdir(entry.path))):
        for entry in os.scandir(here):
            count += 1
            if count > _MAX_NAMES:
                raise ConfigError(f"`{folder}` must be the folder of an SAE; it holds more than {_MAX_NAMES:,} files.")
            if os.path.isfile(entry.path):
                yield entry.name if here == folder else f"{here.name}/{entry.name}"


def _inside(folder: Path, name: str) -> Path:
    """Return the path of a file, refusing a link out of the folder; a hub cache's own links stay in it."""
    if ".." in PurePosixPath(name).parts or PurePosixPath(name).is_absolute():
        raise FormatError(f"`{folder}`: a file's name must stay within the folder; got `{name}`.")
    path = folder / name
    real, root = path.resolve(), folder.resolve()
    cache = next((parent.parent for parent in root.parents if parent.name == "snapshots"), None)
    if not (real.is_relative_to(root) or (cache is not None and real.is_relative_to(cache / "blobs"))):
        raise FormatError(f"`{path}` must lie in its folder; it is a link to `{real}`. Copy the file itself.")
    return path


# ------------------------------------------------------------------------------------------------------ containers


def tensors_in(value: Any, prefix: str = "") -> dict[str, Tensor]:
    """Return every tensor in nested dicts, named by its keys joined with dots.

    >>> tensors_in({"state_dict": {"b": torch.zeros(2)}, "step": 3})
    {'state_dict.b': tensor([0., 0.])}
    """
    found: dict[str, Tensor] = {}
    for key, each in value.items() if isinstance(value, Mapping) else ():
        if isinstance(each, Tensor):
            found[f"{prefix}{key}"] = each.detach()
        elif isinstance(each, Mapping):
            found |= tensors_in(each, f"{prefix}{key}.")
    return found


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except (SafetensorError, ValueError, KeyError, OSError) as error:
        raise _damaged(path, error) from None


def _read_part(stream: IO[bytes], path: Path, part: Part) -> dict[str, Tensor]:
    """Return the tensors of a safetensors file: of matrices, the rows that are wanted."""
    found: dict[str, Tensor] = {}
    for name, entry in tensorfile.parse_header(stream, path).entries.items():
        if not is_matrix(entry.shape):
            found[name] = tensorfile.read_rows(stream, entry)
        elif part == HEADER:
            found[name] = Hollow(entry.shape, entry.dtype)
        elif (rows := part.rows_of(entry.shape)) is None:
            found[name] = tensorfile.read_rows(stream, entry)
        else:
            found[name] = zeros(entry.shape, entry.dtype)
            found[name][:rows] = tensorfile.read_rows(stream, entry, rows)
    return found


def zeros(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Return a tensor of zeros that takes memory only where it is written to."""
    import numpy as np

    return torch.from_numpy(np.zeros(prod(shape) * dtype.itemsize, np.uint8)).view(dtype).view(shape)


def read_pickled(source: Path | IO[bytes], path: Path, *, mapped: bool = False) -> Any:
    """Read what ``torch.save`` wrote, with torch's restricted reader; no entry may be far larger than the file.

    Parameters
    ----------
    source
        The file, or its content as a stream.
    path
        What messages call it.
    mapped
        Map the numbers into memory rather than read them: for a look at what there is.

    Raises
    ------
    FormatError
        The file is damaged, or holds objects that need unpickling.
    """
    try:
        is_archive = zipfile.is_zipfile(source)
        if is_archive:
            with zipfile.ZipFile(source) as archive:
                _check_expansion(path, sum(entry.file_size for entry in archive.infolist()))
        if not isinstance(source, Path):
            source.seek(0)
        # GPU files load on a CPU: every storage is mapped there.
        return torch.load(source, map_location="cpu", weights_only=True, mmap=mapped and is_archive)
    except FormatError:
        raise
    except Exception as error:  # the reader raises whatever a damaged stream leads to
        if "weights_only" in str(error) or "Unsupported" in str(error):
            named = re.search(r"GLOBAL (\S+)", str(error))
            what = f" (`{named[1]}`)" if named else ""
            raise FormatError(
                f"`{path}` holds Python objects besides tensors and plain values{what}; saekit unpickles nothing, "
                "because unpickling runs code. Save its state dict where it was made."
            ) from None
        raise _damaged(path, error) from None


def _npz_headers(path: Path) -> dict[str, tuple[tuple[int, ...], Any]]:
    """Return shape and dtype of each array of an ``.npz``; object arrays are refused."""
    from numpy.lib import format as npy

    headers = {}
    try:
        with zipfile.ZipFile(path) as archive:
            for entry in archive.infolist():
                with archive.open(entry) as stream:
                    read = {(1, 0): npy.read_array_header_1_0}.get(npy.read_magic(stream), npy.read_array_header_2_0)
                    shape, _, dtype = read(stream)
                if dtype.hasobject:
                    raise FormatError(f"`{path}`: `{entry.filename}` holds Python objects; saekit unpickles nothing.")
                if prod(shape) * dtype.itemsize > entry.file_size:
                    raise FormatError(f"`{path}`: `{entry.filename}` declares {shape}, more than its bytes hold.")
                headers[entry.filename.removesuffix(".npy")] = (tuple(shape), dtype)
            _check_expansion(path, sum(entry.file_size for entry in archive.infolist()))
    except FormatError:
        raise
    except Exception as error:  # zip, zlib, numpy and the tokenizer of its headers all have errors of their own
        raise _damaged(path, error) from None
    return headers


def _read_npz(path: Path, hollow: bool) -> dict[str, Tensor]:
    import numpy as np

    headers = _npz_headers(path)
    left = {name for name, (shape, _) in headers.items() if hollow and is_matrix(shape)}
    try:
        with np.load(path, allow_pickle=False) as arrays:
            read = {name: torch.from_numpy(np.ascontiguousarray(arrays[name])) for name in headers if name not in left}
        dtypes = {
            name: torch.from_numpy(np.empty(0, dtype)).dtype for name, (_, dtype) in headers.items() if name in left
        }
    except Exception as error:  # as above, and arrays of types that torch does not have
        raise _damaged(path, error) from None
    return read | {name: Hollow(headers[name][0], dtype) for name, dtype in dtypes.items()}


def _check_expansion(path: Path, n_bytes: int) -> None:
    if n_bytes > max(_MAX_EXPANSION * path.stat().st_size, 1_000_000):
        raise FormatError(
            f"`{path}` of {path.stat().st_size:,} bytes would expand to {n_bytes:,}; weights do not. It is not read."
        )


def _damaged(path: Path, error: BaseException) -> FormatError:
    return FormatError(
        f"`{path}` cannot be read as {path.suffix.lstrip('.') or 'weights'}: {_first_line(error)} "
        "Copy or download it again."
    )


def _first_line(error: BaseException) -> str:
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0][:200]}" if text else type(error).__name__
