"""Gradients of keys and values, to which the tiles of tiled attention add in turn.

Shape legend: b entries of a batch, r query rows of an entry, w keys, H head_dim.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


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
