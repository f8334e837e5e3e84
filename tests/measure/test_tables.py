"""Tables as text and as HTML."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from saekit.measure.tables import html_table, text_table


def test_columns_stand_in_line():
    table = text_table([["", "fvu"], ["topk", "0.1"], ["  pca", "0.25"]], "two rows")
    assert table == "       fvu\ntopk   0.1\n  pca  0.25\ntwo rows"


def test_html_keeps_indentation_and_escapes():
    page = html_table([["<a>", "b"], ["  c & d", "1"]], "<i>")
    assert "<th>&lt;a&gt;</th>" in page
    assert "<td>&nbsp;&nbsp;c &amp; d</td>" in page
    assert "<caption>&lt;i&gt;</caption>" in page


def test_nothing_in_a_notebook_turns_or_hides_what_stands_around_it():
    page = html_table([["a\u202eb"], ["\x1b[31mc\u2066"]], "one\ntwo\u200f")
    assert "<th>a?b</th>" in page
    assert "<td>?[31mc?</td>" in page
    assert "<caption>one\ntwo?</caption>" in page


@given(cells=st.lists(st.text(max_size=6), min_size=1, max_size=4))
def test_every_line_has_every_cell(cells):
    page = html_table([cells, cells, cells], "")
    assert page.count("<th>") == len(cells)
    assert page.count("<td>") == 2 * len(cells)
    assert page.count("<tr>") == 3
