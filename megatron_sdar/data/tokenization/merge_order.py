"""Which tokens of a BPE merge list come out when their own bytes are merged.

Owns one vectorised check over the whole list. A token made by joining A and B comes out of its
own bytes exactly when both A and B come out of theirs and no listed pair across the border
between them is joined first; that is found by undoing the merges at the border in reverse.
"""

import numpy as np
from numpy.typing import NDArray

_NEVER = np.iinfo(np.int64).max


def reachable_merges(merges: NDArray[np.int32], vocab_size: int) -> NDArray[np.bool_]:
    """Whether each of MERGES gives its token when that token's bytes are merged.

    MERGES is int32 [N, 3] of (left id, right id, joined id) in priority order: joined ids are
    all different, and parts are made by earlier merges or by none (single bytes).
    """
    count = len(merges)
    left_of = np.full(vocab_size, -1, np.int64)
    right_of = np.full(vocab_size, -1, np.int64)
    rank_of = np.full(vocab_size, -1, np.int64)
    left, right, joined = merges.T.astype(np.int64)
    left_of[joined], right_of[joined], rank_of[joined] = left, right, np.arange(count)
    keys = left * vocab_size + right
    order = np.argsort(keys, kind="stable")
    sorted_keys = keys[order]

    clean = np.ones(count, np.bool_)
    index = np.arange(count)
    x, y, limit = left, right, np.arange(count)
    while index.size:
        # X and Y meet at the border until the merge of rank LIMIT: is their own pair earlier?
        wanted = x * vocab_size + y
        place = np.minimum(np.searchsorted(sorted_keys, wanted), count - 1)
        rank = np.where(sorted_keys[place] == wanted, order[place], _NEVER)
        clean[index[rank < limit]] = False
        going = (rank >= limit) & (np.maximum(rank_of[x], rank_of[y]) >= 0)
        index, x, y = index[going], x[going], y[going]
        # Undo the later of the two. At equal rank the left one was joined first, and so would
        # be a pair across the border, which lies left of Y but right of X.
        undo_x = rank_of[x] > rank_of[y]
        limit = np.where(undo_x, rank_of[x], rank_of[y] + 1)
        x, y = np.where(undo_x, right_of[x], x), np.where(undo_x, y, left_of[y])
    return _with_parts(merges, clean, vocab_size)


def _with_parts(
    merges: NDArray[np.int32], clean: NDArray[np.bool_], vocab_size: int
) -> NDArray[np.bool_]:
    """CLEAN without the merges that use, directly or not, a token whose merge is not clean."""
    while True:
        dead = np.zeros(vocab_size, np.bool_)
        dead[merges[~clean, 2]] = True
        still = clean & ~dead[merges[:, 0]] & ~dead[merges[:, 1]]
        if np.array_equal(still, clean):
            return clean
        clean = still
