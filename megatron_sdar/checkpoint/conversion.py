"""What tools/convert_checkpoint.py and tools/merge_adapter.py ask for, and who does it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from megatron_sdar.checkpoint.adapter_export import export_adapter
from megatron_sdar.checkpoint.adapters import PeftAdapter, is_adapter_checkpoint
from megatron_sdar.checkpoint.destination import check_replaceable
from megatron_sdar.checkpoint.hf_assets import CONFIG_NAME
from megatron_sdar.checkpoint.hf_export import (
    DEFAULT_SHARD_SIZE,
    HfTarget,
    parse_dtype,
    parse_size,
)
from megatron_sdar.checkpoint.merged_model import MergedModel
from megatron_sdar.checkpoint.model_source import ModelSource
from megatron_sdar.checkpoint.model_writer import WriteOptions, write_model
from megatron_sdar.checkpoint.native_import import DEFAULT_SHARD_BYTES, NativeTarget
from megatron_sdar.checkpoint.run_directory import MARKER_NAME, latest_checkpoint
from megatron_sdar.checkpoint.source_detection import open_hf_model, open_source
from megatron_sdar.checkpoint.weight_files import THREADS


@dataclass(frozen=True)
class ConversionRequest:
    """One conversion; None means the default of the format, or not given.

    Attributes:
        source, destination: directories.
        format: of the destination, hf or native.
        dtype: name of a torch dtype; None keeps the stored one.
        max_shard_size: largest weight file, such as "5GB".
        mask_token_init, block_size: for a Hugging Face source.
        make_vocab_size_divisible_by: format native only.
        overwrite, verify, dry_run, threads: see `model_writer.WriteOptions`.
    """

    source: Path
    destination: Path
    format: str
    dtype: str | None = None
    max_shard_size: str | None = None
    mask_token_init: str | None = None
    block_size: int | None = None
    make_vocab_size_divisible_by: int | None = None
    overwrite: bool = False
    verify: bool = False
    dry_run: bool = False
    threads: int = THREADS


def convert(request: ConversionRequest, say: Callable[[str], None] = print) -> None:
    """Do it.

    Args:
        say: told what is done, line by line.

    Raises:
        ValueError: what is wrong with the request, the source, the destination or the disk.
    """
    _check_options(request)
    checkpoint = _adapter_checkpoint(request)
    if checkpoint is not None:
        _export_adapter(checkpoint, request, say)
        return
    source = open_source(request.source, request.mask_token_init, request.block_size)
    dtype = parse_dtype(request.dtype)
    limit = None if request.max_shard_size is None else parse_size(request.max_shard_size)
    target: HfTarget | NativeTarget
    if request.format == "hf":
        target = HfTarget(source, dtype, limit or parse_size(DEFAULT_SHARD_SIZE))
    else:
        divisor = request.make_vocab_size_divisible_by or 128
        target = NativeTarget(source, dtype, divisor, limit or DEFAULT_SHARD_BYTES)
    say(_describe(source))
    for note in source.notes if isinstance(target, HfTarget) else target.notes():
        say(f"  {note}")
    options = WriteOptions(request.overwrite, request.verify, request.dry_run, request.threads)
    write_model(target, request.destination, options, say)
    if request.dry_run:
        return
    if isinstance(target, HfTarget):
        say(target.report(request.destination).format())
    else:
        say(f"{request.destination}: a checkpoint of step 0 that any parallel layout loads")


def _adapter_checkpoint(request: ConversionRequest) -> Path | None:
    """The checkpoint of a LoRA run that is to be converted, if it is one."""
    directory = request.source
    if not (directory / MARKER_NAME).is_file() and directory.is_dir():
        directory = latest_checkpoint(directory) or directory
    return directory if is_adapter_checkpoint(directory) else None


def _export_adapter(
    checkpoint: Path, request: ConversionRequest, say: Callable[[str], None]
) -> None:
    """The adapter alone, for PEFT."""
    given = {
        "--format native": request.format == "native",
        "--mask-token-init": request.mask_token_init is not None,
        "--block-size": request.block_size is not None,
        "--max-shard-size": request.max_shard_size is not None,
        "--dry-run": request.dry_run,
    }
    for option, is_given in given.items():
        if is_given:
            raise ValueError(
                f"{option} does not go with {checkpoint}: it holds an adapter, which becomes one "
                "for PEFT (--format hf); tools/merge_adapter.py makes a model of it"
            )
    say(f"source: the adapter in {checkpoint}")
    dtype = parse_dtype(request.dtype)
    say(export_adapter(checkpoint, request.destination, dtype, request.overwrite).format())


def _describe(source: ModelSource) -> str:
    return (
        f"source: {source.kind} {source.directory}: {len(source.tensors)} tensors in "
        f"{len(source.files)} files"
    )


def _check_options(request: ConversionRequest) -> None:
    divisor = request.make_vocab_size_divisible_by
    if request.format == "hf" and divisor is not None:
        raise ValueError(
            f"--make-vocab-size-divisible-by {divisor} goes with --format native only, an export "
            "has no padding; leave it out"
        )
    for name in ("block_size", "make_vocab_size_divisible_by", "threads"):
        value = getattr(request, name)
        if value is not None and value < 1:
            raise ValueError(f"--{name.replace('_', '-')} {value}: must be at least 1")


@dataclass(frozen=True)
class MergeRequest:
    """One merging of an adapter into its model; None means the default.

    Attributes:
        model, adapter: a Hugging Face directory, and a PEFT adapter trained on it.
        destination: a new Hugging Face directory.
        dtype: name of a torch dtype; None keeps the model's.
        max_shard_size: largest weight file, such as "5GB".
        block_size: where config.json has none.
        overwrite, verify, dry_run, threads: see `model_writer.WriteOptions`.
    """

    model: Path
    adapter: Path
    destination: Path
    dtype: str | None = None
    max_shard_size: str | None = None
    block_size: int | None = None
    overwrite: bool = False
    verify: bool = False
    dry_run: bool = False
    threads: int = THREADS


def merge(request: MergeRequest, say: Callable[[str], None] = print) -> None:
    """Write the model with the adapter's updates added to its weights.

    Args:
        say: told what is done, line by line.

    Raises:
        ValueError: what is wrong with the request, the model, the adapter, the destination or the
            disk.
    """
    dtype = parse_dtype(request.dtype)
    limit = parse_size(request.max_shard_size or DEFAULT_SHARD_SIZE)
    if not (request.model / CONFIG_NAME).is_file():
        raise ValueError(
            f"--model {request.model}: holds no Hugging Face model: it has no {CONFIG_NAME}"
        )
    base = open_hf_model(request.model, "keep", request.block_size)
    adapter = PeftAdapter(request.adapter, base.arch)
    check_replaceable(adapter.directory, request.destination, request.overwrite)
    target = HfTarget(MergedModel(base, adapter, dtype), dtype, limit)
    say(_describe(target.source))
    for note in target.source.notes:
        say(f"  {note}")
    if adapter.config.base and Path(adapter.config.base).name != request.model.resolve().name:
        say(f"  the adapter was trained on {adapter.config.base}; make sure it is the same model")
    options = WriteOptions(request.overwrite, request.verify, request.dry_run, request.threads)
    write_model(target, request.destination, options, say)
    if not request.dry_run:
        say(target.report(request.destination).format())
