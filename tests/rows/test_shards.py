"""Rows on disk: round trips, digests, and what a broken write leaves behind."""

from __future__ import annotations

import errno
import json
import time

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from saekit.errors import ConfigError, DataError, FormatError, ShapeError
from saekit.files import seal
from saekit.rows.arrays import ArrayRows
from saekit.rows.shards import MANIFEST, ShardRows, ShardWriter, open_rows
from saekit.rows.shuffle import ShufflePlan
from saekit.rows.source import Columns, Source

N, D = 1000, 6


def columns(n=N, d=D) -> Columns:
    row = torch.arange(n)
    x = torch.randn(n, d, generator=torch.Generator().manual_seed(0))
    return Columns(x, (row % 11).int(), row // 40, (row % 40).int())


def write(folder, dtype="float32", shard_rows=300, pieces=7, fingerprint=None, rows=None) -> ShardRows:
    rows = columns() if rows is None else rows
    writer = ShardWriter.open(folder, D, dtype, fingerprint or {"model": "m"}, shard_rows=shard_rows)
    step = -(-len(rows) // pieces)
    for first in range(0, len(rows), step):
        writer.append(rows.map(lambda c, a=first: c[a : a + step]), {"group": first})
    writer.finish({"hook": "layers.2"})
    return ShardRows(folder)


def read(source: Source) -> Columns:
    batches = list(source.batches(128))
    return Columns(*(torch.cat([getattr(b, name) for b in batches]) for name in ("x", "token", "document", "position")))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_round_trip(tmp_path, dtype):
    source, rows = write(tmp_path / "rows", dtype), columns()
    assert (source.n_rows, source.d_in) == (N, D)
    assert source.info["dtype"] == dtype
    assert source.info["hook"] == "layers.2"
    assert isinstance(source, Source)
    got = read(source)
    assert torch.equal(got.x, rows.x.to(getattr(torch, dtype)).float())
    for name in ("token", "document", "position"):
        assert torch.equal(getattr(got, name), getattr(rows, name))


def test_a_shard_is_an_ordinary_safetensors_file(tmp_path):
    write(tmp_path, "bfloat16")
    tensors = load_file(tmp_path / "shard-00001.safetensors")
    assert torch.equal(tensors["x"], columns().x[300:600].bfloat16())
    assert sorted(path.name for path in tmp_path.glob("*")) == [
        MANIFEST,
        *(f"shard-0000{i}.safetensors" for i in range(4)),
    ]


def test_pieces_do_not_matter(tmp_path):
    write(tmp_path / "a", pieces=1)
    write(tmp_path / "b", pieces=23)
    names = [path.name for path in (tmp_path / "a").glob("*.safetensors")]
    assert len(names) == 4
    for name in names:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    assert ShardRows(tmp_path / "a").info["digest"] == ShardRows(tmp_path / "b").info["digest"]


@pytest.mark.parametrize("seed", [None, 0])
def test_disk_and_memory_give_the_same_stream(tmp_path, seed):
    disk, rows = write(tmp_path), columns()
    memory = ArrayRows(rows.x, rows.token, rows.document, rows.position)
    for source in (disk, memory):
        object.__setattr__(source, "plan", ShufflePlan(N, 64, 200))
    pairs = list(zip(range(20), disk.batches(77, seed=seed), memory.batches(77, seed=seed)))
    for _, one, other in pairs:
        assert torch.equal(one.x, other.x)
        assert torch.equal(one.document, other.document)
        assert one.next == other.next
    again = next(iter(disk.batches(77, seed=seed, start=pairs[4][1].next)))
    assert torch.equal(again.x, pairs[5][1].x)


def test_open_rows(tmp_path):
    write(tmp_path / "rows")
    np.save(tmp_path / "x.npy", np.ones((3, 2), np.float32))
    assert isinstance(open_rows(tmp_path / "rows"), ShardRows)
    assert isinstance(open_rows(str(tmp_path / "x.npy")), ArrayRows)
    with pytest.raises(DataError, match="no such file"):
        open_rows(tmp_path / "nothing")
    with pytest.raises(DataError, match=r"it has no manifest\.json. It holds `rows`"):
        open_rows(tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="Make rows with `saekit capture`"):
        open_rows(tmp_path / "empty")


# --- damage -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("damage", ["truncated", "missing", "longer"])
def test_a_shard_of_another_size_is_refused_at_once(tmp_path, damage):
    write(tmp_path)
    shard = tmp_path / "shard-00002.safetensors"
    if damage == "missing":
        shard.unlink()
    else:
        shard.write_bytes(shard.read_bytes()[:-3] if damage == "truncated" else shard.read_bytes() + b"x")
    with pytest.raises(FormatError, match=r"shard-00002\.safetensors` must have .* bytes; .*capture again"):
        ShardRows(tmp_path)


def test_an_altered_shard_is_refused_when_it_is_reached(tmp_path):
    write(tmp_path)
    shard = tmp_path / "shard-00002.safetensors"
    data = bytearray(shard.read_bytes())
    data[-1000] ^= 1
    shard.write_bytes(data)
    source = ShardRows(tmp_path)
    assert len(source.read([(0, 10)])) == 10, "the other shards are whole"
    with pytest.raises(FormatError, match=r"shard-00002\.safetensors` has been altered"):
        read(source)
    assert len(read(ShardRows(tmp_path, verify="size"))) == N
    with pytest.raises(ConfigError, match="`verify` must be"):
        ShardRows(tmp_path, verify="hope")


def test_a_header_that_does_not_fit_is_refused(tmp_path):
    write(tmp_path)
    shard = tmp_path / "shard-00000.safetensors"
    data = shard.read_bytes()
    shard.write_bytes(data.replace(b'"token"', b'"taken"'))
    with pytest.raises(FormatError, match=r"shard-00000\.safetensors` cannot be read"):
        read(ShardRows(tmp_path, verify="size"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"schema": 3}, "has schema 3; this release reads up to 2. Install a newer saekit"),
        ({"format": "other"}, "must describe rows of saekit"),
        ({"surprise": 1}, "missing or unknown: `surprise`"),
        ({"complete": False}, "was not finished: 1000 rows are there"),
    ],
)
def test_manifests_that_are_refused(tmp_path, change, message):
    write(tmp_path)
    manifest = json.loads((tmp_path / MANIFEST).read_text())
    (tmp_path / MANIFEST).write_text(json.dumps(seal({**manifest, **change})))
    with pytest.raises(FormatError, match=message):
        ShardRows(tmp_path)


