"""Column-parallel projections of one input, and the projection of SwiGLU: steps of autograd.

q, k and v read the same tokens, and so do gate and up. Together they gather those tokens once,
sum the input's gradient inside the products instead of by extra additions, keep only this rank's
tokens for backward, and run backward's collectives beside products: gathering the input again
beside the input's gradient, summing that gradient over tp beside the weights' gradients (as
Megatron's LinearWithGradAccumulationAndAsyncCommunication does). Weights stay separate
parameters, so names in checkpoints do not change; gate and up, which lie side by side in memory,
are one product, and so is their input's gradient (`joint_products`). Frozen weights cost no product
for a gradient.

The MLP's way out keeps gate and up but not their product, half as much again: the pass that makes
their gradients makes it once more, just before the weight's gradient reads it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from sdar_kernels.swiglu import swiglu, swiglu_gradients
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron_sdar.parallel.collectives import (
    Exchange,
    Group,
    all_gather_tokens,
    start_all_gather,
    start_all_reduce,
    start_reduce_scatter,
)
from megatron_sdar.parallel.joint_products import input_gradient, joint_product, products
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
    return _Projections.apply(x, group, sequence_parallel, weights, False, *parameters)


def joint_column_parallel_projection(
    x: Tensor, weights: Sequence[ProductWeight], group: Group | None, sequence_parallel: bool
) -> Tensor:
    """As `column_parallel_projections`, all in one matrix: [T, sum of columns]."""
    parameters = (parameter for weight in weights for parameter in weight.parameters)
    out: Tensor = _Projections.apply(x, group, sequence_parallel, weights, True, *parameters)
    return out


def project(x: Tensor, weight: ProductWeight) -> Tensor:
    """x W^T with this rank's shard W: [T, D] -> [T, columns]. No collective."""
    return column_parallel_projections(x, [weight], None, False)[0]


def project_swiglu(gate_up: Tensor, weight: ProductWeight, impl: str) -> Tensor:
    """(silu(gate) * up) W^T with this rank's shard W. No collective.

    Kept for backward: gate and up.

    Args:
        gate_up: [T, twice this rank's part of the intermediate size].
        weight: its low-rank update included.
        impl: fused_kernels, resolved.
    """
    out: Tensor = _SwigluProjection.apply(gate_up, weight, impl, *weight.parameters)
    return out


class _Projections(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        group: Group | None,
        sequence_parallel: bool,
        weights: Sequence[ProductWeight],
        joint: bool,
        *parameters: Tensor,
    ) -> Tensor | tuple[Tensor, ...]:
        ctx.group = group if group is not None and dist.get_world_size(group) > 1 else None
        ctx.split = sequence_parallel and ctx.group is not None
        # Parameters outlive the graph, and FSDP may free and gather them again in between.
        ctx.weights = weights
        ctx.wanted = _wanted(ctx.needs_input_grad[5:], weights)
        whole = all_gather_tokens(x, ctx.group) if ctx.split else x
        ctx.columns = None
        if joint:
            out = joint_product(whole, weights)
            ctx.columns = [weight.local().shape[0] for weight in weights]
            outputs: Sequence[Tensor] = out.split(ctx.columns, dim=1)
        else:
            outputs = products(whole, weights)
        reduced = _add_updates(weights, whole, outputs)
        # Frozen weights need neither the input nor, in backward, the gathering of it.
        ctx.keeps_input = any(wanted.weight or wanted.down for wanted in ctx.wanted)
        ctx.save_for_backward(*([x] if ctx.keeps_input else []), *reduced)
        return out if joint else tuple(outputs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.columns is not None:
            grads = grads[0].split(ctx.columns, dim=1)
        saved = list(ctx.saved_tensors)
        whole = saved.pop(0) if ctx.keeps_input else None
        weights: Sequence[ProductWeight] = ctx.weights
        gathering: Exchange | None = None
        if ctx.split and whole is not None:
            gathering = start_all_gather(whole, ctx.group)
        upstreams = _upstreams(weights, grads)
        grad_x: Tensor | None = None
        summing: Exchange | None = None
        if ctx.needs_input_grad[0]:
            grad_x = _input_gradient(weights, grads, upstreams)
            if ctx.group is not None:
                start = start_reduce_scatter if ctx.split else start_all_reduce
                summing = start(grad_x, ctx.group)
        if gathering is not None:
            whole = gathering.wait()
        gradients = _weight_gradients(weights, grads, upstreams, whole, saved, ctx.wanted)
        if summing is not None:
            grad_x = summing.wait()
        return (grad_x, None, None, None, None, *gradients)


class _SwigluProjection(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, gate_up: Tensor, weight: ProductWeight, impl: str, *parameters: Tensor
    ) -> Tensor:
        ctx.weight, ctx.impl = weight, impl
        ctx.wanted = _wanted(ctx.needs_input_grad[3:], [weight])
        activated = swiglu(gate_up, impl)
        (out,) = products(activated, [weight])
        ctx.save_for_backward(gate_up, *_add_updates([weight], activated, [out]))
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        gate_up, *reduced = ctx.saved_tensors
        weights: list[ProductWeight] = [ctx.weight]
        upstreams = _upstreams(weights, [grad])
        if ctx.needs_input_grad[0]:
            grad_product = _input_gradient(weights, [grad], upstreams)
            grad_gate_up, activated = swiglu_gradients(grad_product, gate_up, ctx.impl)
        else:
            grad_gate_up, activated = None, swiglu(gate_up, ctx.impl)
        gradients = _weight_gradients(weights, [grad], upstreams, activated, reduced, ctx.wanted)
        return (grad_gate_up, None, None, *gradients)


def _add_updates(
    weights: Sequence[ProductWeight], x: Tensor, outputs: Sequence[Tensor]
) -> list[Tensor]:
    """Add low-rank updates to [T, columns] of each weight; what their smaller factors make of x."""
    reduced = []
    for weight, out in zip(weights, outputs, strict=True):
        if weight.update is not None:
            reduced.append(weight.update.reduced(x))
            weight.update.add_output(reduced[-1], out)
    return reduced


def _upstreams(weights: Sequence[ProductWeight], grads: Sequence[Tensor]) -> list[Tensor | None]:
    return [
        None if weight.update is None else weight.update.upstream(grad)
        for weight, grad in zip(weights, grads, strict=True)
    ]


def _weight_gradients(
    weights: Sequence[ProductWeight],
    grads: Sequence[Tensor],
    upstreams: Sequence[Tensor | None],
    x: Tensor | None,
    reduced: Sequence[Tensor],
    wanted: Sequence[_Wanted],
) -> list[Tensor | None]:
    """Of each weight and of its update's factors; x is None if no wanted gradient reads it."""
    gradients: list[Tensor | None] = []
    remaining = iter(reduced)
    for weight, grad, upstream, asked in zip(weights, grads, upstreams, wanted, strict=True):
        gradients.append(weight.gradient(grad, _kept(x)) if asked.weight else None)
        if weight.update is not None:
            gradients += _update_gradients(
                weight.update, grad, _kept(upstream), x, next(remaining), asked
            )
    return gradients


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
    total = input_gradient(grads, weights)
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
