"""Several projections of one input against separate linear layers, on one process and on two."""

from __future__ import annotations

from itertools import product
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from distributed.world import run_world
from torch import Tensor
from torch.nn import functional as F

from megatron_sdar.parallel.local_weights import ProductWeight
from megatron_sdar.parallel.projections import (
    column_parallel_projections,
    joint_column_parallel_projection,
)

TOKENS, HIDDEN, COLUMNS = 6, 5, (4, 2, 8)


def problem(rank: int, world: int) -> tuple[Tensor, list[Tensor], list[Tensor], list[Tensor]]:
    """Input [T, D]; whole weights; this rank's shards of them and of the upstream gradients."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    x = draw(TOKENS, HIDDEN)
    weights = [draw(columns, HIDDEN) for columns in COLUMNS]
    upstream = [draw(TOKENS, columns) for columns in COLUMNS]
    return (
        x,
        weights,
        [weight.chunk(world)[rank].clone() for weight in weights],
        [grad.chunk(world, dim=1)[rank].clone() for grad in upstream],
    )


def check(sequence_parallel: bool, joint: bool) -> None:
    rank, world = dist.get_rank(), dist.get_world_size()
    x, weights, shards, upstream = problem(rank, world)
    _, _, _, all_upstream = problem(0, 1)
    mine = x.chunk(world)[rank].clone() if sequence_parallel else x.clone()
    leaves = [mine.requires_grad_(), *(shard.requires_grad_() for shard in shards)]
    weights_used = [ProductWeight(shard) for shard in shards]
    project = joint_column_parallel_projection if joint else column_parallel_projections
    outs = project(mine, weights_used, dist.group.WORLD, sequence_parallel)
    if joint:
        outs = outs.split([shard.shape[0] for shard in shards], dim=1)
    grads = torch.autograd.grad(outs, leaves, upstream)

    whole = [x.requires_grad_(), *(weight.requires_grad_() for weight in weights)]
    expected_outs = [F.linear(x, weight) for weight in weights]
    expected = torch.autograd.grad(expected_outs, whole, all_upstream)
    for out, theirs in zip(outs, expected_outs, strict=True):
        torch.testing.assert_close(out, theirs.chunk(world, dim=1)[rank])
    grad_x = expected[0].chunk(world)[rank] if sequence_parallel else expected[0]
    torch.testing.assert_close(grads[0], grad_x)
    for ours, theirs in zip(grads[1:], expected[1:], strict=True):
        torch.testing.assert_close(ours, theirs.chunk(world)[rank])


@pytest.mark.usefixtures("single_process")
@pytest.mark.parametrize("sequence_parallel", [False, True])
@pytest.mark.parametrize("joint", [False, True])
def test_one_process(sequence_parallel: bool, joint: bool) -> None:
    check(sequence_parallel, joint)


def test_two_processes(tmp_path: Path) -> None:
    run_world(2, [(check, case) for case in product((False, True), repeat=2)], tmp_path)


@pytest.mark.usefixtures("single_process")
def test_only_this_ranks_tokens_are_kept_for_backward() -> None:
    x, _, shards, _ = problem(0, 1)
    saved: list[tuple[int, ...]] = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda tensor: saved.append(tuple(tensor.shape)) or tensor, lambda tensor: tensor
    ):
        weights = [ProductWeight(shard.requires_grad_()) for shard in shards]
        column_parallel_projections(x.requires_grad_(), weights, dist.group.WORLD, True)
    assert saved == [(TOKENS, HIDDEN)]
