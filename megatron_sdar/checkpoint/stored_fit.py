"""Whether what a checkpoint stores is what this run's model and optimizer need.

Each check raises ValueError with everything that differs; nothing here communicates.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from megatron_sdar.architecture import Architecture
from megatron_sdar.checkpoint.adapter_config import (
    AdapterConfig,
    config_differences,
    read_adapter_config,
)
from megatron_sdar.checkpoint.base_model import BASE_MODEL_NAME, BaseModel, read_base_model
from megatron_sdar.checkpoint.run_directory import (
    HF_DIR,
    OPTIMIZER_DIR,
    RESOLVED_CONFIG_NAME,
    Marker,
)
from megatron_sdar.checkpoint.shards import ShardedTensors
from megatron_sdar.checkpoint.tensor_names import (
    EMBEDDING,
    VOCABULARY,
    differences,
    model_tensor_shapes,
)
from megatron_sdar.model.finetuning import Finetuning
from megatron_sdar.optim.adamw import MOMENTS


@dataclass(frozen=True)
class AdapterOrigin:
    """What a LoRA run trains, and beside which model."""

    config: AdapterConfig
    base: BaseModel


def check_resumable(directory: Path, marker: Marker) -> None:
    """Refuse to resume without moments; before the first step they are zero anyway."""
    if not marker.has_optimizer and marker.step != 0:
        kind = "adapter" if (directory / BASE_MODEL_NAME).is_file() else "model"
        raise ValueError(
            f"{directory}: holds no optimizer state (save_only_model), so step "
            f"{marker.step} cannot be resumed; to train on from its weights, export them "
            f"with tools/convert_checkpoint.py and name the result as {kind}_name_or_path"
        )


def check_tensors(
    directory: Path,
    model: ShardedTensors,
    parameters: Mapping[str, torch.Tensor],
    arch: Architecture,
    finetuning: Finetuning,
) -> None:
    """Refuse other tensors than the run's, or other shapes."""
    found = {name: info.shape for name, info in model.tensors.items()}
    saved_rows = found[EMBEDDING][0] if EMBEDDING in found else None
    rows = next((p.shape[0] for n, p in parameters.items() if n in VOCABULARY), saved_rows)
    shapes = finetuning.adapted(model_tensor_shapes(arch, rows))
    problems = differences({n: s for n, s in shapes.items() if finetuning.stores(n)}, found)
    if not problems:
        return
    text = f"{directory}: does not hold this model:\n  " + "\n  ".join(problems)
    if saved_rows not in (None, rows):
        text += (
            f"\nvocabulary: {saved_rows} rows were saved and this run pads {arch.vocab_size} to "
            f"{rows}; set make_vocab_size_divisible_by as in {directory / RESOLVED_CONFIG_NAME}"
        )
    raise ValueError(text)


def check_precision(
    directory: Path, model: ShardedTensors, parameters: Mapping[str, torch.Tensor]
) -> None:
    """Refuse to round weights, which a resume may not."""
    narrowed = {
        (model.tensors[name].dtype, parameter.dtype)
        for name, parameter in parameters.items()
        if name in model.tensors
        and torch.promote_types(model.tensors[name].dtype, parameter.dtype) != parameter.dtype
    }
    for saved, wanted in sorted(narrowed, key=str):
        raise ValueError(
            f"{directory}: weights are {saved}, this run's are {wanted}, so resuming would round "
            "them; set fp64 as in its config.yaml"
        )


def check_moments(
    directory: Path, stored: ShardedTensors, model: ShardedTensors, finetuning: Finetuning
) -> None:
    """Refuse moments that are not those of what is trained of the model beside them."""
    expected = {
        f"{name}.{moment}": info.shape
        for name, info in model.tensors.items()
        for moment in MOMENTS
        if finetuning.trains(name)
    }
    problems = differences(expected, {name: info.shape for name, info in stored.tensors.items()})
    if problems:
        raise ValueError(
            f"{directory / OPTIMIZER_DIR}: does not fit what this run trains of the model beside "
            "it:\n  " + "\n  ".join(problems) + "\nset finetuning_type and the keys of freeze as "
            f"in {directory / RESOLVED_CONFIG_NAME}"
        )


def check_adapter(directory: Path, origin: AdapterOrigin | None) -> None:
    """Refuse a checkpoint with an adapter in a run without, the other way round, and another one's.

    Args:
        origin: what this run trains and beside which model; None where it trains the model.
    """
    holds_adapter = (directory / BASE_MODEL_NAME).is_file()
    if holds_adapter != (origin is not None):
        found, wanted = ("an adapter", "none") if holds_adapter else ("a model", "an adapter")
        raise ValueError(
            f"{directory}: holds {found}, and this run trains {wanted}; set finetuning_type as in "
            f"{directory / RESOLVED_CONFIG_NAME}, or choose another output_dir"
        )
    if origin is None:
        return
    other = config_differences(read_adapter_config(directory / HF_DIR), origin.config.finetuning)
    if other:
        raise ValueError(
            f"{directory}: holds another adapter: {'; '.join(other)}; set the keys as in "
            f"{directory / RESOLVED_CONFIG_NAME}"
        )
    base = read_base_model(directory)
    if base.fingerprint != origin.base.fingerprint:
        raise ValueError(
            f"{directory}: its adapter was trained beside {base.path}, whose weights are not "
            f"those of {origin.base.path}; set model_name_or_path to that model"
        )
