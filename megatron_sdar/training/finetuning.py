"""From the finetuning keys to what is trained of a model, and saying how much that is."""

from __future__ import annotations

from megatron_sdar.architecture import Architecture
from megatron_sdar.checkpoint.safetensors_files import volume
from megatron_sdar.checkpoint.tensor_names import model_tensor_shapes
from megatron_sdar.config_sections.finetuning import LORA_TARGETS, FinetuningConfig
from megatron_sdar.model.finetuning import EVERYTHING, Finetuning
from megatron_sdar.parallel.lora import LoraOptions


def resolve_finetuning(config: FinetuningConfig, num_layers: int) -> Finetuning:
    """What a validated configuration trains of a model with `num_layers` decoder layers."""
    if config.finetuning_type == "full":
        return EVERYTHING
    if config.finetuning_type == "lora":
        chosen = LORA_TARGETS if "all" in config.lora_target else config.lora_target
        lora = LoraOptions(
            rank=config.lora_rank,
            alpha=config.lora_alpha or 2 * config.lora_rank,
            targets=tuple(name for name in LORA_TARGETS if name in chosen),
            dropout=config.lora_dropout,
            rslora=config.use_rslora,
        )
        return Finetuning(lora, extra=frozenset(config.additional_target))
    count = config.freeze_trainable_layers
    layers = range(max(0, num_layers - count), num_layers) if count > 0 else range(-count)
    modules = config.freeze_trainable_modules
    return Finetuning(
        layers=layers,
        parts=None if "all" in modules else frozenset(modules),
        extra=frozenset(config.freeze_extra_modules),
    )


def describe_finetuning(finetuning: Finetuning, arch: Architecture) -> str:
    """How many parameters of the whole model are trained, as PEFT says it."""
    shapes = finetuning.adapted(model_tensor_shapes(arch))
    everything = sum(volume(shape) for shape in shapes.values())
    trained = sum(volume(shape) for name, shape in shapes.items() if finetuning.trains(name))
    share = 100 * trained / everything
    return f"trainable params: {trained:,} || all params: {everything:,} || trainable%: {share:.4f}"
