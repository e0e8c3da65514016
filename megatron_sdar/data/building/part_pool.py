"""Parts of a build on several processes.

Owns the processes. They are started fresh (a forked copy of a process with threads may hang) and
get the tokenizer ready made. A worker never raises: it hands back its report or what went wrong;
of those that fail together, the first in order decides what the user reads. Workers end with
the process that started them.
"""

import multiprocessing
import os
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from multiprocessing.queues import SimpleQueue

from megatron_sdar.data.building.part import PartReport, build_part
from megatron_sdar.data.building.plan import Part
from megatron_sdar.data.sources.datasets import DatasetSpec
from megatron_sdar.data.templates.template import TemplateOptions
from megatron_sdar.data.tokenization.tokenizer import SdarTokenizer

_POLL_SECONDS = 0.2
# So that workers that tell much do not keep a finished part waiting.
_MESSAGES_PER_POLL = 1000

OnProgress = Callable[[int, int], None]


@dataclass(frozen=True)
class PartBuilder:
    """What every part of a build shares."""

    specs: tuple[DatasetSpec, ...]
    tokenizer: SdarTokenizer
    options: TemplateOptions
    on_error: str

    def build(self, part: Part, prefix: str, on_progress: OnProgress) -> PartReport:
        """Build PART at PREFIX. Raises ValueError with one message for the user."""
        try:
            return build_part(
                part,
                self.specs[part.dataset],
                prefix,
                self.tokenizer,
                self.options,
                self.on_error,
                on_progress,
            )
        except OSError as error:
            raise storage_error(error, prefix) from error


def storage_error(error: OSError, prefix: str) -> ValueError:
    """What to tell of ERROR, met while writing at PREFIX."""
    return ValueError(
        f"{error.filename or prefix}: {error.strerror or error}; the parts finished so far are "
        "kept: mend this and run the same command again"
    )


def build_parts(
    builder: PartBuilder,
    parts: Mapping[int, Part],
    prefixes: Mapping[int, str],
    num_workers: int,
    on_progress: OnProgress,
) -> Iterator[tuple[int, PartReport]]:
    """Build PARTS (by index) on NUM_WORKERS processes; (index, report) as they are finished.

    Raises ValueError when a part cannot be built; what is finished stays.
    """
    if num_workers == 1 or len(parts) <= 1:
        for index, part in parts.items():
            yield index, builder.build(part, prefixes[index], on_progress)
        return
    context = multiprocessing.get_context("spawn")
    queue: SimpleQueue[tuple[int, int]] = context.SimpleQueue()
    executor = ProcessPoolExecutor(
        min(num_workers, len(parts)), context, initializer=_start, initargs=(builder, queue)
    )
    futures: dict[Future[PartReport | str], int] = {}
    try:
        for index, part in parts.items():
            futures[executor.submit(_work, part, prefixes[index])] = index
        yield from _collect(futures, queue, on_progress)
    except BrokenProcessPool as error:
        raise ValueError(
            "a worker process was killed (often for want of memory); the parts finished so far "
            "are kept: run the same command again, with fewer workers"
        ) from error
    finally:
        _stop(executor, futures, queue)


def _collect(
    futures: dict["Future[PartReport | str]", int],
    queue: "SimpleQueue[tuple[int, int]]",
    on_progress: OnProgress,
) -> Iterator[tuple[int, PartReport]]:
    left = set(futures)
    while left:
        done, left = wait(left, timeout=_POLL_SECONDS, return_when=FIRST_COMPLETED)
        for _ in range(_MESSAGES_PER_POLL):
            if queue.empty():
                break
            on_progress(*queue.get())
        for future in sorted(done, key=lambda future: futures[future]):
            result = future.result()
            if isinstance(result, str):
                raise ValueError(result)
            yield futures[future], result
    while not queue.empty():
        on_progress(*queue.get())


def _stop(
    executor: ProcessPoolExecutor,
    futures: Iterable["Future[PartReport | str]"],
    queue: "SimpleQueue[tuple[int, int]]",
) -> None:
    """Wait for the parts that are being built; those not begun are left."""
    for future in futures:
        future.cancel()
    # A worker that tells its progress blocks once the queue is full.
    while wait(futures, timeout=_POLL_SECONDS).not_done:
        while not queue.empty():
            queue.get()
    # Waits for every process, those still starting included: they need what this one holds.
    executor.shutdown(wait=True)


class _Worker:
    """State of a worker process, set once when it starts."""

    builder: PartBuilder
    queue: "SimpleQueue[tuple[int, int]]"


def _start(builder: PartBuilder, queue: "SimpleQueue[tuple[int, int]]") -> None:
    # A worker whose build was killed would go on to the end of its list, for nobody.
    threading.Thread(target=_leave_with_parent, daemon=True).start()
    _Worker.builder = builder
    _Worker.queue = queue


def _leave_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _work(part: Part, prefix: str) -> PartReport | str:
    def tell(num_bytes: int, num_tokens: int) -> None:
        _Worker.queue.put((num_bytes, num_tokens))

    try:
        return _Worker.builder.build(part, prefix, tell)
    except ValueError as error:
        return str(error)
