"""Data sets of the Hugging Face hub, opened through `datasets`, without its progress bars and warnings."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..errors import DataError, OfflineError, listed


@contextmanager
def quiet_datasets() -> Iterator[None]:
    """No progress bars, log lines or warnings from datasets inside the block; its settings are restored."""
    import datasets

    level, bars = datasets.logging.get_verbosity(), not datasets.are_progress_bars_disabled()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        datasets.logging.set_verbosity(datasets.logging.CRITICAL)
        datasets.disable_progress_bars()
        try:
            yield
        finally:
            datasets.logging.set_verbosity(level)
            if bars:
                datasets.enable_progress_bars()


pass
_HUB_NAME = re.compile(r"(?P<name>[\w.-]+/[\w.-]+)(:(?P<config>[\w.+-]+))?(@(?P<split>[\w.-]+))?")
_HUB_TIMEOUT = 6.0  # seconds to find out whether the hub can be reached at all


def _open_hub(data: str, name: str, config: str | None, split: str | None) -> tuple[Iterable[Any], dict[str, Any]]:
    """Open a data set of the hub as a stream; without network, from the cache of earlier downloads."""
    from datasets import DownloadConfig, IterableDatasetDict, load_dataset
    from datasets.exceptions import DatasetNotFoundError

    online = _hub_is_reachable(data, name)
    try:
        if not online and not _is_cached(name):
            raise FileNotFoundError(name)
        with quiet_datasets():
            if online:
                found = load_dataset(name, config, streaming=True)
            else:
                found = load_dataset(name, config, download_config=DownloadConfig(local_files_only=True))
    except (DatasetNotFoundError, FileNotFoundError, ConnectionError) as error:
        if not online:
            raise OfflineError(
                f"the data set `{data}` must be downloaded and the hub cannot be reached (no network, or offline "
                "mode); it is not in the cache either. Give a local file (--data FILE.jsonl) or `--data builtin`."
            ) from None
        raise DataError(f"the data set `{data}` must exist on the hub and be readable: {_first_line(error)}") from None
    except (ValueError, RuntimeError) as error:
        raise DataError(f"the data set `{data}` cannot be opened: {_first_line(error)}") from None
    splits = list(found)
    wanted = split or ("train" if "train" in splits else splits[0])
    if wanted not in splits:
        raise DataError(f"`{name}` must have the split `{wanted}`; it has {listed(splits)}.")
    chosen = found[wanted]
    source = {"kind": "hub", "name": name, "split": wanted, **({"config": config} if config else {})}
    if isinstance(found, IterableDatasetDict) and chosen.features is None:
        return chosen, source
    return _named_labels(chosen), source


def _is_cached(name: str) -> bool:
    """Return whether an earlier download may have left the data set in the cache of datasets."""
    import datasets

    return Path(datasets.config.HF_DATASETS_CACHE, name.replace("/", "___")).is_dir()


def _named_labels(data: Any) -> Iterator[dict[str, Any]]:
    """Yield records with class numbers replaced by the names of the classes."""
    names = {column: kind.names for column, kind in data.features.items() if hasattr(kind, "names")}
    for record in data:
        for column, classes in names.items():
            value = record[column]
            if isinstance(value, int) and 0 <= value < len(classes):
                record[column] = classes[value]
        yield record


def _hub_is_reachable(data: str, name: str) -> bool:
    """One quick question to the hub instead of many slow retries.

    Raises
    ------
    DataError
        The hub answers and has no such data set, or does not let us read it.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import RepositoryNotFoundError

    try:
        HfApi().dataset_info(name, timeout=_HUB_TIMEOUT)
    except RepositoryNotFoundError:
        raise DataError(
            f"the data set `{data}` must exist on the hub; there is none of that name, or it is private or gated. "
            "Check the name, log in with `hf auth login`, or give a local file (--data FILE.jsonl)."
        ) from None
    except Exception:
        # no route, no name service, offline mode, a proxy in the way: whatever it is, the hub is out of reach
        return False
    return True


def _first_line(error: BaseException) -> str:
    message = str(error).strip() or type(error).__name__
    return message.splitlines()[0].rstrip(".")
