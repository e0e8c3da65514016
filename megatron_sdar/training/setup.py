"""From configuration to the parts of a run: architecture, rows, model, optimizer.

Each function makes one part and can be called alone (tools and tests do). Order: architecture
before the process group (its errors need no collective), everything else after.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from sdar_kernels.attention import resolve_backend

from megatron_sdar.architecture import Architecture, load_architecture, padded_vocab_size
from megatron_sdar.config import DataConfig, SdarConfig
from megatron_sdar.data.builder import ensure_dataset
from megatron_sdar.data.loader import DocumentStore, RowLoader, RowOptions
from megatron_sdar.data.metadata import read_metadata
from megatron_sdar.data.packing import PackedIndex, pack_documents
from megatron_sdar.data.sources import resolve_datasets
from megatron_sdar.data.template import TemplateOptions
from megatron_sdar.data.tokenizer import load_tokenizer
from megatron_sdar.data.tokens import TokenizedDataset
from megatron_sdar.model.partition import build_stages
from megatron_sdar.model.sdar import ModelOptions, SdarStage
from megatron_sdar.model.weights import materialize
from megatron_sdar.optim.adamw import ShardedAdamW
from megatron_sdar.optim.schedules import lr_multiplier
from megatron_sdar.parallel.launch import run_on_main
from megatron_sdar.parallel.mesh import ParallelMesh
from megatron_sdar.training.step import TrainingStep, named_parameters


@dataclass(frozen=True)
class Precision:
    """dtypes of a run: stored parameters and optimizer, and what layers compute in."""

    params: torch.dtype
    compute: torch.dtype


def check_schedule(config: SdarConfig) -> None:
    """Refuse schedule arguments that the schedule would refuse at the first step (ValueError)."""
    optim = config.optim
    lr_multiplier(optim.lr_scheduler_type, 0, 2, 1, optim.lr_scheduler_kwargs, optim.learning_rate)


def precision(config: SdarConfig) -> Precision:
    """fp32 throughout, bf16 compute over fp32 parameters, or fp64 for verification."""
    if config.training.fp64:
        return Precision(torch.float64, torch.float64)
    return Precision(torch.float32, torch.bfloat16 if config.training.bf16 else torch.float32)


def tokenizer_path(config: SdarConfig) -> str:
    """Where the tokenizer lies."""
    return config.model.tokenizer_name_or_path or config.model.model_name_or_path


def resolve_architecture(config: SdarConfig) -> Architecture:
    """The architecture that will be trained.

    Fills in what released SDAR and Qwen3 configs lack: block size from block_length, mask
    token from the token files or the tokenizer. A tied source is trained untied, as SDAR is
    at every size.

    Raises:
        ValueError: unreadable or unsupported config.json or tokenizer; a mask token that
            differs between config.json and the data.
    """
    arch = load_architecture(config.model.model_name_or_path)
    arch = replace(arch, tie_word_embeddings=False)
    if arch.block_size is None:
        arch = replace(arch, block_size=config.data.block_length)
    if config.data.data_path:
        metadata = read_metadata(config.data.data_path[0])
        origin, mask_id = f"{config.data.data_path[0]}.json", metadata.mask_token_id
        vocab_size = metadata.vocab_size
    else:
        tokenizer = load_tokenizer(tokenizer_path(config))
        origin, mask_id = tokenizer_path(config), tokenizer.mask_token_id
        vocab_size = tokenizer.vocab_size
    if arch.mask_token_id is None:
        arch = replace(arch, mask_token_id=mask_id)
    where = f"{config.model.model_name_or_path}/config.json"
    if arch.mask_token_id != mask_id:
        raise ValueError(
            f"{where}: mask_token_id is {arch.mask_token_id}, but {origin} has <|MASK|> = "
            f"{mask_id}; use the tokenizer that belongs to the model"
        )
    if vocab_size > arch.vocab_size:
        raise ValueError(
            f"{where}: vocab_size is {arch.vocab_size}, but {origin} has {vocab_size} tokens; "
            "use the tokenizer that belongs to the model"
        )
    return arch


def prepare_data(
    config: SdarConfig, mesh: ParallelMesh, say: Callable[[str], None]
) -> DocumentStore:
    """Tokenise on rank 0 if asked by name, then open the token files on every rank.

    Args:
        say: called on rank 0 with lines for the user.

    Raises:
        ValueError: unreadable data; token files made with other options than the
            configuration asks for.

    Collective: broadcast_object_list (world).
    """
    data = config.data
    if data.data_path:
        prefixes = list(data.data_path)
        for prefix in prefixes:
            _check_recipe(prefix, data)
    else:
        prefixes = [data.tokenized_path or f"{config.training.output_dir}/tokenized/data"]
        run_on_main(lambda: _tokenise(config, prefixes[0], say), mesh)
    return DocumentStore([TokenizedDataset(prefix) for prefix in prefixes])


def _check_recipe(prefix: str, data: DataConfig) -> None:
    """Refuse options that the token files at `prefix` were not made with.

    Keys left at their default follow the files; a key that was set must agree with them.
    """
    recipe = read_metadata(prefix).recipe
    defaults = DataConfig()
    found = {**recipe.template, "max_samples": recipe.max_samples}
    problems = [
        f"{key} is {getattr(data, key)!r}, the files were made with {was!r}"
        for key, was in found.items()
        if getattr(data, key) not in (was, getattr(defaults, key))
    ]
    if problems:
        raise ValueError(
            f"data_path: {prefix} is tokenised already and these keys come too late: "
            f"{'; '.join(problems)}; remove them, or run tools/preprocess_data.py with them"
        )


def _tokenise(config: SdarConfig, prefix: str, say: Callable[[str], None]) -> None:
    data = config.data
    Path(prefix).parent.mkdir(parents=True, exist_ok=True)
    summary = ensure_dataset(
        resolve_datasets(data.dataset, data.dataset_dir),
        prefix,
        load_tokenizer(tokenizer_path(config)),
        template_options(data),
        num_workers=data.preprocessing_num_workers or 1,
        max_samples=data.max_samples,
        on_error=data.on_data_error,
        overwrite=data.overwrite_cache,
        # Without tokenized_path the files are this run's own, so they may follow its inputs.
        rebuild_stale=data.tokenized_path is None,
    )
    say(summary.format())


def template_options(data: DataConfig) -> TemplateOptions:
    """The template section of the data configuration."""
    return TemplateOptions(
        template=data.template,
        enable_thinking=data.enable_thinking,
        mask_history=data.mask_history,
        train_on_prompt=data.train_on_prompt,
        default_system=data.default_system,
    )


def pack(config: SdarConfig, arch: Architecture, store: DocumentStore) -> PackedIndex:
    """Assign documents to rows; the same on every rank."""
    assert arch.block_size is not None, "validated"
    return pack_documents(
        store.lengths,
        config.data.cutoff_len,
        arch.block_size,
        truncate_mode=config.data.truncate_mode,
        packing=config.data.neat_packing,
    )


def describe_pack(index: PackedIndex, config: SdarConfig) -> str:
    """One or two lines: rows, fill, and every document that was dropped or cut."""
    lines = [
        f"{index.doc_ids.size:,} documents in {len(index):,} rows of {config.data.cutoff_len} "
        f"tokens, fill {index.fill:.3f}"
    ]
    if index.num_dropped or index.num_cut:
        lines.append(
            f"longer than cutoff_len={config.data.cutoff_len}: {index.num_dropped} documents "
            f"dropped, {index.num_cut} cut, {index.num_lost_tokens:,} tokens lost "
            f"(truncate_mode: {config.data.truncate_mode})"
        )
    return "\n".join(lines)


def make_loader(
    config: SdarConfig,
    arch: Architecture,
    mesh: ParallelMesh,
    store: DocumentStore,
    index: PackedIndex,
) -> RowLoader:
    """The loader of this data-parallel rank; identical on its tp and pp peers."""
    assert arch.block_size is not None, "validated"
    assert arch.mask_token_id is not None, "validated"
    return RowLoader(
        store,
        index,
        RowOptions(
            cutoff_len=config.data.cutoff_len,
            block_length=arch.block_size,
            mask_token_id=arch.mask_token_id,
            pad_token_id=store.datasets[0].metadata.pad_token_id,
            noise_eps=config.diffusion.noise_eps,
            seed=config.training.seed,
            shuffle=not config.data.disable_shuffling,
        ),
        rows_per_micro_batch=config.training.per_device_train_batch_size,
        num_micro_batches=config.training.gradient_accumulation_steps,
        dp_rank=mesh.dp_rank,
        dp_size=mesh.dp_size,
        prefetch=config.data.dataloader_num_workers > 0,
    )


def make_stages(config: SdarConfig, arch: Architecture, mesh: ParallelMesh) -> list[SdarStage]:
    """This rank's stages with uninitialised storage on the device.

    Collective: creates FSDP's groups.
    """
    dtypes = precision(config)
    options = ModelOptions(
        padded_vocab_size=padded_vocab_size(
            arch.vocab_size, config.model.make_vocab_size_divisible_by
        ),
        dtype=dtypes.params,
        sequence_parallel=config.parallel.sequence_parallel,
        recompute=config.training.recompute_granularity != "none",
        attention_backend=resolve_backend(config.model.attention_backend, mesh.device),
    )
    stages = build_stages(
        arch,
        mesh,
        options,
        config.parallel.virtual_pipeline_model_parallel_size,
        config.parallel.num_layers_per_pipeline_stage,
        config.parallel.data_parallel_sharding_strategy,
        dtypes.compute,
    )
    materialize(stages, mesh.device)
    return [stage for stage in stages if isinstance(stage, SdarStage)]


def make_step(
    config: SdarConfig, arch: Architecture, mesh: ParallelMesh, stages: list[SdarStage]
) -> TrainingStep:
    """The optimizer and the step over materialised, filled stages."""
    return TrainingStep(
        arch,
        mesh,
        stages,
        ShardedAdamW(named_parameters(stages), config.optim),
        normalization=config.diffusion.loss_normalization,
        sharding_strategy=config.parallel.data_parallel_sharding_strategy,
        max_grad_norm=config.optim.max_grad_norm,
        activation_dtype=precision(config).compute,
    )
