"""Rows from language models: the same whatever the padding, the batches, the folder, or where one begins."""

from __future__ import annotations

import json
import os
import signal

import pytest
import torch

from fixtures.forks import call_in_forks
from fixtures.kills import contents
from fixtures.row_checks import TOLERANCE, everything, same_rows
from saekit.errors import BusyError, ConfigError, DataError, FormatError, ModelError
from saekit.files import locked_folder
from saekit.inputs.texts import read_texts
from saekit.rows import capture_texts
from saekit.rows.arrays import ArrayRows
from saekit.rows.capture import capture
from saekit.rows.settings import CaptureSettings
from saekit.rows.shards import ShardRows, ShardWriter

# --- capture ----------------------------------------------------------------------------------------------------------


def test_several_hooks_equal_each_alone(models, texts, small_groups):
    names = ["layers.2", "layers.0.mlp", "layers.1.attn"]
    together = capture(models["gpt2"], texts, hook=names, tokens=150)
    assert list(together) == names
    for name in names:
        alone = capture(models["gpt2"], texts, hook=name, tokens=150)
        same_rows(together[name], alone, exact=True)
        assert together[name].info["filters"] == alone.info["filters"]
    assert list(capture(models["gpt2"], texts, layer=[0, 1])) == ["layers.0", "layers.1"]


@pytest.mark.parametrize("tokens", [1, 7, 100, 250])
def test_tokens_are_exact_and_a_prefix(models, texts, tokens, small_groups):
    everything_there = capture(models["llama"], texts, layer=1, settings=CaptureSettings(outliers=None))
    source = capture(models["llama"], texts, layer=1, tokens=tokens, settings=CaptureSettings(outliers=None))
    assert source.n_rows == tokens
    assert torch.equal(everything(source)["position"], everything(everything_there)["position"][:tokens])
    torch.testing.assert_close(everything(source)["x"], everything(everything_there)["x"][:tokens], **TOLERANCE)


def test_fewer_tokens_than_asked_for(models, texts):
    source = capture(models["llama"], texts, layer=1, tokens=10_000)
    assert source.n_rows == sum(len(text.split()) for text in texts)
    assert source.info["tokens"] == 10_000


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_dtype_of_rows(models, texts, dtype, tmp_path):
    source = capture(models["llama"], texts, layer=1, out=tmp_path / "rows", settings=CaptureSettings(dtype=dtype))
    base = everything(capture(models["llama"], texts, layer=1))["x"]
    assert source.info["dtype"] == dtype
    assert torch.equal(everything(source)["x"], base.to(getattr(torch, dtype)).float())


def test_rows_of_a_half_precision_model_are_stored_as_they_are(folders, texts):
    source = capture(folders["llama"], texts, layer=1, settings=CaptureSettings(model_dtype="bfloat16"))
    assert source.info["dtype"] == "bfloat16"
    assert source.info["model_dtype"] == "bfloat16"


def test_what_is_recorded(models, texts):
    info = capture(models["bert"], texts, hook="layers.1.mlp", tokens=50).info
    assert json.loads(json.dumps(info)) == info
    expected = {
        "kind": "capture",
        "model": "tiny-bert",
        "model_digest": models["bert"].digest,
        "hook": "layers.1.mlp",
        "module": "encoder.layer.1.output.dense",
        "layer": 1,
        "data": "list",
        "data_digest": read_texts(texts).digest,
        "context": 24,
        "n_rows": 50,
        "added_tokens": {"before": [1], "after": [2]},
    }
    assert {key: info[key] for key in expected} == expected


def test_inputs_and_global_state_are_left_alone(models, texts):
    before = list(texts)
    threads = torch.get_num_threads()
    capture(models["llama"], texts, layer=1)
    assert texts == before
    assert torch.get_num_threads() == threads


# --- on disk ----------------------------------------------------------------------------------------------------------


def test_disk_equals_memory(models, texts, tmp_path, small_groups):
    memory = capture(models["llama"], texts, layer=1, tokens=200)
    disk = capture(
        models["llama"], texts, layer=1, tokens=200, out=tmp_path / "rows", settings=CaptureSettings(shard_rows=64)
    )
    assert isinstance(memory, ArrayRows)
    assert isinstance(disk, ShardRows)
    same_rows(memory, disk, exact=True)
    assert len(list((tmp_path / "rows").glob("*.safetensors"))) == 4
    for key in ("filters", "hook", "data_digest", "n_rows"):
        assert memory.info[key] == disk.info[key]
    several = capture(
        models["llama"], texts, layer=[0, 1], tokens=200, out=tmp_path / "both", settings=CaptureSettings(shard_rows=64)
    )
    same_rows(several["layers.1"], disk, exact=True)
    assert (tmp_path / "both" / "layers.0" / "manifest.json").exists()


