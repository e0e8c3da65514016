"""Rows in training order, dealt out to data-parallel ranks.

A step takes the next `rows_per_step` rows of the stream whatever the layout, so the only state
is how many rows were taken, where the group of rows that is being taken began, and which stream
it was. Steps are built ahead by a thread or by worker processes, which changes nothing but the
time that `next_step` takes.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from megatron_sdar.data.loading.blend import BlendSchedule
from megatron_sdar.data.loading.documents import DocumentStore
from megatron_sdar.data.loading.grouped_stream import GroupedStream, GroupStart
from megatron_sdar.data.loading.packing import PackedIndex
from megatron_sdar.data.loading.row_options import RowOptions
from megatron_sdar.data.loading.row_stream import RowPart, RowStream
from megatron_sdar.data.loading.row_workers import (
    BuiltStep,
    ProcessesAhead,
    StepsAhead,
    ThreadAhead,
)
from megatron_sdar.diffusion.rows import Row, concatenate_rows

__all__ = ["BlendSchedule", "DocumentStore", "RowLoader", "RowOptions", "RowPart", "RowStream"]


class DocumentName(NamedTuple):
    """A document: the prefix of its token files, its number there, and which piece of it."""

    dataset: str
    document: int
    piece: int


class RowLoader:
    """Micro-batches of one data-parallel rank.

    Args:
        store: the documents; for a blend one store per dataset, selections of the same one.
        index: which documents share a row; for a blend one per dataset.
        options: how rows are made.
        rows_per_micro_batch: per_device_train_batch_size.
        num_micro_batches: gradient_accumulation_steps.
        dp_rank, dp_size: whose rows; micro-batch m of rank r takes the (m * dp_size + r)-th
            group of rows of the step.
        schedule: weights of a blend.
        repack: with semantics exact, pack documents again by what their noise leaves; False
            leaves every packed row's documents together.
        num_workers: processes that build steps ahead (dataloader_num_workers).
        prefetch: with 0 workers, build the next step in a thread while the current one computes.

    Attributes:
        position: rows of the stream taken so far.
        wait_seconds: time spent in `next_step`.

    Raises:
        ValueError: the schedule is not for this number of datasets.
    """

    def __init__(
        self,
        store: DocumentStore | Sequence[DocumentStore],
        index: PackedIndex | Sequence[PackedIndex],
        options: RowOptions,
        *,
        rows_per_micro_batch: int,
        num_micro_batches: int,
        dp_rank: int,
        dp_size: int,
        schedule: BlendSchedule | None = None,
        repack: bool = True,
        num_workers: int = 0,
        prefetch: bool = False,
    ) -> None:
        stores = [store] if isinstance(store, DocumentStore) else store
        indexes = [index] if isinstance(index, PackedIndex) else index
        parts = [RowPart(*part) for part in zip(stores, indexes, strict=True)]
        self.stream = RowStream(parts, options, schedule)
        self.grouped = None
        if options.semantics == "exact":
            self.grouped = GroupedStream(self.stream, repack=repack)
        self._group: GroupStart | None = None
        self._source_rows = 0.0
        self.rows_per_micro_batch = rows_per_micro_batch
        self.num_micro_batches = num_micro_batches
        self.dp_rank = dp_rank
        self.dp_size = dp_size
        self.position = 0
        self.wait_seconds = 0.0
        self._ahead: StepsAhead | None = None
        if num_workers:
            self._ahead = ProcessesAhead(self._build, self.rows_per_step, num_workers)
        elif prefetch:
            self._ahead = ThreadAhead(self._build, self.rows_per_step)

    @property
    def num_rows(self) -> int:
        """Packed rows of one epoch; with semantics exact fewer rows are made of them."""
        return self.stream.num_rows

    @property
    def row_length(self) -> int:
        """Tokens of a row."""
        if self.grouped is None:
            return 2 * self.stream.options.cutoff_len
        return self.grouped.row_length

    @property
    def packed_rows_per_row(self) -> float:
        """How many packed rows a row stands for, measured on the first group."""
        if self.grouped is None:
            return 1.0
        return self.grouped.first_group_saving()

    def count_rows(self, epochs: float, worker: int = 0, num_workers: int = 1) -> float:
        """This worker's share of the rows of this many epochs, see `GroupedStream.count_rows`.

        Without a count by noise (semantics paper) worker 0 has all of it.
        """
        if self.grouped is None:
            return epochs * self.num_rows if worker == 0 else 0.0
        return self.grouped.count_rows(math.ceil(epochs * self.num_rows), worker, num_workers)

    @property
    def rows_per_step(self) -> int:
        """Rows all data-parallel ranks take in one step."""
        return self.rows_per_micro_batch * self.num_micro_batches * self.dp_size

    @property
    def epoch(self) -> float:
        """Passes over the data so far; of a blend, rows taken over rows of all its datasets."""
        return self._source_rows / self.num_rows

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint must keep: JSON, a few hundred bytes."""
        return self._state(self.position, self._source_rows)

    def _state(self, position: int, source_rows: float) -> dict[str, Any]:
        return {
            "rows_taken": position,
            "packed_rows_taken": source_rows,
            "group": None if self._group is None else self._group.to_json(),
            "stream": self.stream.identity(position),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a checkpoint's position.

        Raises:
            ValueError: the checkpoint's stream of rows is not this one, so its position would
                repeat some documents and skip others.
        """
        position = int(state["rows_taken"])
        ours = self.stream.identity(position)
        theirs = {**RowOptions.defaults(), **state["stream"]}
        changed = [
            f"{key} was {theirs.get(key)!r}, now {value!r}"
            for key, value in ours.items()
            if theirs.get(key) != value
        ]
        if changed:
            raise ValueError(
                f"cannot resume: the data differs from the checkpoint's ({'; '.join(changed)}); "
                "resume with the same data and keys, or start a new run (another output_dir, "
                "model_name_or_path: the exported model)"
            )
        self.position = position
        self._source_rows = float(state["packed_rows_taken"])
        if self.grouped is not None and state["group"] is not None:
            self._group = GroupStart.from_json(state["group"])
            self.grouped.restart(self._group)

    def next_step(self) -> list[Row]:
        """This rank's micro-batches of the next step; advances the position."""
        started = time.perf_counter()
        build = self._build if self._ahead is None else self._ahead.take
        step = build(self.position)
        self.position += self.rows_per_step
        self._group, self._source_rows = step.group, step.source_rows
        self.wait_seconds += time.perf_counter() - started
        return step.micro_batches

    def step_at(self, position: int) -> list[Row]:
        """This rank's micro-batches of the step that begins after `position` rows."""
        return self._build(position).micro_batches

    def last_step_state(self) -> dict[str, Any]:
        """What `load_state_dict` takes to give the last step's rows again."""
        first = self.position - self.rows_per_step
        source_rows = float(first)
        if self.grouped is not None:
            assert self._group is not None, "a step was taken"
            source_rows = self.grouped.source_position(self._group, first)
        return self._state(first, source_rows)

    def last_step_documents(self) -> list[list[DocumentName]]:
        """Documents of the last step's micro-batches of all data-parallel ranks.

        Micro-batch m of rank r is number m * dp_size + r.
        """
        first = self.position - self.rows_per_step
        stream: RowStream | GroupedStream = self.stream
        if self.grouped is not None:
            assert self._group is not None, "a step was taken"
            # A thread that builds ahead may be at its own place in the stream.
            stream = self.grouped.beginning_at(self._group)
        store, size = self.stream.parts[0].store, self.rows_per_micro_batch
        rows = [
            [DocumentName(*store.name(number), piece) for number, piece in stream.documents_at(row)]
            for row in range(first, self.position)
        ]
        return [
            [name for row in rows[begin : begin + size] for name in row]
            for begin in range(0, len(rows), size)
        ]

    def _build(self, position: int) -> BuiltStep:
        # The step's first row, which all ranks pass, tells where a resumed run begins to look.
        end, group, source_rows = position + self.rows_per_step, None, 0.0
        if self.grouped is None:
            source_rows = float(end)
        else:
            group = self.grouped.start_at(position)
            source_rows = self.grouped.source_position(group, end)
        batches = [
            self.micro_batch_at(position, micro_batch * self.dp_size + self.dp_rank)
            for micro_batch in range(self.num_micro_batches)
        ]
        return BuiltStep(batches, group, source_rows)

    def micro_batch_at(self, position: int, number: int) -> Row:
        """A micro-batch of the step that begins after `position` rows.

        Args:
            number: counted over all data-parallel ranks, see `last_step_documents`.
        """
        row_at = self.stream.row_at if self.grouped is None else self.grouped.row_at
        first = position + number * self.rows_per_micro_batch
        return concatenate_rows([row_at(first + i) for i in range(self.rows_per_micro_batch)])

    def make_row(self, document_ids: NDArray[np.int64], epoch: int) -> Row:
        """One row of whole documents as published, see `RowStream.make_row`."""
        return self.stream.make_row(document_ids, epoch)

    def close(self) -> None:
        """Stop the thread or the processes that build ahead."""
        if self._ahead is not None:
            self._ahead.close()
