"""SDAR self-attention: grouped queries, per-head q/k RMSNorm, rotary positions, interval mask.

Query and key heads are split over tp. With fewer key heads than tp ranks the key and value
projections are replicated and each rank computes the one head its queries read. The q/k-norm
scales are shared by all heads, so their gradients are partial over tp.
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass

import torch
from sdar_kernels.attention import block_diffusion_attention
from sdar_kernels.block_mask import AttentionMask
from sdar_kernels.rms_norm import qk_norm_rope
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from megatron_sdar.architecture import Architecture
from megatron_sdar.model.cache import CachedTokens
from megatron_sdar.model.options import ModelOptions
from megatron_sdar.model.recomputation import not_kept
from megatron_sdar.parallel.layers import (
    ColumnParallelLinear,
    ReplicatedHeadLinear,
    ReplicatedVector,
    RowParallelLinear,
)
from megatron_sdar.parallel.projections import column_parallel_projections


@dataclass(frozen=True)
class TokenLayout:
    """What every layer of a micro-batch shares: mask metadata and rotary tables [T, 1, H].

    While decoding, the mask is the tokens' places in a cache of keys and values. `dropout_seed` is
    the micro-batch's; None: nothing is dropped.
    """

    mask: AttentionMask | CachedTokens
    cos: Tensor
    sin: Tensor
    dropout_seed: int | None = None


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
    def of(
        cls, positions: Tensor, mask: AttentionMask | CachedTokens, layout: TokenLayout
    ) -> SelectedTokens:
        """The tokens at `positions` [M] of the micro-batch `layout`; `mask` is theirs."""
        assert mask.num_tokens == positions.shape[0], "the mask is that of these positions"
        cos, sin = (table.index_select(0, positions) for table in (layout.cos, layout.sin))
        return cls(positions, TokenLayout(mask, cos, sin, layout.dropout_seed))


class SdarAttention(nn.Module):
    """Attention over whole tokens; returns this tp rank's partial sum of the output."""

    def __init__(self, arch: Architecture, tp: DeviceMesh, options: ModelOptions) -> None:
        super().__init__()
        self.tp = tp
        self.sequence_parallel = options.sequence_parallel and tp.size() > 1
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

    def forward(self, x: Tensor, layout: TokenLayout) -> Tensor:
        """The layer's input to [T, D], a partial sum over tp.

        Args:
            x: [T, D], or this tp rank's [T / tp, D] under sequence parallelism.

        Collectives: see `column_parallel_projections`.
        """
        projections = (self.q_proj, self.k_proj, self.v_proj)
        weights = [projection.product(layout.dropout_seed) for projection in projections]
        group, split = self.tp.get_group(), self.sequence_parallel
        q, k, v = column_parallel_projections(x, weights, group, split)
        return self._attend(q, k, v, layout, layout)

    def forward_selected(
        self, x_TD: Tensor, layout: TokenLayout, selected: SelectedTokens
    ) -> Tensor:
        """[T, D] to [M, D] of the selected tokens, a partial sum over tp. No collective.

        Keys and values are those of all T tokens.
        """
        seed = layout.dropout_seed
        weights = (self.k_proj.product(seed), self.v_proj.product(seed))
        k, v = column_parallel_projections(x_TD, weights, None, False)
        q = self.q_proj(x_TD.index_select(0, selected.positions), seed)
        return self._attend(q, k, v, selected.layout, layout)

    def _attend(
        self, q: Tensor, k: Tensor, v: Tensor, queries: TokenLayout, keys: TokenLayout
    ) -> Tensor:
        """Projected q [M, ...], k and v [T, ...] to [M, D]; `queries` has the mask."""
        options = self.options
        q, k, v = (x.view(x.shape[0], -1, self.head_dim) for x in (q, k, v))

        def turned(x: Tensor, norm: ReplicatedVector, place: TokenLayout) -> Tensor:
            impl = options.fused_kernels
            return qk_norm_rope(x, norm(), self.eps, place.cos, place.sin, impl)

        turned_q, turned_k = turned(q, self.q_norm, queries), turned(k, self.k_norm, keys)
        skipped = (
            (turned_q, lambda: turned(q, self.q_norm, queries)),
            (turned_k, lambda: turned(k, self.k_norm, keys)),
        )
        if isinstance(queries.mask, CachedTokens):
            assert isinstance(keys.mask, CachedTokens), "queries and keys are of one forward"
            out = queries.mask.attend(self, turned_q, turned_k, v, keys.mask)
            return self.o_proj(out.reshape(out.shape[0], -1))
        with not_kept(*skipped) if options.recompute == "selective" else nullcontext():
            out = block_diffusion_attention(
                turned_q, turned_k, v, queries.mask,
                options.attention_backend, options.attention_config,
            )  # fmt: skip
        return self.o_proj(out.reshape(out.shape[0], -1), queries.dropout_seed)


def _key_value_projection(
    hidden_size: int, num_heads: int, head_dim: int, tp: DeviceMesh, dtype: torch.dtype
) -> ColumnParallelLinear | ReplicatedHeadLinear:
    if num_heads % tp.size() == 0:
        return ColumnParallelLinear(hidden_size, num_heads * head_dim, tp, dtype)
    return ReplicatedHeadLinear(hidden_size, num_heads, head_dim, tp, dtype)
