"""Cutting the layer stack into pipeline stages and building this rank's stages.

Stage s of pp * vpp lies on pipeline rank s % pp as its chunk s // pp (Megatron's interleaving).
Layers that do not divide evenly go one each to the stages in the middle first: the first and
last stage also carry the embedding and the head.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import nn

from megatron_sdar.architecture import Architecture
from megatron_sdar.model.options import ModelOptions
from megatron_sdar.model.sdar import SdarStage, StageRange
from megatron_sdar.parallel.data_parallel import apply_data_parallel
from megatron_sdar.parallel.mesh import ParallelMesh


def stage_ranges(
    num_layers: int, num_stages: int, layers_per_stage: Sequence[int] | None = None
) -> list[StageRange]:
    """Layer ranges of all stages, in order.

    Args:
        num_layers: decoder layers of the model, at least num_stages.
        num_stages: pp * vpp.
        layers_per_stage: an explicit split (validated); None splits evenly.
    """
    if layers_per_stage is None:
        base, extra = divmod(num_layers, num_stages)
        middle_first = sorted(range(num_stages), key=lambda s: (s in (0, num_stages - 1), s))
        favoured = set(middle_first[:extra])
        layers_per_stage = [base + (stage in favoured) for stage in range(num_stages)]
    assert sum(layers_per_stage) == num_layers, "layer split was validated"
    assert len(layers_per_stage) == num_stages, "layer split was validated"
    ranges, start = [], 0
    for stage, count in enumerate(layers_per_stage):
        ranges.append(StageRange(start, start + count, stage == 0, stage == num_stages - 1))
        start += count
    return ranges


def build_stages(
    arch: Architecture,
    mesh: ParallelMesh,
    options: ModelOptions,
    virtual_size: int = 1,
    layers_per_stage: Sequence[int] | None = None,
    sharding_strategy: str = "optim_grads",
    compute_dtype: torch.dtype | None = None,
) -> nn.ModuleList:
    """This rank's stages (its virtual chunks in order) on the meta device, FSDP applied.

    Args:
        compute_dtype: dtype of activations; None means the parameters' dtype.
    """
    options = replace(options, compute_dtype=compute_dtype or options.dtype)
    ranges = stage_ranges(arch.num_hidden_layers, mesh.pp_size * virtual_size, layers_per_stage)
    mine = [ranges[chunk * mesh.pp_size + mesh.pp_rank] for chunk in range(virtual_size)]
    stages = nn.ModuleList(SdarStage(arch, stage, mesh.tp, options) for stage in mine)
    for stage in stages:
        assert isinstance(stage, SdarStage)
        apply_data_parallel(
            stage,
            list(stage.model.layers.values()),
            mesh,
            sharding_strategy,
            compute_dtype or options.dtype,
            options.dtype,
        )
    return stages
