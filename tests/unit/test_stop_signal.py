"""Signals that ask a process to stop, in a world of one."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Callable

import pytest
import torch

from megatron_sdar.parallel.mesh import build_mesh
from megatron_sdar.parallel.stop_signal import SIGNALS, StopSignal

pytestmark = pytest.mark.usefixtures("single_process")


class Left:
    """Exit codes that a StopSignal wanted to leave with."""

    def __init__(self, silent: Callable[[], list[int]] = lambda: []) -> None:
        self.codes: list[int] = []
        mesh = build_mesh(torch.device("cpu"), 1, 1)
        self.stop = StopSignal(mesh, silent, self.codes.append)


def wait_for(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline, "it did not come"
        time.sleep(0.01)


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_is_noted_and_named(number: signal.Signals) -> None:
    left = Left()
    with left.stop as stop:
        assert not stop.is_asked
        assert not stop.anybody_asked()
        os.kill(os.getpid(), number)
        wait_for(lambda: stop.is_asked)
        os.kill(os.getpid(), signal.SIGTERM)  # the first one counts
        assert stop.anybody_asked()
        assert stop.agree() == f"{number.name} to rank 0"
        assert stop.seconds > 0
    assert left.codes == []


def test_handlers_are_those_of_before_afterwards() -> None:
    before = [signal.getsignal(number) for number in SIGNALS]
    with Left().stop:
        assert [signal.getsignal(number) for number in SIGNALS] != before
    assert [signal.getsignal(number) for number in SIGNALS] == before
    assert signal.set_wakeup_fd(-1) == -1


def test_it_ends_though_a_child_holds_its_pipe() -> None:
    with Left().stop:
        child = os.fork()
        if child == 0:
            time.sleep(60)
            os._exit(0)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)


def test_other_signals_are_not_taken() -> None:
    earlier = signal.signal(signal.SIGUSR2, lambda number, frame: None)
    try:
        with Left().stop as stop:
            os.kill(os.getpid(), signal.SIGUSR2)
            os.kill(os.getpid(), signal.SIGUSR1)
            wait_for(lambda: stop.is_asked)
            assert stop.name == "SIGUSR1"
    finally:
        signal.signal(signal.SIGUSR2, earlier)


@pytest.mark.parametrize("is_silent", [False, True])
def test_torchrun_cleaning_up_behind_a_dead_rank_is_obeyed(is_silent: bool) -> None:
    """A rank of this host is gone, or one of another host is not heard of any more."""
    left = Left(lambda: [3] if is_silent else [])
    if not is_silent:
        gone = subprocess.Popen(["true"])
        gone.wait()
        left.stop._siblings = [gone.pid]
    with left.stop:
        time.sleep(0.3)
        assert left.codes == [], "nobody asked"
        os.kill(os.getpid(), signal.SIGTERM)
        wait_for(lambda: left.codes)
    assert set(left.codes) == {128 + signal.SIGTERM}


def test_one_that_left_after_all_agreed_is_no_dead_rank() -> None:
    silent: list[int] = []
    left = Left(lambda: silent)
    with left.stop as stop:
        os.kill(os.getpid(), signal.SIGTERM)
        wait_for(lambda: stop.is_asked)
        stop.agree()
        silent.append(1)
        time.sleep(0.5)
    assert left.codes == []


def test_an_error_after_a_rank_died_ends_at_once() -> None:
    silent: list[int] = []
    left = Left(lambda: silent)

    def fail() -> None:
        with left.stop as stop:
            os.kill(os.getpid(), signal.SIGTERM)
            wait_for(lambda: stop.is_asked)
            silent.append(1)
            raise RuntimeError("a collective")

    with pytest.raises(RuntimeError, match="a collective"):
        fail()
    assert 128 + signal.SIGTERM in left.codes
