"""Our optimizer step as the benchmark runs it: one process or a few, with or without savings."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_sdar.architecture import Architecture, padded_vocab_size
from megatron_sdar.config import OptimConfig
from megatron_sdar.model.options import ModelOptions
from megatron_sdar.model.partition import build_stages
from megatron_sdar.model.sdar import SdarStage
from megatron_sdar.model.weights import initialize, materialize
from megatron_sdar.optim.adamw import ShardedAdamW
from megatron_sdar.parallel.mesh import ParallelMesh, build_mesh
from megatron_sdar.parallel.sharding import local_tensor
from megatron_sdar.training.step import TrainingStep, named_parameters

_CPU = torch.device("cpu")


@dataclass(frozen=True)
class Layout:
    """How the step is divided over processes.

    Attributes:
        apart: groups of processes that know nothing of each other; each has the whole model and
            takes its share of the micro-batches.
    """

    name: str
    tp: int = 1
    pp: int = 1
    dp: int = 1
    apart: int = 1

    @property
    def world(self) -> int:
        """Processes of one group."""
        return self.tp * self.pp * self.dp


ONE_PROCESS = Layout("one process")


def make_own_step(
    arch: Architecture,
    config: OptimConfig,
    seed: int,
    *,
    trimmed: bool,
    compute: torch.dtype = torch.float32,
    layout: Layout = ONE_PROCESS,
    fused_kernels: str = "torch",
    attention_backend: str = "tiled",
) -> TrainingStep:
    """A step over fp32 parameters with our initial weights. Needs the process group.

    Args:
        trimmed: leave out what the last layer computes for nothing.
        compute: dtype of activations.
        fused_kernels, attention_backend: as in training, resolved.
    """
    mesh: ParallelMesh = build_mesh(_CPU, layout.tp, layout.pp)
    options = ModelOptions(
        padded_vocab_size=padded_vocab_size(arch.vocab_size, layout.tp),
        dtype=torch.float32,
        sequence_parallel=layout.tp > 1,
        recompute="none",
        attention_backend=attention_backend,
        fused_kernels=fused_kernels,
        trim_last_layer=trimmed,
    )
    modules = build_stages(arch, mesh, options, compute_dtype=compute)
    materialize(modules, mesh.device)
    initialize(modules, seed)
    stages = [stage for stage in modules if isinstance(stage, SdarStage)]
    return TrainingStep(
        arch,
        mesh,
        stages,
        ShardedAdamW(named_parameters(stages), config),
        max_grad_norm=config.max_grad_norm,
        activation_dtype=compute,
    )


def plain_weights(step: TrainingStep) -> dict[str, Tensor]:
    """Copies of a one-process step's weights by Hugging Face name."""
    return {name: local_tensor(p).detach().clone() for name, p in step.parameters.items()}
