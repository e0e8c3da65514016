"""The watchdog: several ranks as threads of this process, over one store."""

from __future__ import annotations

import io
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch.distributed as dist

from megatron_sdar.config import ParallelConfig
from megatron_sdar.parallel.collective_frames import is_from_collective
from megatron_sdar.parallel.hang_report import RankState, missing_ranks
from megatron_sdar.parallel.watchdog import StalledError, Watchdog
from megatron_sdar.training.stall_watch import watchdog_timeout

pytestmark = pytest.mark.alone

TIMEOUT = 1.5
# A function that the watchdog takes for one of torch.distributed's, by its file.
SCOPE: dict[str, Callable[..., None]] = {}
exec(
    compile(
        "def all_reduce(done):\n    assert done.wait(20)\n\n"
        "def fail():\n    raise RuntimeError('Timed out')\n",
        "torch/distributed/distributed_c10d.py",
        "exec",
    ),
    SCOPE,
)


class World:
    """Ranks that each run a function between entering and leaving their watchdog."""

    def __init__(self, folder: Path, timeout: float = TIMEOUT) -> None:
        self.folder, self.timeout = folder, timeout
        self.silent = 0
        self.store = dist.HashStore()
        self.over = threading.Event()
        self.output: dict[int, io.StringIO] = {}
        self.left: dict[int, int] = {}
        self.raised: dict[int, BaseException] = {}

    def watchdog(self, rank: int, size: int) -> Watchdog:
        self.output[rank] = io.StringIO()

        def leave(code: int) -> None:
            self.left[rank] = code
            if len(self.left) == size - self.silent:
                self.over.set()

        return Watchdog(
            self.store, rank, size, f"tp {rank}", self.timeout, self.folder,
            leave=leave, err=self.output[rank], interval=0.05,
        )  # fmt: skip

    def run(self, *work: Callable[[Watchdog], None]) -> None:
        watchdogs = [self.watchdog(rank, len(work)) for rank in range(len(work))]

        def one(rank: int) -> None:
            try:
                with watchdogs[rank]:
                    work[rank](watchdogs[rank])
            except BaseException as error:
                self.raised[rank] = error

        threads = [threading.Thread(target=one, args=(rank,)) for rank in range(len(work))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    def said(self, rank: int) -> str:
        return self.output[rank].getvalue()


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    made = World(tmp_path / "stalled")
    yield made
    made.over.set()


def waits(world: World) -> Callable[[Watchdog], None]:
    def work(watchdog: Watchdog) -> None:
        watchdog.beat("sums of gradients", 7)
        SCOPE["all_reduce"](world.over)

    return work


def sleeps(world: World) -> Callable[[Watchdog], None]:
    def work(watchdog: Watchdog) -> None:
        watchdog.beat("waiting for rows", 7)
        assert world.over.wait(20), "all leave"

    return work


def test_the_rank_that_is_in_no_collective_is_named(world: World) -> None:
    world.run(waits(world), waits(world), sleeps(world), waits(world))
    assert world.left == {0: 1, 1: 1, 2: 1, 3: 1}
    first, missing, *others = world.said(0).splitlines()
    assert first.startswith("error: training stalled: nothing new from rank")
    assert first.endswith(f" for {TIMEOUT} s")
    assert missing.startswith("  missing: rank 2: (tp 2; ")
    assert "step 7, waiting for rows for " in missing
    assert missing.count("in no collective") == 1
    assert [line.split(":")[0] for line in others] == ["  rank 0", "  rank 1", "  rank 3"]
    assert all("waits in all_reduce" in line for line in others)
    assert [world.said(rank) for rank in (1, 2, 3)] == ["", "", ""], "rank 0 speaks for all"


def test_every_rank_writes_its_stacks(world: World) -> None:
    world.run(waits(world), sleeps(world))
    for rank, phase, function in ((0, "sums of gradients", "all_reduce"), (1, "rows", "in work")):
        text = (world.folder / f"rank-{rank}.txt").read_text()
        assert "step: 7\n" in text
        assert phase in text
        assert function in text.partition("Thread ")[2], "the stack names the function"
        assert "flight recorder: " in text


def stops(world: World) -> Callable[[Watchdog], None]:
    """A rank whose process is stopped: its thread says nothing any more."""

    def work(watchdog: Watchdog) -> None:
        watchdog.beat("forward of micro-batch 0", 3)
        time.sleep(0.2)  # its thread is heard of at least once
        watchdog._stop.set()
        watchdog._over.set()
        assert world.over.wait(20)

    world.silent += 1
    return work


def test_a_rank_whose_process_is_stopped_is_named(world: World) -> None:
    world.run(waits(world), stops(world))
    assert world.left == {0: 1}
    missing = world.said(0).splitlines()[1]
    assert missing.startswith("  missing: rank 1 is silent for ")
    assert "its process is stopped or gone, or its host" in missing


def test_who_makes_progress_is_left_alone(world: World) -> None:
    def works(watchdog: Watchdog) -> None:
        for number in range(30):
            watchdog.beat(f"forward of micro-batch {number}", 1)
            time.sleep(0.05)

    def prepares(watchdog: Watchdog) -> None:
        watchdog.beat("preparations", 0, limited=False)
        time.sleep(1.5)

    world.run(works, prepares)
    assert (world.left, world.raised, world.said(0)) == ({}, {}, "")
    assert not world.folder.exists()


def test_rank_0_that_falls_silent_is_named_by_the_others(world: World) -> None:
    world.run(stops(world), waits(world))
    assert world.left == {1: 1}
    assert world.said(1) == (
        f"rank 1: error: nothing new from rank 0 for {TIMEOUT} s, and no report by rank 0\n"
    )


def test_a_collective_that_fails_ends_in_a_report(world: World) -> None:
    def fails(watchdog: Watchdog) -> None:
        watchdog.beat("sums of gradients", 4)
        SCOPE["fail"]()

    world.timeout, world.silent = 60, 1
    world.run(waits(world), fails, sleeps(world))
    assert world.left == {0: 1, 2: 1}
    error = world.raised[1]
    assert isinstance(error, StalledError)
    assert str(error).startswith("step 4, sums of gradients: Timed out; the output of rank 0 and ")
    lines = world.said(0).splitlines()
    assert lines[0] == "error: training stalled: rank 1 (tp 1): Timed out"
    assert lines[1].startswith("  missing: rank 2: ")
    assert "waits in a collective that failed" in lines[3]


def test_other_errors_pass(world: World) -> None:
    def fails(watchdog: Watchdog) -> None:
        raise RuntimeError("CUDA out of memory")

    world.run(fails)
    assert str(world.raised[0]) == "CUDA out of memory"
    assert not isinstance(world.raised[0], StalledError)
    assert not world.folder.exists()
    assert not is_from_collective(ValueError("gloo"))
    assert is_from_collective(dist.DistBackendError("x"))
    assert is_from_collective(RuntimeError("[../gloo/transport/tcp/pair.cc:534] Connection closed"))


def state(step: int, waits_in: str | None) -> RankState:
    return RankState("tp 0", "host", 1, step, "x", 1.0, waits_in, None)


def test_who_is_missing() -> None:
    waiting, free = state(5, "all_reduce"), state(5, None)
    assert missing_ranks({0: waiting, 2: free}, 3) == [1], "who does not answer, before all others"
    assert missing_ranks({0: waiting, 1: free, 2: state(4, "recv")}, 3) == [1]
    assert missing_ranks({0: waiting, 1: state(4, "recv")}, 2) == [1], "who is behind"
    assert missing_ranks({0: waiting, 1: waiting}, 2) == []
    assert missing_ranks({0: free, 1: free}, 2) == []


def test_the_timeout_comes_before_that_of_the_collectives() -> None:
    assert watchdog_timeout(ParallelConfig()) == 1620
    assert watchdog_timeout(ParallelConfig(ddp_timeout=2147483)) == 1800
    assert watchdog_timeout(ParallelConfig(ddp_timeout=100)) == 90
    assert watchdog_timeout(ParallelConfig(watchdog_timeout=7)) == 7
    assert watchdog_timeout(ParallelConfig(watchdog_timeout=0)) == float("inf")


def test_silent_ranks_are_found_by_any_rank(tmp_path: Path) -> None:
    world = World(tmp_path)
    one, two = world.watchdog(0, 2), world.watchdog(1, 2)
    assert one.silent_ranks() == [], "not all have entered"
    one._publish()
    two._publish()
    deadline = time.monotonic() + 20
    while not (found := two.silent_ranks()):
        assert time.monotonic() < deadline
        one._publish()
        time.sleep(0.02)
    assert found == [1]


class DeadStore:
    """A store behind a link that was cut: after a while no question is answered."""

    def __init__(self, store: dist.Store, over: threading.Event) -> None:
        self._store, self._over = store, over
        self.is_dead = threading.Event()

    def __getattr__(self, name: str) -> Callable[..., object]:
        def ask(*arguments: object) -> object:
            if self.is_dead.is_set():
                assert self._over.wait(20)
            return getattr(self._store, name)(*arguments)

        return ask


@pytest.mark.parametrize("in_a_collective", [False, True])
def test_a_store_that_does_not_answer_holds_nobody(
    world: World, monkeypatch: pytest.MonkeyPatch, in_a_collective: bool
) -> None:
    monkeypatch.setattr("megatron_sdar.parallel.watchdog.ANSWER_SECONDS", 0.2)
    dead = DeadStore(world.store, world.over)
    world.store = dead  # type: ignore[assignment]

    def work(watchdog: Watchdog) -> None:
        watchdog.beat("sums of gradients", 7)
        dead.is_dead.set()
        if in_a_collective:
            SCOPE["fail"]()
        assert world.over.wait(20)

    world.run(work)
    assert world.left == {0: 1}
    why = f"rank 0: error: the rendezvous store does not answer for {TIMEOUT} s"
    if in_a_collective:
        why = "rank 0: error: rank 0 (tp 0): Timed out; the rendezvous store does not answer"
    assert why in world.said(0)
    assert "sums of gradients" in (world.folder / "rank-0.txt").read_text()
