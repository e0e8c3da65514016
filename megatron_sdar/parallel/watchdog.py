"""A heartbeat per rank, and when one stops: every rank's stack, and who is missing.

The main thread says where it is (`beat`, which takes no time). A thread of each rank passes that
on through the rendezvous store every two seconds; rank 0's watches all of them, the others watch
rank 0. When a rank is not heard of for `timeout` seconds, or says nothing new that long in a
phase that has a limit, every rank that still can writes its stacks and collectives to a file,
rank 0 names the ranks that the others wait for, and all leave with exit code 1, so that torchrun
starts them again. Invariant: who waits in a collective is never blamed while somebody does not.
"""

from __future__ import annotations

import json
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import TextIO

import torch.distributed as dist

from megatron_sdar.parallel.collective_frames import is_from_collective, waiting_in
from megatron_sdar.parallel.flight_recorder import recorded_collectives
from megatron_sdar.parallel.hang_report import RankState, describe_hang, ranks_text, write_state

LONGEST_INTERVAL = 2.0
ANSWER_SECONDS = 4.0  # in which ranks answer rank 0, and rank 0 tells them that it has reported


class StalledError(RuntimeError):
    """Ranks wait for one that does not come; the message says what this rank knows."""


@dataclass
class _Seen:
    """When rank 0 saw something new of a rank, by rank 0's clock."""

    pulse: int
    count: int
    pulse_at: float
    count_at: float


