"""SIGTERM and SIGUSR1: a scheduler wants the run to end, so it saves and leaves.

A signal reaches some processes, at different times. Each notes it and goes on; that it was asked
passes through a collective at a place that all ranks reach, so all stop there. torchrun, too,
sends SIGTERM: to those that are left when one process died, who would wait for it in vain. A
thread tells the two apart, since the main one may be waiting in a collective.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable
from types import FrameType, TracebackType

import torch

from megatron_sdar.parallel.hang_report import ranks_text
from megatron_sdar.parallel.launch import gather_from_all
from megatron_sdar.parallel.mesh import ParallelMesh, sum_over_world

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
_LOOK_EVERY = 0.2


class StopSignal:
    """Notes a signal that asks this process to stop; a context manager of the main thread.

    Args:
        mesh: all ranks of the run.
        silent_ranks: those that are not heard of any more, wherever they run.
        leave: ends the process; tests pass their own.

    Attributes:
        name: of the signal that came first; None: none came.

    Collective: all_gather_object (world).
    """

    def __init__(
        self,
        mesh: ParallelMesh,
        silent_ranks: Callable[[], list[int]],
        leave: Callable[[int], object] = os._exit,
    ) -> None:
        self._mesh, self._silent_ranks, self._leave = mesh, silent_ranks, leave
        # Processes with one parent are torchrun's on this host.
        own = (os.uname().nodename, os.getppid())
        places = gather_from_all((own, os.getpid()), mesh)
        self._siblings = [pid for parent, pid in places if parent == own and pid != os.getpid()]
        self.name: str | None = None
        self._asked_at = 0.0
        self._number = 0
        self._has_agreed = False
        self._is_over = threading.Event()
        self._reading, self._writing = os.pipe()
        self._thread = threading.Thread(target=self._listen, name="signals", daemon=True)

    @property
    def is_asked(self) -> bool:
        """Whether this process was asked to stop."""
        return self.name is not None

    def anybody_asked(self) -> bool:
        """Whether any rank was asked to stop, the same on all. Collective: all_reduce (world)."""
        vote = torch.full((), float(self.is_asked), device=self._mesh.device)
        return bool(sum_over_world(vote).item())

    def agree(self) -> str:
        """All ranks have come to where they stop; returns who was asked, in words.

        Collective: all_gather_object (world).
        """
        self._has_agreed = True
        names = gather_from_all(self.name, self._mesh)
        asked: dict[str, list[int]] = {}
        for rank, name in enumerate(names):
            if name is not None:
                asked.setdefault(name, []).append(rank)
        return ", ".join(f"{name} to {ranks_text(ranks)}" for name, ranks in asked.items())

    @property
    def seconds(self) -> float:
        """Since this process was asked; 0: it was not."""
        return time.monotonic() - self._asked_at if self.is_asked else 0.0

    def __enter__(self) -> StopSignal:
        os.set_blocking(self._writing, False)
        self._earlier = [signal.signal(number, _note) for number in SIGNALS]
        self._earlier_fd = signal.set_wakeup_fd(self._writing, warn_on_full_buffer=False)
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        signal.set_wakeup_fd(self._earlier_fd)
        for number, handler in zip(SIGNALS, self._earlier, strict=True):
            signal.signal(number, handler)
        self._is_over.set()
        os.write(self._writing, b"\0")  # its end would not be seen: forked workers hold the pipe
        self._thread.join()
        for end in (self._reading, self._writing):
            os.close(end)
        if error is not None:
            self._leave_if_useless()  # rather than wait for others to say what is known

    def _listen(self) -> None:
        """A signal's number arrives here even while the main thread waits in a collective."""
        while not self._is_over.is_set():
            wanted = [number for number in os.read(self._reading, 64) if number in SIGNALS]
            if not wanted or self.is_asked:
                continue
            self._asked_at, self._number = time.monotonic(), wanted[0]
            self.name = signal.Signals(self._number).name
            while not self._is_over.wait(_LOOK_EVERY):
                self._leave_if_useless()

    def _leave_if_useless(self) -> None:
        """End this process if it was asked to and another one will never come to agree."""
        if self._has_agreed or not self.is_asked:
            return
        if any(map(_is_gone, self._siblings)) or self._silent_ranks():
            self._leave(128 + self._number)


def _note(number: int, frame: FrameType | None) -> None:
    """Instead of what a signal does by default; the thread reads its number."""
    del number, frame


def _is_gone(pid: int) -> bool:
    """Whether a process ended and torchrun knows."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    return False
