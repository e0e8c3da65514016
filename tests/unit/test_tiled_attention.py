"""Tiled attention equals the reference, forward and backward, on any mask; its memory."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sdar_kernels import tile_workspace, tiled_attention
from sdar_kernels.block_mask import AttentionMask
from sdar_kernels.self_check import document_intervals
from sdar_kernels.tile_groups import TileSizes
from sdar_kernels.tile_plan import make_tile_plan
from sdar_kernels.tile_workspace import TileWorkspace, make_workspace
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from unit.attention_cases import (
    HEADS,
    Attention,
    attention_inputs,
    reference_results,
    run_attention,
    worst_error,
)
from unit.intervals import queries_without_a_document, random_intervals, some_queries
from unit.packings import concatenated, random_packing

# Cuts everything that can be cut: tiles, batches of documents and blocks, and rows of a tile.
SMALL = TileSizes(
    3, 5, 16, batch_keys=8, batch_scores=64, row_scores=600, section_rows=40, kept_keys=7
)
LARGE = TileSizes(64, 128, 48, batch_keys=4096, kept_keys=0)

any_sizes = st.sampled_from([TileSizes(), SMALL, LARGE])


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # for tensors this small a second thread only costs
    yield
    torch.set_num_threads(threads)


def _tiled(
    mask: AttentionMask, tensors: tuple[Tensor, ...], sizes: TileSizes | None = None
) -> list[Tensor]:
    return run_attention(_with(sizes), mask, tensors)


def _worst(
    mask: AttentionMask, tensors: tuple[Tensor, ...], sizes: TileSizes | None = None
) -> float:
    return worst_error(_with(sizes), mask, tensors)


def _with(sizes: TileSizes | None) -> Attention:
    return partial(tiled_attention.tiled_attention, sizes=sizes)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    seed=st.integers(0, 10_000),
    block_length=st.sampled_from([1, 2, 3, 4, 7, 8, 16, 32, 64]),
    heads=st.sampled_from(HEADS),
    sizes=any_sizes,
    padding=st.integers(0, 70),
)
def test_random_packings_in_fp64(
    seed: int, block_length: int, heads: tuple[int, int, int], sizes: TileSizes, padding: int
) -> None:
    max_blocks = max(1, min(5, 64 // block_length))
    packing = random_packing(
        seed, block_length, max_documents=3, max_blocks=max_blocks, max_padding=padding
    )
    mask = packing.mask()
    assert (
        _worst(mask, attention_inputs(seed, mask.num_tokens, heads, torch.float64), sizes) < 1e-12
    )


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    seed=st.integers(0, 10_000),
    num_tokens=st.integers(1, 90),
    heads=st.sampled_from(HEADS),
    sizes=any_sizes,
)
def test_any_intervals_in_fp64(
    seed: int, num_tokens: int, heads: tuple[int, int, int], sizes: TileSizes
) -> None:
    mask = AttentionMask.build(random_intervals(seed, num_tokens))
    assert _worst(mask, attention_inputs(seed, num_tokens, heads, torch.float64), sizes) < 1e-12


@settings(max_examples=20, deadline=None, derandomize=True)
@given(
    lengths=st.lists(st.integers(1, 70), min_size=1, max_size=5),
    block_length=st.integers(1, 64),
    noisy_first=st.booleans(),
    repeat=st.integers(1, 3),
    sizes=any_sizes,
)
def test_ragged_documents_in_either_order_in_fp64(
    lengths: list[int], block_length: int, noisy_first: bool, repeat: int, sizes: TileSizes
) -> None:
    intervals = document_intervals(
        lengths * repeat, block_length, noisy_first=noisy_first, padding=len(lengths)
    )
    mask = AttentionMask.build(intervals)
    assert (
        _worst(mask, attention_inputs(0, mask.num_tokens, (4, 2, 8), torch.float64), sizes) < 1e-12
    )


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    seed=st.integers(0, 10_000),
    block_length=st.sampled_from([1, 3, 4, 8, 32]),
    heads=st.sampled_from(HEADS),
    sizes=any_sizes,
    random=st.booleans(),
)
def test_some_of_the_queries_in_fp64(
    seed: int, block_length: int, heads: tuple[int, int, int], sizes: TileSizes, random: bool
) -> None:
    if random:
        mask = AttentionMask.build(random_intervals(seed, 1 + seed % 70))
    else:
        mask = random_packing(seed, block_length, max_blocks=max(2, 32 // block_length)).mask()
    chosen = mask.select(some_queries(seed, mask))
    tensors = attention_inputs(seed, chosen.num_tokens, heads, torch.float64, chosen.num_keys)
    assert _worst(chosen, tensors, sizes) < 1e-12


@pytest.mark.parametrize("sizes", [TileSizes(), SMALL])
def test_keys_that_nobody_reads_have_no_gradient(sizes: TileSizes) -> None:
    mask = AttentionMask.build(document_intervals([40, 24], 4, padding=3))
    chosen = mask.select(queries_without_a_document(mask))
    tensors = attention_inputs(0, chosen.num_tokens, (4, 2, 8), torch.float64, chosen.num_keys)
    assert _worst(chosen, tensors, sizes) < 1e-12
    _, _, *of_keys = _tiled(chosen, tensors, sizes)
    for gradient in of_keys:
        assert (gradient[:40] == 0).all()
        assert (gradient[64:104] == 0).all()
        assert (gradient[40:60] != 0).all()


def test_concatenated_rows_in_fp64() -> None:
    row, _ = concatenated([random_packing(seed, 4) for seed in range(3)])
    mask = AttentionMask.build(row.key_intervals)
    assert _worst(mask, attention_inputs(0, mask.num_tokens, (4, 2, 8), torch.float64)) < 1e-12


def test_a_long_document_in_fp64() -> None:
    """Both forms of the key gradient, and tiles whose queries are cut."""
    mask = AttentionMask.build(document_intervals([570, 70], 4))
    tensors = attention_inputs(0, mask.num_tokens, (4, 1, 4), torch.float64)
    assert _worst(mask, tensors) < 1e-12
    assert _worst(mask, tensors, TileSizes(row_scores=1, batch_scores=1)) < 1e-12


@pytest.mark.parametrize("block_length", [1, 4, 8, 64])
@pytest.mark.parametrize("drop", [False, True])
def test_fp32(block_length: int, drop: bool) -> None:
    for seed in range(3):
        packing = random_packing(seed, block_length, max_blocks=3, drop=drop)
        mask = packing.mask()
        assert (
            _worst(mask, attention_inputs(seed, mask.num_tokens, (4, 2, 16), torch.float32)) < 1e-5
        )


@pytest.mark.parametrize("block_length", [4, 64])
def test_bf16_is_close_to_the_exact_result(block_length: int) -> None:
    mask = random_packing(2, block_length, max_blocks=48 // block_length + 2).mask()
    narrow = attention_inputs(0, mask.num_tokens, (4, 2, 32), torch.bfloat16)
    exact = reference_results(mask, tuple(tensor.double() for tensor in narrow))
    for name, left, right in zip(
        ("out", "dq", "dk", "dv"), _tiled(mask, narrow), exact, strict=True
    ):
        assert left.dtype == torch.bfloat16, name
        error = (left.double() - right).norm() / right.norm()
        assert error < 1e-2, f"{name}: relative error {error:.1e}"


def test_key_gradients_of_many_queries_are_summed_in_fp32() -> None:
    """Sums of bf16 terms in bf16 would stop growing."""
    mask = AttentionMask.build(document_intervals([1024], 4))
    q, k, v, upstream = attention_inputs(0, mask.num_tokens, (2, 1, 8), torch.bfloat16)
    tensors = (q * 0, k, v, upstream.abs() + 1)
    exact = reference_results(mask, tuple(tensor.double() for tensor in tensors))[3]
    ours = _tiled(mask, tensors, TileSizes(8, 8))[3]  # 128 terms for the first key
    error = (ours.double() - exact).norm() / exact.norm()
    assert error < 4e-3


def test_large_scores_do_not_overflow() -> None:
    mask = random_packing(3, 4).mask()
    q, k, v, upstream = attention_inputs(0, mask.num_tokens, (4, 2, 16), torch.float32)
    tensors = (q * 300, k, v, upstream)
    for left, right in zip(_tiled(mask, tensors), reference_results(mask, tensors), strict=True):
        assert torch.isfinite(left).all()
        assert (left - right).norm() < 1e-3 * right.norm()


def test_inputs_need_not_be_contiguous_and_stay_as_they_were() -> None:
    mask = random_packing(5, 4).mask()
    tensors = attention_inputs(0, mask.num_tokens, (4, 2, 8), torch.float64)
    strided = tuple(tensor.transpose(0, 1).contiguous().transpose(0, 1) for tensor in tensors)
    copies = [tensor.clone() for tensor in strided]
    leaves = [tensor.detach().requires_grad_() for tensor in strided[:3]]
    out = tiled_attention.tiled_attention(*leaves, mask)
    grads = torch.autograd.grad(out, leaves, strided[3])
    for ours, theirs in zip((out, *grads), reference_results(mask, tensors), strict=True):
        assert (ours - theirs).abs().max() < 1e-12
    assert all(torch.equal(left, right) for left, right in zip(strided, copies, strict=True))


def test_a_second_derivative_is_refused() -> None:
    mask = random_packing(5, 4).mask()
    *leaves, _ = attention_inputs(0, mask.num_tokens, (2, 2, 4), torch.float64)
    leaves = [leaf.requires_grad_() for leaf in leaves]
    out = tiled_attention.tiled_attention(*leaves, mask)
    (grad,) = torch.autograd.grad(out.square().sum(), leaves[0], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


def test_memory_of_earlier_calls_is_never_read(request: pytest.FixtureRequest) -> None:
    # In this mode torch.empty gives NaN.
    torch.use_deterministic_algorithms(True)
    request.addfinalizer(lambda: torch.use_deterministic_algorithms(False))
    for sizes in (TileSizes(), SMALL):
        mask = AttentionMask.build(document_intervals([300, 60, 60], 4, padding=3))
        tensors = attention_inputs(0, mask.num_tokens, (4, 2, 4), torch.float64)
        assert _worst(mask, tensors, sizes) < 1e-12
        space = mask.plan(make_workspace, 2, 2, 4, torch.float64, sizes)
        leaves = [tensor.detach().clone().requires_grad_() for tensor in tensors[:3]]
        out = tiled_attention.tiled_attention(*leaves, mask, sizes)
        for buffer in space.buffers.values():
            buffer.fill_(torch.nan)
        grads = torch.autograd.grad(out, leaves, tensors[3])
        for ours, theirs in zip((out, *grads), reference_results(mask, tensors), strict=True):
            assert (ours - theirs).abs().max() < 1e-12


def test_layers_share_buffers_and_do_not_disturb_each_other() -> None:
    """All forward passes, then all backward passes, as in training."""
    mask = random_packing(7, 4).mask()
    layers = [
        attention_inputs(seed, mask.num_tokens, (4, 2, 8), torch.float64) for seed in range(3)
    ]
    leaves = [[x.detach().clone().requires_grad_() for x in layer[:3]] for layer in layers]
    outs = [tiled_attention.tiled_attention(*each, mask) for each in leaves]
    for out, each, layer in reversed(list(zip(outs, leaves, layers, strict=True))):
        grads = torch.autograd.grad(out, each, layer[3])
        for ours, theirs in zip((out, *grads), reference_results(mask, layer), strict=True):
            assert (ours - theirs).abs().max() < 1e-12
    assert len([plan for plan in mask._plans.values() if isinstance(plan, TileWorkspace)]) == 1


@pytest.mark.parametrize("sizes", [TileSizes(), SMALL])
def test_views_of_many_pieces_are_not_stored(
    sizes: TileSizes, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Their number grows with the square of a document's length."""
    mask = random_packing(9, 4).mask()
    tensors = attention_inputs(0, mask.num_tokens, (4, 2, 8), torch.float64)
    stored = _tiled(mask, tensors, sizes)
    monkeypatch.setattr(tile_workspace, "_MOST_STORED", 0)
    fresh = random_packing(9, 4).mask()
    made: list[object] = []
    piece = TileWorkspace._piece
    monkeypatch.setattr(TileWorkspace, "_piece", lambda *args: made.append(None) or piece(*args))
    for expected, actual in zip(stored, _tiled(fresh, tensors, sizes), strict=True):
        assert torch.equal(expected, actual)
    plan = fresh.plan(make_tile_plan, 2, sizes, 2)
    number = sum(len(tile.pieces) for section in plan.sections for tile in section.tiles)
    assert len(made) == 2 * number, "once forward, once backward"


