"""The tool that damages files names a damaged file by a number."""

from __future__ import annotations

import io
import json

import numpy as np
import pytest
from safetensors.numpy import save

from fixtures.mutations import mutate, mutate_folder


def npy() -> bytes:
    stream = io.BytesIO()
    np.save(stream, np.zeros((3, 4), np.float32))
    return stream.getvalue()


FILES = {
    ".json": json.dumps({"a": [1, 2, {"b": "x"}], "c": None, "d": 1.5}).encode(),
    ".jsonl": b'{"text": "a", "label": 1}\n{"text": "b", "label": 0}\n',
    ".csv": b"a,b\n1,2\n",
    ".toml": b'rows = "x"\n[config]\nk = 3\n',
    ".safetensors": save({"x": np.zeros((3, 4), np.float32)}, {"k": "{}"}),
    ".npy": npy(),
    ".bin": bytes(range(64)),
}


@pytest.mark.parametrize("suffix", FILES)
def test_a_seed_names_a_change_and_most_changes_change_something(suffix):
    data = FILES[suffix]
    changed = [mutate(data, suffix, seed) for seed in range(200)]
    assert changed == [mutate(data, suffix, seed) for seed in range(200)]
    assert sum(new == data for _, new in changed) < 20
    assert len({new for _, new in changed}) > 60


def test_a_folder_loses_or_changes_one_file(tmp_path):
    for seed in range(30):
        folder = tmp_path / str(seed)
        folder.mkdir()
        (folder / "a.json").write_bytes(FILES[".json"])
        (folder / "b.bin").write_bytes(FILES[".bin"])
        mutate_folder(folder, seed)
        kept = [(folder / "a.json", FILES[".json"]), (folder / "b.bin", FILES[".bin"])]
        assert sum(path.is_file() and path.read_bytes() == data for path, data in kept) >= 1