def test_a_finished_folder_is_not_written_again(models, texts, tmp_path, monkeypatch):
    settings = {"layer": 1, "tokens": 200, "out": tmp_path / "rows"}
    first = capture(models["llama"], texts, **settings)
    times = {path: path.stat().st_mtime_ns for path in (tmp_path / "rows").glob("[!.]*")}
    same_rows(first, capture(models["llama"], texts, **settings), exact=True)
    assert times == {path: path.stat().st_mtime_ns for path in (tmp_path / "rows").glob("[!.]*")}
    with pytest.raises(
        ConfigError, match=r"another capture: `hook` was 'layers.1', now 'layers.2'; `layer` was 1, now 2"
    ):
        capture(models["llama"], texts, **{**settings, "layer": 2})
    with pytest.raises(ConfigError, match="`data_digest` was"):
        capture(models["llama"], texts[1:], **settings)


@pytest.mark.parametrize("hooks", [["layers.1"], ["layers.0", "layers.2.mlp"]])
@pytest.mark.parametrize("stop_after", [1, 2, 4])
def test_an_interrupted_capture_goes_on_to_the_same_bytes(models, texts, tmp_path, small_groups, stop_after, hooks):
    settings = {"hook": hooks, "settings": CaptureSettings(outliers=1.5, shard_rows=64)}
    capture(models["llama"], texts, out=tmp_path / "whole", **settings)

    class Interrupted(Exception):
        pass

    def stop(stage, done, total=None, note=""):
        if done >= 64 * stop_after * 0.8:
            raise Interrupted

    with pytest.raises(Interrupted):
        capture(models["llama"], texts, out=tmp_path / "cut", progress=stop, **settings)
    for hook in hooks:
        with pytest.raises((FormatError, DataError), match=r"not finished|no manifest"):
            ShardRows(tmp_path / "cut" / hook)
    capture(models["llama"], texts, out=tmp_path / "cut", **settings)
    files = [path for path in (tmp_path / "whole").rglob("*") if path.is_file() and path.name[0] != "."]
    assert len(files) >= 3
    for path in files:
        assert path.read_bytes() == (tmp_path / "cut" / path.relative_to(tmp_path / "whole")).read_bytes(), path.name


def test_dying_after_every_single_shard(models, texts, tmp_path, small_groups, monkeypatch):
    """Shards much smaller than a group of contexts: the cursor points into the middle of groups."""
    settings = {"layer": 1, "settings": CaptureSettings(outliers=1.5, shard_rows=9)}
    capture(models["llama"], texts, out=tmp_path / "whole", **settings)
    flush = ShardWriter._flush

    def flush_and_die(self, cursor):
        flush(self, cursor)
        raise KeyboardInterrupt

    monkeypatch.setattr(ShardWriter, "_flush", flush_and_die)
    for _ in range(100):
        try:
            capture(models["llama"], texts, out=tmp_path / "cut", **settings)
            break
        except KeyboardInterrupt:
            pass
    names = sorted(path.name for path in (tmp_path / "whole").iterdir())
    assert len(names) > 20
    for name in names[1:]:
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "cut" / name).read_bytes(), name


_SCRIPT = """
import os, signal
import torch
torch.set_num_threads(1)
import saekit.rows.capture_texts as reading
import saekit.rows.shards as shards
from saekit.errors import FormatError
from saekit.rows.capture import capture
from saekit.rows.settings import CaptureSettings
from saekit.models.loading import load_model
load_model(MODEL)  # imports what it needs
reading._GROUP_TOKENS = 40
flush = shards.ShardWriter._flush
texts = [" ".join(["cat", "dog", "mat"][i % 3 :]) * (1 + i % 5) + " the old trees" * i for i in range(30)]

def work(model, out, kill_at):
    if kill_at is None:
        try:
            shards.ShardRows(out)
        except FormatError as error:
            return str(error)
    def flush_and_die(self, cursor):
        flush(self, cursor)
        if len(self.shards) == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)
    shards.ShardWriter._flush = flush_and_die
    return capture(model, texts, layer=1, out=out, settings=CaptureSettings(shard_rows=100)).n_rows
"""


