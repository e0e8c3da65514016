"""A model on disk -> this rank's stages, ready to decode.

Takes a Hugging Face directory, a native checkpoint, a run's output_dir (its newest complete
checkpoint), or a PEFT adapter whose model lies where it says, on any layout: each rank reads its
own slices only.
"""

from __future__ import annotations

from pathlib import Path

import torch

from megatron_sdar.architecture import Architecture, padded_vocab_size
from megatron_sdar.checkpoint.adapters import is_adapter_directory
from megatron_sdar.checkpoint.hf_import import load_weights
from megatron_sdar.checkpoint.hf_source import HfModel
from megatron_sdar.checkpoint.merged_model import MergedModel
from megatron_sdar.checkpoint.model_source import ModelSource
from megatron_sdar.checkpoint.run_directory import latest_checkpoint
from megatron_sdar.checkpoint.source_detection import open_adapted_model, open_source
from megatron_sdar.data.tokenization.tokenizer import SdarTokenizer, load_tokenizer
from megatron_sdar.model.options import ModelOptions
from megatron_sdar.model.partition import build_stages
from megatron_sdar.model.sdar import SdarStage
from megatron_sdar.model.weights import materialize
from megatron_sdar.parallel.mesh import ParallelMesh

# Of what a conversion notes, what matters to someone who only decodes.
_TELLING = ("block_size", "mask_token_id", "skipped")


def open_model(directory: Path) -> ModelSource:
    """The dense model that `directory` is or holds; for an adapter, its model adapted.

    Raises:
        ValueError: there is none, it is incomplete or damaged, or it has experts.
    """
    if not directory.is_dir():
        raise ValueError(
            f"{directory}: no such directory; --model takes a Hugging Face model, a checkpoint-N, "
            "a run's output_dir or an adapter"
        )
    source = _open(directory)
    source.arch.require_dense(directory)
    if isinstance(source, MergedModel):
        source.notes = [note for note in source.notes if note.startswith(_TELLING)]
        source.notes.append(f"model: {source.directory} with the adapter {source.adapter}")
        return source
    if not isinstance(source, HfModel):
        if source.directory != directory:
            source.notes.append(f"model: {source.directory}")
        return source
    # As stored, and left in the file cache for the next start.
    model = HfModel(directory, source.arch, mask_token_init="keep")
    model.notes = [note for note in source.notes if note.startswith(_TELLING)]
    return model


def _open(directory: Path) -> ModelSource:
    # A run's output_dir stands for its checkpoints, though an adapter lies there too.
    is_run = latest_checkpoint(directory) is not None
    if is_adapter_directory(directory) and not is_run:
        return open_adapted_model(directory)
    return open_source(directory, None, None)


def model_tokenizer(source: ModelSource) -> SdarTokenizer:
    """The tokenizer that lies with the model (ValueError when there is none)."""
    return load_tokenizer(source.tokenizer_directory)


def check_layout(arch: Architecture, world_size: int, tp: int, pp: int) -> None:
    """Refuse a layout that does not fit the model or the number of processes (ValueError)."""
    if min(tp, pp) < 1 or world_size % (tp * pp):
        raise ValueError(
            f"{world_size} processes cannot be divided into groups of tensor {tp} x pipeline {pp}; "
            f"start a multiple of {max(1, tp) * max(1, pp)} with torchrun --nproc_per_node, or "
            "change --tensor-parallel-size and --pipeline-parallel-size"
        )
    heads, key_heads = arch.num_attention_heads, arch.num_key_value_heads
    if heads % tp or arch.intermediate_size % tp or (key_heads % tp and tp % key_heads):
        raise ValueError(
            f"--tensor-parallel-size {tp} does not divide the model's {heads} heads, {key_heads} "
            f"key heads and intermediate size of {arch.intermediate_size}"
        )
    if pp > arch.num_hidden_layers:
        raise ValueError(
            f"--pipeline-parallel-size {pp}: the model has only {arch.num_hidden_layers} layers"
        )


def load_stages(source: ModelSource, mesh: ParallelMesh, dtype: torch.dtype) -> list[SdarStage]:
    """This rank's stages, filled, in eval mode.

    Raises:
        ValueError: on every rank, when any cannot read what it needs.

    Collective: all_gather_object (world).
    """
    arch = source.arch
    vocab_size = padded_vocab_size(arch.vocab_size, mesh.tp_size)
    options = ModelOptions(vocab_size, dtype, False, "none", "tiled")
    stages = [stage for stage in build_stages(arch, mesh, options) if isinstance(stage, SdarStage)]
    materialize(stages, mesh.device)
    load_weights(stages, source)
    for stage in stages:
        stage.eval()
    return stages
