"""One group of packed rows: its documents with their noise, packed again by what is left of them.

A pure function of which packed rows are taken, of the group's number (for the order of its rows)
and of the block length. Tokens are not kept: a row reads its own again.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from megatron_sdar.data.loading.packing import fill_rows
from megatron_sdar.data.loading.row_stream import RowStream
from megatron_sdar.diffusion.noise import GROUP_STREAM, NoiseDraw, NoiseKey, philox_words
from megatron_sdar.diffusion.noise_schedule import NoisyDocuments, draw_views
from megatron_sdar.diffusion.rows import IGNORED_LABEL, RowDocument
from megatron_sdar.diffusion.savings import kept_copies, num_row_blocks


@dataclass(frozen=True)
class Item:
    """One document (or piece) of a group, without its tokens.

    place: documents before it in the epoch of its dataset, which is `part` of the blend.
    """

    part: int
    place: int
    document_id: int
    piece: int
    noises: tuple[NoiseDraw, ...] = ()


@dataclass(frozen=True)
class Group:
    """Its items, which of them share a row, and how many packed rows they came from."""

    items: list[Item]
    rows: list[list[int]]
    num_source_rows: int
    block_length: int

    def documents(self, source: RowStream, members: Sequence[int]) -> list[RowDocument]:
        """Items of a row with their tokens, cut to the blocks that the loss depends on."""
        return [self._document(source, self.items[number]) for number in members]

    def _document(self, source: RowStream, item: Item) -> RowDocument:
        ids, labels = source.tokens(item.part, item.document_id, item.piece, self.block_length)
        return kept_copies(ids, labels, self.block_length, item.noises)


def build_group(
    source: RowStream,
    places: Sequence[tuple[int, int]],
    number: int,
    block_length: int,
    row_length: int | None,
) -> Group:
    """The group of some packed rows.

    Args:
        source: whose rows.
        places: (dataset, which of its packed rows over all epochs) of each.
        number: of the group, for the order of its rows.
        block_length: of all its rows.
        row_length: tokens of a row; None: the documents of the packed rows stay together.
    """
    by_epoch: dict[int, list[Item]] = {}
    for part, count in places:
        epoch, row = source.row_of(part, count)
        index, store = source.parts[part].index, source.parts[part].store
        pairs = zip(store.ids_at(index.row(row)), index.row_pieces(row), strict=True)
        chosen = [
            Item(part, place, int(document), int(piece))
            for place, (document, piece) in enumerate(pairs, source.documents_before(part, count))
        ]
        by_epoch.setdefault(epoch, []).extend(chosen)
    items: list[Item] = []
    costs: list[int] = []
    for epoch, chosen in by_epoch.items():
        for item, cost in _draw(source, epoch, chosen, block_length):
            items.append(item)
            costs.append(cost)
    rows = [list(range(len(costs)))]
    if row_length is not None:
        rows = _pack(costs, row_length // block_length)
        if source.options.shuffle:
            words = philox_words(source.options.seed, number, (GROUP_STREAM, 0, 0), len(rows))
            rows = [rows[place] for place in np.argsort(words, kind="stable")]
    return Group(items, rows, len(places), block_length)


def _draw(
    source: RowStream, epoch: int, chosen: list[Item], block_length: int
) -> list[tuple[Item, int]]:
    """Every document with its noise and the blocks it takes in a row."""
    tokens = [
        source.tokens(item.part, item.document_id, item.piece, block_length) for item in chosen
    ]
    views = draw_views(
        source.noise,
        NoiseKey(source.options.seed, epoch),
        NoisyDocuments(
            [item.document_id for item in chosen],
            [item.piece for item in chosen],
            [item.part for item in chosen],
            [item.place for item in chosen],
            [ids.size for ids, _ in tokens],
            np.concatenate([labels for _, labels in tokens]) != IGNORED_LABEL,
        ),
        block_length,
    )
    return [
        (
            replace(item, noises=noises),
            num_row_blocks(kept_copies(ids, labels, block_length, noises)),
        )
        for item, (ids, labels), noises in zip(chosen, tokens, views, strict=True)
    ]


def _pack(costs: list[int], capacity: int) -> list[list[int]]:
    """Which items share a row of so many blocks."""
    sizes = np.array(costs, dtype=np.int64)
    silent = np.flatnonzero(sizes == 0).tolist()
    if len(silent) == len(costs):
        return [silent]
    offsets, order = fill_rows(sizes, capacity)
    rows = [part.tolist() for part in np.split(order, offsets[1:-1])]
    # They take no room, but their label tokens count in the loss's denominator.
    for place, item in enumerate(silent):
        rows[place % len(rows)].append(item)
    return rows
