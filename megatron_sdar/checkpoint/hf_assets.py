"""The files of a model directory that travel with its weights, and its config.json.

Tokenizer, chat template, generation config, remote code and licence are copied byte for byte and
never read as code. The list is positive: a model directory may also be an earlier run's
output_dir, whose logs and checkpoints are not part of the model. What is left behind is named.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch

from megatron_sdar.architecture import Architecture
from megatron_sdar.checkpoint.remote_code import remote_code
from megatron_sdar.checkpoint.safetensors_files import contained_file
from megatron_sdar.regular_files import check_regular, read_json, shown

CONFIG_NAME, ADAPTER_CONFIG_NAME = "config.json", "adapter_config.json"
_TOKENIZER_FILES = (
    "tokenizer*",
    "vocab.*",
    "merges.txt",
    "added_tokens.json",
    "special_tokens_map.json",
    "chat_template*",
    "*.jinja",
    "*.tiktoken",
    "*.model",
)
_MODEL_FILES = (
    "generation_config.json",
    "configuration.json",
    "*.py",
    "LICENSE*",
    "LICENCE*",
    "NOTICE*",
)
_WEIGHTS = ("*.safetensors", "*.safetensors.index.json", "*.bin", "*.bin.index.json", "*.pth")
_ASSET_BYTES = 2**30
_TEMPLATE_DIR = "additional_chat_templates"
# The published code, for a config.json that does not name it.
_SDAR_CODE = {
    "AutoConfig": "configuration_sdar.SDARConfig",
    "AutoModel": "modeling_sdar.SDARModel",
    "AutoModelForCausalLM": "modeling_sdar.SDARForCausalLM",
}
_SDAR_MOE_CODE = {
    "AutoConfig": "configuration_sdar_moe.SDARMoeConfig",
    "AutoModel": "modeling_sdar_moe.SDARMoeModel",
    "AutoModelForCausalLM": "modeling_sdar_moe.SDARMoeForCausalLM",
}


@dataclass(frozen=True)
class HfAssets:
    """What is shipped beside the weights.

    Attributes:
        files: source path by name in the destination (which may hold one folder level).
        auto_map: entries of config.json that point at remote code among `files`.
        left_behind: names in the source directories that are neither weights nor shipped.
    """

    files: Mapping[str, Path]
    auto_map: Mapping[str, str]
    left_behind: tuple[str, ...]


def collect_assets(directories: Sequence[str | Path]) -> HfAssets:
    """Decide what to ship from a model directory and, second, its tokenizer's directory.

    When the two differ, every tokenizer file comes from the second one: tokenizers must not
    mix. A tokenizer given as a file stands for its directory.

    Raises:
        ValueError: a directory is unreadable, or a file links out of it.
    """
    paths = [Path(path).parent if Path(path).is_file() else Path(path) for path in directories]
    model_dir, tokenizer_dir = paths[0], paths[-1]
    files = _matching(model_dir, _MODEL_FILES) | _matching(tokenizer_dir, _TOKENIZER_FILES)
    auto_map = _auto_map(model_dir, files)
    left = sorted(
        entry.name
        for directory in {model_dir, tokenizer_dir}
        for entry in directory.iterdir()
        if entry.name not in (*files, CONFIG_NAME, _TEMPLATE_DIR)
        and not any(fnmatchcase(entry.name, pattern) for pattern in _WEIGHTS)
    )
    return HfAssets(files, auto_map, tuple(left))


def tokenizer_assets(directory: Path) -> HfAssets:
    """The tokenizer's files of a directory alone; ValueError as `collect_assets`."""
    return HfAssets(_matching(directory, _TOKENIZER_FILES), {}, ())


def with_remote_code(assets: HfAssets, arch: Architecture) -> HfAssets:
    """The assets, with this project's model code where the source has none.

    Code of the source is kept as it is, and so is a file of ours that an earlier export left.
    """
    own = remote_code("sdar" if arch.experts is None else "sdar_moe")
    if assets.auto_map or any(name in assets.files for name in own.files):
        return assets
    return replace(assets, files={**assets.files, **own.files}, auto_map=own.auto_map)


def _matching(directory: Path, patterns: Sequence[str]) -> dict[str, Path]:
    try:
        names = sorted(entry.name for entry in directory.iterdir())
    except OSError as error:
        raise ValueError(f"{directory}: cannot read it: {error.strerror or error}") from error
    found = {
        name: contained_file(directory, name)
        for name in names
        if any(fnmatchcase(name, pattern) for pattern in patterns)
        and not any(fnmatchcase(name, pattern) for pattern in _WEIGHTS)
        and not (directory / name).is_dir()
    }
    for path in found.values():
        check_regular(path, _ASSET_BYTES)  # it will be copied
    if patterns is _TOKENIZER_FILES and (directory / _TEMPLATE_DIR).is_dir():
        contained_file(directory, _TEMPLATE_DIR)  # the folder, too, may be a link
        templates = _matching(directory / _TEMPLATE_DIR, ("*.jinja",))
        found |= {f"{_TEMPLATE_DIR}/{name}": path for name, path in templates.items()}
    return found


def _auto_map(model_dir: Path, files: Mapping[str, Path]) -> dict[str, str]:
    """The source's entries whose module is shipped; SDAR's own when it states none."""
    path = model_dir / CONFIG_NAME
    content = read_json_object(path) if path.is_file() else {}
    default = _SDAR_MOE_CODE if content.get("model_type") == "sdar_moe" else _SDAR_CODE
    stated = content.get("auto_map") or default
    if not isinstance(stated, dict):
        raise ValueError(f"{path}: auto_map is {shown(stated)}; it must be a JSON object or absent")
    return {
        key: value
        for key, value in stated.items()
        if isinstance(value, str) and f"{value.partition('.')[0]}.py" in files
    }


def copy_assets(assets: HfAssets, destination: Path) -> None:
    """Copy every file byte for byte. OSError is the caller's to explain."""
    for name, source in assets.files.items():
        target = destination / name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source, target)


def config_json(arch: Architecture, assets: HfAssets, dtype: torch.dtype) -> dict[str, Any]:
    """The config.json that belongs to weights of `dtype`."""
    config = arch.to_hf_config(str(dtype).removeprefix("torch."))
    if assets.auto_map:
        config["auto_map"] = dict(assets.auto_map)
    return config


def read_json_object(path: Path) -> dict[str, Any]:
    """Read a JSON object; ValueError names the file."""
    try:
        content = read_json(path)
    except OSError as error:
        raise ValueError(f"{path}: cannot read it: {error.strerror or error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path}: expected a JSON object, found {type(content).__name__}")
    return content


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write a JSON object, readable by people. OSError is the caller's to explain."""
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
