"""Texts from files, the hub, the corpus and lists."""

from __future__ import annotations

import gzip
import json

import datasets
import pyarrow
import pyarrow.parquet
import pytest

from saekit.errors import ConfigError, DataError
from saekit.inputs.texts import read_texts

RECORDS = [
    {"text": "first, with a comma", "label": "a", "n": 1},
    {"text": "null", "label": "b", "n": 2},
    {"text": "", "label": "a", "n": 3},
    {"text": 'third "quoted"\ttext', "label": "ü", "n": 4},
]
TEXTS = ("first, with a comma", "null", 'third "quoted"\ttext')


def table(separator):
    import csv
    import io

    stream = io.StringIO(newline="")
    writer = csv.DictWriter(stream, list(RECORDS[0]), delimiter=separator)
    writer.writeheader()
    writer.writerows(RECORDS)
    return stream.getvalue().encode()


def parquet():
    sink = pyarrow.BufferOutputStream()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(RECORDS), sink)
    return sink.getvalue().to_pybytes()


KINDS = {
    "csv": lambda: table(","),
    "tsv": lambda: table("\t"),
    "json": lambda: json.dumps(RECORDS).encode(),
    "jsonl": lambda: "\n".join(map(json.dumps, RECORDS)).encode(),
    "parquet": parquet,
}


