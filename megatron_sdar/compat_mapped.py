"""LLaMA-Factory and transformers keys that say something this trainer has another key for.

`map_key` turns one foreign key and its value into ours. `normalise_value` brings the spellings of
one value (JSON text, a mapping in place of a file) into the form that the key's type has. Second
names that need other keys to be understood are folded later, in compat.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass

# Other names of our keys, with values that mean the same.
RENAMED: Mapping[str, str] = {
    "activation_checkpointing": "gradient_checkpointing",
    "evaluation_strategy": "eval_strategy",
    "per_gpu_train_batch_size": "per_device_train_batch_size",
    "per_gpu_eval_batch_size": "per_device_eval_batch_size",
}
# Switches: what they set when true, and what is worth saying about it. False asks for nothing.
_SWITCHES: Mapping[str, tuple[str, object, str]] = {
    "use_cpu": ("device", "cpu", ""),
    "no_cuda": ("device", "cpu", ""),
    "pure_bf16": (
        "bf16",
        True,
        "the optimizer keeps float32 weights, which is more exact and takes more memory",
    ),
}
_FSDP_STRATEGIES: Mapping[str, str] = {
    "full_shard": "optim_grads_params",
    "hybrid_shard": "optim_grads_params",
    "shard_grad_op": "optim_grads",
    "hybrid_shard_zero2": "optim_grads",
    "no_shard": "no_shard",
}
_FSDP_OPTIONS = ("auto_wrap", "offload")
MAPPED = (*_SWITCHES, "fsdp")


@dataclass(frozen=True)
class MappedKey:
    """What a foreign key becomes: our key and value, and a remark ("" for none)."""

    key: str
    value: object
    note: str = ""


def map_key(key: str, value: object) -> MappedKey | None:
    """What a key of MAPPED becomes; None when its value asks for nothing.

    Raises ValueError when the value is none that the key has.
    """
    if value is None or value is False or value in ("", []):
        return None
    if key == "fsdp":
        return _map_fsdp(value)
    target, wanted, note = _SWITCHES[key]
    if value is not True:
        raise ValueError(f"{key}: {value!r} is not true or false")
    return MappedKey(target, wanted, note)


def _map_fsdp(value: object) -> MappedKey:
    words = [str(word) for word in value] if isinstance(value, list) else str(value).split()
    strategies = {_FSDP_STRATEGIES[word] for word in words if word in _FSDP_STRATEGIES}
    unknown = [word for word in words if word not in (*_FSDP_STRATEGIES, *_FSDP_OPTIONS)]
    if value is True:
        strategies, unknown = {"optim_grads_params"}, []
    if unknown or len(strategies) != 1:
        raise ValueError(
            f"fsdp: {value!r} is not one of {', '.join(_FSDP_STRATEGIES)} with "
            f"{' or '.join(_FSDP_OPTIONS)}; use data_parallel_sharding_strategy"
        )
    note = "offloading is not available" if "offload" in words else ""
    return MappedKey("data_parallel_sharding_strategy", strategies.pop(), note)


def normalise_value(key: str, value: object) -> object:
    """VALUE in the form that the type of our key has; what needs no change comes back as it is.

    deepspeed: a mapping (written into the YAML) becomes its JSON text. lr_scheduler_kwargs: JSON
    text becomes a mapping. Raises ValueError for text in braces that is not JSON.
    """
    if key == "deepspeed" and isinstance(value, dict):
        return json.dumps(value)
    if key == "lr_scheduler_kwargs" and isinstance(value, str) and value.startswith("{"):
        try:
            return json.loads(value)
        except ValueError as error:
            raise ValueError(f"{key}: {value!r} is not valid JSON: {error}") from error
    return value
