"""The native format: a folder with ``sae.safetensors`` (every tensor used at inference) and ``sae.json`` (the rest).

``docs/formats.md`` describes it for other programs. What this module guarantees:

* A crash at any moment leaves a folder that loads as the old SAE or as the new one. The header of the tensor file names
  the description that belongs to it; a new one waits as ``sae.json.next`` while the tensors are replaced.
* ``content`` in ``sae.json`` is `SAE.digest` of what was saved.
* ``save`` of what ``load`` returned writes the same bytes.
* ``load(path, latents=m)`` reads the first m latents and still verifies what it reads: digests are stored per block of
  latents. From the hub too: only those bytes are asked for.
* ``sizes`` holds what prefixes were measured to be worth, so that ``load(path, fvu=0.2)`` can pick one.
* Whatever is not understood is refused: unknown keys, other shapes, altered bytes, a newer schema.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import IO, Any, TypeVar

import torch
from torch import Tensor

from ..errors import ConfigError, FormatError, SaekitError, listed
from ..files import (
    SAVE_WAIT,
    check_path,
    dump_json,
    locked_folder,
    read_json,
    read_steadily,
    remove_file,
    rename_file,
    seal,
    write_bytes,
)
from ..sae.digest import bytes_of
from ..sae.model import SAE
from ..sae.rules import RULES
from ..sae.scaling import Scaling
from . import tensorfile
from .blocks import SCORES, block_digests, blocks_digest, by_latent, shared_digest
from .description import DESCRIPTION, FORMAT, KEYS, TENSORS, check_description, check_header, describe_value

T = TypeVar("T")

_NEXT = "sae.json.next"
_PENDING = f".{TENSORS}.new"
_BLOCKS = "saekit-blocks"


# ---------------------------------------------------------------------------------------------------------- writing


def save(sae: SAE, folder: str | os.PathLike[str]) -> Path:
    """Write `sae` into `folder` as ``sae.safetensors`` and ``sae.json``.

    Parameters
    ----------
    sae
        The SAE; its tensors are stored in the dtype they have. ``sae.provenance["latent_order"]`` (``"energy"``, say)
        marks latents stored in order of importance, so that a prefix of the file is a sensible smaller SAE;
        ``sae.provenance["sizes"]`` (see `saekit.sizes.size_curve.SizeCurve.write_into`) says what prefixes are worth.
    folder
        Created if missing. An SAE that is there already is replaced; a process that loads it meanwhile gets the old one
        or the new one. A second process that saves waits.

    Returns
    -------
    Path
        The folder.

    Raises
    ------
    ConfigError
        The provenance cannot be written as strict JSON (NaN, an object), or `folder` is a file.
    StorageError
        The system refused (a full disk, say); the folder holds what it held before.
    BusyError
        Others have been writing to the folder for a minute.
    """
    folder = check_path(folder)
    tensors = {name: t.detach().cpu().contiguous() for name, t in sae.tensors().items()}
    tensors |= {f"{SCORES}{name}": score for name, score in sorted(sae.scores.items())}
    description = describe_value(sae, tensors)
    _checked_json(description, folder)
    with locked_folder(folder, wait=SAVE_WAIT):
        _finish(folder)
        pending = folder / _PENDING
        try:
            metadata = {FORMAT: description["content"], _BLOCKS: blocks_digest(description)}
            n_bytes, digest = tensorfile.write(pending, tensors, metadata)
            description["file"] = {"name": TENSORS, "bytes": n_bytes, "digest": digest}
            ordered = {key: description[key] for key in KEYS}
            # From here on every state on disk is a readable SAE: see `_description`.
            write_bytes(folder / _NEXT, dump_json(seal(ordered)).encode())
            rename_file(pending, folder / TENSORS)
            rename_file(folder / _NEXT, folder / DESCRIPTION)
        finally:
            if pending.exists():  # not renamed: the old SAE counts
                remove_file(folder / _NEXT)
                remove_file(pending)
    return folder


def _finish(folder: Path) -> None:
    """Bring what a killed save left to its end: what `load` would read becomes the two files."""
    if (folder / _NEXT).exists():
        try:
            with _tensor_stream(folder) as stream:
                path, *_ = _description(folder, stream)
        except FormatError:
            path = folder / DESCRIPTION
        if path.name == _NEXT:
            rename_file(path, folder / DESCRIPTION)
    for name in (_NEXT, _PENDING):
        remove_file(folder / name)


def _checked_json(description: dict[str, Any], folder: Path) -> None:
    """Refuse what JSON cannot hold before the first byte is written."""
    try:
        dump_json(description)
    except (TypeError, ValueError) as error:
        raise ConfigError(
            f"save: `provenance` of an SAE must be plain JSON (no NaN, no objects); got {error}. "
            f"Nothing was written to `{folder}`."
        ) from None


# ---------------------------------------------------------------------------------------------------------- reading


def load(path: str | os.PathLike[str], latents: int | None = None, *, fvu: float | None = None) -> SAE:
    """Read an SAE and verify it.

    Parameters
    ----------
    path
        A folder with ``sae.json`` (or one of its two files), or ``"hf:owner/name/folder"`` in a hub repository
        (``"hf:owner/name/folder@revision"`` for a branch, tag or commit).
    latents
        Read only the first `latents` latents: the result equals ``load(path).take(latents)`` (a TopK SAE then chooses
        ``min(k, latents)`` of them), but only their rows are read from disk, rounded up to whole blocks for
        verification (at most n_latents / 256 latents, or 63, more). From the hub only those bytes are downloaded,
        unless the file is in the cache already.
    fvu
        Instead of `latents`: the smallest measured size whose fraction of variance unexplained is at most this.

    Returns
    -------
    SAE
        On the CPU, in the dtype of the file.

    Raises
    ------
    FormatError
        A file is truncated, altered, of a newer schema, or holds what this release does not know.
    ConfigError
        There is no SAE at `path`, `latents` is not within 1..n_latents, or no size was measured or meets `fvu`.
    OfflineError, ModelError
        The hub cannot be reached, or does not have it.
    """
    if latents is not None and fvu is not None:
        raise ConfigError(f"load: give `latents` or `fvu`, not both; got {latents!r} and {fvu!r}.")
    if os.fspath(path).startswith("hf:") and (latents is not None or fvu is not None):
        from .hub import opened

        with opened(os.fspath(path), DESCRIPTION, TENSORS) as (folder, stream):
            return _load(folder, stream, latents, fvu)
    folder = _folder(path)
    return _reading(folder, lambda stream: _load(folder, stream, latents, fvu))


def _reading(folder: Path, read: Callable[[IO[bytes]], T]) -> T:
    """Return what `read` makes of an SAE's tensor file; again where the SAE is replaced meanwhile."""

    def once() -> T:
        with _tensor_stream(folder) as stream:
            return read(stream)

    return read_steadily([folder / name for name in (TENSORS, DESCRIPTION, _NEXT)], once)


