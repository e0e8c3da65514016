"""The stream of training rows, packed by what the noise leaves of every document.

How many tokens a document takes is known once its noise is drawn. So the rows of `RowStream`
(packed by length, in the order of the epoch) are taken a group at a time: noise is drawn for all
documents of the group, only blocks with a part in the loss are kept, and what is left is packed
again, into fewer rows. Everything follows from where the group starts, which is a few numbers.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_sdar.data.loading.blend import BlendSchedule
from megatron_sdar.data.loading.packing import fill_rows, pad_to_block
from megatron_sdar.data.loading.row_stream import RowStream
from megatron_sdar.diffusion.noise import (
    GROUP_STREAM,
    NoiseDraw,
    NoiseKey,
    draw_views,
    philox_words,
)
from megatron_sdar.diffusion.rows import IGNORED_LABEL, Row, RowDocument, build_row
from megatron_sdar.diffusion.savings import kept_copies, num_row_blocks

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


@dataclass(frozen=True)
class _Item:
    """One document (or piece) of a group, without its tokens."""

    part: int
    document_id: int
    piece: int
    noises: tuple[NoiseDraw, ...]


@dataclass(frozen=True)
class _Group:
    """Its items, which of them share a row, and how many packed rows they came from."""

    items: list[_Item]
    rows: list[list[int]]
    num_source_rows: int


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
        documents = [self._document(group.items[number]) for number in members]
        options = self.options
        return build_row(
            documents,
            self.row_length,
            options.block_length,
            options.mask_token_id,
            options.pad_token_id,
        )

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
        counts in proportion.
        """
        assert not self._segments, "a blend has no end"
        total = 0.0
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
        if not repack or len(self.source.parts) > 1:
            raise ValueError(
                f"row_length {length} is below (1 + noisy_views) * cutoff_len = "
                f"{self.safe_row_length}, which needs packing (neat_packing: true) and one "
                "dataset (no mix_strategy: blend); leave row_length out"
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

    def _after(self, start: GroupStart, group: _Group) -> GroupStart:
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

    def _source_rows(self, start: GroupStart) -> list[tuple[int, int]]:
        """(dataset, which of its packed rows over all epochs) of a group."""
        if not self._segments:
            return [(0, place) for place in range(start.taken, self._group_end(start.taken))]
        segment = self._segment(start.first_row)
        size = self.group_rows
        if segment + 1 < len(self._segments):
            # A group never gives more rows than it takes, so the next segment begins exactly at
            # its row: groups in front of it become smaller and smaller.
            size = min(size, self._segments[segment + 1][0] - start.first_row)
        dealt = [self._dealers[segment].locate(start.taken + i) for i in range(size)]
        return [(part, start.base[part] + count) for part, count in dealt]

    def _build(self, start: GroupStart) -> _Group:
        places = self._source_rows(start)
        by_epoch: dict[int, list[tuple[int, int, int]]] = {}
        for part, place in places:
            epoch, row = self.source.row_of(part, place)
            index, store = self.source.parts[part].index, self.source.parts[part].store
            pairs = zip(store.ids_at(index.row(row)), index.row_pieces(row), strict=True)
            chosen = [(part, int(document), int(piece)) for document, piece in pairs]
            by_epoch.setdefault(epoch, []).extend(chosen)
        items: list[_Item] = []
        costs: list[int] = []
        for epoch, chosen in by_epoch.items():
            for item, cost in self._draw(epoch, chosen):
                items.append(item)
                costs.append(cost)
        rows = self._pack(costs, start.number)
        return _Group(items, rows, len(places))

    def _draw(self, epoch: int, chosen: list[tuple[int, int, int]]) -> list[tuple[_Item, int]]:
        """Every document with its noise and the blocks it takes in a row."""
        options = self.options
        tokens = [self._tokens(*place) for place in chosen]
        views = draw_views(
            NoiseKey(options.seed, epoch),
            [document for _, document, _ in chosen],
            [piece for _, _, piece in chosen],
            [ids.size for ids, _ in tokens],
            np.concatenate([labels for _, labels in tokens]) != IGNORED_LABEL,
            options.noise_eps,
            options.num_views,
            options.complementary_views,
        )
        return [
            (
                _Item(*place, noises),
                num_row_blocks(kept_copies(ids, labels, options.block_length, noises)),
            )
            for place, (ids, labels), noises in zip(chosen, tokens, views, strict=True)
        ]

    def _pack(self, costs: list[int], number: int) -> list[list[int]]:
        """Which items share a row, rows in a random order of the group's own."""
        if self.group_rows == 1:
            return [list(range(len(costs)))]
        sizes = np.array(costs, dtype=np.int64)
        silent = np.flatnonzero(sizes == 0).tolist()
        if len(silent) == len(costs):
            return [silent]
        offsets, order = fill_rows(sizes, self.row_length // self.options.block_length)
        rows = [part.tolist() for part in np.split(order, offsets[1:-1])]
        # They take no room, but their label tokens count in the loss's denominator.
        for place, item in enumerate(silent):
            rows[place % len(rows)].append(item)
        if self.options.shuffle:
            words = philox_words(self.options.seed, number, (GROUP_STREAM, 0, 0), len(rows))
            rows = [rows[place] for place in np.argsort(words, kind="stable")]
        return rows

    def _document(self, item: _Item) -> RowDocument:
        ids, labels = self._tokens(item.part, item.document_id, item.piece)
        return kept_copies(ids, labels, self.options.block_length, item.noises)

    def _tokens(
        self, part: int, document_id: int, piece: int
    ) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
        """ids and labels of a document, truncated and padded to whole blocks."""
        kept = self.source.kept(self.source.parts[part], document_id, piece)
        return pad_to_block(*kept, self.options.block_length, self.options.pad_token_id)
