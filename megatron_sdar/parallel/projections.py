"""Several column-parallel projections of one input, as one step of autograd.

q, k and v read the same tokens, and so do gate and up. Together they gather those tokens once,
sum the input's gradient inside the products instead of by extra additions, keep only this rank's
tokens for backward, and run backward's collectives beside products: gathering the input again
beside the input's gradient, summing that gradient over tp beside the weights' gradients (as
Megatron's LinearWithGradAccumulationAndAsyncCommunication does). Weights stay separate
parameters, so names in checkpoints do not change. Frozen weights cost no product for a gradient.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
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
from megatron_sdar.parallel.lora import LowRankUpdate


def column_parallel_projections(
    x: Tensor, weights: Sequence[ProductWeight], group: Group | None, sequence_parallel: bool
) -> tuple[Tensor, ...]:
    """x W^T for each of this rank's shards W, their low-rank updates included.

    Args:
        x: [T, D], the same on every tp rank, or with sequence parallelism this rank's [T / tp, D].
        weights: of each, this rank's shard [columns, D]; gradients are summed as they say.
        group: the tp group; None if x has entered the parallel region already: then no
            collective runs.
        sequence_parallel: whether x is divided over tp by tokens.

    Returns:
        [T, columns] per weight.

    Collectives: with sequence parallelism all_gather (tp) forward, all_gather and reduce_scatter
    backward; else all_reduce (tp) backward. Backward gathers only if a weight is trained that reads
    the input, and sums only if the input has a gradient.
    """
    parameters = (parameter for weight in weights for parameter in weight.parameters)
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
        ctx.wanted = _wanted(ctx.needs_input_grad[4:], weights)
        whole = all_gather_tokens(x, ctx.group) if ctx.split else x
        outputs, reduced = [], []
        for weight in weights:
            out = torch.mm(whole, weight.local().t())
            if weight.update is not None:
                reduced.append(weight.update.reduced(whole))
                weight.update.add_output(reduced[-1], out)
            outputs.append(out)
        # Frozen weights need neither the input nor, in backward, the gathering of it.
        ctx.keeps_input = any(wanted.weight or wanted.down for wanted in ctx.wanted)
        ctx.save_for_backward(*([x] if ctx.keeps_input else []), *reduced)
        return tuple(outputs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        saved = list(ctx.saved_tensors)
        whole = saved.pop(0) if ctx.keeps_input else None
        weights: Sequence[ProductWeight] = ctx.weights
        gathering: dist.Work | None = None
        if ctx.split and whole is not None:
            whole, gathering = start_all_gather(whole, ctx.group)
        upstreams = [
            None if weight.update is None else weight.update.upstream(grad)
            for weight, grad in zip(weights, grads, strict=True)
        ]
        grad_x: Tensor | None = None
        summing: dist.Work | None = None
        if ctx.needs_input_grad[0]:
            partial = _input_gradient(weights, grads, upstreams)
            grad_x = partial
            if ctx.split:
                grad_x, summing = start_reduce_scatter(partial, ctx.group)
            elif ctx.group is not None:
                summing = dist.all_reduce(partial, group=ctx.group, async_op=True)
        if gathering is not None:
            gathering.wait()
        gradients: list[Tensor | None] = []
        for weight, grad, upstream, wanted in zip(
            weights, grads, upstreams, ctx.wanted, strict=True
        ):
            gradients.append(weight.gradient(grad, _kept(whole)) if wanted.weight else None)
            if weight.update is not None:
                gradients += _update_gradients(
                    weight.update, grad, _kept(upstream), whole, saved.pop(0), wanted
                )
        if summing is not None:
            summing.wait()
        return (grad_x, None, None, None, *gradients)


@dataclass(frozen=True)
class _Wanted:
    """Which gradients of one weight autograd asks for."""

    weight: bool
    down: bool = False
    up: bool = False


def _wanted(asked: Sequence[bool], weights: Sequence[ProductWeight]) -> list[_Wanted]:
    remaining = iter(asked)
    return [_Wanted(*(next(remaining) for _ in weight.parameters)) for weight in weights]


def _input_gradient(
    weights: Sequence[ProductWeight], grads: Sequence[Tensor], upstreams: Sequence[Tensor | None]
) -> Tensor:
    """[T, D], this rank's part of the sum over all weights."""
    total = torch.mm(grads[0], weights[0].local())
    for grad, weight in zip(grads[1:], weights[1:], strict=True):
        total.addmm_(grad, weight.local())
    for weight, upstream in zip(weights, upstreams, strict=True):
        if weight.update is not None:
            weight.update.add_input_gradient(_kept(upstream), total)
    return total


def _update_gradients(
    update: LowRankUpdate,
    grad: Tensor,
    upstream: Tensor,
    whole: Tensor | None,
    reduced: Tensor,
    wanted: _Wanted,
) -> tuple[Tensor | None, Tensor | None]:
    """Of A and of B."""
    down = update.down.gradient(upstream, update.seen(_kept(whole))) if wanted.down else None
    up = update.up.gradient(grad, reduced) if wanted.up else None
    return down, up


def _kept(tensor: Tensor | None) -> Tensor:
    assert tensor is not None, "forward keeps what the wanted gradients need"
    return tensor
