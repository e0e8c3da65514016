"""Key intervals -> exact pair counts per tile -> tile lists, in O(tokens + tiles).

Every query of a block-diffusion row sees the union of at most two contiguous key ranges. Adding
each range end to a table of second differences and summing once along the key axis gives the
exact number of allowed pairs in every (query tile, key tile): 0 is skipped, all is a full tile,
anything between needs the mask. No dense mask exists at any point.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

IntArray = NDArray[np.int32]
Plan = TypeVar("Plan")


@dataclass(frozen=True)
class AttentionMask:
    """Mask metadata of one micro-batch: built once on the host, shared by all layers.

    Usually the queries are all tokens and the keys the same tokens; `select` makes the mask of
    some of the queries, which still see the keys they saw.

    Attributes:
        key_intervals: int32 [T, 4] of the T queries on the compute device.
        host_intervals: the same intervals as numpy, from which plans are made.
        num_keys: keys on the key axis.
    """

    key_intervals: Tensor
    host_intervals: IntArray
    num_keys: int
    _plans: dict[Hashable, Any] = field(default_factory=dict, repr=False, compare=False)

    @classmethod
    def build(
        cls,
        key_intervals: IntArray,
        device: torch.device | str = "cpu",
        num_keys: int | None = None,
    ) -> AttentionMask:
        """The metadata of a micro-batch.

        Args:
            key_intervals: int32 [T, 4], see `reference.dense_mask`. No query may be empty, and
                the two ranges of one query may not overlap (a key would count twice).
            device: where kernels will read the intervals.
            num_keys: keys on the key axis; default: as many as queries.
        """
        assert key_intervals.shape[0] > 0, "a micro-batch holds at least one token"
        num_keys = key_intervals.shape[0] if num_keys is None else num_keys
        assert key_intervals.min() >= 0, "a range begins before the first key"
        assert key_intervals.max() <= num_keys, "a range ends behind the last key"
        lo1, hi1, lo2, hi2 = key_intervals.T
        first, second = hi1 - lo1, hi2 - lo2
        assert min(first.min(), second.min()) >= 0, "a range ends before it begins"
        assert (first + second > 0).all(), "every query must see at least one key"
        apart = (hi1 <= lo2) | (hi2 <= lo1) | (first == 0) | (second == 0)
        assert apart.all(), "the two ranges of a query overlap"
        return cls(torch.from_numpy(key_intervals).to(device), key_intervals, num_keys)

    def select(self, positions: NDArray[np.int64]) -> AttentionMask:
        """The mask of some of the queries over the same keys, with plans of its own.

        Args:
            positions: int64 [M], M at least 1; in any order, a query may occur several times.
        """
        return AttentionMask.build(
            self.host_intervals[positions], self.key_intervals.device, self.num_keys
        )

    @property
    def num_tokens(self) -> int:
        """Queries."""
        return int(self.host_intervals.shape[0])

    @property
    def num_pairs(self) -> int:
        """Allowed (query, key) pairs."""
        lo1, hi1, lo2, hi2 = self.host_intervals.astype(np.int64).T
        return int((hi1 - lo1 + hi2 - lo2).sum())

    def plan(self, make: Callable[..., Plan], *options: Hashable) -> Plan:
        """make(self, *options), made when first asked for and then kept."""
        key = (make, options)
        if key not in self._plans:
            self._plans[key] = make(self, *options)
        plan: Plan = self._plans[key]
        return plan


def tile_counts(
    key_intervals: IntArray, query_block: int, key_block: int, num_keys: int | None = None
) -> NDArray[np.int64]:
    """Exact number of allowed (query, key) pairs per tile.

    Args:
        key_intervals: int32 [T, 4], or [R, T, 4] for R rows that do not see each other.
        query_block, key_block: tile sizes; the last tiles may stick out over the end.
        num_keys: keys on the key axis; default: as many as queries.

    Returns:
        int64 [query tiles, key tiles], or [R, query tiles, key tiles].
    """
    intervals = key_intervals.reshape(-1, *key_intervals.shape[-2:])
    num_rows, num_tokens = intervals.shape[:2]
    num_keys = num_tokens if num_keys is None else num_keys
    query_tiles, key_tiles = -(-num_tokens // query_block), -(-num_keys // key_block)
    # Two spare columns: an end at num_keys touches columns m and m + 1.
    stride = key_tiles + 2
    tiles = np.arange(num_tokens) // query_block + np.arange(num_rows)[:, None] * query_tiles
    lines, ends, repeats = _distinct(tiles.ravel() * stride, intervals.reshape(-1, 4))
    tile = ends // key_block
    rest = ends - tile * key_block
    # Keys below `ends` fill tiles 0..tile-1 and `rest` of the next; the constant part of the
    # first column cancels between the low and the high end of an interval.
    weights = np.array([-1.0, 1.0, -1.0, 1.0]) * repeats[:, None]
    places = lines[:, None] + tile
    differences = np.bincount(
        np.concatenate((places.ravel(), places.ravel() + 1)),
        weights=np.concatenate(((weights * (rest - key_block)).ravel(), (weights * -rest).ravel())),
        minlength=num_rows * query_tiles * stride,
    )
    counts = differences.reshape(num_rows, query_tiles, stride).cumsum(axis=2)[..., :key_tiles]
    exact = np.rint(counts).astype(np.int64)
    return exact.reshape(*key_intervals.shape[:-2], query_tiles, key_tiles)


def _distinct(
    lines: NDArray[np.int64], intervals: IntArray
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
    """Neighbours of one line with equal intervals joined: lines, intervals, how many they were."""
    same = (lines[1:] == lines[:-1]) & (intervals[1:] == intervals[:-1]).all(axis=1)
    starts = np.concatenate(([0], np.flatnonzero(~same) + 1))
    repeats = np.diff(starts, append=lines.size)
    return lines[starts], intervals[starts].astype(np.int64), repeats


@dataclass(frozen=True)
class TileLists:
    """Which key tiles every query tile needs: partial ones (with the mask) and full ones.

    Attributes:
        num_partial, num_full: int32 [..., query tiles].
        partial, full: int32 [..., query tiles, key tiles], the needed ones first, ascending;
            behind them the others, ascending.
    """

    num_partial: IntArray
    partial: IntArray
    num_full: IntArray
    full: IntArray

    @classmethod
    def of(cls, counts: NDArray[np.int64], tile: tuple[int, int]) -> TileLists:
        """From `tile_counts`; the lists of the transpose tell which queries a key tile needs."""
        is_full = counts == tile[0] * tile[1]
        return cls(*_chosen_first((counts > 0) & ~is_full), *_chosen_first(is_full))


def _chosen_first(chosen: NDArray[np.bool_]) -> tuple[IntArray, IntArray]:
    """Per row: how many columns are chosen, and all columns with the chosen ones first."""
    num_chosen = np.count_nonzero(chosen, axis=-1).astype(np.int32)
    columns = np.arange(chosen.shape[-1], dtype=np.int32)
    in_front = columns < num_chosen[..., None]
    columns = np.broadcast_to(columns, chosen.shape)
    order = np.empty(chosen.shape, dtype=np.int32)
    order[in_front], order[~in_front] = columns[chosen], columns[~chosen]
    return num_chosen, order
