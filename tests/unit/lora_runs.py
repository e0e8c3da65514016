"""Checkpoints of LoRA runs on tiny models, made without training: factors are drawn."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch.distributed.tensor import DTensor
from unit.remote_models import stage_logits
from unit.tiny_hf import make_config, names_and_shapes

from megatron_sdar.architecture import Architecture, load_architecture, padded_vocab_size
from megatron_sdar.checkpoint.adapter_config import AdapterConfig
from megatron_sdar.checkpoint.base_model import base_model
from megatron_sdar.checkpoint.hf_import import load_hf_weights
from megatron_sdar.checkpoint.native import save_checkpoint
from megatron_sdar.checkpoint.stored_fit import AdapterOrigin
from megatron_sdar.config import OptimConfig
from megatron_sdar.config_sections.finetuning import LORA_TARGETS
from megatron_sdar.model.finetuning import Finetuning
from megatron_sdar.model.options import ModelOptions
from megatron_sdar.model.partition import build_stages
from megatron_sdar.model.sdar import SdarStage
from megatron_sdar.model.weights import initialize_factors, materialize
from megatron_sdar.optim.adamw import ShardedAdamW
from megatron_sdar.parallel.lora import LoraOptions
from megatron_sdar.parallel.mesh import ParallelMesh, build_mesh
from megatron_sdar.training.step import trained_parameters

LORA = Finetuning(LoraOptions(3, 7.0, LORA_TARGETS), extra=frozenset())
SOME = Finetuning(
    LoraOptions(2, 5.0, ("q_proj", "v_proj", "down_proj"), rslora=True),
    extra=frozenset({"embed_tokens", "norm", "lm_head"}),
)
IDS = [5, 77, 3, 40, 12, 9, 130, 130, 61, 1, 2, 90]


def tensors(scale: float = 0.2) -> dict[str, torch.Tensor]:
    """Weights of a size that gives logits about 1, so that 1e-5 means something."""
    generator = torch.Generator().manual_seed(1)
    return {
        name: torch.randn(shape, generator=generator) * scale + (len(shape) == 1)
        for name, shape in names_and_shapes().items()
    }


@dataclass(frozen=True)
class LoraRun:
    """A run's model and what its checkpoints say of it."""

    stages: list[SdarStage]
    arch: Architecture
    mesh: ParallelMesh
    origin: AdapterOrigin
    base: Path

    @property
    def optimizer(self) -> ShardedAdamW:
        return ShardedAdamW(trained_parameters(self.stages), OptimConfig())

    def save(self, output_dir: Path, step: int = 3) -> Path:
        return save_checkpoint(
            output_dir, step, self.stages, self.optimizer, {}, make_config(output_dir), self.arch,
            self.mesh, [self.base], self.origin,
        )  # fmt: skip


def lora_run(base: Path, finetuning: Finetuning = LORA, seed: int = 5) -> LoraRun:
    """Everything that is trained is drawn, so that nothing equals the base by being zero."""
    mesh = build_mesh(torch.device("cpu"), 1, 1)
    arch = replace(load_architecture(base), tie_word_embeddings=False)
    options = ModelOptions(
        padded_vocab_size(arch.vocab_size, 8), torch.float32, False, "none", "tiled",
        finetuning=finetuning,
    )  # fmt: skip
    stages = build_stages(arch, mesh, options)
    materialize(stages, mesh.device)
    own = [stage for stage in stages if isinstance(stage, SdarStage)]
    load_hf_weights(own, arch, base, "keep")
    initialize_factors(own, seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in trained_parameters(own).items():
            assert isinstance(parameter, DTensor)
            noise = torch.randn(parameter.shape, generator=generator) * 0.1
            if parameter.shape[0] == options.padded_vocab_size:
                noise[arch.vocab_size :] = 0.0
            parameter._local_tensor.add_(noise)
            assert finetuning.trains(name)
    origin = AdapterOrigin(AdapterConfig(finetuning, str(base)), base_model(base, arch))
    return LoraRun(own, arch, mesh, origin, base)


def assert_equal_logits(found: torch.Tensor, run: LoraRun, block_length: int = 4) -> None:
    """Those of a model for IDS against the trainer's."""
    expected = stage_logits(run.stages[0], IDS, block_length)[:, : run.arch.vocab_size]
    assert 0.5 < expected.std() < 20
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def logits(model: Any) -> torch.Tensor:
    """Of a transformers model for IDS."""
    with torch.no_grad():
        return model.eval()(torch.tensor([IDS])).logits[0]
