"""Documents -> one packed row: ids, positions, targets, weights and per-query key intervals.

A row holds the clean copies of its documents one after the other, then their noisy copies, then
padding up to a fixed length. A copy is a list of kept blocks: the published semantics keep all
of them, and leaving blocks out or adding views changes only what is passed in here. Invariants:
nothing crosses documents, every query sees at least one key, and what a query may see is the
union of two contiguous ranges: [document start, end of visible clean) and its own noisy block.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from megatron_sdar.diffusion.loss import token_weights
from megatron_sdar.diffusion.noise import NoiseDraw

IGNORED_LABEL = -100


@dataclass(frozen=True)
class View:
    """One noisy copy: its noise and the block indices kept in the row (ascending)."""

    noise: NoiseDraw
    kept_blocks: NDArray[np.int64]


@dataclass(frozen=True)
class RowDocument:
    """One document of n tokens, n a multiple of the block length.

    Attributes:
        ids, labels: int [n]; label IGNORED_LABEL marks prompt tokens.
        num_clean_blocks: how many leading blocks of the clean copy are kept.
        views: noisy copies.
    """

    ids: NDArray[np.int32]
    labels: NDArray[np.int32]
    num_clean_blocks: int
    views: tuple[View, ...]


@dataclass(frozen=True)
class Row:
    """One or several packed rows on one token axis of length T, with M masked tokens.

    Attributes:
        input_ids: int64 [T]; position_ids: int64 [T], restarting at 0 in every document.
        key_intervals: int32 [T, 4], see sdar_kernels.reference.dense_mask.
        segment_starts: int64 [S], where clean copies, noisy copies and padding begin.
        loss_positions: int64 [M], indices of masked noisy tokens on the token axis.
        target_ids: int64 [M], the clean token of each.
        loss_weights: float64 [M], 1/p.
        num_label_tokens: label tokens of the documents, masked or not (the denominator).
        num_padding: padding tokens at the end.
    """

    input_ids: NDArray[np.int64]
    position_ids: NDArray[np.int64]
    key_intervals: NDArray[np.int32]
    segment_starts: NDArray[np.int64]
    loss_positions: NDArray[np.int64]
    target_ids: NDArray[np.int64]
    loss_weights: NDArray[np.float64]
    num_label_tokens: int
    num_padding: int

    @property
    def num_tokens(self) -> int:
        return int(self.input_ids.shape[0])


def full_copies(
    ids: NDArray[np.int32], labels: NDArray[np.int32], block_length: int, noise: NoiseDraw
) -> RowDocument:
    """The published form: the whole clean copy and the whole noisy copy."""
    blocks = ids.size // block_length
    return RowDocument(ids, labels, blocks, (View(noise, np.arange(blocks)),))


def build_row(
    documents: Sequence[RowDocument],
    row_length: int,
    block_length: int,
    mask_token_id: int,
    pad_token_id: int,
) -> Row:
    """Lay documents out in one row of `row_length` tokens.

    Raises:
        ValueError: if the kept blocks do not fit in `row_length`.
    """
    layout = _RowLayout(row_length, block_length, mask_token_id, pad_token_id)
    clean_starts = [layout.add_clean(document) for document in documents]
    for document, clean_start in zip(documents, clean_starts, strict=True):
        for view in document.views:
            layout.add_noisy(document, view, clean_start)
    return layout.finish(
        sum(int((document.labels != IGNORED_LABEL).sum()) for document in documents)
    )


def concatenate_rows(rows: Sequence[Row]) -> Row:
    """Put rows behind each other on one token axis; they stay invisible to each other."""
    offsets = np.cumsum([0] + [row.num_tokens for row in rows[:-1]])
    pairs = list(zip(rows, offsets, strict=True))
    return Row(
        input_ids=np.concatenate([row.input_ids for row in rows]),
        position_ids=np.concatenate([row.position_ids for row in rows]),
        key_intervals=np.concatenate(
            [row.key_intervals + np.int32(offset) for row, offset in pairs]
        ),
        segment_starts=np.concatenate([row.segment_starts + offset for row, offset in pairs]),
        loss_positions=np.concatenate([row.loss_positions + offset for row, offset in pairs]),
        target_ids=np.concatenate([row.target_ids for row in rows]),
        loss_weights=np.concatenate([row.loss_weights for row in rows]),
        num_label_tokens=sum(row.num_label_tokens for row in rows),
        num_padding=sum(row.num_padding for row in rows),
    )


class _RowLayout:
    """Append-only arrays of one row."""

    def __init__(
        self, row_length: int, block_length: int, mask_token_id: int, pad_token_id: int
    ) -> None:
        self.block_length = block_length
        self.mask_token_id = mask_token_id
        self.row_length = row_length
        self.end = 0
        self.input_ids = np.full(row_length, pad_token_id, dtype=np.int64)
        self.position_ids = np.zeros(row_length, dtype=np.int64)
        self.key_intervals = np.zeros((row_length, 4), dtype=np.int32)
        self.segment_starts: list[int] = []
        self.loss_positions: list[NDArray[np.int64]] = []
        self.target_ids: list[NDArray[np.int64]] = []
        self.loss_weights: list[NDArray[np.float64]] = []

    def _claim(self, count: int) -> slice:
        start, self.end = self.end, self.end + count
        if self.end > self.row_length:
            raise ValueError(
                f"documents need {self.end} tokens but the row holds {self.row_length}; "
                "the pack index does not fit this cutoff_len: build it again"
            )
        if count:
            self.segment_starts.append(start)
        return slice(start, self.end)

    def add_clean(self, document: RowDocument) -> int:
        """Append the kept clean blocks; returns where they start."""
        count = document.num_clean_blocks * self.block_length
        claimed = self._claim(count)
        positions = np.arange(count)
        self.input_ids[claimed] = document.ids[:count]
        self.position_ids[claimed] = positions
        intervals = self.key_intervals[claimed]
        intervals[:, 0] = claimed.start
        # A clean query sees clean blocks up to and including its own.
        intervals[:, 1] = claimed.start + (positions // self.block_length + 1) * self.block_length
        return claimed.start

    def add_noisy(self, document: RowDocument, view: View, clean_start: int) -> None:
        """Append the kept noisy blocks of one view."""
        block = self.block_length
        claimed = self._claim(view.kept_blocks.size * block)
        block_starts = np.repeat(view.kept_blocks * block, block)
        assert document.num_clean_blocks * block >= block_starts.max(initial=0), (
            "a kept noisy block needs all clean blocks before it"
        )
        sources = block_starts + np.tile(np.arange(block), view.kept_blocks.size)
        masked = view.noise.masked[sources]
        self.input_ids[claimed] = np.where(masked, self.mask_token_id, document.ids[sources])
        self.position_ids[claimed] = sources
        intervals = self.key_intervals[claimed]
        intervals[:, 0] = clean_start
        intervals[:, 1] = clean_start + block_starts
        own = claimed.start + np.arange(sources.size) // block * block
        intervals[:, 2] = own
        intervals[:, 3] = own + block
        self.loss_positions.append(claimed.start + np.flatnonzero(masked))
        self.target_ids.append(document.ids[sources][masked].astype(np.int64))
        self.loss_weights.append(token_weights(view.noise.mask_prob, int(masked.sum())))

    def finish(self, num_label_tokens: int) -> Row:
        """Close the row: each padding token is a document of its own and sees itself only."""
        padding = slice(self.end, self.row_length)
        num_padding = self.row_length - self.end
        if num_padding:
            self.segment_starts.append(self.end)
            places = np.arange(self.end, self.row_length)
            self.key_intervals[padding, 0] = places
            self.key_intervals[padding, 1] = places + 1
        return Row(
            input_ids=self.input_ids,
            position_ids=self.position_ids,
            key_intervals=self.key_intervals,
            segment_starts=np.array(self.segment_starts, dtype=np.int64),
            loss_positions=np.concatenate([np.zeros(0, np.int64), *self.loss_positions]),
            target_ids=np.concatenate([np.zeros(0, np.int64), *self.target_ids]),
            loss_weights=np.concatenate([np.zeros(0, np.float64), *self.loss_weights]),
            num_label_tokens=num_label_tokens,
            num_padding=num_padding,
        )
