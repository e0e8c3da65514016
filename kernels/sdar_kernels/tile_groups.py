"""Key intervals -> equal-shaped batches of (queries, keys) for tiled CPU attention.

Nothing is assumed of the layout. The queries whose first range begins at one key are a document,
whatever copy they belong to; they are bucketed by how many tiles of keys they see, so all queries
of a bucket share their keys and only the last tile needs a mask. Second ranges (the own noisy
blocks) are batched by their size, exactly. Documents and blocks of equal shape share one batch.
Invariant: each non-empty range of each query lies in exactly one tile that covers it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from sdar_kernels.block_mask import AttentionMask

LongArray = NDArray[np.int64]


@dataclass(frozen=True)
class TileSizes:
    """How work is cut; the defaults were measured on a core with 1 MiB of L2 cache.

    Attributes:
        short_tile, long_tile: keys of a tile, about, of documents below and from `long_document`
            keys on.
        long_document: keys.
        batch_keys: keys of a batch of documents or blocks, a longer document is a batch itself.
        batch_scores: scores computed at a time of a batch.
        row_scores: scores computed at a time of the queries of one key head and document.
        section_rows: rows of queries (of one key head) that are read and written at a time; a
            document with more is read and written by itself.
        kept_keys: probabilities of tiles of first ranges that read at most this many keys are kept
            for backward, where computing them again would cost more than reading them. It bounds
            what is kept: per query, as much as that many numbers of each head.
    """

    short_tile: int = 32
    long_tile: int = 64
    long_document: int = 512
    batch_keys: int = 1024
    batch_scores: int = 1 << 18
    row_scores: int = 1 << 20
    section_rows: int = 1 << 14
    kept_keys: int = 256


class TokenTile(NamedTuple):
    """Queries of a batch that see the first `width` keys of their document or block.

    Attributes:
        tokens: int64 [documents, num_tokens], the queries.
        seen: int64, alike: how many of the last `masked` keys each sees.
        width: keys.
        masked: keys at the end of `width` that need the mask.
    """

    tokens: LongArray
    seen: LongArray
    width: int
    masked: int


class TokenGroup(NamedTuple):
    """Documents of equal shape, or own blocks, and the tiles that read them.

    Attributes:
        keys: int64 [documents, extent], key tokens.
        inside: bool, alike: the others repeat the document's first key, and nobody sees them.
        tiles: the widest first, which reads all keys.
    """

    keys: LongArray
    inside: NDArray[np.bool_]
    tiles: list[TokenTile]


class Ranges(NamedTuple):
    """Some queries and one of their two ranges, none of them empty: int64 [n] each."""

    queries: LongArray
    low: LongArray
    high: LongArray

    def take(self, chosen: NDArray[np.bool_]) -> Ranges:
        return Ranges(self.queries[chosen], self.low[chosen], self.high[chosen])


def both_ranges(mask: AttentionMask) -> tuple[Ranges, Ranges]:
    """All first ranges, and all second ones."""
    intervals = mask.host_intervals.astype(np.int64)
    found = []
    for low, high in (intervals[:, :2].T, intervals[:, 2:].T):
        queries = np.flatnonzero(high > low)
        found.append(Ranges(queries, low[queries], high[queries]))
    return found[0], found[1]


def query_sections(mask: AttentionMask, num_kv_heads: int, section_rows: int) -> LongArray:
    """int64 [T]: which section a query belongs to; documents stay whole."""
    low, high, low2, high2 = mask.host_intervals.astype(np.int64).T
    # Queries without a first range are documents of one query each, behind the others.
    begin = np.where(high > low, low, mask.num_keys + np.arange(low.size))
    _, document = np.unique(begin, return_inverse=True)
    rows = np.bincount(document, weights=(high > low).astype(np.int64) + (high2 > low2))
    ends = np.cumsum(rows.astype(np.int64)) * num_kv_heads
    number = (ends - rows.astype(np.int64) * num_kv_heads) // section_rows
    section: LongArray = np.unique(number, return_inverse=True)[1][document]
    return section


def first_groups(ranges: Ranges, sizes: TileSizes) -> Iterator[TokenGroup]:
    """The groups of first ranges."""
    if not ranges.queries.size:
        return
    lengths = ranges.high - ranges.low
    starts, document = np.unique(ranges.low, return_inverse=True)
    extents = np.zeros(starts.size, dtype=np.int64)
    np.maximum.at(extents, document, lengths)
    size = np.where(extents < sizes.long_document, sizes.short_tile, sizes.long_tile)
    # Tiles of one size: a last one of a few keys would cost as many calls as the others.
    num_tiles = np.maximum((2 * extents + size) // (2 * size), 1)
    tile_sizes = -(-extents // num_tiles)
    num_tiles = -(-extents // tile_sizes)
    first_bucket = np.cumsum(num_tiles) - num_tiles
    bucket = first_bucket[document] + (lengths - 1) // tile_sizes[document]
    counts = np.bincount(bucket, minlength=int(num_tiles.sum()))
    order = np.argsort(bucket, kind="stable")
    begins = np.cumsum(counts) - counts
    for documents in _alike(first_bucket, num_tiles, tile_sizes, counts, sizes.batch_keys):
        tile, extent = int(tile_sizes[documents[0]]), int(extents[documents].max())
        tiles = []
        for step in reversed(range(int(num_tiles[documents[0]]))):
            buckets = first_bucket[documents] + step
            num_tokens = int(counts[buckets[0]])
            if num_tokens:
                members = order[begins[buckets][:, None] + np.arange(num_tokens)]
                width = min((step + 1) * tile, extent)
                seen = lengths[members] - step * tile
                tiles.append(TokenTile(ranges.queries[members], seen, width, width - step * tile))
        # Keys beyond a document are hidden; they repeat its first so that nothing foreign is read.
        offsets = np.arange(extent)
        inside = offsets < extents[documents][:, None]
        yield TokenGroup(starts[documents][:, None] + np.where(inside, offsets, 0), inside, tiles)


def _alike(
    first_bucket: LongArray,
    num_tiles: LongArray,
    tile: LongArray,
    counts: LongArray,
    batch_keys: int,
) -> Iterator[LongArray]:
    """Documents in batches of one tile size and equally many queries in every bucket."""
    shapes: dict[tuple[int, bytes], list[int]] = {}
    for document, (begin, number) in enumerate(zip(first_bucket, num_tiles, strict=True)):
        shape = (int(tile[document]), counts[begin : begin + number].tobytes())
        shapes.setdefault(shape, []).append(document)
    for documents in shapes.values():
        extent = int(num_tiles[documents[0]] * tile[documents[0]])
        size = max(1, batch_keys // extent)
        for start in range(0, len(documents), size):
            yield np.array(documents[start : start + size])


def second_groups(ranges: Ranges, sizes: TileSizes) -> Iterator[TokenGroup]:
    """The groups of second ranges: one tile each, which sees all of its keys."""
    if not ranges.queries.size:
        return
    # Above every end of a range and every number of queries.
    scale = max(int(ranges.high.max()), ranges.queries.size) + 1
    distinct, which, counts = np.unique(
        ranges.low * scale + ranges.high, return_inverse=True, return_counts=True
    )
    order = ranges.queries[np.argsort(which, kind="stable")]
    begins = np.cumsum(counts) - counts
    starts, lengths = distinct // scale, distinct % scale - distinct // scale
    shapes = lengths * scale + counts
    for shape in np.unique(shapes):
        length, num_tokens = divmod(int(shape), scale)
        alike = np.flatnonzero(shapes == shape)
        size = max(1, sizes.batch_keys // max(length, num_tokens))
        for at in range(0, alike.size, size):
            batch = alike[at : at + size]
            members = order[begins[batch][:, None] + np.arange(num_tokens)]
            keys = starts[batch][:, None] + np.arange(length)
            seen = np.full(members.shape, length)
            yield TokenGroup(
                keys, np.ones(keys.shape, dtype=bool), [TokenTile(members, seen, length, length)]
            )
