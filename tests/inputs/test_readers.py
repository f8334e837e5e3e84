"""Local files: a name stands for the file that is called so, cells are text, memory is bounded, errors are ours."""

from __future__ import annotations

import contextlib
import csv
import gzip
import io
import json
import string
import subprocess
import sys
import unittest.mock

import datasets
import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from saekit.errors import ConfigError, DataError, FormatError
from saekit.inputs import readers
from saekit.inputs.labelled import read_labelled
from saekit.inputs.settings import Split
from saekit.inputs.texts import read_texts


def put(path, *texts, **columns):
    """Write texts as JSON Lines."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps({"text": text, **columns}) + "\n" for text in texts))
    return path


# --- names ------------------------------------------------------------------------------------------------------------

ODD = st.text(string.ascii_lowercase[:2] + "1[]*?{}~%#@:!$&'()+,;= \\\"|<>ü.-_", min_size=1, max_size=10).filter(
    lambda name: name.strip(".") and name[0] != "."
)


@hypothesis_settings(max_examples=60, deadline=None)
@given(name=ODD, folder=ODD)
def test_what_is_read_is_what_was_named(tmp_path_factory, name, folder):
    root = tmp_path_factory.mktemp("names")
    for decoy in ("a1", "a", "b", "ab", "a@b"):
        put(root / f"{decoy}.jsonl", f"decoy {decoy}")
    file = put(root / f"{name}.jsonl", f"in {name}")
    inside = put(root / f"{folder}d" / f"{name}.jsonl", "in the folder")
    with contextlib.chdir(root):
        for spelled in (str(file), file.name, f"./{file.name}"):
            assert read_texts(spelled).texts == (f"in {name}",)
            assert read_texts(spelled).info["path"] == str(file)
        for spelled in (str(inside), inside.parent, f"{folder}d", inside.relative_to(root)):
            assert read_texts(spelled).texts == ("in the folder",)


def test_a_home_folder_and_users_that_are_not_there(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    put(tmp_path / "x.jsonl", "at home")
    assert read_texts("~/x.jsonl").texts == ("at home",)
    for name in ("~nobody-of-this-name/x.jsonl", "@train", "\udc80"):
        with pytest.raises(DataError, match="there is no such file"):
            read_texts(name)
    for name in ("a\0b", "x" * 5000, ""):
        with pytest.raises(ConfigError, match="a path must"):
            read_texts(name)


# --- splits -----------------------------------------------------------------------------------------------------------


def test_a_split_is_used_or_refused(tmp_path):
    folder = tmp_path / "data"
    put(folder / "train-00000-of-00002.jsonl", "a")
    put(folder / "train-00001-of-00002.jsonl", "b")
    put(folder / "test.jsonl", "c")
    assert read_texts(folder).texts == ("a", "b")
    assert read_texts(folder).info["split"] == "train"
    assert read_texts(folder, split="test").texts == read_texts(f"{folder}@test").texts == ("c",)
    assert read_texts(folder / "test.jsonl", split="test").info["split"] == "test"
    for data in (folder, folder / "test.jsonl"):
        with pytest.raises(DataError, match="must have the split `dev`; its files name `test`"):
            read_texts(data, split="dev")
    file = put(tmp_path / "file.json", "x")
    for options in ({"data": f"{file}@test"}, {"data": file, "split": "test"}):
        with pytest.raises(DataError, match=r"`file.json` must have the split `test`; files have splits only where"):
            read_texts(**options)
    with pytest.raises(ConfigError, match="with the split `test` and with `train`"):
        read_texts(f"{folder}@test", split="train")
    with pytest.raises(DataError, match="and have no `:config`"):
        read_texts(f"{file}:small")
    put(tmp_path / "two" / "dev.jsonl", "x")
    put(tmp_path / "two" / "test.jsonl", "y")
    with pytest.raises(DataError, match=r"holds the splits `dev`, `test`. Say which one"):
        read_texts(tmp_path / "two")
    put(tmp_path / "notes" / "exam_test.jsonl", "x")
    put(tmp_path / "notes" / "train_times.jsonl", "y")
    put(tmp_path / "notes" / "more.jsonl", "z")
    assert len(read_texts(tmp_path / "notes")) == 3, "not every file names a split, so these are no splits"


def test_labelled_data_takes_the_split(tmp_path):
    for name in ("train", "test"):
        lines = [json.dumps({"text": f"{name} {i}", "label": i % 2}) for i in range(12)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines))
    for wanted in ("train", "test"):
        found = read_labelled(tmp_path, split=Split(hub_split=wanted))
        assert all(text.startswith(wanted) for text in found.texts)
        assert found.about["split"] == wanted
    with pytest.raises(DataError, match="must have the split `dev`"):
        read_labelled(tmp_path, split=Split(hub_split="dev"))


def test_a_data_set_that_was_saved(tmp_path):
    parts = {name: datasets.Dataset.from_dict({"text": [f"{name} text"]}) for name in ("train", "test")}
    datasets.DatasetDict(parts).save_to_disk(tmp_path / "set")
    assert read_texts(tmp_path / "set").texts == ("train text",)
    assert read_texts(tmp_path / "set", split="test").texts == ("test text",)
    with pytest.raises(DataError, match="must have the split `dev`"):
        read_texts(tmp_path / "set", split="dev")
    parts["test"].save_to_disk(tmp_path / "one")
    (tmp_path / "one").rename(tmp_path / "one::two")
    with pytest.raises(DataError, match="must not hold `::`"):
        read_texts(tmp_path / "one::two")
    (tmp_path / "set" / "train" / "state.json").write_text("{")
    with pytest.raises(FormatError, match="a data set that save_to_disk wrote; it cannot be read"):
        read_texts(tmp_path / "set")


# --- cells ------------------------------------------------------------------------------------------------------------

CELL = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)


@hypothesis_settings(max_examples=60, deadline=None)
@given(rows=st.lists(st.tuples(CELL, CELL), min_size=1, max_size=5), suffix=st.sampled_from([".csv", ".tsv"]))
def test_cells_are_text(tmp_path_factory, rows, suffix):
    """Whatever is written into a cell comes back, as text; numbers and names of missing values are text too."""
    rows = [(text or "x", label) for text, label in rows]
    stream = io.StringIO(newline="")
    csv.writer(stream, delimiter="\t" if suffix == ".tsv" else ",", quoting=csv.QUOTE_ALL).writerows(
        [("text", "label"), *rows]
    )
    path = tmp_path_factory.mktemp("cells") / f"a{suffix}"
    path.write_bytes(stream.getvalue().encode())
    assert list(readers.read_file(path)) == [{"text": text, "label": label} for text, label in rows]


def test_labels_that_look_like_numbers_stay_apart(tmp_path):
    path = tmp_path / "a.csv"
    labels = ["01", "1", "1.0", "True", "NA", "null"]
    path.write_text("text,label\n" + "".join(f"{i},{label}\n" for i, label in enumerate(labels * 3)))
    assert read_labelled(path, split=Split(test_share=0.4)).classes == tuple(sorted(labels))
    with pytest.raises(DataError, match=r"must tell a label from its text; row 0 has 1 \(int\), another row the same"):
        read_labelled([{"text": str(i), "label": label} for i, label in enumerate([1, 1, "1", "1"])])
    path.write_text("text,label\na,\nb,x\n")
    with pytest.raises(DataError, match="every row must have a label in column `label`; 1 of 2 have none"):
        read_labelled(path)


def test_spreadsheets_and_other_programs(tmp_path):
    path = tmp_path / "a.csv"
    for data in (b"\xef\xbb\xbftext,n\r\na,1\r\n\r\nb,2\r\n", b"text,n\ra,1\rb,2\r", b"text,n\na,1\nb,2"):
        path.write_bytes(data)
        assert read_texts(path).texts == ("a", "b"), data
    path.write_bytes(b"text,n\na\0b,1\n")
    assert read_texts(path).texts == ("a\0b",)
    path.write_bytes(b"text\n" + b"x" * 300_000 + b"\n")
    limit = csv.field_size_limit()
    assert len(read_texts(path)[0]) == 300_000
    assert csv.field_size_limit() == limit


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "it is empty; the first row must name the columns"),
        (b"text,n\na\n", "after 0 records|a row must have 2 cells"),
        (b"text,n\na,1\nb,1,2\n", "after 1 records: a row must have 2 cells, as the first one has; the next has 3"),
        (b"text,text\na,b\n", "column names must differ"),
        (b'text,n\n"a" b,1\n', "a quote inside a quoted cell must be doubled"),
        (b'text,n\n"a,1\nb,2\n', "unexpected end of data"),
        (
            b"text,n\n" + "né,1\n".encode("latin-1"),
            "must be text in UTF-8; byte 8 is 0xe9.* If it is LATIN1,.* convert",
        ),
        ("text,n\na,1\n".encode("utf-16"), "byte 0 is 0xff.* If it is UTF-16,.* convert"),
        (b"text,n\n" + b"a,1\n" * 5000 + b"\xff,1\n", "byte 20,007 is 0xff"),
    ],
)
def test_tables_that_cannot_be_read(tmp_path, data, message):
    for name, packed in (("a.csv", data), ("a.csv.gz", gzip.compress(data))):
        (tmp_path / name).write_bytes(packed)
        with pytest.raises(DataError, match=message):
            list(readers.read_file(tmp_path / name))


# --- JSON -------------------------------------------------------------------------------------------------------------

VALUE = st.recursive(
    st.none() | st.booleans() | st.integers(-(10**20), 10**20) | CELL,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(CELL, inner, max_size=3),
    max_leaves=5,
)


@hypothesis_settings(max_examples=80, deadline=None)
@given(
    values=st.lists(st.dictionaries(CELL, VALUE, min_size=1, max_size=3), min_size=2, max_size=5),
    chunk=st.sampled_from([1, 2, 7, 2**20]),
    ascii_only=st.booleans(),
)
def test_json_is_read_as_it_is_written(tmp_path_factory, values, chunk, ascii_only):
    """Lines, an array, values over several lines: the same records, wherever what is read at once ends."""
    lines = [json.dumps(value, ensure_ascii=ascii_only) for value in values]
    spelled = {
        "a.jsonl": "\n".join(lines),
        "b.jsonl": "\r\n\r\n".join(lines) + "\r\n",
        "a.json": json.dumps(values, ensure_ascii=ascii_only),
        "b.json": json.dumps(values, indent=2, ensure_ascii=ascii_only) + "\n",
        "c.json": "\n".join(json.dumps(value, indent=1) for value in values),
    }
    folder = tmp_path_factory.mktemp("json")
    for name, text in spelled.items():
        (folder / name).write_bytes(text.encode())
        with unittest.mock.patch.object(readers, "_CHUNK", chunk):
            assert list(readers.read_file(folder / name)) == values, name


def test_a_table_by_columns_in_json(tmp_path):
    path = tmp_path / "a.json"
    path.write_text(json.dumps({"text": ["a", "b"], "label": [1, 2]}))
    assert read_texts(path).column("label") == (1, 2)
    path.write_text(json.dumps({"text": ["a", "b"], "label": [1]}))
    with pytest.raises(DataError, match="columns must have one length; `label` ends after 1 entries"):
        read_texts(path)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ('{"text": ' + "[" * 100_000, "nested too deeply"),
        ('{"text": "a", "n": ' + "1" * 5000 + "}", "Exceeds the limit"),
        ('{"text": "a"}\n{"text": "b"', "after 1 records: Expecting ',' delimiter in JSON"),
        ('{"text": "a"}\n{"text": "b', "after 1 records: Unterminated string"),
        ('[{"text": "a"}, {"text": "b"}', "after 2 records: the array is not closed"),
        ('[{"text": "a"}, ]', "Expecting value"),
        ('[{"text": "a"} {"text": "b"}]', "a comma between the entries"),
        ('[{"text": "a"}] x', "something follows the array"),
        ('{"text": "a\nb"}', "Invalid control character"),
    ],
)
def test_json_that_cannot_be_read(tmp_path, data, message):
    (tmp_path / "a.jsonl").write_text(data)
    with pytest.raises(DataError, match=message):
        read_texts(tmp_path / "a.jsonl")


def test_columns_that_come_late_or_change(tmp_path):
    path = tmp_path / "a.jsonl"
    records = [{"text": "a", "x": None}, {"text": "b", "late": 1, "x": 2}, {"late": 2}, {"text": "c", "x": [1]}]
    path.write_text("".join(json.dumps(record) + "\n" for record in records * 5000))
    texts = read_texts(path)
    assert texts.info["n_empty"] == 5000, "a row without text is one of missing text"
    assert texts.column("late")[:4] == (None, 1, None, None)
    assert list(texts.columns) == ["late"], "a column of lists and numbers holds no plain values"
    assert read_texts(path, columns=["x"]).column("x")[:3] == (None, 2, [1])
    for columns, n in ((["lable"], 20_000), (["lable"], 3)):
        path.write_text("".join(json.dumps(record) + "\n" for record in (records * 5000)[:n]))
        with pytest.raises(DataError, match="must have a column `lable`; its columns are `text`, `x`, `late`"):
            read_texts(path, columns=columns)


@pytest.mark.parametrize(
    ("record", "message"),
    [
        (
            {"text": "a\ud800b"},
            r"must hold Unicode text; row 0 has half of a surrogate pair, '\\ud800', at character 1",
        ),
        ({"text": "a", "label": "\udfff"}, "column `label` of `a.jsonl` must hold Unicode text"),
        ({"text": [{"role": "user", "content": 3}]}, "row 0 of `a.jsonl`: every message must be .*message 0 is"),
        ({"messages": [{"role": "user", "content": "hi"}]}, "columns are `messages`. Conversations are in"),
        ({"text": 3}, r"row 0 has 3 \(int\)"),
        ({"text": ["x" * 10_000]}, "row 0 has .{1,90} .list"),
        ([1], "something follows the array|record 0 is int"),
    ],
)
def test_records_that_are_no_text(tmp_path, record, message):
    (tmp_path / "a.jsonl").write_text(f"{json.dumps(record)}\n" * 2)
    with pytest.raises(DataError, match=message):
        read_texts(tmp_path / "a.jsonl")


def test_a_text_file_has_lines_and_no_columns(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes("one\r\ntwo\u2028still two\x0c\rthree\n".encode())
    assert read_texts(path).texts == ("one", "two\u2028still two\x0c", "three")
    with pytest.raises(DataError, match="holds texts without names of columns; a column `body` is asked for"):
        read_texts(path, text="body")


# --- memory -----------------------------------------------------------------------------------------------------------

_MEASURED = """
import resource, sys
from saekit.errors import SaekitError
from saekit.inputs.texts import read_texts
read_texts(["a"])
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
try:
    found = read_texts(sys.argv[1], characters=24_000)
    print(len(found), found.info["complete"], end=" ")
