"""Jobs that read and write files, a few at a time; the first error stops them all.

Reading, writing, syncing, checksums and casts release the interpreter lock, so threads suffice.
"""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from typing import TypeVar

from megatron_sdar.checkpoint.page_cache import forget_pages

Item = TypeVar("Item")
Result = TypeVar("Result")
Advance = Callable[[int], None]


class _StoppedError(Exception):
    """Raised inside a job, at its next block, once another job has failed."""


def run_jobs(
    jobs: Sequence[Callable[[Advance], Result]], threads: int, advance: Advance
) -> Generator[tuple[int, Result], None, None]:
    """Run the jobs in order, `threads` at a time; yield (index, result) as they finish.

    Args:
        jobs: each calls what it is given with the number of bytes of every block it has done.
        advance: is told of all these bytes.

    Raises:
        whatever the first failing job raised, after the others have stopped.
    """
    stop = threading.Event()

    def report(num_bytes: int) -> None:
        if stop.is_set():
            raise _StoppedError
        advance(num_bytes)

    with ThreadPoolExecutor(max_workers=max(1, min(threads, len(jobs)))) as pool:
        futures = {pool.submit(job, report): index for index, job in enumerate(jobs)}
        try:
            for future in as_completed(futures):
                yield futures[future], future.result()
        finally:
            stop.set()
            pool.shutdown(cancel_futures=True)


def ahead(function: Callable[[Item], Result], items: Sequence[Item]) -> Iterator[Result]:
    """Yield function(item) of every item, computed in another thread up to two items ahead."""
    with ThreadPoolExecutor(max_workers=1) as pool:
        pending = deque(pool.submit(function, item) for item in items[:2])
        for item in items[2:]:
            result = pending.popleft().result()
            pending.append(pool.submit(function, item))
            yield result
        while pending:
            yield pending.popleft().result()


class Flusher:
    """Sends a growing file to the disk while it is written, and its pages out of the cache.

    In another thread. Left alone, the system lets unwritten data pile up, then slows the writer.

    Args:
        descriptor: of the file, open until `close`.
    """

    _EVERY_BYTES = 128 * 2**20

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._pool: ThreadPoolExecutor | None = None
        self._pending: Future[None] | None = None
        self._num_bytes = 0

    def add(self, num_bytes: int) -> None:
        """So many bytes more were written."""
        self._num_bytes += num_bytes
        idle = self._pending is None or self._pending.done()
        if self._num_bytes >= self._EVERY_BYTES and idle:
            self._num_bytes = 0
            if self._pool is None:
                self._pool = ThreadPoolExecutor(max_workers=1)
            self._pending = self._pool.submit(self._flush)

    def _flush(self) -> None:
        os.fsync(self._descriptor)
        forget_pages(self._descriptor)

    def close(self) -> None:
        """Wait for what is under way. OSError when the disk failed."""
        if self._pool is not None:
            self._pool.shutdown()
        if self._pending is not None:
            self._pending.result()
