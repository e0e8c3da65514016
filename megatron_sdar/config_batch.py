"""The batch of an optimizer step: what global_batch_size means on a number of processes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from megatron_sdar.config_fields import SdarConfig


def data_parallel_size(config: SdarConfig, world_size: int) -> int:
    """How many processes have rows of their own; 0 when the other sizes do not divide the world."""
    parallel = config.parallel
    group = parallel.tensor_model_parallel_size * parallel.pipeline_model_parallel_size
    return world_size // group if group >= 1 and world_size % group == 0 else 0


def batch_problems(config: SdarConfig, world_size: int) -> Iterator[str]:
    """What is wrong with global_batch_size on this many processes."""
    training, replicas = config.training, data_parallel_size(config, world_size)
    rows, at_once = training.global_batch_size, training.per_device_train_batch_size * replicas
    if rows is None or at_once < 1 or rows < 1:
        return  # not given, or said by another rule
    if rows % at_once:
        below = rows // at_once * at_once
        fits = f"{below} or {below + at_once}" if below else str(at_once)
        yield (
            f"global_batch_size={rows} is not a multiple of per_device_train_batch_size="
            f"{training.per_device_train_batch_size} x {replicas} data-parallel processes = "
            f"{at_once}; use {fits}, or another number of processes"
        )


def with_global_batch(config: SdarConfig, world_size: int) -> SdarConfig:
    """The configuration with the gradient_accumulation_steps that global_batch_size asks for.

    Args:
        config: validated for this world.

    Returns:
        the same one where global_batch_size is not given; a warning more where the file says
        another number.
    """
    training = config.training
    if training.global_batch_size is None:
        return config
    at_once = training.per_device_train_batch_size * data_parallel_size(config, world_size)
    steps, written = training.global_batch_size // at_once, training.gradient_accumulation_steps
    warnings = config.warnings
    if written not in (1, steps):
        warnings = (
            *warnings,
            f"gradient_accumulation_steps is {steps}, by global_batch_size="
            f"{training.global_batch_size} on {world_size} processes; {written} is ignored",
        )
    changed = replace(training, gradient_accumulation_steps=steps)
    return replace(config, training=changed, warnings=warnings)
