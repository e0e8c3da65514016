"""LLaMA-Factory keys that are not keys of this trainer, and keys that say one thing twice.

A foreign key is ignored with a warning (it cannot change the result), passes in silence (its
value asks for what happens anyway) or is refused with what to use instead. Second names are
folded into the first, so everything past loading reads one key: neat_packing,
recompute_granularity, data_parallel_sharding_strategy.
"""

import json
import re
from collections.abc import Mapping
from fnmatch import fnmatchcase
from pathlib import Path

IGNORED: Mapping[str, str] = {
    "freeze_vision_tower": "SDAR is text only, it has no vision tower",
    "freeze_multi_modal_projector": "SDAR is text only, it has no projector",
    "freeze_language_model": "it has no effect on text SDAR in LLaMA-Factory either",
    "include_effective_tokens_per_second": "throughput is measured without being asked",
    "include_num_input_tokens_seen": "tokens are counted without being asked",
    "preprocessing_batch_size": "documents are tokenised as a stream, packed over the whole set",
    "data_shared_file_system": "each node checks the tokenised data it sees",
    "dataloader_pin_memory": "the loader decides, results do not depend on it",
    "use_fast_tokenizer": "the tokenizers library is always used",
    "use_reentrant_gc": "recomputation is never reentrant",
    "cache_dir": "nothing is downloaded",
    "media_dir": "SDAR is text only",
    "run_name": "no experiment tracker is used",
    "logging_dir": "metrics are written under output_dir",
    "per_device_eval_batch_size": "there is no evaluation during training yet",
}

_NO_ADAPTERS = "every weight is trained, remove it and set finetuning_type: full"
_NO_EVALUATION = "there is no evaluation during training yet, remove it"

# Key or pattern -> (values that ask for nothing, besides null and false; what to do instead).
REFUSED: Mapping[str, tuple[tuple[object, ...], str]] = {
    "lora_*": ((), _NO_ADAPTERS),
    "adapter_*": ((), _NO_ADAPTERS),
    "additional_target": ((), _NO_ADAPTERS),
    "freeze_trainable_*": ((), _NO_ADAPTERS),
    "quantization_*": ((), "weights are not quantised, remove it and set bf16: true"),
    "use_galore": ((), "AdamW is the optimizer; data_parallel_sharding_strategy saves its memory"),
    "galore_*": ((), "AdamW is the optimizer, remove it"),
    "use_apollo": ((), "AdamW is the optimizer; data_parallel_sharding_strategy saves its memory"),
    "use_badam": ((), "AdamW is the optimizer; data_parallel_sharding_strategy saves its memory"),
    "use_muon": ((), "AdamW is the optimizer, remove it"),
    "use_adam_mini": ((), "AdamW is the optimizer, remove it"),
    "use_unsloth*": ((), "this trainer has its own kernels, see attention_backend"),
    "enable_liger_kernel": ((), "this trainer has its own kernels, remove it"),
    "flash_attn": (("auto",), "attention_backend chooses the kernel"),
    "optim": (("adamw_torch", "adamw_torch_fused"), "AdamW is the optimizer, remove it"),
    "streaming": ((), "tools/preprocess_data.py reads any size; give its prefix as data_path"),
    "buffer_size": ((), "the order is a shuffle of the whole set, remove it"),
    "fp16": ((), "use bf16: true"),
    "pure_bf16": ((), "use bf16: true, which keeps float32 weights for the optimizer"),
    "fsdp*": ((), "use data_parallel_sharding_strategy"),
    "use_distributed_optimizer": (
        (True,),
        "use data_parallel_sharding_strategy: no_shard | optim_grads | optim_grads_params",
    ),
    "predict_with_generate": ((), "use tools/generate.py"),
    "do_predict": ((), "use tools/generate.py"),
    "do_eval": ((), _NO_EVALUATION),
    "eval_dataset": ((), _NO_EVALUATION),
    "eval_strategy": (("no",), _NO_EVALUATION),
    "eval_steps": ((), _NO_EVALUATION),
    "load_best_model_at_end": ((), _NO_EVALUATION),
    "data_seed": ((), "seed sets the order too, use seed"),
    "neftune_noise_alpha": ((0,), "embedding noise is not available, remove it"),
    "label_smoothing_factor": ((0,), "label smoothing is not available, remove it"),
    "torch_compile": ((), "it is not available, remove it"),
    "resize_vocab": ((), "the vocabulary is the model's, padded by make_vocab_size_divisible_by"),
    "pref_*": ((), "only stage sft and pt are available, remove it"),
    "dpo_*": ((), "only stage sft and pt are available, remove it"),
    "kto_*": ((), "only stage sft and pt are available, remove it"),
    "ppo_*": ((), "only stage sft and pt are available, remove it"),
    "reward_model*": ((), "only stage sft and pt are available, remove it"),
    "ref_model*": ((), "only stage sft and pt are available, remove it"),
}