def test_kill_minus_nine(folders, tmp_path):
    model, cut = str(folders["llama"]), str(tmp_path / "cut")
    calls = [(model, str(tmp_path / "whole"), -1), (model, cut, 2), (model, cut, None), (model, cut, -1)]
    whole, killed, unfinished, again = call_in_forks(f"MODEL = {model!r}\n{_SCRIPT}", calls)
    assert killed == "killed"
    assert "was not finished: 200 rows are there" in unfinished
    assert again == whole > 200
    names = sorted(path.name for path in (tmp_path / "whole").iterdir() if path.name[0] != ".")
    assert len(names) > 5
    for name in names:
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "cut" / name).read_bytes()


@pytest.mark.usefixtures("ctrl_c")
@pytest.mark.parametrize("signals", [[signal.SIGINT], [signal.SIGTERM]])
def test_what_ctrl_c_interrupts_goes_on_and_ends_as_if_nothing_had_been(models, texts, tmp_path, monkeypatch, signals):
    """The first interruption comes before any shard is full, the last when every row is there."""
    monkeypatch.setattr(capture_texts, "_GROUP_TOKENS", 40)
    settings = {"layer": [0, 1], "tokens": 200, "settings": CaptureSettings(shard_rows=150, outliers=3.0)}
    capture(models["llama"], texts, out=tmp_path / "whole", **settings)
    done = []

    def progress(stage, rows, total=None, note=""):
        if rows > (done[-1] if done else 0):
            done.append(rows)
            for number in signals:
                os.kill(os.getpid(), number)

    while not done or done[-1] < 200:
        with pytest.raises(KeyboardInterrupt, match="capture: interrupted after"):
            capture(models["llama"], texts, out=tmp_path / "cut", **settings, progress=progress)
        with pytest.raises(FormatError, match=r"was not finished: \d+ rows are there"):
            ShardRows(tmp_path / "cut" / "layers.0")
    capture(models["llama"], texts, out=tmp_path / "cut", **settings, progress=progress)
    assert done[0] < 150
    assert done[-1] == 200
    assert contents(tmp_path / "cut") == contents(tmp_path / "whole")


@pytest.mark.usefixtures("ctrl_c")
def test_a_second_ctrl_c_stops_at_once(models, texts, tmp_path):
    def progress(stage, rows, total=None, note=""):
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt, match="at once"):
        capture(models["llama"], texts, layer=1, out=tmp_path, progress=progress)
    assert not list(tmp_path.glob("*.safetensors"))
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_folder_in_use_is_refused(models, texts, tmp_path):
    with locked_folder(tmp_path / "rows"), pytest.raises(BusyError, match="in use by another run"):
        capture(models["llama"], texts, layer=1, out=tmp_path / "rows")


# --- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        (lambda: {}, ConfigError, "exactly one of `layer` and `hook`"),
        (lambda: {"layer": 1, "hook": "layers.1"}, ConfigError, "exactly one of `layer` and `hook`"),
        (lambda: {"layer": 9}, ModelError, "between 0 and 2"),
        (lambda: {"hook": "layers.1.mpl"}, ModelError, "Did you mean"),
        (lambda: {"layer": []}, ConfigError, "must be one at least; got none"),
        (lambda: {"layer": [1, 1]}, ConfigError, "hooks must differ"),
        (lambda: {"layer": 1, "tokens": 0}, ConfigError, "`tokens` must be a whole number from 1"),
        (lambda: {"layer": 1, "tokens": 3e4}, ConfigError, "`tokens` must be a whole number from 1"),
        (
            lambda: {"layer": 1, "settings": CaptureSettings(context=25)},
            ConfigError,
            "`context` must fit the model, which takes 24",
        ),
        (
            lambda: {"layer": 1, "settings": CaptureSettings(context=1)},
            ConfigError,
            "must leave room for text beside 1 added",
        ),
        (lambda: {"layer": 1, "settings": CaptureSettings(padding="middle")}, ConfigError, "`padding` must be"),
        (lambda: {"layer": 1, "settings": CaptureSettings(outliers=0.5)}, ConfigError, "`outliers` must be above 1"),
        (lambda: {"layer": 1, "settings": CaptureSettings(dtype="float64")}, ConfigError, "`dtype` must be one of"),
        (lambda: {"layer": 1, "settings": CaptureSettings(dtype=torch.float64)}, ConfigError, "`dtype` must be one of"),
        (lambda: {"layer": 1, "text": "body"}, DataError, "must have a column `body`"),
    ],
)
def test_settings_that_cannot_work(models, settings, error, message):
    with pytest.raises(error, match=message):
        capture(models["llama"], [{"text": "the cat"}], **settings())
