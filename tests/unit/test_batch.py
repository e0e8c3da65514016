"""Micro-batches on the device: loss positions padded without a trace, their mask beside them."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from unit.packings import random_packing

from megatron_sdar.diffusion.rows import Row
from megatron_sdar.model.options import ModelOptions
from megatron_sdar.training.batch import to_device

CPU = torch.device("cpu")


def _row() -> Row:
    return random_packing(7, 4, max_blocks=9).row


def _without_masks(row: Row) -> Row:
    return replace(
        row,
        loss_positions=row.loss_positions[:0],
        target_ids=row.target_ids[:0],
        loss_weights=row.loss_weights[:0],
    )


@pytest.mark.parametrize("multiple", [1, 2, 8, 128])
def test_loss_positions_are_padded_with_weightless_first_tokens(multiple: int) -> None:
    row = _row()
    batch = to_device(row, CPU, 1.0, multiple_of=multiple)
    real, total = row.loss_positions.size, batch.loss_positions.shape[0]
    assert total == -(-real // multiple) * multiple
    assert np.array_equal(batch.loss_positions[:real].numpy(), row.loss_positions)
    assert np.array_equal(batch.target_ids[:real].numpy(), row.target_ids)
    assert np.array_equal(batch.loss_weights[:real].numpy(), row.loss_weights)
    for padded in (batch.loss_positions, batch.target_ids, batch.loss_weights):
        assert (padded[real:] == 0).all()
    assert batch.loss_weights.dtype == torch.float64


@pytest.mark.parametrize("multiple", [1, 4])
def test_a_row_without_masks_has_weightless_positions(multiple: int) -> None:
    batch = to_device(_without_masks(_row()), CPU, 1.0, multiple_of=multiple)
    assert batch.loss_positions.tolist() == [0] * multiple
    assert batch.loss_weights.tolist() == [0.0] * multiple


def test_the_selected_mask_is_that_of_the_loss_positions() -> None:
    batch = to_device(_row(), CPU, 1.0, multiple_of=8)
    assert batch.selected_mask is not None
    assert batch.selected_mask.num_keys == batch.num_tokens
    expected = batch.mask.key_intervals[batch.loss_positions]
    assert torch.equal(batch.selected_mask.key_intervals, expected)
    assert to_device(_row(), CPU, 1.0, selects=False).selected_mask is None
    moved = batch.at(np.array([3, 1]))
    assert moved.loss_positions.tolist() == [3, 1]
    assert torch.equal(moved.selected_mask.key_intervals, batch.mask.key_intervals[[3, 1]])


@pytest.mark.parametrize(
    ("sequence_parallel", "backend", "trims", "tokens", "expected"),
    [
        (False, "tiled", True, 20480, 1),
        (True, "triton", True, 20480, 4),
        (True, "flex", False, 20480, 4),
        (False, "flex", True, 20480, 1280),
        (False, "flex", True, 64, 128),
        (True, "flex", True, 20000, 1280),
    ],
)
def test_what_loss_positions_are_a_multiple_of(
    sequence_parallel: bool, backend: str, trims: bool, tokens: int, expected: int
) -> None:
    options = ModelOptions(
        8, torch.float32, sequence_parallel, False, backend, trim_last_layer=trims
    )
    assert options.loss_multiple(tokens, tp_size=4) == expected
