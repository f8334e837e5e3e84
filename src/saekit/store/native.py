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
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import fields
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

from ..errors import ConfigError, FormatError, SaekitError, did_you_mean, listed
from ..files import digest_bytes, dump_json, read_json, write_bytes
from ..sae.digest import bytes_of
from ..sae.model import SAE
from ..sae.rules import RULES
from ..sae.scaling import Scaling
from ..version import __version__
from . import tensorfile

SCHEMA = 3
"""Version of the layout that this release writes; it reads this one and all before it."""

TENSORS = "sae.safetensors"
DESCRIPTION = "sae.json"
_NEXT = "sae.json.next"
_FORMAT = "saekit-sae"
_BLOCKS = "saekit-blocks"

_MIGRATIONS: dict[int, Callable[[dict[str, Any]], dict[str, Any]]] = {
    1: lambda value: {**value, "schema": 2, "sizes": None},  # schema 2 brought the measured curve of prefixes
    2: lambda value: {**value, "schema": 3},  # schema 3 brought tensors `scores.<name>`
}
"""Schema v -> a function from the description in v to the one in v + 1."""

_KEYS = (
    "format", "schema", "saekit", "n_latents", "d_in", "d_out", "dtype", "rule", "scaling", "pre_bias", "skip",
    "latent_order", "sizes", "tensors", "content", "file", "blocks", "provenance",
)  # fmt: skip

