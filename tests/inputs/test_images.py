"""Images: every kind of source gives the same images, and what is no image is refused."""

from __future__ import annotations

import gzip
import struct
import warnings

import numpy as np
import PIL.Image
import pytest
import torch

from saekit.errors import ConfigError, DataError, FormatError
from saekit.inputs.hub_datasets import HubName
from saekit.inputs.images import are_images, read_images

with warnings.catch_warnings():
    import datasets

PIXELS = np.random.default_rng(0).integers(0, 256, (6, 9, 7), np.uint8)
LABELS = [0, 1, 2, 0, 1, 2]


def idx(values: np.ndarray) -> bytes:
    return struct.pack(f">HBB{values.ndim}I", 0, 8, values.ndim, *values.shape) + values.astype(np.uint8).tobytes()


def pixels_of(images) -> np.ndarray:
    return np.stack([np.asarray(image) for image in images])


@pytest.fixture
def sources(tmp_path):
    """The same six images in every form, with the expected labels."""
    folder = tmp_path / "images"
    for i, (pixels, label) in enumerate(zip(PIXELS, LABELS)):
        (folder / str(label)).mkdir(parents=True, exist_ok=True)
        PIL.Image.fromarray(pixels).save(folder / str(label) / f"{i}.png")
    np.save(tmp_path / "x.npy", PIXELS)
    np.savez(tmp_path / "x.npz", images=PIXELS, labels=LABELS, extra=np.zeros(3))
    (tmp_path / "t-images-idx3-ubyte.gz").write_bytes(gzip.compress(idx(PIXELS)))
    (tmp_path / "t-labels-idx1-ubyte.gz").write_bytes(gzip.compress(idx(np.array(LABELS))))
    (tmp_path / "t-images-idx3-ubyte").write_bytes(idx(PIXELS))
    opened = [PIL.Image.fromarray(pixels) for pixels in PIXELS]
    table = datasets.Dataset.from_dict(
        {"picture": opened, "label": LABELS, "boxes": [[1]] * 6},
        features=datasets.Features(
            picture=datasets.Image(),
            label=datasets.ClassLabel(names=["a", "b", "c"]),
            boxes=datasets.Sequence(datasets.Value("int64")),
        ),
    )
    table.save_to_disk(str(tmp_path / "table"))
    datasets.DatasetDict({"test": table}).save_to_disk(str(tmp_path / "splits"))
    named = ["abc"[label] for label in LABELS]
    return {
        "npy": (tmp_path / "x.npy", None),
        "npz": (tmp_path / "x.npz", LABELS),
        "idx.gz": (tmp_path / "t-images-idx3-ubyte.gz", LABELS),
        "idx": (tmp_path / "t-images-idx3-ubyte", None),
        "disk": (tmp_path / "table", named),
        "splits": (tmp_path / "splits", named),
        "array": (PIXELS, None),
        "tensor": (torch.from_numpy(PIXELS)[..., None], None),
        "floats": (PIXELS / 255, None),
        "list": (opened, None),
        "arrays": (list(PIXELS), None),
    }


KINDS = ("npy", "npz", "idx.gz", "idx", "disk", "splits", "array", "tensor", "floats", "list", "arrays")


@pytest.mark.parametrize("kind", KINDS)
def test_every_source_gives_the_same_images(sources, kind):
    data, labels = sources[kind]
    images = read_images(data)
    assert np.array_equal(pixels_of(images), PIXELS)
    assert images.ids == tuple("012345")
    assert images.columns == ({"label": tuple(labels)} if labels else {})
    assert images.digest == read_images(data).digest
    assert images.info["n_images"] == len(images) == 6


def test_a_folder_with_a_subfolder_per_label(sources, tmp_path):
    images = read_images(tmp_path / "images")
    order = [0, 3, 1, 4, 2, 5]
    assert np.array_equal(pixels_of(images), PIXELS[order])
    assert images.ids == tuple(f"{LABELS[i]}/{i}.png" for i in order)
    assert images.column("label") == ("0", "0", "1", "1", "2", "2")
    before = images.digest
    PIL.Image.fromarray(PIXELS[1]).save(tmp_path / "images" / "0" / "0.png")
    assert read_images(tmp_path / "images").digest != before
    PIL.Image.fromarray(PIXELS[1]).save(tmp_path / "images" / "alone.png")
    assert read_images(tmp_path / "images").columns == {}


def test_a_limit_draws_from_everywhere(sources):
    whole = read_images(sources["npz"][0])
    some = read_images(sources["npz"][0], limit=4)
    places = [int(name) for name in some.ids]
    assert len(some) == 4
    assert places == sorted(places)
    many = read_images(np.zeros((200, 2, 2), np.uint8), limit=20)
    assert np.ptp([int(name) for name in many.ids]) > 100
    assert np.array_equal(pixels_of(some), PIXELS[places])
    assert some.columns["label"] == tuple(LABELS[i] for i in places)
    assert not some.info["complete"]
    assert some.digest != whole.digest
    assert read_images(sources["npz"][0], limit=6).digest == whole.digest


def test_picking(sources):
    images = read_images(sources["npz"][0])
    twice = images.pick([5, 1, 0])[1:]
    assert twice.ids == ("1", "0")
    assert np.array_equal(pixels_of(twice), PIXELS[[1, 0]])
    assert np.array_equal(np.asarray(images[-1]), PIXELS[5])
    with pytest.raises(IndexError):
        images[6]
    named = images.with_columns(label=np.array([5, 4, 3, 2, 1, 0]), kind=list("aabbcc")).pick([0, 5])
    assert named.columns == {"label": (5, 0), "kind": ("a", "c")}
    with pytest.raises(DataError, match="column `kind` must have an entry per image, 6; got 2"):
        images.with_columns(kind="ab")