EDITS = {
    "another type of equal width": lambda m: m.update(dtype="float16"),
    "more rows": lambda m: m.update(n_rows=m["n_rows"] + 100),
    "shards in another order": lambda m: m["shards"].reverse(),
    "a shard less": lambda m: m["shards"].pop(),
    "another stride": lambda m: m.update(shard_rows=m["shard_rows"] - 64),
    "a shard elsewhere": lambda m: m["shards"][0].update(file="../a/shard-00000.safetensors"),
    "more rows in the last shard": lambda m: (m["shards"][-1].update(rows=150), m.update(n_rows=1050)),
}


@pytest.mark.parametrize("edit", EDITS.values(), ids=EDITS)
@pytest.mark.parametrize("schema", [1, 2])
def test_rows_and_their_description_are_bound_together(tmp_path, edit, schema):
    """With a seal any edit is refused; without one (schema 1) an edit that contradicts the rest."""
    write(tmp_path / "a", dtype="bfloat16")
    path = tmp_path / "a" / MANIFEST
    manifest = json.loads(path.read_text())
    if schema == 1:
        manifest.update(schema=1)
        del manifest["seal"]
        path.write_text(json.dumps(manifest))
        assert torch.equal(read(ShardRows(tmp_path / "a")).x, columns().x.bfloat16().float())
    edit(manifest)
    path.write_text(json.dumps(manifest))
    with pytest.raises(
        FormatError, match="its seal does not fit" if schema == 2 else "does not fit the rest|cannot be"
    ):
        read(ShardRows(tmp_path / "a"))


def test_a_manifest_without_its_seal(tmp_path):
    write(tmp_path)
    manifest = json.loads((tmp_path / MANIFEST).read_text())
    del manifest["seal"]
    (tmp_path / MANIFEST).write_text(json.dumps({**manifest, "dtype": "bfloat16"}))
    with pytest.raises(FormatError, match="its seal does not fit"):
        ShardRows(tmp_path)


def test_a_truncated_manifest(tmp_path):
    write(tmp_path)
    (tmp_path / MANIFEST).write_text((tmp_path / MANIFEST).read_text()[:-20])
    with pytest.raises(FormatError, match="must be JSON"):
        ShardRows(tmp_path)


# --- writing ----------------------------------------------------------------------------------------------------------


def test_going_on_after_an_interruption_gives_the_same_bytes(tmp_path):
    write(tmp_path / "whole", pieces=10)
    rows = columns()
    writer = ShardWriter.open(tmp_path / "cut", D, "float32", {"model": "m"}, shard_rows=300)
    for first in range(0, 700, 100):
        writer.append(rows.map(lambda c, a=first: c[a : a + 100]), {"group": first})
    del writer  # 700 rows were given; two shards are whole
    writer = ShardWriter.open(tmp_path / "cut", D, "float32", {"model": "m"}, shard_rows=300)
    assert writer.n_rows == 600
    assert writer.cursor == {"group": 500, "row": 100}
    for first in range(600, N, 100):
        writer.append(rows.map(lambda c, a=first: c[a : a + 100]), {"group": first})
    writer.finish({"hook": "layers.2"})
    for path in (tmp_path / "whole").iterdir():
        assert path.read_bytes() == (tmp_path / "cut" / path.name).read_bytes()


