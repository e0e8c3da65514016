"""What the loop hands out: its reporter, its evaluations and its results files."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

from megatron_sdar.config import SdarConfig, to_flat_dict
from megatron_sdar.data.loading.loader import RowLoader
from megatron_sdar.parallel.launch import run_on_main
from megatron_sdar.parallel.mesh import ParallelMesh
from megatron_sdar.training.evaluation import Evaluator
from megatron_sdar.training.metrics import Reporter
from megatron_sdar.training.results import (
    EVAL_RESULTS_NAME,
    TRAIN_RESULTS_NAME,
    train_results,
    write_results,
)
from megatron_sdar.training.step_log import StepLog
from megatron_sdar.training.trackers import open_trackers


def open_reporter(
    config: SdarConfig, mesh: ParallelMesh, total: int, done: int, say: Callable[[str], None]
) -> AbstractContextManager[Reporter | None]:
    """The reporter, on rank 0. Collective: broadcast_object_list (world)."""
    output_dir = Path(config.training.output_dir)

    def make() -> Reporter:
        trackers = open_trackers(config.reporting, output_dir, to_flat_dict(config), done, say)
        return Reporter(output_dir, total, done, trackers)

    made: list[Reporter] = []
    run_on_main(lambda: made.append(make()), mesh)
    return made[0] if made else nullcontext()


def evaluate(
    evaluator: Evaluator, reporter: Reporter | None, output_dir: Path, done: int, epoch: float
) -> dict[str, float]:
    """The metrics after `done` steps, shown and written on rank 0. Collectives: the evaluator's."""
    if reporter is None:
        return evaluator.run(done, lambda rows: None)
    with reporter.evaluating(evaluator.num_rows) as advance:
        metrics = evaluator.run(done, advance)
    reporter.log_evaluation(done, epoch, metrics)
    write_results(output_dir, EVAL_RESULTS_NAME, {"epoch": epoch, **metrics})
    return metrics


def write_train_results(
    config: SdarConfig,
    mesh: ParallelMesh,
    loader: RowLoader,
    log: StepLog,
    rows: float,
    seconds: float,
) -> None:
    """Write train_results.json of what this start of the run trained (rank 0).

    Args:
        rows, seconds: what it took, see `train_results`.
    """
    effective = None
    if config.reporting.include_effective_tokens_per_second:
        effective = rows * config.data.cutoff_len / mesh.world_size
    results = train_results(
        epoch=loader.epoch,
        train_loss=log.loss / log.steps,
        seconds=seconds,
        rows=rows,
        steps=log.steps,
        flops=log.logged.work.flops,
        effective_tokens=effective,
    )
    write_results(Path(config.training.output_dir), TRAIN_RESULTS_NAME, results)
