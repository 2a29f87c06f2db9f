"""Turns at the model: urgent work first, nobody for ever last, a lock all the time."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

import pytest

from infllm_agent.model.turns import Turns, Urgency


class Memory:
    pass


def queue_up(turns: Turns, work: list[tuple[str, object, Urgency]]) -> list[str]:
    """The order in which threads get the turn that come one after the other while somebody has it."""
    order: list[str] = []
    threads = []
    with turns.turn(Memory()):
        for name, who, urgency in work:
            thread = threading.Thread(target=lambda *a: take(turns, order, *a), args=(name, who, urgency))
            thread.start()
            threads.append(thread)
            until(lambda: turns.waiting == len(threads))
    for thread in threads:
        thread.join()
    return order


def take(turns: Turns, order: list[str], name: str, who: object, urgency: Urgency) -> None:
    with turns.turn(who, urgency=urgency):
        order.append(name)


def until(done: Callable[[], bool], seconds: float = 10) -> None:
    end = time.monotonic() + seconds
    while not done():
        assert time.monotonic() < end, "it never happened"
        time.sleep(0.001)


def test_urgent_work_goes_first() -> None:
    work: list[tuple[str, object, Urgency]] = [
        ("read", Memory(), Urgency.NOBODY),
        ("next", Memory(), Urgency.NEXT_TOKEN),
    ]
    work += [("more", Memory(), Urgency.NOBODY), ("first", Memory(), Urgency.FIRST_TOKEN)]
    assert queue_up(Turns(), work)[:2] == ["first", "next"]


def test_who_was_served_longest_ago_is_next() -> None:
    turns, a, b, c = Turns(), Memory(), Memory(), Memory()
    for who in (b, c, a):
        with turns.turn(who):
            pass
    assert queue_up(turns, [("a", a, Urgency.NOBODY), ("c", c, Urgency.NOBODY), ("b", b, Urgency.NOBODY)]) == [
        "b",
        "c",
        "a",
    ]


def test_reading_goes_on_while_others_talk() -> None:
    """It has about a fifth of the time, in pieces, and no other reading begins meanwhile."""
    turns, talkers = Turns(), [Memory(), Memory()]
    stop = threading.Event()
    talked, read = 0.0, 0.0

    def talk(who: object) -> None:
        nonlocal talked
        while not stop.is_set():
            with turns.turn(who, urgency=Urgency.NEXT_TOKEN):
                time.sleep(0.01)
                talked += 0.01

    reading: list[int] = []

    def read_on(number: int) -> None:
        nonlocal read
        while not stop.is_set():
            with turns.turn(Memory()):
                reading.append(number)
                for _ in range(30):
                    time.sleep(0.005)
                    read += 0.005
                    turns.pause()
                    assert reading == [number]
                reading.remove(number)

    threads = [threading.Thread(target=talk, args=(who,)) for who in talkers]
    threads += [threading.Thread(target=read_on, args=(number,)) for number in range(2)]
    for thread in threads:
        thread.start()
    time.sleep(3)
    stop.set()
    for thread in threads:
        thread.join(10)
        assert not thread.is_alive()
    assert 0.1 < read / (read + talked) < 0.4


def test_urgent_work_goes_between_the_steps_of_other_work() -> None:
    turns, order = Turns(), []
    with turns.turn(Memory()):
        asking = threading.Thread(target=take, args=(turns, order, "asked", Memory(), Urgency.FIRST_TOKEN))
        reading = threading.Thread(target=take, args=(turns, order, "read", Memory(), Urgency.NOBODY))
        reading.start()
        asking.start()
        until(lambda: turns.waiting == 2)
        turns.pause()
        order.append("went on")
        turns.pause()
    reading.join()
    asking.join()
    assert order == ["asked", "went on", "read"]
    with turns.turn(Memory(), urgency=Urgency.NEXT_TOKEN):
        turns.pause()  # nothing is more urgent
    turns.pause()  # and without a turn it does nothing


def test_one_at_a_time_and_again_in_the_same_thread() -> None:
    turns, inside, most = Turns(), 0, 0

    def work() -> None:
        nonlocal inside, most
        for _ in range(200):
            with turns.turn(Memory(), urgency=Urgency.NEXT_TOKEN), turns.turn(Memory()):
                inside += 1
                most = max(most, inside)
                inside -= 1

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == 1
    assert turns.waiting == 0


def test_a_failure_gives_the_turn_back() -> None:
    turns = Turns()
    with pytest.raises(RuntimeError, match="no"), turns.turn(Memory()):
        raise RuntimeError("no")
    assert queue_up(turns, [("next", Memory(), Urgency.NOBODY)]) == ["next"]
