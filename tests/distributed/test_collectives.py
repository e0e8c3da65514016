"""Gathered and reduced tokens are what their definition says, on every rank, for any group size."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from distributed.world import run_world
from torch import Tensor

from megatron_sdar.parallel.collectives import (
    start_all_gather,
    start_all_reduce,
    start_reduce_scatter,
)


def _of(rank: int, dtype: torch.dtype, tokens: int) -> Tensor:
    """What a rank holds; sums over ranks depend on their order."""
    values = torch.randn(tokens, 3, 2, generator=torch.Generator().manual_seed(rank))
    return (values * 10**rank).to(dtype)


def _exchange(dtype: torch.dtype, tokens: int) -> None:
    """Of `tokens` tokens on each rank."""
    rank, size = dist.get_rank(), dist.get_world_size()
    group = dist.group.WORLD
    assert group is not None
    everyone = [_of(each, dtype, tokens * size) for each in range(size)]
    mine = everyone[rank].chunk(size)[rank]
    # Not contiguous, as the gradient of an expanded sum is.
    strided = torch.stack((mine, mine), -1)[..., 0]
    # Two at once, as backward has them.
    gathering = start_all_gather(strided, group)
    before = everyone[rank].clone()
    summing = start_reduce_scatter(everyone[rank], group)
    gathered, part = gathering.wait(), summing.wait()
    assert torch.equal(everyone[rank], before)
    expected = torch.cat([whole.chunk(size)[at] for at, whole in enumerate(everyone)])
    assert torch.equal(gathered, expected)
    # In the order of the ranks, on every rank.
    total = everyone[0].clone()
    for whole in everyone[1:]:
        total += whole
    assert torch.equal(part, total.chunk(size)[rank])
    reduced = everyone[rank].clone()
    assert start_all_reduce(reduced, group).wait() is reduced
    tolerance = 2e-2 if dtype == torch.bfloat16 else 1e-6
    assert torch.allclose(reduced, total, rtol=tolerance, atol=tolerance * 10**size)
    assert start_all_gather(mine[:0], group).wait().shape == (0, 3, 2)
    assert start_reduce_scatter(mine[:0], group).wait().shape == (0, 3, 2)


@pytest.mark.parametrize("size", [2, 3, 4])
def test_tokens_are_gathered_and_summed(size: int, tmp_path: Path) -> None:
    dtypes = (torch.float32, torch.float64, torch.bfloat16)
    run_world(
        size, [(_exchange, (dtype, tokens)) for dtype in dtypes for tokens in (5, 1)], tmp_path
    )
