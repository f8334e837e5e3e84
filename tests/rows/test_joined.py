"""Joined rows: streamed they are those of one array in memory, from files as from models; refusals."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field

import numpy as np
import pytest
import torch

from fixtures.row_checks import whole
from saekit import ArrayRows, BatchTopK, SyntheticRows, TrainSettings, train
from saekit.errors import ConfigError, DataError, ShapeError
from saekit.rows.capture import capture
from saekit.rows.joined import join_rows, null_rows
from saekit.rows.settings import CaptureSettings, StreamSettings
from saekit.rows.shards import ShardWriter, open_rows
from saekit.rows.source import Columns, Source, Stored
from saekit.rows.stream import StreamRows, stream

N = 1500
SETTINGS = TrainSettings(batch_rows=128)
ALL = StreamSettings(outliers=None, block_tokens=60)


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def columns(d: int, seed: int) -> Columns:
    row = torch.arange(N)
    return Columns(randn(N, d, seed=seed), (row % 11).int(), row // 40, (row % 40).int())


@pytest.fixture
def on_disk(tmp_path) -> dict[str, str]:
    """Rows of two widths and types, in shards that end in different places, and the same without a folder."""
    for name, d, dtype, shard_rows in (("a", 6, "float32", 300), ("b", 4, "bfloat16", 700), ("c", 6, "float16", 200)):
        writer = ShardWriter.open(tmp_path / name, d, dtype, {"model": name}, shard_rows=shard_rows)
        writer.append(columns(d, ord(name)), {"group": 0})
        writer.finish({"hook": name})
    return {name: str(tmp_path / name) for name in ("a", "b", "c")}


def in_memory(rows: Source) -> ArrayRows:
    """The same rows as one array."""
    batch = whole(rows)
    return ArrayRows(batch.x, batch.token, batch.document, batch.position, info={"parts": rows.info["parts"]})


@pytest.mark.parametrize("null", [False, True], ids=["joined", "null"])
@pytest.mark.parametrize("seed", [None, 3])
def test_rows_from_files_are_those_of_one_array(on_disk, seed, null):
    streamed: Source = join_rows(on_disk)
    if null:
        del on_disk["b"]
        streamed = null_rows(join_rows(on_disk))
    if not null:
        assert torch.equal(whole(streamed).x, torch.cat([whole(open_rows(path)).x for path in on_disk.values()], 1))
    array, found = in_memory(streamed), []
    for mine, other in zip(streamed.batches(130, seed=seed), array.batches(130, seed=seed)):
        assert mine.next == other.next
        for name in ("x", "token", "document", "position"):
            assert torch.equal(getattr(mine, name), getattr(other, name))
        found.append(mine)
        if len(found) == 14:  # more than an epoch
            break
    again = next(iter(streamed.batches(130, seed=seed, start=found[4].next)))
    assert torch.equal(again.x, found[5].x)


def test_null_rows_need_sources_of_one_width(on_disk):
    with pytest.raises(ConfigError, match="no null for others"):
        null_rows(join_rows(on_disk))


def test_a_crosscoder_trained_from_files_is_bitwise_that_from_memory(on_disk):
    rows = join_rows(on_disk)
    [streamed] = train(BatchTopK(24, k=3), rows, settings=SETTINGS, tokens=4000)
    [held] = train(BatchTopK(24, k=3), in_memory(rows), settings=SETTINGS, tokens=4000)
    assert streamed.digest() == held.digest()


@dataclass(frozen=True)
class Huge:
    """A billion rows of which only what is asked for exists."""

    d_in: int = 3
    n_rows: int = 10**9
    info: dict = field(default_factory=dict)
    asked: list[int] = field(default_factory=list)

    def read(self, ranges: list[tuple[int, int]]) -> Columns:
        self.asked.append(sum(last - first for first, last in ranges))
        rows = torch.cat([torch.arange(first, last) for first, last in ranges])
        return Columns(rows[:, None].expand(-1, self.d_in).float())

    def batches(self, batch_rows, *, seed=None, start=(0, 0)):
        raise AssertionError("not read as a whole")


def test_no_more_rows_are_held_than_a_block_has():
    one, other = Huge(), Huge(d_in=2)
    assert isinstance(one, Stored)
    rows = join_rows({"a": one, "b": other})  # 20 GB of them
    first = next(iter(rows.batches(1000)))
    assert first.x.tolist()[7] == [7.0] * 5
    assert max(one.asked + other.asked) <= 2**17 + 64


# ---------------------------------------------------------------- from models


def test_a_crosscoder_over_two_layers_is_trained_in_one_pass_of_the_model(models, texts):
    live = join_rows(stream(models["llama"], texts, layer=[0, 2], settings=ALL))
    kept = CaptureSettings(outliers=None)
    stored = join_rows({f"layers.{i}": capture(models["llama"], texts, layer=i, settings=kept) for i in (0, 2)})
    (one, other) = whole(live), whole(stored)
    torch.testing.assert_close(one.x, other.x, atol=2e-5, rtol=1e-4)
    assert torch.equal(one.token, other.token)
    assert [part["hook"] for part in live.info["parts"]] == ["layers.0", "layers.2"]
    [sae] = train(BatchTopK(24, k=3), live, tokens=2048, settings=SETTINGS)
    assert sae.provenance["parts"][1]["name"] == "layers.2"
    again = train(BatchTopK(24, k=3), live, tokens=2048, settings=SETTINGS)[0]
    assert sae.digest() == again.digest()


def test_a_crosscoder_over_two_models_reads_both_side_by_side(models, texts):
    two = {kind: stream(models[kind], texts, layer=1, settings=ALL) for kind in ("neox", "gpt2")}
    rows = join_rows(two)
    for batch, a, b in zip(rows.batches(50, seed=1), two["neox"].batches(50, seed=1), two["gpt2"].batches(50, seed=1)):
        assert torch.equal(batch.x, torch.cat([a.x, b.x], 1))
        assert torch.equal(batch.token, b.token)
        if batch.next[0] > 6:
            break


def test_blocks_of_another_size_are_read_in_those_of_the_first_source(models, texts):
    """As are those of a model that adds a token to every text; and no block is taken for one of another size."""
    short = [text for text in texts if len(text.split()) < 20]
    sizes = {"llama": ALL, "neox": dataclasses.replace(ALL, block_tokens=30)}
    two = [stream(models[kind], short, layer=1, settings=each) for kind, each in sizes.items()]
    assert two[0].block_contexts != two[1].block_contexts
    for joined in (join_rows({"a": two[0], "b": two[1]}), join_rows({"b": two[1], "a": two[0]})):
        assert sum(len(batch.x) for batch in joined.batches(50)) == joined.n_rows
    both = stream(models["llama"], texts, layer=[0, 2], settings=ALL)
    small = dataclasses.replace(both["layers.0"], block_contexts=1)
    next(small.batches(1))
    assert len(whole(both["layers.2"]).x) == both["layers.2"].n_rows


def test_models_with_other_tokens_are_refused_before_they_run(models, texts, monkeypatch):
    monkeypatch.setattr(StreamRows, "batches", lambda *args, **more: pytest.fail("a model was run"))
    swapped = [text.replace("cat", "CAT").replace("dog", "cat").replace("CAT", "dog") for text in texts]
    sources = [stream(models["llama"], each, layer=1, settings=ALL) for each in (texts, swapped)]
    with pytest.raises(DataError, match=r"tokens of all sources must be the same.*the same tokenizer"):
        join_rows({"a": sources[0], "b": sources[1]})
    longer = stream(models["llama"], [*texts, "one big dog"], layer=1, settings=ALL)
    with pytest.raises(ShapeError, match="all sources must have the same rows"):
        join_rows({"a": sources[0], "b": longer})


def test_hooks_and_sources_that_do_not_fit_are_refused(models, texts, on_disk, tmp_path):
    streams = stream(models["llama"], texts, layer=[0, 2])
    with pytest.raises(ConfigError, match=r"must know how many rows it has.*outliers=None"):
        join_rows(streams)
    live = stream(models["llama"], texts, layer=1, settings=ALL)
    with pytest.raises(ConfigError, match="all sources must be stored, or none; `b` are, `a` are computed"):
        join_rows({"a": live, "b": randn(live.n_rows, 3)})
    with pytest.raises(ConfigError, match="null_rows: the sources must be stored"):
        null_rows(join_rows(stream(models["llama"], texts, layer=[0, 2], settings=ALL)))
    shorter = StreamSettings(outliers=None, context=12)
    with pytest.raises(DataError, match="cut into the same contexts"):
        join_rows({"a": live, "b": stream(models["llama"], texts, layer=2, settings=shorter)})
    # positions kept at one hook only: rows of another number
    first = capture(models["llama"], texts, layer=0, settings=CaptureSettings(outliers=None))
    half = ArrayRows(*(each[::2] for each in (first.x, first.token, first.document, first.position)))
    with pytest.raises(ShapeError, match=f"`a` {first.n_rows}, `b` {half.n_rows}"):
        join_rows({"a": first, "b": half})
    late = columns(4, 1)
    late.token[N // 2] += 1  # in the middle: told where it is read
    np.save(tmp_path / "x.npy", late.x.numpy())
    rows = join_rows({"a": on_disk["a"], "b": ArrayRows(late.x, late.token, late.document, late.position)})
    with pytest.raises(DataError, match=r"tokens of all sources must be the same; in row 750 `a` has 2, `b` 3"):
        train(BatchTopK(8, k=2), rows, settings=SETTINGS)


def test_synthetic_rows_are_joined_too():
    sources = {name: SyntheticRows(d_in=d, n_features=8, n_rows=600, seed=d) for name, d in (("a", 4), ("b", 5))}
    assert torch.equal(whole(join_rows(sources)).x, torch.cat([whole(each).x for each in sources.values()], 1))
