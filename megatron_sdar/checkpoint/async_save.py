"""Saving in a thread while training goes on, one save at a time.

What is saved is a copy in host memory, which the thread makes first. Forwards and backwards only
read weights and moments, so training goes on meanwhile and waits for the copy no sooner than it is
about to change them. The thread has a process group of its own. Invariant: no failure is lost;
whoever saves next or finishes is told.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

import torch

from megatron_sdar.checkpoint.snapshot import HostCopies, Snapshot


class AsyncSaver:
    """Copies snapshots and hands the copies to `write`, in a thread.

    Args:
        like: a snapshot with the same tensors as those to come; their host memory is allocated
            here.
        write: saves a snapshot; may use collectives of a group that is the thread's alone.
        device: this rank's, where the thread's own few operations belong.

    Attributes:
        num_bytes: host memory of the copies.
        waited: seconds that training has waited for the latest save: for an earlier one to be
            done, and for its copy.

    Raises:
        ValueError: there is not enough host memory.
    """

    def __init__(
        self, like: Snapshot, write: Callable[[Snapshot], None], device: torch.device
    ) -> None:
        self._copies = HostCopies(like, pinned=device.type == "cuda")
        self.num_bytes = self._copies.num_bytes
        self.waited = 0.0
        self._write = write
        self._device = device
        self._thread: threading.Thread | None = None
        self._copied = threading.Event()
        self._copied.set()
        self._error: BaseException | None = None

    @property
    def is_busy(self) -> bool:
        """Whether a save is under way."""
        return self._thread is not None and self._thread.is_alive()

    def save(self, snapshot: Snapshot) -> float:
        """Return while the snapshot is copied and written; waits for an earlier save first.

        Its tensors must not change before `wait_until_copied` has returned.

        Returns:
            seconds waited for the earlier save.

        Raises:
            ValueError: the earlier save failed, on every rank; this one was not begun.
        """
        started = time.monotonic()
        waited_for_earlier = self.wait()
        self._copied.clear()
        ready = torch.cuda.current_stream().record_event() if self._device.type == "cuda" else None
        # A daemon: Ctrl-C waits for the save, a second Ctrl-C does not.
        self._thread = threading.Thread(
            target=self._run, args=(snapshot, ready), name="checkpoint", daemon=True
        )
        self._thread.start()
        self.waited = time.monotonic() - started
        return waited_for_earlier

    def wait_until_copied(self) -> None:
        """Return when the latest snapshot's tensors may change."""
        started = time.monotonic()
        self._copied.wait()
        self.waited += time.monotonic() - started

    def _run(self, snapshot: Snapshot, ready: torch.cuda.Event | None) -> None:
        try:
            try:
                copied = self._copy(snapshot, ready)
            finally:
                self._copied.set()
            self._write(copied)
        except BaseException as error:
            self._error = error

    def _copy(self, snapshot: Snapshot, ready: torch.cuda.Event | None) -> Snapshot:
        if ready is None:
            return self._copies.fill(snapshot)
        torch.cuda.set_device(self._device)  # a thread begins on the first one
        stream = torch.cuda.Stream()
        stream.wait_event(ready)  # the update that made these weights is done by then
        with torch.cuda.stream(stream):
            return self._copies.fill(snapshot)

    def wait(self) -> float:
        """Return when no save is under way; the seconds that took, 0 when there was none.

        Raises:
            ValueError: it failed, on every rank; said once.
        """
        started = time.monotonic()
        was_busy = self.is_busy
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        error, self._error = self._error, None
        if error is not None:
            raise error
        return time.monotonic() - started if was_busy else 0.0

    def close(self) -> None:
        """As `wait`; gives the host memory back in any case."""
        try:
            self.wait()
        finally:
            if self._thread is None:  # else the second Ctrl-C came, and the thread still reads it
                self._copies.release()
