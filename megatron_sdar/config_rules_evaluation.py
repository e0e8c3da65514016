"""Rules of the evaluation keys, and what follows from them for the rest of the package."""

import re
from collections.abc import Iterator

from megatron_sdar.architecture import Architecture
from megatron_sdar.config_fields import SdarConfig

# Losses end so, for one noise level (eval_loss_t0.5) or block length (eval_loss_b8), too.
_LOSS = re.compile(r"_loss(_[tb][\d.]+)?$")


def evaluates(config: SdarConfig) -> bool:
    """Whether the run evaluates at all."""
    evaluation = config.evaluation
    return evaluation.do_eval or evaluation.eval_strategy != "no" or evaluation.eval_on_start


def greater_is_better(config: SdarConfig) -> bool:
    """Whether a greater value of metric_for_best_model is better."""
    said = config.evaluation.greater_is_better
    return _LOSS.search(best_metric(config)) is None if said is None else said


def best_metric(config: SdarConfig) -> str:
    """metric_for_best_model with the prefix that the metrics have."""
    name = config.evaluation.metric_for_best_model
    return name if name.startswith("eval_") else f"eval_{name}"


def evaluation_problems(config: SdarConfig, architecture: Architecture) -> Iterator[str]:
    """Every rule of the evaluation section that CONFIG violates, one line each."""
    evaluation, data = config.evaluation, config.data
    has_data = bool(evaluation.eval_dataset or evaluation.eval_data_path or data.val_size)
    if evaluates(config) and not has_data:
        yield (
            "there is nothing to evaluate on: give val_size, eval_dataset or eval_data_path, or "
            "remove do_eval, eval_strategy and eval_on_start"
        )
    if data.val_size and (evaluation.eval_dataset or evaluation.eval_data_path):
        yield (
            f"val_size={data.val_size:g} and eval_dataset or eval_data_path exclude each other, as "
            "in LLaMA-Factory; keep one of them"
        )
    steps = evaluation.eval_steps
    if steps is not None and steps > 1 and steps % 1:
        yield f"eval_steps={steps} must be a whole number of steps, or a fraction below 1"
    for length in evaluation.eval_block_lengths:
        if length >= 1 and data.cutoff_len % length:
            yield f"cutoff_len={data.cutoff_len} is not a multiple of {length} (eval_block_lengths)"
    if len(set(evaluation.eval_block_lengths)) < len(evaluation.eval_block_lengths):
        yield f"eval_block_lengths={list(evaluation.eval_block_lengths)} names a length twice"
    yield from _generation(config, architecture)
    yield from _best(config)


def _generation(config: SdarConfig, architecture: Architecture) -> Iterator[str]:
    evaluation = config.evaluation
    if not evaluation.eval_generate_samples:
        return
    if config.training.stage == "pt":
        yield "eval_generate_samples needs answers, stage: pt has none; set it to 0"
    block, steps = architecture.block_size, evaluation.eval_denoising_steps
    if block is not None and steps is not None and steps > block:
        yield f"eval_denoising_steps={steps} exceeds the block length {block}; use at most that"
    longest, room = evaluation.eval_generate_max_new_tokens, architecture.max_position_embeddings
    if longest >= room:
        yield (
            f"eval_generate_max_new_tokens={longest} leaves no room for a prompt in the model's "
            f"max_position_embeddings={room}; use less"
        )


def _best(config: SdarConfig) -> Iterator[str]:
    evaluation, training = config.evaluation, config.training
    wanting = [
        name
        for name, wanted in (
            ("load_best_model_at_end", evaluation.load_best_model_at_end),
            ("early_stopping_steps", evaluation.early_stopping_steps is not None),
            ("save_strategy: best", training.save_strategy == "best"),
        )
        if wanted
    ]
    if wanting and evaluation.eval_strategy == "no":
        yield f"{' and '.join(wanting)} needs evaluations; set eval_strategy: steps (or epoch)"
    metric = best_metric(config)
    if wanting and metric.endswith("exact_match") and not evaluation.eval_generate_samples:
        yield f"metric_for_best_model={metric} needs eval_generate_samples above 0"
    if not evaluation.load_best_model_at_end or evaluation.eval_strategy == "no":
        return
    if training.save_strategy == "no":
        yield (
            "load_best_model_at_end needs checkpoints where it evaluates; set save_strategy to "
            f"eval_strategy ({evaluation.eval_strategy}), or to best"
        )
    if training.save_strategy in ("no", "best"):
        return
    every = training.logging_steps if evaluation.eval_steps is None else evaluation.eval_steps
    ratio = training.save_steps / every
    if (training.save_steps < 1) != (every < 1) or abs(ratio - round(ratio)) > 1e-6 or ratio < 0.5:
        yield (
            f"load_best_model_at_end needs an evaluation at every checkpoint, but save_steps="
            f"{training.save_steps:g} is not a multiple of eval_steps={every:g}; make it one"
        )
