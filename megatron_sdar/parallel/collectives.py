"""Each forward collective beside its backward, for tensor and sequence parallelism.

The token axis (dim 0) is the sequence axis. Every function is the identity on a group of one.
Names follow Megatron's tensor_parallel.mappings.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

Group = dist.ProcessGroup


def all_reduce_sum(x: Tensor, group: Group) -> Tensor:
    """Sum over the group, in place. Collective: all_reduce. No autograd."""
    if dist.get_world_size(group) > 1:
        dist.all_reduce(x, group=group)
    return x


def all_reduce_max(x: Tensor, group: Group) -> Tensor:
    """Maximum over the group, in place. Collective: all_reduce. No autograd."""
    if dist.get_world_size(group) > 1:
        dist.all_reduce(x, op=dist.ReduceOp.MAX, group=group)
    return x


@dataclass(frozen=True)
class Exchange:
    """A collective that has begun: other work may run beside it until `wait`.

    Attributes:
        work: what to wait for.
        received: where the result arrives.
        in_parts: `received` is [ranks, ...], to be summed over the ranks.
    """

    work: dist.Work
    received: Tensor
    in_parts: bool = False

    def wait(self) -> Tensor:
        """The result, once it is there."""
        self.work.wait()
        return _added(self.received) if self.in_parts else self.received


def all_gather_tokens(x: Tensor, group: Group) -> Tensor:
    """[T / tp, ...] -> [T, ...]. Collective: all_gather. No autograd."""
    return start_all_gather(x, group).wait()


def start_all_gather(x: Tensor, group: Group) -> Exchange:
    """Begin `all_gather_tokens`. Collective: on a CPU all_to_all with the same part for everyone.

    gloo's own all_gather copies the tokens once more.
    """
    size = dist.get_world_size(group)
    out = x.new_empty((x.shape[0] * size, *x.shape[1:]))
    if x.device.type == "cpu":
        parts = x.repeat(size, *[1] * (x.dim() - 1))
        return Exchange(_begun(dist.all_to_all_single(out, parts, group=group, async_op=True)), out)
    work = dist.all_gather_single(out, x.contiguous(), group=group, async_op=True)
    return Exchange(_begun(work), out)


def start_all_reduce(x: Tensor, group: Group) -> Exchange:
    """Begin to sum over the group, in place. Collective: all_reduce. No autograd."""
    return Exchange(_begun(dist.all_reduce(x, group=group, async_op=True)), x)


def start_reduce_scatter(x: Tensor, group: Group) -> Exchange:
    """Begin [T, ...] partial sums -> [T / tp, ...]. No autograd.

    `x` is contiguous and must stay as it is until the result is there.

    Collective: reduce_scatter, on a CPU all_to_all: gloo's reduce_scatter is an all_reduce that
    throws the others' tokens away, twice the bytes and the time.
    """
    size = dist.get_world_size(group)
    assert x.shape[0] % size == 0, "token axis is a multiple of tp (validated)"
    part = (x.shape[0] // size, *x.shape[1:])
    if x.device.type == "cpu":
        parts = torch.empty_like(x)
        work = dist.all_to_all_single(parts, x, group=group, async_op=True)
        return Exchange(_begun(work), parts.view(size, *part), in_parts=True)
    out = x.new_empty(part)
    return Exchange(_begun(dist.reduce_scatter_single(out, x, group=group, async_op=True)), out)


def _added(parts: Tensor) -> Tensor:
    """[ranks, ...] -> [...]; on a CPU twice as fast as `sum(0)`, and the same on every rank."""
    total = parts[0] + parts[1]
    for part in parts[2:]:
        total += part
    return total


def _begun(work: dist.Work | None) -> dist.Work:
    assert work is not None, "this rank is in the group"
    return work


def _reduce_scatter(x: Tensor, group: Group) -> Tensor:
    return start_reduce_scatter(x.contiguous(), group).wait()


class _CopyToRegion(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group) -> Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        # The upstream gradient may be shared with another branch, so reduce a copy.
        return all_reduce_sum(grad.clone(memory_format=torch.contiguous_format), ctx.group), None


class _ReduceFromRegion(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group) -> Tensor:
        return all_reduce_sum(x.clone(memory_format=torch.contiguous_format), group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return grad, None


class _GatherFromSequence(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group) -> Tensor:
        ctx.group = group
        return all_gather_tokens(x, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return _reduce_scatter(grad, ctx.group), None


class _ReduceScatterToSequence(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group) -> Tensor:
        ctx.group = group
        return _reduce_scatter(x, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return all_gather_tokens(grad, ctx.group), None


def copy_to_tensor_parallel_region(x: Tensor, group: Group) -> Tensor:
    """Forward: identity. Backward: all_reduce (sum)."""
    return x if dist.get_world_size(group) == 1 else _CopyToRegion.apply(x, group)


def reduce_from_tensor_parallel_region(x: Tensor, group: Group) -> Tensor:
    """Forward: all_reduce (sum). Backward: identity."""
    return x if dist.get_world_size(group) == 1 else _ReduceFromRegion.apply(x, group)


def gather_from_sequence_parallel_region(x: Tensor, group: Group) -> Tensor:
    """[T / tp, ...] -> [T, ...]. Forward: all_gather. Backward: reduce_scatter (sum)."""
    return x if dist.get_world_size(group) == 1 else _GatherFromSequence.apply(x, group)


def reduce_scatter_to_sequence_parallel_region(x: Tensor, group: Group) -> Tensor:
    """[T, ...] partial sums -> [T / tp, ...]. Forward: reduce_scatter. Backward: all_gather."""
    return x if dist.get_world_size(group) == 1 else _ReduceScatterToSequence.apply(x, group)


def enter_parallel_region(x: Tensor, group: Group, sequence_parallel: bool) -> Tensor:
    """Input side of a column-parallel layer: whole tokens on every tp rank."""
    if sequence_parallel:
        return gather_from_sequence_parallel_region(x, group)
    return copy_to_tensor_parallel_region(x, group)


def leave_parallel_region(x: Tensor, group: Group, sequence_parallel: bool) -> Tensor:
    """Output side of a row-parallel layer: partial sums become the residual's layout."""
    if sequence_parallel:
        return reduce_scatter_to_sequence_parallel_region(x, group)
    return reduce_from_tensor_parallel_region(x, group)
