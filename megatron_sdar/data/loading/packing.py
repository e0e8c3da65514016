"""Documents to rows: which documents share a row, and what of a long document is kept.

Owns block alignment, truncation by length and the pack index. A document takes whole blocks, so
every document begins on a block edge whatever shares its row. The result depends only on lengths
and options; what does not fit is counted, never lost in silence.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from megatron_sdar.data.loading.exact_fill import fill_bins, num_bins
from megatron_sdar.data.loading.llamafactory import pack_like_llamafactory
from megatron_sdar.diffusion.rows import IGNORED_LABEL

TRUNCATE_MODES = ("drop", "cut", "split")
PACKING_ALGORITHMS = ("exact_fill", "llamafactory")
PADDING_LABELS = ("learn", "ignore", "first")

CutLengths = Callable[[NDArray[np.int64], int], NDArray[np.int64]]


@dataclass(frozen=True)
class PackedIndex:
    """Row r holds the items row_offsets[r] : row_offsets[r + 1] of doc_ids.

    row_offsets: int64 [R+1]. doc_ids: int32 or int64 [N]. pieces: int32 [N], which part of its
    document an item is (None: every item is a whole document, or what is kept of one). Items
    ascend in a row and rows by their first item (algorithm llamafactory: its own order).
    limit: tokens kept of a longer document (cut), or tokens of a piece (split).
    num_dropped, num_cut and num_split count documents; num_tokens counts kept tokens without
    padding, num_lost_tokens those dropped or cut. fill = occupied positions / (R * capacity).
    """

    row_offsets: NDArray[np.int64]
    doc_ids: NDArray[np.integer]
    pieces: NDArray[np.int32] | None
    limit: int
    truncate_mode: str
    num_dropped: int
    num_cut: int
    num_split: int
    num_tokens: int
    num_lost_tokens: int
    fill: float

    def __len__(self) -> int:
        return len(self.row_offsets) - 1

    def row(self, index: int) -> NDArray[np.int64]:
        """Document ids of row INDEX, int64."""
        return self.doc_ids[self._items(index)].astype(np.int64)

    def row_pieces(self, index: int) -> NDArray[np.int32]:
        """The piece of each document of row INDEX; 0 unless documents were split."""
        items = self._items(index)
        if self.pieces is None:
            return np.zeros(items.stop - items.start, dtype=np.int32)
        return self.pieces[items]

    def _items(self, index: int) -> slice:
        return slice(int(self.row_offsets[index]), int(self.row_offsets[index + 1]))


def pack_documents(
    lengths: ArrayLike,
    capacity: int,
    block_length: int,
    *,
    truncate_mode: str,
    packing: bool = True,
    algorithm: str = "exact_fill",
    cut_lengths: CutLengths | None = None,
    num_workers: int = 1,
) -> PackedIndex:
    """Rows of CAPACITY positions for documents of LENGTHS tokens.

    A document longer than CAPACITY is left out ("drop"), shortened ("cut": to what
    CUT_LENGTHS(document ids, limit) says, by default to the limit) or divided into pieces of
    CAPACITY tokens ("split"). With packing False every item has its own row.

    ALGORITHM "llamafactory" gives the published rows, for parity: one position of a packed row
    stays free, documents are shortened before they are padded and then dropped when the padding
    does not fit, and NUM_WORKERS contiguous shares are packed apart, 1000 documents at a time.
    One thing is not repeated: with block_length 1 and "drop" the published code keeps a document
    whose first turns end exactly at the limit, without its later turns; here it is dropped.

    Raises ValueError for sizes that do not fit together and when no document is left.
    """
    sizes = np.asarray(lengths)
    _check(sizes, capacity, block_length, truncate_mode, algorithm)
    published = algorithm == "llamafactory"
    if published and truncate_mode == "split":
        raise ValueError(
            "packing_algorithm llamafactory knows truncate_mode cut and drop only, not split"
        )
    limit = capacity - 1 if published and packing else capacity
    long = np.flatnonzero(sizes > limit)
    kept = sizes.astype(np.int64)
    items = pieces = None
    if truncate_mode == "drop":
        kept[long] = 0
    elif truncate_mode == "cut":
        kept[long] = limit if cut_lengths is None else cut_lengths(long, limit)
    else:
        items, pieces, kept = _split(kept, long, limit)
    padded = -(-kept // block_length) * block_length
    # Only the published limit can be no multiple of the block: the padding then overshoots it.
    overlong = padded > limit
    kept[overlong] = padded[overlong] = 0
    dropped = kept == 0
    num_dropped = int(dropped.sum())
    if num_dropped == len(kept):
        longest = f", the longest has {sizes.max()} tokens" if sizes.size else ""
        raise ValueError(
            f"no document is left to pack: {len(sizes)} documents, {num_dropped} longer than "
            f"cutoff_len {capacity}{longest}; raise cutoff_len or set truncate_mode to cut or "
            "split"
        )
    if not packing:
        order = np.flatnonzero(~dropped)
        row_offsets = np.arange(len(order) + 1)
    elif published:
        row_offsets, order = pack_like_llamafactory(padded, capacity, num_workers=num_workers)
    else:
        row_offsets, order = fill_rows(padded // block_length, capacity // block_length)
    num_cut = len(long) - int(dropped[long].sum()) if truncate_mode == "cut" else 0
    num_tokens = int(kept.sum())
    ids = order if items is None else items[order]
    return PackedIndex(
        row_offsets=row_offsets,
        doc_ids=ids.astype(np.int32 if len(sizes) <= np.iinfo(np.int32).max else np.int64),
        pieces=None if pieces is None else pieces[order],
        limit=limit,
        truncate_mode=truncate_mode,
        num_dropped=num_dropped,
        num_cut=num_cut,
        num_split=len(long) if truncate_mode == "split" else 0,
        num_tokens=num_tokens,
        num_lost_tokens=int(sizes.sum(dtype=np.int64)) - num_tokens,
        fill=float(padded.sum() / ((len(row_offsets) - 1) * capacity)),
    )


def pad_to_block(
    ids: NDArray[np.int32],
    labels: NDArray[np.int32],
    block_length: int,
    pad_id: int,
    padding_labels: str = "learn",
) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
    """IDS and LABELS [n] with PAD_ID appended to IDS up to a multiple of BLOCK_LENGTH.

    By default the padding of a document is trained on (label = PAD_ID): it is how a model learns
    to end inside a block. PADDING_LABELS "first" trains the first pad only, "ignore" none; what
    is not trained is never masked and does not count in the loss's denominator.
    """
    assert padding_labels in PADDING_LABELS, f"unvalidated block_padding_labels {padding_labels!r}"
    num_pads = -len(ids) % block_length
    if not num_pads:
        return ids, labels
    pads = np.full(num_pads, pad_id, dtype=np.int32)
    pad_labels = pads.copy()
    if padding_labels != "learn":
        pad_labels[1 if padding_labels == "first" else 0 :] = IGNORED_LABEL
    return np.concatenate([ids, pads]), np.concatenate([labels, pad_labels])


def check_row_size(capacity: int, block_length: int) -> None:
    """Refuse rows that are not whole blocks (ValueError)."""
    if block_length < 1:
        raise ValueError(f"block_length must be at least 1, got {block_length}")
    if capacity < 1 or capacity % block_length:
        below = capacity // block_length * block_length
        near = [str(n) for n in (below, below + block_length) if n > 0]
        raise ValueError(
            f"cutoff_len {capacity} is not a multiple of block_length {block_length}; "
            f"use {' or '.join(near[:2])}"
        )


def _check(
    sizes: NDArray[np.integer],
    capacity: int,
    block_length: int,
    truncate_mode: str,
    algorithm: str,
) -> None:
    if truncate_mode not in TRUNCATE_MODES:
        raise ValueError(f"truncate_mode must be 'cut', 'drop' or 'split', got {truncate_mode!r}")
    if algorithm not in PACKING_ALGORITHMS:
        raise ValueError(
            f"packing_algorithm must be one of {', '.join(PACKING_ALGORITHMS)}, got {algorithm!r}"
        )
    check_row_size(capacity, block_length)
    if sizes.size and sizes.min() < 1:
        index = int(sizes.argmin())
        raise ValueError(f"document {index} has length {sizes[index]}; lengths must be positive")


def _split(
    sizes: NDArray[np.int64], long: NDArray[np.int64], limit: int
) -> tuple[NDArray[np.int64], NDArray[np.int32] | None, NDArray[np.int64]]:
    """(document, piece, length) of every item; pieces None when nothing is long."""
    if not long.size:
        return np.arange(len(sizes)), None, sizes
    number = np.ones(len(sizes), dtype=np.int64)
    number[long] = -(-sizes[long] // limit)
    items = np.repeat(np.arange(len(sizes)), number)
    firsts = np.cumsum(number) - number
    pieces = np.arange(len(items)) - firsts[items]
    return items, pieces.astype(np.int32), np.minimum(sizes[items] - pieces * limit, limit)


def fill_rows(
    sizes: NDArray[np.int64], capacity: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """(row offsets, item order) of items of SIZES blocks in as few rows of CAPACITY as it finds.

    Row r holds the items order[offsets[r] : offsets[r + 1]]. Items of size 0 are left out.
    """
    counts = np.bincount(sizes, minlength=capacity + 1)
    num_zero, counts[0] = int(counts[0]), 0
    patterns = fill_bins(counts, capacity)
    num_rows = num_bins(patterns)
    rows_of_size: dict[int, list[NDArray[np.int32]]] = {}
    first_row = 0
    for pattern in patterns:
        rows = np.arange(first_row, first_row + pattern.times, dtype=np.int32)
        first_row += pattern.times
        for size, each in pattern.items.items():
            rows_of_size.setdefault(size, []).append(np.repeat(rows, each))
    # Sizes are small numbers: as uint16 the stable sort is a radix sort.
    keys = sizes.astype(np.uint16) if capacity < 2**16 else sizes
    by_size = np.argsort(keys, kind="stable")[num_zero:]
    row_of = np.concatenate([part for size in sorted(rows_of_size) for part in rows_of_size[size]])
    first_item = np.full(num_rows, len(sizes), dtype=np.int64)
    np.minimum.at(first_item, row_of, by_size)
    rank = np.empty(num_rows, dtype=np.int64)
    rank[np.argsort(first_item)] = np.arange(num_rows)
    # One key sorts by row and then by item, without a second array of ranks.
    combined = rank[row_of] * len(sizes) + by_size
    combined.sort()
    row_of, order = np.divmod(combined, len(sizes))
    offsets = np.zeros(num_rows + 1, dtype=np.int64)
    np.cumsum(np.bincount(row_of, minlength=num_rows), out=offsets[1:])
    return offsets, order
