"""One definition of records: every container of the same rows gives the same texts, labels and images."""

from __future__ import annotations

from itertools import count, islice

import datasets
import numpy as np
import pandas
import PIL.Image
import pyarrow
import pytest
import torch

import saekit as sk
from saekit.errors import ConfigError, DataError
from saekit.inputs.images import are_images, read_images
from saekit.inputs.labelled import read_labelled
from saekit.inputs.records import one_column, records_of, repeatable
from saekit.inputs.settings import Split
from saekit.inputs.texts import read_texts

TEXTS = ["the cat sat", "on a mat", "and then it saw", "one big dog"] * 3
LABELS = ["x", "y"] * 6
ROWS = [{"text": text, "label": label} for text, label in zip(TEXTS, LABELS)]
FRAME = pandas.DataFrame(ROWS)
NAMES = datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["x", "y"])})
CODED = datasets.Dataset.from_dict({"text": TEXTS, "label": [0, 1] * 6}, features=NAMES)


class Polars:
    """The part of a frame of polars that is used."""

    columns = ("text", "label")

    def iter_rows(self, *, named):
        assert named
        return iter(ROWS)

    def __iter__(self):
        return iter(self.columns)


class ArrowStream:
    """A table of any library that speaks Arrow."""

    columns = ("text", "label")

    def __arrow_c_stream__(self, requested_schema=None):
        return pyarrow.Table.from_pylist(ROWS).__arrow_c_stream__(requested_schema)


LABELLED = {
    "dictionaries": lambda: ROWS,
    "generator": lambda: iter(ROWS),
    "pairs": lambda: list(zip(TEXTS, LABELS)),
    "two lists": lambda: (TEXTS, LABELS),
    "two arrays": lambda: (np.array(TEXTS), np.array(LABELS)),
    "two Series": lambda: (FRAME["text"], FRAME["label"].astype("category")),
    "frame and Series": lambda: (FRAME[["text"]], FRAME["label"]),
    "columns": lambda: {"text": TEXTS, "label": np.array(LABELS)},
    "DataFrame": lambda: FRAME,
    "DataFrame with an index": lambda: FRAME.set_index(pandas.Index(range(50, 62), name="n")),
    "DataFrames": lambda: [FRAME[:5], FRAME[5:]],
    "chunks": lambda: iter([FRAME[:5], FRAME[5:]]),
    "polars": Polars,
    "Arrow table": lambda: pyarrow.Table.from_pylist(ROWS),
    "Arrow batch": lambda: pyarrow.RecordBatch.from_pylist(ROWS),
    "Arrow reader": lambda: pyarrow.Table.from_pylist(ROWS).to_reader(),
    "Arrow stream": ArrowStream,
    "Dataset": lambda: datasets.Dataset.from_list(ROWS),
    "Dataset of classes": lambda: CODED,
    "IterableDataset": CODED.to_iterable_dataset,
    "DatasetDict": lambda: datasets.DatasetDict(test=CODED.select([0]), train=CODED),
    "record array": lambda: np.array(list(zip(TEXTS, LABELS)), dtype=[("text", "U20"), ("label", "U1")]),
}
UNLABELLED = {
    "list": lambda: TEXTS,
    "tuple": lambda: tuple(TEXTS),
    "generator": lambda: iter(TEXTS),
    "array": lambda: np.array(TEXTS),
    "array of objects": lambda: np.array(TEXTS, dtype=object),
    "one column": lambda: np.array(TEXTS)[:, None],
    "Series": lambda: FRAME["text"],
    "Arrow array": lambda: pyarrow.array(TEXTS),
    "Arrow chunks": lambda: pyarrow.chunked_array([TEXTS[:5], TEXTS[5:]]),
    "column of a Dataset": lambda: CODED["text"],
    "keys": lambda: dict(enumerate(TEXTS)).values(),
    "one-column DataFrame": lambda: FRAME[["text"]],
}


@pytest.mark.parametrize("kind", LABELLED)
def test_labelled_rows(kind):
    texts = read_texts(LABELLED[kind](), columns=["label"])
    assert list(texts.texts) == TEXTS
    assert list(texts.column("label")) == LABELS
    assert are_images(LABELLED[kind]()) is (None if kind in ("generator", "chunks", "Arrow reader") else False)
    found = read_labelled(LABELLED[kind](), split=Split(test_share=0.4))
    assert [found.classes[code] for code in found.y] == LABELS
    assert found.digest() == read_labelled(ROWS, split=Split(test_share=0.4)).digest()


