"""SDAR (the Qwen3 architecture) as pipeline stages; parameter names are Hugging Face's.

A stage owns a contiguous range of decoder layers, the first one also the embedding, the last
one also the final norm and the head. The whole model is the stage that owns everything.
Forward is a for loop; collectives are entered by the region they serve, never by name here.
Shapes: hidden states are [T, D], or [T / tp, D] between layers under sequence parallelism.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from sdar_kernels.block_mask import AttentionMask
from sdar_kernels.rms_norm import rms_norm, rotary_tables
from sdar_kernels.swiglu import swiglu
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from megatron_sdar.architecture import Architecture
from megatron_sdar.model.attention import SdarAttention, TokenLayout
from megatron_sdar.model.options import ModelOptions
from megatron_sdar.parallel.collectives import enter_parallel_region, leave_parallel_region
from megatron_sdar.parallel.cross_entropy import VocabShard, vocab_parallel_cross_entropy
from megatron_sdar.parallel.layers import (
    ColumnParallelLinear,
    ReplicatedVector,
    RowParallelLinear,
    VocabParallelEmbedding,
    local_weight,
)

EMBEDDING = "model.embed_tokens.weight"
HEAD = "lm_head.weight"


@dataclass(frozen=True)
class StageRange:
    """Which part of the model a stage owns: layers [start, end) and the ends."""

    start: int
    end: int
    is_first: bool
    is_last: bool


@dataclass(frozen=True)
class DeviceBatch:
    """One micro-batch on the compute device; fields as in diffusion.rows.Row.

    `loss_scale` is this micro-batch's factor in the step's loss (1 / global label count).
    """

    input_ids: Tensor
    position_ids: Tensor
    mask: AttentionMask
    loss_positions: Tensor
    target_ids: Tensor
    loss_weights: Tensor
    loss_scale: float

    @property
    def num_tokens(self) -> int:
        return int(self.input_ids.shape[0])


class SdarMLP(nn.Module):
    """SwiGLU; returns this tp rank's partial sum."""

    def __init__(self, arch: Architecture, tp: DeviceMesh, options: ModelOptions) -> None:
        super().__init__()
        dtype = options.dtype
        self.fused_kernels = options.fused_kernels
        self.gate_proj = ColumnParallelLinear(arch.hidden_size, arch.intermediate_size, tp, dtype)
        self.up_proj = ColumnParallelLinear(arch.hidden_size, arch.intermediate_size, tp, dtype)
        self.down_proj = RowParallelLinear(arch.intermediate_size, arch.hidden_size, tp, dtype)

    def forward(self, x_TD: Tensor) -> Tensor:
        return self.down_proj(swiglu(self.gate_proj(x_TD), self.up_proj(x_TD), self.fused_kernels))


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

    def forward(self, x: Tensor, layout: TokenLayout) -> Tensor:
        """Residual stream in, residual stream out.

        Collectives: two enter/leave pairs, i.e. with sequence parallelism 2 all_gather and
        2 reduce_scatter forward and the same backward; without it 2 all_reduce each way.
        """
        if self.recompute and torch.is_grad_enabled():
            return checkpoint(
                self._forward, x, layout, use_reentrant=False, preserve_rng_state=False
            )
        return self._forward(x, layout)

    def _forward(self, x: Tensor, layout: TokenLayout) -> Tensor:
        group, split = self.tp.get_group(), self.sequence_parallel
        normed = rms_norm(x, self.input_layernorm(), self.eps, self.fused_kernels)
        out = self.self_attn(enter_parallel_region(normed, group, split), layout)
        x = x + leave_parallel_region(out, group, split)
        normed = rms_norm(x, self.post_attention_layernorm(), self.eps, self.fused_kernels)
        out = self.mlp(enter_parallel_region(normed, group, split))
        return x + leave_parallel_region(out, group, split)


class SdarBody(nn.Module):
    """The part of a stage that Hugging Face calls `model`; layers keep their global index."""

    def __init__(
        self, arch: Architecture, stage: StageRange, tp: DeviceMesh, options: ModelOptions
    ) -> None:
        super().__init__()
        split = options.sequence_parallel and tp.size() > 1
        if stage.is_first:
            self.embed_tokens = VocabParallelEmbedding(
                options.padded_vocab_size, arch.hidden_size, tp, options.dtype, split
            )
        self.layers = nn.ModuleDict(
            {
                str(index): SdarDecoderLayer(arch, tp, options)
                for index in range(stage.start, stage.end)
            }
        )
        if stage.is_last:
            self.norm = ReplicatedVector(arch.hidden_size, tp, options.dtype, split)


class SdarStage(nn.Module):
    """One pipeline stage, built on the meta device (see model.weights for filling it)."""

    def __init__(
        self, arch: Architecture, stage: StageRange, tp: DeviceMesh, options: ModelOptions
    ) -> None:
        super().__init__()
        self.arch = arch
        self.stage = stage
        self.tp = tp
        self.fused_kernels = options.fused_kernels
        self.sequence_parallel = options.sequence_parallel and tp.size() > 1
        self.vocab_shard = VocabShard.of(tp, arch.vocab_size, options.padded_vocab_size)
        self.model = SdarBody(arch, stage, tp, options)
        if stage.is_last:
            self.lm_head = ColumnParallelLinear(
                arch.hidden_size, options.padded_vocab_size, tp, options.dtype
            )
        self.tie_weights()

    def tie_weights(self) -> None:
        """Share embedding and head where one stage owns both ends of a tied model.

        Called again after anything that replaces parameters (moving off the meta device).
        With both ends on different stages, training.gradients keeps the copies equal.
        """
        if self.arch.tie_word_embeddings and self.stage.is_first and self.stage.is_last:
            self.lm_head.weight = self.model.embed_tokens.weight

    def forward(
        self, hidden: Tensor | None, batch: DeviceBatch, return_logits: bool = False
    ) -> Tensor:
        """Run the stage on one micro-batch.

        Args:
            hidden: the previous stage's output; None on the first stage.
            batch: the micro-batch; every stage needs its mask metadata.
            return_logits: last stage only: local logits [M, valid V / tp] of
                `batch.loss_positions` instead of the loss.

        Returns:
            Hidden states, or on the last stage the micro-batch's share of the step's loss.
        """
        if self.stage.is_first:
            x = self.model.embed_tokens(batch.input_ids)
        else:
            assert hidden is not None, "a later stage receives hidden states"
            x = hidden
        cos, sin = rotary_tables(
            batch.position_ids, self.arch.head_dim, self.arch.rope_theta, x.dtype
        )
        layout = TokenLayout(batch.mask, cos, sin)
        for layer in self.model.layers.values():
            x = layer(x, layout)
        if not self.stage.is_last:
            return x
        x = rms_norm(x, self.model.norm(), self.arch.rms_norm_eps, self.fused_kernels)
        x = enter_parallel_region(x, self.tp.get_group(), self.sequence_parallel)
        x_MD = x.index_select(0, batch.loss_positions)
        head_VD = local_weight(self.lm_head.weight)
        if return_logits:
            return F.linear(x_MD, head_VD)[:, : self.vocab_shard.num_valid]
        loss_sum = vocab_parallel_cross_entropy(
            x_MD,
            head_VD,
            batch.target_ids,
            batch.loss_weights,
            self.vocab_shard,
            impl=self.fused_kernels,
        )
        return loss_sum * batch.loss_scale
