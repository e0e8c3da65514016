"""One micro-batch as every stage of the model gets it, on the device that computes it."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from sdar_kernels.block_mask import AttentionMask
from torch import Tensor

from megatron_sdar.model.cache import CachedTokens


@dataclass(frozen=True)
class DeviceBatch:
    """One micro-batch on the compute device; fields as in diffusion.rows.Row.

    Attributes:
        loss_positions, target_ids, loss_weights: [M], M at least 1; padded with entries of
            weight 0 (see training.batch).
        loss_scale: this micro-batch's factor in the step's loss (1 / global label count).
        selected_mask: the mask of the queries at loss_positions; only the stage that trims its
            last layer needs it.
        dropout_seed: what its dropout follows from; None: nothing is dropped.
        per_token: the last stage gives every token's loss, not their weighted sum.
    """

    input_ids: Tensor
    position_ids: Tensor
    mask: AttentionMask | CachedTokens
    loss_positions: Tensor
    target_ids: Tensor
    loss_weights: Tensor
    loss_scale: float
    selected_mask: AttentionMask | CachedTokens | None = None
    dropout_seed: int | None = None
    per_token: bool = False

    @property
    def num_tokens(self) -> int:
        return int(self.input_ids.shape[0])

    def at(self, positions: NDArray[np.int64]) -> DeviceBatch:
        """The same tokens, but logits are wanted at these positions [M]; targets stay behind."""
        assert isinstance(self.mask, AttentionMask), "the tokens lie in no cache"
        return replace(
            self,
            loss_positions=torch.from_numpy(positions).to(self.input_ids.device),
            selected_mask=self.mask.select(positions),
        )
