"""Rows from language models: the same whatever the padding, the batches, the folder, or where one begins."""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch

import saekit
import saekit.rows.capture_texts as reading
from saekit.errors import BusyError, ConfigError, DataError, FormatError, ModelError
from saekit.files import locked_folder
from saekit.inputs.texts import read_texts
from saekit.rows.arrays import ArrayRows
from saekit.rows.capture import capture
from saekit.rows.capture_texts import TextRunner
from saekit.rows.settings import CaptureSettings, StreamSettings
from saekit.rows.shards import ShardRows, ShardWriter
from saekit.rows.stream import StreamRows, stream
from saekit.rows.tokens import token_batches, tokenize

KINDS = ["llama", "gpt2", "neox", "bert", "roberta"]
# rounding: matrix products of other shapes sum in another order
TOLERANCE = {"atol": 2e-5, "rtol": 1e-4}


@pytest.fixture
def small_groups(monkeypatch):
    """Groups of contexts so small that a handful of texts makes many."""
    monkeypatch.setattr(reading, "_GROUP_TOKENS", 40)
    monkeypatch.setattr(reading, "CALIBRATION_TOKENS", 50)


def everything(source):
    batches = list(source.batches(1000))
    return {name: torch.cat([getattr(b, name) for b in batches]) for name in ("x", "token", "document", "position")}


def same_rows(one, other, exact=False):
    a, b = everything(one), everything(other)
    for name in ("token", "document", "position"):
        assert torch.equal(a[name], b[name]), name
    if exact:
        assert torch.equal(a["x"], b["x"])
    else:
        torch.testing.assert_close(a["x"], b["x"], **TOLERANCE)


# --- contexts ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_every_token_of_every_text_once_and_added_tokens_around_each_context(models, texts, kind):
    lm = models[kind]
    contexts = tokenize(lm.tokenizer, texts, context=lm.context)
    assert contexts.lengths().max() == lm.context
    text_token = contexts.position >= 0
    for document, text in enumerate(texts):
        mine = text_token & (contexts.document == document)
        assert contexts.position[mine].tolist() == list(range(len(text.split())))
        assert contexts.ids[mine].tolist() == lm.tokenizer(text, add_special_tokens=False)["input_ids"]
    before, after = {"llama": (1, 0), "bert": (1, 1), "roberta": (1, 1)}.get(kind, (0, 0))
    for i in range(len(contexts)):
        one = contexts.pick([i])
        assert len(set(one.document)) == 1, "texts never share a context"
        assert [p >= 0 for p in one.position] == [False] * before + [True] * (len(one.ids) - before - after) + [
            False
        ] * after


def test_packing_fills_contexts(models, texts):
    lm = models["llama"]
    packed = tokenize(lm.tokenizer, texts, context=24, pack=True)
    apart = tokenize(lm.tokenizer, texts, context=24)
    assert (packed.lengths()[:-1] == 24).all()
    keep = packed.position >= 0
    assert (packed.ids == 1).sum() == len(texts)
    for name in ("ids", "document", "position"):
        assert np.array_equal(getattr(packed, name)[keep], getattr(apart, name)[apart.position >= 0])


@pytest.mark.parametrize("padding", ["right", "left"])
def test_padded_batches(models, texts, padding):
    lm = models["bert"]
    contexts = tokenize(lm.tokenizer, texts, context=lm.context)
    seen = []
    for batch in token_batches(lm, contexts, batch_tokens=100, padding=padding):
        ids, mask = batch.inputs["input_ids"], batch.inputs["attention_mask"].bool()
        assert ids.numel() <= 100
        assert not (batch.keep & ~mask).any(), "padding is never kept"
        assert not batch.keep[(ids == 1) | (ids == 2)].any()
        assert (batch.document[~mask] == -1).all()
        for row, i in enumerate(batch.index):
            assert torch.equal(ids[row][mask[row]], torch.from_numpy(contexts.pick([i]).ids).long())
            assert bool(mask[row][-1 if padding == "left" else 0])
        seen.extend(batch.index)
    assert sorted(seen) == list(range(len(contexts)))


