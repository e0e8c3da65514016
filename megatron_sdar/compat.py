"""LLaMA-Factory keys that are not keys of this trainer, and keys that say one thing twice.

A foreign key is mapped to one of ours, ignored with a warning (it cannot change the result),
passes in silence (its value asks for what happens anyway) or is refused with what to use instead;
the tables are in compat_mapped, compat_ignored and compat_refused. Second names are folded into
the first, so everything past loading reads one key: neat_packing, recompute_granularity,
data_parallel_sharding_strategy, save_steps, eval_steps.
"""

import json
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields
from fnmatch import fnmatchcase
from pathlib import Path

from megatron_sdar.compat_ignored import IGNORED
from megatron_sdar.compat_mapped import MAPPED, RENAMED, map_key, normalise_value
from megatron_sdar.compat_refused import REFUSED
from megatron_sdar.config_sections.finetuning import FinetuningConfig
from megatron_sdar.regular_files import read_regular_text

__all__ = [
    "IGNORED",
    "REFUSED",
    "RENAMED",
    "SECOND_NAMES",
    "Verdict",
    "fold_second_names",
    "judge_foreign_key",
    "normalise_report_to",
    "normalise_value",
]

# Our keys that `fold_second_names` turns into another, and the key that is read afterwards.
SECOND_NAMES: Mapping[str, str] = {
    "packing": "neat_packing",
    "deepspeed": "data_parallel_sharding_strategy",
    "gradient_checkpointing": "recompute_granularity",
    "disable_gradient_checkpointing": "recompute_granularity",
}
FINETUNING_KEYS: Mapping[str, tuple[str, ...]] = {
    "lora": ("lora_", "additional_target", "use_rslora", "adapter_name_or_path"),
    "freeze": ("freeze_",),
}
# Collectives count their timeout in milliseconds, in 32 bits at the narrowest place.
_LONGEST_TIMEOUT = (2**31 - 1) // 1000


@dataclass(frozen=True)
class Verdict:
    """What becomes of one key as written.

    Attributes:
        kind: supported, mapped, ignored, refused or unknown.
        note: the reason, or what to use instead; "" where there is nothing to say.
        values: the keys of this trainer that it sets, with their values.
    """

    kind: str
    note: str = ""
    values: Mapping[str, object] = field(default_factory=dict)


_ZERO_STRATEGIES = {
    0: "no_shard",
    1: "optim_grads",
    2: "optim_grads",
    3: "optim_grads_params",
}


def judge_foreign_key(key: str, value: object) -> Verdict | None:
    """What becomes of a LLaMA-Factory key that is none of ours; None if it is unknown to us.

    A mapped key's value is not checked yet: that is the business of the key it becomes.
    """
    if key in IGNORED:
        return Verdict("ignored", IGNORED[key])
    if key in MAPPED:
        try:
            found = map_key(key, value)
        except ValueError as error:
            return Verdict("refused", str(error))
        if found is None:
            return Verdict("ignored")
        return Verdict("mapped", found.note, {found.key: found.value})
    for pattern, (neutral, advice) in REFUSED.items():
        if fnmatchcase(key, pattern):
            if value is None or value is False or value in neutral:
                return Verdict("ignored")
            return Verdict("refused", f"{key}: {value} is not supported; {advice}")
    return None


def normalise_report_to(value: object) -> object:
    """LLaMA-Factory writes none as null, as text or as a list."""
    return [] if value in (None, [], "none", ["none"]) else value


def fold_second_names(values: dict[str, object]) -> list[str]:
    """Fold second names into the first, in place; `values` holds only keys that were given.

    Returns warnings. Raises ValueError where two names contradict each other or a deepspeed
    file does not tell its ZeRO stage.
    """
    _fold_packing(values)
    _fold_recompute(values)
    warnings = list(_idle_finetuning(values))
    warnings += [*_fold_deepspeed(values), *_fold_epochs(values), *_clamp_timeout(values)]
    if values.get("trust_remote_code"):
        warnings.append("trust_remote_code is accepted and unused: no model code is executed")
    warms_up = values.get("warmup_steps") or values.get("warmup_ratio")
    if values.get("lr_scheduler_type") == "constant" and warms_up:
        warnings.append(
            "lr_scheduler_type: constant has no warm-up (as in transformers), so warmup_steps and "
            "warmup_ratio do nothing; constant_with_warmup uses them"
        )
    return warnings


