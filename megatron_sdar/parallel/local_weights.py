"""A parameter's local shard in autograd, and where its gradient is summed.

A step's micro-batches all add to one gradient. Autograd would write each micro-batch's part to
fresh memory and then add it, DTensor by DTensor: two more passes over all weights. Here a part is
added to the gradient that the parameter already holds, by the product that makes it where there
is one (Megatron's gradient_accumulation_fusion). The step's first part goes the usual way, so
FSDP finds gradients where it looks for them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.distributed.tensor import DTensor
from torch.nn import functional as F

from megatron_sdar.parallel.sharding import local_tensor

if TYPE_CHECKING:
    from megatron_sdar.parallel.lora import LowRankUpdate


def held_gradient(weight: Tensor) -> Tensor | None:
    """The local shard of the gradient that a parameter holds, to be added to in place."""
    return None if weight.grad is None else local_tensor(weight.grad)


class _LocalWeight(torch.autograd.Function):
    """DTensor -> its local shard; the gradient goes back as a DTensor of the same layout.

    `DTensor.to_local()` does the same at about three times the cost per use.
    """

    @staticmethod
    def forward(ctx: Any, weight: DTensor) -> Tensor:
        ctx.weight = weight
        local = local_tensor(weight)
        return local.view_as(local)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor | None:
        held = held_gradient(ctx.weight)
        if held is None:
            return _distributed(grad.contiguous(), ctx.weight)
        held.add_(grad)
        return None


def local_weight(weight: Tensor) -> Tensor:
    """The shard of a DTensor parameter that this rank computes with.

    Backward adds to the parameter's `grad` if there is one, so `torch.autograd.grad` must not be
    asked for a parameter that holds a gradient.
    """
    return _LocalWeight.apply(weight)


class _Lookup(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, ids: Tensor, weight: Tensor) -> Tensor:
        ctx.weight = weight
        ctx.save_for_backward(ids)
        return F.embedding(ids, local_tensor(weight))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[None, Tensor | None]:
        (ids,) = ctx.saved_tensors
        held = held_gradient(ctx.weight)
        if held is not None and grad.device.type == "cpu":
            # On a GPU the order of these additions would differ from run to run.
            held.index_add_(0, ids, grad)
            return None, None
        num_rows = local_tensor(ctx.weight).shape[0]
        dense = torch.ops.aten.embedding_dense_backward(grad, ids, num_rows, -1, False)
        if held is None:
            return None, _distributed(dense, ctx.weight)
        held.add_(dense)
        return None, None


def lookup(ids: Tensor, weight: Tensor) -> Tensor:
    """Rows of a parameter's local shard: ids [T] -> [T, D]. Backward as `local_weight`."""
    return _Lookup.apply(ids, weight)


@dataclass(frozen=True)
class ProductWeight:
    """A parameter as one side of matrix products, which sum its gradient themselves.

    Attributes:
        parameter: DTensor (or a plain tensor, which is its own shard), local shard [columns, D].
        rows: those of the local shard that are used; None: all.
        update: what is added to the parameter in products; None: nothing.
    """

    parameter: Tensor
    rows: slice | None = None
    update: LowRankUpdate | None = None

    @property
    def parameters(self) -> tuple[Tensor, ...]:
        """What has a gradient: the parameter and the factors of its update."""
        if self.update is None:
            return (self.parameter,)
        return (self.parameter, self.update.down.parameter, self.update.up.parameter)

    def local(self) -> Tensor:
        """What is multiplied with, outside of autograd: [used rows, D]."""
        local = local_tensor(self.parameter)
        return local if self.rows is None else local[self.rows]

    def gradient(self, upstream: Tensor, x: Tensor) -> Tensor | None:
        """upstream^T x, added to the parameter's gradient, or returned if that holds none yet.

        Args:
            upstream: [T, used rows].
            x: [T, D].
        """
        held = held_gradient(self.parameter)
        if held is not None:
            (held if self.rows is None else held[self.rows]).addmm_(upstream.t(), x)
            return None
        if self.rows is None:
            return _distributed(torch.mm(upstream.t(), x), self.parameter)
        whole = upstream.new_zeros(local_tensor(self.parameter).shape)
        torch.mm(upstream.t(), x, out=whole[self.rows])
        return _distributed(whole, self.parameter)


def _distributed(grad: Tensor, weight: Tensor) -> Tensor:
    if isinstance(weight, DTensor):
        return DTensor(grad, weight._spec, requires_grad=False)
    return grad
