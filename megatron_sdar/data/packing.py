"""Documents to rows: which documents share a row.

Owns block alignment and best-fit decreasing packing. A document takes whole blocks, so every
document begins on a block edge whatever shares its row. The result depends only on lengths and
options; what does not fit is counted, never lost in silence.
"""

from bisect import bisect_left, insort
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

TRUNCATE_MODES = ("drop", "cut")


@dataclass(frozen=True)
class PackedIndex:
    """Row r holds documents doc_ids[row_offsets[r] : row_offsets[r + 1]], ascending.

    row_offsets: int64 [R+1]; doc_ids: int64 [N]. Rows are ordered by their first document.
    num_dropped and num_cut count documents; num_tokens counts kept tokens without padding,
    num_lost_tokens those dropped or cut. fill = occupied positions / (R * capacity).
    """

    row_offsets: NDArray[np.int64]
    doc_ids: NDArray[np.int64]
    num_dropped: int
    num_cut: int
    num_tokens: int
    num_lost_tokens: int
    fill: float

    def __len__(self) -> int:
        return len(self.row_offsets) - 1

    def row(self, index: int) -> NDArray[np.int64]:
        """Document ids of row INDEX, ascending."""
        return self.doc_ids[self.row_offsets[index] : self.row_offsets[index + 1]]


def pack_documents(
    lengths: ArrayLike,
    capacity: int,
    block_length: int,
    *,
    truncate_mode: str,
    packing: bool = True,
) -> PackedIndex:
    """Rows of CAPACITY positions for documents of LENGTHS tokens, by best-fit decreasing.

    A document longer than CAPACITY is left out ("drop") or keeps its first CAPACITY tokens
    ("cut"). With packing False every document has its own row. Raises ValueError for sizes
    that do not fit together and when no document is left.
    """
    sizes = np.asarray(lengths, dtype=np.int64)
    if truncate_mode not in TRUNCATE_MODES:
        raise ValueError(f"truncate_mode must be 'cut' or 'drop', got {truncate_mode!r}")
    if block_length < 1:
        raise ValueError(f"block_length must be at least 1, got {block_length}")
    if capacity < 1 or capacity % block_length:
        below = capacity // block_length * block_length
        near = [str(n) for n in (below, below + block_length) if n > 0]
        raise ValueError(
            f"cutoff_len {capacity} is not a multiple of block_length {block_length}; "
            f"use {' or '.join(near[:2])}"
        )
    if sizes.size and sizes.min() < 1:
        index = int(sizes.argmin())
        raise ValueError(f"document {index} has length {sizes[index]}; lengths must be positive")
    too_long = sizes > capacity
    if truncate_mode == "drop":
        kept_ids = np.flatnonzero(~too_long)
        num_dropped, num_cut = int(too_long.sum()), 0
    else:
        kept_ids = np.arange(len(sizes))
        num_dropped, num_cut = 0, int(too_long.sum())
    if not kept_ids.size:
        longest = f", the longest has {sizes.max()} tokens" if sizes.size else ""
        raise ValueError(
            f"no document is left to pack: {len(sizes)} documents, {num_dropped} longer than "
            f"cutoff_len {capacity}{longest}; raise cutoff_len or set truncate_mode to cut"
        )
    kept = np.minimum(sizes[kept_ids], capacity)
    blocks = -(-kept // block_length)
    num_kept_tokens = int(kept.sum())
    if packing:
        order, row_offsets = _best_fit(blocks, capacity // block_length)
    else:
        order = np.arange(len(blocks))
        row_offsets = np.arange(len(blocks) + 1)
    num_rows = len(row_offsets) - 1
    return PackedIndex(
        row_offsets=row_offsets,
        doc_ids=kept_ids[order],
        num_dropped=num_dropped,
        num_cut=num_cut,
        num_tokens=num_kept_tokens,
        num_lost_tokens=int(sizes.sum()) - num_kept_tokens,
        fill=float(blocks.sum() * block_length / (num_rows * capacity)),
    )


def pad_to_block(
    ids: NDArray[np.int32], labels: NDArray[np.int32], block_length: int, pad_id: int
) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
    """IDS and LABELS [n] with PAD_ID appended to both up to a multiple of BLOCK_LENGTH.

    The padding of a document is trained on (label = PAD_ID): it is how a model learns to end
    inside a block.
    """
    num_pads = -len(ids) % block_length
    if not num_pads:
        return ids, labels
    pads = np.full(num_pads, pad_id, dtype=np.int32)
    return np.concatenate([ids, pads]), np.concatenate([labels, pads])


def _best_fit(
    sizes: NDArray[np.int64], capacity: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """(item order, row offsets) of best-fit decreasing for SIZES in 1..CAPACITY.

    Rows with equal free space are interchangeable, so they are kept together and equal items
    are placed a whole group of rows at a time: the work is O(N + capacity) list operations
    plus a bisection per group.
    """
    counts = np.bincount(sizes, minlength=capacity + 1)
    rows_with_free: dict[int, list[int]] = {}
    free_sizes: list[int] = []
    placed_rows: list[int] = []
    placed_counts: list[int] = []
    num_rows = 0
    for size in np.flatnonzero(counts)[::-1].tolist():
        left = int(counts[size])
        while left:
            place = bisect_left(free_sizes, size)
            if place == len(free_sizes):
                # No row fits: open as many as this size fills, which then look like any group.
                needed = -(-left // (capacity // size))
                free_sizes.append(capacity)
                rows_with_free[capacity] = list(range(num_rows, num_rows + needed))
                num_rows += needed
            free = free_sizes[place]
            rows = rows_with_free[free]
            each = min(free // size, left)
            taken = [rows.pop() for _ in range(min(len(rows), left // each))]
            if not rows:
                del rows_with_free[free], free_sizes[place]
            placed_rows += taken
            placed_counts += [each] * len(taken)
            left -= each * len(taken)
            rest = free - each * size
            if rest in rows_with_free:
                rows_with_free[rest] += taken
            elif rest:
                insort(free_sizes, rest)
                rows_with_free[rest] = taken
    by_size = np.argsort(-sizes, kind="stable")
    row_of = np.empty(len(sizes), dtype=np.int64)
    row_of[by_size] = np.repeat(placed_rows, placed_counts)
    first_item = np.full(num_rows, len(sizes), dtype=np.int64)
    np.minimum.at(first_item, row_of, np.arange(len(sizes)))
    rank = np.empty(num_rows, dtype=np.int64)
    rank[np.argsort(first_item)] = np.arange(num_rows)
    row_of = rank[row_of]
    order = np.argsort(row_of, kind="stable")
    offsets = np.zeros(num_rows + 1, dtype=np.int64)
    np.cumsum(np.bincount(row_of, minlength=num_rows), out=offsets[1:])
    return order, offsets
