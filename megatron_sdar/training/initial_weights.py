"""What a run's weights are before its first step: read, drawn, or an adapter beside those read."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from megatron_sdar.architecture import Architecture, load_architecture
from megatron_sdar.checkpoint.hf_import import load_adapter, load_hf_weights
from megatron_sdar.config import SdarConfig
from megatron_sdar.model.sdar import SdarStage
from megatron_sdar.model.weights import initialize, initialize_factors

Say = Callable[[str], None]


def fill_weights(
    stages: Sequence[SdarStage],
    config: SdarConfig,
    arch: Architecture,
    resumes: bool,
    say: Say,
) -> None:
    """Fill the stages' parameters, so far as a checkpoint will not.

    Args:
        resumes: a checkpoint is loaded next. One of a LoRA run lacks the frozen weights.

    Raises:
        ValueError: on every rank, when model or adapter cannot be read or do not fit.

    Collectives: all_gather_object (world).
    """
    model, seed = config.model, config.training.seed
    uses_lora = config.finetuning.finetuning_type == "lora"
    if resumes and not uses_lora:
        return
    if model.train_from_scratch:
        initialize(stages, seed)
        say(f"weights: random (seed {seed})")
    else:
        init = _mask_token_init(config, say)
        say(load_hf_weights(stages, arch, model.model_name_or_path, init, seed).format())
    if not uses_lora or resumes:
        return
    if config.finetuning.adapter_name_or_path is None:
        initialize_factors(stages, seed)
    else:
        load_adapter(stages, arch, config.finetuning.adapter_name_or_path)
        say(f"adapter: that of {config.finetuning.adapter_name_or_path}")


def _mask_token_init(config: SdarConfig, say: Say) -> str:
    """How the <|MASK|> row starts: beside an adapter that does not hold it, as it is stored."""
    model, extra = config.model, set(config.finetuning.additional_target)
    uses_lora = config.finetuning.finetuning_type == "lora"
    if not uses_lora or model.mask_token_init != "auto" or {"embed_tokens", "lm_head"} <= extra:
        return model.mask_token_init
    if load_architecture(model.model_name_or_path).model_type.startswith("qwen3"):
        say(
            f"{model.model_name_or_path} never trained <|MASK|>, and an adapter does not hold it: "
            "better set additional_target: embed_tokens,lm_head, or make a model with its mean "
            "first (tools/convert_checkpoint.py --format hf)"
        )
    return "keep"