def _load(folder: Path, stream: IO[bytes], latents: int | None, fvu: float | None) -> SAE:
    _, description, header = _description(folder, stream)
    n_latents = description["n_latents"]
    if fvu is not None:
        latents = _size_for(description, fvu, folder)
    latents = n_latents if latents is None else latents
    if not (isinstance(latents, int) and 1 <= latents <= n_latents):
        raise ConfigError(
            f"load: `latents` must be a whole number from 1 to n_latents={n_latents}; got {latents!r} for `{folder}`."
        )
    read = _read_whole if latents == n_latents else _read_prefix
    tensors = read(stream, header, description, latents, folder / TENSORS)
    try:
        sae = _build(description, tensors, latents)
    except (SaekitError, TypeError, ValueError, RuntimeError) as error:
        raise FormatError(f"`{folder / DESCRIPTION}` describes an SAE that cannot be: {error}") from None
    # Without a seal, the digest of the function is what binds the rule and the scaling to the tensors.
    if read is _read_whole and not description["sealed"] and _BLOCKS in header.metadata:
        _check_content(sae, description, folder)
    return sae


def _check_content(sae: SAE, description: Mapping[str, Any], folder: Path) -> None:
    if sae.digest() != description["content"]:
        raise FormatError(
            f"`{folder / DESCRIPTION}` must describe the SAE that was saved; its `content` is another: the rule, the "
            "scaling or a tensor was altered. Copy both files again."
        )


def _size_for(description: Mapping[str, Any], fvu: float, folder: Path) -> int:
    """Return the smallest measured size that meets the target."""
    curve = description["sizes"]
    points = [] if curve is None else curve["points"]
    measured = [
        (point["latents"], point["metrics"]["fvu"]["value"])
        for point in points
        if isinstance(point["metrics"].get("fvu", {}).get("value"), int | float)
    ]
    if not measured:
        raise ConfigError(
            f"load: `fvu` picks a size from the measured ones, and `{folder}` holds none. Measure it first "
            "(`saekit prune SAE --rows R --out DIR`, or saekit.measure_sizes), or give `latents`."
        )
    meets = [latents for latents, value in measured if value <= fvu]
    if not meets:
        latents, best = min(measured, key=lambda point: point[1])
        raise ConfigError(
            f"load: no measured size of `{folder}` reaches an FVU of {fvu:g}; the best is {best:.3g} with {latents:,} "
            "latents. Ask for no less than that."
        )
    return min(meets)


