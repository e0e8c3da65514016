"""What the user watches: progress, trainer_log.jsonl, the summary. Rank 0 only.

On a terminal a progress bar; otherwise one plain line per logged step. Before a run starts,
`trim_log` drops log lines beyond the step it resumes from, so no step is logged twice.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from rich.console import Console, RenderableType
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.text import Text

from megatron_sdar.training.output_files import LogFile, replace_text
from megatron_sdar.training.plot import read_log
from megatron_sdar.training.slow_ranks import RankSpread
from megatron_sdar.training.trackers import Trackers
from megatron_sdar.training.work_meter import WorkCounts

LOG_NAME = "trainer_log.jsonl"

Advance = Callable[[int], None]
# What trackers plot; the rest of a record counts and names.
_TRACKED = (
    "loss", "grad_norm", "lr", "epoch", "label_tokens_per_s", "row_tokens_per_s",
    "data_wait_share", "memory_mb", "mfu", "skipped_steps", "own_time_factor", "products_factor",
)  # fmt: skip


@dataclass(frozen=True)
class StepRecord:
    """One logged step; `loss` and the rates are means since the previous one.

    Attributes:
        step: optimizer steps done, skipped ones among them.
        loss, grad_norm: None when all steps since the previous record were skipped.
        lr: learning rate this step used.
        epoch: passes over the data after this step.
        label_tokens_per_s: answer tokens trained per second.
        row_tokens_per_s: all positions computed per second, noisy, clean and padding.
        data_wait_share: fraction of the time spent waiting for rows.
        work: tokens computed since the previous record, and their FLOPs.
        left_out: tokens that the published form of these documents has and exact left out.
        mfu: model FLOPs per second over the peak; None: not reported.
        memory_mb: the most memory that this process has held, MiB.
        skipped_steps: steps of the run so far whose loss or gradient was not finite.
        ranks: how far they differ in speed; None: not compared.
    """

    step: int
    loss: float | None
    grad_norm: float | None
    lr: float
    epoch: float
    label_tokens_per_s: float
    row_tokens_per_s: float
    data_wait_share: float
    work: WorkCounts
    left_out: int
    mfu: float | None
    memory_mb: float
    skipped_steps: int = 0
    ranks: RankSpread | None = None


def trim_log(path: Path, start_step: int, evaluates_again: bool = False) -> None:
    """Keep a JSONL file's records up to `start_step`; a fresh run (0) starts an empty one.

    Args:
        evaluates_again: what was evaluated at `start_step` goes, too.

    Raises:
        ValueError: the file is damaged, or cannot be written.
    """
    kept = []
    if start_step and path.exists():
        # What is logged before the first step belongs to the run that a fresh start replaces.
        kept = [record for record in read_log(path) if record["step"] <= start_step]
        if evaluates_again:
            kept = [r for r in kept if r["step"] < start_step or "lr" in r]
    if not kept and not path.exists():
        return
    replace_log(path, kept)


def replace_log(path: Path, records: Iterable[Mapping[str, Any]]) -> None:
    """Write a JSONL file anew, all or nothing (ValueError: it cannot be written)."""
    replace_text(path, "".join(json.dumps(r) + "\n" for r in records))


class TrainingProgress(Progress):
    """Bars, and below them what the last logged step said, in as many lines as it takes."""

    status = ""

    def get_renderables(self) -> Iterable[RenderableType]:
        yield from super().get_renderables()
        if self.status:
            yield Text("  " + self.status, style="dim")


class Reporter:
    """Writes the log and shows progress; a context manager.

    Args:
        output_dir: where trainer_log.jsonl lies.
        total_steps: last step of the run.
        start_step: steps already done (resume).
        trackers: hear of every record.
        console: where to show; default: stdout.
        clock: the time in seconds.
    """

    def __init__(
        self,
        output_dir: Path,
        total_steps: int,
        start_step: int,
        trackers: Trackers,
        console: Console | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._trackers = trackers
        self.log_path = output_dir / LOG_NAME
        self.total_steps = total_steps
        self.start_step = start_step
        self._now = clock
        self.started = clock()
        self._log: LogFile | None = None
        self._console = console or Console()
        self._progress: TrainingProgress | None = None
        self._task = TaskID(0)

    def __enter__(self) -> Reporter:
        self._log = LogFile(self.log_path, self.say)
        if self._console.is_terminal:
            self._progress = TrainingProgress(
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TimeElapsedColumn(),
                TimeRemainingColumn(),
                console=self._console,
                get_time=self._now,
            )
            self._task = self._progress.add_task(
                "training", total=self.total_steps, completed=self.start_step
            )
            self._progress.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._progress is not None:
            self._progress.stop()
        if self._log is not None:
            self._log.close()
        self._trackers.close(failed=error is not None)

    def advance(self, step: int) -> None:
        """Move the bar; called every step."""
        if self._progress is not None:
            self._progress.update(self._task, completed=step)

    def log(self, record: StepRecord) -> None:
        """Append a record and show it."""
        elapsed = self._now() - self.started
        done = record.step - self.start_step
        remaining = elapsed / done * (self.total_steps - record.step)
        line: dict[str, Any] = {"step": record.step}
        known = {"loss": record.loss, "grad_norm": record.grad_norm}
        line |= {name: value for name, value in known.items() if value is not None}
        line |= {
            "lr": record.lr,
            "epoch": round(record.epoch, 6),
            "current_steps": record.step,
            "total_steps": self.total_steps,
            "percentage": round(100 * record.step / self.total_steps, 2),
            "elapsed_time": _clock(elapsed),
            "remaining_time": _clock(remaining),
            "label_tokens_per_s": round(record.label_tokens_per_s, 1),
            "row_tokens_per_s": round(record.row_tokens_per_s, 1),
            "data_wait_share": round(record.data_wait_share, 6),
            "noisy_tokens": record.work.noisy,
            "clean_tokens": record.work.clean,
            "padding_tokens": record.work.padding,
            "left_out_tokens": record.left_out,
            "memory_mb": round(record.memory_mb, 1),
            "skipped_steps": record.skipped_steps,
        }
        if record.mfu is not None:
            line["mfu"] = round(record.mfu, 6)
        if record.ranks is not None:
            line |= record.ranks.numbers
        self._write(line)
        self._trackers.log(
            record.step, {f"train/{name}": line[name] for name in _TRACKED if name in line}
        )
        status = "skipped"
        if record.loss is not None and record.grad_norm is not None:
            status = f"loss {record.loss:.4f}  norm {record.grad_norm:.3f}"
        status += (
            f"  lr {record.lr:.2e}  "
            f"{record.label_tokens_per_s:,.0f} answer tok/s of "
            f"{record.row_tokens_per_s:,.0f}"
        )
        if record.mfu is not None:
            status += f"  MFU {record.mfu:.0%}"
        status += f"  {record.memory_mb / 1024:.1f} GiB"
        if record.skipped_steps:
            status += f"  {record.skipped_steps} skipped"
        if self._progress is not None:
            self._progress.status = status
            self._progress.update(self._task, completed=record.step)
        else:
            width = len(str(self.total_steps))
            self.say(
                f"step {record.step:>{width}}/{self.total_steps}  epoch {record.epoch:.3f}  "
                f"{status}  left {_clock(remaining)}"
            )
        if record.ranks is not None and record.ranks.warning is not None:
            self.say(record.ranks.warning)

    def log_evaluation(self, step: int, epoch: float, metrics: Mapping[str, float]) -> None:
        """Append a record of an evaluation and show its totals."""
        line: dict[str, Any] = {
            "step": step,
            "current_steps": step,
            "total_steps": self.total_steps,
            "epoch": round(epoch, 6),
            "percentage": round(100 * step / self.total_steps, 2),
            "elapsed_time": _clock(self._now() - self.started),
        }
        self._write(line | dict(metrics))
        tracked = {f"eval/{name.removeprefix('eval_')}": value for name, value in metrics.items()}
        self._trackers.log(step, tracked)
        width = len(str(self.total_steps))
        totals = "  ".join(
            f"{name} {value:.4f}"
            for name, value in metrics.items()
            if not re.search(r"_t[\d.]+$|_num_generated$|_runtime$", name)
        )
        self.say(f"eval {step:>{width}}/{self.total_steps}  {totals}")

    def _write(self, line: Mapping[str, Any]) -> None:
        assert self._log is not None, "the reporter is entered"
        self._log.append(line)

    @contextmanager
    def evaluating(self, num_rows: int) -> Iterator[Advance]:
        """A second bar while an evaluation runs; what moves it."""
        if self._progress is None:
            yield lambda rows: None
            return
        task = self._progress.add_task("evaluation", total=num_rows)
        progress = self._progress

        def advance(rows: int) -> None:
            progress.advance(task, rows)

        try:
            yield advance
        finally:
            progress.remove_task(task)

    def view(self) -> RenderableType:
        """What a terminal shows now; empty elsewhere."""
        return "" if self._progress is None else self._progress.get_renderable()

    def say(self, text: str) -> None:
        """Print a line without disturbing the bar."""
        self._console.print(text, highlight=False, markup=False, soft_wrap=True)


def _clock(seconds: float) -> str:
    whole = int(seconds)
    return f"{whole // 3600}:{whole // 60 % 60:02d}:{whole % 60:02d}"
