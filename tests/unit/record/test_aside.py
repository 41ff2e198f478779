"""Work that nobody waits for: its order, its end, and what becomes of it where it is slow or fails."""

from __future__ import annotations

import threading

import pytest

from ctpo_megatron.errors import StorageError
from ctpo_megatron.record.aside import Aside

SOON_S = 30.0


class Slow:
    """Work that waits until it may go on."""

    def __init__(self) -> None:
        self.begun, self.go_on = threading.Event(), threading.Event()

    def __call__(self) -> None:
        self.begun.set()
        assert self.go_on.wait(SOON_S)


def mendable() -> StorageError:
    error = StorageError("no space left")
    error.mendable = True
    return error


def test_all_is_done_in_order() -> None:
    done: list[int] = []
    aside = Aside("test", 100)
    for number in range(50):
        aside.put(lambda number=number: done.append(number))
    aside.close(SOON_S)
    aside.close(SOON_S)
    assert done == list(range(50))
    assert aside.lost() == (0, "")


def test_who_puts_never_waits_and_what_finds_no_room_is_counted() -> None:
    slow, done, aside = Slow(), [], Aside("test", 3)
    aside.put(slow)
    assert slow.begun.wait(SOON_S)
    for number in range(5):
        aside.put(lambda number=number: done.append(number))
    assert aside.lost() == (3, "3 pieces of work wait already")
    assert aside.lost() == (0, "")
    slow.go_on.set()
    aside.close(SOON_S)
    assert done == [0, 1]
    aside.put(lambda: done.append(9))
    assert (aside.lost()[0], done) == (1, [0, 1])


def test_what_a_disk_did_not_take_is_tried_again_and_nothing_overtakes_it() -> None:
    done, faults, tried = [], [mendable(), mendable()], threading.Event()

    def first() -> None:
        tried.set()
        if faults:
            raise faults.pop()
        done.append("first")

    aside = Aside("test", 10, retry_s=0.01)
    aside.put(first)
    aside.put(lambda: done.append("second"))
    assert tried.wait(SOON_S)
    while faults:
        tried.clear()
        assert tried.wait(SOON_S)
    aside.close(SOON_S)
    assert done == ["first", "second"]
    assert aside.lost() == (0, "")


def test_at_the_end_a_disk_at_fault_has_one_more_try() -> None:
    def fail() -> None:
        raise mendable()

    aside = Aside("test", 10, retry_s=1000.0)
    aside.put(fail)
    aside.put(fail)
    aside.close(SOON_S)
    assert aside.lost() == (2, "no space left")


@pytest.mark.parametrize("error", [ValueError("broken"), StorageError("broken")])
def test_what_fails_otherwise_is_lost_and_the_next_has_its_turn(error: Exception) -> None:
    done: list[int] = []

    def fail() -> None:
        raise error

    aside = Aside("test", 10, retry_s=1000.0)
    for work in (fail, lambda: done.append(1), fail, lambda: done.append(2)):
        aside.put(work)
    aside.close(SOON_S)
    pieces, reason = aside.lost()
    assert (pieces, done) == (2, [1, 2])
    assert "broken" in reason


def test_closing_leaves_what_hangs() -> None:
    slow, done, aside = Slow(), [], Aside("test", 10)
    aside.put(slow)
    assert slow.begun.wait(SOON_S)
    aside.put(lambda: done.append(1))
    aside.close(0.01)
    assert not aside.idle
    assert aside.lost()[0] == 2
    slow.go_on.set()
    aside.close(SOON_S)
    assert aside.idle
    assert done == [], "something was done behind the end"
