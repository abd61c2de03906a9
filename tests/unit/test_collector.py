"""The garbage collector leaves alone what lasts, finds the rest, and is on again afterwards."""

from __future__ import annotations

import gc
import threading
import weakref
from collections.abc import Iterator

import pytest

from tundp import collector
from tundp.blocking import off_loop


@pytest.fixture(autouse=True)
def as_before() -> Iterator[None]:
    yield
    gc.enable()
    gc.unfreeze()


class Node:
    """Half of a cycle."""

    def __init__(self) -> None:
        self.other: Node | None = None


def cycle() -> weakref.ref[Node]:
    one, two = Node(), Node()
    one.other, two.other = two, one
    return weakref.ref(one)


def test_garbage_is_collected_and_what_lives_is_not_walked_again() -> None:
    garbage, kept = cycle(), [Node() for _ in range(100)]
    before = gc.get_freeze_count()
    collector.settle()
    assert garbage() is None
    assert gc.get_freeze_count() >= before + len(kept)


def test_nothing_is_walked_while_many_are_made() -> None:
    walks: list[str] = []
    gc.callbacks.append(lambda phase, _: walks.append(phase))
    try:
        with collector.making(100_000):
            walks.clear()
            made = [Node() for _ in range(100_000)]
            assert walks == []
            assert not gc.isenabled()
    finally:
        gc.callbacks.pop()
    assert gc.isenabled()
    assert gc.get_freeze_count() >= len(made)
    # What dies later is freed by its count of references, frozen or not.
    last = weakref.ref(made[-1])
    del made
    assert last() is None


def test_few_are_made_as_ever() -> None:
    with collector.making(collector.MANY):
        assert gc.isenabled()


def test_it_is_on_again_after_the_last_of_several_and_after_an_error() -> None:
    inside, over = threading.Event(), threading.Event()

    def other() -> None:
        with collector.making(collector.MANY + 1):
            inside.set()
            over.wait(60)

    thread = threading.Thread(target=other)
    thread.start()
    try:
        assert inside.wait(60)
        with pytest.raises(RuntimeError), collector.making(collector.MANY + 1):
            raise RuntimeError
        assert not gc.isenabled(), "another one is still at it"
    finally:
        over.set()
        thread.join()
    assert gc.isenabled()


async def test_many_entries_are_looked_at_on_a_thread() -> None:
    here = threading.get_ident()
    assert await off_loop(threading.get_ident, 10) == here
    assert await off_loop(threading.get_ident, 10_000) != here
