"""Steps built ahead of time, by a thread of this process or by worker processes.

Both hand out what `build(position)` returns, in order, and start over when asked for another
position than the next: how steps are built never changes what they hold. Errors of a builder
are raised by `take`, as if it had built the step itself.
"""

from __future__ import annotations

import atexit
import signal
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Protocol, cast

from megatron_sdar.data.loading.grouped_stream import GroupStart
from megatron_sdar.diffusion.rows import Row


@dataclass(frozen=True)
class BuiltStep:
    """One step of one rank.

    Attributes:
        micro_batches: its rows.
        group: where the group of the step's first row begins; None without groups.
        source_rows: packed rows that all rows up to the end of the step stand for.
    """

    micro_batches: list[Row]
    group: GroupStart | None
    source_rows: float


Builder = Callable[[int], BuiltStep]

# Far beyond any training run, small enough for len() of a range.
_ENDLESS = 2**62
_STEPS_PER_WORKER = 2


class StepsAhead(Protocol):
    """Where the loader gets its steps from."""

    def take(self, position: int) -> BuiltStep:
        """The step that begins at a position; the next one is begun."""

    def close(self) -> None:
        """Stop building; may be called twice."""


class ThreadAhead:
    """One thread builds the next step while the current one computes."""

    def __init__(self, build: Builder, rows_per_step: int) -> None:
        self._build = build
        self._rows_per_step = rows_per_step
        self._pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="rows")
        self._next: tuple[int, Future[BuiltStep]] | None = None

    def take(self, position: int) -> BuiltStep:
        if self._next is None or self._next[0] != position:
            self._next = (position, self._pool.submit(self._build, position))
        rows = self._next[1].result()
        following = position + self._rows_per_step
        self._next = (following, self._pool.submit(self._build, following))
        return rows

    def close(self) -> None:
        self._pool.shutdown(wait=True, cancel_futures=True)


class ProcessesAhead:
    """Worker processes of a torch DataLoader, each two steps ahead.

    Workers are forked: they share the mapped token files and the pack index with this process
    instead of copying them. They touch no device and no process group.
    """

    def __init__(self, build: Builder, rows_per_step: int, num_workers: int) -> None:
        self._steps = _Steps(build)
        self._rows_per_step = rows_per_step
        self._num_workers = num_workers
        self._iterator: Iterator[BuiltStep | _Failure] | None = None
        self._position = 0

    def take(self, position: int) -> BuiltStep:
        try:
            if self._iterator is None or position != self._position:
                self.close()
                self._iterator = self._start(position)
                self._position = position
            rows = next(self._iterator)
        except RuntimeError as error:
            self.close()
            raise ValueError(
                f"dataloader_num_workers {self._num_workers}: a worker process ended ({error}); "
                "use fewer workers, or 0, if memory is short"
            ) from error
        if isinstance(rows, _Failure):
            self.close()
            raise ValueError(rows.message)
        self._position += self._rows_per_step
        return rows

    def close(self) -> None:
        # The iterator stops and joins its workers when it goes.
        self._iterator = None

    def _start(self, position: int) -> Iterator[BuiltStep | _Failure]:
        # Imported here: whoever only reads or tokenises data starts without torch.
        import torch
        from torch.utils.data import DataLoader

        # Python ends what is left of its children by the signal that these ignore. Registered after
        # torch's own, hence called before it, when workers can still be told to end.
        atexit.register(_close, weakref.ref(self))
        loader: DataLoader[Any] = DataLoader(
            cast(Any, self._steps),
            batch_size=None,
            sampler=range(position, _ENDLESS, self._rows_per_step),
            num_workers=self._num_workers,
            prefetch_factor=_STEPS_PER_WORKER,
            collate_fn=cast(Any, _as_is),
            worker_init_fn=_ignore_stop_signals,
            multiprocessing_context="fork",
            # Its own, since the default takes a number from torch's global generator.
            generator=torch.Generator(),
        )
        return iter(loader)


@dataclass(frozen=True)
class _Failure:
    message: str


class _Steps:
    """The steps as a data set of torch: item p is the step that begins at row p."""

    def __init__(self, build: Builder) -> None:
        self._build = build

    def __getitem__(self, position: int) -> BuiltStep | _Failure:
        try:
            return self._build(position)
        except ValueError as error:
            return _Failure(str(error))


def _close(rows: weakref.ref[ProcessesAhead]) -> None:
    if (left := rows()) is not None:
        left.close()


def _ignore_stop_signals(worker: int) -> None:
    """Who signals all processes of a job wants them to finish the step, which needs its rows.

    Workers end when their parent does.
    """
    del worker
    for number in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)


def _as_is(step: BuiltStep | _Failure) -> BuiltStep | _Failure:
    return step