class Watchdog:
    """Watches the training of this rank and of all; a context manager.

    Args:
        store: of this object alone; keys are the run's.
        rank, world_size: this rank among all.
        place: where this rank is in the mesh, in words.
        timeout: seconds.
        directory: where ranks write what they were doing; made when they do.
        leave: ends the process; tests pass their own.
        err: where the report goes.
        interval: seconds between two looks.

    Attributes:
        listener: told of every phase as it begins, by the main thread.
    """

    def __init__(
        self,
        store: dist.Store,
        rank: int,
        world_size: int,
        place: str,
        timeout: float,
        directory: Path,
        *,
        leave: Callable[[int], object] = os._exit,
        err: TextIO | None = None,
        interval: float | None = None,
    ) -> None:
        self._store, self._rank, self._world_size = store, rank, world_size
        self._place, self._timeout, self._directory = place, timeout, directory
        self._leave, self._err = leave, err or sys.stderr
        self._interval = interval or min(LONGEST_INTERVAL, timeout / 4)
        self._count, self._step, self._phase, self._is_limited = 0, 0, "starting", False
        self._beat_at = time.monotonic()
        self._pulse = 0
        self._seen: dict[int, _Seen] = {}
        self._heard: dict[int, tuple[int, float]] = {}
        self._reporting = threading.Lock()
        self._reached_at = time.monotonic()
        self._report_ends: tuple[float, str] | None = None
        self._stop, self._over = threading.Event(), threading.Event()
        self._threads = [
            threading.Thread(target=target, name=name, daemon=True)
            for name, target in (("watchdog", self._watch), ("watchdog's guard", self._guard))
        ]
        self._watched = threading.get_ident()
        self.listener: Callable[[str], None] = lambda phase: None

    def beat(self, phase: str, step: int | None = None, *, limited: bool = True) -> None:
        """The main thread is alive and begins this phase.

        Args:
            step: None: still the one said last.
            limited: whether the phase may not take longer than the timeout.
        """
        self._step = self._step if step is None else step
        self._phase, self._is_limited, self._beat_at = phase, limited, time.monotonic()
        self._count += 1
        self.listener(phase)

    def __enter__(self) -> Watchdog:
        self._watched = threading.get_ident()
        self._publish()
        self._reached_at = time.monotonic()
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Raises StalledError in place of what a collective raised, once rank 0 has reported."""
        if error is not None and is_from_collective(error):
            first = str(error).strip().splitlines()[0] if str(error).strip() else repr(error)
            why = f"rank {self._rank} ({self._place}): {first}"
            self._report(why, error)
            self._over.set()
            raise StalledError(
                f"step {self._step}, {self._phase}: {first}; the output of rank 0 and "
                f"{self._directory} say what each rank was doing"
            ) from error
        self._stop.set()
        self._over.set()

    def _guard(self) -> None:
        """Leave when the store does not even fail: a dead link keeps whoever asks it waiting."""
        looked_at = time.monotonic()
        while not self._over.wait(self._interval):
            now = time.monotonic()
            if now - looked_at > 3 * self._interval + ANSWER_SECONDS:
                self._reached_at = now  # this process was stopped
            looked_at = now
            if self._report_ends is not None:
                ends, why = self._report_ends
                is_over, why = now > ends, f"{why}; the rendezvous store does not answer"
            else:
                is_over = now - self._reached_at > self._timeout + self._interval
                why = f"the rendezvous store does not answer for {self._timeout:g} s"
            if is_over:
                self._say(f"rank {self._rank}: error: {why}")
                self._write(self._own_state(None))
                self._leave(1)
                return

    def _watch(self) -> None:
        looked_at = time.monotonic()
        while not self._stop.wait(self._interval):
            now = time.monotonic()
            if now - looked_at > 3 * self._interval + ANSWER_SECONDS:
                self._forgive(now)  # this process was stopped: of the others nothing is known
                self._reached_at = now
            looked_at = now
            try:
                self._publish()
                why = self._look(now)
                self._reached_at = time.monotonic()
            except RuntimeError as error:  # every error of a store
                if time.monotonic() - self._reached_at < self._timeout or self._stop.is_set():
                    continue
                why = f"rank {self._rank} cannot reach the rendezvous store: {error}"
            if why is not None and self._report(why, None):
                self._leave(1)
                return

    def _publish(self) -> None:
        self._pulse += 1
        content = [self._pulse, self._count, self._is_limited]
        self._store.set(f"beat/{self._rank}", json.dumps(content))

    def _look(self, now: float) -> str | None:
        """Why all must leave, None if they need not."""
        if self._store.check(["report"]):  # a collective failed, or rank 0 noticed something
            return self._store.get("report").decode()
        watched = [0] if self._rank else list(range(self._world_size))
        keys = [f"beat/{rank}" for rank in watched]
        if not self._store.check(keys):
            return None  # some have not entered training yet
        for rank, value in zip(watched, self._store.multi_get(keys), strict=True):
            pulse, count, limited = json.loads(value)
            seen = self._seen.setdefault(rank, _Seen(-1, -1, now, now))
            if pulse == seen.pulse:
                continue
            # As long as rank 0's thread lives, it speaks for all: the others ask for no more.
            if count != seen.count or not limited or self._rank:
                seen.count, seen.count_at = count, now
            seen.pulse, seen.pulse_at = pulse, now
        stalled = [
            rank for rank, seen in self._seen.items() if now - seen.count_at >= self._timeout
        ]
        return (
            f"nothing new from {ranks_text(stalled)} for {self._timeout:g} s" if stalled else None
        )

    def silent_ranks(self) -> list[int]:
        """Ranks not heard of for some intervals since this was first asked; all, without a store.

        Any rank's, whatever the timeout; for one thread at a time.
        """
        now = time.monotonic()
        try:
            keys = [f"beat/{rank}" for rank in range(self._world_size)]
            if not self._store.check(keys):
                return []
            pulses = [json.loads(value)[0] for value in self._store.multi_get(keys)]
        except RuntimeError:
            return list(range(self._world_size))
        for rank, pulse in enumerate(pulses):
            if self._heard.get(rank, (None, now))[0] != pulse:
                self._heard[rank] = (pulse, now)
        limit = 3 * self._interval + 1
        return [rank for rank, (_, at) in self._heard.items() if now - at > limit]

    def _forgive(self, now: float) -> None:
        for seen in self._seen.values():
            seen.pulse_at = seen.count_at = now

    def _report(self, why: str, error: BaseException | None) -> bool:
        """Write what this rank does; on rank 0 gather what all do and say who is missing.

        False: the other thread of this rank does so, or nobody watches any more.
        """
        with self._reporting:  # both may find out
            if self._stop.is_set():
                return False
            self._stop.set()
            state = self._own_state(error)
            self._write(state)
            self._report_ends = time.monotonic() + 2 * ANSWER_SECONDS, why
            try:
                self._store.set(f"state/{self._rank}", json.dumps(asdict(state)))
                if self._rank == 0:
                    self._store.set("report", why)
                    self._say(describe_hang(why, self._gather(), self._silent_for()))
                    self._store.set("reported", "yes")
                else:
                    if not self._store.check(["report"]):
                        self._store.set("report", why)
                    self._wait_until_reported(why)
            except RuntimeError as lost:
                self._say(f"rank {self._rank}: error: {why}; nobody to tell ({lost})")
            return True

    def _wait_until_reported(self, why: str) -> None:
        deadline = time.monotonic() + ANSWER_SECONDS + 2 * self._interval
        while time.monotonic() < deadline:
            if self._store.check(["reported"]):
                return
            time.sleep(0.05)
        self._say(f"rank {self._rank}: error: {why}, and no report by rank 0")

    def _gather(self) -> dict[int, RankState]:
        """The states of all ranks that answer in time."""
        missing = set(range(self._world_size))
        states = {}
        deadline = time.monotonic() + ANSWER_SECONDS
        while missing and time.monotonic() < deadline:
            for rank in sorted(missing):
                if self._store.check([f"state/{rank}"]):
                    states[rank] = RankState(**json.loads(self._store.get(f"state/{rank}")))
            missing -= set(states)
            time.sleep(0.05)
        return states

    def _silent_for(self) -> Mapping[int, float | None]:
        """Seconds since each rank's thread was heard of; None: never."""
        now = time.monotonic()
        return {
            rank: now - self._seen[rank].pulse_at if rank in self._seen else None
            for rank in range(self._world_size)
        }

    def _own_state(self, error: BaseException | None) -> RankState:
        collectives = recorded_collectives()
        waits_in = waiting_in(sys._current_frames().get(self._watched))
        if error is not None:
            waits_in = "a collective that failed"
        return RankState(
            place=self._place,
            host=socket.gethostname(),
            pid=os.getpid(),
            step=self._step,
            phase=self._phase,
            since=time.monotonic() - self._beat_at,
            waits_in=waits_in or next(iter(collectives.unfinished), None),
            last_collective=collectives.last,
        )

    def _write(self, state: RankState) -> None:
        path = self._directory / f"rank-{self._rank}.txt"
        try:
            write_state(path, state)
        except OSError as error:
            self._say(f"rank {self._rank}: {path} cannot be written: {error}")

    def _say(self, text: str) -> None:
        self._err.write(text + "\n")
        self._err.flush()
