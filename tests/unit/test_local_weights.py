"""Gradients of later micro-batches are added to the one that the parameter holds."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from megatron_sdar.parallel.layers import (
    ColumnParallelLinear,
    ReplicatedHeadLinear,
    ReplicatedVector,
    RowParallelLinear,
    VocabParallelEmbedding,
)

pytestmark = pytest.mark.usefixtures("single_process")

TOKENS, HIDDEN, COLUMNS = 6, 5, 8


def _mesh() -> dist.DeviceMesh:
    return dist.init_device_mesh("cpu", (1,))


def _column() -> tuple[nn.Module, Callable[[nn.Module, Tensor], Tensor]]:
    return ColumnParallelLinear(HIDDEN, COLUMNS, _mesh(), torch.float64), lambda m, x: m(x)


def _row() -> tuple[nn.Module, Callable[[nn.Module, Tensor], Tensor]]:
    return RowParallelLinear(HIDDEN, COLUMNS, _mesh(), torch.float64), lambda m, x: m(x)


def _one_head_of_two() -> tuple[nn.Module, Callable[[nn.Module, Tensor], Tensor]]:
    module = ReplicatedHeadLinear(HIDDEN, 1, COLUMNS, _mesh(), torch.float64)
    # As on a rank that uses a part of the replicated rows.
    module.rows = slice(2, 6)
    return module, lambda m, x: m(x)


def _vector() -> tuple[nn.Module, Callable[[nn.Module, Tensor], Tensor]]:
    return ReplicatedVector(HIDDEN, _mesh(), torch.float64, False), lambda m, x: m() * x


def _embedding() -> tuple[nn.Module, Callable[[nn.Module, Tensor], Tensor]]:
    module = VocabParallelEmbedding(COLUMNS, HIDDEN, _mesh(), torch.float64, False)
    ids = torch.tensor([1, 4, 1, 1, 7, 0])
    return module, lambda m, x: m(ids) * x


@pytest.mark.parametrize("make", [_column, _row, _one_head_of_two, _vector, _embedding])
def test_a_second_backward_adds_in_place(
    make: Callable[[], tuple[nn.Module, Callable[[nn.Module, Tensor], Tensor]]],
) -> None:
    module, run = make()
    module.to_empty(device="cpu")
    weight = module.weight
    assert isinstance(weight, DTensor)
    torch.manual_seed(0)
    with torch.no_grad():
        weight._local_tensor.normal_()
    inputs = [torch.randn(TOKENS, HIDDEN, dtype=torch.float64) for _ in range(2)]
    alone = []
    for x in inputs:
        run(module, x.requires_grad_()).square().sum().backward()
        assert isinstance(weight.grad, DTensor)
        alone.append(weight.grad._local_tensor.clone())
        weight.grad = None
    assert not torch.equal(*alone)
    run(module, inputs[0]).square().sum().backward()
    held = weight.grad
    run(module, inputs[1]).square().sum().backward()
    assert weight.grad is held
    assert weight.grad.placements == weight.placements
    torch.testing.assert_close(held._local_tensor, alone[0] + alone[1])


def test_what_the_gradient_held_before_stays_in_the_sum() -> None:
    module = ColumnParallelLinear(HIDDEN, COLUMNS, _mesh(), torch.float64).to_empty(device="cpu")
    with torch.no_grad():
        module.weight._local_tensor.fill_(1.0)
    x = torch.randn(TOKENS, HIDDEN, dtype=torch.float64)
    local = module.weight._local_tensor
    module.weight.grad = DTensor(torch.ones_like(local), module.weight._spec, requires_grad=False)
    module(x).sum().backward()
    expected = 1 + x.sum(0).expand(COLUMNS, -1)
    torch.testing.assert_close(module.weight.grad._local_tensor, expected)
