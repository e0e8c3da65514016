"""Which documents the forms train on, and the rows that each form makes of them.

In a long run nearly every row is full. A few rows are not, by chance, and that chance would
decide the comparison; so documents are chosen whose rows are full in every form.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from megatron_sdar.benchmark.step_data import Document
from megatron_sdar.data.loading.packing import fill_rows, pack_documents
from megatron_sdar.diffusion.rows import Row, RowDocument, build_row, full_copies
from megatron_sdar.diffusion.savings import kept_copies, num_row_blocks

_PAD_ID = 0
# Packings that are tried once one of them will do.
_TRIES = 400


@dataclass(frozen=True)
class Packing:
    """Document numbers of each row, and the occupied share of the rows."""

    rows: tuple[tuple[int, ...], ...]
    fill: float


@dataclass(frozen=True)
class Sizes:
    """What documents take in the rows of one form.

    Attributes:
        blocks: int64 [N], of each document.
        capacity: blocks of a row.
    """

    blocks: NDArray[np.int64]
    capacity: int

    def pack(self) -> tuple[tuple[int, ...], ...]:
        """Document numbers of each row; documents without a block are in none."""
        offsets, order = fill_rows(self.blocks, self.capacity)
        return tuple(tuple(order[start:end].tolist()) for start, end in pairwise(offsets.tolist()))

    def fill(self, num_rows: int) -> float:
        """Occupied share of so many rows."""
        return float(self.blocks.sum() / (num_rows * self.capacity))

    def run(self, start: int, end: int) -> Sizes:
        """Those of some neighbours."""
        return Sizes(self.blocks[start:end], self.capacity)


Measure = Callable[[Sequence[Document]], Sizes]


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

    def whole_sizes(self, documents: Sequence[Document]) -> Sizes:
        """Published form: documents take their length."""
        blocks = np.array([document.ids.size // self.block_length for document in documents])
        return Sizes(blocks, self.length // self.block_length)

    def kept_sizes(self, documents: Sequence[Document], num_views: int = 1) -> Sizes:
        """Exact savings: documents take what their noise leaves of them."""
        blocks = np.array([num_row_blocks(self._kept(each, num_views)) for each in documents])
        return Sizes(blocks, self.kept_row_length // self.block_length)

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
        sizes = self.kept_sizes(documents, num_views)
        first, *others = sizes.pack()
        rows = ((*first, *np.flatnonzero(sizes.blocks == 0).tolist()), *others)
        return Packing(rows, sizes.fill(len(rows)))

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
    documents: Sequence[Document], measures: Sequence[Measure], num_rows: int, max_length: int
) -> list[Document]:
    """Neighbouring documents whose rows are fullest, whichever of the forms makes them.

    Args:
        documents: the corpus.
        measures: what documents take in each form; the first one gives exactly num_rows rows.
        num_rows: of the first form.
        max_length: longer documents are left out.

    Raises:
        ValueError: the corpus is too small.
    """
    fitting = [document for document in documents if document.ids.size <= max_length]
    forms = [measure(fitting) for measure in measures]
    best, chosen = 0.0, range(0)
    for tried, (bound, run) in enumerate(_runs(forms, num_rows)):
        if chosen and (bound <= best or tried >= _TRIES):
            break
        sizes = [form.run(run.start, run.stop) for form in forms]
        counts = [len(each.pack()) for each in sizes]
        fill = min(each.fill(count) for each, count in zip(sizes, counts, strict=True))
        if counts[0] == num_rows and fill > best:
            best, chosen = fill, run
    if not chosen:
        raise ValueError(
            f"the input has too few documents of at most {max_length} tokens to fill {num_rows} "
            "rows; give a larger --input or shorter --lengths"
        )
    return fitting[chosen.start : chosen.stop]


def _runs(forms: Sequence[Sizes], num_rows: int) -> list[tuple[float, range]]:
    """Runs of neighbours that may give num_rows rows of the first form, the most promising first.

    With each the fill that it could reach at best in every form: in num_rows rows of the first, in
    as few of the others as its blocks need. Two rows that are half full would be one, so
    num_rows rows are more than half full.
    """
    sums = [np.concatenate([[0], np.cumsum(form.blocks)]) for form in forms]
    room = num_rows * forms[0].capacity
    runs = []
    for start in range(len(forms[0].blocks)):
        before = sums[0][start]
        ends = np.searchsorted(sums[0], [before + room // 2, before + room], side="right")
        for end in range(int(ends[0]), int(ends[1])):
            totals = [int(each[end] - each[start]) for each in sums]
            rows = [-(-total // form.capacity) for total, form in zip(totals, forms, strict=True)]
            rows[0] = num_rows
            if all(totals):
                bound = min(
                    total / (count * form.capacity)
                    for total, count, form in zip(totals, rows, forms, strict=True)
                )
                runs.append((bound, range(start, end)))
    return sorted(runs, key=lambda each: (-each[0], each[1].start, each[1].stop))
