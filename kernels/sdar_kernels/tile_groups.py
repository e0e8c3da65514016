"""Key intervals -> equal-shaped batches of (queries, keys) for tiled CPU attention.

Nothing is assumed of the layout. The queries whose first range begins at one key are a document,
whatever copy they belong to; they are bucketed by how many tiles of keys they see, so all queries
of a bucket share their keys and only the last tile needs a mask. Second ranges (the own noisy
blocks) are batched by their size, exactly. Documents and blocks of equal shape share one batch.
Invariant: each non-empty range of each query lies in exactly one tile that covers it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sdar_kernels.block_mask import AttentionMask
from sdar_kernels.tile_rows import Rows

LongArray = NDArray[np.int64]


@dataclass(frozen=True)
class TileSizes:
    """How work is cut; the defaults were measured on a core with 1 MiB of L2 cache.

    Attributes:
        short_tile, long_tile: tokens of a tile in documents below and from `long_document` on.
        long_document: tokens.
        batch_keys: keys of a batch of documents or blocks, a longer document is a batch itself.
        batch_scores: scores computed at a time of a batch.
        row_scores: scores computed at a time of the queries of one key head and document.
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
    kept_keys: int = 128


@dataclass(frozen=True)
class QueryTile:
    """Queries of a batch that see the first `width` keys of their document or block.

    Attributes:
        rows: query rows, a document being an entry; rows of q, which keys need not share.
        seen: int64 [batch * num_tokens], how many of the last `masked` keys a row sees; None
            if it sees all of them.
        width: keys.
        masked: keys at the end of `width` that need the mask.
        kept: where its probabilities begin, per query head of a key head, among those kept for
            backward; None if they are computed again.
    """

    rows: Rows
    seen: Tensor | None
    width: int
    masked: int
    kept: int | None = None


@dataclass(frozen=True)
class KeySet:
    """Keys of equally shaped documents (or own blocks), and the tiles that read them.

    Attributes:
        rows: keys, a document (or own block) being an entry.
        batch: documents times key heads.
        extent: keys of each, a multiple of the tile; the last ones may repeat the first.
        second: whether queries read these keys through their second range.
        tiles: the widest first, which reads all `extent` keys.
    """

    rows: Rows
    batch: int
    extent: int
    second: bool
    tiles: tuple[QueryTile, ...]


@dataclass(frozen=True)
class TilePlan:
    """Key sets of all first ranges, then of all second ranges.

    Attributes:
        key_sets: in the order in which they must run.
        second_only: query rows without a first range.
        num_pairs: (query, key) pairs per query head that are computed.
        num_kept: probabilities kept for backward, per query head of a key head.
    """

    key_sets: tuple[KeySet, ...]
    second_only: Rows
    num_pairs: int
    num_kept: int


def waste(mask: AttentionMask, sizes: TileSizes | None = None) -> float:
    """Computed over allowed (query, key) pairs of the plan."""
    return mask.plan(make_tile_plan, 1, sizes or TileSizes()).num_pairs / mask.num_pairs


