"""Attention for CPU in C++: as tiled attention, without its calls and copies.

Tiles of queries compute the hulls of their key ranges with small matrix products that stay in the
caches, 1.1 times (long documents) to 2.5 times (short ones) as fast as `tiled_attention`. Keeps the
log-sum-exp of every query for backward and nothing else of its own; arithmetic, sums of gradients
included, is in fp32 or wider. What comes out does not depend on the number of threads.

A document's keys are summed by one thread for each key head, so backward uses at most as many
threads as the documents of a row have key heads together.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from sdar_kernels.block_mask import AttentionMask
from sdar_kernels.native_build import NativeKernelsError, load_native_kernels

_NAMES = {torch.float32: "float32", torch.float64: "float64", torch.bfloat16: "bfloat16"}
_TILE_FIELDS = 7  # struct Tile in tiles.h
# Rows of a tile, of all query heads of a key head: measured, see LOG.md.
_TILE_ROWS = 64
# Products of fewer elements are not worth a second thread.
_SMALL = 1 << 20


def why_no_native(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why native attention cannot run, or None. Builds the kernels if that was not done yet."""
    if device.type != "cpu":
        return f"it is for CPUs, the device is {device.type}"
    if dtype not in _NAMES:
        return f"it has no form for {dtype}"
    try:
        load_native_kernels()
    except NativeKernelsError as error:
        return str(error)
    return None


def native_attention(
    q_TNH: Tensor, k_SKH: Tensor, v_SKH: Tensor, mask: AttentionMask, tile: int | None = None
) -> Tensor:
    """Attention under `mask`; same contract as `reference.attention`.

    Args:
        tile: query tokens of a tile; default: what measured best.

    Raises:
        NativeKernelsError: see `why_no_native`, which tells beforehand.
    """
    groups = q_TNH.shape[1] // k_SKH.shape[1]
    plan = mask.plan(_make_plan, tile or max(1, _TILE_ROWS // groups))
    out: Tensor = _NativeAttention.apply(q_TNH, k_SKH, v_SKH, plan)
    return out


@dataclass(frozen=True)
class NativePlan:
    """What the kernels know of a mask: int32 intervals [T, 4], tiles [n, 7], and its size."""

    intervals: Tensor
    tiles: Tensor
    num_keys: int
    num_pairs: int

    @property
    def num_computed(self) -> int:
        """Pairs of queries and keys in the hulls of the tiles, which are computed."""
        begin, end, low1, low2, high1, high2, _ = self.tiles.long().unbind(1)
        return int(((end - begin) * (high1 - low1 + high2 - low2)).sum())


def _make_plan(mask: AttentionMask, tile: int) -> NativePlan:
    intervals = torch.from_numpy(np.ascontiguousarray(mask.host_intervals, dtype=np.int32))
    num_queries = intervals.shape[0]
    tiles = torch.empty(num_queries, _TILE_FIELDS, dtype=torch.int32)
    cut = load_native_kernels().sdar_attention_tiles
    cut.restype = ctypes.c_int64
    count = cut(*_arguments(intervals, num_queries, mask.num_keys, tile, tiles))
    return NativePlan(intervals, tiles[:count].clone(), mask.num_keys, mask.num_pairs)


class _NativeAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, plan: NativePlan) -> Tensor:
        q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
        out = torch.empty_like(q)
        wide = torch.float64 if q.dtype == torch.float64 else torch.float32
        lse = q.new_empty(q.shape[:2], dtype=wide)
        _run("forward", plan, (q, k, v, out, lse))
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.plan = plan
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, lse = ctx.saved_tensors
        grads = [torch.empty_like(x) for x in (q, k, v)]
        _run("backward", ctx.plan, (q, k, v, out, grad.contiguous(), lse, *grads))
        return (*grads, None)


def _run(way: str, plan: NativePlan, tensors: tuple[Tensor, ...]) -> None:
    """Call the kernel of q's dtype; tensors are contiguous, q and k the first two."""
    q, k = tensors[:2]
    # The kernel reads memory by what the mask says.
    assert q.shape[0] == plan.intervals.shape[0], "queries and mask belong together"
    assert k.shape[0] == plan.num_keys, "keys and mask belong together"
    num_queries, num_heads, head_dim = q.shape
    small = plan.num_pairs * num_heads * head_dim < _SMALL
    threads = 1 if small else torch.get_num_threads()
    kernel = getattr(load_native_kernels(), f"sdar_attention_{way}_{_NAMES[q.dtype]}")
    kernel.restype = None
    kernel(
        *_arguments(
            plan.intervals, plan.tiles, plan.tiles.shape[0],
            num_queries, plan.num_keys, num_heads, k.shape[1], head_dim, threads, *tensors,
        )
    )  # fmt: skip


def _arguments(*values: Tensor | int) -> list[ctypes.c_void_p | ctypes.c_int64]:
    return [
        ctypes.c_void_p(value.data_ptr()) if isinstance(value, Tensor) else ctypes.c_int64(value)
        for value in values
    ]
