"""Recognising what a directory holds, and completing what its config.json does not say.

A run's output_dir stands for its newest complete checkpoint; without one, for the Hugging Face
model that may lie there. Released SDAR and Qwen3 configs lack the block size and the mask token;
every assumption made here is a note for the user.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from megatron_sdar.architecture import Architecture, load_architecture
from megatron_sdar.checkpoint.adapter_config import read_adapter_config
from megatron_sdar.checkpoint.adapters import (
    PeftAdapter,
    is_adapter_checkpoint,
    is_adapter_directory,
)
from megatron_sdar.checkpoint.hf_assets import CONFIG_NAME
from megatron_sdar.checkpoint.hf_source import HfModel
from megatron_sdar.checkpoint.merged_model import MergedModel, open_merged_checkpoint
from megatron_sdar.checkpoint.model_source import ModelSource
from megatron_sdar.checkpoint.native_source import NativeModel
from megatron_sdar.checkpoint.run_directory import (
    MARKER_NAME,
    incomplete_checkpoints,
    latest_checkpoint,
)
from megatron_sdar.data.tokenization.tokenizer import load_tokenizer

RELEASED_BLOCK_SIZE, RELEASED_MASK_TOKEN_ID = 4, 151669


def open_source(
    directory: Path, mask_token_init: str | None, block_size: int | None, seed: int = 0
) -> ModelSource:
    """The model that `directory` is or holds.

    Args:
        mask_token_init, seed: see `hf_source.HfModel`; None means auto.
        block_size: for a config.json without one; None assumes the released models' 4.

    Raises:
        ValueError: there is none, it is incomplete or damaged, or an option does not fit it.
    """
    if not directory.is_dir():
        raise ValueError(f"{directory}: no such directory; --from takes a directory")
    checkpoint, skipped = _native_checkpoint(directory)
    if checkpoint is not None:
        if mask_token_init is not None:
            raise ValueError(
                f"--mask-token-init {mask_token_init} goes with a Hugging Face model only; "
                f"{checkpoint} has a trained row, leave it out"
            )
        if is_adapter_checkpoint(checkpoint):
            merged = open_merged_checkpoint(checkpoint)
            merged.notes += [f"skipped {reason}" for reason in skipped]
            return merged
        native = NativeModel(checkpoint)
        _check_block_size(native.arch, checkpoint / "hf" / CONFIG_NAME, block_size)
        native.notes += [f"skipped {reason}" for reason in skipped]
        return native
    if (directory / CONFIG_NAME).is_file():
        model = open_hf_model(directory, mask_token_init or "auto", block_size, seed)
        model.notes += [f"skipped {reason}" for reason in skipped]
        return model
    if is_adapter_directory(directory):
        raise ValueError(
            f"{directory}: holds an adapter, not a model; merge it with the model that it was "
            "trained on: tools/merge_adapter.py"
        )
    if skipped:
        raise ValueError(f"{directory}: has no complete checkpoint: {'; '.join(skipped)}")
    raise ValueError(
        f"{directory}: holds no model: neither config.json (Hugging Face), nor {MARKER_NAME} (a "
        "checkpoint), nor checkpoint-N directories (a run)"
    )


def _native_checkpoint(directory: Path) -> tuple[Path | None, list[str]]:
    """The checkpoint that `directory` is or holds, and what was passed over."""
    if (directory / MARKER_NAME).is_file() or directory.name.startswith("checkpoint-"):
        return directory, []
    return latest_checkpoint(directory), incomplete_checkpoints(directory)


def open_adapted_model(directory: Path) -> MergedModel:
    """The model that a PEFT adapter makes of the one that it names.

    Raises:
        ValueError: there is no model where the adapter says, or the two do not fit.
    """
    named = read_adapter_config(directory).base
    if not (Path(named) / CONFIG_NAME).is_file():
        raise ValueError(
            f"{directory}: holds an adapter for {named or 'a model that it does not name'}, and no "
            "model directory is there; merge it with the model first: tools/merge_adapter.py "
            f"--model MODEL --adapter {directory} --to MERGED"
        )
    base = open_hf_model(Path(named), "keep")
    return MergedModel(base, PeftAdapter(directory, base.arch))


def open_hf_model(
    directory: Path, mask_token_init: str = "auto", block_size: int | None = None, seed: int = 0
) -> HfModel:
    """A Hugging Face directory as an untied SDAR model.

    Raises:
        ValueError: as `HfModel`; block_size contradicts config.json.
    """
    arch, notes = _complete(load_architecture(directory), directory, block_size)
    model = HfModel(directory, arch, mask_token_init, seed, keep_cached=False)
    model.notes += notes
    if model.assets.left_behind:
        names = ", ".join(model.assets.left_behind)
        model.notes.append(f"not part of the model, left behind: {names}")
    return model


def _check_block_size(arch: Architecture, path: Path, block_size: int | None) -> None:
    if block_size not in (None, arch.block_size):
        raise ValueError(
            f"block_size: {block_size} was asked for, {path} says {arch.block_size}; leave it out, "
            "or change config.json"
        )


def _complete(
    arch: Architecture, directory: Path, block_size: int | None
) -> tuple[Architecture, list[str]]:
    """Untie, and fill in what config.json lacks; also one note per assumption."""
    notes = []
    arch = replace(arch, tie_word_embeddings=False)
    path = directory / CONFIG_NAME
    if arch.block_size is None:
        notes.append(f"block_size: {block_size or RELEASED_BLOCK_SIZE}, config.json has none")
        arch = replace(arch, block_size=block_size or RELEASED_BLOCK_SIZE)
    _check_block_size(arch, path, block_size)
    if arch.mask_token_id is None:
        mask_id, origin = RELEASED_MASK_TOKEN_ID, "that of the released models"
        if (directory / "tokenizer.json").is_file():
            mask_id, origin = load_tokenizer(directory).mask_token_id, "from the tokenizer"
        if mask_id >= arch.vocab_size:
            raise ValueError(
                f"{path}: has no mask_token_id, and {mask_id} ({origin}) is outside the vocabulary "
                f"of {arch.vocab_size}; add mask_token_id there"
            )
        notes.append(f"mask_token_id: {mask_id}, {origin}; config.json has none")
        arch = replace(arch, mask_token_id=mask_id)
    return arch, notes