def describe(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Return what ``sae.json`` says (shapes, rule, dtype, provenance), checked against the header of the tensor file.

    Reads no tensor. `path` as in `load`; raises as `load` does. The result is JSON-able; ``"path"`` is the folder.
    """
    folder = _folder(path)
    description = _reading(folder, lambda stream: _description(folder, stream)[1])
    return {
        "path": str(folder),
        **{key: value for key, value in description.items() if key not in ("blocks", "sealed")},
    }


def _build(description: Mapping[str, Any], tensors: dict[str, Tensor], latents: int) -> SAE:
    own = {name: t for name, t in tensors.items() if "." not in name}
    rule_settings = dict(description["rule"])
    rule_class = RULES[rule_settings.pop("name")]
    rule = rule_class(**rule_settings, **_strip(tensors, "rule."))
    if latents < description["n_latents"]:
        rule = rule.take(torch.arange(latents), description["n_latents"])
    scaling = Scaling(**description["scaling"], **_strip(tensors, "scaling."))
    sizes = {} if description["sizes"] is None else {"sizes": description["sizes"]}
    provenance = {**description["provenance"], **sizes}
    return SAE(**own, rule=rule, scaling=scaling, provenance=provenance, scores=_strip(tensors, SCORES))


def _strip(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Any]:
    return {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}


def _read_whole(
    stream: IO[bytes], header: tensorfile.Header, description: Mapping[str, Any], latents: int, path: Path
) -> dict[str, Tensor]:
    """Read every tensor, in one sequential pass that also computes the digest of the file."""
    digest = hashlib.sha256()
    tensors = {}
    stream.seek(0)
    digest.update(tensorfile.read_exactly(stream, next(iter(header.entries.values())).start, path))
    for name, entry in header.entries.items():
        tensors[name] = tensorfile.read_rows(stream, entry)
        digest.update(bytes_of(tensors[name]))
    if f"sha256:{digest.hexdigest()}" != description["file"]["digest"]:
        raise _altered(path)
    return tensors


def _read_prefix(
    stream: IO[bytes], header: tensorfile.Header, description: Mapping[str, Any], latents: int, path: Path
) -> dict[str, Tensor]:
    """Read the first `latents` rows of the matrices, to the end of their last block, and the small tensors whole."""
    blocks = description["blocks"]
    rows = min(-(-latents // blocks["latents"]) * blocks["latents"], description["n_latents"])
    in_part = by_latent(header.entries)
    tensors = {
        name: tensorfile.read_rows(stream, entry, rows if name in in_part else None)
        for name, entry in header.entries.items()
    }
    digests = list(block_digests(tensors, blocks["latents"]))
    if digests != blocks["digests"][: len(digests)] or shared_digest(tensors) != blocks["shared"]:
        raise _altered(path)
    return {name: t[:latents].clone() if name in in_part else t for name, t in tensors.items()}


def _altered(path: Path) -> FormatError:
    return FormatError(
        f"`{path}` must have the digest that `{DESCRIPTION}` states; it has another one: the file was altered or "
        "damaged. Copy or download both files again."
    )


# ------------------------------------------------------------------------------------------------------ description


def is_native(path: Path) -> bool:
    """Return whether a local path is, or is in, a folder of this format."""
    folder = path.parent if path.name in (DESCRIPTION, TENSORS) else path
    return (folder / DESCRIPTION).is_file() or (folder / _NEXT).is_file()


def _folder(path: str | os.PathLike[str]) -> Path:
    text = os.fspath(path)
    if text.startswith("hf:"):
        from .hub import download

        return download(text, (DESCRIPTION, TENSORS))
    folder = check_path(text)
    if folder.name in (DESCRIPTION, TENSORS):
        folder = folder.parent
    if (folder / DESCRIPTION).is_file() or ((folder / _NEXT).is_file() and (folder / TENSORS).is_file()):
        return folder
    raise _no_sae(folder, text)


def _no_sae(folder: Path, text: str) -> ConfigError:
    """Return why a path is not that of an SAE."""
    inside = sorted(str(found.parent) for found in folder.glob(f"*/{DESCRIPTION}")) if folder.is_dir() else []
    if inside:
        return ConfigError(
            f"`{folder}` must be the folder of one SAE; it holds {len(inside)}: {listed(inside)}. Name one of them."
        )
    came = "holds no `sae.json`" if folder.is_dir() else "is a file" if folder.exists() else "does not exist"
    return ConfigError(
        f"an SAE must be a folder with `{DESCRIPTION}` and `{TENSORS}`, or hf:owner/name/folder; `{text}` {came}."
    )


def _tensor_stream(folder: Path) -> IO[bytes]:
    path = folder / TENSORS
    if not path.is_file():
        raise FormatError(f"`{folder}` must hold `{TENSORS}` next to `{DESCRIPTION}`; it does not. Copy both files.")
    return open(path, "rb", buffering=0)


def _description(folder: Path, stream: IO[bytes]) -> tuple[Path, dict[str, Any], tensorfile.Header]:
    """Return the path of the description that belongs to the tensor file, what it says, and the header of that file.

    When a save over an older SAE was cut off between its two renames, the description that belongs to the tensors is
    the one still waiting as ``sae.json.next``.
    """
    path = folder / TENSORS
    header = tensorfile.parse_header(stream, path)
    paths = [folder / name for name in (DESCRIPTION, _NEXT) if (folder / name).is_file()]
    content = header.metadata.get(FORMAT)
    blocks = header.metadata.get(_BLOCKS, content)
    for place in paths:
        description = check_description(read_json(place), place)
        if description["content"] == content and blocks_digest(description) == blocks:
            check_header(description, header, path)
            return place, description, header
    raise FormatError(
        f"`{folder / DESCRIPTION}` must belong to the `{TENSORS}` next to it; their content digests differ. "
        "Copy both files from the same place."
    )
