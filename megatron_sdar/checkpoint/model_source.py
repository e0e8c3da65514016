"""What can be converted: a model's tensors by their published names, any slice, from anywhere.

Implementations are `hf_source.HfModel`, `native_source.NativeModel` and, of two things on disk,
`merged_model.MergedModel`. Invariant: whatever the
directory looks like, a source offers exactly `tensor_names.model_tensor_shapes(arch)` of an untied
architecture whose block size and mask token are known.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from megatron_sdar.architecture import Architecture
from megatron_sdar.checkpoint.hf_assets import HfAssets
from megatron_sdar.checkpoint.safetensors_files import Ranges, TensorInfo


class TensorReader(Protocol):
    """What gives slices of tensors by their names."""

    def read(self, name: str, ranges: Ranges, dtype: torch.dtype | None = None) -> Tensor:
        """A slice in `dtype` (None: as stored)."""
        ...


class ModelSource(TensorReader, Protocol):
    """A complete model on disk. Threads may share it.

    Attributes:
        directory: where it lies.
        kind: for people, such as "Hugging Face qwen3".
        arch: untied and complete.
        assets: what travels with the weights.
        notes: for the user, one line for each thing that was decided on the way.
        tensors: published name -> shape without padding, and dtype as stored.
        files: the weight files.
        tokenizer_directory: where the tokenizer lies, if there is one.
    """

    directory: Path
    kind: str
    arch: Architecture
    notes: list[str]

    @property
    def assets(self) -> HfAssets: ...

    @property
    def tensors(self) -> Mapping[str, TensorInfo]: ...

    @property
    def files(self) -> tuple[Path, ...]: ...

    @property
    def tokenizer_directory(self) -> Path: ...

    def read(self, name: str, ranges: Ranges, dtype: torch.dtype | None = None) -> Tensor:
        """A slice in `dtype` (None: as stored). Rows past arch.vocab_size are zero padding.

        Raises:
            ValueError: a file is unreadable or damaged.
        """
        ...


def with_padding(
    ranges: Ranges, vocab_size: int, dtype: torch.dtype, read: Callable[[Ranges], Tensor]
) -> Tensor:
    """A slice of a vocabulary tensor whose rows from `vocab_size` on are zero."""
    rows, columns = ranges
    last = max(rows.start, min(rows.stop, vocab_size))
    real = (slice(rows.start, last), columns)
    if last == rows.stop:
        return read(real).to(dtype)
    values = torch.zeros(rows.stop - rows.start, columns.stop - columns.start, dtype=dtype)
    if last > rows.start:
        values[: last - rows.start] = read(real)
    return values