def test_a_mask_first_used_in_inference_can_be_trained_with() -> None:
    mask = random_packing(7, 4).mask()
    tensors = attention_inputs(0, mask.num_tokens, (4, 2, 8), torch.float64)
    with torch.inference_mode():
        tiled_attention.tiled_attention(*tensors[:3], mask)
    assert _worst(mask, tensors) < 1e-12


class _Sizes(TorchDispatchMode):
    """Elements of the largest tensor that any operator returns."""

    def __init__(self) -> None:
        super().__init__()
        self.largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        sizes = [x.numel() for x in tree_leaves(out) if isinstance(x, Tensor)]
        self.largest = max(self.largest, *sizes, 0)
        return out


def _largest(attention: Callable[..., list[Tensor]], length: int) -> int:
    mask = AttentionMask.build(document_intervals([length], 4))
    tensors = attention_inputs(0, mask.num_tokens, (4, 2, 16), torch.float32)
    with _Sizes() as seen:
        attention(mask, tensors)
    return seen.largest


def test_memory_is_linear_in_the_tokens() -> None:
    sizes = TileSizes(row_scores=1 << 12, batch_scores=1 << 12, kept_keys=128)

    def attention(mask: AttentionMask, tensors: tuple[Tensor, ...]) -> list[Tensor]:
        return _tiled(mask, tensors, sizes)

    # Of 2 * 1536 tokens: q, where noisy tokens stand twice, and a row to spare; it is more than the
    # scores of the fewest rows that are computed at a time.
    assert 128 * 1536 < _largest(attention, 1536) <= (3 * 1536 + 1) * 4 * 16
    assert _largest(reference_results, 512) >= 1024 * 1024, "the recorder would see all scores"