# --- capture ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_rows_are_those_of_the_bare_model_one_context_at_a_time(models, texts, kind):
    lm = models[kind]
    source = capture(lm, texts, layer=1, settings=CaptureSettings(outliers=None))
    rows = everything(source)
    contexts = tokenize(lm.tokenizer, texts, context=lm.context)
    expected = []
    for i in range(len(contexts)):
        one = contexts.pick([i])
        with torch.no_grad():
            ids = torch.from_numpy(one.ids).long()[None]
            states = lm.model(input_ids=ids, output_hidden_states=True).hidden_states
        expected.append(states[2][0][torch.from_numpy(one.position >= 0)])
    torch.testing.assert_close(rows["x"], torch.cat(expected), **TOLERANCE)
    kept = contexts.position >= 0
    assert rows["token"].tolist() == contexts.ids[kept].tolist()
    assert rows["document"].tolist() == contexts.document[kept].tolist()
    assert rows["position"].tolist() == contexts.position[kept].tolist()


@pytest.mark.parametrize("kind", KINDS)
def test_padding_side_and_batch_size_change_nothing(models, texts, kind):
    base = capture(models[kind], texts, layer=2)
    for settings in ({"padding": "left"}, {"batch_tokens": 1}, {"padding": "left", "batch_tokens": 60}):
        same_rows(base, capture(models[kind], texts, layer=2, settings=CaptureSettings(**settings)))


@pytest.mark.parametrize("name", ["stories", "minilm"])
def test_padding_side_and_batch_size_change_nothing_in_real_models(request, name, shared_data):
    lm = saekit.load_model(request.getfixturevalue(name), dtype="float32", device="cpu")
    texts = read_texts(shared_data / "text" / "tinystories_1000_clean.jsonl.gz", limit=6)
    # lengths that differ much, so that there is much padding
    texts = [text[: 40 + 150 * i] for i, text in enumerate(texts)]
    base = capture(lm, texts, layer=3, settings=CaptureSettings(context=100))
    for settings in ({"padding": "left"}, {"batch_tokens": 1}):
        same_rows(base, capture(lm, texts, layer=3, settings=CaptureSettings(context=100, **settings)))


def test_order_of_texts_changes_no_row(models, texts):
    """Rows of a text do not depend on its neighbours in the batch."""
    forward, backward = (everything(capture(models["llama"], t, layer=1)) for t in (texts, texts[::-1]))
    for document in range(len(texts)):
        one = forward["x"][forward["document"] == document]
        other = backward["x"][backward["document"] == len(texts) - 1 - document]
        torch.testing.assert_close(one, other, **TOLERANCE)


def test_added_tokens_can_be_kept(models, texts):
    source = capture(models["bert"], texts, layer=0, settings=CaptureSettings(skip_special=False, outliers=None))
    contexts = tokenize(models["bert"].tokenizer, texts, context=24)
    assert source.n_rows == len(contexts.ids)
    assert everything(source)["position"].tolist() == contexts.position.tolist()
    skipped = capture(models["bert"], texts, layer=0)
    assert skipped.info["filters"]["special"] == {"skipped": True, "n": 2 * len(contexts)}


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


def test_more_text_is_read_until_the_tokens_suffice(models, tmp_path, monkeypatch):
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join(json.dumps({"text": "cat " + "x" * 3000}) for _ in range(60)))
    asked = []
    monkeypatch.setattr(reading, "read_texts", lambda *a, **k: asked.append(k["characters"]) or read_texts(*a, **k))
    assert capture(models["llama"], path, layer=1, tokens=100, settings=CaptureSettings(outliers=None)).n_rows == 100
    assert asked == [10_000, 40_000, 160_000]


def test_documents_longer_than_the_context(models):
    text = " ".join(["cat dog"] * 50)
    rows = everything(capture(models["llama"], [text], layer=1))
    assert rows["position"].tolist() == list(range(100))
    # windows of 23 words with a BOS before each: the second begins anew
    torch.testing.assert_close(rows["x"][:22], everything(capture(models["llama"], [text[:-8]], layer=1))["x"][:22])
    first = [everything(capture(models["llama"], [w], layer=1))["x"] for w in ("cat dog", "dog cat")]
    torch.testing.assert_close(rows["x"][0:2], first[0], **TOLERANCE)
    torch.testing.assert_close(rows["x"][23:25], first[1], **TOLERANCE)