def make_tile_plan(mask: AttentionMask, num_kv_heads: int, sizes: TileSizes) -> TilePlan:
    """The plan of a micro-batch for attention with `num_kv_heads` key heads."""
    first = _first_ranges(mask, num_kv_heads, sizes)
    key_sets = (*first, *_second_ranges(mask, num_kv_heads, sizes))
    low, high = mask.host_intervals[:, :2].T
    second_only = _rows(mask, np.flatnonzero(low == high)[None], num_kv_heads)
    pairs = sum(
        key_set.batch * tile.rows.num_tokens * tile.width
        for key_set in key_sets
        for tile in key_set.tiles
    )
    num_kept = sum(
        key_set.batch * tile.rows.num_tokens * tile.width
        for key_set in key_sets
        for tile in key_set.tiles
        if tile.kept is not None
    )
    return TilePlan(key_sets, second_only, pairs // num_kv_heads, num_kept)


def _first_ranges(mask: AttentionMask, num_kv_heads: int, sizes: TileSizes) -> Iterator[KeySet]:
    low, high = mask.host_intervals[:, :2].astype(np.int64).T
    queries = np.flatnonzero(high > low)
    lengths = (high - low)[queries]
    starts, document = np.unique(low[queries], return_inverse=True)
    extents = np.zeros(starts.size, dtype=np.int64)
    np.maximum.at(extents, document, lengths)
    tile_sizes = np.where(extents < sizes.long_document, sizes.short_tile, sizes.long_tile)
    tile_sizes = np.minimum(tile_sizes, extents)
    num_tiles = -(-extents // tile_sizes)
    first_bucket = np.cumsum(num_tiles) - num_tiles
    bucket = first_bucket[document] + (lengths - 1) // tile_sizes[document]
    seen = (lengths - 1) % tile_sizes[document] + 1
    counts = np.bincount(bucket, minlength=int(num_tiles.sum()))
    order = np.argsort(bucket, kind="stable")
    begins = np.cumsum(counts) - counts
    num_kept = 0
    for documents in _alike(first_bucket, num_tiles, tile_sizes, counts, sizes.batch_keys):
        size = int(tile_sizes[documents[0]])
        extent = int(num_tiles[documents[0]]) * size
        tiles = []
        for step in reversed(range(extent // size)):
            buckets = first_bucket[documents] + step
            num_tokens = int(counts[buckets[0]])
            if num_tokens:
                members = order[begins[buckets][:, None] + np.arange(num_tokens)]
                width = (step + 1) * size
                tile = _query_tile(mask, queries[members], seen[members], num_kv_heads, width, size)
                if width <= sizes.kept_keys:
                    tile = replace(tile, kept=num_kept)
                    num_kept += members.size * num_kv_heads * width
                tiles.append(tile)
        # Keys beyond a document are hidden; they repeat its first so that nothing foreign is read.
        offsets = np.arange(extent)
        inside = offsets < extents[documents][:, None]
        keys = starts[documents][:, None] + np.where(inside, offsets, 0)
        yield _key_set(mask, keys, num_kv_heads, False, tiles)


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


def _second_ranges(mask: AttentionMask, num_kv_heads: int, sizes: TileSizes) -> Iterator[KeySet]:
    low, high = mask.host_intervals[:, 2:].astype(np.int64).T
    queries = np.flatnonzero(high > low)
    # Above every end of a range and every number of queries.
    scale = max(mask.num_keys, mask.num_tokens) + 1
    ranges, which, counts = np.unique(
        low[queries] * scale + high[queries], return_inverse=True, return_counts=True
    )
    order = queries[np.argsort(which, kind="stable")]
    begins = np.cumsum(counts) - counts
    starts, lengths = ranges // scale, ranges % scale - ranges // scale
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
            tile = _query_tile(mask, members, seen, num_kv_heads, length, length)
            yield _key_set(mask, keys, num_kv_heads, True, [tile])


def _query_tile(
    mask: AttentionMask,
    tokens: LongArray,
    seen: LongArray,
    num_kv_heads: int,
    width: int,
    masked: int,
) -> QueryTile:
    """A tile of tokens [documents, num_tokens]."""
    rows = _rows(mask, tokens, num_kv_heads)
    if (seen == masked).all():
        return QueryTile(rows, None, width, masked)
    repeated = np.repeat(seen[:, None], num_kv_heads, axis=1)
    return QueryTile(rows, _to_device(mask, repeated), width, masked)


def _key_set(
    mask: AttentionMask, tokens: LongArray, num_kv_heads: int, second: bool, tiles: list[QueryTile]
) -> KeySet:
    """A set of key tokens [documents, extent]."""
    rows = _rows(mask, tokens, num_kv_heads)
    batch = tokens.shape[0] * num_kv_heads
    return KeySet(rows, batch, tokens.shape[1], second, tuple(tiles))


def _rows(mask: AttentionMask, tokens: LongArray, num_kv_heads: int) -> Rows:
    return Rows.of_tokens(tokens, num_kv_heads, mask.key_intervals.device)


def _to_device(mask: AttentionMask, array: LongArray) -> Tensor:
    return torch.from_numpy(array.ravel()).to(mask.key_intervals.device)
