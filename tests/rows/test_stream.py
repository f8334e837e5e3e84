"""Streams: the rows of a capture, in blocks that are computed when they are read, from any place on."""

from __future__ import annotations

import itertools
import threading
import time

import pytest
import torch

import saekit
from fixtures.row_checks import TOLERANCE, everything, same_rows
from saekit.errors import ConfigError
from saekit.rows.capture import capture
from saekit.rows.capture_texts import Split, TextRunner
from saekit.rows.settings import StreamSettings
from saekit.rows.stream import HELD_BLOCKS, StreamRows, stream


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
    monkeypatch.setattr(
        TextRunner, "rows", lambda self, contexts, split=None: ran.append(len(contexts)) or run(self, contexts)
    )
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


def test_streams_that_cannot_work(models, texts):
    with pytest.raises(ConfigError, match="`block_tokens` must be a whole number from 1"):
        stream(models["llama"], texts, layer=0, settings=StreamSettings(block_tokens=0))


def test_names(models, texts):
    assert saekit.capture is capture
    assert saekit.stream is stream
    assert isinstance(stream(models["llama"], texts, layer=1), StreamRows)


@pytest.mark.parametrize("prefetch", [True, False])
def test_streams_of_several_hooks_equal_those_of_one_and_share_their_passes(models, texts, prefetch, monkeypatch):
    passes = []
    runs = TextRunner.rows
    monkeypatch.setattr(TextRunner, "rows", lambda self, contexts, split=None: passes.append(1) or runs(self, contexts))
    settings = StreamSettings(block_tokens=60, prefetch=prefetch)
    together = stream(models["llama"], texts, layer="all", settings=settings)
    assert list(together) == ["layers.0", "layers.1", "layers.2"]
    passes.clear()
    lists = [itertools.islice(each.batches(16, seed=1), 6) for each in together.values()]
    batches = list(zip(*lists))
    n_passes = len(passes)
    for at, (name, each) in enumerate(together.items()):
        alone = stream(models["llama"], texts, hook=name, settings=settings)
        assert alone.info == each.info
        passes.clear()
        for one, other in zip(batches, take(alone, 6, batch_rows=16, seed=1), strict=True):
            assert torch.equal(one[at].x, other.x)
            assert one[at].next == other.next
        assert n_passes <= len(passes) + 1  # a block may have been read ahead


def test_blocks_that_nobody_takes_are_not_kept(models, texts):
    first, _ = stream(
        models["llama"], texts, layer=[0, 1], settings=StreamSettings(block_tokens=20, prefetch=False)
    ).values()
    for _ in first.batches(8):
        pass
    assert len(first.shared._waiting) <= HELD_BLOCKS


@pytest.mark.parametrize("size", [2, 3, 40])
def test_processes_that_share_the_passes_have_the_rows_of_one(models, texts, size):
    settings = StreamSettings(block_tokens=60, batch_tokens=24, prefetch=False, outliers=None)
    alone = take(stream(models["llama"], texts, layer=1, settings=settings), 4, batch_rows=16, seed=1)
    sent: dict[int, list[torch.Tensor]] = {}

    def read(rank):
        """Read as one of the processes; before all have been there, with zeros in place of what the others send."""
        met, mine = len(sent) == size, []

        def everyones(x, counts):
            mine.append(x)
            assert len(x) == counts[rank]
            if not met:
                return [x.new_zeros(count, x.shape[1]) for count in counts]
            return [sent[each][len(mine) - 1] for each in range(size)]

        source = stream(models["llama"], texts, layer=1, settings=settings)
        source.shared.split = Split(rank, size, everyones)
        batches = take(source, 4, batch_rows=16, seed=1)
        sent[rank] = mine
        return batches

    for rank in range(size):
        read(rank)
    for rank in (0, 1):
        for one, other in zip(read(rank), alone, strict=True):
            assert torch.equal(one.x, other.x)
            assert torch.equal(one.document, other.document)
