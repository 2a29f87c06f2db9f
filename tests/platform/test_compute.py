"""The one thread that computes: work is done in its order, on top of what paused, and given up when nobody waits."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from infllm_agent.model.turns import Turns, Urgency
from infllm_agent.platform.compute import ComputeThread


@pytest.fixture
def compute() -> ComputeThread:
    return ComputeThread()


def begun(work: Callable[[], object]) -> threading.Thread:
    thread = threading.Thread(target=work)
    thread.start()
    return thread


def until(done: Callable[[], bool], seconds: float = 10) -> None:
    end = time.monotonic() + seconds
    while not done():
        assert time.monotonic() < end, "it never happened"
        time.sleep(0.001)


def test_all_work_is_done_in_one_thread_as_whoever_asks_would_do_it(compute: ComputeThread) -> None:
    there = compute.run(threading.current_thread)
    assert there is not threading.current_thread()
    others: list[threading.Thread] = []
    for thread in [begun(lambda: others.append(compute.run(threading.current_thread))) for _ in range(5)]:
        thread.join()
    assert others == [there] * 5
    assert compute.run(lambda: compute.run(threading.current_thread)) is there, "work that asks for work goes on"
    assert not compute.run(torch.is_inference_mode_enabled)
    with torch.inference_mode():
        assert compute.run(torch.is_inference_mode_enabled)
    before = torch.get_num_threads()
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            assert compute.run(torch.get_num_threads) == threads
    finally:
        torch.set_num_threads(before)
    with pytest.raises(ZeroDivisionError):
        compute.run(lambda: 1 / 0)
    assert compute.run(lambda: 3) == 3


def test_between_its_steps_work_lets_other_work_in(compute: ComputeThread) -> None:
    order: list[str] = []
    inside, asked = threading.Event(), threading.Event()

    def long() -> None:
        inside.set()
        asked.wait(10)
        order.append("first step")
        compute.between()
        order.append("second step")

    thread = begun(lambda: compute.run(long))
    inside.wait(10)
    short = begun(lambda: compute.run(lambda: order.append("short")))
    until(lambda: compute._jobs.qsize() == 1)
    asked.set()
    thread.join(10)
    short.join(10)
    assert order == ["first step", "short", "second step"]
    compute.between()  # elsewhere it does nothing


def test_reading_that_paused_goes_on_when_urgent_work_is_done(compute: ComputeThread) -> None:
    turns, order = Turns(compute), []
    inside, asked = threading.Event(), threading.Event()

    def read() -> None:
        inside.set()
        asked.wait(10)
        for step in range(2):
            order.append(f"read {step}")
            turns.pause()

    def ask(name: str, urgency: Urgency, work: Callable[[], None]) -> threading.Thread:
        def whole() -> None:
            with turns.turn(object_of(name), urgency=urgency):
                compute.run(work)

        return begun(whole)

    kept: dict[str, Named] = {}

    def object_of(name: str) -> Named:
        return kept.setdefault(name, Named())

    reading = ask("reader", Urgency.NOBODY, read)
    inside.wait(10)
    asking = [ask(name, Urgency.FIRST_TOKEN, lambda name=name: order.append(name)) for name in ("one", "two")]  # type: ignore[misc]
    until(lambda: turns.waiting == 2)
    asked.set()
    for thread in (reading, *asking):
        thread.join(10)
        assert not thread.is_alive()
    assert order[0] == "read 0"
    assert order[-1] == "read 1"
    assert sorted(order[1:3]) == ["one", "two"]


class Named:
    pass


def interrupt_after(event: threading.Event) -> threading.Thread:
    def interrupt() -> None:
        event.wait(10)
        time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGINT)

    return begun(interrupt)


def test_interrupted_work_ends_at_its_next_step_before_anybody_is_told(compute: ComputeThread) -> None:
    inside, ended = threading.Event(), threading.Event()

    def endless() -> None:
        try:
            while True:
                inside.set()
                time.sleep(0.01)
                compute.between()
        finally:
            ended.set()

    interrupting = interrupt_after(inside)
    with pytest.raises(KeyboardInterrupt):
        compute.run(endless)
    assert ended.is_set()
    interrupting.join()
    assert compute.run(lambda: 3) == 3, "it is there for the next"


def test_work_may_be_left(compute: ComputeThread) -> None:
    inside, go_on = threading.Event(), threading.Event()

    def slow() -> None:
        inside.set()
        go_on.wait(10)

    interrupting = interrupt_after(inside)
    with pytest.raises(KeyboardInterrupt):
        compute.run(slow, leave=True)
    assert not go_on.is_set()
    interrupting.join()
    go_on.set()
    assert compute.run(lambda: 3) == 3


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # fork with threads alive
def test_a_forked_child_has_one_of_its_own(compute: ComputeThread) -> None:
    compute.run(lambda: None)
    child = os.fork()
    if child == 0:
        os._exit(compute.run(lambda: 7))
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7


END = """
import atexit, threading, time
from infllm_agent.platform.compute import compute_thread

def steps():
    inside.set()
    while True:
        time.sleep(0.01)
        compute_thread().between()

def again_and_again():
    while True:
        compute_thread().run(steps)

atexit.register(lambda: print(compute_thread().run(lambda: "at the end")))
inside = threading.Event()
threading.Thread(target=again_and_again, daemon=True).start()
inside.wait()
atexit.register(lambda: print("the process ends"))
"""


def test_a_process_may_end_while_it_computes() -> None:
    done = subprocess.run([sys.executable, "-c", END], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == "the process ends\nat the end\n"


LIFE = """
import os, sys, threading, time
import torch
torch.set_num_threads(2)
from infllm_agent import AgentRuntime
from infllm_agent.model.local_model import LocalModel

def life(name):
    session = runtime.session(name)
    for i in range(3):
        session.append_user("line of a log " * 150)
        session.reply(max_tokens=4)
        session.append_user("and drawn")
        session.reply(max_tokens=4, temperature=1.0, top_p=0.9, repetition_penalty=1.2)
    with session.fork(name + "-fork") as fork:
        fork.append_user("on the fork")
        fork.commit()
    session.close()
    session = runtime.session(name)
    session.append_user("again")
    session.reply(max_tokens=4)

def native():
    return len(os.listdir("/proc/self/task")) - threading.active_count()

before = native()  # numpy's, for instance
with AgentRuntime(sys.argv[1], LocalModel.load(device="cpu")) as runtime:
    life("main")
    lived, end = threading.Event(), threading.Event()
    other = threading.Thread(target=lambda: (life("other"), lived.set(), end.wait()))
    other.start()
    lived.wait(100)
    counts = []
    while not counts or (counts[-1] != 1 and len(counts) < 50):  # a thread that ends leaves Python first
        counts.append(native() - before)
        time.sleep(0.1)
    end.set()
    print("workers", counts[-1])
"""


@pytest.mark.skipif(sys.platform != "linux", reason="counts the threads in /proc")
def test_no_other_thread_has_workers(tmp_path: Path) -> None:
    """The packaged model's vocabulary and windows are so large that torch divides work on them among threads."""
    environment = os.environ | {"OMP_NUM_THREADS": "2", "TOKENIZERS_PARALLELISM": "false"}
    done = subprocess.run([sys.executable, "-c", LIFE, tmp_path], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "workers 1\n"
