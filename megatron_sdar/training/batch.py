"""Rows on the host -> micro-batches on the compute device."""

from __future__ import annotations

import torch
from sdar_kernels.block_mask import AttentionMask

from megatron_sdar.diffusion.rows import Row
from megatron_sdar.model.sdar import DeviceBatch


def to_device(row: Row, device: torch.device, loss_scale: float) -> DeviceBatch:
    """Move one micro-batch (one or several concatenated rows) to the device.

    Args:
        row: the micro-batch.
        device: target device.
        loss_scale: this micro-batch's factor in the step's loss.
    """
    return DeviceBatch(
        input_ids=torch.from_numpy(row.input_ids).to(device),
        position_ids=torch.from_numpy(row.position_ids).to(device),
        mask=AttentionMask.build(row.key_intervals, device),
        loss_positions=torch.from_numpy(row.loss_positions).to(device),
        target_ids=torch.from_numpy(row.target_ids).to(device),
        loss_weights=torch.from_numpy(row.loss_weights).to(device),
        loss_scale=loss_scale,
    )
