"""Steps built ahead by a thread or by processes: the same rows, clear errors, a clean end."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from unit.token_lists import TokenList, make_loader, random_documents, same

from megatron_sdar.data.loading.loader import RowLoader

TESTS = Path(__file__).resolve().parents[1]
AHEAD = [{"prefetch": True}, {"num_workers": 1}, {"num_workers": 2}]
IDS = ["thread", "one process", "two processes"]


@pytest.fixture(autouse=True)
def no_process_is_left() -> Iterator[None]:
    yield
    assert multiprocessing.active_children() == []


class Damaged(TokenList):
    """The last document cannot be read."""

    def get(self, index: int) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
        if index == len(self) - 1:
            raise ValueError(f"data.bin: document {index} is damaged; build the dataset again")
        return super().get(index)


def take_all(loader: RowLoader, num_steps: int) -> list[list[object]]:
    steps = [loader.next_step() for _ in range(num_steps)]
    loader.close()
    return steps


@pytest.mark.parametrize("ahead", AHEAD, ids=IDS)
def test_rows_are_the_same_whoever_builds_them(ahead: dict[str, object]) -> None:
    plain = make_loader()
    expected = take_all(plain, 12)
    assert plain.epoch > 1.2, "the test must cross an epoch border"
    before = torch.get_rng_state()
    built = take_all(make_loader(**ahead), 12)
    assert torch.equal(torch.get_rng_state(), before), "torch's generator is the model's"
    for ours, theirs in zip(built, expected, strict=True):
        assert all(same(a, b) for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("ahead", AHEAD, ids=IDS)
def test_loading_a_state_starts_over_from_there(ahead: dict[str, object]) -> None:
    plain = make_loader()
    states, steps = [], []
    for _ in range(6):
        states.append(plain.state_dict())
        steps.append(plain.next_step())
    loader = make_loader(**ahead)
    for place in (0, 1, 4, 5, 2, 3, 3):
        loader.load_state_dict(states[place])
        found = loader.next_step()
        assert all(same(a, b) for a, b in zip(found, steps[place], strict=True)), place
    loader.close()


@pytest.mark.parametrize("ahead", [{}, *AHEAD], ids=["none", *IDS])
def test_errors_keep_their_message(ahead: dict[str, object]) -> None:
    loader = make_loader(Damaged([[5, 9]] * 40), **ahead)
    message = r"^data\.bin: document 39 is damaged; build the dataset again$"
    with pytest.raises(ValueError, match=message):
        take_all(loader, loader.num_rows)
    position = loader.position
    with pytest.raises(ValueError, match=message):
        loader.next_step()
    assert loader.position == position, "a step that failed was not taken"
    loader.close()


class Deadly(TokenList):
    """Reading it kills the process that does, unless that is the one that runs the test."""

    def get(self, index: int) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
        if multiprocessing.parent_process() is not None:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().get(index)


def test_a_killed_worker_is_reported() -> None:
    loader = make_loader(Deadly([[5, 9]] * 40), num_workers=1)
    message = r"^dataloader_num_workers 1: a worker process ended \(.*use fewer workers, or 0"
    with pytest.raises(ValueError, match=message):
        loader.next_step()
    assert loader.position == 0


def test_closing_twice_and_before_the_first_step() -> None:
    for ahead in AHEAD:
        loader = make_loader(**ahead)
        loader.close()
        loader.close()


def test_workers_are_processes_of_their_own_and_end_with_close() -> None:
    loader = make_loader(num_workers=2)
    assert multiprocessing.active_children() == [], "they start with the first step"
    loader.next_step()
    workers = multiprocessing.active_children()
    assert len(workers) == 2
    loader.close()
    assert all(worker.exitcode is not None for worker in workers)


def test_a_run_that_does_not_close_its_loader_still_ends() -> None:
    script = (
        "from unit.token_lists import make_loader\n"
        "loader = make_loader(num_workers=2)\n"
        "thread = make_loader(prefetch=True)\n"
        "print(len(loader.next_step()) + len(thread.next_step()))\n"
    )
    root = TESTS.parent
    path = os.pathsep.join([str(root), str(root / "kernels"), str(TESTS)])
    result = subprocess.run(
        [sys.executable, "-c", script],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (result.returncode, result.stdout, result.stderr) == (0, "8\n", "")


def test_the_thread_builds_the_next_step_unasked() -> None:
    dataset = random_documents()
    builders = set()
    read, plain_get = threading.Event(), dataset.get

    def get(index: int) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
        builders.add(threading.current_thread().name)
        read.set()
        return plain_get(index)

    dataset.get = get
    loader = make_loader(dataset, prefetch=True)
    loader.next_step()
    loader._ahead._next[1].result(timeout=30)
    read.clear()
    loader.next_step()
    assert read.wait(timeout=30), "the third step was begun"
    loader.close()
    assert {name.split("_")[0] for name in builders} == {"rows"}


def test_waiting_is_counted() -> None:
    dataset = random_documents()
    plain_get = dataset.get

    def slow(index: int) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
        time.sleep(0.01)
        return plain_get(index)

    dataset.get = slow
    loader = make_loader(dataset)
    assert loader.wait_seconds == 0
    loader.next_step()
    first = loader.wait_seconds
    assert first >= 0.04, "four rows of at least one document each"
    loader.next_step()
    assert loader.wait_seconds >= first + 0.04


def test_reading_data_needs_no_torch() -> None:
    script = "import sys, megatron_sdar.data.loading.loader; print('torch' in sys.modules)"
    result = subprocess.run(
        [sys.executable, "-c", script],
        cwd=TESTS.parent,
        capture_output=True,
        text=True,
        check=True,
    )
    assert result.stdout == "False\n"
