"""Which documents the forms train on, and the rows that each form makes of them.

In a long run nearly every row is full. A few rows are not, by chance, and that chance would
decide the comparison; so documents are chosen whose rows are full in every form.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from megatron_sdar.benchmark.step_data import Document
from megatron_sdar.data.loading.packing import fill_rows, pack_documents
from megatron_sdar.diffusion.rows import Row, RowDocument, build_row, full_copies
from megatron_sdar.diffusion.savings import kept_copies, num_row_blocks

_PAD_ID = 0
_STARTS = 40


@dataclass(frozen=True)
class Packing:
    """Document numbers of each row, and the occupied share of the rows."""

    rows: tuple[tuple[int, ...], ...]
    fill: float


Packer = Callable[[Sequence[Document]], Packing]


@dataclass(frozen=True)
class RowShape:
    """How documents become rows.

    Attributes:
        length: document tokens of a row of both copies, which has twice as many.
        kept_row_length: tokens of a row with exact savings.
    """

    length: int
    block_length: int
    mask_token_id: int
    kept_row_length: int

    def pack_whole(self, documents: Sequence[Document]) -> Packing:
        """Published form: documents packed by their length."""
        lengths = [document.ids.size for document in documents]
        index = pack_documents(lengths, self.length, self.block_length, truncate_mode="drop")
        assert not index.num_dropped, "documents that do not fit were left out"
        rows = tuple(tuple(index.row(number).tolist()) for number in range(len(index)))
        return Packing(rows, index.fill)

    def longest(self, num_views: int) -> int:
        """Tokens of the longest document of which rows with exact savings hold any noise."""
        return min(self.length, self.kept_row_length // (1 + num_views))

    def pack_kept(self, documents: Sequence[Document], num_views: int = 1) -> Packing:
        """Exact savings: documents packed by what their noise leaves of them.

        One without a masked token takes no room; the first row counts its labels.
        """
        copies = [self._kept(document, num_views) for document in documents]
        sizes = np.array([num_row_blocks(each) for each in copies])
        capacity = self.kept_row_length // self.block_length
        offsets, order = fill_rows(sizes, capacity)
        edges = offsets.tolist()
        rows = [order[start:end].tolist() for start, end in pairwise(edges)]
        rows[0] += np.flatnonzero(sizes == 0).tolist()
        return Packing(tuple(map(tuple, rows)), float(sizes.sum() / (len(rows) * capacity)))

    def whole_rows(self, documents: Sequence[Document]) -> list[Row]:
        """Rows of both copies, whole."""
        return [
            self._build([self._full(documents[number]) for number in row], 2 * self.length)
            for row in self.pack_whole(documents).rows
        ]

    def kept_rows(self, documents: Sequence[Document], num_views: int = 1) -> list[Row]:
        """Rows of the blocks that the loss depends on; the views of a document share a copy."""
        return [
            self._build(
                [self._kept(documents[number], num_views) for number in row], self.kept_row_length
            )
            for row in self.pack_kept(documents, num_views).rows
        ]

    def _build(self, documents: Sequence[RowDocument], row_length: int) -> Row:
        return build_row(documents, row_length, self.block_length, self.mask_token_id, _PAD_ID)

    def _full(self, document: Document) -> RowDocument:
        return full_copies(document.ids, document.labels, self.block_length, document.noise)

    def _kept(self, document: Document, num_views: int) -> RowDocument:
        views = document.views(num_views)
        return kept_copies(document.ids, document.labels, self.block_length, views)


def choose_documents(
    documents: Sequence[Document], packers: Sequence[Packer], num_rows: int, max_length: int
) -> list[Document]:
    """Neighbouring documents whose rows are fullest, whichever of the packers makes them.

    Args:
        documents: the corpus.
        packers: the forms; the first one gives exactly num_rows rows.
        num_rows: of the first form.
        max_length: longer documents are left out.

    Raises:
        ValueError: the corpus is too small.
    """
    fitting = [document for document in documents if document.ids.size <= max_length]
    best: tuple[float, list[Document]] = (0.0, [])
    stride = max(1, len(fitting) // _STARTS)
    for start in range(0, len(fitting), stride):
        for count in _candidate_counts(fitting[start:], packers[0], num_rows):
            chosen = fitting[start : start + count]
            packings = [pack(chosen) for pack in packers]
            if len(packings[0].rows) != num_rows:
                continue
            fill = min(packing.fill for packing in packings)
            best = max(best, (fill, chosen), key=lambda pair: pair[0])
    if not best[1]:
        raise ValueError(
            f"the input has too few documents of at most {max_length} tokens to fill {num_rows} "
            "rows; give a larger --input or shorter --lengths"
        )
    return best[1]


def _candidate_counts(documents: Sequence[Document], pack: Packer, num_rows: int) -> range:
    """Numbers of documents that may give num_rows rows: around the largest that does."""
    low, high = 0, 2 * num_rows
    while high < len(documents) and len(pack(documents[:high]).rows) <= num_rows:
        low, high = high, 2 * high
    high = min(high, len(documents))
    while low < high:
        middle = (low + high + 1) // 2
        if len(pack(documents[:middle]).rows) <= num_rows:
            low = middle
        else:
            high = middle - 1
    return range(max(1, low - low // (2 * num_rows)), low + 1)
