"""One front door to block-diffusion attention.

`attention_backend.choose_backend` says once per run which backend runs; the model passes its
name. There is no silent fallback inside a step.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from sdar_kernels.attention_backend import choose_backend, run_backend
from sdar_kernels.block_mask import AttentionMask
from sdar_kernels.head_layout import HeadLayout
from sdar_kernels.triton_configs import AttentionConfig


def block_diffusion_attention(
    q_TNH: Tensor,
    k_TKH: Tensor,
    v_TKH: Tensor,
    mask: AttentionMask,
    backend: str = "auto",
    triton_config: AttentionConfig | None = None,
) -> Tensor:
    """Grouped-query attention of one micro-batch under its interval mask.

    Args:
        q_TNH: [T, query heads, head_dim]; k_TKH, v_TKH: [T, key heads, head_dim].
        mask: metadata of these T tokens.
        backend: what `choose_backend` resolved, or "auto": it is asked at the first call for
            this device, dtype and head layout, self-check included.
        triton_config: tile sizes of the triton backend; default: those chosen for this GPU.

    Returns:
        [T, query heads, head_dim].
    """
    if backend == "auto":
        heads = HeadLayout(q_TNH.shape[1], k_TKH.shape[1], q_TNH.shape[2])
        backend = _resolved(q_TNH.device, q_TNH.dtype, heads)
    return run_backend(backend, q_TNH, k_TKH, v_TKH, mask, triton_config)


@lru_cache(maxsize=64)
def _resolved(device: torch.device, dtype: torch.dtype, heads: HeadLayout) -> str:
    return choose_backend("auto", device, dtype, heads).name
