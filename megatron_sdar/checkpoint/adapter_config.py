"""adapter_config.json: what PEFT is told of an adapter, and reading what it or we wrote.

Only plain LoRA on the linear layers of SDAR and Qwen3 is read. Whatever else PEFT can do, or will
one day, is refused by name, since a key that is overlooked would change the numbers.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_sdar.checkpoint.hf_assets import ADAPTER_CONFIG_NAME, read_json_object
from megatron_sdar.config_sections.finetuning import EXTRA_MODULES, LORA_TARGETS
from megatron_sdar.model.finetuning import Finetuning
from megatron_sdar.parallel.lora import LoraOptions
from megatron_sdar.regular_files import shown

_READ = frozenset({
    "peft_type", "base_model_name_or_path", "r", "lora_alpha", "lora_dropout", "use_rslora",
    "target_modules", "modules_to_save", "init_lora_weights", "bias",
})  # fmt: skip
# Keys that have no part in what a trained adapter computes.
_IDLE = frozenset({
    "auto_mapping", "inference_mode", "layers_pattern", "loftq_config", "eva_config",
    "megatron_config", "megatron_core", "peft_version", "qalora_group_size", "revision",
    "runtime_config", "task_type",
})  # fmt: skip
# Others (pissa, olora, corda, loftq) change the model's own weights, too.
_INITS = (None, True, False, "gaussian", "eva", "orthogonal")


@dataclass(frozen=True)
class AdapterConfig:
    """What an adapter is.

    Attributes:
        finetuning: its low-rank updates and the modules it holds whole.
        base: the model it belongs to, as whoever trained it named it.
    """

    finetuning: Finetuning
    base: str

    @property
    def lora(self) -> LoraOptions:
        assert self.finetuning.lora is not None, "an adapter has updates"
        return self.finetuning.lora


def adapter_config_json(config: AdapterConfig) -> dict[str, Any]:
    """The content that PEFT reads, with the keys every version of it knows."""
    lora, alpha = config.lora, config.lora.alpha
    extra = [name for name in EXTRA_MODULES if name in (config.finetuning.extra or ())]
    return {
        "alpha_pattern": {},
        "auto_mapping": None,
        "base_model_name_or_path": config.base,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "layers_pattern": None,
        "layers_to_transform": None,
        "lora_alpha": int(alpha) if alpha == int(alpha) else alpha,
        "lora_dropout": lora.dropout,
        "modules_to_save": extra or None,
        "peft_type": "LORA",
        "r": lora.rank,
        "rank_pattern": {},
        "revision": None,
        "target_modules": list(lora.targets),
        "task_type": "CAUSAL_LM",
        "use_dora": False,
        "use_rslora": lora.rslora,
    }


def read_adapter_config(directory: Path) -> AdapterConfig:
    """Read and check adapter_config.json.

    Raises:
        ValueError: it is absent or unreadable, of another kind than LoRA, or asks for what this
            project cannot compute.
    """
    path = directory / ADAPTER_CONFIG_NAME
    if not path.is_file():
        raise ValueError(f"{directory}: holds no PEFT adapter: {ADAPTER_CONFIG_NAME} is not there")
    content = read_json_object(path)
    kind = content.get("peft_type")
    if kind != "LORA":
        raise ValueError(f"{path}: peft_type is {shown(kind)}; only LORA is read")
    asked = {key: value for key, value in content.items() if key not in _READ | _IDLE and value}
    if content.get("bias") not in (None, "none"):
        asked["bias"] = content["bias"]
    if content.get("init_lora_weights") not in _INITS:
        asked["init_lora_weights"] = content["init_lora_weights"]
    for key, value in asked.items():
        raise ValueError(f"{path}: {key}: {shown(value)} is not supported; only plain LoRA is")
    rank, alpha = content.get("r"), content.get("lora_alpha")
    if not isinstance(rank, int) or isinstance(rank, bool) or rank < 1:
        raise ValueError(f"{path}: r is {shown(rank)}; it must be a positive integer")
    if not isinstance(alpha, int | float) or isinstance(alpha, bool) or not alpha > 0:
        raise ValueError(f"{path}: lora_alpha is {shown(alpha)}; it must be a positive number")
    targets = _names(path, content, "target_modules", LORA_TARGETS)
    if not targets:
        raise ValueError(f"{path}: target_modules is empty")
    extra = _names(path, content, "modules_to_save", EXTRA_MODULES)
    dropout = content.get("lora_dropout") or 0.0
    if not isinstance(dropout, int | float) or not 0 <= dropout < 1:
        raise ValueError(f"{path}: lora_dropout is {shown(dropout)}; it must be from 0 to below 1")
    lora = LoraOptions(
        rank=rank,
        alpha=float(alpha),
        targets=targets,
        dropout=float(dropout),
        rslora=bool(content.get("use_rslora")),
    )
    base = str(content.get("base_model_name_or_path") or "")
    return AdapterConfig(Finetuning(lora, extra=frozenset(extra)), base)


def config_differences(found: AdapterConfig, wanted: Finetuning) -> list[str]:
    """What of an adapter another one cannot go on from: one line per key, in our names.

    Dropout may differ, since it changes nothing that is stored.
    """
    lora, own = wanted.lora, found.lora
    assert lora is not None, "asked for runs with adapters only"
    pairs = {
        "lora_rank": (own.rank, lora.rank),
        "lora_alpha": (f"{own.alpha:g}", f"{lora.alpha:g}"),
        "lora_target": (",".join(own.targets), ",".join(lora.targets)),
        "use_rslora": (str(own.rslora).lower(), str(lora.rslora).lower()),
        "additional_target": (_listed(found.finetuning), _listed(wanted)),
    }
    return [
        f"{key} is {theirs or 'empty'} there and {ours or 'empty'} here"
        for key, (theirs, ours) in pairs.items()
        if theirs != ours
    ]


def _listed(finetuning: Finetuning) -> str:
    return ",".join(sorted(finetuning.extra or ()))


def _names(
    path: Path, content: Mapping[str, Any], key: str, known: tuple[str, ...]
) -> tuple[str, ...]:
    """The known names that a list holds, in their usual order."""
    value = content.get(key) or []
    names = value if isinstance(value, list) else [value]
    unknown = [name for name in names if name not in known]
    if unknown:
        raise ValueError(f"{path}: {key} has {shown(unknown[0])}; known are {', '.join(known)}")
    return tuple(name for name in known if name in names)
