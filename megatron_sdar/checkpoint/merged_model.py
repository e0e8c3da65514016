"""A model with an adapter's updates added to its weights, as a source of conversions.

Sums are made in float32 (float64 for float64 weights), as PEFT makes them, and rounded once.
Invariant: what `read` returns never depends on who reads which slice, to the last bit.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from megatron_sdar.checkpoint.adapters import Adapter, CheckpointAdapter
from megatron_sdar.checkpoint.base_model import base_model, read_base_model
from megatron_sdar.checkpoint.hf_assets import CONFIG_NAME, HfAssets, tokenizer_assets
from megatron_sdar.checkpoint.hf_source import HfModel
from megatron_sdar.checkpoint.model_source import ModelSource
from megatron_sdar.checkpoint.safetensors_files import Ranges, TensorInfo
from megatron_sdar.checkpoint.weight_files import cast
from megatron_sdar.model.finetuning import DOWN, UP

_ROWS = 256


class MergedModel:
    """See `model_source.ModelSource`; its directory is the base's.

    Args:
        dtype: of the merged tensors; None keeps the base's.

    Attributes:
        adapter: where that lies.
    """

    def __init__(
        self, base: ModelSource, adapter: Adapter, dtype: torch.dtype | None = None
    ) -> None:
        self._base, self._adapter = base, adapter
        self.directory, self.adapter = base.directory, adapter.directory
        self.kind = f"adapter {self.adapter} on {base.kind}"
        self.arch = base.arch
        lora = adapter.config.lora
        self.notes = [
            *base.notes,
            f"rank {lora.rank}, scale {lora.scale:g}, on {', '.join(lora.targets)}",
        ]
        self.tensors: Mapping[str, TensorInfo] = {
            name: TensorInfo(info.shape, dtype or info.dtype) for name, info in base.tensors.items()
        }

    @property
    def assets(self) -> HfAssets:
        """Those of the base."""
        return self._base.assets

    @property
    def files(self) -> tuple[Path, ...]:
        """Files that hold weights of either."""
        return (*self._base.files, *self._adapter.files)

    @property
    def tokenizer_directory(self) -> Path:
        """The adapter's, which was trained with it; that of the base where it has none."""
        own = self._adapter.tokenizer_directory
        return own if tokenizer_assets(own).files else self._base.tokenizer_directory

    def read(self, name: str, ranges: Ranges, dtype: torch.dtype | None = None) -> Tensor:
        """See `model_source.ModelSource.read`; ValueError too when a sum does not fit the dtype."""
        wanted = dtype or self.tensors[name].dtype
        if name in self._adapter.tensors:
            return cast(name, self._adapter.read(name, ranges), wanted)
        module = name.removesuffix(".weight")
        down, up = f"{module}.{DOWN}.weight", f"{module}.{UP}.weight"
        if down not in self._adapter.tensors:
            return cast(name, self._base.read(name, ranges), wanted)
        wide = torch.promote_types(self._base.tensors[name].dtype, torch.float32)
        total = self._base.read(name, ranges, wide).add_(self._update(up, down, ranges, wide))
        return cast(name, total, wanted)

    def _update(self, up: str, down: str, ranges: Ranges, dtype: torch.dtype) -> Tensor:
        """A slice of scale * B A.

        The rounding of a product depends on its shape, so these are the same whatever the slice:
        whole rows, so many at a time.
        """
        rows, columns = ranges
        (num_rows, rank), (_, num_columns) = (self._adapter.tensors[n].shape for n in (up, down))
        scale = self._adapter.config.lora.scale
        factor = self._adapter.read(down, (slice(0, rank), slice(0, num_columns)), dtype)
        pieces = [factor.new_empty(0, num_columns)[:, columns]]
        for start in range(rows.start // _ROWS * _ROWS, rows.stop, _ROWS):
            block = slice(start, min(start + _ROWS, num_rows))
            update = torch.mm(self._adapter.read(up, (block, slice(0, rank)), dtype), factor)
            inside = slice(max(rows.start - start, 0), rows.stop - start)
            pieces.append(update.mul_(scale)[inside, columns])
        return torch.cat(pieces)


def open_merged_checkpoint(checkpoint: Path) -> MergedModel:
    """The model that a LoRA run's checkpoint stands for.

    Raises:
        ValueError: it is damaged, or the model it was trained beside is gone or another one.
    """
    adapter = CheckpointAdapter(checkpoint)
    known = read_base_model(checkpoint)
    if not (Path(known.path) / CONFIG_NAME).is_file():
        raise ValueError(
            f"{checkpoint}: holds an adapter for {known.path}, where no model is (any more); put "
            "it there, or export the adapter and merge it with tools/merge_adapter.py"
        )
    if base_model(known.path, adapter.arch).fingerprint != known.fingerprint:
        raise ValueError(
            f"{checkpoint}: holds an adapter for {known.path}, but another model lies there now"
        )
    return MergedModel(HfModel(known.path, adapter.arch, "keep", keep_cached=False), adapter)
