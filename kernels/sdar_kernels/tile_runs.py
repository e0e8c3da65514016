"""Key intervals -> which runs of keys every query tile reads, and of queries every key tile.

Tiles begin where documents and copies begin, not on a grid: the query axis is cut into pieces in
which the visible range only grows, the key axis where a piece begins to read, and what lies
between two cuts into tiles. A query tile then reads at most two runs of keys, and a key tile one
run of queries per copy of its document. Queries and keys may be different tokens. A run has a
part that needs the mask and a part that does not; its ends are exact, so a kernel computes little
more than the mask allows. All of it is O(tokens + tiles) numpy on the host.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sdar_kernels.block_mask import AttentionMask, IntArray

LongArray = NDArray[np.int64]

# Which of a query's two key ranges a run belongs to.
FIRST, SECOND = 0, 1


@dataclass(frozen=True)
class QueryTiles:
    """What each query tile reads, heaviest tile first.

    Attributes:
        tiles: int32 [tiles, 7] on the device: queries [0, 1); keys of the first range [2, 4), of
            which [2, 3) is seen by every query of the tile and is a multiple of the key block;
            keys of the second range [5, 6).
        num_pairs: (query, key) pairs that a kernel computes, whole tiles counted.
    """

    tiles: Tensor
    num_pairs: int


@dataclass(frozen=True)
class KeyTiles:
    """What reads each key tile, heaviest tile first.

    Attributes:
        tiles: int32 [tiles, 4] on the device: keys [0, 1), its runs [2, 3).
        runs: int32 [runs, 4] on the device: queries [0, 2), of which [1, 2) see every key of the
            tile, and the range (FIRST or SECOND) through which they see it.
        num_pairs: (query, key) pairs that a kernel computes, whole tiles counted.
    """

    tiles: Tensor
    runs: Tensor
    num_pairs: int


def make_query_tiles(
    mask: AttentionMask, query_block: int, key_block: int, masked_block: int
) -> QueryTiles:
    """Tiles of at most `query_block` queries and the keys they read.

    Args:
        mask: the micro-batch.
        query_block: queries of a tile.
        key_block: keys of a step without the mask.
        masked_block: keys of a step with the mask.
    """
    lo1, hi1, lo2, hi2 = mask.host_intervals.astype(np.int64).T
    starts, ends = _cut(_piece_starts(mask.host_intervals), mask.num_tokens, query_block)
    last = ends - 1
    # Inside a piece ranges only move forward, so the first and the last query bound the tile.
    first_lo, first_hi = lo1[starts], hi1[last]
    seen_by_all = np.maximum(hi1[starts] - first_lo, 0) // key_block * key_block
    open_end = first_lo + seen_by_all
    second_lo, second_hi = lo2[starts], hi2[last]
    masked_steps = _steps(first_hi - open_end, masked_block)
    masked_steps += _steps(second_hi - second_lo, masked_block)
    keys = seen_by_all + masked_steps * masked_block
    order = np.argsort(-keys, kind="stable")
    columns = (starts, ends, first_lo, open_end, first_hi, second_lo, second_hi)
    tiles = np.stack(columns, axis=1)[order]
    return QueryTiles(_to_device(tiles, mask), int(keys.sum()) * query_block)


def make_key_tiles(
    mask: AttentionMask, query_block: int, key_block: int, masked_block: int
) -> KeyTiles:
    """Tiles of at most `key_block` keys and the queries that read them.

    Args:
        mask: the micro-batch.
        query_block: queries of a step without the mask.
        key_block: keys of a tile.
        masked_block: queries of a step with the mask.
    """
    intervals = mask.host_intervals.astype(np.int64)
    piece_starts = _piece_starts(mask.host_intervals)
    borders = _key_borders(intervals, piece_starts, mask.num_keys)
    key_starts, key_ends = _cut(borders, mask.num_keys, key_block)
    pieces = (piece_starts, np.append(piece_starts[1:], mask.num_tokens))
    lo1, hi1, lo2, hi2 = intervals.T
    keys = (key_starts, key_ends)
    scale = mask.num_keys + 1
    first = _runs_of_range(lo1, hi1, pieces, keys, scale, FIRST)
    runs = np.concatenate((first, _runs_of_range(lo2, hi2, pieces, keys, scale, SECOND)))
    tile, start, open_start, end, _ = runs.T
    # The masked part is a whole number of steps, as far as the run reaches.
    masked_steps = _steps(open_start - start, masked_block)
    runs[:, 2] = np.minimum(start + masked_steps * masked_block, end)
    queries = masked_steps * masked_block + _steps(end - runs[:, 2], query_block) * query_block
    runs = runs[np.argsort(tile, kind="stable")]
    num_runs = np.bincount(tile, minlength=key_starts.size)
    last_run = np.cumsum(num_runs)
    work = np.bincount(tile, weights=queries, minlength=key_starts.size)
    order = np.argsort(-work, kind="stable")
    tiles = np.stack((key_starts, key_ends, last_run - num_runs, last_run), axis=1)[order]
    return KeyTiles(
        _to_device(tiles, mask),
        _to_device(runs[:, 1:], mask),
        int(queries.sum()) * key_block,
    )


def _runs_of_range(
    low: LongArray,
    high: LongArray,
    pieces: tuple[LongArray, LongArray],
    keys: tuple[LongArray, LongArray],
    scale: int,
    which: int,
) -> LongArray:
    """Runs through one of the two ranges: int64 [runs, 5], key tile and the columns of `runs`.

    `scale` is above every end of a range.
    """
    piece_starts, piece_ends = pieces
    key_starts, key_ends = keys
    # The keys that a piece sees are one stretch of key tiles.
    seen_lo, seen_hi = low[piece_starts], high[piece_ends - 1]
    used = np.flatnonzero(seen_hi > seen_lo)
    first_tile = np.searchsorted(key_starts, seen_lo[used], side="right") - 1
    last_tile = np.searchsorted(key_starts, seen_hi[used], side="left")
    counts = last_tile - first_tile
    piece = np.repeat(used, counts)
    offsets = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
    tile = np.repeat(first_tile, counts) + offsets
    # Ranges of one piece are sorted; with the piece in front, those of all pieces are.
    of_token = np.repeat(np.arange(piece_starts.size), piece_ends - piece_starts) * scale
    base = piece * scale
    start = np.searchsorted(of_token + high, base + key_starts[tile], side="right")
    if which == FIRST:
        end = piece_ends[piece]
        open_start = np.searchsorted(of_token + high, base + key_ends[tile], side="left")
    else:
        end = np.searchsorted(of_token + low, base + key_ends[tile], side="left")
        open_start = end
    runs = np.stack((tile, start, open_start, end, np.full_like(tile, which)), axis=1)
    return runs[end > start]


def _piece_starts(intervals: IntArray) -> LongArray:
    """Where pieces begin: stretches of queries with one first key whose ranges move forward."""
    before, after = intervals[:-1], intervals[1:]
    cut = (after[:, 0] != before[:, 0]) | (after[:, 1:] < before[:, 1:]).any(axis=1)
    cut |= (after[:, 3] > after[:, 2]) != (before[:, 3] > before[:, 2])
    return np.concatenate(([0], np.flatnonzero(cut) + 1))


def _key_borders(intervals: LongArray, piece_starts: LongArray, num_keys: int) -> LongArray:
    """Keys at which a key tile must begin.

    These are the first keys of first ranges, which documents have in common: no key tile may
    straddle one, so that a run needs no lower bound on keys. And the first key that a piece
    reads through its second range, which is where a noisy copy begins.
    """
    lo2, hi2 = intervals[piece_starts, 2], intervals[piece_starts, 3]
    borders = np.unique(np.concatenate(([0], intervals[:, 0], lo2[hi2 > lo2])))
    return borders[borders < num_keys]


def _cut(borders: LongArray, num_tokens: int, size: int) -> tuple[LongArray, LongArray]:
    """Starts and ends of tiles: each stretch between borders in steps of `size`."""
    stretch_ends = np.append(borders[1:], num_tokens)
    counts = _steps(stretch_ends - borders, size)
    offsets = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
    starts = np.repeat(borders, counts) + offsets * size
    return starts, np.minimum(starts + size, np.repeat(stretch_ends, counts))


def _steps(lengths: LongArray, size: int) -> LongArray:
    return -(-lengths // size)


def _to_device(array: LongArray, mask: AttentionMask) -> Tensor:
    return torch.from_numpy(array.astype(np.int32)).to(mask.key_intervals.device)
