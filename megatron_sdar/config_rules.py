"""Every rule that relates configuration values to each other, to the model and to the machine.

`validate` is the one place where a run is refused before it starts: it collects all violated
rules and raises once. Each line names the keys, their values and what would fit.
"""

from collections.abc import Iterator
from dataclasses import fields
from math import isfinite, lcm

from megatron_sdar.architecture import Architecture, padded_vocab_size
from megatron_sdar.config_batch import batch_problems
from megatron_sdar.config_fields import (
    SECTION_TYPES,
    DataConfig,
    ParallelConfig,
    SdarConfig,
)
from megatron_sdar.config_rules_diffusion import diffusion_problems
from megatron_sdar.config_rules_evaluation import evaluation_problems
from megatron_sdar.config_rules_finetuning import finetuning_problems
from megatron_sdar.config_sections.key import value_problem
from megatron_sdar.config_weights import parse_blend, parse_numbers


def validate(config: SdarConfig, architecture: Architecture, world_size: int) -> None:
    """Check `config` for training `architecture` on `world_size` processes.

    `architecture` is the model that will be trained: a block size or mask token that config.json
    lacks and the caller knows from elsewhere is already filled in. Raises one ValueError that
    lists every violated rule.
    """
    problems = [
        *_values(config),
        *_data(config, architecture),
        *_tensor_parallel(config, architecture),
        *_pipeline(config.parallel, architecture),
        *_world(config.parallel, world_size),
        *batch_problems(config, world_size),
        *_training(config),
        *evaluation_problems(config, architecture),
        *finetuning_problems(config, architecture),
    ]
    if problems:
        raise ValueError("\n".join(["the configuration does not fit:", *problems]))


def _values(config: SdarConfig) -> Iterator[str]:
    for name, section in SECTION_TYPES.items():
        for key in fields(section):
            problem = value_problem(key, getattr(getattr(config, name), key.name))
            if problem is not None:
                yield problem


def _data(config: SdarConfig, architecture: Architecture) -> Iterator[str]:
    data = config.data
    cached = data.tokenized_path is not None and not data.data_path
    if bool(data.dataset) == bool(data.data_path) and not cached:
        found = "both are" if data.dataset else "neither is"
        yield f"exactly one of dataset and data_path must be given, {found}"
    if data.mask_history and data.train_on_prompt:
        yield "mask_history and train_on_prompt exclude each other; keep one of them"

    yield from _mixture(config)

    if None not in (data.block_length, architecture.block_size) and (
        data.block_length != architecture.block_size
    ):
        yield (
            f"block_length={data.block_length} but config.json has "
            f"block_size={architecture.block_size}; make them equal"
        )
    block = data.block_length or architecture.block_size
    if block is None:
        yield (
            "block_length is not given and config.json has no block_size; set block_length "
            "(4 is what the released SDAR models were pretrained with)"
        )
    elif data.cutoff_len % block:
        below = data.cutoff_len // block * block
        fits = f"{below} or {below + block}" if below else str(block)
        yield (
            f"cutoff_len={data.cutoff_len} is not a multiple of block_length={block}; use {fits}"
        )

    yield from diffusion_problems(config)
    if data.cutoff_len > architecture.max_position_embeddings:
        yield (
            f"cutoff_len={data.cutoff_len} exceeds the model's max_position_embeddings="
            f"{architecture.max_position_embeddings}; use at most that"
        )
    mask, vocab = architecture.mask_token_id, architecture.vocab_size
    if mask is None:
        yield (
            "mask_token_id is unknown: config.json has none; add it there (151669 for the Qwen3 "
            "vocabulary) or give a tokenizer that has <|MASK|>"
        )
    elif not 0 <= mask < vocab:
        yield (
            f"mask_token_id={mask} is outside the vocabulary of {vocab}; "
            f"raise vocab_size in config.json to at least {mask + 1}"
        )


def _mixture(config: SdarConfig) -> Iterator[str]:
    data = config.data
    number = len(data.dataset or data.data_path)
    if data.mix_strategy != "concat" and number < 2:
        yield f"mix_strategy={data.mix_strategy} needs several datasets, {number} is given"
    if data.interleave_probs is not None and not data.mix_strategy.startswith("interleave"):
        yield (
            f"interleave_probs is given with mix_strategy={data.mix_strategy}; set mix_strategy "
            "to interleave_under or interleave_over"
        )
    if (data.blend_weights is None) == (data.mix_strategy == "blend"):
        yield (
            "mix_strategy: blend and blend_weights go together, "
            f"found mix_strategy={data.mix_strategy} and blend_weights={data.blend_weights}"
        )
    yield from _weights(data, number)
    if data.mix_strategy == "blend" and config.training.max_steps <= 0:
        yield "mix_strategy=blend repeats each dataset as often as needed; set max_steps"
    if data.val_size > 1 and data.val_size % 1:
        yield f"val_size={data.val_size} must be a whole number of documents, or a fraction below 1"
    if data.packing_algorithm == "llamafactory" and data.truncate_mode == "split":
        yield "packing_algorithm=llamafactory knows truncate_mode cut and drop only, not split"
    if data.packing_algorithm == "llamafactory" and config.training.stage == "pt":
        yield "packing_algorithm=llamafactory is for stage sft; the published pt stage cannot run"


