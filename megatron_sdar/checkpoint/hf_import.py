"""Filling the shards of a model from a Hugging Face directory, any model source, or an adapter.

Each rank reads only the slices it holds, block by block from the files into its shards, so the
peak extra memory is a few blocks whatever the model's size.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from torch.distributed.tensor import DTensor

from megatron_sdar.architecture import Architecture
from megatron_sdar.checkpoint.adapter_config import config_differences
from megatron_sdar.checkpoint.adapters import PeftAdapter
from megatron_sdar.checkpoint.agreement import together
from megatron_sdar.checkpoint.hf_source import HfModel, ImportReport
from megatron_sdar.checkpoint.model_source import ModelSource, TensorReader
from megatron_sdar.checkpoint.progress import byte_progress
from megatron_sdar.checkpoint.safetensors_files import TensorInfo, row_blocks
from megatron_sdar.checkpoint.snapshot import parameters_of, stored_parameters
from megatron_sdar.model.finetuning import is_factor
from megatron_sdar.model.sdar import SdarStage
from megatron_sdar.parallel.mesh import place_in_world
from megatron_sdar.parallel.sharding import fill_rows, local_ranges, local_tensor


def load_hf_weights(
    stages: Sequence[SdarStage],
    arch: Architecture,
    model_dir: str | Path,
    mask_token_init: str = "auto",
    seed: int = 0,
) -> ImportReport:
    """Fill every parameter of this rank's materialised stages; padding rows become zero.

    Low-rank factors are left as they are.

    Args:
        arch: the architecture the stages were built from.
        mask_token_init, seed: see `hf_source.HfModel`.

    Raises:
        ValueError: on every rank the same, when any rank cannot read what it needs (`HfModel`
            lists the reasons).

    Collective: all_gather_object (world).
    """

    def fill() -> ImportReport:
        source = HfModel(model_dir, arch, mask_token_init, seed)
        _fill_all(_weights(stages), source)
        return source.report()

    return together(fill)


def load_weights(stages: Sequence[SdarStage], source: ModelSource) -> None:
    """Fill every parameter from any kind of model; padding rows become zero.

    Raises:
        ValueError: on every rank the same, when any rank cannot read what it needs.

    Collective: all_gather_object (world).
    """

    def fill() -> bool:
        _fill_all(_weights(stages), source)
        return True

    together(fill)


def load_adapter(stages: Sequence[SdarStage], arch: Architecture, directory: str | Path) -> None:
    """Fill what a LoRA run trains from an adapter that PEFT or an earlier run wrote.

    Raises:
        ValueError: on every rank the same, when it is not readable, or its rank, alpha or targets
            are others than the run's.

    Collective: all_gather_object (world).
    """
    wanted = stages[0].options.finetuning

    def fill() -> bool:
        adapter = PeftAdapter(directory, arch)
        problems = config_differences(adapter.config, wanted)
        if problems:
            raise ValueError(
                f"adapter_name_or_path: {directory} is another adapter: {'; '.join(problems)}; set "
                "the keys as there"
            )
        _fill_all(stored_parameters(stages), adapter)
        return True

    together(fill)


def _weights(stages: Sequence[SdarStage]) -> dict[str, DTensor]:
    return {name: p for name, p in parameters_of(stages).items() if not is_factor(name)}


def _fill_all(parameters: Mapping[str, DTensor], source: TensorReader) -> None:
    total = sum(local_tensor(parameter).nbytes for parameter in parameters.values())
    with byte_progress("reading weights", total, enabled=place_in_world()[0] == 0) as advance:
        for name, parameter in parameters.items():
            _fill(parameter, name, source, advance)


def _fill(
    parameter: DTensor, name: str, source: TensorReader, advance: Callable[[int], None]
) -> None:
    """Read this rank's shard of a parameter block by block."""
    held = local_ranges(parameter)
    local = TensorInfo(tuple(local_tensor(parameter).shape), parameter.dtype)
    for block in row_blocks(local):
        ranges = tuple(
            slice(whole.start + part.start, whole.start + part.stop)
            for whole, part in zip(held, block, strict=True)
        )
        values = source.read(name, ranges, parameter.dtype)
        fill_rows(parameter, block[0], values)
        advance(values.nbytes)
