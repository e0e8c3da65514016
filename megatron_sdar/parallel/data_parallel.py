"""Data parallelism with FSDP2: where it is applied and when its collectives run.

Gradients are summed, never averaged: the loss already carries the global denominator. With
bf16 compute, weights and gradient accumulation stay fp32. `optim_grads` keeps gathered weights
and unreduced gradients through a step, `optim_grads_params` frees both after each use (ZeRO-3),
`no_shard` replicates (the mesh's dp_replicate axis carries the ranks).
"""

from __future__ import annotations

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

from megatron_sdar.parallel.mesh import ParallelMesh


def apply_data_parallel(
    stage: nn.Module,
    layers: list[nn.Module],
    mesh: ParallelMesh,
    strategy: str,
    compute_dtype: torch.dtype,
    param_dtype: torch.dtype,
) -> None:
    """Shard a stage's parameters over the data-parallel axes, layer by layer, in place.

    Args:
        stage: the pipeline stage (root FSDP module).
        layers: its decoder layers, each its own FSDP module.
        strategy: data_parallel_sharding_strategy.
        compute_dtype: of activations and gathered weights; gradients reduce in param_dtype.

    Does nothing for one data-parallel rank that computes in the parameters' dtype.
    """
    if mesh.dp_size == 1 and compute_dtype == param_dtype:
        return
    reshard = strategy == "optim_grads_params"
    policy = MixedPrecisionPolicy(param_dtype=compute_dtype, reduce_dtype=param_dtype)
    axes = mesh.data_parallel_axes
    for module in [*layers, stage]:
        fully_shard(module, mesh=axes, mp_policy=policy, reshard_after_forward=reshard)
    for module in stage.modules():
        if isinstance(module, FSDPModule):
            if mesh.dp_size > 1:  # a single rank would divide all gradients by 1
                module.set_gradient_divide_factor(1.0)
            # Without this the unit divide factor becomes a pre-multiplied sum, which gloo lacks.
            module.set_force_sum_reduction_for_comms(True)


def is_data_parallel(stage: nn.Module) -> bool:
    """Whether FSDP holds the stage's parameters and makes their gradients."""
    return isinstance(stage, FSDPModule)


def free_gathered(stage: nn.Module) -> None:
    """Hold shards only again, as the optimizer and checkpoints want, after a forward alone.

    In training the backward does that.
    """
    for module in stage.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def mark_backward(stage: nn.Module, is_last: bool, strategy: str, runs: bool = True) -> None:
    """Tell FSDP what the coming backward does with gradients and gathered weights.

    Args:
        runs: False for a stage that has nothing to train: its weights are given back here.

    `optim_grads_params` reduces after every micro-batch, so that no rank ever holds whole
    gradients. The other strategies accumulate locally and reduce once, in the stage's last
    backward of the step: less communication, but whole gradients live until then.
    """
    if not runs:
        if is_last:
            free_gathered(stage)
        return
    if isinstance(stage, FSDPModule):
        reduces = is_last or strategy == "optim_grads_params"
        stage.set_is_last_backward(reduces)
        stage.set_requires_gradient_sync(reduces)
        stage.set_reshard_after_backward(reduces)
