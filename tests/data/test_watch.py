import threading

import pytest

from resnet_jax.data.watch import Noted, Stalled, awaited, under_way


def test_items_and_errors_come_through():
    def source():
        yield from range(5)
        raise KeyError("the end")

    stream = awaited(source(), 10.0, str)
    assert [next(stream) for _ in range(5)] == [0, 1, 2, 3, 4]
    with pytest.raises(KeyError, match="the end"):
        next(stream)
    assert list(awaited(iter("abc"), 10.0, str)) == ["a", "b", "c"]


def test_a_stream_that_is_left_ends_its_thread():
    before = threading.active_count()
    stream = awaited(iter(range(10**9)), 10.0, str)
    assert next(stream) == 0 and threading.active_count() == before + 1
    stream.close()
    assert threading.active_count() == before


def test_what_hangs_is_named_by_the_oldest_note(tmp_path):
    """In a thread of this process, as without workers."""
    freed = threading.Event()

    def example(place):
        return place if place < 2 else freed.wait(20)

    work = Noted(example, tmp_path)
    stream = awaited((work(place) for place in range(4)), 0.4, lambda: under_way(tmp_path, "picture {}".format))
    assert [next(stream), next(stream)] == [0, 1]
    threading.Timer(0.8, freed.set).start()
    with pytest.raises(Stalled, match=r"data.timeout = 0.4 seconds: picture 2 has been under way for 0 seconds"):
        next(stream)


def test_without_a_note_a_worker_may_have_died(tmp_path):
    assert under_way(tmp_path, str) == "no image is being read: a worker process may have died"