def test_a_data_set_of_the_hub_is_read_no_further_than_wanted(monkeypatch):
    from saekit.inputs import images as module

    read = []

    def records():
        for i, pixels in enumerate(PIXELS):
            read.append(i)
            yield {"image": PIL.Image.fromarray(pixels), "label": "abc"[LABELS[i]], "other": [1]}

    asked = []
    monkeypatch.setattr(
        module, "open_hub", lambda *a: asked.append(a) or (records(), {"kind": "hub", "name": "owner/name"})
    )
    found = read_images("owner/name:small@test", limit=3)
    assert asked == [(HubName("owner/name:small@test", "owner/name", "small", "test"), None)]
    assert read == [0, 1, 2]
    assert found.columns == {"label": ("a", "b", "c")}
    assert not found.info["complete"]
    assert np.array_equal(pixels_of(found), PIXELS[:3])
    assert len(read_images("owner/name")) == 6


def test_colour_and_floats():
    colour = np.random.default_rng(1).integers(0, 256, (2, 4, 4, 3), np.uint8)
    assert read_images(colour)[0].mode == "RGB"
    assert np.array_equal(pixels_of(read_images(colour.astype(np.int64))), colour)


def test_what_is_refused(tmp_path, sources):
    (tmp_path / "empty").mkdir()
    for data, message in (
        (tmp_path / "nothing", "must be a folder of images, a .npy, .npz or IDX file, or a hub data set"),
        (tmp_path / "empty", "must hold image files"),
        (tmp_path / "images" / "0" / "0.png", "is a single one. Give the folder that holds it"),
        (np.zeros((4, 4)), r"must hold images \[n, height, width\]"),
        (np.zeros((4, 3, 8, 8)), "Move the channels to the end"),
        (np.full((2, 4, 4), 16.0), "as numbers from 0 to 1; got float64 from 16 to 16"),
        (np.full((2, 4, 4), -0.1), "as numbers from 0 to 1; got float64 from -0.1"),
        ([], "there must be at least one image; the list is empty"),
        ([np.zeros((4, 4, 2), np.uint8)], r"image 0 must be \[height, width\]"),
        (3, "of texts or images, .*; got int"),
    ):
        with pytest.raises(DataError, match=message):
            read_images(data)
    (tmp_path / "x.txt").write_text("x")
    with pytest.raises(DataError, match=r"images come from a folder, a .npy, .npz or IDX file; got `x.txt`"):
        read_images(tmp_path / "x.txt")
    with pytest.raises(ConfigError, match="`limit` must be a whole number from 1; got 0"):
        read_images(PIXELS, limit=0)
    with pytest.raises(DataError, match=r"must have a column `lable`.*Did you mean `label`"):
        read_images(sources["npz"][0]).column("lable")
    with pytest.raises(DataError, match=r"must have a column `x`; its columns are `picture`"):
        read_images(sources["disk"][0], image="x")
    with pytest.raises(DataError, match=r"must have a column of images; its columns are .*Name it"):
        read_images(sources["disk"][0], image="label")
    with pytest.raises(DataError, match="must have the split `train`; it has `test`"):
        read_images(sources["splits"][0], split="train")


def test_damaged_files(tmp_path, sources):
    whole = (tmp_path / "t-images-idx3-ubyte").read_bytes()
    (tmp_path / "cut-idx3-ubyte").write_bytes(whole[:-5])
    (tmp_path / "cut.npz").write_bytes((tmp_path / "x.npz").read_bytes()[:100])
    with pytest.raises(FormatError, match="must be an IDX file of bytes; it makes no sense"):
        read_images(tmp_path / "cut-idx3-ubyte")
    with pytest.raises(FormatError, match="must be a file of numpy arrays of numbers"):
        read_images(tmp_path / "cut.npz")
    np.savez(tmp_path / "two.npz", a=PIXELS, b=PIXELS)
    with pytest.raises(DataError, match="there are 2 with three axes or more"):
        read_images(tmp_path / "two.npz")
    (tmp_path / "t-labels-idx1-ubyte.gz").write_bytes(gzip.compress(idx(np.arange(5))))
    with pytest.raises(DataError, match=r"must hold one label per image .*holds \(5,\) for 6"):
        read_images(tmp_path / "t-images-idx3-ubyte.gz")
    bad = tmp_path / "images" / "1" / "1.png"
    bad.write_bytes(bad.read_bytes()[:40])
    images = read_images(tmp_path / "images")
    with pytest.raises(FormatError, match=r"1.png` must be an image; it cannot be read"):
        list(images)
    PIL.Image.fromarray(PIXELS[0]).save(bad, "EPS")  # a program of PostScript, which Pillow hands to Ghostscript
    with pytest.raises(FormatError, match=r"1.png` must be an image; it cannot be read"):
        list(images)
    (tmp_path / "table" / "data-00000-of-00001.arrow").write_bytes(b"x")
    with pytest.raises(FormatError, match="must be a data set that save_to_disk wrote"):
        read_images(sources["disk"][0])


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (PIXELS, True),
        (torch.zeros(2, 4, 4), True),
        ([PIL.Image.new("L", (4, 4))], True),
        ([PIXELS[0]], True),
        ("photos.npz", True),
        ("train-images-idx3-ubyte.gz", True),
        (["a text"], False),
        ([{"text": "a"}], False),
        (np.array(["a", "b"]), False),
        ("builtin@heldout", False),
        ("texts.jsonl.gz", False),
        ("owner/name", None),
        ("photos", None),
    ],
)
def test_what_tells_images_from_texts(data, expected):
    assert are_images(data) is expected
