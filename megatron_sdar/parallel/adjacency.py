"""Matrices that lie side by side in memory, and the one matrix that they are together.

gate and up read the same input: as one matrix they are one product instead of two, which reads that
input once. They stay parameters of their own, with names, gradients and moments of their own; only
their memory is shared. What holds parameters elsewhere (FSDP, once it has gathered them) leaves
them apart, and the products then run one by one.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from megatron_sdar.parallel.sharding import local_tensor


def place_side_by_side(parameters: Sequence[nn.Parameter]) -> None:
    """Give the local shards [rows, D] one allocation, in which each follows the one before.

    Their values are not kept. Shards of FSDP stay where they are: what is computed with there is
    gathered from them.
    """
    if any(isinstance(each, DTensor) and each.device_mesh.ndim > 1 for each in parameters):
        return
    shards = [local_tensor(parameter) for parameter in parameters]
    sizes = [shard.shape[0] for shard in shards]
    whole = shards[0].new_empty(sum(sizes), shards[0].shape[1])
    with torch.no_grad():
        for shard, place in zip(shards, whole.split(sizes), strict=True):
            shard.set_(place)


def rows_as_one(parts: Sequence[Tensor]) -> Tensor | None:
    """The matrix [sum of rows, D] whose rows are those of `parts`; None if they lie apart.

    Args:
        parts: [rows, D] each.
    """
    width = parts[0].shape[1]
    if not all(part.shape[1] == width and part.is_contiguous() for part in parts):
        return None
    if not _follow(parts, [part.numel() for part in parts]):
        return None
    return parts[0].as_strided((sum(part.shape[0] for part in parts), width), (width, 1))


def columns_as_one(parts: Sequence[Tensor]) -> Tensor | None:
    """The matrix [T, sum of columns] whose columns are those of `parts`; None if they lie apart.

    Args:
        parts: [T, columns] each.
    """
    shape, stride = parts[0].shape, parts[0].stride()
    columns = [part.shape[1] for part in parts]
    if stride[1] != 1 or stride[0] < sum(columns):
        return None
    if not all(part.stride() == stride and part.shape[0] == shape[0] for part in parts):
        return None
    if not _follow(parts, columns):
        return None
    return parts[0].as_strided((shape[0], sum(columns)), stride)


def _follow(parts: Sequence[Tensor], steps: Sequence[int]) -> bool:
    """Whether each part begins so many elements behind the one before, in the same storage."""
    first = parts[0]
    at = first.storage_offset()
    for part, step in zip(parts, steps, strict=True):
        same = part.untyped_storage().data_ptr() == first.untyped_storage().data_ptr()
        if not same or part.dtype != first.dtype or part.storage_offset() != at:
            return False
        at += step
    return True
