"""Rows on the host -> micro-batches on the compute device."""

from __future__ import annotations

import hashlib
from typing import TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from sdar_kernels.block_mask import AttentionMask

from megatron_sdar.diffusion.rows import Row
from megatron_sdar.model.batch import DeviceBatch

Number = TypeVar("Number", bound=np.generic)


def to_device(
    row: Row,
    device: torch.device,
    loss_scale: float,
    *,
    multiple_of: int = 1,
    selects: bool = True,
    dropout_seed: int | None = None,
) -> DeviceBatch:
    """Move one micro-batch (one or several concatenated rows) to the device.

    Args:
        row: the micro-batch.
        device: target device.
        loss_scale: this micro-batch's factor in the step's loss.
        multiple_of: the loss positions are padded to a multiple of this, and to at least one, by
            the row's first token with weight 0: it adds exactly nothing to loss and gradients.
        selects: make the mask of the loss positions, which a stage that trims needs.
        dropout_seed: see `DeviceBatch`.
    """
    num_padding = -row.loss_positions.size % multiple_of
    if row.loss_positions.size == 0:
        num_padding = multiple_of
    loss_positions = _padded(row.loss_positions, num_padding)
    mask = AttentionMask.build(row.key_intervals, device)
    return DeviceBatch(
        input_ids=torch.from_numpy(row.input_ids).to(device),
        position_ids=torch.from_numpy(row.position_ids).to(device),
        mask=mask,
        loss_positions=torch.from_numpy(loss_positions).to(device),
        target_ids=torch.from_numpy(_padded(row.target_ids, num_padding)).to(device),
        loss_weights=torch.from_numpy(_padded(row.loss_weights, num_padding)).to(device),
        loss_scale=loss_scale,
        selected_mask=mask.select(loss_positions) if selects else None,
        dropout_seed=dropout_seed,
    )


def row_seed(row: Row, seed: int) -> int:
    """What the dropout of a micro-batch follows from: the run's seed and the tokens themselves.

    Noise makes a document's tokens others in every epoch, and no rank, step or resume has a part
    in it. Which rows share a micro-batch has: that is per_device_train_batch_size.
    """
    digest = hashlib.blake2b(row.input_ids.tobytes(), digest_size=8, salt=seed.to_bytes(8, "big"))
    return int.from_bytes(digest.digest(), "big")


def _padded(values: NDArray[Number], num_padding: int) -> NDArray[Number]:
    """[M] with zeros behind."""
    return np.concatenate((values, np.zeros(num_padding, dtype=values.dtype)))
