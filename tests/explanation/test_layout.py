"""Nothing that labels are made of is scored on: no document, and no near-duplicate."""

from __future__ import annotations

import numpy as np
import pytest

from explanation.planted_texts import contexts, firings_of
from saekit.errors import DataError
from saekit.explanation.firing_windows import learning_windows, windows_of
from saekit.explanation.halves import is_labelling, labelling_among
from saekit.explanation.label_windows import LabelWindows
from saekit.explanation.layout import LABELLING, NEITHER, REPEATED, SCORING, Layout
from saekit.rows.tokens import Contexts


def grams(layout, half):
    where = np.flatnonzero(layout.half == half)
    spans = [range(i, i + REPEATED) for i in where if i + REPEATED <= layout.stop[i]]
    return {tuple(layout.ids[span]) for span in spans if (layout.half[span] == half).all()}


def test_no_document_and_no_near_duplicate_in_both_halves():
    texts = contexts()
    labelling = next(d for d in range(160) if is_labelling(d))
    scoring = next(d for d in range(160) if not is_labelling(d))
    ids = texts.ids.copy()
    copied = np.flatnonzero(texts.document == labelling)[:18]
    into = np.flatnonzero(texts.document == scoring)[1:19]
    ids[into] = ids[copied]
    layout = Layout.of(Contexts(ids, texts.document, texts.position, texts.offsets))
    assert layout.n_repeated >= 18
    assert (layout.half[into] != SCORING).all()
    for half in (LABELLING, SCORING):
        assert {is_labelling(int(d)) for d in np.unique(layout.document[layout.half == half])} == {half == LABELLING}
    assert not grams(layout, LABELLING) & grams(layout, SCORING)
    assert Layout.of(texts).n_repeated == 0


def test_windows_of_both_tests_hold_tokens_of_their_half_alone():
    """What repeats the labelling half is in no window, not even beside a firing."""
    texts = contexts()
    source = next(d for d in range(160) if is_labelling(d) and (texts.document == d).sum() >= 16)
    ids = texts.ids.copy()
    for document in np.unique(texts.document):
        where = np.flatnonzero(texts.document == document)
        if not is_labelling(int(document)) and len(where) > 30:
            ids[where[8:24]] = ids[np.flatnonzero(texts.document == source)[:16]]
    layout = Layout.of(Contexts(ids, texts.document, texts.position, texts.offsets))
    assert (layout.half == NEITHER).sum() > 100
    firings = firings_of([layout.position % 5 == 0])
    latents = np.zeros(1, np.int64)
    for windows in (windows_of(firings, latents, layout, 9, 0), learning_windows(firings, latents, layout, 9, 0)):
        tokens, starts = windows.tokens()
        assert (layout.half[tokens] == np.repeat(windows.half, np.diff(starts))).all()
    drawn = LabelWindows(layout, 4, 0)
    for half, mine in (
        (SCORING, drawn.scoring_windows(0, firings, 20)),
        (LABELLING, drawn.labelling_windows(0, firings, 20)),
    ):
        assert len(mine) > 10
        assert all((layout.half[each.start : each.stop] == half).all() for each in mine)


def test_tokens_around_are_those_of_the_same_text():
    layout = Layout.of(contexts(20))
    for i in range(len(layout.ids)):
        before, after = layout.position[i] > 0, i + 1 < layout.stop[i]
        assert layout.previous[i] == (layout.ids[i - 1] if before else -1)
        assert layout.next[i] == (layout.ids[i + 1] if after else -1)


def test_texts_that_are_all_alike_are_refused():
    texts = contexts(40)
    first = texts.ids[: texts.offsets[1]]
    n = len(first)
    alike = Contexts(
        np.tile(first, 40), np.repeat(np.arange(40), n), np.tile(np.arange(n, dtype=np.int32), 40), np.arange(41) * n
    )
    with pytest.raises(DataError, match="tokens of their own"):
        Layout.of(alike)


def test_two_documents_are_split_whatever_their_numbers():
    for first in range(12):
        for second in range(first + 1, 12):
            found = labelling_among([first, second])
            assert sorted(found) == [False, True]
            assert list(labelling_among([second, first])) == list(found[::-1])
            if is_labelling(first) != is_labelling(second):
                assert list(found) == [is_labelling(first), is_labelling(second)]
    many = range(200)  # both halves are there without a change
    assert list(labelling_among(many)) == [is_labelling(each) for each in many]
    assert len(labelling_among([])) == 0
    assert list(labelling_among([5])) == [is_labelling(5)]
    same = [each for each in many if is_labelling(each)][:5]
    assert labelling_among(same).sum() == 4
    assert list(labelling_among([*same, same[0]])[:5]) == list(labelling_among(same))