# Tensors of which a prefix load reads only the first rows, and all `scores.<name>` after them, in order of names; the
# others (biases, thresholds) are small and read whole.
_BY_LATENT = ("W_enc", "b_enc", "W_dec")
_REQUIRED = (*_BY_LATENT, "b_dec")
_SCORES = "scores."
_MAX_BLOCKS = 256


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
        Created if missing. An SAE that is there already is replaced; it stays readable until the new one is complete.

    Returns
    -------
    Path
        The folder.

    Raises
    ------
    ConfigError
        The provenance cannot be written as strict JSON (NaN, an object).
    OSError
        What the system raised (a full disk, say); the folder holds what it held before.
    """
    folder = Path(folder)
    tensors = {name: t.detach().cpu().contiguous() for name, t in sae.tensors().items()}
    tensors |= {f"{_SCORES}{name}": score for name, score in sorted(sae.scores.items())}
    description = _describe_value(sae, tensors)
    _checked_json(description, folder)
    pending, n_bytes, digest = folder / f".{TENSORS}.new", 0, ""
    try:
        n_bytes, digest = tensorfile.write(
            pending, tensors, {_FORMAT: description["content"], _BLOCKS: _blocks_digest(description)}
        )
        description["file"] = {"name": TENSORS, "bytes": n_bytes, "digest": digest}
        ordered = {key: description[key] for key in _KEYS}
        # From here on every state on disk is a readable SAE: see `_description`.
        write_bytes(folder / _NEXT, dump_json(ordered).encode())
        os.replace(pending, folder / TENSORS)
        os.replace(folder / _NEXT, folder / DESCRIPTION)
    finally:
        with suppress(OSError):
            pending.unlink()
    return folder


def _describe_value(sae: SAE, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    blocks = _block_rows(sae.n_latents)
    digests = list(_block_digests(tensors, blocks))
    shared = _shared_digest(tensors)
    return {
        "format": _FORMAT,
        "schema": SCHEMA,
        "saekit": __version__,
        "n_latents": sae.n_latents,
        "d_in": sae.d_in,
        "d_out": sae.d_out,
        "dtype": str(sae.dtype).removeprefix("torch."),
        "rule": {"name": sae.rule.name, **sae.rule.settings()},
        "scaling": sae.scaling.settings(),
        "pre_bias": sae.b_pre is not None,
        "skip": sae.W_skip is not None,
        "latent_order": sae.provenance.get("latent_order", "none"),
        "sizes": _sizes_of(sae),
        "tensors": {
            name: {"dtype": str(t.dtype).removeprefix("torch."), "shape": list(t.shape)} for name, t in tensors.items()
        },
        "content": sae.digest(),
        "blocks": {"latents": blocks, "digests": digests, "shared": shared},
        "provenance": {key: value for key, value in sae.provenance.items() if key != "sizes"},
    }


def _sizes_of(sae: SAE) -> dict[str, Any] | None:
    """The measured curve, up to the latents that are there."""
    curve = sae.provenance.get("sizes")
    if curve is None:
        return None
    _check_sizes(curve, "`provenance` of the SAE", ConfigError)
    points = [point for point in curve["points"] if point["latents"] <= sae.n_latents]
    return {**curve, "points": points} if points else None


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
    with _tensor_stream(folder) as stream:
        return _load(folder, stream, latents, fvu)


def _load(folder: Path, stream: IO[bytes], latents: int | None, fvu: float | None) -> SAE:
    description, header = _description(folder, stream)
    n_latents = description["n_latents"]
    if fvu is not None:
        latents = _size_for(description, fvu, folder)
    if latents is not None and not (isinstance(latents, int) and 1 <= latents <= n_latents):
        raise ConfigError(
            f"load: `latents` must be a whole number from 1 to n_latents={n_latents}; got {latents!r} for `{folder}`."
        )
    read = _read_whole if latents is None or latents == n_latents else _read_prefix
    tensors = read(stream, header, description, latents or n_latents, folder / TENSORS)
    try:
        return _build(description, tensors, latents or n_latents)
    except SaekitError as error:
        raise FormatError(f"`{folder / DESCRIPTION}` describes an SAE that cannot be: {error}") from None


def _size_for(description: Mapping[str, Any], fvu: float, folder: Path) -> int:
    """The smallest measured size that meets the target."""
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
    """What ``sae.json`` says (shapes, rule, scaling, dtype, provenance), checked against the tensor file's header.

    Reads no tensor. `path` as in `load`; raises as `load` does. The result is JSON-able; ``"path"`` is the folder.
    """
    folder = _folder(path)
    with _tensor_stream(folder) as stream:
        description, _ = _description(folder, stream)
    return {"path": str(folder), **{key: value for key, value in description.items() if key != "blocks"}}


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
    return SAE(**own, rule=rule, scaling=scaling, provenance=provenance, scores=_strip(tensors, _SCORES))


def _strip(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Any]:
    return {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}


def _read_whole(
    stream: IO[bytes], header: tensorfile.Header, description: Mapping[str, Any], latents: int, path: Path
) -> dict[str, Tensor]:
    """Every tensor, in one sequential pass that also takes the digest of the file."""
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
    """The first `latents` rows of the matrices, read to the end of their last block, and the small tensors whole."""
    blocks = description["blocks"]
    rows = min(-(-latents // blocks["latents"]) * blocks["latents"], description["n_latents"])
    by_latent = _by_latent(header.entries)
    tensors = {
        name: tensorfile.read_rows(stream, entry, rows if name in by_latent else None)
        for name, entry in header.entries.items()
    }
    digests = list(_block_digests(tensors, blocks["latents"]))
    if digests != blocks["digests"][: len(digests)] or _shared_digest(tensors) != blocks["shared"]:
        raise _altered(path)
    return {name: t[:latents].clone() if name in by_latent else t for name, t in tensors.items()}


def _altered(path: Path) -> FormatError:
    return FormatError(
        f"`{path}` must have the digest that `{DESCRIPTION}` states; it has another one: the file was altered or "
        "damaged. Copy or download both files again."
    )


# ------------------------------------------------------------------------------------------------------ description


def _folder(path: str | os.PathLike[str]) -> Path:
    text = os.fspath(path)
    if text.startswith("hf:"):
        from .hub import download

        return download(text, (DESCRIPTION, TENSORS))
    folder = Path(text)
    if folder.name in (DESCRIPTION, TENSORS):
        folder = folder.parent
    if (folder / DESCRIPTION).is_file() or (folder / _NEXT).is_file():
        return folder
    inside = sorted(str(found.parent) for found in folder.glob(f"*/{DESCRIPTION}")) if folder.is_dir() else []
    if inside:
        raise ConfigError(
            f"`{folder}` must be the folder of one SAE; it holds {len(inside)}: {listed(inside)}. Name one of them."
        )
    came = "holds no `sae.json`" if folder.is_dir() else "is a file" if folder.exists() else "does not exist"
    raise ConfigError(
        f"an SAE must be a folder with `{DESCRIPTION}` and `{TENSORS}`, or hf:owner/name/folder; `{text}` {came}."
    )


def _tensor_stream(folder: Path) -> IO[bytes]:
    path = folder / TENSORS
    if not path.is_file():
        raise FormatError(f"`{folder}` must hold `{TENSORS}` beside `{DESCRIPTION}`; it does not. Copy both files.")
    return open(path, "rb", buffering=0)


def _description(folder: Path, stream: IO[bytes]) -> tuple[dict[str, Any], tensorfile.Header]:
    """The description that belongs to the tensor file, and the header of that file.

    When a save over an older SAE was cut off between its two renames, the description that belongs to the tensors is
    the one still waiting as ``sae.json.next``.
    """
    path = folder / TENSORS
    header = tensorfile.parse_header(stream, path)
    names = [name for name in (DESCRIPTION, _NEXT) if (folder / name).is_file()]
    descriptions = [_checked(read_json(folder / name), folder / name) for name in names]
    content = header.metadata.get(_FORMAT)
    blocks = header.metadata.get(_BLOCKS, content)
    for description in descriptions:
        if description["content"] == content and _blocks_digest(description) == blocks:
            _check_header(description, header, path)
            return description, header
    raise FormatError(
        f"`{folder / DESCRIPTION}` must belong to the `{TENSORS}` beside it; their content digests differ. "
        "Copy both files from the same place."
    )


def _checked(value: Any, path: Path) -> dict[str, Any]:
    """A description of the present schema, or the reason why not."""
    if not isinstance(value, dict) or value.get("format") != _FORMAT:
        raise FormatError(f'`{path}` must be the description of a saekit SAE ("format": "{_FORMAT}"); it is not.')
    schema = value.get("schema")
    if not isinstance(schema, int) or schema < 1:
        raise FormatError(f"`{path}`: `schema` must be a whole number of at least 1; got {schema!r}.")
    if schema > SCHEMA:
        raise FormatError(
            f"`{path}` has schema {schema}; this release of saekit ({__version__}) reads schemas up to {SCHEMA}. "
            f"Install saekit {value.get('saekit', 'of a later version')} or later."
        )
    for version in range(schema, SCHEMA):
        value = _MIGRATIONS[version](value)
    _same_keys(value, _KEYS, path, "")
    _same_keys(value["file"], ("name", "bytes", "digest"), path, "file.")
    _same_keys(value["blocks"], ("latents", "digests", "shared"), path, "blocks.")
    digests = value["blocks"]["digests"]
    if not isinstance(digests, list) or not all(
        isinstance(each, str) for each in [*digests, value["blocks"]["shared"]]
    ):
        raise FormatError(f"`{path}`: `blocks` must hold digests; it holds something else. Copy both files again.")
    if value["sizes"] is not None:
        _check_sizes(value["sizes"], f"`{path}`", FormatError)
    rule, scaling = value["rule"], value["scaling"]
    if not isinstance(rule, dict) or rule.get("name") not in RULES:
        raise FormatError(f"`{path}`: `rule.name` must be one of {listed(RULES)}; got {rule!r}.")
    tensor_names = value["tensors"] if isinstance(value["tensors"], dict) else {}
    _known(rule, {"name", *_plain_fields(RULES[rule["name"]], tensor_names, "rule.")}, path, "rule.")
    if not isinstance(scaling, dict):
        raise FormatError(f"`{path}`: `scaling` must be an object; got {scaling!r}.")
    _known(scaling, _plain_fields(Scaling, tensor_names, "scaling."), path, "scaling.")
    return value


def _check_sizes(curve: Any, where: str, error: type[SaekitError]) -> None:
    """Refuse a curve of sizes that is not ``{"measured_on": {}, "points": [{"latents": m, "metrics": {...}}]}``."""
    shape = '{"measured_on": {…}, "points": [{"latents": m, "metrics": {…}}, …]}'
    is_curve = isinstance(curve, dict) and set(curve) == {"measured_on", "points"}
    points = curve["points"] if is_curve and isinstance(curve["points"], list) else None
    sizes = []
    for point in points or []:
        good = isinstance(point, dict) and set(point) == {"latents", "metrics"} and isinstance(point["metrics"], dict)
        good = good and all(isinstance(value, dict) and "value" in value for value in point["metrics"].values())
        sizes.append(point["latents"] if good and isinstance(point["latents"], int) else 0)
    if not sizes or min(sizes) < 1 or sizes != sorted(set(sizes)):
        raise error(
            f"{where}: `sizes` must be {shape} with increasing numbers of latents; it is not. Measure the sizes again."
        )


def _plain_fields(of: type, tensor_names: Mapping[str, Any], prefix: str) -> set[str]:
    """Fields of a dataclass that stand in the description; the others are tensors in the other file."""
    return {f.name for f in fields(of) if f"{prefix}{f.name}" not in tensor_names}


def _same_keys(value: Any, keys: tuple[str, ...], path: Path, prefix: str) -> None:
    if not isinstance(value, dict):
        raise FormatError(f"`{path}`: `{prefix.rstrip('.')}` must be an object; got {type(value).__name__}.")
    _known(value, set(keys), path, prefix)
    missing = [f"{prefix}{key}" for key in keys if key not in value]
    if missing:
        raise FormatError(f"`{path}` must have the keys {listed(missing)}; they are missing.")


def _known(value: Mapping[str, Any], keys: set[str], path: Path, prefix: str) -> None:
    unknown = [key for key in value if key not in keys]
    if unknown:
        raise FormatError(
            f"`{path}`: unknown key `{prefix}{unknown[0]}`. {did_you_mean(unknown[0], sorted(keys))} "
            "The file may have been edited, or come from another program."
        )


def _check_header(description: Mapping[str, Any], header: tensorfile.Header, path: Path) -> None:
    """Description and header must name the same tensors with the same shapes."""
    found = {
        name: {"dtype": str(entry.dtype).removeprefix("torch."), "shape": list(entry.shape)}
        for name, entry in header.entries.items()
    }
    if found != description["tensors"]:
        names = sorted({*found, *description["tensors"]})
        odd = next(name for name in names if found.get(name) != description["tensors"].get(name))
        raise FormatError(
            f"`{path}`: tensor `{odd}` must be {description['tensors'].get(odd, 'absent')}; it is "
            f"{found.get(odd, 'absent')}. Copy both files from the same place."
        )
    known = {*_REQUIRED, "b_pre", "W_skip"}
    missing = [name for name in _REQUIRED if name not in found]
    unknown = [name for name in found if name not in known and not name.startswith(("rule.", "scaling.", _SCORES))]
    if missing or unknown:
        what = f"must hold {listed(missing)}" if missing else f"holds {listed(unknown)}, which saekit does not know"
        raise FormatError(f"`{path}` {what}. Copy both files again.")
    for name, entry in header.entries.items():
        if name.startswith(_SCORES) and (entry.shape, entry.dtype) != ((description["n_latents"],), torch.float32):
            raise FormatError(
                f"`{path}`: tensor `{name}` must be float32 ({description['n_latents']},), a number per latent; it is "
                f"{str(entry.dtype).removeprefix('torch.')} {entry.shape}. Copy both files again."
            )
    shape = (description["n_latents"], description["d_in"])
    if header.entries["W_enc"].shape != shape or description["file"]["bytes"] != header.n_bytes:
        raise FormatError(
            f"`{path}` must hold `W_enc` {shape} in {description['file']['bytes']} bytes; it holds "
            f"{header.entries['W_enc'].shape} in {header.n_bytes}. Copy both files from the same place."
        )


# ---------------------------------------------------------------------------------------------------------- digests


def _block_rows(n_latents: int) -> int:
    """Latents per verified block: at least 64, and at most 256 blocks."""
    return max(64, -(-n_latents // _MAX_BLOCKS))


def _block_digests(tensors: Mapping[str, Tensor], rows: int) -> Iterator[str]:
    """One digest per block of latents, over the bytes of its rows of each matrix."""
    for start in range(0, len(tensors["W_enc"]), rows):
        digest = hashlib.sha256()
        for name in _by_latent(tensors):
            digest.update(bytes_of(tensors[name][start : start + rows]))
        yield digest.hexdigest()


def _by_latent(names: Iterable[str]) -> list[str]:
    """The tensors that have a row (or a number) per latent and are read in part."""
    return [*_BY_LATENT, *sorted(name for name in names if name.startswith(_SCORES))]


def _shared_digest(tensors: Mapping[str, Tensor]) -> str:
    """Digest of the names of scores, and of the names and bytes of all tensors that are read whole."""
    digest = hashlib.sha256()
    by_latent = _by_latent(tensors)
    for name in by_latent[len(_BY_LATENT) :]:
        digest.update(f"{name}\n".encode())
    for name in sorted(set(tensors) - set(by_latent)):
        digest.update(f"{name}\n".encode())
        digest.update(bytes_of(tensors[name]))
    return digest.hexdigest()


def _blocks_digest(description: Mapping[str, Any]) -> str:
    """Digest of the digests of all blocks: which bytes a description belongs to. Files of 0.1 have it as `content`."""
    blocks = description["blocks"]
    return digest_bytes("\n".join([*blocks["digests"], blocks["shared"]]).encode())
