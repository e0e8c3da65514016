"""Key intervals -> tile lists, in O(tokens + tiles), without a dense mask.

Every query of a block-diffusion row sees the union of at most two contiguous key ranges. Adding
each range end to a table of second differences and summing once along the key axis gives the
exact number of allowed pairs in every (query tile, key tile): 0 is skipped, all is a full tile,
anything between needs the mask. `AttentionMask` carries both what FlexAttention wants (counts)
and what the tiled CPU path wants (query ranges with their key hulls).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

IntArray = NDArray[np.int32]

CPU_QUERY_TILE = 64


@dataclass(frozen=True)
class QueryTile:
    """Queries [start, end) and the hulls of the two key ranges they need.

    `open_keys` leading keys of the first hull are seen by every query of the tile, so only the
    columns after them need the mask.
    """

    start: int
    end: int
    first: tuple[int, int]
    second: tuple[int, int]
    open_keys: int


@dataclass(frozen=True)
class AttentionMask:
    """Mask metadata of one micro-batch: built once on the host, shared by all layers.

    Attributes:
        key_intervals: int32 [T, 4] on the compute device.
        host_intervals: the same intervals as numpy, from which plans are built.
        segment_starts: where documents, copies and padding begin.
        query_tile: most queries in one tile of the CPU plan.
    """

    key_intervals: Tensor
    host_intervals: IntArray
    segment_starts: NDArray[np.int64]
    query_tile: int

    @cached_property
    def query_tiles(self) -> tuple[QueryTile, ...]:
        """The tiled CPU plan, made when first used; tiles never cross a segment border."""
        borders = np.append(self.segment_starts, self.num_tokens)
        return tuple(
            _query_tile(self.host_intervals, start, min(start + self.query_tile, int(segment_end)))
            for segment_start, segment_end in pairwise(borders)
            for start in range(int(segment_start), int(segment_end), self.query_tile)
        )

    @property
    def num_tokens(self) -> int:
        return int(self.host_intervals.shape[0])


def make_attention_mask(
    key_intervals: IntArray,
    segment_starts: NDArray[np.int64],
    device: torch.device | str = "cpu",
    query_tile: int = CPU_QUERY_TILE,
) -> AttentionMask:
    """Build the metadata of a micro-batch.

    Args:
        key_intervals: int32 [T, 4], see `reference.dense_mask`; no query may be empty.
        segment_starts: ascending int64 [S], where documents, copies and padding begin;
            segment_starts[0] == 0.
        device: where kernels will read the intervals.
        query_tile: most queries in one tile of the CPU plan.
    """
    num_tokens = key_intervals.shape[0]
    seen = (key_intervals[:, 1] - key_intervals[:, 0]) + (key_intervals[:, 3] - key_intervals[:, 2])
    assert num_tokens > 0, "a micro-batch holds at least one token"
    assert (seen > 0).all(), "every query must see at least one key"
    return AttentionMask(
        torch.from_numpy(key_intervals).to(device), key_intervals, segment_starts, query_tile
    )


def _query_tile(key_intervals: IntArray, start: int, end: int) -> QueryTile:
    tile = key_intervals[start:end]
    first = _hull(tile[:, 0], tile[:, 1])
    second = _hull(tile[:, 2], tile[:, 3])
    if first[0] < second[1] and second[0] < first[1]:
        # Overlapping hulls would count a key twice in the softmax: use one hull for both.
        first, second = (min(first[0], second[0]), max(first[1], second[1])), (0, 0)
    all_start_here = bool((tile[:, 0] == first[0]).all())
    open_keys = max(0, int(tile[:, 1].min()) - first[0]) if all_start_here else 0
    return QueryTile(start, end, first, second, open_keys)


def _hull(lo: IntArray, hi: IntArray) -> tuple[int, int]:
    used = hi > lo
    if not used.any():
        return 0, 0
    return int(lo[used].min()), int(hi[used].max())


def tile_counts(key_intervals: IntArray, query_block: int, key_block: int) -> NDArray[np.int64]:
    """Exact number of allowed (query, key) pairs per tile, int64 [query tiles, key tiles]."""
    num_tokens = key_intervals.shape[0]
    num_rows = -(-num_tokens // query_block)
    num_columns = -(-num_tokens // key_block)
    # Two spare columns: an end at num_tokens touches columns m and m + 1.
    stride = num_columns + 2
    rows = np.arange(num_tokens, dtype=np.int64) // query_block * stride
    differences = np.zeros(num_rows * stride, dtype=np.float64)
    for column, sign in ((0, -1), (1, 1), (2, -1), (3, 1)):
        ends = key_intervals[:, column].astype(np.int64)
        tile, rest = ends // key_block, ends % key_block
        # Keys below `ends` fill tiles 0..tile-1 and `rest` of the next; the constant part of
        # the first column cancels between the low and the high end of an interval.
        for index, amount in ((tile, rest - key_block), (tile + 1, -rest)):
            differences += np.bincount(
                rows + index, weights=sign * amount, minlength=differences.size
            )
    counts = differences.reshape(num_rows, stride).cumsum(axis=1)[:, :num_columns]
    return np.rint(counts).astype(np.int64)
