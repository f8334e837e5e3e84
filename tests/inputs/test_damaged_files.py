"""Damaged files of texts and images are read, or refused with an error of saekit; nothing else is raised."""

from __future__ import annotations

import csv
import gzip
import io
import json
import warnings

import numpy as np
import PIL.Image
import pyarrow
import pyarrow.parquet
import pytest

from fixtures.mutations import mutate
from saekit.errors import SaekitError
from saekit.inputs.images import read_images
from saekit.inputs.labelled import read_labelled
from saekit.inputs.texts import read_texts

MUTATIONS = 60
ROWS = [{"text": f"some words of row {i}, “quoted”", "label": f"0{i % 3}", "n": i} for i in range(12)]
PIXELS = np.arange(5 * 8 * 8, dtype=np.uint8).reshape(5, 8, 8)


def _csv(delimiter: str) -> bytes:
    stream = io.StringIO(newline="")
    writer = csv.DictWriter(stream, list(ROWS[0]), delimiter=delimiter)
    writer.writeheader()
    writer.writerows(ROWS)
    return stream.getvalue().encode()


def _parquet() -> bytes:
    sink = pyarrow.BufferOutputStream()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), sink)
    return sink.getvalue().to_pybytes()


def _numpy(save, **arrays) -> bytes:
    stream = io.BytesIO()
    save(stream, **arrays)
    return stream.getvalue()


def _png() -> bytes:
    stream = io.BytesIO()
    PIL.Image.fromarray(PIXELS[0]).save(stream, "PNG")
    return stream.getvalue()


TEXTS = {
    "a.csv": _csv(","),
    "a.tsv": _csv("\t"),
    "a.json": json.dumps(ROWS).encode(),
    "a.jsonl": "\n".join(map(json.dumps, ROWS)).encode(),
    "a.txt": "\n".join(row["text"] for row in ROWS).encode(),
    "a.parquet": _parquet(),
}
IMAGES = {
    "a.npy": _numpy(np.save, arr=PIXELS),
    "a.npz": _numpy(np.savez, images=PIXELS, labels=np.arange(5)),
    "t-images-idx3-ubyte": bytes([0, 0, 8, 3, 0, 0, 0, 5, 0, 0, 0, 8, 0, 0, 0, 8]) + PIXELS.tobytes(),
    "a.png": _png(),
}


@pytest.mark.parametrize("name", [*TEXTS, *(f"{name}.gz" for name in TEXTS)])
def test_damaged_texts(tmp_path, name):
    path = tmp_path / name
    kind = name.removesuffix(".gz")
    whole = read_texts(_written(path, TEXTS[kind]))
    assert len(whole) == len(ROWS)
    for seed in range(MUTATIONS):
        data = mutate(TEXTS[kind], f".{kind.split('.')[1]}", seed)[1]
        if name != kind:
            data = gzip.compress(data, mtime=0) if seed % 2 else mutate(gzip.compress(TEXTS[kind]), ".gz", seed)[1]
        _written(path, data, packed=True)
        assert len(_message(_check_texts, path)) < 2000, seed


@pytest.mark.parametrize("name", IMAGES)
def test_damaged_images(tmp_path, name):
    path = tmp_path / name
    for seed in range(MUTATIONS):
        path.write_bytes(mutate(IMAGES[name], path.suffix, seed)[1])
        assert len(_message(_check_images, tmp_path if name == "a.png" else path)) < 2000, seed


def _check_texts(path):
    texts = read_texts(path)
    assert all(isinstance(text, str) and text.strip() for text in texts)
    assert json.dumps(texts.info).encode()
    assert all(len(column) == len(texts) for column in texts.columns.values())
    read_labelled(path)


def _check_images(path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow warns of much that it reads
        for image in read_images(path):
            image.convert("RGB")


def _message(check, path) -> str:
    try:
        check(path)
    except SaekitError as error:
        return str(error)
    return ""


def _written(path, data, *, packed=False):
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" and not packed else data)
    return path
