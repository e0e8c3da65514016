"""Which part of a global tensor this rank holds, read from the DTensor's placements.

Initialisation, import from safetensors and the optimizer's checkpoint all ask here, so there is
one rule for where a shard lies. Invariant: a local shard is one hyper-rectangle of the global
tensor (tensor parallelism splits it first, FSDP then splits dim 0 of what is left).
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset


def local_tensor(tensor: Tensor) -> Tensor:
    """The local shard of a DTensor, sharing storage; a plain tensor is its own shard."""
    return tensor._local_tensor if isinstance(tensor, DTensor) else tensor


def local_ranges(tensor: DTensor) -> tuple[slice, ...]:
    """Index ranges of the global tensor that this rank's shard covers; may be empty."""
    shape, offset = compute_local_shape_and_global_offset(
        tensor.shape, tensor.device_mesh, tensor.placements
    )
    assert tuple(shape) == tuple(tensor._local_tensor.shape), "local shard disagrees with layout"
    return tuple(slice(lo, lo + size) for lo, size in zip(offset, shape, strict=True))


def replication(tensor: DTensor) -> int:
    """On how many ranks of its mesh each element of the tensor lies."""
    copies = 1
    for axis, placement in enumerate(tensor.placements):
        if placement.is_replicate():
            copies *= tensor.device_mesh.size(axis)
    return copies


def like_parameter(local: Tensor, parameter: DTensor) -> DTensor:
    """Wrap a local tensor shaped like the parameter's shard as a DTensor of its layout."""
    return DTensor(local, parameter._spec, requires_grad=False)


def fill_local(parameter: DTensor, values: Tensor) -> None:
    """Copy `values` (the slice of the global tensor this rank holds) into the shard."""
    with torch.no_grad():
        parameter._local_tensor.copy_(values)


def fill_rows(parameter: DTensor, rows: slice, values: Tensor) -> None:
    """Copy `values` into these rows of the shard, counted from its start."""
    with torch.no_grad():
        parameter._local_tensor[rows].copy_(values)
