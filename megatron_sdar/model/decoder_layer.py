"""A decoder layer of SDAR (Qwen3's): attention and a gated MLP, each behind a norm, on a residual.

Shapes: hidden states are [T, D], or [T / tp, D] between layers under sequence parallelism; the
trimmed last layer returns the M tokens that carry loss.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from sdar_kernels.rms_norm import residual_rms_norm, rms_norm
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.utils.checkpoint import checkpoint

from megatron_sdar.architecture import Architecture
from megatron_sdar.model.attention import SdarAttention, SelectedTokens, TokenLayout
from megatron_sdar.model.options import ModelOptions
from megatron_sdar.model.recomputation import not_kept
from megatron_sdar.parallel.adjacency import place_side_by_side
from megatron_sdar.parallel.collectives import enter_parallel_region, leave_parallel_region
from megatron_sdar.parallel.layers import ColumnParallelLinear, ReplicatedVector, RowParallelLinear
from megatron_sdar.parallel.projections import joint_column_parallel_projection, project_swiglu


class SdarMLP(nn.Module):
    """SwiGLU; returns this tp rank's partial sum."""

    def __init__(self, arch: Architecture, tp: DeviceMesh, options: ModelOptions) -> None:
        super().__init__()
        dtype = options.dtype
        self.tp = tp
        self.sequence_parallel = options.sequence_parallel and tp.size() > 1
        self.fused_kernels = options.fused_kernels
        self.gate_proj = ColumnParallelLinear(arch.hidden_size, arch.intermediate_size, tp, dtype)
        self.up_proj = ColumnParallelLinear(arch.hidden_size, arch.intermediate_size, tp, dtype)
        self.down_proj = RowParallelLinear(arch.intermediate_size, arch.hidden_size, tp, dtype)

    def place_weights(self) -> None:
        """gate and up become one product where their shards can lie side by side."""
        place_side_by_side([self.gate_proj.weight, self.up_proj.weight])

    def forward(self, x: Tensor, dropout_seed: int | None = None) -> Tensor:
        """[T, D], or [T / tp, D] under sequence parallelism, to a partial sum [T, D].

        Collectives: see `joint_column_parallel_projection`.
        """
        weights = [proj.product(dropout_seed) for proj in (self.gate_proj, self.up_proj)]
        group, split = self.tp.get_group(), self.sequence_parallel
        gate_up = joint_column_parallel_projection(x, weights, group, split)
        down = self.down_proj.product(dropout_seed)
        return project_swiglu(gate_up, down, self.fused_kernels)


class SdarDecoderLayer(nn.Module):
    """Pre-norm attention and MLP with residuals."""

    def __init__(self, arch: Architecture, tp: DeviceMesh, options: ModelOptions) -> None:
        super().__init__()
        self.tp = tp
        self.eps = arch.rms_norm_eps
        self.fused_kernels = options.fused_kernels
        self.recompute = options.recompute
        self.sequence_parallel = options.sequence_parallel and tp.size() > 1
        partial = self.sequence_parallel
        self.input_layernorm = ReplicatedVector(arch.hidden_size, tp, options.dtype, partial)
        self.self_attn = SdarAttention(arch, tp, options)
        self.post_attention_layernorm = ReplicatedVector(
            arch.hidden_size, tp, options.dtype, partial
        )
        self.mlp = SdarMLP(arch, tp, options)

    def forward(
        self, x: Tensor, layout: TokenLayout, selected: SelectedTokens | None = None
    ) -> Tensor:
        """Residual stream in, residual stream out: of all tokens, or of the M selected ones.

        Under sequence parallelism every rank returns its part of the tokens, of the selected
        ones [M / tp, D].

        Collectives: two enter/leave pairs, i.e. with sequence parallelism 2 all_gather and
        2 reduce_scatter forward and the same backward; without it 2 all_reduce each way.
        """
        if self.recompute == "full" and torch.is_grad_enabled():
            return checkpoint(
                self._forward, x, layout, selected, use_reentrant=False, preserve_rng_state=False
            )
        return self._forward(x, layout, selected)

    def _forward(self, x: Tensor, layout: TokenLayout, selected: SelectedTokens | None) -> Tensor:
        group, split = self.tp.get_group(), self.sequence_parallel
        if selected is None:
            x, normed, skipped = self._normed(x, None, self.input_layernorm)
            with skipped:
                out = self.self_attn(normed, layout)
        else:
            x, out = self._attend_selected(x, layout, selected)
        out = leave_parallel_region(out, group, split)
        x, normed, skipped = self._normed(x, out, self.post_attention_layernorm)
        with skipped:
            out = self.mlp(normed, layout.dropout_seed)
        return x + leave_parallel_region(out, group, split)

    def _normed(
        self, x: Tensor, addend: Tensor | None, norm: ReplicatedVector
    ) -> tuple[Tensor, Tensor, AbstractContextManager[object]]:
        """x + addend, the same normed, and what to enter for the operations that read that."""
        x, normed = residual_rms_norm(x, addend, norm(), self.eps, self.fused_kernels)

        def make() -> Tensor:
            return rms_norm(x, norm(), self.eps, self.fused_kernels)

        if self.recompute != "selective":
            return x, normed, nullcontext()
        return x, normed, not_kept((normed, make))

    def _attend_selected(
        self, x: Tensor, layout: TokenLayout, selected: SelectedTokens
    ) -> tuple[Tensor, Tensor]:
        """The residual stream of this rank's selected tokens, [M, D] or [M / tp, D], and what
        attention adds, a partial sum [M, D] over tp.
        """
        group, split = self.tp.get_group(), self.sequence_parallel
        if split:
            # Gathered before the norm, since a rank's part of the selected tokens may lie on any
            # rank: one all_gather serves attention and residual. Its backward sums over the
            # ranks, so each one adds what its own heads and its own residual tokens send back.
            x = enter_parallel_region(x, group, split)
        x, normed, skipped = self._normed(x, None, self.input_layernorm)
        with skipped:
            entered = normed if split else enter_parallel_region(normed, group, split)
            out = self.self_attn.forward_selected(entered, layout, selected)
        positions = selected.positions
        if split:
            positions = _own_part(positions, self.tp.get_local_rank(), self.tp.size())
        return x.index_select(0, positions), out


def _own_part(positions: Tensor, rank: int, num_ranks: int) -> Tensor:
    """[M] -> [M / tp], the tokens that reduce_scatter gives this rank."""
    assert positions.shape[0] % num_ranks == 0, "loss positions are padded to a multiple of tp"
    return positions.view(num_ranks, -1)[rank]