def test_rows_that_fill_no_shard_are_kept_by_a_pause_and_leave_no_trace(tmp_path):
    write(tmp_path / "whole", pieces=10)
    rows = columns()
    cut = tmp_path / "cut"
    for first in range(0, N, 100):  # paused after every piece
        writer = ShardWriter.open(cut, D, "float32", {"model": "m"}, shard_rows=300)
        assert writer.n_rows == first
        if first % 300:
            assert writer.cursor == {"group": first, "row": 0}
        writer.append(rows.map(lambda c, a=first: c[a : a + 100]), {"group": first})
        writer.pause({"group": first + 100, "row": 0})
        (cut / "part-00099.safetensors").write_bytes(b"of a kill before the manifest was replaced")
    [part] = cut.glob("part-0000?.safetensors")
    kept = part.read_bytes()
    damaged = kept[:-1] + bytes([kept[-1] ^ 1])
    part.write_bytes(damaged)
    assert ShardWriter.open(cut, D, "float32", {"model": "m"}, shard_rows=300).n_rows == N // 300 * 300
    part.write_bytes(kept)
    with pytest.raises(FormatError, match="was not finished"):
        ShardRows(cut)
    ShardWriter.open(cut, D, "float32", {"model": "m"}, shard_rows=300).finish({"hook": "layers.2"})
    assert {path.name: path.read_bytes() for path in (tmp_path / "whole").iterdir()} == {
        path.name: path.read_bytes() for path in cut.iterdir()
    }


def test_a_folder_without_rows_is_free_for_another_capture(tmp_path):
    ShardWriter.open(tmp_path, D, "float32", {"model": "one"}, shard_rows=300)
    write(tmp_path)
    assert ShardRows(tmp_path).n_rows == N


def test_the_cursor_points_into_the_middle_of_a_piece(tmp_path):
    writer = ShardWriter.open(tmp_path, D, "float32", {}, shard_rows=300)
    writer.append(columns(500), {"group": 3}, row=20)
    assert writer.cursor == {"group": 3, "row": 320}
    assert writer.n_rows == 500


def test_a_full_disk_leaves_nothing_half_written(tmp_path, monkeypatch):
    import os

    writes = []

    def full(descriptor):
        writes.append(descriptor)
        # manifest, shard, manifest (a file and its folder each), then the second shard: it never reaches the disk
        if len(writes) >= 7:
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        write(tmp_path / "rows")
    monkeypatch.undo()
    names = sorted(path.name for path in (tmp_path / "rows").iterdir())
    assert names == [MANIFEST, "shard-00000.safetensors"]
    manifest = json.loads((tmp_path / "rows" / MANIFEST).read_text())
    assert [shard["rows"] for shard in manifest["shards"]] == [300]
    with pytest.raises(FormatError, match="was not finished"):
        ShardRows(tmp_path / "rows")


def test_nan_is_refused_with_its_row_and_half_precision_overflow_too(tmp_path):
    rows = columns()
    rows.x[654, 3] = float("nan")
    with pytest.raises(DataError, match="row 654 of the capture has nan in column 3"):
        write(tmp_path / "a", rows=rows)
    rows.x[654, 3] = 1e5
    with pytest.raises(DataError, match="row 654 of the capture has inf"):
        write(tmp_path / "b", "float16", rows=rows)
    assert write(tmp_path / "c", "bfloat16", rows=rows).n_rows == N


def test_folders_that_hold_something_else(tmp_path):
    write(tmp_path)
    with pytest.raises(ConfigError, match="holds rows of another capture: `model` was 'm', now 'another'"):
        write(tmp_path, fingerprint={"model": "another"})
    with pytest.raises(ConfigError, match="`shard_rows` was 300, now 100"):
        write(tmp_path, shard_rows=100)
    (tmp_path / MANIFEST).unlink()
    with pytest.raises(ConfigError, match="must be empty or hold rows"):
        write(tmp_path)


def test_settings_that_cannot_work(tmp_path):
    with pytest.raises(ConfigError, match="shards hold `float32`, `bfloat16`, `float16`"):
        ShardWriter.open(tmp_path, D, torch.float64, {})
    with pytest.raises(ConfigError, match="`shard_rows` must be a positive integer"):
        ShardWriter.open(tmp_path, D, "float32", {}, shard_rows=-1)
    writer = ShardWriter.open(tmp_path, D, "float32", {})
    with pytest.raises(ShapeError, match="rows must be 6 wide; got 5"):
        writer.append(columns(d=5), {})
    with pytest.raises(DataError, match="at least one row"):
        writer.finish({})


def test_the_next_block_is_read_by_a_thread_that_ends_with_the_reading(tmp_path, monkeypatch):
    import threading

    disk = write(tmp_path)
    object.__setattr__(disk, "plan", ShufflePlan(N, 64, 200))
    read, block = [], ShardRows._block

    def noted(self, seed, number):
        read.append((number, threading.current_thread() is not threading.main_thread()))
        return block(self, seed, number)

    monkeypatch.setattr(ShardRows, "_block", noted)
    batches = disk.batches(50, seed=0)
    next(batches)
    for _ in range(1000):
        if len(read) == 2:
            break
        time.sleep(0.01)
    assert read[:2] == [(0, True), (1, True)]
    assert next(batches).next == (0, 100)
    batches.close()
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("saekit-rows")]
