"""What is made ahead: order, content, faults, and threads that end."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest
import torch

from toolkit.data.batches import BatchPlan, step_batches
from toolkit.data.examples import Example
from toolkit.data.prefetch import Prefetcher, on_device


def lanes() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("frostline-prefetch")]


def test_items_are_those_of_the_source_in_order() -> None:
    with Prefetcher(ahead=3) as ahead:
        assert list(ahead(range(100))) == list(range(100))
        assert list(ahead([])) == []
    assert lanes() == []


def test_batches_are_those_of_the_source() -> None:
    examples = [Example.with_answer(tuple(range(1, 4 + index)), 2) for index in range(7)]
    plan, order = BatchPlan(7, 2), range(7)
    plain = list(step_batches(examples, order, plan, 0, first_step=1, packed=True))
    with Prefetcher() as ahead:
        steps = step_batches(examples, order, plan, 0, first_step=1, packed=True)
        found = list(ahead(on_device(steps, torch.device("cpu"))))
    assert [[batch.examples for batch in step] for step in found] == [
        [batch.examples for batch in step] for step in plain
    ]
    for one, other in zip(found, plain, strict=True):
        assert all(torch.equal(a.input_ids, b.input_ids) for a, b in zip(one, other, strict=True))


def test_items_are_made_before_they_are_asked_for_and_no_more_than_that() -> None:
    made, last = [], threading.Event()

    def source() -> Iterator[int]:
        for number in range(100):
            made.append(number)
            if number == 2:
                last.set()
            yield number

    with Prefetcher(ahead=2) as ahead:
        items = ahead(source())
        assert next(items) == 0
        assert last.wait(60), "nobody asked for items 1 and 2"
    assert made == [0, 1, 2], "one was taken and two wait"


def test_what_the_source_raises_is_raised_after_the_items_before_it() -> None:
    def source() -> Iterator[int]:
        yield 1
        yield 2
        raise OSError("disk gone")

    with Prefetcher(ahead=5) as ahead:
        items = ahead(source())
        assert [next(items), next(items)] == [1, 2]
        with pytest.raises(OSError, match="disk gone"):
            next(items)
        with pytest.raises(StopIteration):
            next(items)


@pytest.mark.parametrize("fault", [None, ValueError("a bad step"), KeyboardInterrupt()])
def test_no_thread_is_left_when_the_consumer_stops_in_between(fault: BaseException | None) -> None:
    closed = threading.Event()

    def source() -> Iterator[int]:
        try:
            yield from range(10**9)
        finally:
            closed.set()

    def consume() -> None:
        with Prefetcher() as ahead:
            for number in ahead(source()):
                if number == 5:
                    assert len(lanes()) == 1
                    if fault is not None:
                        raise fault
                    break

    if fault is None:
        consume()
    else:
        with pytest.raises(type(fault)):
            consume()
    assert lanes() == []
    assert closed.is_set(), "the source can clean up"


def test_a_second_source_runs_beside_the_first() -> None:
    with Prefetcher() as ahead:
        outer, inner = ahead(range(4)), ahead("ab")
        assert [next(outer), next(inner), next(outer), next(inner), next(outer)] == [0, "a", 1, "b", 2]
    assert lanes() == []
