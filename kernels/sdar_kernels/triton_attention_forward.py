"""Triton forward of block-diffusion attention over query tiles and their runs of keys.

One program computes one query tile of one key head: the query heads that share the key head are
folded into the rows (row r is query r // GROUP, head r % GROUP), so keys are read once for all.
Steps that every row sees in full run without the mask. Scores are in base 2.
"""

from __future__ import annotations

import triton
import triton.language as tl

# Below every score; finite, so that a row whose keys come in a later step needs no special case.
_UNSEEN = tl.constexpr(-1.0e30)


@triton.jit
def row_places(
    start, end, kv_head, num_heads,
    GROUP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Of each row: its query, whether it exists, and the number of its (query, head) vector."""
    row = tl.arange(0, BLOCK)
    query = start + row // GROUP
    exists = (query < end) & (row < BLOCK // GROUP * GROUP)
    vector = query.to(tl.int64) * num_heads + kv_head * GROUP + row % GROUP
    return query, exists, vector


@triton.jit
def load_vectors(
    pointer, vector, exists,
    HEAD_DIM: tl.constexpr, PADDED_DIM: tl.constexpr,
):  # fmt: skip
    """[rows, PADDED_DIM]; vectors that do not exist and padding columns are zero."""
    column = tl.arange(0, PADDED_DIM)
    places = pointer + vector[:, None] * HEAD_DIM + column[None, :]
    if HEAD_DIM == PADDED_DIM:
        return tl.load(places, mask=exists[:, None], other=0.0)
    return tl.load(places, mask=exists[:, None] & (column < HEAD_DIM)[None, :], other=0.0)


@triton.jit
def load_all_vectors(
    pointer, vector,
    HEAD_DIM: tl.constexpr, PADDED_DIM: tl.constexpr,
):  # fmt: skip
    """`load_vectors` where all vectors exist."""
    column = tl.arange(0, PADDED_DIM)
    places = pointer + vector[:, None] * HEAD_DIM + column[None, :]
    if HEAD_DIM == PADDED_DIM:
        return tl.load(places)
    return tl.load(places, mask=(column < HEAD_DIM)[None, :], other=0.0)


@triton.jit
def multiply_vectors(
    left, right,
    left_ptr, left_vector, left_exists, right_ptr, right_vector, right_exists,
    HEAD_DIM: tl.constexpr, CHUNK: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """left @ right^T of two tiles of vectors, [left, right].

    With CHUNK the tiles are read again, that many columns at a time: as operands, whole fp32
    heads of 256 do not fit the registers.
    """
    if CHUNK == 0:
        product = tl.dot(left, tl.trans(right), input_precision=PRECISION, out_dtype=ACC)
    else:
        product = tl.zeros([left_vector.shape[0], right_vector.shape[0]], dtype=ACC)
        for first in tl.range(0, HEAD_DIM, CHUNK, num_stages=1, loop_unroll_factor=1):
            column = first + tl.arange(0, CHUNK)
            inside = (column < HEAD_DIM)[None, :]
            left_places = left_ptr + left_vector[:, None] * HEAD_DIM + column[None, :]
            right_places = right_ptr + right_vector[:, None] * HEAD_DIM + column[None, :]
            some_left = tl.load(left_places, mask=left_exists[:, None] & inside, other=0.0)
            some_right = tl.load(right_places, mask=right_exists[:, None] & inside, other=0.0)
            product = tl.dot(
                some_left, tl.trans(some_right), product, input_precision=PRECISION, out_dtype=ACC
            )
    return product


@triton.jit
def store_vectors(
    pointer, vector, exists, values,
    HEAD_DIM: tl.constexpr, PADDED_DIM: tl.constexpr,
):  # fmt: skip
    """Write [rows, PADDED_DIM] in the pointer's type."""
    column = tl.arange(0, PADDED_DIM)
    places = pointer + vector[:, None] * HEAD_DIM + column[None, :]
    wanted = exists[:, None] & (column < HEAD_DIM)[None, :]
    tl.store(places, values.to(pointer.dtype.element_ty), mask=wanted)


@triton.jit
def load_ranges(intervals, query, exists):
    """Both key ranges of each row: lo1, hi1, lo2, hi2. Rows that do not exist see nothing."""
    places = intervals + query.to(tl.int64) * 4
    lo1 = tl.load(places, mask=exists, other=0)
    hi1 = tl.load(places + 1, mask=exists, other=0)
    lo2 = tl.load(places + 2, mask=exists, other=0)
    hi2 = tl.load(places + 3, mask=exists, other=0)
    return lo1, hi1, lo2, hi2


@triton.jit
def masked_step(step, num_first, open_end, first_hi, second_lo, second_hi, lo1, hi1, lo2, hi2,
                BLOCK: tl.constexpr):  # fmt: skip
    """Keys of a step with the mask: those of the rest of the first range, then of the second.

    Returns the keys [BLOCK], whether they exist, and the bounds [rows] that each row sees.
    """
    second = step >= num_first
    start = tl.where(second, second_lo + (step - num_first) * BLOCK, open_end + step * BLOCK)
    key = start + tl.arange(0, BLOCK)
    exists = key < tl.where(second, second_hi, first_hi)
    return key, exists, tl.where(second, lo2, lo1), tl.where(second, hi2, hi1)


@triton.jit
def _softmax_step(
    scores, v, peak, total, out,
    ACC: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    new_peak = tl.maximum(peak, tl.max(scores, 1))
    probabilities = tl.exp2(scores - new_peak[:, None])
    shrink = tl.exp2(peak - new_peak)
    total = total * shrink + tl.sum(probabilities, 1)
    out = out * shrink[:, None]
    out = tl.dot(probabilities.to(v.dtype), v, out, input_precision=PRECISION, out_dtype=ACC)
    return new_peak, total, out


@triton.jit
def attention_forward(
    q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr, intervals_ptr, tiles_ptr,
    scale_log2, num_heads, num_kv_heads,
    GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, PADDED_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, MASKED_N: tl.constexpr, CHUNK: tl.constexpr,
    ACC: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """out [T, N, H] and log-sum-exp in base 2 [T, N]; grid (query tiles, key heads)."""
    tile = tiles_ptr + tl.program_id(0) * 7
    kv_head = tl.program_id(1)
    start, end = tl.load(tile), tl.load(tile + 1)
    first_lo, open_end, first_hi = tl.load(tile + 2), tl.load(tile + 3), tl.load(tile + 4)
    second_lo, second_hi = tl.load(tile + 5), tl.load(tile + 6)

    query, exists, vector = row_places(start, end, kv_head, num_heads, GROUP, BLOCK_M)
    q = load_vectors(q_ptr, vector, exists, HEAD_DIM, PADDED_DIM)
    peak = tl.full([BLOCK_M], _UNSEEN, dtype=ACC)
    total = tl.zeros([BLOCK_M], dtype=ACC)
    out = tl.zeros([BLOCK_M, PADDED_DIM], dtype=ACC)

    for begin in range(first_lo, open_end, BLOCK_N):
        place = (begin + tl.arange(0, BLOCK_N)).to(tl.int64) * num_kv_heads + kv_head
        k = load_all_vectors(k_ptr, place, HEAD_DIM, PADDED_DIM)
        scores = scale_log2 * multiply_vectors(
            q, k, q_ptr, vector, exists, k_ptr, place, place >= 0, HEAD_DIM, CHUNK, ACC, PRECISION
        )
        v = load_all_vectors(v_ptr, place, HEAD_DIM, PADDED_DIM)
        peak, total, out = _softmax_step(scores, v, peak, total, out, ACC, PRECISION)

    lo1, hi1, lo2, hi2 = load_ranges(intervals_ptr, query, exists)
    num_first = tl.cdiv(first_hi - open_end, MASKED_N)
    num_steps = num_first + tl.cdiv(second_hi - second_lo, MASKED_N)
    for step in range(num_steps):
        key, key_exists, low, high = masked_step(
            step, num_first, open_end, first_hi, second_lo, second_hi, lo1, hi1, lo2, hi2, MASKED_N
        )
        place = key.to(tl.int64) * num_kv_heads + kv_head
        k = load_vectors(k_ptr, place, key_exists, HEAD_DIM, PADDED_DIM)
        scores = scale_log2 * multiply_vectors(
            q, k, q_ptr, vector, exists, k_ptr, place, key_exists, HEAD_DIM, CHUNK, ACC, PRECISION
        )
        seen = (key[None, :] >= low[:, None]) & (key[None, :] < high[:, None])
        scores = tl.where(seen, scores, _UNSEEN)
        v = load_vectors(v_ptr, place, key_exists, HEAD_DIM, PADDED_DIM)
        peak, total, out = _softmax_step(scores, v, peak, total, out, ACC, PRECISION)

    store_vectors(out_ptr, vector, exists, out / total[:, None], HEAD_DIM, PADDED_DIM)
    tl.store(lse_ptr + vector, peak + tl.log2(total), mask=exists)
