"""Checking a Hugging Face directory against what the inference engines read.

SGLang takes a top-level rope_theta or falls back to 10000 without a word; JetEngine reads every
.safetensors file whatever the index says; LMDeploy fails on a tensor that it does not know. So
everything is demanded here, by keys and names that are written out, and all problems are listed.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_sdar.architecture import load_architecture
from megatron_sdar.checkpoint.hf_assets import CONFIG_NAME, HfAssets, read_json_object
from megatron_sdar.checkpoint.hf_source import INDEX_NAME
from megatron_sdar.checkpoint.safetensors_files import SafetensorsReader
from megatron_sdar.checkpoint.tensor_names import differences, model_tensor_shapes

_FIXED: Mapping[str, object] = {
    "attention_bias": False,
    "rope_scaling": None,
    "sliding_window": None,
    "use_sliding_window": False,
    "tie_word_embeddings": False,
}
_PRESENT = (
    "rope_theta",
    "head_dim",
    "vocab_size",
    "torch_dtype",
    "bos_token_id",
    "eos_token_id",
    "block_size",
    "mask_token_id",
)
_MOE_FIXED: Mapping[str, object] = {"decoder_sparse_step": 1, "mlp_only_layers": []}
_MOE_PRESENT = ("num_experts", "num_experts_per_tok", "moe_intermediate_size", "norm_topk_prob")
_AUTO_CLASSES = ("AutoConfig", "AutoModelForCausalLM")


def lint_export(directory: Path, assets: HfAssets) -> list[str]:
    """Everything that is wrong with an export, one line each; empty when it is right.

    Args:
        assets: what was to travel with the weights; compared byte for byte.
    """
    try:
        config = read_json_object(directory / CONFIG_NAME)
        index = read_json_object(directory / INDEX_NAME)
        arch = load_architecture(directory)
    except ValueError as error:
        return [str(error)]
    problems = [f"{CONFIG_NAME}: {problem}" for problem in _config_problems(config, directory)]
    tensors, problems_of_files = _files_problems(directory, index)
    problems += problems_of_files
    found = {name: reader.tensors[name].shape for name, reader in tensors.items()}
    problems += differences(model_tensor_shapes(arch), found)
    dtypes = {str(reader.tensors[name].dtype) for name, reader in tensors.items()}
    if f"torch.{config.get('torch_dtype')}" not in dtypes:
        problems.append(
            f"{CONFIG_NAME}: torch_dtype is {config.get('torch_dtype')!r}, the tensors are "
            f"{', '.join(sorted(dtypes))}"
        )
    for name, path in assets.files.items():
        copy = directory / name
        if not copy.is_file() or copy.read_bytes() != path.read_bytes():
            problems.append(f"{name}: is not byte for byte {path}")
    return problems


def _config_problems(config: Mapping[str, Any], directory: Path) -> list[str]:
    is_moe = config.get("model_type") == "sdar_moe"
    fixed = {
        "model_type": "sdar_moe" if is_moe else "sdar",
        "architectures": ["SDARMoeForCausalLM" if is_moe else "SDARForCausalLM"],
        **_FIXED,
        **(_MOE_FIXED if is_moe else {}),
    }
    problems = [
        f"{key} is {config.get(key, 'missing')!r}; it must be {value!r}"
        for key, value in fixed.items()
        if key not in config or config[key] != value
    ]
    names = (*_PRESENT, *(_MOE_PRESENT if is_moe else ()))
    problems += [f"{key} is missing" for key in names if key not in config]
    if "rope_theta" in config and config["rope_theta"] is None:
        problems.append("rope_theta is None; it must stand at the top, SGLang reads no other")
    mask_id, size = config.get("mask_token_id"), config.get("vocab_size")
    if isinstance(mask_id, int) and isinstance(size, int) and not 0 <= mask_id < size:
        problems.append(f"mask_token_id is {mask_id}, outside the vocabulary of {size}")
    auto_map = config.get("auto_map", {})
    problems += [f"auto_map lacks {name}" for name in _AUTO_CLASSES if name not in auto_map]
    problems += [
        f"auto_map: {name} is {value}, and there is no {value.partition('.')[0]}.py"
        for name, value in auto_map.items()
        if not (directory / f"{value.partition('.')[0]}.py").is_file()
    ]
    return problems


def _files_problems(
    directory: Path, index: Mapping[str, Any]
) -> tuple[dict[str, SafetensorsReader], list[str]]:
    """The reader of every tensor found in any weight file, and what the index says wrongly."""
    weight_map = dict(index.get("weight_map", {}))
    tensors: dict[str, SafetensorsReader] = {}
    problems = []
    for path in sorted(directory.glob("*.safetensors")):
        try:
            reader = SafetensorsReader(path)
        except ValueError as error:
            problems.append(str(error))
            continue
        for name in reader.tensors:
            if name in tensors:
                problems.append(f"{name}: is in {tensors[name].path.name} and in {path.name}")
            if weight_map.get(name) != path.name:
                problems.append(f"{INDEX_NAME}: {name} is in {path.name}, not where it says")
            tensors[name] = reader
    problems += [f"{INDEX_NAME}: {name} is in no file" for name in weight_map.keys() - tensors]
    total = sum(reader.tensors[name].num_bytes for name, reader in tensors.items())
    stated = index.get("metadata", {}).get("total_size")
    if stated != total:
        problems.append(f"{INDEX_NAME}: total_size is {stated}, the tensors have {total} bytes")
    return tensors, problems
