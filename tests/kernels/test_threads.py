"""How many threads torch and our loops have, and that this is nobody else's business."""

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from saekit.kernels import with_one_torch_thread
from saekit.kernels.cpu.threads import GRAIN, run_everywhere, thread_count


@pytest.fixture(params=[1, 2, 3])
def count(request):
    """Have torch use so many threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def elsewhere(work):
    """What work returns on a thread that has never met torch."""
    with ThreadPoolExecutor(1) as fresh:
        return fresh.submit(work).result()


def test_torch_has_one_thread_and_our_loops_have_as_many_as_before(count):
    assert with_one_torch_thread(lambda: (torch.get_num_threads(), thread_count())) == (1, count)
    assert (torch.get_num_threads(), thread_count()) == (count, count)


def test_a_new_number_counts_from_the_next_call_on(count):
    with_one_torch_thread(thread_count)
    torch.set_num_threads(count + 1)
    assert with_one_torch_thread(lambda: (torch.get_num_threads(), thread_count())) == (1, count + 1)


def test_few_numbers_stay_where_they_are(count):
    few, many = (with_one_torch_thread(threading.get_ident, numbers) for numbers in (GRAIN - 1, GRAIN))
    assert few == threading.get_ident()
    assert (many == few) == (count == 1)


def test_an_exception_arrives_and_the_number_is_intact(count):
    with pytest.raises(ZeroDivisionError):
        with_one_torch_thread(lambda: 1 // 0)
    assert torch.get_num_threads() == elsewhere(torch.get_num_threads) == count
    assert with_one_torch_thread(lambda: "the next call") == "the next call"


def test_a_thread_that_first_meets_torch_meanwhile_has_the_number_of_everybody(count):
    assert with_one_torch_thread(lambda: elsewhere(torch.get_num_threads)) == count
    assert elsewhere(torch.get_num_threads) == count


def test_our_loops_run_on_all_threads_at_a_time(count):
    together = threading.Barrier(count)
    with_one_torch_thread(lambda: run_everywhere(lambda: together.wait(10), count))


def test_within_is_the_same_thread(count):
    outer = with_one_torch_thread(lambda: (threading.get_ident(), with_one_torch_thread(threading.get_ident)))
    assert outer[0] == outer[1]
    assert (outer[0] == threading.get_ident()) == (count == 1)


def test_callers_do_not_wait_for_each_other(count):
    callers = 2 * count
    together = threading.Barrier(callers)
    with ThreadPoolExecutor(callers) as pool:
        each = [pool.submit(with_one_torch_thread, lambda: together.wait(10)) for _ in range(callers)]
        assert sorted(one.result() for one in each) == list(range(callers))