def test_several_threads_take_larger_tiles() -> None:
    assert tiled_attention.default_sizes() == TileSizes()
    torch.set_num_threads(2)
    try:
        assert tiled_attention.default_sizes().short_tile == 2 * TileSizes().short_tile
        mask = AttentionMask.build(document_intervals([120, 40, 300], 4))
        assert _worst(mask, attention_inputs(0, mask.num_tokens, (4, 2, 8), torch.float64)) < 1e-12
    finally:
        torch.set_num_threads(1)


def test_what_is_kept_for_backward_is_linear_in_the_tokens() -> None:
    mask = AttentionMask.build(document_intervals([512], 4))
    q, k, v, _ = attention_inputs(0, mask.num_tokens, (4, 2, 16), torch.float32)
    saved: list[int] = []

    def pack(tensor: Tensor) -> Tensor:
        saved.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        tiled_attention.tiled_attention(q.requires_grad_(), k, v, mask)
    # q, k, v, out, a share per query, range and head, and the probabilities of narrow tiles.
    plan = mask.plan(make_tile_plan, 2, TileSizes())
    shares, kept = plan.num_rows * 2, plan.num_kept * 2
    assert saved == [q.numel(), k.numel(), v.numel(), q.numel(), shares, kept]
    assert 1024 * 4 < shares < 1.5 * 1024 * 4
    assert 0 < kept <= 1024 * 4 * TileSizes().kept_keys


def test_masks_of_a_thread_share_buffers_and_do_not_keep_them() -> None:
    def space(mask: AttentionMask) -> TileWorkspace:
        return mask.plan(make_workspace, 2, 2, 8, torch.float64, TileSizes())

    large = AttentionMask.build(document_intervals([80, 40], 4))
    small = large.select(np.arange(0, large.num_tokens, 3))
    buffers = space(large).buffers
    assert all(space(small).buffers[name] is buffer for name, buffer in buffers.items())
    with ThreadPoolExecutor(1) as other:
        mask = large.select(np.arange(20))
        theirs = other.submit(space, mask).result().buffers
    assert not any(theirs[name] is buffer for name, buffer in buffers.items())
    seen = weakref.ref(buffers["queries"])
    del large, small, buffers, mask, theirs
    assert seen() is None, "buffers outlive their masks"
