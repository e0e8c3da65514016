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
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, DTypeLike, NDArray

from megatron_sdar.diffusion.loss import block_weights
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
        loss_weights: float64 [M], 1/p, or what the noise schedule puts in its place.
        num_label_tokens: label tokens of the documents, masked or not, once per noisy view: the
            denominator.
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

    All tokens of a block of one copy see the same keys, so the layout is worked out per block,
    for all documents at once.

    Raises:
        ValueError: if the kept blocks do not fit in `row_length`.
    """
    blocks = _lay_out_blocks(documents, block_length)
    end = blocks.sources.size * block_length
    if end > row_length:
        raise ValueError(
            f"documents need {end} tokens but the row holds {row_length}; "
            "the pack index does not fit this cutoff_len: build it again"
        )
    ids = _join([document.ids for document in documents], np.int32)
    input_ids = np.full(row_length, pad_token_id, dtype=np.int64)
    input_ids[:end] = _take_blocks(ids, blocks.sources, block_length)
    position_ids = np.zeros(row_length, dtype=np.int64)
    position_ids[:end] = _take_blocks(np.arange(ids.size), blocks.positions, block_length)
    key_intervals = np.zeros((row_length, 4), dtype=np.int32)
    key_intervals[:end] = np.repeat(blocks.key_intervals, block_length, axis=0)
    # Each padding token is a document of its own: it sees itself only, as a noisy block does
    # that has no clean block before it.
    key_intervals[end:, :2] = end
    key_intervals[end:, 2] = np.arange(end, row_length)
    key_intervals[end:, 3] = np.arange(end + 1, row_length + 1)
    views = [view for document in documents for view in document.views]
    masked = _join([view.noise.masked for view in views], np.bool_)
    masked_places = np.flatnonzero(_take_blocks(masked, blocks.mask_sources, block_length))
    loss_positions = end - blocks.mask_sources.size * block_length + masked_places
    target_ids = input_ids[loss_positions]
    input_ids[loss_positions] = mask_token_id
    weights = [
        block_weights(view.noise.loss_prob, view.noise.masked.size // block_length)
        for view in views
    ]
    masked_blocks = blocks.mask_sources[masked_places // block_length]
    num_label_tokens = sum(
        len(document.views) * int(np.count_nonzero(document.labels != IGNORED_LABEL))
        for document in documents
    )
    padding = [end] if end < row_length else []
    return Row(
        input_ids=input_ids,
        position_ids=position_ids,
        key_intervals=key_intervals,
        segment_starts=np.array([*blocks.segment_starts.tolist(), *padding], dtype=np.int64),
        loss_positions=loss_positions,
        target_ids=target_ids,
        loss_weights=_join(weights, np.float64)[masked_blocks],
        num_label_tokens=num_label_tokens,
        num_padding=row_length - end,
    )


def concatenate_rows(rows: Sequence[Row]) -> Row:
    """Put rows behind each other on one token axis; they stay invisible to each other."""
    if len(rows) == 1:
        return rows[0]
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


@dataclass(frozen=True)
class _Blocks:
    """The K kept blocks of a row in row order, clean ones first, then N noisy ones.

    Attributes:
        sources: int64 [K], the block's number in the joined ids of all documents.
        positions: int64 [K], its number in its own document.
        key_intervals: int32 [K, 4], what its tokens see.
        mask_sources: int64 [N], the number of a noisy one in the joined masks of all views.
        segment_starts: int64 [S], tokens of the row where a copy begins.
    """

    sources: NDArray[np.int64]
    positions: NDArray[np.int64]
    key_intervals: NDArray[np.int32]
    mask_sources: NDArray[np.int64]
    segment_starts: NDArray[np.int64]


def _lay_out_blocks(documents: Sequence[RowDocument], block_length: int) -> _Blocks:
    views = [view for document in documents for view in document.views]
    num_views = [len(document.views) for document in documents]
    document_starts = _starts([document.ids.size // block_length for document in documents])
    mask_starts = _starts([view.noise.masked.size // block_length for view in views])
    num_clean = np.array([document.num_clean_blocks for document in documents], dtype=np.int64)
    num_noisy = np.array([view.kept_blocks.size for view in views], dtype=np.int64)
    clean_starts = _starts(num_clean)
    copies = np.concatenate([num_clean, num_noisy])
    view_documents = np.repeat(np.arange(len(documents)), num_views)
    block_documents = np.repeat(np.concatenate([np.arange(len(documents)), view_documents]), copies)
    block_starts = clean_starts[block_documents]

    places = np.arange(block_documents.size)
    first_noisy = int(num_clean.sum())
    kept = _join([view.kept_blocks for view in views], np.int64)
    assert (kept <= num_clean[block_documents[first_noisy:]]).all(), (
        "a kept noisy block needs all clean blocks before it"
    )
    positions = np.concatenate([places[:first_noisy] - block_starts[:first_noisy], kept])

    intervals = np.zeros((positions.size, 4), dtype=np.int32)
    intervals[:, 0] = block_starts
    # A noisy query sees the clean blocks before its own, a clean query its own too.
    intervals[:, 1] = block_starts + positions
    intervals[:first_noisy, 1] += 1
    intervals[first_noisy:, 2] = places[first_noisy:]
    intervals[first_noisy:, 3] = places[first_noisy:] + 1

    block_views = np.repeat(np.arange(len(views)), num_noisy)
    return _Blocks(
        sources=document_starts[block_documents] + positions,
        positions=positions,
        key_intervals=intervals * np.int32(block_length),
        mask_sources=mask_starts[block_views] + kept,
        segment_starts=_starts(copies)[copies > 0] * block_length,
    )


def _take_blocks(
    tokens: NDArray[Any], blocks: NDArray[np.int64], block_length: int
) -> NDArray[Any]:
    """The tokens of the blocks with these numbers, end to end."""
    return tokens.reshape(-1, block_length).take(blocks, axis=0).ravel()


def _starts(sizes: ArrayLike) -> NDArray[np.int64]:
    """Where each of consecutive things of these sizes begins."""
    counts = np.asarray(sizes, dtype=np.int64)
    return np.cumsum(counts) - counts


def _join(parts: Sequence[NDArray[Any]], dtype: DTypeLike) -> NDArray[Any]:
    return np.concatenate(parts) if parts else np.zeros(0, dtype)
