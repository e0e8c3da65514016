"""FlexAttention over key intervals, with a BlockMask built from exact tile counts.

The mask function reads only the int32 intervals, so nothing of size [T, T] exists and no index
product can overflow. The BlockMask equals `create_block_mask`'s, tensor for tensor. Intervals and
lists are tensors of fixed shape, so one compiled graph serves every step of a row length (and
number of queries, where not all tokens are queries).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from sdar_kernels.block_mask import AttentionMask, IntArray, TileLists, tile_counts

FLEX_BLOCK = 128
# Graphs that may be compiled, one per shape. torch stops at 8 and then runs uncompiled without
# an error, which stores all scores. The model pads its queries so that about 16 shapes occur.
_MAX_GRAPHS = 64

FLEX_CPU_ERROR = "torch's FlexAttention has no CPU backward"

TileList = tuple[Tensor, Tensor]
MaskMod = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


def interval_mask_mod(key_intervals: Tensor) -> MaskMod:
    """mask_mod(batch, head, query, key) over int32 intervals [T, 4], or [R, T, 4] of a batch."""
    lo1, hi1, lo2, hi2 = key_intervals.unbind(-1)
    batched = key_intervals.dim() == 3

    def mask_mod(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        place = (batch, query) if batched else (query,)
        in_first = (key >= lo1[place]) & (key < hi1[place])
        return in_first | ((key >= lo2[place]) & (key < hi2[place]))

    return mask_mod


def interval_block_mask(
    key_intervals: IntArray,
    device_intervals: Tensor,
    tile: tuple[int, int],
    num_keys: int | None = None,
) -> BlockMask:
    """BlockMask of rows given by their intervals, all heads alike, in O(tokens + tiles).

    Args:
        key_intervals: int32 [T, 4], or [R, T, 4] for a batch of R rows.
        device_intervals: the same on the compute device.
        tile: query and key tile size.
        num_keys: keys on the key axis; default: as many as queries.
    """
    num_tokens = key_intervals.shape[-2]
    num_keys = num_tokens if num_keys is None else num_keys
    counts = tile_counts(key_intervals, *tile, num_keys)
    counts = counts.reshape(-1, *counts.shape[-2:])
    partial, full = _tensors(TileLists.of(counts, tile), device_intervals.device)
    block_mask = BlockMask.from_kv_blocks(
        *partial,
        *full,
        BLOCK_SIZE=tile,
        mask_mod=interval_mask_mod(device_intervals),
        seq_lengths=(num_tokens, num_keys),
        compute_q_blocks=False,
    )
    # What from_kv_blocks would compute from the lists by scattering and sorting on the device.
    lists = TileLists.of(counts.swapaxes(1, 2), tile)
    partial, full = _tensors(lists, device_intervals.device)
    block_mask.q_num_blocks, block_mask.q_indices = partial
    block_mask.full_q_num_blocks, block_mask.full_q_indices = full
    return block_mask


def _tensors(lists: TileLists, device: torch.device) -> tuple[TileList, TileList]:
    """The partial and the full list, each how many and which, with a head dimension of 1."""

    def move(array: IntArray) -> Tensor:
        return torch.from_numpy(array)[:, None].to(device)

    partial = (move(lists.num_partial), move(lists.partial))
    return partial, (move(lists.num_full), move(lists.full))


def make_block_mask(mask: AttentionMask, tile: int = FLEX_BLOCK) -> BlockMask:
    """BlockMask of one micro-batch (batch 1)."""
    return interval_block_mask(mask.host_intervals, mask.key_intervals, (tile, tile), mask.num_keys)


@lru_cache(maxsize=1)
def _compiled_flex() -> Callable[..., Tensor]:
    # lru_cache so that one compiled callable serves all layers; compiling again per layer
    # would multiply the start-up time.
    compile_function: Any = torch.compile  # its stubs do not know recompile_limit
    compiled: Callable[..., Tensor] = compile_function(
        flex_attention, dynamic=False, recompile_limit=_MAX_GRAPHS
    )
    return compiled


def refuse_gradients_on_cpu(*inputs: Tensor) -> None:
    """Raises ValueError if a gradient is asked for on CPU; torch's own refusal names no remedy."""
    wants_gradient = torch.is_grad_enabled() and any(x.requires_grad for x in inputs)
    if wants_gradient and inputs[0].device.type == "cpu":
        raise ValueError(f"{FLEX_CPU_ERROR}; use attention_backend: auto or tiled")


def flex_block_attention(
    q_TNH: Tensor, k_TKH: Tensor, v_TKH: Tensor, mask: AttentionMask
) -> Tensor:
    """Attention through FlexAttention; same contract as `reference.attention`.

    Compiled on a GPU, where the uncompiled form would store all scores; uncompiled on CPU.

    Raises:
        ValueError: if a gradient is asked for on CPU, which torch's FlexAttention cannot give.
    """
    refuse_gradients_on_cpu(q_TNH, k_TKH, v_TKH)
    run: Any = flex_attention if q_TNH.device.type == "cpu" else _compiled_flex()
    q, k, v = (x.transpose(0, 1).unsqueeze(0) for x in (q_TNH, k_TKH, v_TKH))
    block_mask = mask.plan(make_block_mask)
    out: Tensor = run(q, k, v, block_mask=block_mask, enable_gqa=q.shape[1] != k.shape[1])
    return out.squeeze(0).transpose(0, 1)
