"""Filling the shards of a model from a Hugging Face directory.

Each rank reads only the slices it holds, straight from the memory-mapped files into its shards,
so the peak extra memory is one vocabulary shard whatever the model's size.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from torch.distributed.tensor import DTensor

from megatron_sdar.architecture import Architecture
from megatron_sdar.checkpoint.agreement import on_every_rank
from megatron_sdar.checkpoint.hf_source import HfModel, ImportReport
from megatron_sdar.model.sdar import SdarStage
from megatron_sdar.parallel.sharding import fill_local, local_ranges


def load_hf_weights(
    stages: Sequence[SdarStage],
    arch: Architecture,
    model_dir: str | Path,
    mask_token_init: str = "auto",
    seed: int = 0,
) -> ImportReport:
    """Fill every parameter of this rank's materialised stages; padding rows become zero.

    Args:
        arch: the architecture the stages were built from.
        mask_token_init, seed: see `hf_source.HfModel`.

    Raises:
        ValueError: on every rank, when any rank cannot read what it needs (`HfModel` lists
            the reasons).

    Collective: all_reduce (world).
    """

    def fill() -> ImportReport:
        source = HfModel(model_dir, arch, mask_token_init, seed)
        for stage in stages:
            for name, parameter in stage.named_parameters():
                assert isinstance(parameter, DTensor), f"{name} is not distributed"
                values = source.read(name, local_ranges(parameter), parameter.dtype)
                fill_local(parameter, values)
        return source.report()

    return on_every_rank(fill, f"read its part of {model_dir}", stages)
