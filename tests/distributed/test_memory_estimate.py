"""The memory estimate against what the product allocates: shards of 4 processes, activations."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from distributed.world import run_world
from torch.profiler import ProfilerActivity, profile

from megatron_sdar.architecture import Architecture
from megatron_sdar.config import SdarConfig, load_config
from megatron_sdar.diffusion.noise import NoiseDraw
from megatron_sdar.diffusion.rows import build_row, full_copies
from megatron_sdar.model import attention
from megatron_sdar.model.weights import initialize
from megatron_sdar.parallel.mesh import build_mesh
from megatron_sdar.parallel.sharding import local_tensor
from megatron_sdar.training.kernels import KernelChoice
from megatron_sdar.training.memory_estimate import RankMemory, estimate_memory
from megatron_sdar.training.setup import make_stages, make_step
from megatron_sdar.training.step import TrainingStep, named_parameters

KERNELS = KernelChoice("tiled", "torch", None, "", "")
TP, PP = "tensor_model_parallel_size", "pipeline_model_parallel_size"
ROW = "cutoff_len=512 per_device_train_batch_size=1"
LAYOUTS = (
    f"{TP}=2 {PP}=2",
    f"{TP}=4",
    f"{TP}=2 data_parallel_sharding_strategy=optim_grads_params",
    f"{PP}=2 virtual_pipeline_model_parallel_size=2 data_parallel_sharding_strategy=no_shard",
    f"{TP}=4 finetuning_type=lora additional_target=norm",
    f"{PP}=2 finetuning_type=freeze freeze_extra_modules=lm_head",
)


def architecture() -> Architecture:
    """Sizes that divide by every layout, two key/value heads: fewer than TP4 has ranks."""
    return Architecture(
        vocab_size=250,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=6,
        num_attention_heads=8,
        num_key_value_heads=2,
        head_dim=16,
        rms_norm_eps=1e-6,
        rope_theta=1e4,
        tie_word_embeddings=False,
        max_position_embeddings=512,
        block_size=4,
        mask_token_id=249,
    )


def make_config(directory: Path, overrides: str) -> SdarConfig:
    path = directory / "run.yaml"
    if not path.exists():
        path.write_text("model_name_or_path: m\noutput_dir: o\ndata_path: d\n")
    return load_config([str(path), "device=cpu", *overrides.split()])


def check_shards(directory: str, overrides: str) -> None:
    config, arch = make_config(Path(directory), overrides), architecture()
    parallel = config.parallel
    mesh = build_mesh(
        torch.device("cpu"),
        parallel.tensor_model_parallel_size,
        parallel.pipeline_model_parallel_size,
        parallel.data_parallel_sharding_strategy == "no_shard",
    )
    stages = make_stages(config, arch, mesh, KERNELS)
    step = make_step(config, arch, mesh, stages)
    estimated = estimate_memory(config, arch, 4)[mesh.pp_rank]
    weights = sum(local_tensor(p).nbytes for p in named_parameters(stages).values())
    moments = sum(local_tensor(moment).nbytes for moment in step.optimizer.moments().values())
    # FSDP divides by rows, so a rank may hold up to a row more of each tensor than its share.
    assert estimated.weights == pytest.approx(weights, rel=0.02), overrides
    assert estimated.moments == pytest.approx(moments, rel=0.02), overrides


def test_shards_of_every_kind_of_layout(tmp_path: Path) -> None:
    make_config(tmp_path, "")
    run_world(4, [(check_shards, (str(tmp_path), overrides)) for overrides in LAYOUTS], tmp_path)


class _KeptByGpuAttention(torch.autograd.Function):
    """Keeps what sdar_kernels.triton_attention keeps; the CPU's tiles keep probabilities too."""

    @staticmethod
    def forward(ctx: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        out = torch.zeros_like(q)
        ctx.save_for_backward(q, k, v, out, q.new_zeros(q.shape[:2]))
        return out


def kept_by_forward(step: TrainingStep) -> int:
    """Bytes that are allocated and not freed by the forward of a row of 2 x 512 tokens.

    Counted by the profiler: hooks on saved tensors do not see what an inner hook (selective
    recomputation) or a context object keeps.
    """
    rng = np.random.default_rng(0)
    ids = rng.integers(1, 240, size=512).astype(np.int32)
    document = full_copies(ids, ids, 4, NoiseDraw(0.5, rng.random(512) < 0.5))
    batch = step._batch(build_row([document], 1024, 4, 249, 248), 1.0)
    step.stages[0](None, batch)  # what is made on first use belongs to no forward
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        loss = step.stages[0](None, batch)
    assert loss.requires_grad
    return sum(event.self_cpu_memory_usage for event in profiler.key_averages())


@pytest.mark.usefixtures("single_process")
@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
def test_activations_that_a_layer_keeps(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, recompute: str
) -> None:
    """Bytes kept by a forward through 6 layers less those through 3, against the estimate's."""
    monkeypatch.setattr(
        attention,
        "block_diffusion_attention",
        lambda q, k, v, *_: _KeptByGpuAttention.apply(q, k, v),
    )
    kept, estimated = [], []
    for num_layers in (3, 6):
        arch = replace(architecture(), num_hidden_layers=num_layers)
        config = make_config(tmp_path, f"recompute_granularity={recompute} {ROW}")
        mesh = build_mesh(torch.device("cpu"), 1, 1)
        stages = make_stages(config, arch, mesh, KERNELS)
        initialize(stages, seed=0)
        step = make_step(config, arch, mesh, stages)
        kept.append(kept_by_forward(step))
        estimated.append(estimate_memory(config, arch, 1)[0].activations)
    # Kernels keep a little beside activations: the softmax's sums, what norms divide by.
    assert estimated[1] - estimated[0] == pytest.approx(kept[1] - kept[0], rel=0.05)


def estimate(directory: Path, overrides: str, world: int = 8) -> list[RankMemory]:
    return estimate_memory(make_config(directory, f"{ROW} {overrides}"), architecture(), world)


def test_a_pipeline_keeps_a_micro_batch_for_each_stage_behind(tmp_path: Path) -> None:
    first, second, last = estimate(tmp_path, f"{PP}=3 gradient_accumulation_steps=9", world=6)
    assert first.activations == 3 * last.activations
    assert second.activations == 2 * last.activations
    (alone,) = estimate(tmp_path, "gradient_accumulation_steps=9")
    assert alone.activations == 3 * last.activations, "three times the layers, one micro-batch"
    few = estimate(tmp_path, f"{PP}=3 gradient_accumulation_steps=2", world=6)
    assert few[0].activations == 2 * last.activations, "there are only two"


def test_what_gradients_and_gathered_weights_take(tmp_path: Path) -> None:
    def of(overrides: str, world: int = 8) -> RankMemory:
        (found,) = estimate(tmp_path, overrides, world)
        return found

    parameters = of("", world=1).weights / 4
    alone = of("gradient_accumulation_steps=4", world=1)
    assert (alone.gradients, alone.gathered) == (4 * parameters, 0), "no FSDP in float32"
    assert of("bf16=true", world=1).gathered == 2 * parameters
    several, one = of("gradient_accumulation_steps=2"), of("")
    zero3 = of("gradient_accumulation_steps=2 data_parallel_sharding_strategy=optim_grads_params")
    assert several.gradients > 4 * parameters, "whole ones wait"
    assert one.gradients < several.gradients
    assert zero3.gradients == one.gradients, "reduced after every micro-batch"
    assert zero3.gathered < several.gathered == 4 * parameters
    assert of("data_parallel_sharding_strategy=no_shard").weights == 8 * several.weights
    lora = of("finetuning_type=lora lora_rank=2")
    assert lora.gradients < one.gradients / 4


def test_the_parts_are_shown_and_add_up() -> None:
    memory = RankMemory(*(part * 2.0**30 for part in (1, 2, 3, 4, 5, 6)))
    assert memory.total == 21 * 2**30
    assert memory.format().startswith("21.0 GiB (weights 1.0, moments 2.0, gradients 3.0, gath")
