"""Runs with steps that are not finite, inside the ranks of a spawned world.

A fault is put where hardware would put it: into one rank's gradient, after backward. A run in
which a step is left out by construction never computes it at all.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist

from megatron_sdar.config import load_config, validate
from megatron_sdar.data.loading.loader import RowLoader
from megatron_sdar.parallel.gradients import local_gradients
from megatron_sdar.parallel.mesh import build_mesh
from megatron_sdar.training.run import TrainingRun
from megatron_sdar.training.setup import resolve_architecture
from megatron_sdar.training.step import StepResult, TrainingStep


@dataclass(frozen=True)
class Faults:
    """Steps, counted from 1.

    Attributes:
        poisoned: step -> the rank whose gradient gets one element that is not a number.
        left_out: steps that are never computed.
    """

    poisoned: Mapping[int, int] = field(default_factory=dict)
    left_out: Sequence[int] = ()


@contextmanager
def in_place(faults: Faults) -> Iterator[None]:
    """Steps in here have these faults."""
    now = {"step": 0}
    next_step, backward, run = RowLoader.next_step, TrainingStep.backward, TrainingStep.run

    def counted(loader: RowLoader) -> Any:
        rows = next_step(loader)
        now["step"] = loader.position // loader.rows_per_step
        return rows

    def poisoned(step: TrainingStep, rows: Any) -> Any:
        result = backward(step, rows)
        if faults.poisoned.get(now["step"]) == dist.get_rank():
            name = sorted(step.parameters)[0]
            local_gradients(step.parameters)[name].view(-1)[0] = math.nan
        return result

    def left_out(step: TrainingStep, rows: Any, lr: float) -> StepResult:
        if now["step"] in faults.left_out:
            return StepResult(1.0, 1.0, 0)
        return run(step, rows, lr)

    with (
        mock.patch.object(RowLoader, "next_step", counted),
        mock.patch.object(TrainingStep, "backward", poisoned),
        mock.patch.object(TrainingStep, "run", left_out),
    ):
        yield


def run_with_faults(arguments: Sequence[str], faults: Faults) -> None:
    """Train as the entry script does; what ends the run early is written beside its output."""
    config = load_config(arguments)
    arch = resolve_architecture(config)
    validate(config, arch, dist.get_world_size())
    parallel = config.parallel
    mesh = build_mesh(
        torch.device("cpu"),
        parallel.tensor_model_parallel_size,
        parallel.pipeline_model_parallel_size,
        parallel.data_parallel_sharding_strategy == "no_shard",
    )
    said: list[str] = []
    run = TrainingRun(config, arch, mesh)
    run.say = said.append
    with in_place(faults):
        try:
            run.run()
        except (FloatingPointError, ValueError) as error:
            said.append(f"error: {error}")
    output = Path(config.training.output_dir)
    (output / f"said-{dist.get_rank()}.txt").write_text("\n".join(said))


def keep_only(folder: Path, source: str, target: str, step: int) -> None:
    """Start TARGET from one checkpoint of SOURCE, and its log (on rank 0)."""
    if dist.get_rank() == 0:
        name = f"checkpoint-{step}"
        shutil.copytree(folder / source / name, folder / target / name)
        shutil.copy(folder / source / "trainer_log.jsonl", folder / target)
    dist.barrier()


def keep_text(output: Path) -> None:
    """Keep what the first start said apart from what the second one will."""
    path = output / f"said-{dist.get_rank()}.txt"
    path.rename(path.with_name(f"first-{path.name}"))