def _idle_finetuning(values: Mapping[str, object]) -> Iterator[str]:
    """Keys that were given for another finetuning_type, a warning for each kind."""
    chosen = values.get("finetuning_type", "full")
    for kind, prefixes in FINETUNING_KEYS.items():
        idle = [
            key.name
            for key in fields(FinetuningConfig)
            if key.name.startswith(prefixes) and values.get(key.name, key.default) != key.default
        ]
        if idle and chosen != kind:
            yield (
                f"{', '.join(idle)}: no effect with finetuning_type: {chosen} "
                f"(finetuning_type: {kind} uses them)"
            )


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


def _fold_epochs(values: dict[str, object]) -> list[str]:
    """save_strategy and eval_strategy: epoch become a fraction of all steps."""
    warnings = []
    for what in ("save", "eval"):
        strategy, steps = f"{what}_strategy", f"{what}_steps"
        if values.get(strategy) != "epoch":
            continue
        max_steps, epochs = values.get("max_steps", -1), values.get("num_train_epochs", 3.0)
        assert isinstance(max_steps, int), "converted"
        assert isinstance(epochs, float), "converted"
        if max_steps > 0:
            raise ValueError(
                f"{strategy}: epoch with max_steps: {max_steps} does not say how long an epoch "
                f"is; set {strategy}: steps and {steps}"
            )
        values[strategy] = "steps"
        # Rounded down, so that the fraction of all steps never rounds up past the end of an
        # epoch; and below 1, which would be every step.
        values[steps] = min(math.floor(1e9 / max(1.0, epochs)), 10**9 - 1) / 1e9
        warnings.append(f"{strategy}: epoch is {steps}: {values[steps]:g} of all steps")
    return warnings


def _clamp_timeout(values: dict[str, object]) -> list[str]:
    seconds = values.get("ddp_timeout", 0)
    assert isinstance(seconds, int), "converted"
    if seconds <= _LONGEST_TIMEOUT:
        return []
    values["ddp_timeout"] = _LONGEST_TIMEOUT
    days = _LONGEST_TIMEOUT // 86400
    return [f"ddp_timeout: {seconds} s is taken as {_LONGEST_TIMEOUT} s, {days} days"]


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
        warnings.append(f"deepspeed: the offloading that {origin} asks for is not available")
    return warnings


def _read_zero_stage(source: str) -> tuple[int, bool, str]:
    """Return (stage, asks for offloading, what told so). A mapping comes as its JSON text."""
    if source.startswith("{"):
        return *_parse_zero(source, "the mapping"), "the given mapping"
    path = Path(source)
    if not path.is_file():
        named = re.search(r"ds_z([0-3])(?!\d)", path.name)
        if named is None:
            raise ValueError(
                f"deepspeed: {source} does not exist and its name is not of the form "
                "ds_z{0,2,3}_config.json; set data_parallel_sharding_strategy instead"
            )
        return int(named[1]), "offload" in path.name, f"the name {path.name} (no such file)"
    return *_parse_zero(read_regular_text(path), source), source


def _parse_zero(text: str, source: str) -> tuple[int, bool]:
    """(stage, asks for offloading) of a deepspeed configuration."""
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"deepspeed: {source} is not valid JSON: {error}") from error
    zero = content.get("zero_optimization", {}) if isinstance(content, dict) else None
    stage = zero.get("stage", 0) if isinstance(zero, dict) else None
    if not isinstance(zero, dict) or type(stage) is not int or stage not in _ZERO_STRATEGIES:
        raise ValueError(
            f"deepspeed: {source}: zero_optimization.stage must be 0, 1, 2 or 3, found {stage!r}"
        )
    return stage, any(zero.get(key) for key in ("offload_optimizer", "offload_param"))
