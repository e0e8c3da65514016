"""Key intervals that no packer would make: any two disjoint ranges per query."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


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
