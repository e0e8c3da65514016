"""Weights and denominators of the block-diffusion loss.

Loss = sum over masked tokens of CE / p, divided by the number of label tokens (masked or not).
The denominator is one number per optimizer step over all micro-batches and data-parallel
ranks, so the gradient does not depend on how documents were packed or dealt out. The published
per-micro-batch normalisation stays reachable for parity.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

NORMALIZATIONS = ("global", "llamafactory")


def block_weights(loss_prob: float | NDArray[np.float64], num_blocks: int) -> NDArray[np.float64]:
    """What a masked token of each block weighs, float64 [num_blocks].

    Args:
        loss_prob: p of the document, or of each of its blocks: 1/p is the NELBO weight of the
            linear schedule. Or what the schedule divides by instead (`NoiseDraw.loss_prob`).
    """
    if isinstance(loss_prob, np.ndarray):
        assert loss_prob.shape == (num_blocks,), "the noise was drawn with another block length"
        return 1.0 / loss_prob
    return np.full(num_blocks, 1.0 / loss_prob)


def micro_batch_scales(
    label_counts: Sequence[int],
    global_label_count: int,
    normalization: str,
    data_parallel_size: int,
) -> list[float]:
    """Factor of each local micro-batch's weighted loss sum in the step's loss.

    Args:
        label_counts: label tokens of each micro-batch of this rank.
        global_label_count: their sum over all micro-batches and data-parallel ranks.
        normalization: "global": 1 / global count. "llamafactory": what the published trainer
            computes, mean over ranks and sum over accumulation steps of per-micro-batch means.
        data_parallel_size: number of data-parallel ranks.

    A step or micro-batch without label tokens has scale 0: it contributes nothing.
    """
    if normalization == "global":
        scale = 1.0 / global_label_count if global_label_count else 0.0
        return [scale] * len(label_counts)
    assert normalization == "llamafactory", f"unvalidated loss_normalization {normalization!r}"
    return [1.0 / (count * data_parallel_size) if count else 0.0 for count in label_counts]
