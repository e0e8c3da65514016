"""SDAR self-attention: grouped queries, per-head q/k RMSNorm, rotary positions, interval mask.

Query and key heads are split over tp. With fewer key heads than tp ranks the key and value
projections are replicated and each rank computes the one head its queries read. The q/k-norm
scales are shared by all heads, so their gradients are partial over tp.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from sdar_kernels.attention import block_diffusion_attention
from sdar_kernels.block_mask import AttentionMask
from sdar_kernels.rms_norm import qk_norm_rope
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from megatron_sdar.architecture import Architecture
from megatron_sdar.model.options import ModelOptions
from megatron_sdar.parallel.layers import (
    ColumnParallelLinear,
    ReplicatedHeadLinear,
    ReplicatedVector,
    RowParallelLinear,
)


@dataclass(frozen=True)
class TokenLayout:
    """What every layer of a micro-batch shares: mask metadata and rotary tables [T, 1, H]."""

    mask: AttentionMask
    cos: Tensor
    sin: Tensor


@dataclass(frozen=True)
class SelectedTokens:
    """The M tokens of a micro-batch that a trimmed layer computes, the only queries there.

    Attributes:
        positions: int64 [M] on the token axis; a token may occur several times.
        layout: of these tokens: M queries over all T keys, rotary tables [M, 1, H].
    """

    positions: Tensor
    layout: TokenLayout

    @classmethod
    def of(cls, positions: Tensor, mask: AttentionMask, layout: TokenLayout) -> SelectedTokens:
        """The tokens at `positions` [M] of the micro-batch `layout`; `mask` is theirs."""
        assert mask.num_tokens == positions.shape[0], "the mask is that of these positions"
        cos, sin = (table.index_select(0, positions) for table in (layout.cos, layout.sin))
        return cls(positions, TokenLayout(mask, cos, sin))


class SdarAttention(nn.Module):
    """Attention over whole tokens; returns this tp rank's partial sum of the output."""

    def __init__(self, arch: Architecture, tp: DeviceMesh, options: ModelOptions) -> None:
        super().__init__()
        self.head_dim = arch.head_dim
        self.eps = arch.rms_norm_eps
        self.options = options
        dtype = options.dtype
        hidden, kv_heads = arch.hidden_size, arch.num_key_value_heads
        query_size = arch.num_attention_heads * arch.head_dim
        self.q_proj = ColumnParallelLinear(hidden, query_size, tp, dtype)
        self.k_proj = _key_value_projection(hidden, kv_heads, arch.head_dim, tp, dtype)
        self.v_proj = _key_value_projection(hidden, kv_heads, arch.head_dim, tp, dtype)
        self.o_proj = RowParallelLinear(query_size, hidden, tp, dtype)
        self.q_norm = ReplicatedVector(arch.head_dim, tp, dtype, grad_partial_over_tp=True)
        self.k_norm = ReplicatedVector(arch.head_dim, tp, dtype, grad_partial_over_tp=True)

    def forward(
        self, x_TD: Tensor, layout: TokenLayout, selected: SelectedTokens | None = None
    ) -> Tensor:
        """[T, D] -> [T, D], or [M, D] of the selected tokens; a partial sum over tp.

        Keys and values are those of all T tokens in any case. No collective.
        """
        options, impl = self.options, self.options.fused_kernels
        k = self.k_proj(x_TD).view(x_TD.shape[0], -1, self.head_dim)
        v = self.v_proj(x_TD).view(x_TD.shape[0], -1, self.head_dim)
        k = qk_norm_rope(k, self.k_norm(), self.eps, layout.cos, layout.sin, impl)
        if selected is not None:
            x_TD, layout = x_TD.index_select(0, selected.positions), selected.layout
        q = self.q_proj(x_TD).view(x_TD.shape[0], -1, self.head_dim)
        q = qk_norm_rope(q, self.q_norm(), self.eps, layout.cos, layout.sin, impl)
        out = block_diffusion_attention(
            q, k, v, layout.mask, options.attention_backend, options.attention_config
        )
        return self.o_proj(out.reshape(x_TD.shape[0], -1))


def _key_value_projection(
    hidden_size: int, num_heads: int, head_dim: int, tp: DeviceMesh, dtype: torch.dtype
) -> nn.Module:
    if num_heads % tp.size() == 0:
        return ColumnParallelLinear(hidden_size, num_heads * head_dim, tp, dtype)
    return ReplicatedHeadLinear(hidden_size, num_heads, head_dim, tp, dtype)
