"""A few damaged files of every kind that saekit itself writes or reads; `make fuzz` tries thousands, also of others."""

from __future__ import annotations

import os
import shutil
import stat

import pytest

from fixtures.fuzzing import OWN, SLOW, Reader, control, fuzz_in_child, read_within
from fixtures.mutations import mutate_folder
from saekit.errors import FormatError
from saekit.files import read_bytes

QUICK = [reader for reader in OWN if reader.weight > SLOW and reader.name != "results to summarize"]


@pytest.mark.parametrize("reader", QUICK, ids=lambda reader: reader.name)
def test_damaged_files_are_read_or_refused(reader):
    """With the control: the whole sample is read, in every way."""
    assert fuzz_in_child(reader, range(8)) == []


@pytest.mark.parametrize("reader", QUICK, ids=lambda reader: reader.name)
def test_a_pipe_in_place_of_any_file_is_not_waited_for(reader, tmp_path):
    template = tmp_path / "template"
    template.mkdir()
    reader.make(template)
    for path in [path for path in template.rglob("*") if path.is_file() and not path.name.startswith(".")]:
        for number, read in enumerate(reader.reads):
            folder = tmp_path / f"{path.name}-{number}"
            shutil.copytree(template, folder)
            (folder / path.relative_to(template)).unlink()
            os.mkfifo(folder / path.relative_to(template))
            assert read_within(read, folder) == ""
            shutil.rmtree(folder)


def test_a_reader_that_refuses_its_sample_proves_nothing(tmp_path):
    def refuse(folder):
        raise FormatError("no")

    (tmp_path / "template").mkdir()
    [failure] = control(Reader("x", lambda folder: None, (refuse,)), tmp_path / "template")
    assert "whole sample" in failure.what


@pytest.mark.parametrize("place", ["/dev/zero", "pipe", "folder", "loop"])
def test_what_is_no_file_is_refused_and_not_waited_for(place, tmp_path):
    path = tmp_path / "x.json"
    if place == "pipe":
        os.mkfifo(path)
    elif place == "folder":
        path.mkdir()
    else:
        path.symlink_to(path.name if place == "loop" else place)
    with pytest.raises(FormatError, match="must be a file that can be read"):
        read_bytes(path)


def test_files_are_replaced_by_what_is_none(tmp_path):
    """Among the changes are pipes and devices, so that a reader that waits for one is found."""
    found = set()
    for seed in range(1500):
        path = tmp_path / "a.json"
        path.unlink(missing_ok=True) if not path.is_dir() else path.rmdir()
        path.write_text("{}")
        mutate_folder(tmp_path, seed)
        found.add(path.is_symlink() or (stat.S_IFMT(path.lstat().st_mode) if os.path.lexists(path) else None))
    assert found == {True, None, stat.S_IFREG, stat.S_IFDIR, stat.S_IFIFO}


ONCE = (("sae of schema 1", 165), ("export to saelens", 129))
"""Damaged files that were once neither read nor refused."""


@pytest.mark.parametrize(("name", "seed"), ONCE)
def test_what_once_failed(name, seed):
    [reader] = [each for each in OWN if each.name == name]
    assert fuzz_in_child(reader, range(seed, seed + 1)) == []
