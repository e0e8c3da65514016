"""Models as native checkpoints of step 0 without moments, which every layout loads.

Written block by block in one process. Experts are stored fused, vocabulary rows padded as the
configuration that will load them wants it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from megatron_sdar.architecture import padded_vocab_size
from megatron_sdar.checkpoint.checksums import FileRecord
from megatron_sdar.checkpoint.experts import published_parts, read_fused
from megatron_sdar.checkpoint.hf_assets import CONFIG_NAME, config_json, copy_assets, write_json
from megatron_sdar.checkpoint.hf_source import ImportReport
from megatron_sdar.checkpoint.model_source import ModelSource
from megatron_sdar.checkpoint.model_writer import WriteOptions, write_model
from megatron_sdar.checkpoint.run_directory import (
    HF_DIR,
    MODEL_DIR,
    STATE_NAME,
    commit,
    damaged_files,
    read_marker,
)
from megatron_sdar.checkpoint.safetensors_files import Ranges, TensorInfo
from megatron_sdar.checkpoint.shards import shard_metadata, shard_name, write_index
from megatron_sdar.checkpoint.source_detection import open_hf_model
from megatron_sdar.checkpoint.tensor_names import EMBEDDING, stored_tensor_shapes
from megatron_sdar.checkpoint.weight_files import WeightFile, cast, group_by_size

DEFAULT_SHARD_BYTES = 2**30


class NativeTarget:
    """A source as a native checkpoint; see `model_writer.ModelTarget`.

    Args:
        dtype: of the written tensors; None keeps the stored ones.
        make_vocab_size_divisible_by: as in the configuration that will load it.
        limit: bytes per shard; a larger tensor gets one of its own.

    Attributes:
        rows: of embedding and head, padding included.
    """

    def __init__(
        self,
        source: ModelSource,
        dtype: torch.dtype | None,
        make_vocab_size_divisible_by: int,
        limit: int = DEFAULT_SHARD_BYTES,
    ) -> None:
        self.source = source
        self.rows = padded_vocab_size(source.arch.vocab_size, make_vocab_size_divisible_by)
        shapes = stored_tensor_shapes(source.arch, self.rows)
        tensors = {
            name: TensorInfo(shape, dtype or _stored_dtype(name, source))
            for name, shape in shapes.items()
        }
        self._dtypes = {name: info.dtype for name, info in tensors.items()}
        self.files = [
            WeightFile(
                f"{MODEL_DIR}/{shard_name(number)}",
                group,
                shard_metadata(
                    {name: [0] * len(shapes[name]) for name in group},
                    {name: shapes[name] for name in group},
                ),
            )
            for number, group in enumerate(group_by_size(tensors, limit))
        ]
        self.plan = {"format": "native", "notes": source.notes}

    def read(self, name: str, ranges: Ranges) -> Tensor:
        """The slice in the dtype of the checkpoint; ValueError when a value does not fit it."""
        experts = self.source.arch.experts
        inter = 0 if experts is None else experts.moe_intermediate_size
        dtype = self._dtypes[name]

        def published(part: str, piece: Ranges) -> Tensor:
            return cast(part, self.source.read(part, piece), dtype)

        return read_fused(name, ranges, inter, published)

    def finish(self, directory: Path, records: Mapping[str, FileRecord]) -> None:
        """Write the index, what an export needs, and the marker last."""
        source = self.source
        write_index(directory / MODEL_DIR)
        write_json(directory / STATE_NAME, {"global_step": 0})
        (directory / HF_DIR).mkdir()
        copy_assets(source.assets, directory / HF_DIR)
        config = config_json(source.arch, source.assets, self._dtypes[EMBEDDING])
        write_json(directory / HF_DIR / CONFIG_NAME, config)
        commit(
            directory,
            step=0,
            sequence=0,
            has_optimizer=False,
            tied=False,
            layout={"tp": 1, "pp": 1, "dp": 1},
            known=records,
        )

    def problems(self, directory: Path) -> list[str]:
        """Files that are missing or not what the marker says."""
        try:
            marker = read_marker(directory)
        except ValueError as error:
            return [str(error)]
        small = {n: r for n, r in marker.files.items() if not n.endswith(".safetensors")}
        return damaged_files(directory, small)

    def notes(self) -> list[str]:
        """What was decided, for the user."""
        notes = list(self.source.notes)
        if self.rows > self.source.arch.vocab_size:
            notes.append(f"vocabulary: {self.source.arch.vocab_size} rows padded to {self.rows}")
        return notes


def _stored_dtype(name: str, source: ModelSource) -> torch.dtype:
    """Of a stored tensor; ValueError when the experts that it holds differ."""
    experts = source.arch.experts
    parts = published_parts(name, 0 if experts is None else experts.num_experts)
    dtypes = {source.tensors[part].dtype for part in parts}
    if len(dtypes) > 1:
        raise ValueError(
            f"{source.directory}: the experts of {name} have dtypes "
            f"{', '.join(sorted(map(str, dtypes)))}; choose one with --dtype"
        )
    return dtypes.pop()


def import_hf(
    model_dir: str | Path,
    destination: str | Path,
    dtype: torch.dtype | None = None,
    mask_token_init: str = "auto",
    block_size: int | None = None,
    make_vocab_size_divisible_by: int = 128,
    seed: int = 0,
    overwrite: bool = False,
    progress: bool = True,
) -> ImportReport:
    """Write a Hugging Face directory's model as a native checkpoint, untied.

    Args:
        dtype: of the written tensors; None keeps the stored ones.
        mask_token_init, seed: see `hf_source.HfModel`.
        block_size: for a config.json without one; None assumes the released models' 4.
        make_vocab_size_divisible_by: as in the configuration that will load it.

    Raises:
        ValueError: as `HfModel`; block_size contradicts config.json; the destination is not
            empty or cannot be written.
    """
    source = open_hf_model(Path(model_dir), mask_token_init, block_size, seed)
    target = NativeTarget(source, dtype, make_vocab_size_divisible_by)
    write_model(target, Path(destination), WriteOptions(overwrite=overwrite, progress=progress))
    return replace(source.report(), notes=tuple(target.notes()))
