"""The sizes that SDAR models have, and models of them with random weights on disk.

Weights are slices of one pool of random bytes: generating 16 GB of random numbers would take
longer than what is measured with them, and for a copy all bytes are alike.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from megatron_sdar.architecture import load_architecture
from megatron_sdar.checkpoint.safetensors_files import SafetensorsWriter, TensorInfo, row_blocks
from megatron_sdar.checkpoint.tensor_names import model_tensor_shapes
from megatron_sdar.checkpoint.weight_files import group_by_size

_COMMON: Mapping[str, Any] = {
    "model_type": "sdar",
    "architectures": ["SDARForCausalLM"],
    "head_dim": 128,
    "vocab_size": 151936,
    "num_key_value_heads": 8,
    "max_position_embeddings": 32768,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1000000,
    "tie_word_embeddings": False,
    "block_size": 4,
    "mask_token_id": 151669,
    "bos_token_id": 151643,
    "eos_token_id": 151643,
}
_MOE: Mapping[str, Any] = {
    "model_type": "sdar_moe",
    "architectures": ["SDARMoeForCausalLM"],
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "norm_topk_prob": True,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
}


def _sizes(hidden: int, inter: int, layers: int, heads: int) -> dict[str, int]:
    return {
        "hidden_size": hidden,
        "intermediate_size": inter,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
    }


MODEL_CONFIGS: Mapping[str, Mapping[str, Any]] = {
    "tiny": {
        **_COMMON,
        **_sizes(512, 1536, 8, 8),
        "num_key_value_heads": 4,
        "head_dim": 64,
        "vocab_size": 16384,
        "mask_token_id": 16383,
        "bos_token_id": 1,
        "eos_token_id": 2,
    },
    "1.7b": {**_COMMON, **_sizes(2048, 6144, 28, 16)},
    "4b": {**_COMMON, **_sizes(2560, 9728, 36, 32)},
    "8b": {**_COMMON, **_sizes(4096, 12288, 36, 32)},
    "30b-a3b": {
        **_COMMON,
        **_sizes(2048, 6144, 48, 32),
        **_MOE,
        "num_key_value_heads": 4,
        "moe_intermediate_size": 768,
    },
}


def narrow_config(config: Mapping[str, Any], divisor: int) -> dict[str, Any]:
    """The same layers, heads, experts and names, with every width divided (at least 1)."""
    widths = ("hidden_size", "intermediate_size", "moe_intermediate_size")
    narrow = {key: max(1, config[key] // divisor) for key in widths if key in config}
    head_dim = max(2, config["head_dim"] // divisor // 2 * 2)
    vocab_size = config["vocab_size"] // divisor
    return {
        **config,
        **narrow,
        "head_dim": head_dim,
        "vocab_size": vocab_size,
        "mask_token_id": vocab_size - 1,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }


def write_random_model(
    directory: Path,
    config: Mapping[str, Any],
    dtype: torch.dtype = torch.bfloat16,
    file_bytes: int = 5 * 10**9,
    seed: int = 0,
) -> int:
    """Write a Hugging Face directory of this config.json with random weights.

    Args:
        file_bytes: largest weight file.

    Returns:
        the number of bytes of all tensors.
    """
    directory.mkdir(parents=True)
    torch_dtype = str(dtype).removeprefix("torch.")
    text = json.dumps({**config, "torch_dtype": torch_dtype}, indent=2)
    (directory / "config.json").write_text(text, encoding="utf-8")
    arch = load_architecture(directory)
    tensors = {name: TensorInfo(s, dtype) for name, s in model_tensor_shapes(arch).items()}
    pool = _random_pool(dtype, seed)
    weight_map = {}
    place = 0
    groups = group_by_size(tensors, file_bytes)
    for number, group in enumerate(groups, start=1):
        file = f"model-{number:05d}-of-{len(groups):05d}.safetensors"
        with SafetensorsWriter(directory / file, group, {}) as writer:
            for name, info in group.items():
                weight_map[name] = file
                for ranges in row_blocks(info):
                    shape = (ranges[0].stop - ranges[0].start, *info.shape[1:])
                    size = torch.Size(shape).numel()
                    # A step that shares no factor with the pool, so that no two blocks are alike.
                    place = (place + 1_000_003) % (pool.numel() - size)
                    writer.write(name, pool[place : place + size].view(shape))
    total = sum(info.num_bytes for info in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    index_text = json.dumps(index, indent=2)
    (directory / "model.safetensors.index.json").write_text(index_text, encoding="utf-8")
    return total


def _random_pool(dtype: torch.dtype, seed: int) -> torch.Tensor:
    """Finite values of `dtype`, more than one block of them."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(2**25, generator=generator).mul_(0.02).to(dtype)
