"""Models as Hugging Face directories, written block by block in one process.

Needs no process group. Writes what SGLang, LMDeploy, JetEngine and transformers load: every tensor
under its published name with lm_head.weight always present, one tensor per expert, no vocabulary
padding, an index, and no other .safetensors file beside it. A source without remote code gets ours.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.filesize import decimal
from torch import Tensor

from megatron_sdar.checkpoint.checksums import FileRecord
from megatron_sdar.checkpoint.destination import move_in, scratch_directory
from megatron_sdar.checkpoint.hf_assets import (
    CONFIG_NAME,
    config_json,
    copy_assets,
    with_remote_code,
    write_json,
)
from megatron_sdar.checkpoint.hf_lint import lint_export
from megatron_sdar.checkpoint.hf_source import INDEX_NAME
from megatron_sdar.checkpoint.model_source import ModelSource
from megatron_sdar.checkpoint.model_writer import WriteOptions, write_model
from megatron_sdar.checkpoint.native_source import NativeModel
from megatron_sdar.checkpoint.progress import byte_progress
from megatron_sdar.checkpoint.safetensors_files import Ranges, TensorInfo
from megatron_sdar.checkpoint.tensor_names import EMBEDDING
from megatron_sdar.checkpoint.weight_files import (
    THREADS,
    WeightFile,
    cast,
    group_by_size,
    write_weight_files,
)

EXPORT_DTYPES = ("bfloat16", "float16", "float32", "float64")
DEFAULT_SHARD_SIZE = "5GB"
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


class HfTarget:
    """A source as a Hugging Face directory; see `model_writer.ModelTarget`.

    Args:
        dtype: of the written tensors; None keeps the stored ones.
        limit: bytes per weight file; a larger tensor gets a file of its own.
    """

    def __init__(self, source: ModelSource, dtype: torch.dtype | None, limit: int) -> None:
        self.source = source
        self.assets = with_remote_code(source.assets, source.arch)
        tensors = {
            name: TensorInfo(info.shape, dtype or info.dtype)
            for name, info in source.tensors.items()
        }
        groups = group_by_size(tensors, limit)
        self.files = [
            WeightFile(f"model-{number:05d}-of-{len(groups):05d}.safetensors", group, {})
            for number, group in enumerate(groups, start=1)
        ]
        self._dtypes = {name: info.dtype for name, info in tensors.items()}
        self.dtype = self._dtypes[EMBEDDING]
        self.plan = {"format": "hf", "notes": source.notes}

    def read(self, name: str, ranges: Ranges) -> Tensor:
        """The slice in the dtype of the export; ValueError when a value does not fit it."""
        return cast(name, self.source.read(name, ranges), self._dtypes[name])

    def finish(self, directory: Path, records: Mapping[str, FileRecord]) -> None:
        """Write config.json, the files that travel along and, last, the index."""
        del records
        copy_assets(self.assets, directory)
        config = config_json(self.source.arch, self.assets, self.dtype)
        write_json(directory / CONFIG_NAME, config)
        weight_map = {name: file.name for file in self.files for name in file.tensors}
        total = sum(file.num_bytes for file in self.files)
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        write_json(directory / INDEX_NAME, index)

    def problems(self, directory: Path) -> list[str]:
        """See `hf_lint.lint_export`."""
        return lint_export(directory, self.assets)

    def report(self, destination: Path) -> ExportReport:
        """What `destination` holds."""
        dropped = self.source.padding_rows if isinstance(self.source, NativeModel) else 0
        return ExportReport(
            destination,
            tuple(file.name for file in self.files),
            len(self._dtypes),
            sum(file.num_bytes for file in self.files),
            self.dtype,
            dropped,
            tuple(self.assets.files),
        )


def export_hf(
    checkpoint_dir: str | Path,
    destination: str | Path,
    dtype: torch.dtype | str | None = None,
    max_shard_size: int | str = DEFAULT_SHARD_SIZE,
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
    path = Path(destination)
    wanted, limit = parse_dtype(dtype), parse_size(max_shard_size)
    target = HfTarget(NativeModel(checkpoint_dir), wanted, limit)
    if not into_existing:
        write_model(target, path, WriteOptions(overwrite=overwrite, progress=progress))
        return target.report(path)
    _refuse_foreign_weights(path)
    with scratch_directory(path, ".export.tmp") as scratch:
        total = sum(file.num_bytes for file in target.files)
        with byte_progress("export", total, progress) as advance:
            records = {
                file.name: record
                for file, record in write_weight_files(
                    scratch, target.files, target.read, THREADS, advance
                )
            }
        target.finish(scratch, records)
        _move_in(scratch, path, tuple(records))
    return target.report(path)


def parse_dtype(dtype: torch.dtype | str | None) -> torch.dtype | None:
    """The dtype of a name or dtype; ValueError for one that weights cannot have."""
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
    move_in(temporary, directory, last=INDEX_NAME)
