"""Copies of weights on several ranks, with one bit of one copy flipped."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.distributed as dist
from distributed.layouts import LR, Layout, build, make_steps, micro_batches
from distributed.skipped_runs import Faults, run_with_faults

from megatron_sdar.model.sdar import EMBEDDING, HEAD
from megatron_sdar.optim.adamw import ShardedAdamW
from megatron_sdar.parallel.mesh import build_mesh
from megatron_sdar.parallel.sharding import local_tensor
from megatron_sdar.parallel.weight_hash import WeightCopies
from megatron_sdar.training.step import named_parameters


def compare_copies(layout: Layout, name: str, rank: int, directory: Path) -> None:
    """Copies before and after a step, then with the last bit of one rank's first element flipped.

    Every rank writes what it found.
    """
    mesh = build_mesh(torch.device("cpu"), layout.tp, layout.pp, layout.strategy == "no_shard")
    step, _ = build(layout, mesh)
    same = {HEAD: EMBEDDING} if layout.tied else {}
    copies = WeightCopies(named_parameters(step.stages), mesh, same)
    found = [copies.differences()]
    step.run(micro_batches(layout, make_steps(False)[0], mesh.dp_rank), LR)
    found.append(copies.differences())
    if dist.get_rank() == rank:
        parameters = named_parameters(step.stages)
        place = name if name in parameters else HEAD
        local_tensor(parameters[place]).detach().view(-1)[:1].view(torch.int64).bitwise_xor_(1)
    found.append(copies.differences())
    result = {
        "shared": copies.num_shared,
        "found": [[each.describe() for each in differences] for differences in found],
    }
    (directory / f"{layout.name}-{dist.get_rank()}.json").write_text(json.dumps(result))


def run_with_a_flipped_bit(arguments: Sequence[str], step: int, rank: int) -> None:
    """A run in which an update of one rank goes wrong in one bit."""
    from unittest import mock

    original, count = ShardedAdamW.step, {"steps": 0}

    def update(optimizer: ShardedAdamW, gradients: dict[str, torch.Tensor], lr: float) -> None:
        original(optimizer, gradients, lr)
        count["steps"] += 1
        if count["steps"] == step and dist.get_rank() == rank:
            shard = optimizer.shards["model.norm.weight"]
            shard.view(-1)[5:6].view(torch.int32).bitwise_xor_(1 << 12)

    with mock.patch.object(ShardedAdamW, "step", update):
        run_with_faults(arguments, Faults())
