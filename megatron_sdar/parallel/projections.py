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
from megatron_sdar.parallel.local_weights import ProductWeight


def column_parallel_projections(
    x: Tensor, weights: Sequence[ProductWeight], group: Group | None, sequence_parallel: bool
) -> tuple[Tensor, ...]:
    """x W^T for each of this rank's shards W.

    Args:
        x: [T, D], the same on every tp rank, or with sequence parallelism this rank's [T / tp, D].
        weights: of each, this rank's shard [columns, D]; gradients are summed as they say.
        group: the tp group; None if x has entered the parallel region already: then no
            collective runs.
        sequence_parallel: whether x is divided over tp by tokens.

    Returns:
        [T, columns] per weight.

    Collectives: with sequence parallelism all_gather (tp) forward, all_gather and reduce_scatter
    backward; else all_reduce (tp) backward.
    """
    parameters = (weight.parameter for weight in weights)
    return _Projections.apply(x, group, sequence_parallel, weights, *parameters)


def project(x: Tensor, weight: ProductWeight) -> Tensor:
    """x W^T with this rank's shard W: [T, D] -> [T, columns]. No collective."""
    return column_parallel_projections(x, [weight], None, False)[0]


class _Projections(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        group: Group | None,
        sequence_parallel: bool,
        weights: Sequence[ProductWeight],
        *parameters: Tensor,
    ) -> tuple[Tensor, ...]:
        ctx.group = group if group is not None and dist.get_world_size(group) > 1 else None
        ctx.split = sequence_parallel and ctx.group is not None
        # Parameters outlive the graph, and FSDP may free and gather them again in between.
        ctx.weights = weights
        ctx.save_for_backward(x)
        whole = all_gather_tokens(x, ctx.group) if ctx.split else x
        return tuple(torch.mm(whole, weight.local().t()) for weight in weights)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (x,) = ctx.saved_tensors
        weights: Sequence[ProductWeight] = ctx.weights
        gathering: dist.Work | None = None
        whole = x
        if ctx.split:
            whole, gathering = start_all_gather(x, ctx.group)
        grad_x = torch.mm(grads[0], weights[0].local())
        for grad, weight in zip(grads[1:], weights[1:], strict=True):
            grad_x.addmm_(grad, weight.local())
        summing: dist.Work | None = None
        summed = grad_x
        if ctx.split:
            summed, summing = start_reduce_scatter(grad_x, ctx.group)
        elif ctx.group is not None:
            summing = dist.all_reduce(grad_x, group=ctx.group, async_op=True)
        if gathering is not None:
            gathering.wait()
        grad_weights = [
            weight.gradient(grad, whole) for weight, grad in zip(weights, grads, strict=True)
        ]
        if summing is not None:
            summing.wait()
        return (summed, None, None, None, *grad_weights)
