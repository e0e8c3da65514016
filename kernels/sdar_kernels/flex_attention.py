"""FlexAttention over key intervals, with a BlockMask built from exact tile counts.

The mask function reads only the int32 intervals, so nothing of size [T, T] exists and no index
product can overflow. The BlockMask equals `create_block_mask`'s, tensor for tensor.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from sdar_kernels.block_mask import AttentionMask, tile_counts

FLEX_BLOCK = 128

FLEX_CPU_ERROR = (
    "attention_backend: flex cannot train on CPU (torch's FlexAttention has no CPU backward); "
    "use attention_backend: auto or tiled"
)

MaskMod = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


def interval_mask_mod(key_intervals: Tensor) -> MaskMod:
    """mask_mod(batch, head, query, key) over int32 intervals [T, 4]."""
    lo1, hi1, lo2, hi2 = key_intervals.unbind(1)

    def mask_mod(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        in_first = (key >= lo1[query]) & (key < hi1[query])
        return in_first | ((key >= lo2[query]) & (key < hi2[query]))

    return mask_mod


def make_block_mask(mask: AttentionMask, block: int = FLEX_BLOCK) -> BlockMask:
    """BlockMask of one micro-batch (batch 1, all heads alike) in O(tokens + tiles)."""
    device = mask.key_intervals.device
    counts = tile_counts(mask.host_intervals, block, block)
    full = counts == block * block
    lists = [*_ordered_columns((counts > 0) & ~full), *_ordered_columns(full)]
    kv_num, kv_indices, full_num, full_indices = (
        torch.from_numpy(array)[None, None].to(device) for array in lists
    )
    return BlockMask.from_kv_blocks(
        kv_num,
        kv_indices,
        full_num,
        full_indices,
        BLOCK_SIZE=block,
        mask_mod=interval_mask_mod(mask.key_intervals),
        seq_lengths=(mask.num_tokens, mask.num_tokens),
    )


def _ordered_columns(chosen: NDArray[np.bool_]) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
    """Per row: how many columns are chosen, and all columns with the chosen ones first."""
    order = np.argsort(~chosen, axis=1, kind="stable")
    return chosen.sum(axis=1).astype(np.int32), order.astype(np.int32)


@lru_cache(maxsize=1)
def _compiled_flex() -> Callable[..., Tensor]:
    # lru_cache so that one compiled callable serves all layers; compiling again per layer
    # would multiply the start-up time.
    return torch.compile(flex_attention, dynamic=False)


def flex_block_attention(
    q_TNH: Tensor, k_TKH: Tensor, v_TKH: Tensor, block_mask: BlockMask, compiled: bool
) -> Tensor:
    """Attention through FlexAttention; same contract as `reference.attention`.

    Raises:
        ValueError: if a gradient is asked for on CPU, which torch's FlexAttention cannot give.
    """
    wants_gradient = torch.is_grad_enabled() and any(x.requires_grad for x in (q_TNH, k_TKH, v_TKH))
    if q_TNH.device.type == "cpu" and wants_gradient:
        raise ValueError(FLEX_CPU_ERROR)
    run: Any = _compiled_flex() if compiled else flex_attention
    q, k, v = (x.transpose(0, 1).unsqueeze(0) for x in (q_TNH, k_TKH, v_TKH))
    out: Tensor = run(q, k, v, block_mask=block_mask, enable_gqa=q.shape[1] != k.shape[1])
    return out.squeeze(0).transpose(0, 1)
