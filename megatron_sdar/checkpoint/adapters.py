"""Adapters on disk, PEFT's directories and our checkpoints of LoRA runs, by our tensor names.

Invariant: an adapter offers exactly the tensors that its configuration implies for the model it
belongs to, without vocabulary padding.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from megatron_sdar.architecture import Architecture, load_architecture
from megatron_sdar.checkpoint.adapter_config import AdapterConfig, read_adapter_config
from megatron_sdar.checkpoint.base_model import BASE_MODEL_NAME
from megatron_sdar.checkpoint.hf_assets import ADAPTER_CONFIG_NAME, CONFIG_NAME
from megatron_sdar.checkpoint.model_source import with_padding
from megatron_sdar.checkpoint.native_source import split_records
from megatron_sdar.checkpoint.run_directory import (
    HF_DIR,
    MODEL_DIR,
    damaged_files,
    read_marker,
)
from megatron_sdar.checkpoint.safetensors_files import (
    Ranges,
    SafetensorsReader,
    TensorInfo,
    contained_file,
)
from megatron_sdar.checkpoint.shards import ShardedTensors
from megatron_sdar.checkpoint.tensor_names import (
    VOCABULARY,
    Shapes,
    differences,
    model_tensor_shapes,
)

ADAPTER_WEIGHTS_NAME = "adapter_model.safetensors"
PEFT_PREFIX = "base_model.model."


class Adapter(Protocol):
    """An adapter on disk. Threads may share it.

    Attributes:
        directory: where it lies.
        config: what it is.
        tensors: by our names: the low-rank factors, and modules that it holds whole.
        files: those that hold them.
        tokenizer_directory: where the tokenizer that it was trained with lies, if there is one.
    """

    directory: Path
    config: AdapterConfig
    tensors: Mapping[str, TensorInfo]
    files: tuple[Path, ...]
    tokenizer_directory: Path

    def read(self, name: str, ranges: Ranges, dtype: torch.dtype | None = None) -> Tensor:
        """A slice in `dtype` (None: as stored). Rows past the vocabulary are zero padding."""
        ...


def adapter_shapes(config: AdapterConfig, arch: Architecture) -> Shapes:
    """What an adapter holds for a model of this architecture."""
    whole = config.finetuning.adapted(model_tensor_shapes(arch))
    return {name: shape for name, shape in whole.items() if config.finetuning.trains(name)}


class PeftAdapter:
    """A directory as PEFT writes it.

    Args:
        arch: of the model it belongs to, untied.

    Raises:
        ValueError: it is no such directory, is damaged, or holds other tensors than its
            configuration says.
    """

    def __init__(self, directory: str | Path, arch: Architecture) -> None:
        self.directory = self.tokenizer_directory = Path(directory)
        self.config = read_adapter_config(self.directory)
        self._vocab_size = arch.vocab_size
        if not (self.directory / ADAPTER_WEIGHTS_NAME).is_file():
            raise ValueError(
                f"{self.directory}: has no {ADAPTER_WEIGHTS_NAME}; save the adapter with "
                "save_pretrained (other weight formats can run code and are not read)"
            )
        self._file = SafetensorsReader(contained_file(self.directory, ADAPTER_WEIGHTS_NAME))
        self.files: tuple[Path, ...] = (self._file.path,)
        found = {
            name.removeprefix(PEFT_PREFIX): info
            for name, info in self._file.tensors.items()
            if name.startswith(PEFT_PREFIX)
        }
        shapes = adapter_shapes(self.config, arch)
        problems = differences(shapes, {name: info.shape for name, info in found.items()})
        if problems or len(found) != len(self._file.tensors):
            raise ValueError(
                f"{self._file.path}: does not fit {self.config.base or 'its base model'} and "
                "adapter_config.json:\n  " + "\n  ".join(problems or ["foreign tensor names"])
            )
        self.tensors: Mapping[str, TensorInfo] = {name: found[name] for name in shapes}

    def read(self, name: str, ranges: Ranges, dtype: torch.dtype | None = None) -> Tensor:
        """See `Adapter.read`."""
        wanted = dtype or self.tensors[name].dtype
        stored = f"{PEFT_PREFIX}{name}"
        if name in VOCABULARY:
            return with_padding(
                ranges, self._vocab_size, wanted, lambda real: self._file.read(stored, real)
            )
        return self._file.read(stored, ranges).to(wanted)


class CheckpointAdapter:
    """The adapter inside a checkpoint of a LoRA run; every file's checksum is compared.

    Attributes:
        arch: of the model it belongs to, untied.
        padding_rows: rows of vocabulary padding that the checkpoint holds and the model lacks.

    Raises:
        ValueError: the checkpoint is incomplete or damaged, or holds other tensors than its
            configuration says.
    """

    def __init__(self, directory: str | Path) -> None:
        self.directory = Path(directory)
        shards, others = split_records(read_marker(self.directory).files)
        damaged = damaged_files(self.directory, others)
        if damaged:
            raise ValueError("\n".join(damaged))
        self.tokenizer_directory = self.directory / HF_DIR
        self.config = read_adapter_config(self.directory / HF_DIR)
        self.arch = load_architecture(self.directory / HF_DIR)
        self._stored = ShardedTensors(self.directory / MODEL_DIR, shards, keep_cached=False)
        self.files = tuple(self.directory / MODEL_DIR / name for name in shards)
        found = {name: info.shape for name, info in self._stored.tensors.items()}
        self.padding_rows = 0
        for name in VOCABULARY:
            if name in found:
                self.padding_rows = found[name][0] - self.arch.vocab_size
                found[name] = (self.arch.vocab_size, *found[name][1:])
        shapes = adapter_shapes(self.config, self.arch)
        problems = differences(shapes, found)
        if problems or self.padding_rows < 0:
            raise ValueError(
                f"{self.directory}: the adapter does not fit hf/:\n  "
                + "\n  ".join(problems or ["too few rows of the vocabulary"])
            )
        self.tensors: Mapping[str, TensorInfo] = {
            name: TensorInfo(shape, self._stored.tensors[name].dtype)
            for name, shape in shapes.items()
        }

    def read(self, name: str, ranges: Ranges, dtype: torch.dtype | None = None) -> Tensor:
        """See `Adapter.read`."""
        wanted = dtype or self.tensors[name].dtype
        if name in VOCABULARY:
            return with_padding(
                ranges, self.arch.vocab_size, wanted, lambda real: self._stored.read(name, real)
            )
        return self._stored.read(name, ranges).to(wanted)


def is_adapter_checkpoint(checkpoint: Path) -> bool:
    """Whether a checkpoint holds an adapter and not a model."""
    return (checkpoint / BASE_MODEL_NAME).is_file()


def is_adapter_directory(directory: Path) -> bool:
    """Whether PEFT finds an adapter here, and transformers no model."""
    return (directory / ADAPTER_CONFIG_NAME).is_file() and not (directory / CONFIG_NAME).is_file()
