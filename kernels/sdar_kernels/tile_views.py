"""What the tiles of tiled attention read and write: views of a workspace's buffers.

Shape legend: b entries of a batch (documents or blocks, times key heads), r queries of an entry
times G query heads of a key head, w keys, H head_dim.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from torch import Tensor

from sdar_kernels.tile_plan import Section


@dataclass(frozen=True, slots=True)
class KeyGradient:
    """Where a piece adds to the gradient of its keys or values.

    Attributes:
        total: the sums of these entries, [b, w, H], or [b, H, w] if `transposed`.
        part: [b, w, H] or [b, H, w] for a product that cannot go into `total` at once, because
            sums are wider or not contiguous (torch would loop over the batch); None if it can.
        transposed: rows^T weights is computed, not weights^T rows.
        fresh: nothing has been added yet.
    """

    total: Tensor
    part: Tensor | None
    transposed: bool
    fresh: bool

    def add(self, weights: Tensor, rows: Tensor, scale: float) -> None:
        """+= scale * weights^T rows; weights [b, r, w], rows [b, r, H]."""
        left, right = (rows, weights) if self.transposed else (weights, rows)
        left = left.transpose(1, 2)
        if self.part is None:
            self.total.baddbmm_(left, right, beta=0 if self.fresh else 1, alpha=scale)
            return
        self.part.baddbmm_(left, right, beta=0, alpha=scale)
        if self.fresh:
            self.total.copy_(self.part)
        else:
            self.total.add_(self.part)


@dataclass(frozen=True, slots=True)
class PieceViews:
    """What one piece of a tile reads and writes.

    Attributes:
        queries, results: [b, r, H]; results holds the output, in backward first its gradient and
            then that of the queries.
        keys, values, keys_t, values_t: [b, w, H] and transposed.
        hidden: what is added to the scores of the last keys, [b, queries, 1, masked]; or None.
        scores: [b, r, w]; None if they are kept for backward.
        shape: of the scores.
        grad_scores: [b, r, w].
        top, largest: largest score and probability of every row, [b, r].
        delta: [b, r, 1].
        sum_keys, sum_values: their gradients.
    """

    queries: Tensor
    results: Tensor
    keys: Tensor
    keys_t: Tensor
    values: Tensor
    values_t: Tensor
    hidden: Tensor | None
    scores: Tensor | None
    shape: tuple[int, int, int]
    grad_scores: Tensor
    top: Tensor
    largest: Tensor
    delta: Tensor
    sum_keys: KeyGradient
    sum_values: KeyGradient


@dataclass(frozen=True, slots=True)
class SectionViews:
    """A section's buffers; rows, first and second as in `Section`.

    Attributes:
        queries, results: [rows, G * H]; padded: results with one row to spare.
        keys, values: [key rows, H].
        sum_keys, sum_values: [key rows + 1, H].
        second: [rows of second ranges, G * H] of results; partners: for as many rows.
        lse: [rows + 1, G]; top, largest, delta: [rows, G].
        turned: (sums [batch, extent, H], what to copy into them, [batch, H, extent] transposed).
        pieces: in order; may be iterated over again and again.
    """

    section: Section
    queries: Tensor
    results: Tensor
    padded: Tensor
    keys: Tensor
    values: Tensor
    sum_keys: Tensor
    sum_values: Tensor
    second: Tensor
    partners: Tensor
    lse: Tensor
    top: Tensor
    largest: Tensor
    delta: Tensor
    turned: tuple[tuple[Tensor, Tensor], ...]
    pieces: Iterable[PieceViews]
