"""The dtypes of a run."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from megatron_sdar.config import SdarConfig


@dataclass(frozen=True)
class Precision:
    """dtypes of a run: stored parameters and optimizer, and what layers compute in."""

    params: torch.dtype
    compute: torch.dtype


def precision(config: SdarConfig) -> Precision:
    """fp32 throughout, bf16 compute over fp32 parameters, or fp64 for verification."""
    if config.training.fp64:
        return Precision(torch.float64, torch.float64)
    return Precision(torch.float32, torch.bfloat16 if config.training.bf16 else torch.float32)