except SaekitError as error:
    print(error, end=" ")
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)
"""


def _measured(path):
    done = subprocess.run([sys.executable, "-c", _MEASURED, str(path)], capture_output=True, text=True, check=True)
    said, _, mebibytes = done.stdout.rpartition(" ")
    return said, int(mebibytes)


@pytest.mark.parametrize(
    ("name", "unit", "n", "said"),
    [
        ("rows.csv.gz", b"some words of a row,1\n", 2**22, "1264 False"),
        ("lines.jsonl.gz", b'{"text": "some words", "label": 1}\n', 2**21, "2400 False"),
        ("line.txt.gz", b"word ", 2**24, "a line must have fewer than"),
        ("cell.csv.gz", b"word\n ", 2**24, "a cell must have fewer than"),
        ("string.json.gz", b"word ", 2**24, "expands to more than 100 times its size"),
    ],
)
def test_memory_is_bounded(tmp_path, name, unit, n, said):
    """Files of 80 MB and more, a few hundred kilobytes packed, of which 24,000 characters are wanted."""
    start = b'["' if "json.gz" in name and "jsonl" not in name else b"text,n\n" if "csv" in name else b""
    start += b'"' if name == "cell.csv.gz" else b""
    path = tmp_path / name
    with gzip.open(path, "wb", compresslevel=1) as stream:
        stream.write(start)
        for _ in range(64):
            stream.write(unit * (n // 64))
    found, mebibytes = _measured(path)
    assert said in found
    assert mebibytes < 160


def test_a_line_has_a_maximum_length(tmp_path, monkeypatch):
    monkeypatch.setattr(readers, "LONGEST_RECORD", 1000)
    for name, data in {
        "a.txt": "x" * 2000,
        "a.csv": 'text\n"' + "x" * 2000 + '"',
        "b.csv": 'text\n"' + "x\n" * 2000 + '"',
        "a.jsonl": json.dumps({"text": "x" * 2_000_000}),
    }.items():
        (tmp_path / name).write_text(data)
        with pytest.raises(DataError, match=r"must have fewer than 1,000 characters. Cut it into several texts"):
            read_texts(tmp_path / name)
