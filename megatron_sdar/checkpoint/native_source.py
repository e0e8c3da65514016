"""The model inside a native checkpoint as a source of conversions; needs no process group.

The experts of a layer may be stored in two tensors or in one per expert; both are read.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from megatron_sdar.architecture import load_architecture
from megatron_sdar.checkpoint.base_model import BASE_MODEL_NAME
from megatron_sdar.checkpoint.checksums import FileRecord
from megatron_sdar.checkpoint.experts import expert_place
from megatron_sdar.checkpoint.hf_assets import collect_assets
from megatron_sdar.checkpoint.model_source import with_padding
from megatron_sdar.checkpoint.run_directory import (
    HF_DIR,
    MODEL_DIR,
    damaged_files,
    read_marker,
)
from megatron_sdar.checkpoint.safetensors_files import Ranges, TensorInfo
from megatron_sdar.checkpoint.shards import INDEX_NAME, ShardedTensors
from megatron_sdar.checkpoint.tensor_names import (
    EMBEDDING,
    HEAD,
    VOCABULARY,
    differences,
    model_tensor_shapes,
    stored_tensor_shapes,
)


class NativeModel:
    """A complete checkpoint; see `model_source.ModelSource` for the attributes.

    Args:
        verify: compare the checksum of every file before it is used.

    Attributes:
        padding_rows: rows of vocabulary padding that the checkpoint holds and the model lacks.

    Raises:
        ValueError: the checkpoint is incomplete or damaged, or holds other tensors than its
            config.json says.
    """

    def __init__(self, directory: str | Path, verify: bool = True) -> None:
        self.directory = Path(directory)
        self.kind = "native checkpoint"
        marker = read_marker(self.directory)
        if (self.directory / BASE_MODEL_NAME).is_file():
            raise ValueError(
                f"{self.directory}: holds an adapter, not a model; export it with "
                "tools/convert_checkpoint.py --format hf"
            )
        shards, others = split_records(marker.files)
        damaged = damaged_files(self.directory, others) if verify else []
        if damaged:
            raise ValueError("\n".join(damaged))
        arch = load_architecture(self.directory / HF_DIR)
        self.arch = replace(arch, tie_word_embeddings=False)
        self.assets = collect_assets([self.directory / HF_DIR])
        self.notes: list[str] = []
        self._stored = ShardedTensors(
            self.directory / MODEL_DIR, shards if verify else None, keep_cached=False
        )
        self._head = EMBEDDING if marker.tied else HEAD
        found = {name: info.shape for name, info in self._stored.tensors.items()}
        rows = found.get(EMBEDDING, (arch.vocab_size,))[0]
        stored_arch = replace(arch, tie_word_embeddings=marker.tied)
        fused = differences(stored_tensor_shapes(stored_arch, rows), found)
        problems = fused and min(
            fused, differences(model_tensor_shapes(stored_arch, rows), found), key=len
        )
        if rows < arch.vocab_size:
            problems.append(f"{EMBEDDING}: {rows} rows, config.json says {arch.vocab_size}")
        if problems:
            raise ValueError(
                f"{self.directory}: the weights do not fit hf/config.json:\n  "
                + "\n  ".join(problems)
            )
        self.padding_rows = rows - arch.vocab_size
        if marker.tied:
            self.notes.append(f"{HEAD}: untied, a copy of {EMBEDDING}")
        self.tensors = {
            name: TensorInfo(shape, self._stored.tensors[self._stored_name(name)].dtype)
            for name, shape in model_tensor_shapes(self.arch).items()
        }
        self.files = tuple(self.directory / MODEL_DIR / name for name in shards)

    @property
    def tokenizer_directory(self) -> Path:
        """Where the run put a copy of its own."""
        return self.directory / HF_DIR

    def read(self, name: str, ranges: Ranges, dtype: torch.dtype | None = None) -> Tensor:
        """See `model_source.ModelSource.read`."""
        stored = self._stored_name(name)
        wanted = dtype or self.tensors[name].dtype
        if name in VOCABULARY:
            return with_padding(
                ranges, self.arch.vocab_size, wanted, lambda real: self._stored.read(stored, real)
            )
        place = expert_place(name)
        if place is None or stored == name:
            return self._stored.read(stored, ranges).to(wanted)
        assert self.arch.experts is not None, "only models with experts have such names"
        inter = self.arch.experts.moe_intermediate_size
        values = self._stored.read(stored, place.ranges(ranges, inter))
        return values.squeeze(0).to(wanted)

    def _stored_name(self, name: str) -> str:
        if name == HEAD:
            return self._head
        place = expert_place(name)
        return place.fused if place is not None and name not in self._stored.tensors else name


def split_records(
    files: Mapping[str, FileRecord],
) -> tuple[dict[str, FileRecord], dict[str, FileRecord]]:
    """The model's shards by their names in model/, and what else the model needs."""
    shards = {
        name.removeprefix(f"{MODEL_DIR}/"): record
        for name, record in files.items()
        if name.startswith(f"{MODEL_DIR}/") and name.endswith(".safetensors")
    }
    others = {
        name: record
        for name, record in files.items()
        if name == f"{MODEL_DIR}/{INDEX_NAME}" or name.startswith(f"{HF_DIR}/")
    }
    return shards, others
