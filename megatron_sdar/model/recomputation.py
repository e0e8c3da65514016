"""Selective activation recomputation: cheap results are made again in backward, not kept.

What costs a matrix product or attention is kept; norms and rotated queries and keys are
elementwise, so those are recomputed (SwiGLU's output is never kept, see parallel.projections). Done
by hooks on what operations save, so any kernel that keeps its inputs takes part.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

GRANULARITIES = ("full", "selective", "none")

Maker = Callable[[], Tensor]


@dataclass(frozen=True)
class _Recipe:
    """How to get a saved tensor back: make its base again, then take the same view."""

    make: Maker
    shape: torch.Size
    stride: tuple[int, ...]
    offset: int


class _NotKept(torch.autograd.graph.saved_tensors_hooks):
    """Operations entered inside keep recipes instead of the named tensors."""

    def __init__(self, makers: dict[int, Maker]) -> None:
        def pack(saved: Tensor) -> Tensor | _Recipe:
            make = makers.get(_storage(saved))
            if make is None:
                return saved
            return _Recipe(make, saved.shape, saved.stride(), int(saved.storage_offset()))

        super().__init__(pack, lambda packed: _unpack(packed))


def not_kept(*results: tuple[Tensor, Maker]) -> AbstractContextManager[object]:
    """Operations inside do not keep these tensors for backward.

    Args:
        results: each a tensor, and how to make it again (bitwise; without gradients) from what is
            kept anyway. It must not be changed in place afterwards.
    """
    if not torch.is_grad_enabled():
        return nullcontext()
    return _NotKept({_storage(result): make for result, make in results})


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _unpack(packed: Tensor | _Recipe) -> Tensor:
    if isinstance(packed, Tensor):
        return packed
    with torch.no_grad():
        base = packed.make()
    return base.as_strided(packed.shape, packed.stride, packed.offset)
