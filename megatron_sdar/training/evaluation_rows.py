"""What an evaluation computes, in rows: every document at every noise level, each once.

The levels of a document share its clean copy as far as they fit in one row; blocks without a
masked token are left out, as in training. The plan depends on documents, levels, block length and
row length only, so it is made once; noise and tokens are drawn and read again when a row is built.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from megatron_sdar.data.loading.packing import fill_rows
from megatron_sdar.diffusion.evaluation_noise import evaluation_noises
from megatron_sdar.diffusion.rows import (
    IGNORED_LABEL,
    Row,
    RowDocument,
    build_row,
    concatenate_rows,
)
from megatron_sdar.diffusion.savings import kept_copies, num_row_blocks
from megatron_sdar.training.evaluation_data import EvaluationSet


@dataclass(frozen=True)
class LevelRow:
    """A micro-batch, and the noise level of each of its M loss positions, int64 [M]."""

    row: Row
    levels: NDArray[np.int64]


@dataclass(frozen=True)
class _Share:
    """An item of the set at some levels: what lies in a row together."""

    item: tuple[int, int]
    levels: tuple[int, ...]


class EvaluationRows:
    """The rows of one evaluation set with one block length.

    Args:
        documents: the set.
        block_length: B.
        num_levels: noise levels.
        row_length: tokens of a row; more if a document at one level needs more.
        multiple_of: the row length is a multiple of this (tp, for sequence parallelism).

    Raises:
        ValueError: the set has no label token.
    """

    def __init__(
        self,
        documents: EvaluationSet,
        block_length: int,
        num_levels: int,
        row_length: int,
        multiple_of: int = 1,
    ) -> None:
        self._documents = documents
        self._block_length = block_length
        self._num_levels = num_levels
        self.num_label_tokens = 0
        capacity = row_length // block_length
        shares: list[_Share] = []
        costs: list[int] = []
        for item in documents.items:
            for share, cost in self._shares(item, capacity):
                shares.append(share)
                costs.append(cost)
        if not self.num_label_tokens:
            raise ValueError(
                f"evaluation set {documents.name}: no token of it has a label, so there is no "
                "loss; use data with answers"
            )
        self.row_length = -(-max(row_length, *(c * block_length for c in costs)) // multiple_of)
        self.row_length *= multiple_of
        offsets, order = fill_rows(np.array(costs, np.int64), self.row_length // block_length)
        self._rows = [
            [shares[number] for number in part.tolist()] for part in np.split(order, offsets[1:-1])
        ]

    def __len__(self) -> int:
        return len(self._rows)

    def micro_batch(self, first: int, count: int) -> LevelRow:
        """Rows [first, first + count), those that there are, as one micro-batch."""
        rows, levels = [], []
        for shares in self._rows[first : first + count]:
            documents = [self._document(share) for share in shares]
            assert self._documents.stream.options.mask_token_id is not None
            rows.append(
                build_row(
                    documents,
                    self.row_length,
                    self._block_length,
                    self._documents.stream.options.mask_token_id,
                    self._documents.stream.options.pad_token_id,
                )
            )
            levels += [
                np.full(int(view.noise.masked.sum()), level)
                for share, document in zip(shares, documents, strict=True)
                for level, view in zip(share.levels, document.views, strict=True)
            ]
        return LevelRow(concatenate_rows(rows), np.concatenate(levels))

    def _shares(self, item: tuple[int, int], capacity: int) -> Iterator[tuple[_Share, int]]:
        """The item's levels in as few rows as hold them, with the blocks that each part takes."""
        ids, labels = self._documents.tokens(item, self._block_length)
        self.num_label_tokens += int(np.count_nonzero(labels != IGNORED_LABEL))
        noises = evaluation_noises(
            *item, labels != IGNORED_LABEL, range(self._num_levels), self._num_levels
        )
        first = 0
        while first < self._num_levels:
            last = self._num_levels
            while True:
                cost = num_row_blocks(
                    kept_copies(ids, labels, self._block_length, noises[first:last])
                )
                if cost <= capacity or last == first + 1:
                    break
                last -= 1
            yield _Share(item, tuple(range(first, last))), cost
            first = last

    def _document(self, share: _Share) -> RowDocument:
        ids, labels = self._documents.tokens(share.item, self._block_length)
        noises = evaluation_noises(
            *share.item, labels != IGNORED_LABEL, share.levels, self._num_levels
        )
        return kept_copies(ids, labels, self._block_length, noises)


def deal(num_micro_batches: int, dp_rank: int, dp_size: int) -> Sequence[tuple[int, bool]]:
    """(micro-batch, whether it counts) of one data-parallel rank; all have equally many.

    Ranks that share weights (FSDP) must run as many forwards; who has none left repeats the first
    micro-batch, which counts once.
    """
    rounds = -(-num_micro_batches // dp_size)
    mine = [turn * dp_size + dp_rank for turn in range(rounds)]
    return [(number, True) if number < num_micro_batches else (0, False) for number in mine]
