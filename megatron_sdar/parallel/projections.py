"""Several column-parallel projections of one input, as one step of autograd.

q, k and v read the same tokens, and so do gate and up. Together they gather those tokens once,
sum the input's gradient inside the products instead of by extra additions, keep only this rank's
tokens for backward, and run backward's collectives beside products: gathering the input again
beside the input's gradient, summing that gradient over tp beside the weights' gradients (as
Megatron's LinearWithGradAccumulationAndAsyncCommunication does). Weights stay separate
parameters, so names in checkpoints do not change.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron_sdar.parallel.collectives import (
    Group,
    all_gather_tokens,
    start_all_gather,
    start_reduce_scatter,
)


def column_parallel_projections(
    x: Tensor, weights: Sequence[Tensor], group: Group | None, sequence_parallel: bool
) -> tuple[Tensor, ...]:
    """x W^T for each of this rank's shards W.

    Args:
        x: [T, D], the same on every tp rank, or with sequence parallelism this rank's [T / tp, D].
        weights: local shards [columns, D].
        group: the tp group; None if x has entered the parallel region already: then no
            collective runs.
        sequence_parallel: whether x is divided over tp by tokens.

    Returns:
        [T, columns] per weight.

    Collectives: with sequence parallelism all_gather (tp) forward, all_gather and reduce_scatter
    backward; else all_reduce (tp) backward.
    """
    return _Projections.apply(x, group, sequence_parallel, *weights)


class _Projections(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, group: Group | None, sequence_parallel: bool, *weights: Tensor
    ) -> tuple[Tensor, ...]:
        ctx.group = group if group is not None and dist.get_world_size(group) > 1 else None
        ctx.split = sequence_parallel and ctx.group is not None
        ctx.save_for_backward(x, *weights)
        whole = all_gather_tokens(x, ctx.group) if ctx.split else x
        return tuple(torch.mm(whole, weight.t()) for weight in weights)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, *weights = ctx.saved_tensors
        gathering: dist.Work | None = None
        whole = x
        if ctx.split:
            whole, gathering = start_all_gather(x, ctx.group)
        grad_x = torch.mm(grads[0], weights[0])
        for grad, weight in zip(grads[1:], weights[1:], strict=True):
            grad_x.addmm_(grad, weight)
        summing: dist.Work | None = None
        summed = grad_x
        if ctx.split:
            summed, summing = start_reduce_scatter(grad_x, ctx.group)
        elif ctx.group is not None:
            summing = dist.all_reduce(grad_x, group=ctx.group, async_op=True)
        if gathering is not None:
            gathering.wait()
        grad_weights = [torch.mm(grad.t(), whole) for grad in grads]
        if summing is not None:
            summing.wait()
        return (summed, None, None, *grad_weights)
