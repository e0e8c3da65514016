"""The adapter of a LoRA run's checkpoint as a directory that PEFT loads.

adapter_model.safetensors with PEFT's names, adapter_config.json and the tokenizer; none of the base
model's weights. Needs no process group.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from rich.filesize import decimal

from megatron_sdar.checkpoint.adapter_config import adapter_config_json
from megatron_sdar.checkpoint.adapters import ADAPTER_WEIGHTS_NAME, PEFT_PREFIX, CheckpointAdapter
from megatron_sdar.checkpoint.destination import (
    check_replaceable,
    move_in,
    replace_by,
    scratch_directory,
)
from megatron_sdar.checkpoint.hf_assets import (
    ADAPTER_CONFIG_NAME,
    copy_assets,
    tokenizer_assets,
    write_json,
)
from megatron_sdar.checkpoint.run_directory import HF_DIR
from megatron_sdar.checkpoint.safetensors_files import TensorInfo
from megatron_sdar.checkpoint.weight_files import (
    WeightFile,
    cast,
    compare_weight_files,
    write_weight_files,
)


@dataclass(frozen=True)
class AdapterReport:
    """What was written."""

    destination: Path
    num_tensors: int
    num_bytes: int
    base: str

    def format(self) -> str:
        """The report as a line for the user."""
        return (
            f"{self.destination}: PEFT adapter of {self.num_tensors} tensors, "
            f"{decimal(self.num_bytes)}, for {self.base}"
        )


def export_adapter(
    checkpoint: str | Path,
    destination: str | Path,
    dtype: torch.dtype | None = None,
    overwrite: bool = False,
    into_existing: bool = False,
) -> AdapterReport:
    """Write the adapter of a checkpoint; what was written is read back and compared.

    Args:
        dtype: of the written tensors; None keeps the stored one.
        overwrite: replace a destination that is a model, checkpoint or adapter.
        into_existing: write into a directory that holds other things too, such as a run's
            output_dir: only the adapter's own files are replaced, its configuration last.

    Raises:
        ValueError: the checkpoint is incomplete, damaged or holds no adapter; the destination
            cannot be written; a value does not fit the dtype.
    """
    adapter, path = CheckpointAdapter(checkpoint), Path(destination)
    tensors = {
        f"{PEFT_PREFIX}{name}": TensorInfo(info.shape, dtype or info.dtype)
        for name, info in adapter.tensors.items()
    }
    file = WeightFile(ADAPTER_WEIGHTS_NAME, tensors, {"format": "pt"})

    def read(name: str, ranges: tuple[slice, ...]) -> torch.Tensor:
        values = adapter.read(name.removeprefix(PEFT_PREFIX), ranges)
        return cast(name, values, tensors[name].dtype)

    if not into_existing:
        check_replaceable(adapter.directory, path, overwrite)
    parent, name = (path, ".export.tmp") if into_existing else (path.parent, f".{path.name}.tmp")
    with scratch_directory(parent, name) as scratch:
        for _ in write_weight_files(scratch, [file], read, 1, lambda _: None):
            copy_assets(tokenizer_assets(adapter.directory / HF_DIR), scratch)
            write_json(scratch / ADAPTER_CONFIG_NAME, adapter_config_json(adapter.config))
        compare_weight_files(scratch, [file], read, 1, lambda _: None)
        if into_existing:
            move_in(scratch, path, last=ADAPTER_CONFIG_NAME)
        else:
            replace_by(scratch, path)
    return AdapterReport(path, len(tensors), file.num_bytes, adapter.config.base)
