"""Tiled attention equals the reference, forward and backward, on long documents; its memory."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
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
    SMALL,
    Attention,
    attention_inputs,
    reference_results,
    run_attention,
    worst_error,
)
from unit.packings import random_packing


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


def test_a_long_document_in_fp64() -> None:
    """Both forms of the key gradient, and tiles whose queries are cut."""
    mask = AttentionMask.build(document_intervals([570, 70], 4))
    tensors = attention_inputs(0, mask.num_tokens, (4, 1, 4), torch.float64)
    assert _worst(mask, tensors) < 1e-12
    assert _worst(mask, tensors, TileSizes(row_scores=1, batch_scores=1)) < 1e-12


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
