"""Upload to a Hugging Face hub repository: what leaves this machine, in one commit, and nothing else."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..errors import ConfigError, ModelError, OfflineError, SaekitError, listed
from .description import DESCRIPTION
from .hub import parse


def upload(
    address: str, files: Mapping[str, bytes | Path], *, private: bool = False, message: str | None = None
) -> str:
    """Write files into a hub repository in one commit, and return the address of that commit on the web.

    Parameters
    ----------
    address
        ``hf:owner/name``, or ``hf:owner/name@branch``; repository and branch are made where they are missing.
    files
        Names in the repository, and their contents or where these lie. Other files of the repository stay.
    private
        Whether a repository that is made is private.
    message
        Title of the commit.

    Raises
    ------
    ConfigError
        The repository holds something else than SAEs of saekit, or is public and `private` is asked for.
    ModelError
        No account is logged in, or it may not write there.
    OfflineError
        The hub cannot be reached.
    """
    from huggingface_hub import CommitOperationAdd, HfApi, constants, errors

    repository, revision = target(address)
    if constants.HF_HUB_OFFLINE:
        raise _unreachable(address, "offline mode: HF_HUB_OFFLINE is set")
    api = HfApi()
    operations = [CommitOperationAdd(name, source) for name, source in files.items()]
    title = message or f"{repository.split('/')[1]}: SAEs of saekit"
    try:
        _prepare(api, repository, revision, private)
        made = api.create_commit(repository, operations, revision=revision, commit_message=title)
    except errors.HFValidationError as error:
        raise ConfigError(f"push: `{address}` is no hub address: {error}") from None
    except (errors.LocalTokenNotFoundError, errors.HfHubHTTPError) as error:
        raise _not_allowed(repository, error) from None
    except SaekitError:
        raise
    except Exception as error:  # no route, no name service, a connection that breaks
        raise _unreachable(address, f"{type(error).__name__}: {error}") from error
    return str(made.commit_url)


def target(address: str) -> tuple[str, str | None]:
    """Return repository and branch of an address to push to.

    Raises
    ------
    ConfigError
        It is no ``hf:owner/name[@branch]``.
    """
    if not address.startswith("hf:"):
        raise ConfigError(f"push: the target must look like `hf:owner/name`; got `{address}`.")
    repository, folder, revision = parse(address)
    if folder:
        raise ConfigError(
            f"push: a card belongs to a whole repository, `hf:{repository}`; got the folder `{folder}` of it. "
            "Several SAEs go into one repository when their common folder is pushed."
        )
    return repository, revision


def _prepare(api: Any, repository: str, revision: str | None, private: bool) -> None:
    """Make the repository and the branch, or make sure that what is there may be added to."""
    from huggingface_hub import errors

    try:
        info = api.model_info(repository)
    except errors.RepositoryNotFoundError:
        api.create_repo(repository, private=private)
    else:
        _check_existing(repository, info, private)
    if revision is not None:
        api.create_branch(repository, branch=revision, exist_ok=True)


def _check_existing(repository: str, info: Any, private: bool) -> None:
    """Refuse a repository that holds other things than SAEs of saekit, or that more people see than is asked for."""
    names = sorted({each.rfilename for each in info.siblings or ()} - {".gitattributes"})
    if names and not any(name.split("/")[-1] == DESCRIPTION for name in names):
        raise ConfigError(
            f"push: the repository `{repository}` exists and holds something else: {listed(names)}. Give another name."
        )
    if private and not info.private:
        raise ConfigError(f"push: the repository `{repository}` exists and is public. Give another name.")


def _not_allowed(repository: str, error: Exception) -> ModelError:
    """Return what to say when the hub does not let this account write."""
    status = getattr(getattr(error, "response", None), "status_code", None)
    if status in (None, 401):
        return ModelError(
            f"push: the hub must know who writes to `{repository}`; this machine has no valid token. Log in with "
            "`hf auth login`, or set HF_TOKEN."
        )
    if status == 403:
        return ModelError(
            f"push: this account may not write to `{repository}`. Push to your own name, or use a token with the "
            "permission to write."
        )
    first = str(error).strip().splitlines()
    return ModelError(f"push: the hub refused to write to `{repository}`: {first[0] if first else status}")


def _unreachable(address: str, why: str) -> OfflineError:
    return OfflineError(
        f"push: the upload to `{address}` did not come through ({why}). Nothing was committed there; --dry-run shows "
        "what would be uploaded, without a network."
    )
