"""Whole runs in which one rank is slow, inside the ranks of a spawned world."""

from __future__ import annotations

import io
import time
from collections.abc import Callable
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist

from megatron_sdar.config import load_config, validate
from megatron_sdar.data.loading.loader import RowLoader
from megatron_sdar.optim.adamw import ShardedAdamW
from megatron_sdar.parallel.mesh import build_mesh
from megatron_sdar.training import rank_times, slow_ranks, step
from megatron_sdar.training.run import TrainingRun
from megatron_sdar.training.setup import resolve_architecture

SECONDS = 0.4


def _sleeps_before(function: Callable[..., Any]) -> Callable[..., Any]:
    def sleepy(*arguments: Any, **keywords: Any) -> Any:
        time.sleep(SECONDS)
        return function(*arguments, **keywords)

    return sleepy


def slow_in(what: str) -> Any:
    """A patch that makes this rank slow."""
    if what == "rows":
        return mock.patch.object(RowLoader, "next_step", _sleeps_before(RowLoader.next_step))
    if what == "moving":
        return mock.patch.object(step, "to_device", _sleeps_before(step.to_device))
    if what == "update":
        return mock.patch.object(ShardedAdamW, "step", _sleeps_before(ShardedAdamW.step))
    assert what == "products"
    measure = slow_ranks.measure_products
    return mock.patch.object(
        slow_ranks, "measure_products", lambda *arguments: 100 * measure(*arguments)
    )


def run_with_slow_rank(arguments: list[str], rank: int, what: str) -> None:
    """Train as the entry script does; what rank 0 prints lies beside its output."""
    with slow_in(what) if dist.get_rank() == rank else mock.MagicMock():
        _run(arguments)


def run_alike(arguments: list[str]) -> None:
    """A run by clocks that go on by the same amount whenever they are looked at."""
    now = iter(range(10**9))
    clock = mock.Mock(monotonic=lambda: float(next(now)), perf_counter=lambda: float(next(now)))
    with (
        mock.patch.object(rank_times, "time", clock),
        # Its default is bound when the class is made.
        mock.patch.object(rank_times.PhaseClock.__init__, "__defaults__", (clock.monotonic,)),
    ):
        _run(arguments)


def _run(arguments: list[str]) -> None:
    config = load_config(arguments)
    arch = resolve_architecture(config)
    validate(config, arch, dist.get_world_size())
    parallel = config.parallel
    mesh = build_mesh(
        torch.device("cpu"),
        parallel.tensor_model_parallel_size,
        parallel.pipeline_model_parallel_size,
        False,
    )
    printed = io.StringIO()
    with redirect_stdout(printed):
        TrainingRun(config, arch, mesh).run()
    if mesh.is_main:
        (Path(config.training.output_dir) / "printed.txt").write_text(printed.getvalue())
