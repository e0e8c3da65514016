"""Which blocks of a document enter the row: only those that the loss depends on. Exact.

A noisy block is seen by itself only, so one without a masked token carries no loss and nobody
misses it. A clean block is seen by later clean blocks and by the noisy blocks after it, so clean
blocks from a document's last kept noisy block on are missed by nobody either. All noisy views of
a document share one clean copy, as long as the view needs that goes furthest.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from megatron_sdar.diffusion.noise import NoiseDraw
from megatron_sdar.diffusion.rows import RowDocument, View


def kept_copies(
    ids: NDArray[np.int32],
    labels: NDArray[np.int32],
    block_length: int,
    noises: Sequence[NoiseDraw],
) -> RowDocument:
    """One document with what the loss of these noisy views depends on.

    Args:
        ids, labels: int [n], n a multiple of block_length.
        noises: one draw per view; a view without a masked token keeps no block, but counts in
            the loss's denominator as every view does.
    """
    views = tuple(View(noise, masked_blocks(noise.masked, block_length)) for noise in noises)
    last = [int(view.kept_blocks[-1]) for view in views if view.kept_blocks.size]
    return RowDocument(ids, labels, max(last, default=0), views)


def masked_blocks(masked: NDArray[np.bool_], block_length: int) -> NDArray[np.int64]:
    """Numbers of the blocks with a masked token, ascending."""
    return np.flatnonzero(masked.reshape(-1, block_length).any(axis=1))


def num_row_blocks(document: RowDocument) -> int:
    """Blocks that the document takes in a row."""
    return document.num_clean_blocks + sum(view.kept_blocks.size for view in document.views)
