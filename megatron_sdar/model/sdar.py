"""SDAR (the Qwen3 architecture) as pipeline stages; parameter names are Hugging Face's.

A stage owns a contiguous range of decoder layers, the first one also the embedding, the last
one also the final norm and the head. The whole model is the stage that owns everything.
Forward is a for loop; collectives are entered by the region they serve, never by name here.
Shapes: hidden states are [T, D], or [T / tp, D] between layers under sequence parallelism. Only M
tokens carry loss: the last layer's output, the final norm and the head are [M, D] or [M / tp, D].
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from sdar_kernels.rms_norm import rms_norm, rotary_tables
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.nn import functional as F

from megatron_sdar.architecture import Architecture
from megatron_sdar.model.attention import SelectedTokens, TokenLayout
from megatron_sdar.model.batch import DeviceBatch
from megatron_sdar.model.decoder_layer import SdarDecoderLayer
from megatron_sdar.model.options import ModelOptions
from megatron_sdar.parallel.collectives import enter_parallel_region
from megatron_sdar.parallel.cross_entropy import (
    VocabShard,
    vocab_parallel_cross_entropy,
    vocab_parallel_token_losses,
)
from megatron_sdar.parallel.layers import (
    ColumnParallelLinear,
    ParallelLinear,
    ReplicatedVector,
    VocabParallelEmbedding,
)
from megatron_sdar.parallel.local_weights import held_gradient, local_weight
from megatron_sdar.parallel.sharding import local_tensor

EMBEDDING = "model.embed_tokens.weight"
HEAD = "lm_head.weight"


@dataclass(frozen=True)
class StageRange:
    """Which part of the model a stage owns: layers [start, end) and the ends."""

    start: int
    end: int
    is_first: bool
    is_last: bool


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
    """One pipeline stage, built on the meta device (see model.weights for filling it).

    Attributes:
        trained_before: an earlier stage has trained weights, so it wants this one's gradient.
        learns: this stage or an earlier one has trained weights, so a backward runs here.
    """

    def __init__(
        self, arch: Architecture, stage: StageRange, tp: DeviceMesh, options: ModelOptions
    ) -> None:
        super().__init__()
        self.arch = arch
        self.stage = stage
        self.tp = tp
        self.options = options
        self.fused_kernels = options.fused_kernels
        self.sequence_parallel = options.sequence_parallel and tp.size() > 1
        self.trims = options.trim_last_layer and stage.is_last
        self.vocab_shard = VocabShard.of(tp, arch.vocab_size, options.padded_vocab_size)
        self.model = SdarBody(arch, stage, tp, options)
        if stage.is_last:
            self.lm_head = ColumnParallelLinear(
                arch.hidden_size, options.padded_vocab_size, tp, options.dtype
            )
        self.tie_weights()
        self._adapt()
        self.trained_before = not stage.is_first and options.finetuning.trains_before(stage.start)
        self.learns = self.trained_before or any(p.requires_grad for p in self.parameters())

    def _adapt(self) -> None:
        """Add the low-rank updates, and freeze what is not trained."""
        finetuning = self.options.finetuning
        if finetuning.lora is not None:
            for name, module in self.named_modules():
                if name.split(".")[-1] in finetuning.lora.targets:
                    assert isinstance(module, ParallelLinear), f"{name} is a target (validated)"
                    module.adapt(finetuning.lora, name)
        for name, parameter in self.named_parameters():
            parameter.requires_grad_(finetuning.trains(name))

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
                `batch.loss_positions`, as they are in the batch, instead of the loss.

        Returns:
            Hidden states, or on the last stage the micro-batch's share of the step's loss, which
            is the start of backward as it is: if the head holds a gradient and gradients are
            enabled, forward has added this micro-batch's to it already. Of a batch that says
            per_token: [2, M], the cross-entropies, and 1 where the target is the most probable
            token; without gradients.
        """
        if self.stage.is_first:
            x = self.model.embed_tokens(batch.input_ids)
        else:
            assert hidden is not None, "a later stage receives hidden states"
            x = hidden
        cos, sin = rotary_tables(
            batch.position_ids, self.arch.head_dim, self.arch.rope_theta, x.dtype
        )
        layout = TokenLayout(batch.mask, cos, sin, batch.dropout_seed)
        layers = self.model.layers.values()
        for layer, selected in zip(layers, self._selections(batch, layout), strict=True):
            x = layer(x, layout, selected)
        if not self.stage.is_last:
            return x
        x = rms_norm(x, self.model.norm(), self.arch.rms_norm_eps, self.fused_kernels)
        x = enter_parallel_region(x, self.tp.get_group(), self.sequence_parallel)
        x_MD = x if self.trims else x.index_select(0, batch.loss_positions)
        head = self.lm_head.weight
        if return_logits:
            return F.linear(x_MD, local_weight(head))[:, : self.vocab_shard.num_valid]
        if batch.per_token:
            return vocab_parallel_token_losses(
                x_MD, local_weight(head), batch.target_ids, self.vocab_shard, self.fused_kernels
            )
        # A step's later micro-batches add to the head's gradient, the largest of all, in place.
        # If all in front of the head is frozen, backward must begin at the head itself.
        held = held_gradient(head) if x_MD.requires_grad else None
        sums = held is not None and held.dtype.itemsize >= 4
        return vocab_parallel_cross_entropy(
            x_MD,
            local_tensor(head) if sums else local_weight(head),
            batch.target_ids,
            batch.loss_weights * batch.loss_scale,
            self.vocab_shard,
            weight_grad_sum=held if sums else None,
            impl=self.fused_kernels,
        )

    def _selections(
        self, batch: DeviceBatch, layout: TokenLayout
    ) -> Sequence[SelectedTokens | None]:
        """Which tokens each layer computes: all, but for the model's last layer."""
        num_layers = len(self.model.layers)
        if not self.trims:
            return [None] * num_layers
        assert batch.selected_mask is not None, "the last stage needs the mask of loss_positions"
        last = SelectedTokens.of(batch.loss_positions, batch.selected_mask, layout)
        return [*[None] * (num_layers - 1), last]
