"""Key intervals that no packer would make, and some of the queries of a mask."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from sdar_kernels.block_mask import AttentionMask


def random_intervals(seed: int, num_tokens: int) -> NDArray[np.int32]:
    """int32 [T, 4]; stretches of queries share their ranges, some ranges are empty."""
    rng = np.random.default_rng(seed)
    intervals = np.zeros((num_tokens, 4), dtype=np.int32)
    for query in range(num_tokens):
        if query and rng.random() < 0.6:
            intervals[query] = intervals[query - 1]
            continue
        ends = np.sort(rng.integers(0, num_tokens + 1, size=4))
        if rng.random() < 0.3:
            ends[1] = ends[0]
        if ends[0] == ends[1] and ends[2] == ends[3]:
            ends[:] = (0, 0, query, query + 1)
        ranges = ends if rng.random() < 0.5 else ends[[2, 3, 0, 1]]
        intervals[query] = ranges
    return intervals


def some_queries(seed: int, mask: AttentionMask) -> NDArray[np.int64]:
    """Positions of queries to select: in turn one, all, some, some with repeats out of order."""
    rng = np.random.default_rng(seed)
    total = mask.num_tokens
    if seed % 4 == 0:
        return rng.integers(0, total, size=1)
    if seed % 4 == 1:
        return np.arange(total)
    if seed % 4 == 2:
        chosen = np.flatnonzero(rng.random(total) < rng.uniform(0.05, 0.95))
        # As the model pads them: with a token that comes first in the row.
        return np.append(chosen, [0] * int(rng.integers(1, 4)))
    return rng.integers(0, total, size=int(rng.integers(1, 2 * total)))


def queries_without_a_document(mask: AttentionMask) -> NDArray[np.int64]:
    """All queries but those of the first document, which then nobody reads."""
    first_keys = mask.host_intervals[:, 0]
    return np.flatnonzero(first_keys != first_keys.min())