@pytest.mark.parametrize("kind", UNLABELLED)
def test_texts(kind):
    assert list(read_texts(UNLABELLED[kind]()).texts) == TEXTS
    assert one_column(UNLABELLED[kind]()) == TEXTS
    data = repeatable(UNLABELLED[kind]())
    assert list(records_of(data)) == list(records_of(data))


@pytest.mark.parametrize("kind", ["DataFrame", "two lists", "Arrow table", "generator", "DatasetDict"])
def test_capture_reads_rows_and_not_names_of_columns(models, kind):
    wanted = sk.capture(models["llama"], TEXTS, layer=1)
    found = sk.capture(models["llama"], LABELLED[kind](), layer=1)
    assert torch.equal(found.x, wanted.x)
    assert found.info["data_digest"] == wanted.info["data_digest"]


@pytest.mark.parametrize("kind", UNLABELLED)
def test_estimators_take_the_same(models, kind):
    states = sk.HiddenStates(models["llama"], layer=1)
    np.testing.assert_array_equal(states.fit_transform(UNLABELLED[kind]()) if kind != "generator" else
                                  states.transform(UNLABELLED[kind]()), states.transform(TEXTS))  # fmt: skip


def test_an_endless_iterator_is_read_as_far_as_it_is_wanted(models):
    rows = sk.capture(models["llama"], (TEXTS[i % 12] for i in count()), layer=1, tokens=50)
    assert rows.n_rows == 50
    data = repeatable(iter(range(5)))
    assert (list(islice(data, 2)), list(data), list(data)) == ([0, 1], list(range(5)), list(range(5)))


def test_missing_values(tmp_path):
    frame = pandas.DataFrame({"text": ["a", None, float("nan"), pandas.NA, "b"], "n": [1, 2, 3, 4, 5]})
    texts = read_texts(frame)
    assert (texts.texts, texts.column("n"), texts.info["n_empty"]) == (("a", "b"), (1, 5), 3)
    assert all(type(value) is int for value in texts.column("n"))
    assert read_texts(["a", None, "b"]).ids == ("0", "2")
    frame = pandas.DataFrame({"text": ["a", "b"], "label": ["x", None]})
    with pytest.raises(DataError, match="every row must have a label in column `label`; 1 of 2 have none"):
        read_labelled(frame)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"a", "b"}, "got set, which has no order. Make it a list"),
        ({"text": "a", "label": "b"}, "this one has the keys `text`, `label`. Records come in a list"),
        ({"text": ["a"], "label": ["b", "c"]}, "columns must have one length; `text` ends after 1 entries"),
        ((["a"], ["b", "c"]), "columns must have one length; `the texts` ends after 1 entries"),
        ([["a", "b"], ["c", "d"]], "record 0 is list. What can be read: a list"),
        (b"bytes", "got bytes: one string"),
        (3, "data in memory must be a list .*; got int"),
        (np.zeros((3, 4)), r"got ndarray of shape \(3, 4\). Give one column"),
        (np.zeros((3, 4, 4)), "record 0 is ndarray"),
        ([b"a"], "record 0 is bytes"),
        (pandas.concat([FRAME, FRAME], axis=1), "columns must have different names"),
        (FRAME.drop(columns="text"), "must have a column `text`; its columns are `label`"),
    ],
)
def test_what_cannot_be_read_is_refused(data, message):
    with pytest.raises(DataError, match=message):
        read_texts(data)


