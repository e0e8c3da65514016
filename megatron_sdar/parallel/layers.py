"""Tensor-parallel layers: weights are DTensors on the tp axis, compute is on local shards.

Each parameter says once how it is sharded, by its DTensor placement; initialisation, import,
clipping, checkpoints and export read that. Invariant: a layer's forward on the local shard runs
no collective of its own except VocabParallelEmbedding; the model brackets groups of layers
with `collectives.enter_parallel_region` and `leave_parallel_region`.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard

from megatron_sdar.parallel.collectives import leave_parallel_region
from megatron_sdar.parallel.local_weights import ProductWeight, local_weight, lookup
from megatron_sdar.parallel.lora import Dropout, LoraOptions, LowRankUpdate
from megatron_sdar.parallel.projections import project
from megatron_sdar.parallel.sharding import local_tensor


def sharded_parameter(
    global_shape: tuple[int, ...], tp: DeviceMesh, placement: Placement, dtype: torch.dtype
) -> nn.Parameter:
    """An uninitialised parameter on the meta device, placed on the tp axis.

    Sizes that are sharded must divide by tp (config.validate said so).
    """
    local_shape = list(global_shape)
    if isinstance(placement, Shard):
        assert local_shape[placement.dim] % tp.size() == 0, f"{global_shape} over tp {tp.size()}"
        local_shape[placement.dim] //= tp.size()
    local = torch.empty(local_shape, dtype=dtype, device="meta")
    shape = torch.Size(global_shape)
    stride = torch.empty(shape, device="meta").stride()
    weight = DTensor.from_local(local, tp, [placement], run_check=False, shape=shape, stride=stride)
    return nn.Parameter(weight)


class LowRankFactor(nn.Module):
    """One factor of a weight's low-rank update.

    Args:
        grad_partial_over_tp: True for a factor that every tp rank holds whole.
    """

    def __init__(
        self, shape: tuple[int, int], tp: DeviceMesh, placement: Placement, dtype: torch.dtype
    ) -> None:
        super().__init__()
        self.grad_partial_over_tp = placement.is_replicate()
        self.weight = sharded_parameter(shape, tp, placement, dtype)


class ParallelLinear(nn.Module):
    """A weight W [out, in] on the tp axis, maybe with a low-rank update beside it (see lora).

    Args:
        placement: of the weight.
        rows: those of the local shard that this rank multiplies with; None: all.
    """

    def __init__(
        self,
        shape: tuple[int, int],
        tp: DeviceMesh,
        placement: Placement,
        dtype: torch.dtype,
        rows: slice | None = None,
    ) -> None:
        super().__init__()
        self.tp = tp
        self.placement = placement
        self.rows = rows
        self.lora: LoraOptions | None = None
        self.weight = sharded_parameter(shape, tp, placement, dtype)

    def adapt(self, lora: LoraOptions, name: str) -> None:
        """Add a low-rank update; on the meta device as the weight is.

        Args:
            name: of this layer in the whole model, which tells its dropout from others'.
        """
        (out_features, in_features), dtype = self.weight.shape, self.weight.dtype
        splits_input = self.placement == Shard(1)
        down, up = (Shard(1), Replicate()) if splits_input else (Replicate(), self.placement)
        own_columns = in_features // self.tp.size() if splits_input else 0
        self.lora, self.name = lora, name
        self.first_column = own_columns * self.tp.get_local_rank()
        self.lora_A = LowRankFactor((lora.rank, in_features), self.tp, down, dtype)
        self.lora_B = LowRankFactor((out_features, lora.rank), self.tp, up, dtype)

    def product(self, dropout_seed: int | None = None) -> ProductWeight:
        """This rank's rows of W and its update, to be multiplied with (see projections).

        Args:
            dropout_seed: of the micro-batch; None: nothing is dropped.
        """
        return ProductWeight(self.weight, self.rows, self._update(dropout_seed))

    def _update(self, dropout_seed: int | None) -> LowRankUpdate | None:
        if self.lora is None:
            return None
        dropout = None
        if dropout_seed is not None and self.lora.dropout > 0:
            dropout = Dropout.of(self.lora.dropout, dropout_seed, self.name, self.first_column)
        up = ProductWeight(self.lora_B.weight, self.rows)
        return LowRankUpdate(ProductWeight(self.lora_A.weight), up, self.lora.scale, dropout)

    def forward(self, x: Tensor, dropout_seed: int | None = None) -> Tensor:
        return project(x, self.product(dropout_seed))


class ColumnParallelLinear(ParallelLinear):
    """y = x W^T with W [out, in] split over out: local y [..., out / tp]."""

    def __init__(
        self, in_features: int, out_features: int, tp: DeviceMesh, dtype: torch.dtype
    ) -> None:
        super().__init__((out_features, in_features), tp, Shard(0), dtype)


class RowParallelLinear(ParallelLinear):
    """y = x W^T with W [out, in] split over in: local y is a partial sum over tp."""

    def __init__(
        self, in_features: int, out_features: int, tp: DeviceMesh, dtype: torch.dtype
    ) -> None:
        super().__init__((out_features, in_features), tp, Shard(1), dtype)


class ReplicatedHeadLinear(ParallelLinear):
    """Projection to fewer heads than tp ranks: W is replicated, each rank uses one head.

    Rank r computes head r * num_heads // tp, the one its query heads read. The weight's
    gradient is partial over tp.
    """

    grad_partial_over_tp = True

    def __init__(
        self, in_features: int, num_heads: int, head_dim: int, tp: DeviceMesh, dtype: torch.dtype
    ) -> None:
        assert tp.size() % num_heads == 0, "heads must divide tp (validated)"
        head = tp.get_local_rank() * num_heads // tp.size()
        rows = slice(head * head_dim, (head + 1) * head_dim)
        super().__init__((num_heads * head_dim, in_features), tp, Replicate(), dtype, rows)


class ReplicatedVector(nn.Module):
    """A replicated weight vector (norm scales).

    Args:
        size: length of the vector.
        grad_partial_over_tp: True when each tp rank sees only its own tokens or heads, so that
            the gradient is a partial sum.
    """

    def __init__(
        self, size: int, tp: DeviceMesh, dtype: torch.dtype, grad_partial_over_tp: bool
    ) -> None:
        super().__init__()
        self.grad_partial_over_tp = grad_partial_over_tp
        self.weight = sharded_parameter((size,), tp, Replicate(), dtype)

    def forward(self) -> Tensor:
        return local_weight(self.weight)


class VocabParallelEmbedding(nn.Module):
    """Token embedding with the (padded) vocabulary split over tp."""

    def __init__(
        self,
        padded_vocab_size: int,
        hidden_size: int,
        tp: DeviceMesh,
        dtype: torch.dtype,
        sequence_parallel: bool,
    ) -> None:
        super().__init__()
        self.tp = tp
        self.sequence_parallel = sequence_parallel
        self.weight = sharded_parameter((padded_vocab_size, hidden_size), tp, Shard(0), dtype)

    def forward(self, input_ids: Tensor) -> Tensor:
        """[T] ids -> [T, D], or [T / tp, D] under sequence parallelism.

        Collective: all_reduce, or reduce_scatter with sequence parallelism.
        """
        if self.tp.size() == 1:
            return lookup(input_ids, self.weight)
        num_rows = local_tensor(self.weight).shape[0]
        local_ids = input_ids - self.tp.get_local_rank() * num_rows
        elsewhere = (local_ids < 0) | (local_ids >= num_rows)
        partial = lookup(local_ids.masked_fill(elsewhere, 0), self.weight)
        partial = partial.masked_fill(elsewhere.unsqueeze(-1), 0.0)
        return leave_parallel_region(partial, self.tp.get_group(), self.sequence_parallel)


def partial_gradient_names(module: nn.Module) -> set[str]:
    """Names of trained parameters whose gradients must be summed over tp once per step."""
    return {
        f"{name}.weight"
        for name, child in module.named_modules()
        if getattr(child, "grad_partial_over_tp", False) and child.weight.requires_grad
    }
