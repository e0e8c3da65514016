"""RMSNorm and rotary embedding, as Hugging Face's Qwen3 computes them.

Statistics and angles are at least fp32 whatever the activations are; fp64 activations keep fp64
statistics (verification runs). Angles are always made in fp32, because the published weights
were trained with fp32 angles. The torch forms are the specification; with impl "triton" an op
runs as one kernel each way, where sdar_kernels.fused_kernels says that it can.
"""

from __future__ import annotations

import torch
from torch import Tensor


def rms_norm(x: Tensor, weight: Tensor, eps: float, impl: str = "torch") -> Tensor:
    """weight * x / sqrt(mean(x^2, last dim) + eps); x [..., D], weight [D].

    The normed value is rounded to the dtype of x before it meets the weight.
    """
    if impl == "triton":
        from sdar_kernels.triton_rms_norm import RmsNorm

        return RmsNorm.apply(x, weight, eps)
    assert impl == "torch", f"unresolved fused_kernels {impl!r}"
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


def qk_norm_rope(
    x_TNH: Tensor, weight_H: Tensor, eps: float, cos: Tensor, sin: Tensor, impl: str = "torch"
) -> Tensor:
    """Queries or keys, normed per head and rotated: apply_rotary(rms_norm(x), cos, sin).

    Args:
        x_TNH: [T, N, H], H even; any strides.
        weight_H: norm scale shared by the heads.
        cos, sin: tables [T, 1, H] of `rotary_tables`; they get no gradient with impl "triton".
    """
    if impl == "triton":
        from sdar_kernels.triton_qk_norm_rope import QkNormRope

        return QkNormRope.apply(x_TNH, weight_H, eps, cos, sin)
    return apply_rotary(rms_norm(x_TNH, weight_H, eps, impl), cos, sin)
