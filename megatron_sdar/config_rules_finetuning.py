"""Rules about which weights are trained, for each finetuning_type.

Keys of another finetuning_type than the one given are no error, as in LLaMA-Factory (compat says
so when the file is read).
"""

from collections.abc import Iterator

from megatron_sdar.architecture import Architecture
from megatron_sdar.config_fields import SdarConfig
from megatron_sdar.config_sections.finetuning import FinetuningConfig


def finetuning_problems(config: SdarConfig, architecture: Architecture) -> Iterator[str]:
    """One line for every rule that the finetuning section breaks."""
    finetuning = config.finetuning
    if finetuning.finetuning_type == "lora":
        yield from _lora(config)
    if finetuning.finetuning_type == "freeze":
        yield from _freeze(finetuning, architecture)


def _lora(config: SdarConfig) -> Iterator[str]:
    finetuning, model = config.finetuning, config.model
    if not finetuning.lora_target:
        yield "lora_target is empty; use all, or names such as q_proj,v_proj"
    if "all" in finetuning.lora_target and len(finetuning.lora_target) > 1:
        yield f"lora_target: all with {list(finetuning.lora_target)} beside it; keep one of them"
    if model.train_from_scratch:
        yield (
            "finetuning_type: lora trains beside the weights of model_name_or_path, which "
            "train_from_scratch leaves out; remove one of them"
        )
    saves_mask = {"embed_tokens", "lm_head"} <= set(finetuning.additional_target)
    if model.mask_token_init in ("mean", "mean_noise") and not saves_mask:
        yield (
            f"mask_token_init: {model.mask_token_init} changes embeddings that the adapter would "
            "not hold; set additional_target: embed_tokens,lm_head, or make a model of the changed "
            "ones first (tools/convert_checkpoint.py --format hf --mask-token-init)"
        )


def _freeze(finetuning: FinetuningConfig, architecture: Architecture) -> Iterator[str]:
    modules, layers = finetuning.freeze_trainable_modules, architecture.num_hidden_layers
    if not modules:
        yield "freeze_trainable_modules is empty; use all, or names such as self_attn,mlp"
    if "all" in modules and len(modules) > 1:
        yield f"freeze_trainable_modules: all with {list(modules)} beside it; keep one of them"
    if abs(finetuning.freeze_trainable_layers) > layers:
        yield (
            f"freeze_trainable_layers={finetuning.freeze_trainable_layers} but the model has "
            f"{layers} layers; use -{layers} to {layers}"
        )
    if finetuning.freeze_trainable_layers == 0 and not finetuning.freeze_extra_modules:
        yield (
            "freeze_trainable_layers=0 and no freeze_extra_modules would train nothing; set one "
            "of them"
        )
