"""From a native checkpoint to a Hugging Face model directory, block by block in one process.

Needs no process group and no memory beyond one block of one tensor. Writes what SGLang, LMDeploy,
JetEngine and transformers load: every tensor under its Hugging Face name with lm_head.weight
always present, no vocabulary padding, an index, and no other .safetensors file beside it.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from rich.filesize import decimal
from torch import Tensor

from megatron_sdar.architecture import Architecture, load_architecture
from megatron_sdar.checkpoint.destination import new_directory, writing
from megatron_sdar.checkpoint.hf_assets import (
    CONFIG_NAME,
    HfAssets,
    collect_assets,
    config_json,
    copy_assets,
    write_json,
)
from megatron_sdar.checkpoint.hf_source import INDEX_NAME
from megatron_sdar.checkpoint.progress import byte_progress
from megatron_sdar.checkpoint.run_directory import HF_DIR, MODEL_DIR, read_marker
from megatron_sdar.checkpoint.safetensors_files import (
    SafetensorsWriter,
    TensorInfo,
    row_blocks,
)
from megatron_sdar.checkpoint.shards import ShardedTensors
from megatron_sdar.checkpoint.tensor_names import (
    EMBEDDING,
    HEAD,
    differences,
    model_tensor_shapes,
)

EXPORT_DTYPES = ("bfloat16", "float16", "float32", "float64")
_WEIGHT_FILE = re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors")
_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


@dataclass(frozen=True)
class ExportReport:
    """What was written.

    Attributes:
        files: names of the weight files.
        num_bytes: of all tensors.
        dropped_rows: rows of vocabulary padding left out of embedding and head each.
        copied: names of the files shipped along.
    """

    destination: Path
    files: tuple[str, ...]
    num_tensors: int
    num_bytes: int
    dtype: torch.dtype
    dropped_rows: int
    copied: tuple[str, ...]

    def format(self) -> str:
        """The report as lines for the user."""
        dtype = str(self.dtype).removeprefix("torch.")
        return (
            f"{self.destination}: {self.num_tensors} tensors, {decimal(self.num_bytes)} of "
            f"{dtype} in {len(self.files)} files; {self.dropped_rows} padding rows left out\n"
            f"  copied: {', '.join(self.copied) or 'no tokenizer or other files were there'}"
        )


class _Checkpoint:
    """The model inside a native checkpoint, complete and of the expected shapes."""

    def __init__(self, directory: Path) -> None:
        marker = read_marker(directory)
        self.arch: Architecture = load_architecture(directory / HF_DIR)
        self.assets: HfAssets = collect_assets([directory / HF_DIR])
        self.stored = ShardedTensors(directory / MODEL_DIR)
        found = {name: info.shape for name, info in self.stored.tensors.items()}
        rows = found.get(EMBEDDING, (self.arch.vocab_size,))[0]
        arch = replace(self.arch, tie_word_embeddings=marker.tied)
        problems = differences(model_tensor_shapes(arch, rows), found)
        if rows < self.arch.vocab_size:
            problems.append(f"{EMBEDDING}: {rows} rows, config.json says {self.arch.vocab_size}")
        if problems:
            raise ValueError(
                f"{directory}: the weights do not fit hf/config.json:\n  " + "\n  ".join(problems)
            )
        self.dropped_rows = rows - self.arch.vocab_size
        self.head = EMBEDDING if marker.tied else HEAD

    def tensors(self, dtype: torch.dtype | None) -> dict[str, TensorInfo]:
        """What the export holds."""
        return {
            name: TensorInfo(shape, dtype or self.stored.tensors[self.stored_name(name)].dtype)
            for name, shape in model_tensor_shapes(self.arch).items()
        }

    def stored_name(self, name: str) -> str:
        return self.head if name == HEAD else name


def export_hf(
    checkpoint_dir: str | Path,
    destination: str | Path,
    dtype: torch.dtype | str | None = None,
    max_shard_size: int | str = "5GB",
    overwrite: bool = False,
    progress: bool = True,
    into_existing: bool = False,
) -> ExportReport:
    """Write the model of a native checkpoint as a Hugging Face directory.

    Args:
        dtype: of the written tensors, a torch dtype or its name; None keeps the stored one.
        max_shard_size: bytes per weight file, or text such as "5GB"; a larger tensor gets a
            file of its own.
        overwrite: replace a destination that is a model directory.
        progress: draw a bar when stderr is a terminal.
        into_existing: write into a directory that holds other things too, such as a run's
            output_dir: only the export's own files are replaced, the index last.

    Raises:
        ValueError: the checkpoint is incomplete or damaged; the destination is not empty, holds
            foreign weights or cannot be written; a value does not fit the dtype.
    """
    source, target = Path(checkpoint_dir), Path(destination)
    wanted = _parse_dtype(dtype)
    limit = parse_size(max_shard_size)
    model = _Checkpoint(source)
    if into_existing:
        _refuse_foreign_weights(target)
        temporary = target / ".export.tmp"
        with writing(target, temporary):
            if temporary.exists():
                shutil.rmtree(temporary)
            temporary.mkdir(parents=True)
            report = _write(model, temporary, target, wanted, limit, progress)
            _move_in(temporary, target, report.files)
        return report
    with new_directory(source, target, overwrite) as temporary:
        return _write(model, temporary, target, wanted, limit, progress)


def _parse_dtype(dtype: torch.dtype | str | None) -> torch.dtype | None:
    name = str(dtype).removeprefix("torch.")
    if dtype is not None and name not in EXPORT_DTYPES:
        raise ValueError(f"dtype: {name} is not available; use one of {', '.join(EXPORT_DTYPES)}")
    return None if dtype is None else getattr(torch, name)


def parse_size(size: int | str) -> int:
    """Bytes from a number or text such as 500MB, 5GB or 4GiB; ValueError for anything else."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?) *([A-Z]*)", str(size).strip().upper())
    if match is None or match[2] not in _UNITS or float(match[1]) * _UNITS[match[2]] < 1:
        raise ValueError(f"max_shard_size: {size!r} is not a size; write 5GB, 500MB or bytes")
    return int(float(match[1]) * _UNITS[match[2]])