def _weights(data: DataConfig, number: int) -> Iterator[str]:
    try:
        given = {
            "interleave_probs": [parse_numbers("interleave_probs", data.interleave_probs)]
            if data.interleave_probs is not None
            else [],
            "blend_weights": [weights for _, weights in parse_blend(data.blend_weights)]
            if data.blend_weights is not None
            else [],
        }
    except ValueError as error:
        yield str(error)
        return
    for key, lists in given.items():
        for weights in lists:
            if len(weights) != number:
                yield f"{key}: {weights} are {len(weights)} weights for {number} datasets"
            elif not all(isfinite(weight) and weight >= 0 for weight in weights):
                yield f"{key}: {weights} must be finite numbers that are not negative"
            elif key == "interleave_probs" and (min(weights) == 0 or abs(sum(weights) - 1) > 1e-6):
                yield f"{key}: {weights} must be greater than 0 and sum to 1, found {sum(weights)}"
            elif not any(weights):
                yield f"{key}: {weights} take rows from no dataset; make one greater than 0"


def _tensor_parallel(config: SdarConfig, architecture: Architecture) -> Iterator[str]:
    parallel, tp = config.parallel, config.parallel.tensor_model_parallel_size
    if tp < 1:
        return  # said by _values, and nothing can be divided by it
    counts = {
        "num_attention_heads": architecture.num_attention_heads,
        "intermediate_size": architecture.intermediate_size,
    }
    key_value_heads = architecture.num_key_value_heads

    def divides(size: int) -> bool:
        return not any(count % size for count in counts.values()) and _shares(key_value_heads, size)

    sizes = [str(s) for s in range(1, architecture.num_attention_heads + 1) if divides(s)]
    fits = f"sizes that fit this model: {', '.join(sizes)}"
    for name, count in counts.items():
        if count % tp:
            yield f"tensor_model_parallel_size={tp} does not divide {name}={count}; {fits}"
    if not _shares(key_value_heads, tp):
        yield (
            f"tensor_model_parallel_size={tp} neither divides num_key_value_heads="
            f"{key_value_heads} nor is a multiple of it; {fits}"
        )
    divisor = config.model.make_vocab_size_divisible_by
    if divisor >= 1:
        padded = padded_vocab_size(architecture.vocab_size, divisor)
        if padded % tp:
            yield (
                f"the padded vocabulary of {padded} is not a multiple of "
                f"tensor_model_parallel_size={tp}; "
                f"set make_vocab_size_divisible_by: {lcm(divisor, tp)}"
            )
    rows, length = config.training.per_device_train_batch_size, config.row_length
    if parallel.sequence_parallel and (length * rows) % tp:
        yield (
            f"with sequence_parallel a row's {length} positions x per_device_train_batch_size = "
            f"{length * rows} positions must divide by tensor_model_parallel_size={tp}; "
            f"make cutoff_len a multiple of {tp} or set sequence_parallel: false"
        )


def _shares(key_value_heads: int, tp: int) -> bool:
    """Whether tp ranks split the key/value heads evenly or replicate each the same times."""
    return key_value_heads % tp == 0 or tp % key_value_heads == 0


def _pipeline(parallel: ParallelConfig, architecture: Architecture) -> Iterator[str]:
    pp = parallel.pipeline_model_parallel_size
    vpp = parallel.virtual_pipeline_model_parallel_size
    layers, chunks = architecture.num_hidden_layers, pp * vpp
    if vpp > 1 and pp == 1:
        yield (
            f"virtual_pipeline_model_parallel_size={vpp} needs pipeline_model_parallel_size > 1; "
            "set it to 1 or raise the latter"
        )
    if layers < chunks:
        yield (
            f"pipeline_model_parallel_size={pp} x virtual_pipeline_model_parallel_size={vpp} = "
            f"{chunks} chunks need as many layers, the model has {layers}; "
            f"use at most {layers} chunks"
        )
    split = parallel.num_layers_per_pipeline_stage
    if split is None:
        return
    if len(split) != chunks or sum(split) != layers:
        yield (
            f"num_layers_per_pipeline_stage={list(split)} must have {chunks} entries "
            f"(stages x chunks) that sum to {layers} layers; "
            f"it has {len(split)} that sum to {sum(split)}"
        )


def _world(parallel: ParallelConfig, world_size: int) -> Iterator[str]:
    tp, pp = parallel.tensor_model_parallel_size, parallel.pipeline_model_parallel_size
    cp = parallel.context_parallel_size
    group = tp * pp * cp
    if min(tp, pp, cp) >= 1 and (world_size < 1 or world_size % group):
        below = world_size // group * group
        fits = f"{below} or {below + group}" if below >= group else str(group)
        yield (
            f"{world_size} processes cannot be divided into groups of tensor {tp} x pipeline {pp} "
            f"x context {cp} = {group}; launch {fits} (any multiple of {group}) or change the sizes"
        )


def _training(config: SdarConfig) -> Iterator[str]:
    training = config.training
    if training.bf16 and training.fp64:
        yield "bf16 and fp64 exclude each other; keep one of them"
    if training.max_steps == 0:
        yield "max_steps=0 would train nothing; use a positive number, or -1 for num_train_epochs"
    for name, value in (
        ("logging_steps", training.logging_steps),
        ("save_steps", training.save_steps),
    ):
        if value > 1 and value != int(value):
            yield f"{name}={value} must be a whole number of steps, or a fraction below 1"
