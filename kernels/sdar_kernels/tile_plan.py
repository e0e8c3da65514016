"""The plan of tiled CPU attention: where every tile's queries and keys lie in what is gathered.

A section is what is read and written at a time: whole documents with both ranges of their
queries, so that a query's two parts meet in one section. Its queries are gathered tile by tile,
those of second ranges last, its keys group by group.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sdar_kernels.block_mask import AttentionMask
from sdar_kernels.tile_groups import (
    LongArray,
    TileSizes,
    TokenGroup,
    TokenTile,
    both_ranges,
    first_groups,
    query_sections,
    second_groups,
)


class KeySet(NamedTuple):
    """Attributes:
    start: first row in the section's keys; the rows are [batch, extent].
    batch: documents (or blocks) times key heads.
    extent: keys of each.
    """

    start: int
    batch: int
    extent: int


class Piece(NamedTuple):
    """Part of a tile that is computed at a time.

    Attributes:
        start, end: which of the key set's batch.
        first, last: rows of the tile: those of some batch entries, or some rows of one entry.
        fresh: whether it is the first to read these keys, all of them.
    """

    start: int
    end: int
    first: int
    last: int
    fresh: bool


@dataclass(frozen=True)
class QueryTile:
    """Queries that see the first `width` keys of their entry of a key set.

    Attributes:
        keys: the key set.
        start: first row in the section's queries; the rows are [batch, num_tokens].
        num_tokens: of a batch entry.
        seen: int64 [batch * num_tokens], how many of the last `masked` keys a row sees; None
            if it sees all of them.
        width: keys.
        masked: keys at the end of `width` that need the mask.
        kept: whether its probabilities are kept for backward, not computed again.
        pieces: the tile, in parts of bounded size.
    """

    keys: KeySet
    start: int
    num_tokens: int
    seen: LongArray | None
    width: int
    masked: int
    kept: bool
    pieces: tuple[Piece, ...]


@dataclass(frozen=True)
class Section:
    """What is gathered, computed and written together.

    Rows of queries and keys are token * K + key head, so q and k are read as rows [T * K, ...].

    Attributes:
        queries: int64 [rows], row of q.
        keys: int64 [key rows], row of k and v.
        num_first: rows of first ranges; those of second ranges follow.
        partner: int64 [rows - num_first], for a row of a second range, the row of the same query's
            first range; `rows` if it has none.
        results: int64 [n], for each query of the section the row that holds its result: of its
            second range, where it has one.
        outputs: int64 [n], row of q that the result belongs to; None if they are all, in order.
        tiles: in the order of their rows.
        at: rows of the sections before, each with one row to spare.
    """

    queries: Tensor
    keys: Tensor
    num_first: int
    partner: Tensor
    results: Tensor
    outputs: Tensor | None
    tiles: tuple[QueryTile, ...]
    at: int

    @property
    def num_rows(self) -> int:
        return self.queries.numel()


@dataclass(frozen=True)
class TilePlan:
    """The plan of a micro-batch.

    Attributes:
        sections: in any order.
        key_results: int64 [S * K], where the only section holds a row of k, or its number of
            key rows if nobody reads it; None if there are several or a key occurs twice.
        num_rows: of all sections, each with one row to spare.
        num_pairs: (query, key) pairs per query head that are computed.
        num_kept: probabilities kept for backward, per query head of a key head.
    """

    sections: tuple[Section, ...]
    key_results: Tensor | None
    num_rows: int
    num_pairs: int
    num_kept: int


def waste(mask: AttentionMask, sizes: TileSizes | None = None) -> float:
    """Computed over allowed (query, key) pairs of the plan."""
    return mask.plan(make_tile_plan, 1, sizes or TileSizes()).num_pairs / mask.num_pairs


def make_tile_plan(
    mask: AttentionMask, num_kv_heads: int, sizes: TileSizes, groups: int = 1
) -> TilePlan:
    """The plan of a micro-batch for `num_kv_heads` key heads of `groups` query heads each."""
    first, second = both_ranges(mask)
    section_of = query_sections(mask, num_kv_heads, sizes.section_rows)
    builders: list[_SectionBuilder] = []
    num_rows = 0
    for number in range(int(section_of.max()) + 1):
        builder = _SectionBuilder(num_kv_heads, sizes, groups, num_rows)
        for group in first_groups(first.take(section_of[first.queries] == number), sizes):
            builder.add(group, keep=True)
        builder.begin_second()
        for group in second_groups(second.take(section_of[second.queries] == number), sizes):
            builder.add(group, keep=False)
        num_rows += builder.num_rows + 1
        builders.append(builder)
    device = mask.key_intervals.device
    place = np.empty(mask.num_tokens * num_kv_heads, dtype=np.int64)
    whole = len(builders) == 1
    key_results = builders[0].key_results(mask.num_keys) if whole else None
    return TilePlan(
        tuple(builder.section(place, device, whole=whole) for builder in builders),
        None if key_results is None else _on_device(key_results, device),
        num_rows,
        sum(builder.num_pairs for builder in builders) // num_kv_heads,
        sum(builder.num_kept for builder in builders),
    )


class _SectionBuilder:
    """Collects groups, token by token, and gives each tile its place."""

    def __init__(self, num_kv_heads: int, sizes: TileSizes, groups: int, at: int) -> None:
        self._heads = np.arange(num_kv_heads)[:, None]
        self._sizes, self._groups, self._at = sizes, groups, at
        self._queries: list[LongArray] = []
        self._keys: list[LongArray] = []
        self._inside: list[NDArray[np.bool_]] = []
        self._tiles: list[QueryTile] = []
        self._num_first = 0
        self._num_keys = 0
        self.num_rows = 0
        self.num_pairs = 0
        self.num_kept = 0

    def begin_second(self) -> None:
        """What is added from now on are second ranges."""
        self._num_first = self.num_rows

    def add(self, group: TokenGroup, *, keep: bool) -> None:
        """One more group; whether narrow tiles keep their probabilities."""
        batch = len(group.keys) * len(self._heads)
        keys = KeySet(self._num_keys, batch, group.keys.shape[1])
        self._keys.append(self._rows(group.keys))
        self._inside.append(np.repeat(group.inside, len(self._heads), axis=0).ravel())
        self._num_keys += self._keys[-1].size
        for tile in group.tiles:
            self._add_tile(keys, tile, keep=keep, fresh=tile is group.tiles[0])

    def _add_tile(self, keys: KeySet, tile: TokenTile, *, keep: bool, fresh: bool) -> None:
        num_tokens = tile.tokens.shape[1]
        num_scores = keys.batch * num_tokens * tile.width
        kept = keep and tile.width <= self._sizes.kept_keys
        seen = None
        if (tile.seen < tile.masked).any():
            seen = np.repeat(tile.seen, len(self._heads), axis=0).ravel()
        pieces = tuple(self._pieces(keys.batch, num_tokens, tile.width, fresh))
        self._tiles.append(
            QueryTile(keys, self.num_rows, num_tokens, seen, tile.width, tile.masked, kept, pieces)
        )
        self._queries.append(self._rows(tile.tokens))
        self.num_rows += self._queries[-1].size
        self.num_pairs += num_scores
        self.num_kept += num_scores * kept

    def _pieces(self, batch: int, num_tokens: int, width: int, fresh: bool) -> Iterator[Piece]:
        num_scores = num_tokens * self._groups * width
        if num_scores > self._sizes.row_scores:
            # Fewer than 128 rows would cost more in packing the keys than they save in cache.
            step = max(-(-128 // self._groups), self._sizes.row_scores // (width * self._groups))
            for entry in range(batch):
                for query in range(0, num_tokens, step):
                    first = entry * num_tokens + query
                    last = entry * num_tokens + min(query + step, num_tokens)
                    yield Piece(entry, entry + 1, first, last, fresh and query == 0)
        else:
            step = max(1, self._sizes.batch_scores // num_scores)
            for entry in range(0, batch, step):
                end = min(entry + step, batch)
                yield Piece(entry, end, entry * num_tokens, end * num_tokens, fresh)

    def _rows(self, tokens: LongArray) -> LongArray:
        """[documents, tokens] -> rows of a source [T * K, ...], as [documents, heads, tokens]."""
        return (tokens[:, None] * len(self._heads) + self._heads).ravel()

    def key_results(self, num_keys: int) -> LongArray | None:
        """`TilePlan.key_results`, if no key occurs twice."""
        keys, inside = np.concatenate(self._keys), np.concatenate(self._inside)
        places = np.flatnonzero(inside)
        results = np.full(num_keys * len(self._heads), keys.size)
        results[keys[places]] = places
        return results if np.count_nonzero(results < keys.size) == places.size else None

    def section(self, place: LongArray, device: torch.device, *, whole: bool) -> Section:
        """The section; `place` [T * K] is scratch space, `whole` if it has all queries."""
        queries, keys = np.concatenate(self._queries), np.concatenate(self._keys)
        first, second = queries[: self._num_first], queries[self._num_first :]
        place[second] = self.num_rows
        place[first] = np.arange(self._num_first)
        partner = place[second]
        place[second] = np.arange(self._num_first, self.num_rows)
        outputs = None if whole else np.concatenate((first, second[partner == self.num_rows]))
        results = place.copy() if outputs is None else place[outputs]
        return Section(
            _on_device(queries, device),
            _on_device(keys, device),
            self._num_first,
            _on_device(partner, device),
            _on_device(results, device),
            None if outputs is None else _on_device(outputs, device),
            tuple(self._tiles),
            self._at,
        )


def _on_device(array: LongArray, device: torch.device) -> Tensor:
    return torch.from_numpy(array).to(device)