def _write(
    model: _Checkpoint,
    directory: Path,
    destination: Path,
    dtype: torch.dtype | None,
    limit: int,
    progress: bool,
) -> ExportReport:
    tensors = model.tensors(dtype)
    files = _plan_files(tensors, limit)
    total = sum(info.num_bytes for info in tensors.values())
    with byte_progress("export", total, progress) as advance:
        for file, names in files.items():
            infos = {name: tensors[name] for name in names}
            with SafetensorsWriter(directory / file, infos, {}) as writer:
                for name, info in infos.items():
                    for ranges in row_blocks(info):
                        block = model.stored.read(model.stored_name(name), ranges)
                        cast = block.to(info.dtype)
                        if _overflows(block, cast):
                            raise ValueError(
                                f"{name}: has values too large for {info.dtype}; export bfloat16"
                            )
                        advance(writer.write(name, cast))
    weight_map = {name: file for file, names in files.items() for name in names}
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    written = tensors[EMBEDDING].dtype
    copy_assets(model.assets, directory)
    write_json(directory / CONFIG_NAME, config_json(model.arch, model.assets, written))
    write_json(directory / INDEX_NAME, index)
    copied = tuple(model.assets.files)
    return ExportReport(
        destination, tuple(files), len(tensors), total, written, model.dropped_rows, copied
    )


def _overflows(block: Tensor, cast: Tensor) -> bool:
    """Whether a finite value became infinite."""
    return block.dtype != cast.dtype and not torch.equal(cast.isfinite(), block.isfinite())


def _plan_files(tensors: Mapping[str, TensorInfo], limit: int) -> dict[str, list[str]]:
    """Tensor names by file name: consecutive tensors, as many as fit."""
    groups: list[list[str]] = []
    size = 0
    for name, info in tensors.items():
        if not groups or size + info.num_bytes > limit:
            groups.append([])
            size = 0
        groups[-1].append(name)
        size += info.num_bytes
    return {
        f"model-{number:05d}-of-{len(groups):05d}.safetensors": names
        for number, names in enumerate(groups, start=1)
    }


def _refuse_foreign_weights(directory: Path) -> None:
    """Loaders that read every .safetensors file would take those for part of the model."""
    foreign = sorted(
        path.name
        for path in directory.glob("*.safetensors")
        if not _WEIGHT_FILE.fullmatch(path.name)
    )
    if foreign:
        raise ValueError(
            f"{directory}: holds {', '.join(foreign)}, which loaders would take for part of the "
            "exported model; move it away"
        )


def _move_in(temporary: Path, directory: Path, weight_files: tuple[str, ...]) -> None:
    """Replace the directory's export file by file; without an index it is not complete."""
    (directory / INDEX_NAME).unlink(missing_ok=True)
    for path in directory.glob("model*.safetensors"):
        if path.name not in weight_files:
            path.unlink()
    for path in sorted(temporary.rglob("*")):
        if path.is_file() and path.name != INDEX_NAME:
            target = directory / path.relative_to(temporary)
            target.parent.mkdir(exist_ok=True)
            os.replace(path, target)
    os.replace(temporary / INDEX_NAME, directory / INDEX_NAME)
    shutil.rmtree(temporary)
