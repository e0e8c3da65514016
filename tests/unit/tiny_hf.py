"""Tiny Hugging Face models on disk and tiny stages in memory, for the checkpoint tests."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from megatron_sdar.architecture import Architecture, load_architecture, padded_vocab_size
from megatron_sdar.checkpoint.checksums import file_record
from megatron_sdar.checkpoint.run_directory import Marker, write_marker
from megatron_sdar.config import (
    DataConfig,
    DiffusionConfig,
    ModelConfig,
    OptimConfig,
    ParallelConfig,
    SdarConfig,
    TrainingConfig,
)
from megatron_sdar.model.options import ModelOptions
from megatron_sdar.model.partition import build_stages
from megatron_sdar.model.sdar import SdarStage
from megatron_sdar.model.weights import initialize, materialize
from megatron_sdar.optim.adamw import ShardedAdamW
from megatron_sdar.parallel.mesh import ParallelMesh, build_mesh
from megatron_sdar.training.step import named_parameters

VOCAB, MASK_ID = 131, 130
CONFIG = {
    "architectures": ["SDARForCausalLM"],
    "model_type": "sdar",
    "vocab_size": VOCAB,
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "max_position_embeddings": 512,
    "initializer_range": 0.2,
    "block_size": 4,
    "mask_token_id": MASK_ID,
    "bos_token_id": 1,
    "eos_token_id": [2, 1],
}


def names_and_shapes(config: dict[str, object] = CONFIG) -> dict[str, tuple[int, ...]]:
    """Written out from export.md's list, not from the product's table."""
    h, i, d, v = 48, 64, 16, int(str(config["vocab_size"]))
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (v, h),
        "model.norm.weight": (h,),
        "lm_head.weight": (v, h),
    }
    for n in range(int(str(config["num_hidden_layers"]))):
        layer = f"model.layers.{n}"
        for norm in ("input_layernorm", "post_attention_layernorm"):
            shapes[f"{layer}.{norm}.weight"] = (h,)
        for norm in ("q_norm", "k_norm"):
            shapes[f"{layer}.self_attn.{norm}.weight"] = (d,)
        for name, rows in {"q_proj": 4 * d, "k_proj": 2 * d, "v_proj": 2 * d}.items():
            shapes[f"{layer}.self_attn.{name}.weight"] = (rows, h)
        shapes[f"{layer}.self_attn.o_proj.weight"] = (h, 4 * d)
        shapes[f"{layer}.mlp.gate_proj.weight"] = (i, h)
        shapes[f"{layer}.mlp.up_proj.weight"] = (i, h)
        shapes[f"{layer}.mlp.down_proj.weight"] = (h, i)
    return shapes


def random_tensors(dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        name: torch.randn(shape, generator=generator).to(dtype)
        for name, shape in names_and_shapes().items()
    }


def write_model(
    directory: Path,
    tensors: dict[str, torch.Tensor] | None = None,
    files: int = 2,
    **changes: object,
) -> dict[str, torch.Tensor]:
    """Write a model directory with assets; returns its tensors. A change to None removes a key."""
    tensors = random_tensors() if tensors is None else tensors
    directory.mkdir(parents=True, exist_ok=True)
    config = {k: v for k, v in {**CONFIG, **changes}.items() if v is not None}
    (directory / "config.json").write_text(json.dumps(config))
    weight_map = {}
    for index in range(files):
        # Upstream's 30B-A3B names its files by layer, so a reader must not guess names.
        file = f"layer-{index}-ep-0-of-1.safetensors" if files > 1 else "model.safetensors"
        part = {n: t for k, (n, t) in enumerate(tensors.items()) if k % files == index}
        save_file(part, directory / file)
        weight_map |= dict.fromkeys(part, file)
    if files > 1:
        index_text = json.dumps({"metadata": {}, "weight_map": weight_map})
        (directory / "model.safetensors.index.json").write_text(index_text)
    for name, text in {
        "tokenizer_config.json": '{"a": 1}\r\n',
        "vocab.json": "{}",
        "merges.txt": "a b\n",
        "chat_template.jinja": "{{ 1 }}",
        "generation_config.json": '{"eos_token_id": [2, 1]}',
        "LICENSE": "free\n",
        "trainer_log.jsonl": "{}\n",
        "README.md": "# A model\n",
    }.items():
        (directory / name).write_bytes(text.encode())
    return tensors


def write_moe_model(
    directory: Path,
    tensors: dict[str, torch.Tensor] | None = None,
    model_type: str = "sdar_moe",
) -> dict[str, torch.Tensor]:
    """A model of 2 layers with 6 experts in a directory; returns its tensors."""
    experts, inter = 6, 8
    if tensors is None:
        generator = torch.Generator().manual_seed(1)
        two_layers = names_and_shapes({**CONFIG, "num_hidden_layers": 2})
        shapes = {name: shape for name, shape in two_layers.items() if ".mlp." not in name}
        for layer in (f"model.layers.{n}.mlp" for n in range(2)):
            shapes[f"{layer}.gate.weight"] = (experts, 48)
            for expert in (f"{layer}.experts.{e}" for e in range(experts)):
                shapes[f"{expert}.gate_proj.weight"] = (inter, 48)
                shapes[f"{expert}.up_proj.weight"] = (inter, 48)
                shapes[f"{expert}.down_proj.weight"] = (48, inter)
        tensors = {n: torch.randn(shape, generator=generator) for n, shape in shapes.items()}
    changes = {
        "model_type": model_type,
        "num_hidden_layers": 2,
        "num_experts": experts,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": inter,
        "norm_topk_prob": True,
    }
    return write_model(directory, tensors, **changes)


def read_model(directory: Path) -> dict[str, torch.Tensor]:
    """Every tensor by the index, the way an engine reads a directory."""
    index = json.loads((directory / "model.safetensors.index.json").read_text())
    found: dict[str, torch.Tensor] = {}
    for path in sorted(directory.glob("*.safetensors")):  # JetEngine globs
        for name, tensor in load_file(path).items():
            assert index["weight_map"].pop(name) == path.name
            found[name] = tensor
    assert index["weight_map"] == {}
    return found


def options(arch: Architecture, dtype: torch.dtype, divisor: int = 8) -> ModelOptions:
    return ModelOptions(padded_vocab_size(arch.vocab_size, divisor), dtype, False, "none", "tiled")


def make_stages(
    directory: Path,
    dtype: torch.dtype = torch.float32,
    divisor: int = 8,
    tied: bool = False,
) -> tuple[list[SdarStage], Architecture, ParallelMesh]:
    """The whole model of a directory's config.json in this process, filled at random."""
    mesh = build_mesh(torch.device("cpu"), 1, 1)
    arch = replace(load_architecture(directory), tie_word_embeddings=tied)
    stages = build_stages(arch, mesh, options(arch, dtype, divisor))
    materialize(stages, mesh.device)
    initialize(stages, 3)
    return [stage for stage in stages if isinstance(stage, SdarStage)], arch, mesh


def make_optimizer(stages: list[SdarStage]) -> ShardedAdamW:
    return ShardedAdamW(named_parameters(stages), OptimConfig())


def make_config(output_dir: Path) -> SdarConfig:
    return SdarConfig(
        ModelConfig(model_name_or_path="somewhere"),
        DataConfig(),
        DiffusionConfig(),
        ParallelConfig(),
        OptimConfig(),
        TrainingConfig(output_dir=str(output_dir), recompute_granularity="full"),
    )


def local_weights(stages: list[SdarStage]) -> dict[str, torch.Tensor]:
    """Full weights of a one-process model, padding rows included."""
    return {n: p.full_tensor().detach() for n, p in named_parameters(stages).items()}


def resign(checkpoint: Path) -> None:
    """Make a tampered checkpoint look complete, to reach the checks behind the marker."""
    content = json.loads((checkpoint / "COMMITTED").read_text())
    del content["checksum"]
    present = [name for name in content["files"] if (checkpoint / name).exists()]
    content["files"] = {name: file_record(checkpoint / name) for name in present}
    write_marker(checkpoint, Marker(**content))


def assert_same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    """The same names, dtypes and values."""
    assert set(found) == set(expected)
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor), name
