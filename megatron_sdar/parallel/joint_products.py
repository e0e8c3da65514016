"""Products of one input with several weights: one product where they lie side by side, else each.

As one product the input is read once, and the input's gradient is one sum. Which form runs changes
the order of sums, nothing else. Weights' gradients stay products of their own, which add to what
each parameter holds. Outside of autograd, no collectives.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from megatron_sdar.parallel.adjacency import columns_as_one, rows_as_one
from megatron_sdar.parallel.local_weights import ProductWeight


def products(x: Tensor, weights: Sequence[ProductWeight]) -> list[Tensor]:
    """x W^T of each weight's shard: [T, D] -> [T, columns] each."""
    return [torch.mm(x, weight.local().t()) for weight in weights]


def joint_product(x: Tensor, weights: Sequence[ProductWeight]) -> Tensor:
    """x W^T of all weights' shards: [T, D] -> [T, sum of columns], in their order."""
    shards = [weight.local() for weight in weights]
    whole = rows_as_one(shards)
    if whole is not None:
        return torch.mm(x, whole.t())
    columns = [shard.shape[0] for shard in shards]
    out = x.new_empty(x.shape[0], sum(columns))
    for shard, part in zip(shards, out.split(columns, dim=1), strict=True):
        torch.mm(x, shard.t(), out=part)
    return out


def input_gradient(grads: Sequence[Tensor], weights: Sequence[ProductWeight]) -> Tensor:
    """The sum of grad W over the weights: of [T, columns] each, [T, D]."""
    shards = [weight.local() for weight in weights]
    whole, upstream = rows_as_one(shards), columns_as_one(grads)
    if whole is not None and upstream is not None:
        return torch.mm(upstream, whole)
    total = torch.mm(grads[0], shards[0])
    for grad, shard in zip(grads[1:], shards[1:], strict=True):
        total.addmm_(grad, shard)
    return total
