"""The Hugging Face hub: one quick question before anything is downloaded, instead of many slow retries."""

from __future__ import annotations

from typing import Any, Literal

TIMEOUT = 6.0
"""How long the hub has to answer. Unit: s."""


class Unreachable(Exception):
    """The hub does not answer; the message is the reason. Files in the cache may do."""


def ask_hub(kind: Literal["model", "dataset"], name: str, revision: str | None = None) -> Any:
    """Return what the hub says about a repository.

    Raises
    ------
    Unreachable
        There is no answer, or none that helps.
    huggingface_hub.errors.RepositoryNotFoundError, RevisionNotFoundError, HFValidationError
        The hub answers, and lets this account read no such repository, or there can be none.
    """
    from huggingface_hub import HfApi, errors

    asked: dict[str, Any] = {"timeout": TIMEOUT, **({} if revision is None else {"revision": revision})}
    try:
        return HfApi().model_info(name, **asked) if kind == "model" else HfApi().dataset_info(name, **asked)
    except (errors.RepositoryNotFoundError, errors.RevisionNotFoundError, errors.HFValidationError):
        raise
    except errors.OfflineModeIsEnabled:
        raise Unreachable("offline mode: HF_HUB_OFFLINE is set") from None
    except errors.HfHubHTTPError as error:
        raise Unreachable(f"it answers {getattr(error.response, 'status_code', 'with an error')}") from None
    except Exception:  # no route, no name service, a proxy or a login page in the way
        raise Unreachable("no network, or a proxy in the way") from None
