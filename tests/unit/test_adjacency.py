"""Matrices side by side in memory are seen as one; whatever lies otherwise is not."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from megatron_sdar.parallel.adjacency import (
    columns_as_one,
    place_side_by_side,
    rows_as_one,
)

MATRIX = torch.arange(60.0).view(10, 6)


def test_rows_that_follow_each_other_are_one_matrix() -> None:
    whole = rows_as_one([MATRIX[1:4], MATRIX[4:5], MATRIX[5:9]])
    assert whole is not None
    assert torch.equal(whole, MATRIX[1:9])
    assert whole.data_ptr() == MATRIX[1:].data_ptr()


def test_columns_that_follow_each_other_are_one_matrix() -> None:
    whole = columns_as_one([MATRIX[:, 1:3], MATRIX[:, 3:4], MATRIX[:, 4:]])
    assert whole is not None
    assert torch.equal(whole, MATRIX[:, 1:])
    assert whole.data_ptr() == MATRIX[:, 1:].data_ptr()


@pytest.mark.parametrize(
    "parts",
    [
        (MATRIX[:3], MATRIX[4:6]),  # a row between them
        (MATRIX[3:5], MATRIX[:3]),  # the other way round
        (MATRIX[:3], MATRIX[2:5]),  # a row of both
        (MATRIX[:3], MATRIX[3:6].clone()),
        (MATRIX[:3, :3], MATRIX[3:6, :3]),  # rows with a gap
        (MATRIX[:3], MATRIX[3:6].view(torch.int32)),
        (MATRIX[:3], MATRIX[3:6].view(9, 2)),
    ],
)
def test_rows_that_lie_otherwise_are_not(parts: tuple[Tensor, Tensor]) -> None:
    assert rows_as_one(parts) is None


@pytest.mark.parametrize(
    "parts",
    [
        (MATRIX[:, :2], MATRIX[:, 3:]),
        (MATRIX[:, 2:], MATRIX[:, :2]),
        (MATRIX[:, :2], MATRIX[:, 2:].clone()),
        (MATRIX[:, :2], MATRIX[1:, 2:]),
        (MATRIX[:4, :2], MATRIX[:, 2:]),
        (MATRIX[:, :3], MATRIX[1:4, 3:]),
        (MATRIX.t()[:, :2], MATRIX.t()[:, 2:]),
        (MATRIX[:1].expand(10, 6), MATRIX[1:2].expand(10, 6)),
        (MATRIX[:, :2], MATRIX[:, 2:].view(torch.int32)),
    ],
)
def test_columns_that_lie_otherwise_are_not(parts: tuple[Tensor, Tensor]) -> None:
    assert columns_as_one(parts) is None


def test_allocations_that_happen_to_touch_are_not_one() -> None:
    """A storage may end where another begins: to read across would be chance."""
    memory = torch.zeros(8, 6)
    first, second = (torch.frombuffer(memory.numpy()[rows], dtype=torch.float32).view(4, 6)
                     for rows in (slice(4), slice(4, 8)))  # fmt: skip
    assert first.data_ptr() + 4 * first.numel() == second.data_ptr()
    assert rows_as_one([first, second]) is None


def test_parameters_are_placed_in_one_allocation() -> None:
    parameters = [nn.Parameter(torch.empty(rows, 6)) for rows in (2, 5, 3)]
    shapes = [parameter.shape for parameter in parameters]
    place_side_by_side(parameters)
    assert [parameter.shape for parameter in parameters] == shapes
    with torch.no_grad():
        for value, parameter in enumerate(parameters):
            parameter.fill_(value)
    whole = rows_as_one([parameter.detach() for parameter in parameters])
    assert whole is not None
    assert whole[:, 0].tolist() == [0, 0, 1, 1, 1, 1, 1, 2, 2, 2]