def test_an_open_file_is_refused(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n')
    with open(tmp_path / "a.jsonl") as stream, pytest.raises(DataError, match=r"an open file. Give its path"):
        read_texts(stream)


def test_settings_that_data_in_memory_do_not_have():
    with pytest.raises(DataError, match=r"data in memory have no split `test` \(list\)"):
        read_texts(TEXTS, split="test")
    with pytest.raises(DataError, match="must have the split `dev`; it has `test`, `train`"):
        read_texts(LABELLED["DatasetDict"](), split="dev")
    assert len(read_texts(LABELLED["DatasetDict"](), split="test")) == 1
    with pytest.raises(DataError, match="holds texts without names of columns; a column `body` is asked for"):
        read_texts(TEXTS, text="body")
    with pytest.raises(DataError, match="was read with the split None; `test` is asked for"):
        read_texts(read_texts(TEXTS), split="test")
    texts = read_texts([{"body": "a", "title": "b"}], text="body")
    assert (read_texts(texts).texts, read_texts(texts, text="title").texts) == (("a",), ("b",))
    with pytest.raises(DataError, match="must have a column `headline`"):
        read_texts(texts, text="headline")
    for name in ("label", "text", "group", "split_column"):
        with pytest.raises(ConfigError, match=rf"`{name}` must be the name of a column; got list.*data=\(texts, label"):
            Split(**{name: LABELS})


def test_a_users_own_error_comes_through():
    def broken():
        yield "a"
        raise ZeroDivisionError("mine")

    with pytest.raises(ZeroDivisionError, match="mine"):
        read_texts(broken())


# --- images -----------------------------------------------------------------------------------------------------------

PIXELS = np.arange(6 * 4 * 4, dtype=np.uint8).reshape(6, 4, 4)
PICTURES = [PIL.Image.fromarray(each) for each in PIXELS]
CLASSES = ["x", "y", "x", "y", "x", "y"]
IMAGES = {
    "array and labels": lambda: (PIXELS, CLASSES),
    "tensor and labels": lambda: (torch.from_numpy(PIXELS), np.array(CLASSES)),
    "pictures and Series": lambda: (PICTURES, pandas.Series(CLASSES)),
    "pairs": lambda: list(zip(PICTURES, CLASSES)),
    "columns": lambda: {"image": PIXELS, "label": CLASSES},
    "dictionaries": lambda: [{"image": each, "label": label} for each, label in zip(PICTURES, CLASSES)],
    "DataFrame": lambda: pandas.DataFrame({"label": CLASSES, "image": PICTURES}),
    "Dataset": lambda: datasets.Dataset.from_dict({"image": PICTURES, "label": CLASSES}),
}


@pytest.mark.parametrize("kind", IMAGES)
def test_images_with_labels(kind):
    assert are_images(IMAGES[kind]()) is True
    images = read_images(IMAGES[kind]())
    assert list(images.column("label")) == CLASSES
    for image, pixels in zip(images, PIXELS, strict=True):
        np.testing.assert_array_equal(np.asarray(image), pixels)


def test_images_without_labels():
    for data in (PIXELS, PICTURES, tuple(PICTURES), iter(PICTURES), (PICTURES[0], PICTURES[1]), (PIXELS[0], PIXELS[1])):
        assert all(np.asarray(image).shape == (4, 4) for image in read_images(data))


def test_settings_that_images_do_not_have(tmp_path):
    for data in (PIXELS, PICTURES):
        with pytest.raises(DataError, match="Leave"):
            read_images(data, image="picture")
        with pytest.raises(DataError, match="split"):
            read_images(data, split="test")
    with pytest.raises(DataError, match="was read with the split None; `test` is asked for"):
        read_images(read_images(PIXELS), split="test")
    for part in ("train", "test"):
        for label in "xy":
            (tmp_path / part / label).mkdir(parents=True)
            PICTURES[part == "test"].save(tmp_path / part / label / "a.png")
    np.testing.assert_array_equal(np.asarray(read_images(tmp_path)[0]), PIXELS[0])
    found = read_images(f"{tmp_path}@test")
    assert (found.info["split"], found.column("label")) == ("test", ("x", "y"))
    np.testing.assert_array_equal(np.asarray(found[0]), PIXELS[1])
    with pytest.raises(DataError, match="must have the split `dev`"):
        read_images(tmp_path, split="dev")
    with pytest.raises(DataError, match="must have the split `dev`"):
        read_images(tmp_path / "train", split="dev")
    with pytest.raises(DataError, match="has no columns; a column of images, `picture`, is asked for"):
        read_images(tmp_path, image="picture")
    with pytest.raises(ConfigError, match="`text` names a column of texts, `body`; these are images"):
        read_labelled(read_images((PIXELS, CLASSES)), split=Split(text="body"))