@pytest.mark.parametrize("compressed", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_table(tmp_path, kind, compressed):
    path = tmp_path / (f"data.{kind}" + (".gz" if compressed else ""))
    path.write_bytes(gzip.compress(KINDS[kind]()) if compressed else KINDS[kind]())
    texts = read_texts(path)
    assert texts.texts == TEXTS
    assert texts.ids == ("0", "1", "3")
    assert texts.column("label") == ("a", "b", "ü")
    assert texts.column("n") == (("1", "2", "4") if kind in ("csv", "tsv") else (1, 2, 4))
    assert (texts.info["n_empty"], texts.info["n_texts"], texts.info["complete"]) == (1, 3, True)
    assert texts.digest == read_texts(list(TEXTS)).digest
    assert texts.info["name"] == path.name
    assert json.dumps(texts.info)


@pytest.mark.parametrize("compressed", [False, True])
def test_lines_of_a_text_file(tmp_path, compressed):
    path = tmp_path / ("a.txt.gz" if compressed else "a.txt")
    data = b"one line\n\n  \nanother\n"
    path.write_bytes(gzip.compress(data) if compressed else data)
    texts = read_texts(path)
    assert texts.texts == ("one line", "another")
    assert texts.info["n_empty"] == 2


def test_a_folder_of_files(tmp_path):
    for name in ("b.jsonl", "a.jsonl"):
        (tmp_path / name).write_text(json.dumps({"text": name}))
    assert read_texts(tmp_path).texts == ("a.jsonl", "b.jsonl")
    (tmp_path / "c.txt").write_text("x")
    with pytest.raises(DataError, match=r"one kind per folder; the folder holds `\.jsonl`, `\.txt`"):
        read_texts(tmp_path)


def test_limits(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(KINDS["jsonl"]())
    texts = read_texts(path, limit=2)
    assert (texts.texts, texts.info["complete"]) == (TEXTS[:2], False)
    assert read_texts(path, limit=3).info["complete"]
    assert read_texts(path, characters=5).texts == TEXTS[:1]
    assert read_texts(path, characters=20).texts == TEXTS[:2]
    assert read_texts(path, columns=()).columns == {}
    assert list(read_texts(path, columns=["n"]).columns) == ["n"]


def test_lists_dictionaries_and_texts():
    assert read_texts(iter(["a", " ", "b"])).texts == ("a", "b")
    texts = read_texts(({"body": r["text"], "label": r["label"]} for r in RECORDS), text="body")
    assert texts.texts == TEXTS
    again = read_texts(texts, limit=2)
    assert (again.texts, again.ids, again.column("label")) == (TEXTS[:2], ("0", "1"), ("a", "b"))
    assert texts[0] == TEXTS[0]
    assert texts[1:] == TEXTS[1:]
    assert read_texts(datasets.Dataset.from_list(RECORDS)).texts == TEXTS


def test_digest_knows_where_texts_end():
    assert read_texts(["ab", "c"]).digest != read_texts(["a", "bc"]).digest
    assert read_texts(["a", "b"]).digest != read_texts(["b", "a"]).digest


def test_the_builtin_corpus(monkeypatch):
    from saekit.inputs import corpus

    documents = [corpus.Document(id=f"m:{i}", module="m", library="numpy", text=f"text {i}") for i in range(50)]
    asked = []
    monkeypatch.setattr(corpus, "docs", lambda *, split: asked.append(split) or documents)
    texts = read_texts("builtin")
    assert sorted(texts.texts) == sorted(d.text for d in documents)
    assert texts.texts != tuple(d.text for d in documents), "a prefix must be a sample"
    assert texts.texts == read_texts("builtin").texts
    assert texts.ids[0] == "m:" + texts[0].split()[1]
    assert set(texts.column("library")) == {"numpy"}
    read_texts("builtin@heldout")
    read_texts("builtin", split="train")
    assert asked == ["all", "all", "heldout", "train"]


def test_the_paragraphs_of_the_builtin_corpus(monkeypatch):
    from saekit.inputs import corpus

    found = [
        corpus.Paragraph(f"m:{i}/0", "m", "numpy", "Notes" if i % 2 else "Returns", f"text {i}") for i in range(20)
    ]
    monkeypatch.setattr(corpus, "paragraphs", lambda *, split: found if split == "heldout" else [])
    texts = read_texts("builtin:paragraphs@heldout")
    assert texts.info["name"] == "builtin:paragraphs"
    assert {(texts.ids[i], texts[i], texts.column("section")[i]) for i in range(20)} == {
        (p.id, p.text, p.section) for p in found
    }
    assert texts.texts != tuple(p.text for p in found), "a prefix must be a sample"
    assert set(texts.column("module")) == {"m"}


def test_real_files(shared_data):
    texts = read_texts(shared_data / "labelled" / "banking77.csv.gz")
    assert len(texts) == 13083
    assert set(texts.column("split")) == {"train", "test"}
    assert len(read_texts(shared_data / "text" / "wikitext2_test.txt.gz", limit=10)) == 10


def test_settings_of_datasets_are_restored(tmp_path, capfd):
    path = tmp_path / "a.jsonl"
    path.write_bytes(KINDS["jsonl"]())
    level, off = datasets.logging.get_verbosity(), datasets.are_progress_bars_disabled()
    try:
        datasets.logging.set_verbosity_info()
        datasets.enable_progress_bars()
        capfd.readouterr()
        read_texts(path)
        assert datasets.logging.get_verbosity() == datasets.logging.INFO
        assert not datasets.are_progress_bars_disabled()
        assert capfd.readouterr() == ("", "")
    finally:
        datasets.logging.set_verbosity(level)
        if off:
            datasets.disable_progress_bars()


# --- what is refused --------------------------------------------------------------------------------------------------


def test_missing_columns(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(KINDS["jsonl"]())
    with pytest.raises(
        DataError, match=r"`a.jsonl` must have a column `txt`; .*`text`, `label`, `n`. Did you mean `text`"
    ):
        read_texts(path, text="txt")
    with pytest.raises(DataError, match=r"must have a column `lable`; .*Did you mean `label`"):
        read_texts(path, columns=["lable"])
    with pytest.raises(DataError, match=r"must have a column `lable`.*Did you mean `label`"):
        read_texts(path).column("lable")


def test_no_text_at_all(tmp_path):
    with pytest.raises(DataError, match="all 2 texts of column `text` are empty"):
        read_texts(["", "  \n"])
    with pytest.raises(DataError, match="it has no rows"):
        read_texts([])
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": None}))
    with pytest.raises(DataError, match="all 1 texts"):
        read_texts(tmp_path / "a.jsonl")


def test_columns_that_hold_no_text(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(KINDS["jsonl"]())
    with pytest.raises(DataError, match=r"column `n` of `a.jsonl` must hold text, or conversations; row 0 has 1 "):
        read_texts(tmp_path / "a.jsonl", text="n")
    with pytest.raises(DataError, match="record 0 is int"):
        read_texts([1, 2])


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("a.csv", b""),
        ("a.jsonl", b'{"text": "a"}\n{"text": '),
        ("a.parquet", parquet()[:-30]),
        ("a.jsonl.gz", gzip.compress(KINDS["jsonl"]() * 100)[:-40]),
        ("a.json.gz", b"not gzip"),
    ],
)
def test_damaged_files(tmp_path, name, data):
    (tmp_path / name).write_bytes(data)
    with pytest.raises(DataError, match="cannot be read"):
        read_texts(tmp_path / name)


def test_names_that_lead_nowhere(tmp_path):
    for name in ("nowhere.csv", "./nowhere", "a/b/c", "imdb", "folder/file.jsonl.gz"):
        with pytest.raises(DataError, match="there is no such file"):
            read_texts(name)
    (tmp_path / "a.docx").write_text("x")
    with pytest.raises(DataError, match=r"must end in .*got `a\.docx`"):
        read_texts(tmp_path / "a.docx")
    for settings in ({"limit": 0}, {"characters": -1}):
        with pytest.raises(ConfigError, match="must be a whole number from 1"):
            read_texts(["a"], **settings)
