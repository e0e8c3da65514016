"""Tiled and native attention equal the reference, forward and backward, on any mask."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sdar_kernels.block_mask import AttentionMask
from sdar_kernels.native_attention import native_attention, why_no_native
from sdar_kernels.self_check import document_intervals
from sdar_kernels.tile_groups import TileSizes
from sdar_kernels.tiled_attention import tiled_attention
from unit.attention_cases import (
    LARGE,
    SMALL,
    attention_inputs,
    reference_results,
    run_attention,
    worst_error,
)
from unit.intervals import queries_without_a_document, random_intervals, some_queries
from unit.packings import concatenated, random_packing

WHY_NO_NATIVE = why_no_native(torch.device("cpu"), torch.float32)
FORMS = {
    "tiled": tiled_attention,
    "tiled, cut": partial(tiled_attention, sizes=SMALL),
    "tiled, large": partial(tiled_attention, sizes=LARGE),
    "native": native_attention,
    "native, one token": partial(native_attention, tile=1),
    "native, three tokens": partial(native_attention, tile=3),
}
# Query heads, key heads, head_dim: whole vectors and not, one row of a tile and many.
HEADS = [
    (1, 1, 4), (4, 1, 8), (4, 2, 8), (6, 3, 2), (2, 2, 16), (2, 1, 64), (8, 1, 20), (5, 1, 33),
]  # fmt: skip

every_form = pytest.mark.parametrize(
    "form",
    [
        pytest.param(
            name,
            marks=pytest.mark.skipif(
                name.startswith("native") and WHY_NO_NATIVE is not None, reason=f"{WHY_NO_NATIVE}"
            ),
        )
        for name in FORMS
    ],
)
any_seed = st.integers(0, 10_000)
any_heads = st.sampled_from(HEADS)


@every_form
@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    seed=any_seed,
    block_length=st.sampled_from([1, 2, 3, 4, 7, 8, 16, 32, 64]),
    heads=any_heads,
    padding=st.integers(0, 70),
)
def test_random_packings_in_fp64(
    form: str, seed: int, block_length: int, heads: tuple[int, int, int], padding: int
) -> None:
    max_blocks = max(1, min(5, 64 // block_length))
    mask = random_packing(
        seed, block_length, max_documents=3, max_blocks=max_blocks, max_padding=padding
    ).mask()
    tensors = attention_inputs(seed, mask.num_tokens, heads, torch.float64)
    assert worst_error(FORMS[form], mask, tensors) < 1e-12


@every_form
@settings(max_examples=25, deadline=None, derandomize=True)
@given(seed=any_seed, num_tokens=st.integers(1, 90), heads=any_heads)
def test_any_intervals_in_fp64(
    form: str, seed: int, num_tokens: int, heads: tuple[int, int, int]
) -> None:
    mask = AttentionMask.build(random_intervals(seed, num_tokens))
    tensors = attention_inputs(seed, num_tokens, heads, torch.float64)
    assert worst_error(FORMS[form], mask, tensors) < 1e-12


@every_form
@settings(max_examples=15, deadline=None, derandomize=True)
@given(
    lengths=st.lists(st.integers(1, 70), min_size=1, max_size=5),
    block_length=st.integers(1, 64),
    noisy_first=st.booleans(),
    repeat=st.integers(1, 3),
)
def test_ragged_documents_in_either_order_in_fp64(
    form: str, lengths: list[int], block_length: int, noisy_first: bool, repeat: int
) -> None:
    intervals = document_intervals(
        lengths * repeat, block_length, noisy_first=noisy_first, padding=len(lengths)
    )
    mask = AttentionMask.build(intervals)
    tensors = attention_inputs(0, mask.num_tokens, (4, 2, 8), torch.float64)
    assert worst_error(FORMS[form], mask, tensors) < 1e-12


@every_form
@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    seed=any_seed,
    block_length=st.sampled_from([1, 3, 4, 8, 32]),
    heads=any_heads,
    random=st.booleans(),
)
def test_some_of_the_queries_in_fp64(
    form: str, seed: int, block_length: int, heads: tuple[int, int, int], random: bool
) -> None:
    if random:
        mask = AttentionMask.build(random_intervals(seed, 1 + seed % 70))
    else:
        mask = random_packing(seed, block_length, max_blocks=max(2, 32 // block_length)).mask()
    chosen = mask.select(some_queries(seed, mask))
    tensors = attention_inputs(seed, chosen.num_tokens, heads, torch.float64, chosen.num_keys)
    assert worst_error(FORMS[form], chosen, tensors) < 1e-12


@every_form
def test_keys_that_nobody_reads_have_no_gradient(form: str) -> None:
    mask = AttentionMask.build(document_intervals([40, 24], 4, padding=3))
    chosen = mask.select(queries_without_a_document(mask))
    tensors = attention_inputs(0, chosen.num_tokens, (4, 2, 8), torch.float64, chosen.num_keys)
    assert worst_error(FORMS[form], chosen, tensors) < 1e-12
    _, _, *of_keys = run_attention(FORMS[form], chosen, tensors)
    for gradient in of_keys:
        assert (gradient[:40] == 0).all()
        assert (gradient[64:104] == 0).all()
        assert (gradient[40:60] != 0).all()


@every_form
def test_concatenated_rows_in_fp64(form: str) -> None:
    row, _ = concatenated([random_packing(seed, 4) for seed in range(3)])
    mask = AttentionMask.build(row.key_intervals)
    tensors = attention_inputs(0, mask.num_tokens, (4, 2, 8), torch.float64)
    assert worst_error(FORMS[form], mask, tensors) < 1e-12


@every_form
@pytest.mark.parametrize("block_length", [1, 4, 8, 64])
@pytest.mark.parametrize("drop", [False, True])
def test_fp32(form: str, block_length: int, drop: bool) -> None:
    for seed in range(3):
        mask = random_packing(seed, block_length, max_blocks=3, drop=drop).mask()
        for heads in ((4, 2, 16), (2, 1, 64)):
            tensors = attention_inputs(seed, mask.num_tokens, heads, torch.float32)
            assert worst_error(FORMS[form], mask, tensors) < 1e-5


@every_form
@pytest.mark.parametrize("block_length", [4, 64])
def test_bf16_is_close_to_the_exact_result(form: str, block_length: int) -> None:
    mask = random_packing(2, block_length, max_blocks=48 // block_length + 2).mask()
    narrow = attention_inputs(0, mask.num_tokens, (4, 2, 32), torch.bfloat16)
    exact = reference_results(mask, tuple(tensor.double() for tensor in narrow))
    ours = run_attention(FORMS[form], mask, narrow)
    for name, left, right in zip(("out", "dq", "dk", "dv"), ours, exact, strict=True):
        assert left.dtype == torch.bfloat16, name
        error = (left.double() - right).norm() / right.norm()
        # Native attention rounds nothing but its results.
        assert error < (4e-3 if form.startswith("native") else 1e-2), f"{name}: {error:.1e}"


@pytest.mark.parametrize(
    "form", [partial(tiled_attention, sizes=TileSizes(8, 8)), native_attention]
)
def test_key_gradients_of_many_queries_are_summed_in_fp32(form: object) -> None:
    """Sums of bf16 terms (tiled: 128 for the first key) in bf16 would stop growing."""
    if form is native_attention and WHY_NO_NATIVE is not None:
        pytest.skip(WHY_NO_NATIVE)
    mask = AttentionMask.build(document_intervals([1024], 4))
    q, k, v, upstream = attention_inputs(0, mask.num_tokens, (2, 1, 8), torch.bfloat16)
    tensors = (q * 0, k, v, upstream.abs() + 1)
    exact = reference_results(mask, tuple(tensor.double() for tensor in tensors))[3]
    ours = run_attention(form, mask, tensors)[3]
    assert (ours.double() - exact).norm() / exact.norm() < 4e-3


@every_form
def test_large_scores_do_not_overflow(form: str) -> None:
    mask = random_packing(3, 4).mask()
    q, k, v, upstream = attention_inputs(0, mask.num_tokens, (4, 2, 16), torch.float32)
    tensors = (q * 300, k, v, upstream)
    ours, theirs = run_attention(FORMS[form], mask, tensors), reference_results(mask, tensors)
    for left, right in zip(ours, theirs, strict=True):
        assert torch.isfinite(left).all()
        assert (left - right).norm() < 1e-3 * right.norm()


@every_form
def test_inputs_need_not_be_contiguous_and_stay_as_they_were(form: str) -> None:
    mask = random_packing(5, 4).mask()
    tensors = attention_inputs(0, mask.num_tokens, (4, 2, 16), torch.float64)
    strided = tuple(tensor.transpose(0, 1).contiguous().transpose(0, 1) for tensor in tensors)
    copies = [tensor.clone() for tensor in strided]
    leaves = [tensor.detach().requires_grad_() for tensor in strided[:3]]
    out = FORMS[form](*leaves, mask)
    grads = torch.autograd.grad(out, leaves, strided[3])
    for ours, theirs in zip((out, *grads), reference_results(mask, tensors), strict=True):
        assert (ours - theirs).abs().max() < 1e-12
    assert all(torch.equal(left, right) for left, right in zip(strided, copies, strict=True))


@every_form
def test_a_second_derivative_is_refused(form: str) -> None:
    mask = random_packing(5, 4).mask()
    *leaves, _ = attention_inputs(0, mask.num_tokens, (2, 2, 4), torch.float64)
    leaves = [leaf.requires_grad_() for leaf in leaves]
    out = FORMS[form](*leaves, mask)
    (grad,) = torch.autograd.grad(out.square().sum(), leaves[0], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


@every_form
def test_a_mask_first_used_in_inference_can_be_trained_with(form: str) -> None:
    mask = random_packing(7, 4).mask()
    tensors = attention_inputs(0, mask.num_tokens, (4, 2, 8), torch.float64)
    with torch.inference_mode():
        FORMS[form](*tensors[:3], mask)
    assert worst_error(FORMS[form], mask, tensors) < 1e-12
