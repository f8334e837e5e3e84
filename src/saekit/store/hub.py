"""Files of an SAE from a Hugging Face hub repository, through the ordinary cache of huggingface_hub."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import IO, Any

from ..errors import ConfigError, FormatError, ModelError, OfflineError, SaekitError, listed
from ..hub import Unreachable, ask_hub
from .listing import Listing


def parse(address: str) -> tuple[str, str, str | None]:
    """Return repository, folder inside it and revision of ``"hf:owner/name/sub/folder@revision"``.

    >>> parse("hf:me/saes/layers.6/topk@v1")
    ('me/saes', 'layers.6/topk', 'v1')

    Raises
    ------
    ConfigError
        The address does not have at least an owner and a name.
    """
    path, _, revision = address.removeprefix("hf:").partition("@")
    owner, _, rest = path.strip("/").partition("/")
    name, _, folder = rest.partition("/")
    if not owner or not name or ".." in PurePosixPath(folder).parts:
        raise ConfigError(
            f"a hub address must look like `hf:owner/name/folder` (`@revision` may follow); got `{address}`."
        )
    return f"{owner}/{name}", folder, revision or None


def download(address: str, names: tuple[str, ...]) -> Path:
    """Fetch the files `names` of the folder at `address` (or find them in the cache) and return their local folder.

    Raises
    ------
    OfflineError
        There is no network, or downloads are switched off, and the files are not in the cache.
    ModelError
        The repository does not exist, or is gated or private for this account.
    FormatError
        The folder has no such file.
    """
    with _in_our_words(address, names):
        why = _why_unreachable(address)
        paths = [_fetch(address, name, why) for name in names]
    return paths[0].parent


def _why_unreachable(address: str) -> Unreachable | None:
    """Return why the hub does not answer; None when it does."""
    try:
        ask_hub("model", parse(address)[0])
    except Unreachable as why:
        return why
    return None


def _fetch(address: str, name: str, why: Unreachable | None) -> Path:
    """Return the local path of a file of the folder at an address; from the cache alone when the hub is out of reach.

    Raises
    ------
    OfflineError
        It is not in the cache.
    """
    from huggingface_hub import errors, hf_hub_download

    repository, folder, revision = parse(address)
    try:
        place: dict[str, Any] = {"subfolder": folder or None, "revision": revision}
        return Path(hf_hub_download(repository, name, **place, local_files_only=why is not None))
    except errors.LocalEntryNotFoundError:
        raise _offline(address, why) from None


@contextmanager
def opened(address: str, small: str, large: str) -> Iterator[tuple[Path, IO[bytes]]]:
    """Download the file `small` of the folder at `address`, and open `large` for reading by range requests.

    A `large` that is in the cache already is read from there.

    Yields
    ------
    folder, stream
        The local folder of `small`; a stream that fetches what is read from it and nothing else.

    Raises
    ------
    OfflineError, ModelError, FormatError
        As `download`.
    """
    from huggingface_hub import try_to_load_from_cache

    repository, folder, revision = parse(address)
    with _in_our_words(address, (small, large)):
        why = _why_unreachable(address)
        local = _fetch(address, small, why).parent
        inside = f"{folder}/{large}" if folder else large
        if isinstance(try_to_load_from_cache(repository, inside, revision=revision), str):
            stream = _stream(repository, inside, revision)
        elif why:
            raise _offline(address, why)
        else:
            # The snapshot folder names the commit of the small file: both files must be of one commit.
            parts = local.parts
            stream = _stream(
                repository, inside, parts[parts.index("snapshots") + 1] if "snapshots" in parts[:-1] else revision
            )
        with stream:
            yield local, stream


def holds(address: str, name: str) -> bool:
    """Return whether the folder at `address` has a file `name`, and fetch it; offline, whether the cache has it.

    Raises
    ------
    ModelError
        The repository does not exist, or is gated or private for this account.
    """
    try:
        download(address, (name,))
    except (FormatError, OfflineError):
        return False
    return True


def list_hub(address: str) -> Listing:
    """Return the listing of a folder, or of a file, in a hub repository; files are downloaded when they are asked for.

    Without a network it lists what the cache has.

    Raises
    ------
    OfflineError, ModelError
        As `download`.
    """
    repository, inside, _ = parse(address)
    with _in_our_words(address, (inside or "files",)):
        commit, names = _names(address)
    focus = PurePosixPath(inside).name if inside in names else None
    folder = str(PurePosixPath(inside).parent) if focus else inside
    prefix = "" if folder in ("", ".") else f"{folder}/"
    below = [name.removeprefix(prefix) for name in names if name.startswith(prefix)]
    if not below:
        raise ConfigError(f"`{repository}` has no folder or file `{inside}`; it has {listed(_folders(names), 8)}.")

    def fetch(name: str) -> Path:
        from huggingface_hub import hf_hub_download

        with _in_our_words(address, (name,)):
            return Path(hf_hub_download(repository, f"{prefix}{name}", revision=commit))

    def opened(name: str) -> IO[bytes]:
        with _in_our_words(address, (name,)):
            return _stream(repository, f"{prefix}{name}", commit)

    return Listing(address, tuple(sorted(name for name in below if name.count("/") <= 1)), fetch, opened, focus)


def _stream(repository: str, name: str, commit: str | None) -> Any:
    """Open a file of a repository: that of the cache, or one that fetches what is read from it and nothing else."""
    from huggingface_hub import HfFileSystem, try_to_load_from_cache

    cached = try_to_load_from_cache(repository, name, revision=commit)
    if isinstance(cached, str):
        return open(cached, "rb", buffering=0)
    # No read-ahead: a prefix is a handful of requests, each for exactly the bytes that are needed.
    return HfFileSystem().open(f"{repository}{f'@{commit}' if commit else ''}/{name}", "rb", cache_type="none")


def _names(address: str) -> tuple[str | None, list[str]]:
    """Return the commit and every file of a repository; from the newest snapshot in the cache without a network."""
    from huggingface_hub import errors, snapshot_download

    repository, _, revision = parse(address)
    try:
        info = ask_hub("model", repository, revision)
        return info.sha, [each.rfilename for each in info.siblings or ()]
    except Unreachable as why:
        try:
            folder = Path(snapshot_download(repository, revision=revision, local_files_only=True))
        except errors.LocalEntryNotFoundError:
            raise _offline(address, why) from None
    return folder.name, [str(path.relative_to(folder).as_posix()) for path in folder.rglob("*") if path.is_file()]


def _folders(names: list[str]) -> list[str]:
    return sorted({name.split("/")[0] for name in names})


@contextmanager
def _in_our_words(address: str, names: tuple[str, ...]) -> Iterator[None]:
    """Raise errors of huggingface_hub as errors of saekit."""
    from huggingface_hub import errors

    try:
        yield
    except (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled, ConnectionError):
        raise _offline(address, None) from None
    except errors.HFValidationError as error:
        raise ConfigError(f"`{address}` is no hub address: {error}") from None
    except (errors.HfHubHTTPError, errors.EntryNotFoundError, FileNotFoundError) as error:
        raise _refused(error, address, names) from None


def _refused(error: Exception, address: str, names: tuple[str, ...]) -> SaekitError:
    """Return what to say when the hub does not give the files of an address."""
    from huggingface_hub import errors

    repository, folder, revision = parse(address)
    if isinstance(error, errors.GatedRepoError):
        return ModelError(
            f"the repository `{repository}` is gated: its owner must grant access first. Accept its terms on the hub "
            "and log in with `hf auth login`."
        )
    if isinstance(error, errors.RepositoryNotFoundError):
        return ModelError(
            f"the hub has no repository `{repository}` that this account may read; check the spelling of `{address}`."
        )
    if isinstance(error, errors.RevisionNotFoundError):
        return ModelError(f"the repository `{repository}` has no revision `{revision}`.")
    if isinstance(error, (errors.EntryNotFoundError, FileNotFoundError)):
        inside = f"the folder `{folder}` of " if folder else ""
        return FormatError(
            f"{inside}`{repository}` must hold {' and '.join(f'`{name}`' for name in names)}; it does not. "
            "Name the folder of one saekit SAE."
        )
    return ModelError(f"the hub refused `{address}`: {error}")


def _offline(address: str, why: Unreachable | None) -> OfflineError:
    return OfflineError(
        f"`{address}` would have to be downloaded, and the hub cannot be reached ({why or 'the connection broke'}). "
        "Copy the folder here by other means and give its local path instead."
    )