def test_outliers_are_measured_skipped_and_counted(models, texts, small_groups):
    lm = models["llama"]
    kept_all = capture(lm, texts, layer=1, settings=CaptureSettings(outliers=None))
    x = everything(kept_all)["x"]
    median = float(x[:50].norm(dim=1).median())
    source = capture(lm, texts, layer=1, settings=CaptureSettings(outliers=1.2))
    recorded = source.info["filters"]["outliers"]
    assert recorded["median"] == pytest.approx(median, rel=1e-5)
    assert recorded["limit"] == pytest.approx(1.2 * median, rel=1e-5)
    assert recorded["n_measured"] == 50
    expected = x.norm(dim=1) <= 1.2 * median
    assert 0 < recorded["n"] == int((~expected).sum())
    torch.testing.assert_close(everything(source)["x"], x[expected], **TOLERANCE)
    assert kept_all.info["filters"]["outliers"] is None
    limited = capture(lm, texts, layer=1, tokens=100, settings=CaptureSettings(outliers=1.2))
    assert limited.n_rows == 100, "what the filter takes out is replaced"


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
    with pytest.raises(ConfigError, match="another capture; they differ in `hook`, `module`, `layer`"):
        capture(models["llama"], texts, **{**settings, "layer": 2})
    with pytest.raises(ConfigError, match="they differ in `data_digest`"):
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
import os, signal, sys
import torch
torch.set_num_threads(1)
import saekit.rows.capture_texts as reading
import saekit.rows.shards as shards
from saekit.rows.capture import capture
from saekit.rows.settings import CaptureSettings
reading._GROUP_TOKENS = 40
kill_at = int(sys.argv[3])
flush = shards.ShardWriter._flush
def flush_and_die(self, cursor):
    flush(self, cursor)
    if len(self.shards) == kill_at:
        os.kill(os.getpid(), signal.SIGKILL)
