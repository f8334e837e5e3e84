"""Data sets of the hub: names, splits, configurations, names of classes, and a hub that cannot be reached."""

from __future__ import annotations

import datasets
import pytest

from saekit.errors import DataError, OfflineError
from saekit.inputs.hub_datasets import HubName, choose_split
from saekit.inputs.texts import read_texts


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        ("owner/name", ("owner/name", None, None)),
        ("owner/name:small@test", ("owner/name", "small", "test")),
        ("owner/a.b-c@v1.0", ("owner/a.b-c", None, "v1.0")),
        ("./owner/name", None),
        ("~/name", None),
        ("/owner/name", None),
        ("name", None),
        ("a/b/c", None),
    ],
)
def test_names_of_the_hub(data, expected):
    found = HubName.parse(data)
    assert expected == (None if found is None else (found.name, found.config, found.split))


def test_the_split_is_train_where_there_is_one():
    assert choose_split(["test", "train"], None, "name") == "train"
    assert choose_split(["test", "dev"], None, "name") == "test"
    with pytest.raises(DataError, match="`name` must have the split `dev`; it has `test`"):
        choose_split(["test"], "dev", "name")


def test_a_hub_name_without_network():
    with pytest.raises(OfflineError, match=r"`owner/name@test` must be downloaded .*--data FILE\.jsonl"):
        read_texts("owner/name@test")


class _Hub:
    """A hub that is in reach."""

    def __init__(self, error=None):
        self.error = error

    def __call__(self):
        return self

    def dataset_info(self, name, timeout):
        if self.error:
            raise self.error


def test_a_hub_data_set(monkeypatch):
    """Splits, configurations and names of classes, with the download itself replaced."""
    import huggingface_hub

    features = datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["neg", "pos"])})
    rows = datasets.Dataset.from_dict({"text": ["a", "b"], "label": [1, 0]}, features=features)
    asked = []

    def load(name, config, **options):
        asked.append((name, config))
        return datasets.IterableDatasetDict({"train": rows.to_iterable_dataset(), "test": rows.to_iterable_dataset()})

    monkeypatch.setattr(huggingface_hub, "HfApi", _Hub())
    monkeypatch.setattr(datasets, "load_dataset", load)
    texts = read_texts("owner/name:small@test")
    assert asked == [("owner/name", "small")]
    assert texts.column("label") == ("pos", "neg")
    assert texts.info["kind"] == "hub"
    assert (texts.info["config"], texts.info["split"]) == ("small", "test")
    assert read_texts("owner/name").info["split"] == "train"
    with pytest.raises(DataError, match="must have the split `dev`; it has `train`, `test`"):
        read_texts("owner/name", split="dev")

    def refuse(name, config, **options):
        raise ValueError("Config name is missing.\nPlease pick one")

    monkeypatch.setattr(datasets, "load_dataset", refuse)
    with pytest.raises(DataError, match="`owner/name` cannot be opened: Config name is missing"):
        read_texts("owner/name")


def test_a_hub_data_set_that_is_not_there(monkeypatch):
    import huggingface_hub
    from huggingface_hub.errors import RepositoryNotFoundError

    error = RepositoryNotFoundError.__new__(RepositoryNotFoundError, "no")
    monkeypatch.setattr(huggingface_hub, "HfApi", _Hub(error))
    with pytest.raises(DataError, match="`owner/name` must exist on the hub"):
        read_texts("owner/name")
