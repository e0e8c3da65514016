"""Keys of the optimizer and its learning rates."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from megatron_sdar.config_sections.key import key

LR_SCHEDULER_TYPES = (
    "constant",
    "constant_with_warmup",
    "linear",
    "cosine",
    "cosine_with_restarts",
    "polynomial",
    "inverse_sqrt",
    "cosine_with_min_lr",
    "cosine_warmup_with_min_lr",
    "warmup_stable_decay",
)


@dataclass(frozen=True)
class OptimConfig:
    """AdamW and its learning-rate schedule."""

    learning_rate: float = key("peak learning rate", 5e-5, above=0)
    lr_scheduler_type: str = key(
        "schedule",
        "linear",
        choices=LR_SCHEDULER_TYPES,
        advice="those that follow a metric (reduce_lr_on_plateau, greedy) are not available",
    )
    lr_scheduler_kwargs: Mapping[str, Any] = key("schedule arguments", factory=dict)
    warmup_ratio: float = key("warm-up as a fraction of all steps", 0.0, minimum=0, maximum=1)
    warmup_steps: int = key("warm-up steps; above 0 it replaces warmup_ratio", 0, minimum=0)
    weight_decay: float = key("AdamW weight decay", 0.0, minimum=0)
    adam_beta1: float = key("AdamW beta1", 0.9, minimum=0, below=1)
    adam_beta2: float = key("AdamW beta2", 0.999, minimum=0, below=1)
    adam_epsilon: float = key("AdamW epsilon", 1e-8, above=0)
    max_grad_norm: float = key("clip the global gradient norm; 0 turns it off", 1.0, minimum=0)
