"""Data sets of the Hugging Face hub, opened through `datasets`, without its progress bars and warnings."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import ConfigError, FormatError, InputError, OfflineError, listed
from ..hub import Unreachable, ask_hub
from .tables import first_line


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


_HUB_NAME = re.compile(r"(?P<name>[\w.-]+/[\w.-]+)(:(?P<config>[\w.+-]+))?(@(?P<split>[\w.-]+))?")


@dataclass(frozen=True)
class HubName:
    """``owner/name[:config][@split]``."""

    asked: str
    """The whole, as it was given."""
    name: str
    config: str | None
    split: str | None

    @staticmethod
    def parse(data: str) -> HubName | None:
        """Return the parts of a name; None when it cannot be one of the hub, but is a path."""
        match = _HUB_NAME.fullmatch(data)
        if match is None or data.startswith((".", "/", "~")):
            return None
        return HubName(data, match["name"], match["config"], match["split"])


def open_hub(hub: HubName, split: str | None = None) -> tuple[Iterable[dict[str, Any]], dict[str, Any]]:
    """Open a data set of the hub as a stream; without network, from the cache of earlier downloads.

    Returns
    -------
    records, source
        Class numbers are replaced by the names of the classes; and what is known about the source.

    Raises
    ------
    DataError
        There is no such data set or split, or it cannot be read.
    OfflineError
        It would have to be downloaded and the hub cannot be reached.
    """
    found = _load(hub)
    wanted = choose_split(found, one_split(split, hub.split, hub.name), hub.name)
    config = {"config": hub.config} if hub.config else {}
    return named_labels(found[wanted]), {"kind": "hub", "name": hub.name, "split": wanted, **config}


def is_saved(folder: Path) -> bool:
    """Return whether ``save_to_disk`` wrote a folder."""
    return any((folder / file).is_file() for file in ("dataset_info.json", "dataset_dict.json"))


def open_saved(folder: Path, split: str | None) -> tuple[Iterable[dict[str, Any]], dict[str, Any]]:
    """Open a data set that ``save_to_disk`` wrote.

    Raises
    ------
    DataError
        It has no such split, or its path cannot be given to `datasets`.
    FormatError
        It is damaged.
    """
    from datasets import DatasetDict, load_from_disk

    path = str(folder.resolve())
    if "::" in path:
        raise InputError(
            f"the path of a data set must not hold `::`, a chain of addresses to `datasets`; got `{path}`."
        )
    try:
        found = load_from_disk(path)
    except Exception as error:  # whatever pyarrow and datasets raise for a damaged folder
        raise FormatError(
            f"`{folder}` must be a data set that save_to_disk wrote; it cannot be read: {first_line(error)}."
        ) from None
    if not isinstance(found, DatasetDict):
        found = {str(found.split): found}
    wanted = choose_split(found, split, folder.name)
    source = {"kind": "disk", "name": Path(path).name, "path": path, "split": None if wanted == "None" else wanted}
    return named_labels(found[wanted]), source


def one_split(split: str | None, named: str | None, name: str) -> str | None:
    """Return the split that is asked for by an argument or behind an ``@``.

    Raises
    ------
    ConfigError
        By both, differently.
    """
    if split and named and split != named:
        raise ConfigError(f"`{name}` is asked for with the split `{named}` and with `{split}`. Leave one of them out.")
    return split or named


def _load(hub: HubName) -> Any:
    """Return all splits of a data set."""
    from datasets import DownloadConfig, load_dataset
    from datasets.exceptions import DatasetNotFoundError

    data, name, config = hub.asked, hub.name, hub.config
    why = _why_unreachable(data, name)
    try:
        if why and not _is_cached(name):
            raise FileNotFoundError(name)
        with quiet_datasets():
            if why is None:
                return load_dataset(name, config, streaming=True)
            return load_dataset(name, config, download_config=DownloadConfig(local_files_only=True))
    except (DatasetNotFoundError, FileNotFoundError, ConnectionError) as error:
        if why:
            raise OfflineError(
                f"the data set `{data}` must be downloaded and the hub cannot be reached ({why}); it is not in "
                "the cache either. Give a local file (--data FILE.jsonl) or `--data builtin`."
            ) from None
        raise InputError(f"the data set `{data}` must exist on the hub and be readable: {first_line(error)}") from None
    except (ValueError, RuntimeError) as error:
        raise InputError(f"the data set `{data}` cannot be opened: {first_line(error)}") from None


def choose_split(splits: Iterable[str], split: str | None, name: str) -> str:
    """Return the split that is wanted; None: ``train`` where there is one, else the first.

    Raises
    ------
    DataError
        There is no such split.
    """
    known = list(splits)
    wanted = split or ("train" if "train" in known else known[0])
    if wanted not in known:
        raise InputError(f"`{name}` must have the split `{wanted}`; it has {listed(known)}.")
    return wanted


def _is_cached(name: str) -> bool:
    """Return whether an earlier download may have left the data set in the cache of datasets."""
    import datasets

    return Path(datasets.config.HF_DATASETS_CACHE, name.replace("/", "___")).is_dir()


def named_labels(data: Any) -> Iterator[dict[str, Any]]:
    """Yield records with class numbers replaced by the names of the classes."""
    names = {column: kind.names for column, kind in (data.features or {}).items() if hasattr(kind, "names")}
    for record in data:
        for column, classes in names.items():
            value = record.get(column)
            if isinstance(value, int) and 0 <= value < len(classes):
                record[column] = classes[value]
        yield record


def _why_unreachable(data: str, name: str) -> Unreachable | None:
    """Return why the hub does not answer; None when it does.

    Raises
    ------
    DataError
        The hub answers and has no such data set, or does not let us read it.
    """
    from huggingface_hub.errors import HFValidationError, RepositoryNotFoundError

    try:
        ask_hub("dataset", name)
    except (RepositoryNotFoundError, HFValidationError):
        raise InputError(
            f"the data set `{data}` must exist on the hub; there is none of that name, or it is private or gated. "
            "Check the name, log in with `hf auth login`, or give a local file (--data FILE.jsonl)."
        ) from None
    except Unreachable as why:
        return why
    return None
