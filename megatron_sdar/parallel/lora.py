"""Low-rank updates (LoRA) of the parallel layers' weights: y = x (W + scale B A)^T.

With W split over its output, A [rank, in] is replicated and B [out, rank] split like W; with W
split over its input, A is split like W and B replicated. Either way this rank's part of the update
needs nothing from the others: what a column-parallel layer adds are its own columns, what a
row-parallel one adds is one more partial sum. The replicated factor's gradient is partial over tp.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_sdar.parallel.dropout import dropped
from megatron_sdar.parallel.local_weights import ProductWeight


@dataclass(frozen=True)
class LoraOptions:
    """What is adapted, and how.

    Attributes:
        rank: of the update.
        alpha: the update is scaled by alpha / rank, or alpha / sqrt(rank) if `rslora`.
        dropout: probability that an element of the update's input is zero.
        targets: names of the adapted linear layers, such as q_proj.
    """

    rank: int
    alpha: float
    targets: tuple[str, ...]
    dropout: float = 0.0
    rslora: bool = False

    @property
    def scale(self) -> float:
        return self.alpha / (math.sqrt(self.rank) if self.rslora else self.rank)


@dataclass(frozen=True)
class Dropout:
    """Which elements of a layer's input its update does not see."""

    probability: float
    key: int
    first_column: int

    @classmethod
    def of(cls, probability: float, seed: int, layer: str, first_column: int) -> Dropout:
        """`seed` tells micro-batches apart, the layer's global name the layers."""
        digest = hashlib.sha256(f"{seed}/{layer}".encode()).digest()
        return cls(probability, int.from_bytes(digest[:8], "little"), first_column)

    def __call__(self, x: Tensor) -> Tensor:
        return dropped(x, self.probability, self.key, self.first_column)


@dataclass(frozen=True)
class LowRankUpdate:
    """One use of a layer's update: the local shards of both factors, outside of autograd.

    Attributes:
        down: A, local [rank, D].
        up: B, local [columns, rank].
        dropout: None leaves every element.
    """

    down: ProductWeight
    up: ProductWeight
    scale: float
    dropout: Dropout | None

    def seen(self, x: Tensor) -> Tensor:
        """What of the input [T, D] the update is given."""
        return x if self.dropout is None else self.dropout(x)

    def reduced(self, x: Tensor) -> Tensor:
        """[T, D] -> scale * x A^T [T, rank]."""
        return torch.mm(self.seen(x), self.down.local().t()).mul_(self.scale)

    def add_output(self, reduced: Tensor, out: Tensor) -> None:
        """out [T, columns] += reduced B^T."""
        out.addmm_(reduced, self.up.local().t())

    def upstream(self, grad: Tensor) -> Tensor:
        """The output's gradient [T, columns] -> that of x A^T, [T, rank]."""
        return torch.mm(grad, self.up.local()).mul_(self.scale)

    def add_input_gradient(self, upstream: Tensor, grad_x: Tensor) -> None:
        """grad_x [T, D] += what reaches the input through the update."""
        if self.dropout is None:
            grad_x.addmm_(upstream, self.down.local())
        else:
            grad_x.add_(self.dropout(torch.mm(upstream, self.down.local())))
