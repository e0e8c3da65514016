"""From configuration to the parts of a run: architecture, model, optimizer.

Each function makes one part and can be called alone (tools and tests do). Order: architecture
before the process group (its errors need no collective), everything else after.
"""

from __future__ import annotations

from dataclasses import replace

from megatron_sdar.architecture import Architecture, load_architecture, padded_vocab_size
from megatron_sdar.config import SdarConfig
from megatron_sdar.config_weights import parse_block_lengths
from megatron_sdar.data.storage.metadata import read_metadata
from megatron_sdar.data.tokenization.tokenizer import load_tokenizer
from megatron_sdar.model.options import ModelOptions
from megatron_sdar.model.partition import build_stages
from megatron_sdar.model.sdar import SdarStage
from megatron_sdar.model.weights import materialize
from megatron_sdar.optim.adamw import ShardedAdamW
from megatron_sdar.optim.schedules import lr_multiplier
from megatron_sdar.parallel.mesh import ParallelMesh
from megatron_sdar.training.finetuning import resolve_finetuning
from megatron_sdar.training.kernels import KernelChoice
from megatron_sdar.training.precision import precision
from megatron_sdar.training.step import TrainingStep, trained_parameters
from megatron_sdar.training.token_files import tokenizer_path


def check_schedule(config: SdarConfig) -> None:
    """Refuse schedule arguments that the schedule would refuse at the first step (ValueError)."""
    optim = config.optim
    lr_multiplier(optim.lr_scheduler_type, 0, 2, 1, optim.lr_scheduler_kwargs, optim.learning_rate)


def check_block_lengths(config: SdarConfig, total_steps: int) -> None:
    """Refuse a run that would end before its last block length begins (ValueError)."""
    if config.diffusion.block_length_schedule is None:
        return
    step, last = parse_block_lengths(config.diffusion.block_length_schedule)[-1]
    if step >= total_steps:
        raise ValueError(
            f"block_length_schedule: {last} would begin at step {step}, but num_train_epochs="
            f"{config.training.num_train_epochs:g} are {total_steps} steps; the model is exported "
            "with the last block length, so it must be trained with it"
        )


def resolve_architecture(config: SdarConfig) -> Architecture:
    """The architecture that will be trained.

    Fills in what released SDAR and Qwen3 configs lack: block size from block_length, mask
    token from the token files or the tokenizer. With a block_length_schedule the block size is
    its last, whatever the source's. A tied source is trained untied, as SDAR is at every size.

    Raises:
        ValueError: unreadable or unsupported config.json or tokenizer; a mask token that
            differs between config.json and the data.
    """
    arch = load_architecture(config.model.model_name_or_path)
    arch.require_dense(config.model.model_name_or_path)
    arch = replace(arch, tie_word_embeddings=False)
    if config.diffusion.block_length_schedule is not None:
        _, last = parse_block_lengths(config.diffusion.block_length_schedule)[-1]
        arch = replace(arch, block_size=last)
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


def make_stages(
    config: SdarConfig, arch: Architecture, mesh: ParallelMesh, kernels: KernelChoice
) -> list[SdarStage]:
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
        recompute=config.training.recompute_granularity or "full",
        attention_backend=kernels.attention,
        fused_kernels=kernels.fused_kernels,
        attention_config=kernels.attention_config,
        trim_last_layer=config.diffusion.semantics == "exact",
        finetuning=resolve_finetuning(config.finetuning, arch.num_hidden_layers),
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
        ShardedAdamW(trained_parameters(stages), config.optim),
        normalization=config.diffusion.loss_normalization,
        sharding_strategy=config.parallel.data_parallel_sharding_strategy,
        max_grad_norm=config.optim.max_grad_norm,
        activation_dtype=precision(config).compute,
        dropout_seed=config.training.seed if config.finetuning.lora_dropout > 0 else None,
    )
