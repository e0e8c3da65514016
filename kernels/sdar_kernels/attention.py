"""One front door to block-diffusion attention, and the choice of its backend.

`resolve_backend` turns the configured name into the one that will run, once per run; the model
then passes the resolved name. There is no silent fallback inside a step.
"""

from __future__ import annotations

from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

from sdar_kernels import reference
from sdar_kernels.block_mask import AttentionMask, make_attention_mask
from sdar_kernels.flex_attention import FLEX_CPU_ERROR, flex_block_attention, make_block_mask
from sdar_kernels.tiled_attention import tiled_attention

BACKENDS = ("auto", "tiled", "flex", "reference")


class AttentionPlan:
    """Everything attention needs about one micro-batch, for whichever backend runs it."""

    def __init__(self, mask: AttentionMask) -> None:
        self.mask = mask

    @classmethod
    def build(
        cls,
        key_intervals: NDArray[np.int32],
        segment_starts: NDArray[np.int64],
        device: torch.device | str,
    ) -> AttentionPlan:
        """See `block_mask.make_attention_mask`."""
        return cls(make_attention_mask(key_intervals, segment_starts, device))

    @cached_property
    def block_mask(self) -> BlockMask:
        """FlexAttention's form of the mask, made when first used and then kept."""
        return make_block_mask(self.mask)


def resolve_backend(name: str, device: torch.device, training: bool = True) -> str:
    """The backend that will run on `device` for a configured name.

    Raises:
        ValueError: for an unknown name, or for flex where it cannot give gradients.
    """
    if name not in BACKENDS:
        raise ValueError(f"attention_backend: {name!r} is not one of {', '.join(BACKENDS)}")
    if name == "flex" and training and device.type == "cpu":
        raise ValueError(FLEX_CPU_ERROR)
    if name != "auto":
        return name
    return "flex" if device.type == "cuda" else "tiled"


def block_diffusion_attention(
    q_TNH: Tensor, k_TKH: Tensor, v_TKH: Tensor, plan: AttentionPlan, backend: str
) -> Tensor:
    """Grouped-query attention of one micro-batch under its interval mask.

    Args:
        q_TNH: [T, query heads, head_dim]; k_TKH, v_TKH: [T, key heads, head_dim].
        plan: mask metadata of these T tokens.
        backend: a resolved backend name (not "auto").

    Returns:
        [T, query heads, head_dim].
    """
    if backend == "tiled":
        return tiled_attention(q_TNH, k_TKH, v_TKH, plan.mask)
    if backend == "flex":
        compiled = q_TNH.device.type == "cuda"
        return flex_block_attention(q_TNH, k_TKH, v_TKH, plan.block_mask, compiled)
    assert backend == "reference", f"unresolved attention backend {backend!r}"
    return reference.attention(q_TNH, k_TKH, v_TKH, plan.mask.key_intervals)
