"""What tools/convert_checkpoint.py asks for, and who does it.

Owns recognising the source. The wanted format decides what a directory stands for, since a
finished run's output_dir is both: native checkpoints inside, an exported model beside them.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from megatron_sdar.checkpoint.hf_assets import CONFIG_NAME
from megatron_sdar.checkpoint.hf_export import export_hf
from megatron_sdar.checkpoint.native_import import import_hf
from megatron_sdar.checkpoint.run_directory import (
    MARKER_NAME,
    incomplete_checkpoints,
    latest_checkpoint,
)


@dataclass(frozen=True)
class ConversionRequest:
    """One conversion; None means the default of the format, or not given.

    Attributes:
        source, destination: directories.
        format: of the destination, hf or native.
        dtype: name of a torch dtype; None keeps the stored one.
        overwrite: replace a destination that is a model or a checkpoint.
        max_shard_size: format hf only.
        mask_token_init, block_size, make_vocab_size_divisible_by: format native only.
    """

    source: Path
    destination: Path
    format: str
    dtype: str | None = None
    overwrite: bool = False
    max_shard_size: str | None = None
    mask_token_init: str | None = None
    block_size: int | None = None
    make_vocab_size_divisible_by: int | None = None


def convert(request: ConversionRequest) -> str:
    """Do it; returns the summary for the user. ValueError says what is wrong."""
    _refuse_foreign_options(request)
    if not request.source.is_dir():
        raise ValueError(f"{request.source}: no such directory; --from takes a directory")
    if request.format == "hf":
        checkpoint, notes = _native_source(request.source)
        report = export_hf(
            checkpoint,
            request.destination,
            request.dtype,
            request.max_shard_size or "5GB",
            request.overwrite,
        )
        return "\n".join([*notes, f"exported {checkpoint}", report.format()])
    imported = import_hf(
        _hf_source(request.source),
        request.destination,
        None if request.dtype is None else getattr(torch, request.dtype),
        request.mask_token_init or "auto",
        request.block_size,
        request.make_vocab_size_divisible_by or 128,
        overwrite=request.overwrite,
    )
    return f"{imported.format()}\nimported as {request.destination}"


def _refuse_foreign_options(request: ConversionRequest) -> None:
    """An option of the other format would be ignored without a word."""
    options = {
        "hf": ("max_shard_size",),
        "native": ("mask_token_init", "block_size", "make_vocab_size_divisible_by"),
    }
    for format, names in options.items():
        for name in names:
            value = getattr(request, name)
            flag = f"--{name.replace('_', '-')}"
            if value is not None and format != request.format:
                raise ValueError(f"{flag} {value} goes with --format {format} only; leave it out")
            if isinstance(value, int) and value < 1:
                raise ValueError(f"{flag} {value}: must be at least 1")


def _native_source(source: Path) -> tuple[Path, list[str]]:
    """The checkpoint that `source` is or holds, and what was passed over."""
    if (source / MARKER_NAME).is_file() or source.name.startswith("checkpoint-"):
        return source, []
    newest = latest_checkpoint(source)
    skipped = incomplete_checkpoints(source)
    if newest is not None:
        return newest, [f"skipped {reason}" for reason in skipped]
    if skipped:
        raise ValueError(f"{source}: has no complete checkpoint: {'; '.join(skipped)}")
    if (source / CONFIG_NAME).is_file():
        raise ValueError(f"{source}: is in Hugging Face format already")
    raise ValueError(f"{source}: is neither a checkpoint nor a run with checkpoint-N directories")


def _hf_source(source: Path) -> Path:
    if (source / MARKER_NAME).is_file():
        raise ValueError(
            f"{source}: is a native checkpoint already; every parallel layout loads it as it is"
        )
    return source
