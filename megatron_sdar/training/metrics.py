"""What the user watches: progress, trainer_log.jsonl, the summary. Rank 0 only.

On a terminal a progress bar; otherwise one plain line per logged step. Before a run starts,
`trim_log` drops log lines beyond the step it resumes from, so no step is logged twice.
"""

from __future__ import annotations

import json
import os
import time
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TextIO

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from megatron_sdar.training.plot import read_log

LOG_NAME = "trainer_log.jsonl"


@dataclass(frozen=True)
class StepRecord:
    """One logged step; `loss` and the rates are means since the previous one.

    Attributes:
        step: optimizer steps done.
        lr: learning rate this step used.
        epoch: passes over the data after this step.
        label_tokens_per_s: answer tokens trained per second.
        row_tokens_per_s: all positions computed per second, noisy, clean and padding.
        data_wait_share: fraction of the time spent waiting for rows.
    """

    step: int
    loss: float
    grad_norm: float
    lr: float
    epoch: float
    label_tokens_per_s: float
    row_tokens_per_s: float
    data_wait_share: float


def trim_log(output_dir: Path, start_step: int) -> None:
    """Keep the log's records up to `start_step`; a fresh run (0) starts an empty log.

    Raises:
        ValueError, OSError: the log is damaged, or cannot be written.
    """
    path = output_dir / LOG_NAME
    kept = []
    if start_step and path.exists():
        kept = [record for record in read_log(path) if record["step"] <= start_step]
    temporary = path.with_suffix(".jsonl.tmp")
    temporary.write_text("".join(json.dumps(r) + "\n" for r in kept), encoding="utf-8")
    os.replace(temporary, path)


class Reporter:
    """Writes the log and shows progress; a context manager.

    Args:
        output_dir: where trainer_log.jsonl lies.
        total_steps: last step of the run.
        start_step: steps already done (resume).
    """

    def __init__(self, output_dir: Path, total_steps: int, start_step: int) -> None:
        self.log_path = output_dir / LOG_NAME
        self.total_steps = total_steps
        self.start_step = start_step
        self.started = time.monotonic()
        self._log: TextIO | None = None
        self._console = Console()
        self._progress: Progress | None = None
        self._task = TaskID(0)

    def __enter__(self) -> Reporter:
        self._log = self.log_path.open("a", encoding="utf-8")
        if self._console.is_terminal:
            self._progress = Progress(
                TextColumn("training"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.fields[status]}"),
                TimeElapsedColumn(),
                TimeRemainingColumn(),
                console=self._console,
            )
            self._task = self._progress.add_task(
                "training", total=self.total_steps, completed=self.start_step, status=""
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

    def advance(self, step: int) -> None:
        """Move the bar; called every step."""
        if self._progress is not None:
            self._progress.update(self._task, completed=step)

    def log(self, record: StepRecord) -> None:
        """Append a record and show it."""
        assert self._log is not None, "the reporter is entered"
        elapsed = time.monotonic() - self.started
        done = record.step - self.start_step
        remaining = elapsed / done * (self.total_steps - record.step)
        line = {
            "step": record.step,
            "loss": record.loss,
            "grad_norm": record.grad_norm,
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
        }
        self._log.write(json.dumps(line) + "\n")
        self._log.flush()
        status = (
            f"loss {record.loss:.4f}  norm {record.grad_norm:.3f}  lr {record.lr:.2e}  "
            f"{record.label_tokens_per_s:,.0f} answer tok/s"
        )
        if self._progress is not None:
            self._progress.update(self._task, completed=record.step, status=status)
        else:
            width = len(str(self.total_steps))
            self.say(
                f"step {record.step:>{width}}/{self.total_steps}  epoch {record.epoch:.3f}  "
                f"{status}  left {_clock(remaining)}"
            )

    def say(self, text: str) -> None:
        """Print a line without disturbing the bar."""
        self._console.print(text, highlight=False, markup=False, soft_wrap=True)


def _clock(seconds: float) -> str:
    whole = int(seconds)
    return f"{whole // 3600}:{whole // 60 % 60:02d}:{whole % 60:02d}"
