"""Losses of several runs beside each other, from their trainer_log.jsonl.

Runs are compared over the last steps that all of them have. The loss of one step is noisy (few
documents, weights 1/p), so a difference of means says something only beside its standard error,
which comes from the scatter of the logged losses within each run.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

from megatron_sdar.training.metrics import LOG_NAME
from megatron_sdar.training.plot import read_log


@dataclass(frozen=True)
class RunLosses:
    """What one run logged.

    Attributes:
        name: its folder's.
        steps: int64 [n], ascending.
        losses: float64 [n], each the mean since the step before it.
    """

    name: str
    steps: NDArray[np.int64]
    losses: NDArray[np.float64]


@dataclass(frozen=True)
class RunComparison:
    """One run against the first.

    Attributes:
        last_step: of the run.
        first_compared, last_compared: steps that the mean is taken over, the same for all runs.
        mean, error: of the loss there, and its standard error.
        difference: mean minus that of the first run; 0 for itself.
        difference_error: standard error of the difference, both runs' noise; 0 for itself.
    """

    name: str
    last_step: int
    first_compared: int
    last_compared: int
    mean: float
    error: float
    difference: float
    difference_error: float

    @property
    def errors_apart(self) -> float:
        """The difference in standard errors; nan for the first run."""
        return self.difference / self.difference_error if self.difference_error else math.nan


def read_losses(run: Path) -> RunLosses:
    """The logged losses of a run.

    Args:
        run: its output_dir.

    Raises:
        ValueError: there is no log, it is damaged or empty, or a record has no loss.
    """
    path = run / LOG_NAME
    if not path.is_file():
        raise ValueError(f"{path} is missing: give the output_dir of a run that has logged steps")
    numbered = [
        (number, record)
        for number, record in enumerate(read_log(path), start=1)
        if not _has_no_loss(record)
    ]
    if not numbered:
        raise ValueError(f"{path} holds no logged step: train further, or lower logging_steps")
    for number, record in numbered:
        if type(record.get("loss")) not in (int, float):
            raise ValueError(
                f"{path}:{number}: a record needs step and loss; give a log that this trainer wrote"
            )
    records = [record for _, record in numbered]
    return RunLosses(
        run.name or str(run),
        np.array([record["step"] for record in records], dtype=np.int64),
        np.array([record["loss"] for record in records], dtype=np.float64),
    )


def _has_no_loss(record: Mapping[str, object]) -> bool:
    """An evaluation's record, or one of steps that were all skipped."""
    return "eval_loss" in record or ("loss" not in record and bool(record.get("skipped_steps")))


def compare_runs(runs: Sequence[RunLosses], last: int) -> list[RunComparison]:
    """Mean losses over the last steps that all runs have, and their differences to the first run.

    Args:
        runs: at least one.
        last: how many steps.

    Raises:
        ValueError: a run has fewer than two logged losses among them.
    """
    assert runs, "a comparison needs a run"
    end = min(int(run.steps[-1]) for run in runs)
    start = max(1, end - last + 1)
    compared: list[RunComparison] = []
    for run in runs:
        losses = run.losses[(run.steps >= start) & (run.steps <= end)]
        if losses.size < 2:
            raise ValueError(
                f"{run.name} has {losses.size} logged losses in steps {start} to {end}, a mean "
                "and its error need 2: give a larger --last, or train with smaller logging_steps"
            )
        mean = float(losses.mean())
        error = float(losses.std(ddof=1)) / math.sqrt(losses.size)
        first = compared[0] if compared else None
        compared.append(
            RunComparison(
                name=run.name,
                last_step=int(run.steps[-1]),
                first_compared=start,
                last_compared=end,
                mean=mean,
                error=error,
                difference=0.0 if first is None else mean - first.mean,
                difference_error=0.0 if first is None else math.hypot(error, first.error),
            )
        )
    return compared


def running_mean(run: RunLosses, window: int) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Means of `window` losses in a row, each at the step in its middle.

    Returns:
        Steps and means [n - window + 1]; none when the run is shorter than a window.
    """
    if run.losses.size < window:
        return run.steps[:0], run.losses[:0]
    sums = np.concatenate([[0.0], np.cumsum(run.losses)])
    means = (sums[window:] - sums[:-window]) / window
    first = (window - 1) // 2
    return run.steps[first : first + means.size], means


def show_comparison(compared: Sequence[RunComparison], console: Console) -> None:
    """Print the table."""
    start, end = compared[0].first_compared, compared[0].last_compared
    table = Table(
        "run", "steps", f"mean loss, steps {start}-{end}", "to the first run", "in standard errors"
    )
    for each in compared:
        own = each is compared[0]
        table.add_row(
            each.name,
            str(each.last_step),
            f"{each.mean:.4f} +- {each.error:.4f}",
            "" if own else f"{each.difference:+.4f} +- {each.difference_error:.4f}",
            "" if own else f"{each.errors_apart:+.2f}",
        )
    console.print(table)


def plot_comparison(runs: Sequence[RunLosses], window: int, path: Path) -> None:
    """Write all loss curves as PNG: every logged loss a faint dot, running means lines."""
    from matplotlib.figure import Figure

    chart = Figure(figsize=(7.0, 4.0), layout="constrained")
    axes = chart.subplots()
    for number, run in enumerate(runs):
        color = f"C{number}"
        axes.plot(run.steps, run.losses, ".", color=color, alpha=0.25, markersize=2)
        axes.plot(*running_mean(run, window), color=color, label=run.name)
    axes.set(xlabel="step", ylabel="loss (CE / p per label token)")
    axes.set_title(f"Losses, running means of {window}")
    axes.grid(alpha=0.3)
    axes.legend()
    chart.savefig(path, dpi=100)
