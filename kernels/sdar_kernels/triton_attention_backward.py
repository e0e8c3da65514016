"""Triton backward of block-diffusion attention: dQ over query tiles, dK and dV over key tiles.

Each gradient element is written by one program in one order: no atomics, so the result is
bitwise repeatable. The dQ kernel also leaves delta = rowsum(dOut * Out) for the other.
"""

from __future__ import annotations

import triton
import triton.language as tl

from sdar_kernels.triton_attention_forward import (
    load_all_vectors,
    load_ranges,
    load_vectors,
    masked_step,
    multiply_vectors,
    row_places,
    store_vectors,
)


@triton.jit
def _query_step(
    probabilities, k, v, grad_out, delta, grad_q,
    grad_out_ptr, vector, exists, v_ptr, place, key_exists,
    HEAD_DIM: tl.constexpr, CHUNK: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    grad_p = multiply_vectors(
        grad_out, v, grad_out_ptr, vector, exists, v_ptr, place, key_exists,
        HEAD_DIM, CHUNK, ACC, PRECISION,
    )  # fmt: skip
    grad_s = probabilities * (grad_p - delta[:, None])
    return tl.dot(grad_s.to(k.dtype), k, grad_q, input_precision=PRECISION, out_dtype=ACC)


@triton.jit
def attention_backward_queries(
    q_ptr, k_ptr, v_ptr, out_ptr, grad_out_ptr, lse_ptr, delta_ptr, grad_q_ptr,
    intervals_ptr, tiles_ptr,
    scale, scale_log2, num_heads, num_kv_heads,
    GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, PADDED_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, MASKED_N: tl.constexpr, HOIST: tl.constexpr,
    CHUNK: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """grad_q [T, N, H] and delta [T, N]; grid (query tiles, key heads)."""
    tile = tiles_ptr + tl.program_id(0) * 7
    kv_head = tl.program_id(1)
    start, end = tl.load(tile), tl.load(tile + 1)
    first_lo, open_end, first_hi = tl.load(tile + 2), tl.load(tile + 3), tl.load(tile + 4)
    second_lo, second_hi = tl.load(tile + 5), tl.load(tile + 6)

    query, exists, vector = row_places(start, end, kv_head, num_heads, GROUP, BLOCK_M)
    grad_out = load_vectors(grad_out_ptr, vector, exists, HEAD_DIM, PADDED_DIM)
    out = load_vectors(out_ptr, vector, exists, HEAD_DIM, PADDED_DIM)
    delta = tl.sum(out.to(ACC) * grad_out.to(ACC), 1)
    tl.store(delta_ptr + vector, delta, mask=exists)
    q = load_vectors(q_ptr, vector, exists, HEAD_DIM, PADDED_DIM)
    lse = tl.load(lse_ptr + vector, mask=exists, other=0.0)
    grad_q = tl.zeros([BLOCK_M, PADDED_DIM], dtype=ACC)

    for begin in tl.range(first_lo, open_end, BLOCK_N, disable_licm=not HOIST):
        place = (begin + tl.arange(0, BLOCK_N)).to(tl.int64) * num_kv_heads + kv_head
        k = load_all_vectors(k_ptr, place, HEAD_DIM, PADDED_DIM)
        scores = scale_log2 * multiply_vectors(
            q, k, q_ptr, vector, exists, k_ptr, place, place >= 0, HEAD_DIM, CHUNK, ACC, PRECISION
        )
        v = load_all_vectors(v_ptr, place, HEAD_DIM, PADDED_DIM)
        probabilities = tl.exp2(scores - lse[:, None])
        grad_q = _query_step(
            probabilities, k, v, grad_out, delta, grad_q,
            grad_out_ptr, vector, exists, v_ptr, place, place >= 0,
            HEAD_DIM, CHUNK, ACC, PRECISION,
        )  # fmt: skip

    lo1, hi1, lo2, hi2 = load_ranges(intervals_ptr, query, exists)
    num_first = tl.cdiv(first_hi - open_end, MASKED_N)
    num_steps = num_first + tl.cdiv(second_hi - second_lo, MASKED_N)
    for step in tl.range(num_steps, disable_licm=not HOIST):
        key, key_exists, low, high = masked_step(
            step, num_first, open_end, first_hi, second_lo, second_hi, lo1, hi1, lo2, hi2, MASKED_N
        )
        place = key.to(tl.int64) * num_kv_heads + kv_head
        k = load_vectors(k_ptr, place, key_exists, HEAD_DIM, PADDED_DIM)
        scores = scale_log2 * multiply_vectors(
            q, k, q_ptr, vector, exists, k_ptr, place, key_exists, HEAD_DIM, CHUNK, ACC, PRECISION
        )
        seen = (key[None, :] >= low[:, None]) & (key[None, :] < high[:, None])
        v = load_vectors(v_ptr, place, key_exists, HEAD_DIM, PADDED_DIM)
        probabilities = tl.where(seen, tl.exp2(scores - lse[:, None]), 0.0)
        grad_q = _query_step(
            probabilities, k, v, grad_out, delta, grad_q,
            grad_out_ptr, vector, exists, v_ptr, place, key_exists,
            HEAD_DIM, CHUNK, ACC, PRECISION,
        )  # fmt: skip

    store_vectors(grad_q_ptr, vector, exists, grad_q * scale, HEAD_DIM, PADDED_DIM)


@triton.jit
def _key_step(
    begin, end, k, v, key, place, key_exists, grad_k, grad_v, which,
    q_ptr, k_ptr, v_ptr, grad_out_ptr, lse_ptr, delta_ptr, intervals_ptr,
    scale_log2, num_heads, kv_head,
    GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, PADDED_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr, MASKED: tl.constexpr, CHUNK: tl.constexpr,
    ACC: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Add the queries [begin, begin + BLOCK_M / GROUP), as far as they exist, to dK and dV."""
    query, exists, vector = row_places(begin, end, kv_head, num_heads, GROUP, BLOCK_M)
    q = load_vectors(q_ptr, vector, exists, HEAD_DIM, PADDED_DIM)
    lse = tl.load(lse_ptr + vector, mask=exists, other=0.0)
    scores = scale_log2 * multiply_vectors(
        k, q, k_ptr, place, key_exists, q_ptr, vector, exists, HEAD_DIM, CHUNK, ACC, PRECISION
    )
    probabilities = tl.exp2(scores - lse[None, :])
    if MASKED:
        places = intervals_ptr + query.to(tl.int64) * 4 + which * 2
        low = tl.load(places, mask=exists, other=0)
        high = tl.load(places + 1, mask=exists, other=0)
        seen = (key[:, None] >= low[None, :]) & (key[:, None] < high[None, :])
        probabilities = tl.where(seen, probabilities, 0.0)
    # A query that does not exist has zero gradient and delta, so it adds nothing.
    grad_out = load_vectors(grad_out_ptr, vector, exists, HEAD_DIM, PADDED_DIM)
    grad_v = tl.dot(
        probabilities.to(grad_out.dtype), grad_out, grad_v,
        input_precision=PRECISION, out_dtype=ACC,
    )  # fmt: skip
    delta = tl.load(delta_ptr + vector, mask=exists, other=0.0)
    grad_p = multiply_vectors(
        v, grad_out, v_ptr, place, key_exists, grad_out_ptr, vector, exists,
        HEAD_DIM, CHUNK, ACC, PRECISION,
    )  # fmt: skip
    grad_s = probabilities * (grad_p - delta[None, :])
    grad_k = tl.dot(grad_s.to(q.dtype), q, grad_k, input_precision=PRECISION, out_dtype=ACC)
    return grad_k, grad_v


@triton.jit
def attention_backward_keys(
    q_ptr, k_ptr, v_ptr, grad_out_ptr, lse_ptr, delta_ptr, grad_k_ptr, grad_v_ptr,
    intervals_ptr, tiles_ptr, runs_ptr,
    scale, scale_log2, num_heads, num_kv_heads,
    GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, PADDED_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr, MASKED_M: tl.constexpr, BLOCK_N: tl.constexpr,
    CHUNK: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """grad_k and grad_v [T, K, H]; grid (key tiles, key heads)."""
    tile = tiles_ptr + tl.program_id(0) * 4
    kv_head = tl.program_id(1)
    start, end = tl.load(tile), tl.load(tile + 1)
    first_run, last_run = tl.load(tile + 2), tl.load(tile + 3)

    key = start + tl.arange(0, BLOCK_N)
    place = key.to(tl.int64) * num_kv_heads + kv_head
    k = load_vectors(k_ptr, place, key < end, HEAD_DIM, PADDED_DIM)
    v = load_vectors(v_ptr, place, key < end, HEAD_DIM, PADDED_DIM)
    grad_k = tl.zeros([BLOCK_N, PADDED_DIM], dtype=ACC)
    grad_v = tl.zeros([BLOCK_N, PADDED_DIM], dtype=ACC)

    for index in range(first_run, last_run):
        run = runs_ptr + index * 4
        query_start, open_start, query_end = tl.load(run), tl.load(run + 1), tl.load(run + 2)
        which = tl.load(run + 3)
        for begin in range(query_start, open_start, MASKED_M // GROUP):
            grad_k, grad_v = _key_step(
                begin, open_start, k, v, key, place, key < end, grad_k, grad_v, which,
                q_ptr, k_ptr, v_ptr, grad_out_ptr, lse_ptr, delta_ptr, intervals_ptr,
                scale_log2, num_heads, kv_head,
                GROUP, HEAD_DIM, PADDED_DIM, MASKED_M, True, CHUNK, ACC, PRECISION,
            )  # fmt: skip
        for begin in range(open_start, query_end, BLOCK_M // GROUP):
            grad_k, grad_v = _key_step(
                begin, query_end, k, v, key, place, key < end, grad_k, grad_v, which,
                q_ptr, k_ptr, v_ptr, grad_out_ptr, lse_ptr, delta_ptr, intervals_ptr,
                scale_log2, num_heads, kv_head,
                GROUP, HEAD_DIM, PADDED_DIM, BLOCK_M, False, CHUNK, ACC, PRECISION,
            )  # fmt: skip

    store_vectors(grad_k_ptr, place, key < end, grad_k * scale, HEAD_DIM, PADDED_DIM)
    store_vectors(grad_v_ptr, place, key < end, grad_v, HEAD_DIM, PADDED_DIM)
