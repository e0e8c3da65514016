"""The stream of training rows, packed by what the noise leaves of every document.

How many tokens a document takes is known once its noise is drawn. So the rows of `RowStream`
(packed by length, in the order of the epoch) are taken a group at a time: noise is drawn for all
documents of the group, only blocks with a part in the loss are kept, and what is left is packed
again, into fewer rows. Everything follows from where the group starts, which is a few numbers.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping
from copy import copy
from dataclasses import asdict, dataclass
from functools import lru_cache
from typing import Any

import numpy as np

from megatron_sdar.data.loading.blend import BlendSchedule
from megatron_sdar.data.loading.group import Group, build_group
from megatron_sdar.data.loading.row_stream import RowStream
from megatron_sdar.diffusion.rows import Row, build_row

# Packed rows that are taken together: the last row of each group stays partly empty.
GROUP_ROWS = 256


@dataclass(frozen=True)
class GroupStart:
    """Where a group begins: all that its rows depend on besides the stream's identity.

    Attributes:
        number: groups before it.
        first_row: training rows before it.
        base: packed rows of every dataset taken before the current segment of the blend.
        taken: packed rows taken since then.
    """

    number: int
    first_row: int
    base: tuple[int, ...]
    taken: int

    @property
    def num_source_rows(self) -> int:
        """Packed rows before the group."""
        return sum(self.base) + self.taken

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, state: Mapping[str, Any]) -> GroupStart:
        return cls(**{**state, "base": tuple(state["base"])})


class GroupedStream:
    """Training rows by position.

    Args:
        source: packed rows, their options and their blend. The segments of the blend begin at
            training rows.
        repack: False keeps the documents of every packed row together (one row for each).

    Raises:
        ValueError: row_length does not fit the documents, or needs what cannot be.
    """

    def __init__(self, source: RowStream, *, repack: bool = True) -> None:
        self.source = source
        self.options = source.options
        self.group_rows = GROUP_ROWS if repack else 1
        if self.row_length < self.safe_row_length:
            self._check_short_rows(repack)
        segments = None if source.schedule is None else source.schedule.segments
        self._segments = [] if segments is None else segments
        self._dealers = [BlendSchedule([(0, weights)]) for _, weights in self._segments]
        self._starts = [self._beginning()]
        self._built = lru_cache(maxsize=2)(self._build)

    @property
    def num_rows(self) -> int:
        """Packed rows of one epoch."""
        return self.source.num_rows

    @property
    def row_length(self) -> int:
        """Tokens of a row."""
        return self.options.row_length or self.safe_row_length

    @property
    def safe_row_length(self) -> int:
        """Room for the longest document whatever its noise."""
        return (1 + self.options.num_views) * self.options.cutoff_len

    def identity(self, position: int) -> dict[str, object]:
        """See `RowStream.identity`."""
        return self.source.identity(position)

    def restart(self, start: GroupStart) -> None:
        """Go on from a start that `start_at` told earlier."""
        self._starts = [start]

    def start_at(self, position: int) -> GroupStart:
        """The start of the group that holds the row at a position."""
        if position < self._starts[0].first_row:
            self._starts = [self._beginning()]
        known = bisect_right(self._starts, position, key=lambda start: start.first_row) - 1
        start = self._starts[known]
        while True:
            group = self._built(start)
            if position < start.first_row + len(group.rows):
                return start
            start = self._after(start, group)
            if start.first_row > self._starts[-1].first_row:
                self._starts.append(start)

    def row_at(self, position: int) -> Row:
        """The row at a position of the stream."""
        start = self.start_at(position)
        group = self._built(start)
        members = group.rows[position - start.first_row]
        options = self.options
        return build_row(
            group.documents(self.source, members),
            self.row_length,
            group.block_length,
            options.mask_token_id,
            options.pad_token_id,
        )

    def documents_at(self, position: int) -> list[tuple[int, int]]:
        """(document id, which piece of it) of the row at a position."""
        start = self.start_at(position)
        group = self._built(start)
        members = [group.items[number] for number in group.rows[position - start.first_row]]
        return [(int(item.document_id), int(item.piece)) for item in members]

    def beginning_at(self, start: GroupStart) -> GroupedStream:
        """The same stream with places of its own, which another thread may use meanwhile."""
        other = copy(self)
        other.restart(start)
        return other

    def source_position(self, start: GroupStart, position: int) -> float:
        """Packed rows that the first `position` rows stand for, counted from a start near it."""
        group = self._built(start)
        share = (position - start.first_row) / len(group.rows)
        return start.num_source_rows + share * group.num_source_rows

    def first_group_saving(self) -> float:
        """Packed rows per row in the first group."""
        group = self._built(self._beginning())
        return group.num_source_rows / len(group.rows)

    def count_rows(self, num_source_rows: int, worker: int = 0, num_workers: int = 1) -> float:
        """This worker's share of the rows that the first packed rows of one dataset become.

        The shares of all workers sum to the whole; a last group that is needed in part only
        counts in proportion. While the block length changes, groups depend on all before them:
        then worker 0 has the whole.
        """
        assert not self._segments, "a blend has no end"
        total = 0.0
        if len(self.options.block_lengths) > 1:
            start = self._beginning()
            while worker == 0 and start.num_source_rows < num_source_rows:
                group = self._build(start)
                share = (num_source_rows - start.num_source_rows) / group.num_source_rows
                total += len(group.rows) * min(1.0, share)
                start = self._after(start, group)
            return total
        number, begin = 0, 0
        while begin < num_source_rows:
            end = self._group_end(begin)
            if number % num_workers == worker:
                rows = len(self._build(GroupStart(number, 0, (0,), begin)).rows)
                total += rows * min(1.0, (num_source_rows - begin) / (end - begin))
            number, begin = number + 1, end
        return total

    def _check_short_rows(self, repack: bool) -> None:
        """Refuse a row_length that some document's noise could exceed."""
        length = self.row_length
        changes = len(self.source.parts) > 1 or len(self.options.block_lengths) > 1
        if not repack or changes:
            raise ValueError(
                f"row_length {length} is below (1 + noisy_views) * cutoff_len = "
                f"{self.safe_row_length}, which needs packing (neat_packing: true), one dataset "
                "(no mix_strategy: blend) and one block length (no block_length_schedule); leave "
                "row_length out"
            )
        ((store, index),) = ((part.store, part.index) for part in self.source.parts)
        sizes = np.minimum(store.lengths[np.unique(index.doc_ids)], index.limit)
        block = self.options.block_length
        longest = int(-(-int(sizes.max()) // block) * block) * (1 + self.options.num_views)
        if longest > length:
            raise ValueError(
                f"row_length {length} is too short: the longest document may take {longest} "
                f"tokens with its {self.options.num_views} noisy views; use at least that, or "
                "lower cutoff_len"
            )

    def _beginning(self) -> GroupStart:
        return GroupStart(0, 0, (0,) * len(self.source.parts), 0)

    def _after(self, start: GroupStart, group: Group) -> GroupStart:
        first_row = start.first_row + len(group.rows)
        base, taken = start.base, start.taken + group.num_source_rows
        if self._segments and self._segment(first_row) != self._segment(start.first_row):
            counts = self._dealers[self._segment(start.first_row)].counts(taken)
            base, taken = tuple(b + c for b, c in zip(base, counts, strict=True)), 0
        return GroupStart(start.number + 1, first_row, base, taken)

    def _segment(self, row: int) -> int:
        return bisect_right(self._segments, row, key=lambda segment: segment[0]) - 1

    def _group_end(self, begin: int) -> int:
        """Of one dataset: groups divide an epoch as evenly as they can."""
        num_rows = self.num_rows
        num_groups = -(-num_rows // self.group_rows)
        epoch, place = divmod(begin, num_rows)
        number = place * num_groups // num_rows + 1
        while number * num_rows // num_groups <= place:
            number += 1
        return epoch * num_rows + number * num_rows // num_groups

    def _rows_until_change(self, row: int) -> int:
        """Rows from this one to the next change of weights or block length, at most a group's.

        A group never gives more rows than it takes, so what changes does so exactly at its row:
        groups in front of it become smaller and smaller.
        """
        firsts = [first for first, _ in (*self._segments, *self.options.block_lengths)]
        return min([self.group_rows, *(first - row for first in firsts if first > row)])

    def _source_rows(self, start: GroupStart) -> list[tuple[int, int]]:
        """(dataset, which of its packed rows over all epochs) of a group."""
        size = self._rows_until_change(start.first_row)
        if not self._segments:
            end = min(self._group_end(start.taken), start.taken + size)
            return [(0, place) for place in range(start.taken, end)]
        segment = self._segment(start.first_row)
        dealt = [self._dealers[segment].locate(start.taken + i) for i in range(size)]
        return [(part, start.base[part] + count) for part, count in dealt]

    def _build(self, start: GroupStart) -> Group:
        return build_group(
            self.source,
            self._source_rows(start),
            start.number,
            self.options.block_length_at(start.first_row),
            self.row_length if self.group_rows > 1 else None,
        )