_ZERO_STRATEGIES = {
    0: "no_shard",
    1: "optim_grads",
    2: "optim_grads",
    3: "optim_grads_params",
}


def judge_foreign_key(key: str, value: object) -> tuple[str | None, str | None] | None:
    """Return (warning, problem) for a LLaMA-Factory key, or None if the key is unknown to us."""
    if key in IGNORED:
        return f"{key} is ignored: {IGNORED[key]}", None
    for pattern, (neutral, advice) in REFUSED.items():
        if fnmatchcase(key, pattern):
            asks_nothing = value is None or value is False or value in neutral
            return None, None if asks_nothing else f"{key}: {value} is not supported; {advice}"
    return None


def normalise_report_to(value: object) -> object:
    """LLaMA-Factory writes none as null, as text or as a list; a single name leaves its list."""
    if value is None or value == []:
        return "none"
    return value[0] if isinstance(value, list) and len(value) == 1 else value


def fold_second_names(values: dict[str, object]) -> list[str]:
    """Fold second names into the first, in place; `values` holds only keys that were given.

    Returns warnings. Raises ValueError where two names contradict each other or a deepspeed
    file does not tell its ZeRO stage.
    """
    _fold_packing(values)
    _fold_recompute(values)
    warnings = _fold_deepspeed(values)
    if values.get("trust_remote_code"):
        warnings.append("trust_remote_code is accepted and unused: no model code is executed")
    warms_up = values.get("warmup_steps") or values.get("warmup_ratio")
    if values.get("lr_scheduler_type") == "constant" and warms_up:
        warnings.append(
            "lr_scheduler_type: constant has no warm-up (as in transformers), so warmup_steps and "
            "warmup_ratio do nothing; constant_with_warmup uses them"
        )
    return warnings


def _fold_packing(values: dict[str, object]) -> None:
    packing = values.pop("packing", None)
    if packing is None:
        return
    if values.setdefault("neat_packing", packing) != packing:
        raise ValueError(
            "packing and neat_packing are two names of one switch and contradict each other; "
            "keep neat_packing"
        )


def _fold_recompute(values: dict[str, object]) -> None:
    said = {}
    if values.get("recompute_granularity") is not None:
        said["recompute_granularity"] = values["recompute_granularity"]
    if values.pop("disable_gradient_checkpointing", False):
        said["disable_gradient_checkpointing"] = "none"
    checkpointing = values.pop("gradient_checkpointing", None)
    if checkpointing is not None:
        said["gradient_checkpointing"] = "full" if checkpointing else "none"
    if len(set(said.values())) > 1:
        raise ValueError(
            f"{' and '.join(said)} contradict each other; "
            "keep recompute_granularity: full | selective | none"
        )
    values["recompute_granularity"] = next(iter(said.values()), "full")


def _fold_deepspeed(values: dict[str, object]) -> list[str]:
    source = values.pop("deepspeed", None)
    if source is None:
        return []
    stage, offload, origin = _read_zero_stage(str(source))
    strategy = _ZERO_STRATEGIES[stage]
    given = values.setdefault("data_parallel_sharding_strategy", strategy)
    if given != strategy:
        raise ValueError(
            f"deepspeed: {source} asks for ZeRO {stage} ({strategy}) and contradicts "
            f"data_parallel_sharding_strategy: {given}; keep one of them"
        )
    warnings = [f"deepspeed: only the ZeRO stage of {origin} is used -> {strategy}"]
    if offload:
        warnings.append(f"deepspeed: the offloading that {source} asks for is not available")
    return warnings


def _read_zero_stage(source: str) -> tuple[int, bool, str]:
    """Return (stage, asks for offloading, what told so)."""
    path = Path(source)
    if not path.is_file():
        named = re.search(r"ds_z([0-3])(?!\d)", path.name)
        if named is None:
            raise ValueError(
                f"deepspeed: {source} does not exist and its name is not of the form "
                "ds_z{0,2,3}_config.json; set data_parallel_sharding_strategy instead"
            )
        return int(named[1]), "offload" in path.name, f"the name {path.name} (no such file)"
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"deepspeed: {source} is not valid JSON: {error}") from error
    zero = content.get("zero_optimization", {}) if isinstance(content, dict) else None
    stage = zero.get("stage", 0) if isinstance(zero, dict) else None
    if not isinstance(zero, dict) or type(stage) is not int or stage not in _ZERO_STRATEGIES:
        raise ValueError(
            f"deepspeed: {source}: zero_optimization.stage must be 0, 1, 2 or 3, found {stage!r}"
        )
    offload = any(zero.get(key) for key in ("offload_optimizer", "offload_param"))
    return stage, offload, source
