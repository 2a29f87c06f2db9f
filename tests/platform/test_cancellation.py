"""Requests to stop."""

from __future__ import annotations

import threading
from concurrent.futures import Future

from infllm_agent.platform.cancellation import Cancellation


def test_it_says_what_it_or_any_above_it_was_told() -> None:
    above, beside = Cancellation(), Cancellation()
    below = Cancellation(above, beside)
    assert not below()
    beside.cancel()
    assert (below(), above(), beside()) == (True, False, True)


def test_its_own_time_is_up_and_not_that_of_another() -> None:
    above = Cancellation(seconds=0.0)
    below = Cancellation(above, seconds=60.0)
    while not above.timed_out:  # the clock has steps
        pass
    assert below()
    assert not below.timed_out


def test_waiting_ends_with_the_future() -> None:
    cancelled, future = Cancellation(Cancellation()), Future[None]()
    thread = threading.Thread(target=future.set_result, args=(None,))
    thread.start()
    assert cancelled.wait_for(future)
    thread.join()
    assert cancelled.wait_for(future), "what is done needs no waiting"


def test_waiting_ends_when_something_above_is_cancelled() -> None:
    above = Cancellation()
    below, waits = Cancellation(above, Cancellation()), threading.Event()
    results: list[bool] = []

    class Watched(Future[None]):
        def done(self) -> bool:
            waits.set()
            return super().done()

    thread = threading.Thread(target=lambda: results.append(below.wait_for(Watched())))
    thread.start()
    assert waits.wait(10)
    above.cancel()
    thread.join(10)
    assert results == [False]
    assert above._watchers == []


def test_waiting_ends_when_time_is_up() -> None:
    assert not Cancellation(Cancellation(seconds=0.02), seconds=60.0).wait_for(Future())
