"""Runs of LoRA and freeze in parallel layouts, and the plain oracle that they must equal.

The oracle computes with merged weights W + scale * B A, made by autograd from its own factors; it
knows nothing of parallelism, nor of which products can be left out.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

import torch
from distributed import oracle
from distributed.layouts import (
    BLOCK,
    LR,
    MASK_ID,
    MAX_GRAD_NORM,
    SEED,
    WEIGHT_DECAY,
    Layout,
    divisors,
    make_steps,
    micro_batches,
)
from torch import Tensor
from torch.distributed.tensor import DTensor

from megatron_sdar.architecture import padded_vocab_size
from megatron_sdar.config import OptimConfig
from megatron_sdar.config_sections.finetuning import LORA_TARGETS
from megatron_sdar.model.finetuning import Finetuning
from megatron_sdar.model.options import ModelOptions
from megatron_sdar.model.partition import build_stages
from megatron_sdar.model.sdar import SdarStage
from megatron_sdar.model.weights import initialize, initialize_factors, materialize
from megatron_sdar.optim.adamw import ShardedAdamW
from megatron_sdar.parallel.lora import LoraOptions
from megatron_sdar.parallel.mesh import ParallelMesh, build_mesh
from megatron_sdar.parallel.sharding import fill_local, local_ranges
from megatron_sdar.training.step import TrainingStep, named_parameters, trained_parameters

VOCAB = 131
# Rank 3 divides by no number of data-parallel ranks: one of two holds two rows, the other one.
LORA = Finetuning(LoraOptions(3, 7.0, LORA_TARGETS), extra=frozenset())
SOME = Finetuning(
    LoraOptions(2, 4.0, ("q_proj", "v_proj", "down_proj"), rslora=True),
    extra=frozenset({"embed_tokens", "lm_head", "norm"}),
)
DROPOUT = replace(LORA, lora=replace(LORA.lora, dropout=0.25))
LAST_TWO = Finetuning(layers=range(2, 4), extra=frozenset())
FIRST_AND_HEAD = Finetuning(
    layers=range(1), parts=frozenset({"self_attn"}), extra=frozenset({"lm_head"})
)
HEAD_ONLY = Finetuning(layers=range(0), extra=frozenset({"lm_head"}))
NORMS = Finetuning(layers=range(0), extra=frozenset({"norm"}))


@dataclass(frozen=True)
class Case:
    """A layout and what is trained in it."""

    layout: Layout
    finetuning: Finetuning

    @property
    def name(self) -> str:
        return self.layout.name

    @property
    def world(self) -> int:
        return self.layout.world


def make_step(case: Case, mesh: ParallelMesh) -> TrainingStep:
    """Seeded weights; B is drawn too, since from zero A would learn nothing in the first step."""
    layout = case.layout
    params = torch.float32 if layout.bf16 else torch.float64
    compute = torch.bfloat16 if layout.bf16 else torch.float64
    options = ModelOptions(
        padded_vocab_size(VOCAB, 8), params, layout.sequence_parallel, layout.recompute,
        layout.backend, trim_last_layer=layout.trim, finetuning=case.finetuning,
    )  # fmt: skip
    stages = build_stages(
        layout.arch, mesh, options, layout.vpp, layout.layers, layout.strategy, compute
    )
    materialize(stages, mesh.device)
    initialize(stages, SEED)
    initialize_factors(stages, SEED)
    for name, parameter in named_parameters(stages).items():
        if ".lora_B." in name:
            fill_up_factor(name, parameter)
    own = [stage for stage in stages if isinstance(stage, SdarStage)]
    optimizer = ShardedAdamW(
        trained_parameters(own), OptimConfig(learning_rate=LR, weight_decay=WEIGHT_DECAY)
    )
    dropout = case.finetuning.lora is not None and case.finetuning.lora.dropout > 0
    return TrainingStep(
        layout.arch, mesh, own, optimizer, sharding_strategy=layout.strategy,
        max_grad_norm=MAX_GRAD_NORM, activation_dtype=compute,
        dropout_seed=SEED if dropout else None,
    )  # fmt: skip


def fill_up_factor(name: str, parameter: Tensor) -> None:
    """The same values in every layout, from the place of an element in the whole tensor."""
    assert isinstance(parameter, DTensor)
    rows, columns = local_ranges(parameter)
    generator = torch.Generator().manual_seed(len(name) + sum(name.encode()))
    whole = torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * 0.1
    fill_local(parameter, whole[rows, columns])


def run_case(case: Case, directory: Path) -> None:
    """Run on every rank of the world; each pipeline rank's corner saves what it owns."""
    layout = case.layout
    mesh = build_mesh(torch.device("cpu"), layout.tp, layout.pp, layout.strategy == "no_shard")
    step = make_step(case, mesh)
    every = named_parameters(step.stages)
    initial = full(every)
    losses, norms, gradients = [], [], {}
    for index, rows in enumerate(make_steps(False)):
        batches = micro_batches(layout, rows, mesh.dp_rank)
        if index == 0:
            step.backward(batches)
            gradients = full({n: p.grad for n, p in every.items() if p.grad is not None})
        result = step.run(batches, LR)
        losses.append(result.loss)
        norms.append(result.grad_norm)
    weights = full(every)
    if mesh.tp_rank == 0 and mesh.dp_rank == 0:
        torch.save(
            {"losses": losses, "norms": norms, "gradients": gradients, "weights": weights,
             "initial": initial},
            directory / f"{case.name}.{mesh.pp_rank}.pt",
        )  # fmt: skip