shards.ShardWriter._flush = flush_and_die
texts = [" ".join(["cat", "dog", "mat"][i % 3 :]) * (1 + i % 5) + " the old trees" * i for i in range(30)]
settings = CaptureSettings(shard_rows=100)
print(capture(sys.argv[1], texts, layer=1, out=sys.argv[2], settings=settings).n_rows)
"""


def test_kill_minus_nine(folders, tmp_path):
    source = Path(saekit.__file__).parents[1]

    def run(out, kill_at):
        return subprocess.run(
            [sys.executable, "-c", _SCRIPT, str(folders["llama"]), str(tmp_path / out), str(kill_at)],
            env={**os.environ, "PYTHONPATH": str(source)},
            capture_output=True,
            text=True,
            check=False,
        )

    whole = run("whole", -1)
    assert whole.returncode == 0, whole.stderr
    assert run("cut", 2).returncode == -signal.SIGKILL
    with pytest.raises(FormatError, match="was not finished: 200 rows are there"):
        ShardRows(tmp_path / "cut")
    assert run("cut", -1).stdout == whole.stdout
    names = sorted(path.name for path in (tmp_path / "whole").iterdir() if path.name[0] != ".")
    assert len(names) > 5
    for name in names:
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "cut" / name).read_bytes()


def test_a_folder_in_use_is_refused(models, texts, tmp_path):
    with locked_folder(tmp_path / "rows"), pytest.raises(BusyError, match="in use by another run"):
        capture(models["llama"], texts, layer=1, out=tmp_path / "rows")


# --- streams ----------------------------------------------------------------------------------------------------------


@pytest.fixture(params=[True, False], ids=["prefetch", "no prefetch"])
def streamed(request, models, texts):
    return stream(models["llama"], texts, layer=1, settings=StreamSettings(block_tokens=60, prefetch=request.param))


def take(source, n, batch_rows=32, **settings):
    return list(itertools.islice(source.batches(batch_rows, **settings), n))


def rows_of(batches):
    keys = torch.stack([torch.cat([b.document for b in batches]), torch.cat([b.position for b in batches]).long()], 1)
    return [tuple(key) for key in keys.tolist()], torch.cat([b.x for b in batches])


def test_a_stream_in_stored_order_equals_capture(models, texts, streamed):
    same_rows(streamed, capture(models["llama"], texts, layer=1))
    assert streamed.d_in == 16
    assert streamed.n_rows is None, "with a filter the number of rows is known only afterwards"
    assert (
        stream(models["llama"], texts, layer=1, settings=StreamSettings(outliers=None)).n_rows
        == capture(models["llama"], texts, layer=1).n_rows
    )


def test_an_epoch_of_a_stream_is_a_permutation(models, texts, streamed):
    whole = everything(capture(models["llama"], texts, layer=1))
    n = len(whole["x"])
    keys, x = rows_of(take(streamed, 2 * n // 32 + 1, seed=3))
    first, second = keys[:n], keys[n : 2 * n]
    place = {key: i for i, key in enumerate(zip(whole["document"].tolist(), whole["position"].tolist()))}
    assert sorted(first) == sorted(second) == sorted(place)
    assert first != second
    n_blocks = -(-len(streamed.contexts) // streamed.block_contexts)
    blocks = [streamed._block(3, number).columns.document.unique().tolist() for number in (0, n_blocks)]
    assert blocks[0] != blocks[1], "contexts must be shuffled anew, not only the rows of a block"
    torch.testing.assert_close(x, whole["x"][[place[key] for key in keys]], **TOLERANCE)


@pytest.mark.parametrize("seed", [None, 0])
def test_a_stream_starts_anywhere(streamed, seed):
    batches = take(streamed, 8, seed=seed)
    for cut in (0, 3, 6):
        (again,) = take(streamed, 1, seed=seed, start=batches[cut].next)
        for name in ("x", "token", "document", "position"):
            assert torch.equal(getattr(again, name), getattr(batches[cut + 1], name))
        assert again.next == batches[cut + 1].next


def test_only_the_block_at_hand_is_computed(models, texts, monkeypatch):
    source = stream(models["llama"], texts, layer=1, settings=StreamSettings(block_tokens=60, prefetch=False))
    batches = take(source, 8, seed=0)
    ran = []
    run = TextRunner.rows
    monkeypatch.setattr(TextRunner, "rows", lambda self, contexts: ran.append(len(contexts)) or run(self, contexts))
    target = batches[5].next
    assert target[0] >= 2
    take(source, 1, batch_rows=1, seed=0, start=target)
    assert ran == [source.block_contexts]


def test_prefetching_changes_nothing_and_its_thread_ends(models, texts):
    plain, ahead = (
        stream(models["llama"], texts, layer=1, settings=StreamSettings(block_tokens=60, prefetch=prefetch))
        for prefetch in (False, True)
    )
    for one, other in zip(take(plain, 9, seed=1), take(ahead, 9, seed=1)):
        assert torch.equal(one.x, other.x)
    batches = ahead.batches(16, seed=1)
    next(batches)
    batches.close()
    deadline = time.monotonic() + 30
    while any(t.name.startswith("saekit-stream") for t in threading.enumerate()) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not any(t.name.startswith("saekit-stream") for t in threading.enumerate())
    assert ahead.seconds["lm"] > 0
    assert ahead.seconds["wait"] > 0


def test_an_error_in_the_second_thread_arrives(models, texts, monkeypatch):
    source = stream(models["llama"], texts, layer=1, settings=StreamSettings(block_tokens=60))
    monkeypatch.setattr(TextRunner, "rows", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        take(source, 1, seed=0)


def test_blocks_mix_texts(models):
    texts = ["cat sat on the mat and then it saw"] * 300
    source = stream(models["llama"], texts, layer=1, settings=StreamSettings(outliers=None))
    (batch,) = take(source, 1, batch_rows=512, seed=0)
    assert (batch.document[1:] == batch.document[:-1]).float().mean() < 0.03


def test_a_pass_of_a_stream_ends_after_its_tokens(models, texts):
    source = stream(models["llama"], texts, layer=1, tokens=50, settings=StreamSettings(outliers=None))
    assert 50 <= source.n_rows < 50 + 24
    assert sum(b.n_rows for b in source.batches(7)) == source.n_rows


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


def test_streams_that_cannot_work(models, texts):
    with pytest.raises(ConfigError, match=r"a stream has one hook; got `layers.0`, `layers.1`"):
        stream(models["llama"], texts, layer=[0, 1])
    with pytest.raises(ConfigError, match="`block_tokens` must be a whole number from 1"):
        stream(models["llama"], texts, layer=0, settings=StreamSettings(block_tokens=0))


def test_texts_without_tokens(models):
    with pytest.raises(DataError, match="must hold at least one text"):
        capture(models["llama"], ["", " "], layer=1)

    class Silent:
        pad_token_id = 0

        def __call__(self, text, add_special_tokens):
            return {"input_ids": [] if isinstance(text, str) else [[] for _ in text]}

    with pytest.raises(DataError, match="must give at least one token; the tokenizer of `tiny-llama` makes none"):
        capture(dataclasses.replace(models["llama"], tokenizer=Silent()), ["cat"], layer=1)


def test_a_model_that_gives_nan(folders, texts):
    lm = saekit.load_model(folders["llama"])
    with torch.no_grad():
        lm.model.get_input_embeddings().weight[lm.tokenizer("dog")["input_ids"][-1]] = float("nan")
    with pytest.raises(DataError, match=r"row \d+ of the capture has nan"):
        capture(lm, ["the cat and the dog", *texts], layer=1)


def test_names(models, texts):
    assert saekit.capture is capture
    assert saekit.stream is stream
    assert isinstance(stream(models["llama"], texts, layer=1), StreamRows)
