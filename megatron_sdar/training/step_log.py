"""From the steps of a run to the records of its log: sums, clocks and what they come to."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

from megatron_sdar.architecture import Architecture
from megatron_sdar.config import SdarConfig
from megatron_sdar.data.loading.loader import RowLoader
from megatron_sdar.diffusion.rows import Row
from megatron_sdar.parallel.mesh import ParallelMesh
from megatron_sdar.parallel.watchdog import Watchdog
from megatron_sdar.training.finetuning import resolve_finetuning
from megatron_sdar.training.metrics import StepRecord
from megatron_sdar.training.precision import precision
from megatron_sdar.training.rank_times import PhaseClock
from megatron_sdar.training.slow_ranks import SlowRanks
from megatron_sdar.training.step import StepResult
from megatron_sdar.training.work_meter import WorkCounts, WorkMeter, measure_peak, memory_mb

NOTHING = WorkCounts(0, 0, 0, 0)


@dataclass
class Interval:
    """Sums since the last logged step, which a checkpoint keeps.

    Attributes:
        epoch: where it began.
        steps, loss: of the steps that were not skipped.
        grad_norm: of the last of these.
    """

    epoch: float
    steps: int = 0
    loss: float = 0.0
    work: WorkCounts = NOTHING
    grad_norm: float | None = None


@dataclass
class Throughput:
    """What this start of the run did, and in which time: what rates are made of.

    Less than an interval, which on a resume has sums of earlier steps, whose time nobody knows.
    """

    seconds: float = 0.0
    label_tokens: int = 0
    work: WorkCounts = NOTHING

    def add(self, other: Throughput) -> None:
        self.seconds += other.seconds
        self.label_tokens += other.label_tokens
        self.work += other.work


class StepLog:
    """Adds up steps and turns them into records; alike on every rank.

    Attributes:
        device: this rank's.
        peak: FLOPs per second of all ranks that MFU is relative to; None: not reported.
        steps, loss: sums over the steps since this object was made, for the results.
        logged: what its records are of, without what was resumed.
        left_out: sum over its records.
        total_flops: of all steps of the run.
    """

    def __init__(
        self, config: SdarConfig, arch: Architecture, mesh: ParallelMesh, loader: RowLoader
    ) -> None:
        """Collectives: those of measure_peak and SlowRanks, if there is need."""
        self._loader, self._mesh = loader, mesh
        self._meter = WorkMeter(
            arch,
            trimmed=config.diffusion.semantics == "exact",
            finetuning=resolve_finetuning(config.finetuning, arch.num_hidden_layers),
        )
        self._published = (1 + config.diffusion.noisy_views) * config.data.cutoff_len
        self.device = mesh.device
        self.peak = _peak(config, mesh)
        self._phases = PhaseClock()
        self._ranks = _slow_ranks(config, mesh, self._phases)
        self._interval, self._own = Interval(loader.epoch), Throughput()
        self.begin()
        self.steps, self.loss, self.logged = 0, 0.0, Throughput()
        self.left_out, self.total_flops = 0, 0

    def begin(self, watchdog: Watchdog | None = None) -> None:
        """Start the clocks: training begins now, and the watchdog hears of its phases."""
        if watchdog is not None:
            watchdog.listener = self._phases.begin
        self._mark, self._waited = time.monotonic(), self._loader.wait_seconds

    def add(self, rows: Sequence[Row], result: StepResult) -> None:
        """Count a step."""
        self._interval.steps += 1
        self._interval.loss += result.loss
        self._interval.grad_norm = result.grad_norm
        self._own.label_tokens += result.label_tokens
        self._meter.add(rows)
        self.steps += 1
        self.loss += result.loss

    def skip(self, rows: Sequence[Row]) -> None:
        """Count the work of a step that was skipped: it has no part in the losses."""
        self._meter.add(rows)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Time in here is no training: saving, evaluating."""
        started = time.monotonic()
        yield
        self._mark += time.monotonic() - started

    def _count_work(self) -> None:
        """Sum what the rows since the last call hold. Collective: all_reduce (dp)."""
        work = self._meter.take(self._mesh)
        self._interval.work += work
        self._own.work += work
        self.total_flops += work.flops

    def record(self, done: int, lr: float, skipped_steps: int = 0) -> StepRecord:
        """The record of the steps since the last one.

        Args:
            lr: of the step that is done.
            skipped_steps: of the whole run so far.

        Collectives: all_reduce (dp), and that of `SlowRanks.compare`.
        """
        now, loader = time.monotonic(), self._loader
        waiting = loader.wait_seconds - self._waited
        self._own.seconds = now - self._mark
        self._count_work()
        interval, own = self._interval, self._own
        # Where groups of rows are packed anew, one of them took a share of its group's rows.
        published = round((loader.epoch - interval.epoch) * loader.num_rows * self._published)
        left_out = max(0, published - interval.work.tokens)
        self.logged.add(own)
        self.left_out += left_out
        self._mark, self._waited = now, loader.wait_seconds
        self._interval, self._own = Interval(loader.epoch), Throughput()
        return StepRecord(
            step=done,
            loss=interval.loss / interval.steps if interval.steps else None,
            grad_norm=interval.grad_norm,
            lr=lr,
            epoch=loader.epoch,
            label_tokens_per_s=own.label_tokens / own.seconds,
            row_tokens_per_s=own.work.tokens / own.seconds,
            data_wait_share=waiting / own.seconds,
            work=interval.work,
            left_out=left_out,
            mfu=self.mfu(own),
            memory_mb=memory_mb(self.device),
            skipped_steps=skipped_steps,
            ranks=None if self._ranks is None else self._ranks.compare(own.seconds),
        )

    def mfu(self, done: Throughput) -> float | None:
        """Model FLOPs per second over the peak; None: not reported."""
        return None if self.peak is None else done.work.flops / done.seconds / self.peak

    def describe(self) -> str:
        """What the numbers of a record are relative to."""
        lines = (
            "answer tok/s: label tokens trained, of: all tokens computed (noisy, clean, padding; "
            "trainer_log.jsonl has each, and what exact left out) per second"
        )
        if self.peak is None:
            return lines
        return (
            f"{lines}\nMFU: model FLOPs (kept tokens, allowed pairs, nothing recomputed) over "
            f"{self.peak / 1e12:,.3g} TFLOP/s, what matrix products of all processes reach together"
        )

    def state_dict(self) -> dict[str, Any]:
        """The sums behind the next log line. Collective: all_reduce (dp)."""
        self._count_work()
        return asdict(self._interval) | {"total_flops": self.total_flops}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a checkpoint's sums."""
        # Older checkpoints counted no work and kept no norm.
        work = WorkCounts(**state["work"]) if "work" in state else NOTHING
        epoch = state.get("epoch", self._loader.epoch)
        self._interval = Interval(
            epoch, state["steps"], state["loss"], work, state.get("grad_norm")
        )
        self.total_flops = state.get("total_flops", 0)


def _slow_ranks(config: SdarConfig, mesh: ParallelMesh, clock: PhaseClock) -> SlowRanks | None:
    factor = config.reporting.slow_rank_factor
    if not factor or mesh.world_size == 1:
        return None
    dtypes = precision(config)
    return SlowRanks(mesh, factor, dtypes.compute or dtypes.params, clock)


def _peak(config: SdarConfig, mesh: ParallelMesh) -> float | None:
    reporting = config.reporting
    if not reporting.report_mfu:
        return None
    if reporting.peak_tflops_per_device is not None:
        return reporting.peak_tflops_per_device * 1e12 * mesh.world_size
    dtypes = precision(config)
    return measure_peak(mesh, dtypes.compute or dtypes.params)
