"""RMSNorm and rotary embedding, as Hugging Face's Qwen3 computes them.

Statistics and angles are at least fp32 whatever the activations are; fp64 activations keep fp64
statistics (verification runs). Angles are always made in fp32, because the published weights
were trained with fp32 angles.
"""

from __future__ import annotations

import torch
from torch import Tensor


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """weight * x / sqrt(mean(x^2, last dim) + eps); x [..., D], weight [D]."""
    wide = x if x.dtype == torch.float64 else x.float()
    normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return weight * normed.to(x.dtype)


def rotary_tables(
    position_ids: Tensor, head_dim: int, rope_theta: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """cos and sin tables, each [T, 1, head_dim], for positions [T]."""
    exponents = torch.arange(0, head_dim, 2, device=position_ids.device).float() / head_dim
    angles = torch.outer(position_ids.float(), 1.0 / rope_theta**exponents)
    angles = torch.cat((angles, angles), dim=-1).unsqueeze(1)
    return angles.cos().to(dtype), angles.sin().to(dtype)


def apply_rotary(x_TNH: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the two halves of each head: x * cos + rotate_half(x) * sin."""
    first, second = x_TNH.chunk(2, dim=-1)
    return x_TNH * cos + torch.cat((-second, first), dim=-1) * sin