def full(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Whole tensors, without vocabulary padding."""
    whole = {}
    for name, tensor in tensors.items():
        assert isinstance(tensor, DTensor), name
        values = tensor.detach().full_tensor().clone()
        whole[name] = values[:VOCAB] if values.shape[0] == 136 else values
    return whole


@lru_cache(maxsize=8)
def expected(finetuning: Finetuning, kv_heads: int) -> dict[str, object]:
    """The oracle's three steps from the product's own initial weights."""
    layout = Layout("reference", kv_heads=kv_heads)
    case = Case(layout, finetuning)
    initial = full(named_parameters(make_step(case, build_mesh(torch.device("cpu"), 1, 1)).stages))
    leaves = {name: w.clone() for name, w in initial.items()}
    trained = {n: w.requires_grad_() for n, w in leaves.items() if finetuning.trains(n)}
    optimizer = torch.optim.AdamW(
        [
            {"params": [w for n, w in trained.items() if "layernorm" not in n]},
            {"params": [w for n, w in trained.items() if "layernorm" in n], "weight_decay": 0.0},
        ],
        lr=LR,
        weight_decay=WEIGHT_DECAY,
    )
    losses, norms, first = [], [], {}
    for rows in make_steps(False):
        documents = [
            oracle.NoisyDocument(
                torch.from_numpy(d.ids).long(), torch.from_numpy(d.labels).long(),
                torch.from_numpy(d.noise.masked), divisors(d.noise),
            )
            for row in rows
            for d in row
        ]  # fmt: skip
        optimizer.zero_grad()
        value = oracle.loss(merged(leaves, finetuning), layout.arch, documents, BLOCK, MASK_ID)
        value.backward()
        first = first or {name: w.grad.clone() for name, w in trained.items()}
        norms.append(float(torch.nn.utils.clip_grad_norm_(trained.values(), MAX_GRAD_NORM)))
        optimizer.step()
        losses.append(float(value.detach()))
    weights = {name: w.detach() for name, w in leaves.items()}
    return {
        "losses": losses, "norms": norms, "gradients": first, "weights": weights,
        "initial": initial,
    }  # fmt: skip


def merged(weights: dict[str, Tensor], finetuning: Finetuning) -> dict[str, Tensor]:
    """Each adapted weight with its update added."""
    plain = {name: w for name, w in weights.items() if ".lora_" not in name}
    if finetuning.lora is None:
        return plain
    lora = finetuning.lora
    scale = lora.alpha / (lora.rank**0.5 if lora.rslora else lora.rank)
    for name in weights:
        if ".lora_A." in name:
            module = name.removesuffix(".lora_A.weight")
            update = weights[f"{module}.lora_B.weight"] @ weights[name]
            plain[f"{module}.weight"] = plain[f"{module}.weight"] + scale * update
    return plain
