"""Model directories with our remote code, and their loading without a trace in the process."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from distributed.layouts import Layout
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from megatron_sdar.architecture import Architecture, padded_vocab_size
from megatron_sdar.checkpoint.remote_code import remote_code
from megatron_sdar.generation.reference_sampler import generate, sequence_batch
from megatron_sdar.generation.sampler_config import GenerationResult, SamplerConfig
from megatron_sdar.model.options import ModelOptions
from megatron_sdar.model.partition import build_stages
from megatron_sdar.model.sdar import SdarStage
from megatron_sdar.model.weights import initialize, materialize
from megatron_sdar.parallel.mesh import build_mesh

CPU = torch.device("cpu")
MASK_ID = 130
# A rope_theta that a silent default of 10000 would not equal.
ARCH = replace(
    Layout("remote").arch, num_hidden_layers=2, rope_theta=250_000.0, eos_token_id=(129, 128)
)

# Larger weights, so that "dynamic" remasking has some tokens to be sure of.
SURE = replace(ARCH, initializer_range=0.4)


@contextmanager
def modules_cache(folder: Path) -> Iterator[None]:
    """transformers copies remote code into `folder` and forgets it afterwards; no network."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(folder))
        patch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
        patch.setattr(sys, "path", [*sys.path])
        try:
            yield
        finally:
            for name in [name for name in sys.modules if name.startswith("transformers_modules")]:
                del sys.modules[name]


def make_stage(arch: Architecture, seed: int, dtype: torch.dtype) -> SdarStage:
    """The trainer's whole model with random weights, norm scales included."""
    padded = padded_vocab_size(arch.vocab_size, 8)
    options = ModelOptions(padded, dtype, False, "none", "tiled")
    (stage,) = build_stages(arch, build_mesh(CPU, 1, 1), options)
    materialize([stage], CPU)
    initialize([stage], seed)
    assert isinstance(stage, SdarStage)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in stage.parameters():
            if parameter.dim() == 1:  # scales of 1 would hide a forgotten or swapped norm
                scale = torch.rand(parameter.shape[0], generator=generator) + 0.5
                parameter._local_tensor.copy_(scale)
    return stage


def stage_tensors(stage: SdarStage) -> dict[str, Tensor]:
    """What an export holds: without vocabulary padding."""
    tensors = {name: p._local_tensor.detach() for name, p in stage.named_parameters()}
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        tensors[name] = tensors[name][: stage.arch.vocab_size].clone()
    return tensors


def stage_logits(stage: SdarStage, ids: list[int], block_length: int) -> Tensor:
    """The trainer's logits [n, V] at every position of whole clean blocks."""
    batch = sequence_batch(torch.tensor(ids), block_length).at(np.arange(len(ids)))
    with torch.no_grad():
        return stage(None, batch, return_logits=True)


def write_directory(folder: Path, config: dict[str, Any], tensors: dict[str, Tensor]) -> Path:
    """A model directory as an export is: config.json, weights, code; no tokenizer."""
    folder.mkdir(parents=True)
    code = remote_code(config["model_type"])
    content = {**config, "auto_map": dict(code.auto_map)}
    (folder / "config.json").write_text(json.dumps(content))
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    for name, path in code.files.items():
        shutil.copyfile(path, folder / name)
    return folder


def load_model(folder: Path, **options: Any) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, **options)


def random_ids(length: int, seed: int = 0) -> list[int]:
    return np.random.default_rng(seed).integers(0, 128, size=length).tolist()


def decoding_pair(folder: Path) -> tuple[SdarStage, Any]:
    """The trainer's model SURE and, loaded from `folder`, the shipped one; both in float64."""
    stage = make_stage(SURE, 7, torch.float64)
    write_directory(folder, SURE.to_hf_config("float64"), stage_tensors(stage))
    model = load_model(folder).eval()
    assert model.dtype == torch.float64
    return stage, model


@torch.no_grad()
def logits_of(model: Any, ids: list[int] | Tensor, **arguments: Any) -> Tensor:
    """Logits [n, V] of one row."""
    return model(torch.as_tensor(ids).view(1, -1), **arguments).logits[0]


def difference(ours: Tensor, theirs: Tensor) -> float:
    """The largest one between logits, which must be worth comparing."""
    assert ours.shape == theirs.shape
    assert theirs.std() > 0.5
    return (ours - theirs).abs().max().item()


def sampler_result(stage: SdarStage, prompt: list[int], **changes: Any) -> GenerationResult:
    """What the trainer's sampler decodes, without stop tokens unless given."""
    values = {"block_length": 4, "max_new_tokens": 11, "stop_token_ids": (), **changes}
    return generate(stage, prompt, SamplerConfig(mask_token_id=MASK_ID, **values))


def sampled(stage: SdarStage, prompt: list[int], **changes: Any) -> list[int]:
    return list(sampler_result(stage, prompt, **changes).ids)


def generated(model: Any, prompt: list[int], **changes: Any) -> list[int]:
    """The same from the shipped `generate`: the new tokens."""
    values = {"max_new_tokens": 11, "eos_token_id": [], **changes}
    result = model.generate(torch.tensor([prompt], dtype=torch.int64), **values)
    assert result.dtype == torch.int64
    assert result[0, : len(prompt)].tolist() == prompt
    return result[0, len(prompt) :].tolist()
