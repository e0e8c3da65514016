"""The model code that is shipped beside exported weights, for transformers alone to run.

The modules here are copied byte for byte into a model directory and run from there with
trust_remote_code=True. So they import torch, transformers and each other (relatively), never
megatron_sdar, and nothing here imports them: this package only says where they lie.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

_SHARED = ("configuration_sdar", "modeling_sdar", "generation_sdar", "decoding_sdar")
_MODULES: Mapping[str, tuple[str, ...]] = {
    "sdar": _SHARED,
    "sdar_moe": (*_SHARED, "modeling_sdar_moe"),
}
_CLASSES: Mapping[str, Mapping[str, str]] = {
    "sdar": {
        "AutoConfig": "configuration_sdar.SDARConfig",
        "AutoModel": "modeling_sdar.SDARModel",
        "AutoModelForCausalLM": "modeling_sdar.SDARForCausalLM",
    },
    "sdar_moe": {
        "AutoConfig": "configuration_sdar.SDARMoeConfig",
        "AutoModel": "modeling_sdar_moe.SDARMoeModel",
        "AutoModelForCausalLM": "modeling_sdar_moe.SDARMoeForCausalLM",
    },
}


@dataclass(frozen=True)
class RemoteCode:
    """What makes a model directory loadable with trust_remote_code=True.

    Attributes:
        files: where each file lies, by its name in the model directory.
        auto_map: the entry of that name in config.json.
    """

    files: Mapping[str, Path]
    auto_map: Mapping[str, str]


def remote_code(model_type: str) -> RemoteCode:
    """The code for a config.json of this model_type.

    Raises:
        ValueError: for a model_type that the code does not compute.
    """
    if model_type not in _MODULES:
        raise ValueError(f"model_type is {model_type!r}; use {' or '.join(_MODULES)}")
    folder = Path(__file__).parent
    names = [f"{module}.py" for module in _MODULES[model_type]]
    return RemoteCode({name: folder / name for name in names}, _CLASSES[model_type])
