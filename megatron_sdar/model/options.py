"""How a model is computed, apart from its architecture."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from sdar_kernels.triton_configs import AttentionConfig


@dataclass(frozen=True)
class ModelOptions:
    """How the model is computed, apart from its architecture.

    Attributes:
        padded_vocab_size: vocabulary rows including padding.
        dtype: of the parameters.
        sequence_parallel: split norms and residuals over tp along tokens.
        recompute: recompute each layer's activations in backward.
        attention_backend: resolved name (sdar_kernels.attention_backend.choose_backend).
        fused_kernels: "torch" or "triton" (sdar_kernels.fused_kernels.choose_fused_kernels).
        attention_config: tile sizes of the triton backend; None: those chosen for the GPU.
    """

    padded_vocab_size: int
    dtype: torch.dtype
    sequence_parallel: bool
    recompute: bool
    attention_backend: str
    fused_kernels: str = "torch"
    attention_config: AttentionConfig | None = None
