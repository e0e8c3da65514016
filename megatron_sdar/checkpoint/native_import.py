"""From a Hugging Face model directory to a native checkpoint, block by block in one process.

The result is a checkpoint of step 0 without moments, which every layout loads. What only a
trained SDAR model's config.json states is completed here: block size, mask token, padding.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch

from megatron_sdar.architecture import Architecture, load_architecture, padded_vocab_size
from megatron_sdar.checkpoint.destination import new_directory
from megatron_sdar.checkpoint.hf_assets import (
    CONFIG_NAME,
    collect_assets,
    config_json,
    copy_assets,
    write_json,
)
from megatron_sdar.checkpoint.hf_source import HfModel, ImportReport
from megatron_sdar.checkpoint.progress import byte_progress
from megatron_sdar.checkpoint.run_directory import HF_DIR, MODEL_DIR, STATE_NAME, commit
from megatron_sdar.checkpoint.safetensors_files import (
    SafetensorsWriter,
    TensorInfo,
    row_blocks,
)
from megatron_sdar.checkpoint.shards import shard_metadata, shard_name, write_index
from megatron_sdar.checkpoint.tensor_names import EMBEDDING, model_tensor_shapes
from megatron_sdar.data.tokenization.tokenizer import load_tokenizer

RELEASED_BLOCK_SIZE, RELEASED_MASK_TOKEN_ID = 4, 151669


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
    """Write the directory's model as a native checkpoint, untied.

    Args:
        dtype: of the written tensors; None keeps the stored ones.
        mask_token_init, seed: see `hf_source.HfModel`.
        block_size: for a config.json without one; None assumes the released models' 4.
        make_vocab_size_divisible_by: as in the configuration that will load it.

    Raises:
        ValueError: as `HfModel`; block_size contradicts config.json; the destination is not
            empty or cannot be written.
    """
    source_dir, target = Path(model_dir), Path(destination)
    arch, notes = _complete(load_architecture(source_dir), source_dir, block_size)
    source = HfModel(source_dir, arch, mask_token_init, seed)
    assets = collect_assets([source_dir])
    rows = padded_vocab_size(arch.vocab_size, make_vocab_size_divisible_by)
    shapes = model_tensor_shapes(arch, rows)
    infos = {n: TensorInfo(s, dtype or source.tensors[n].dtype) for n, s in shapes.items()}
    metadata = shard_metadata({name: [0] * len(shape) for name, shape in shapes.items()}, shapes)
    total = sum(info.num_bytes for info in infos.values())
    with new_directory(source_dir, target, overwrite) as temporary:
        for folder in (MODEL_DIR, HF_DIR):
            (temporary / folder).mkdir()
        path = temporary / MODEL_DIR / shard_name(0)
        with (
            byte_progress("import", total, progress) as advance,
            SafetensorsWriter(path, infos, metadata) as writer,
        ):
            for name, info in infos.items():
                for ranges in row_blocks(info):
                    advance(writer.write(name, source.read(name, ranges, info.dtype)))
        write_index(temporary / MODEL_DIR)
        write_json(temporary / STATE_NAME, {"step": 0})
        copy_assets(assets, temporary / HF_DIR)
        config = config_json(arch, assets, infos[EMBEDDING].dtype)
        write_json(temporary / HF_DIR / CONFIG_NAME, config)
        commit(
            temporary,
            step=0,
            sequence=0,
            has_optimizer=False,
            tied=False,
            layout={"tp": 1, "pp": 1, "dp": 1},
        )
    if rows > arch.vocab_size:
        notes.append(f"vocabulary: {arch.vocab_size} rows padded to {rows}")
    if assets.left_behind:
        notes.append(f"not part of the model, left behind: {', '.join(assets.left_behind)}")
    report = source.report()
    return replace(report, notes=(*report.notes, *notes))


def _complete(
    arch: Architecture, source_dir: Path, block_size: int | None
) -> tuple[Architecture, list[str]]:
    """Untie, and fill in what config.json lacks; also one note per assumption."""
    notes = []
    arch = replace(arch, tie_word_embeddings=False)
    path = source_dir / CONFIG_NAME
    if arch.block_size is None:
        notes.append(f"block_size: {block_size or RELEASED_BLOCK_SIZE}, config.json has none")
        arch = replace(arch, block_size=block_size or RELEASED_BLOCK_SIZE)
    elif block_size not in (None, arch.block_size):
        raise ValueError(
            f"block_size: {block_size} was asked for, {path} says {arch.block_size}; leave it out, "
            "or change config.json"
        )
    if arch.mask_token_id is None:
        mask_id, origin = RELEASED_MASK_TOKEN_ID, "that of the released models"
        if (source_dir / "tokenizer.json").is_file():
            mask_id, origin = load_tokenizer(source_dir).mask_token_id, "from the tokenizer"
        if mask_id >= arch.vocab_size:
            raise ValueError(
                f"{path}: has no mask_token_id, and {mask_id} ({origin}) is outside the vocabulary "
                f"of {arch.vocab_size}; add mask_token_id there"
            )
        notes.append(f"mask_token_id: {mask_id}, {origin}; config.json has none")
        arch = replace(arch, mask_token_id=mask_id)
    return arch, notes
