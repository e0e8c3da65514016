"""How a model is computed, apart from its architecture."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from sdar_kernels.flex_attention import FLEX_BLOCK
from sdar_kernels.triton_configs import AttentionConfig

from megatron_sdar.model.finetuning import EVERYTHING, Finetuning


@dataclass(frozen=True)
class ModelOptions:
    """How the model is computed, apart from its architecture.

    Attributes:
        padded_vocab_size: vocabulary rows including padding.
        dtype: of the parameters.
        sequence_parallel: split norms and residuals over tp along tokens.
        recompute: what backward computes again (recomputation.GRANULARITIES): "full" whole layers,
            "selective" norms and rotations, "none" nothing.
        attention_backend: resolved name (sdar_kernels.attention_backend.choose_backend).
        fused_kernels: resolved name (sdar_kernels.fused_kernels.choose_fused_kernels).
        attention_config: tile sizes of the triton backend; None: those chosen for the GPU.
        compute_dtype: of the activations; None: dtype. `build_stages` fills it in.
        trim_last_layer: the last decoder layer computes only the tokens that carry loss, beyond
            the keys and values of all. Exact.
        finetuning: which weights are trained, and the low-rank updates beside them.
    """

    padded_vocab_size: int
    dtype: torch.dtype
    sequence_parallel: bool
    recompute: str
    attention_backend: str
    fused_kernels: str = "torch"
    attention_config: AttentionConfig | None = None
    trim_last_layer: bool = True
    compute_dtype: torch.dtype | None = None
    finetuning: Finetuning = EVERYTHING

    def loss_multiple(self, num_tokens: int, tp_size: int) -> int:
        """What a micro-batch's loss positions are padded to a multiple of.

        Args:
            num_tokens: of the micro-batch.
            tp_size: tensor-parallel ranks; sequence parallelism splits the trimmed tokens evenly.
        """
        multiple = tp_size if self.sequence_parallel else 1
        if self.attention_backend == "flex" and self.trim_last_layer:
            # FlexAttention compiles a graph for every number of queries, which takes many
            # seconds, and the number of masked tokens changes with every row. In steps of a
            # sixteenth of the row at most about 16 graphs are ever compiled, in practice a few.
            sixteenth = -(-num_tokens // (16 * FLEX_BLOCK)) * FLEX_BLOCK
            multiple = math.lcm(multiple, sixteenth)
        return multiple
