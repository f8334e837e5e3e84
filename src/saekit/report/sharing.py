"""SAEs and results of a folder on the hub: which files go there, without paths of this machine, under a model card."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..errors import ConfigError, FormatError
from ..files import check_path, dump_json, read_json, seal
from ..measure.results import Result
from ..places import without_local_paths
from ..store import native
from ..store.address import sae_paths
from ..store.description import DESCRIPTION, TENSORS
from ..store.opening import describe
from ..store.pushing import target, upload
from .card import card
from .results_folder import load_result

CARD = "README.md"


@dataclass(frozen=True)
class Parcel:
    """What a push uploads."""

    files: Mapping[str, bytes | Path] = field(repr=False)
    """Name in the repository -> content, or the file that is uploaded as it lies."""
    left_out: list[str]
    """Results in the folder that are not about its SAEs."""

    @property
    def card(self) -> str:
        """The text of the model card."""
        text = self.files[CARD]
        assert isinstance(text, bytes)
        return text.decode()

    def sizes(self) -> dict[str, int]:
        """Return the size of every file in bytes."""
        return {
            name: len(each) if isinstance(each, bytes) else each.stat().st_size for name, each in self.files.items()
        }


def push(folder: str | os.PathLike[str], address: str, *, private: bool = False, message: str | None = None) -> str:
    """Upload the SAEs and the results of a folder to a repository of the hub, with a model card.

    Nothing else of the folder is uploaded (no checkpoints, rows, logs or pages), and paths of this machine are removed
    from what is.

    Parameters
    ----------
    folder
        Folder of one SAE, or of several, such as a training run; results in it (``evaluation.json``, …) come along.
    address
        ``hf:owner/name``, or ``hf:owner/name@branch``. Repository and branch are made where they are missing; files
        that a repository of saekit holds and this push does not replace stay.
    private
        Whether the repository is private, where it is made.
    message
        Title of the commit.

    Returns
    -------
    str
        Address of the commit on the web.

    Raises
    ------
    ConfigError
        The folder holds no SAE of saekit, or the repository something else.
    FormatError
        A file was altered.
    ModelError, OfflineError
        The hub lets this account not write there, or cannot be reached.
    """
    return upload(address, pack(folder, address).files, private=private, message=message)


def pack(folder: str | os.PathLike[str], address: str) -> Parcel:
    """Return what `push` would upload; see there. Nothing is written, and no network is used."""
    repository, branch = target(address)
    root = check_path(folder)
    files: dict[str, bytes | Path] = {}
    saes: dict[str, dict[str, Any]] = {}
    for place in _saes_in(root):
        inside = "" if place == root else place.name
        prefix = f"{inside}/" if inside else ""
        native.load(place)  # all of it: a damaged file is no gift
        files[f"{prefix}{TENSORS}"] = place / TENSORS
        bare = without_local_paths(read_json(place / DESCRIPTION))
        files[f"{prefix}{DESCRIPTION}"] = _sealed(bare)
        saes[inside] = bare
    results, left_out = _results_in(root, {facts["content"] for facts in saes.values()})
    files |= {name: _sealed(plain) for name, (plain, _) in results.items()}
    text = card(
        f"{repository}{f'@{branch}' if branch else ''}", saes, {name: each for name, (_, each) in results.items()}
    )
    parcel = Parcel({CARD: text.encode(), **files}, left_out)
    _refuse_leaks(parcel)
    return parcel


def _saes_in(root: Path) -> list[Path]:
    """Return the folders of saekit's SAEs in a folder."""
    if not root.is_dir():
        raise ConfigError(
            f"push: `{root}` must be a folder with SAEs; {'it is a file' if root.exists() else 'it does not exist'}."
        )
    found = [Path(path) for path in sae_paths(root)]
    if all(native.is_native(place) for place in found):
        return found
    kind = describe(found[0])["provenance"].get("format")  # says what is wrong, where it is no SAE at all
    raise ConfigError(
        f"push: `{found[0]}` must be an SAE in saekit's own format; it is {kind}. Convert it first: "
        f"saekit convert {found[0]} NEW --to native, then push NEW."
    )


def _results_in(root: Path, digests: set[str]) -> tuple[dict[str, tuple[Any, Result]], list[str]]:
    """Return results about the SAEs that are pushed, as plain JSON and as values, and the files of others."""
    found, left_out = {}, []
    for path in [*sorted(root.glob("*.json")), *sorted(root.glob("*/*.json"))]:
        result = None if path.name == DESCRIPTION else load_result(path)
        name = path.relative_to(root).as_posix()
        if result is None:
            continue
        about = set(_digests(result.to_json()))
        if about and not about & digests:
            left_out.append(name)
            continue
        plain = without_local_paths(result.to_json())
        found[name] = (plain, type(result).from_json(plain, name))
    return found, left_out


def _digests(plain: Any) -> Iterator[str]:
    """Yield the digests of the SAEs that a result is about."""
    if isinstance(plain, Mapping):
        if "n_latents" in plain and isinstance(plain.get("digest"), str):
            yield plain["digest"]
        for value in plain.values():
            yield from _digests(value)
    elif isinstance(plain, list):
        for value in plain:
            if isinstance(value, Mapping | list):
                yield from _digests(value)


def _sealed(plain: Mapping[str, Any]) -> bytes:
    return dump_json(seal(plain)).encode()


def _refuse_leaks(parcel: Parcel) -> None:
    """Refuse texts that still name the home folder of whoever pushes."""
    home = str(Path.home())
    if len(Path(home).parts) < 3:  # "/", "/root": part of many innocent texts
        return
    for name, content in parcel.files.items():
        if isinstance(content, bytes) and home in content.decode():
            raise FormatError(
                f"push: `{name}` must not name folders of this machine; it still holds `{home}`. Nothing was uploaded."
            )
