"""Key intervals -> equal-shaped batches of (queries, keys) for tiled CPU attention.

Nothing is assumed of the layout. The queries whose first range begins at one key are a document,
whatever copy they belong to; they are bucketed by how many tiles of keys they see, so all queries
of a bucket share their keys and only the last tile needs a mask. Second ranges (the own noisy
blocks) are batched by their size, exactly. Documents and blocks of equal shape share one batch.
Invariant: each non-empty range of each query lies in exactly one tile that covers it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sdar_kernels.block_mask import AttentionMask

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
        chunk_rows: rows of queries (of one key head) that are read and written at a time.
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
    chunk_rows: int = 2048
    kept_keys: int = 256


class Piece(NamedTuple):
    """Part of a tile that is computed at a time.

    Attributes:
        start, end: which of the key set's batch.
        first, last: rows of the tile: those of some batch entries, or some rows of one entry.
    """

    start: int
    end: int
    first: int
    last: int


@dataclass(frozen=True)
class QueryTile:
    """Queries of a batch that see the first `width` keys of their document or block.

    Attributes:
        start: first row in its chunk; its rows are [batch, num_tokens].
        num_tokens: of a batch entry.
        seen: int64 [batch * num_tokens], how many of the last `masked` keys a row sees; None
            if it sees all of them.
        width: keys.
        masked: keys at the end of `width` that need the mask.
        kept: where its probabilities begin, per query head of a key head, among those kept for
            backward; None if they are computed again.
        pieces: the tile, in parts of bounded size.
    """

    start: int
    num_tokens: int
    seen: Tensor | None
    width: int
    masked: int
    kept: int | None
    pieces: tuple[Piece, ...]


@dataclass(frozen=True)
class QueryChunk:
    """Tiles whose queries are read and written together.

    Attributes:
        index: int64 [rows], token * K + key head, tile by tile; rows of q, which keys need not
            share.
        tiles: in the order of their rows.
    """

    index: Tensor
    tiles: tuple[QueryTile, ...]


@dataclass(frozen=True)
class KeySet:
    """Keys of equally shaped documents (or own blocks), and the tiles that read them.

    Attributes:
        index: int64 [batch * extent], token * K + key head.
        batch: documents times key heads.
        extent: keys of each, a multiple of the tile; the last ones may repeat the first.
        second: whether queries read these keys through their second range.
        chunks: the widest tile first, which reads all `extent` keys.
    """

    index: Tensor
    batch: int
    extent: int
    second: bool
    chunks: tuple[QueryChunk, ...]

    @property
    def tiles(self) -> tuple[QueryTile, ...]:
        return tuple(tile for chunk in self.chunks for tile in chunk.tiles)


@dataclass(frozen=True)
class TilePlan:
    """Key sets of all first ranges, then of all second ranges.

    Attributes:
        key_sets: in the order in which they must run.
        num_pairs: (query, key) pairs per query head that are computed.
        num_kept: probabilities kept for backward, per query head of a key head.
    """

    key_sets: tuple[KeySet, ...]
    num_pairs: int
    num_kept: int


@dataclass(frozen=True)
class _Tokens:
    """A tile before its place is known: query tokens and keys seen, [documents, num_tokens]."""

    tokens: LongArray
    seen: LongArray
    width: int
    masked: int


def waste(mask: AttentionMask, sizes: TileSizes | None = None) -> float:
    """Computed over allowed (query, key) pairs of the plan."""
    return mask.plan(make_tile_plan, 1, sizes or TileSizes()).num_pairs / mask.num_pairs


def make_tile_plan(
    mask: AttentionMask, num_kv_heads: int, sizes: TileSizes, groups: int = 1
) -> TilePlan:
    """The plan of a micro-batch for `num_kv_heads` key heads of `groups` query heads each."""
    builder = _Builder(mask, num_kv_heads, sizes, groups)
    for keys, tiles in _first_ranges(mask, sizes):
        builder.add(keys, tiles, second=False)
    for keys, tile in _second_ranges(mask, sizes):
        builder.add(keys, [tile], second=True)
    return TilePlan(tuple(builder.key_sets), builder.num_pairs // num_kv_heads, builder.num_kept)


class _Builder:
    """Collects key sets, token by token, and gives each tile its place."""

    def __init__(
        self, mask: AttentionMask, num_kv_heads: int, sizes: TileSizes, groups: int
    ) -> None:
        self._heads = np.arange(num_kv_heads)[:, None]
        self._device = mask.key_intervals.device
        self._sizes, self._groups = sizes, groups
        self.key_sets: list[KeySet] = []
        self.num_pairs = 0
        self.num_kept = 0

    def add(self, keys: LongArray, tiles: Sequence[_Tokens], *, second: bool) -> None:
        """A key set of key tokens [documents, extent]; first ranges may keep probabilities."""
        batch = len(keys) * len(self._heads)
        chunks: list[QueryChunk] = []
        waiting: list[_Tokens] = []
        for tile in tiles:
            rows = sum(each.tokens.size for each in [*waiting, tile]) * len(self._heads)
            if waiting and rows > self._sizes.chunk_rows:
                chunks.append(self._chunk(waiting, batch, second))
                waiting = []
            waiting.append(tile)
        chunks.append(self._chunk(waiting, batch, second))
        index = self._on_device(self._rows(keys))
        self.key_sets.append(KeySet(index, batch, keys.shape[1], second, tuple(chunks)))

    def _chunk(self, tiles: Sequence[_Tokens], batch: int, second: bool) -> QueryChunk:
        placed = []
        start = 0
        for tile in tiles:
            num_tokens = tile.tokens.shape[1]
            num_scores = batch * num_tokens * tile.width
            kept = None
            if not second and tile.width <= self._sizes.kept_keys:
                kept, self.num_kept = self.num_kept, self.num_kept + num_scores
            seen = None
            if (tile.seen < tile.masked).any():
                seen = self._on_device(np.repeat(tile.seen[:, None], len(self._heads), axis=1))
            pieces = tuple(self._pieces(batch, num_tokens, tile.width))
            placed.append(QueryTile(start, num_tokens, seen, tile.width, tile.masked, kept, pieces))
            start += batch * num_tokens
            self.num_pairs += num_scores
        rows = np.concatenate([self._rows(tile.tokens).ravel() for tile in tiles])
        return QueryChunk(self._on_device(rows), tuple(placed))

    def _pieces(self, batch: int, num_tokens: int, width: int) -> Iterator[Piece]:
        num_scores = num_tokens * self._groups * width
        if num_scores > self._sizes.row_scores:
            # Fewer than 128 rows would cost more in packing the keys than they save in cache.
            step = max(-(-128 // self._groups), self._sizes.row_scores // (width * self._groups))
            for entry in range(batch):
                for query in range(0, num_tokens, step):
                    first = entry * num_tokens + query
                    last = entry * num_tokens + min(query + step, num_tokens)
                    yield Piece(entry, entry + 1, first, last)
        else:
            step = max(1, self._sizes.batch_scores // num_scores)
            for entry in range(0, batch, step):
                end = min(entry + step, batch)
                yield Piece(entry, end, entry * num_tokens, end * num_tokens)

    def _rows(self, tokens: LongArray) -> LongArray:
        """[documents, tokens] -> [documents, heads, tokens]: rows of a source [T * K, columns]."""
        return tokens[:, None] * len(self._heads) + self._heads

    def _on_device(self, array: LongArray) -> Tensor:
        return torch.from_numpy(array.ravel()).to(self._device)


def _first_ranges(
    mask: AttentionMask, sizes: TileSizes
) -> Iterator[tuple[LongArray, list[_Tokens]]]:
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
    for documents in _alike(first_bucket, num_tiles, tile_sizes, counts, sizes.batch_keys):
        size = int(tile_sizes[documents[0]])
        extent = int(num_tiles[documents[0]]) * size
        tiles = []
        for step in reversed(range(extent // size)):
            buckets = first_bucket[documents] + step
            num_tokens = int(counts[buckets[0]])
            if num_tokens:
                members = order[begins[buckets][:, None] + np.arange(num_tokens)]
                tiles.append(_Tokens(queries[members], seen[members], (step + 1) * size, size))
        # Keys beyond a document are hidden; they repeat its first so that nothing foreign is read.
        offsets = np.arange(extent)
        inside = offsets < extents[documents][:, None]
        yield starts[documents][:, None] + np.where(inside, offsets, 0), tiles


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


def _second_ranges(mask: AttentionMask, sizes: TileSizes) -> Iterator[tuple[LongArray, _Tokens]]:
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
            yield keys, _Tokens(members, np.full(members.shape, length), length, length)
