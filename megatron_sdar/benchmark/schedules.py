"""What a noise schedule does to the gradient's variance: noise levels, strata, ranges, weights.

A model is trained a little with the published schedule, then stands still. Every draw takes other
documents and gives them, under every schedule, two independent noises: half the squared distance
of the two gradients has the variance over noise as its mean, their product the squared norm of
the gradient without noise. Schedules weigh noise levels differently, so the ratio of the two is
compared, not the variance.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

from megatron_sdar.benchmark.step_data import Corpus
from megatron_sdar.benchmark.still_model import Say, StillModel, check_corpus
from megatron_sdar.benchmark.view_forms import ViewsOptions, draw_schedule
from megatron_sdar.benchmark.view_moments import with_errors
from megatron_sdar.diffusion.noise_schedule import NoiseSchedule
from megatron_sdar.parallel.mesh import LaunchInfo, start_process_group, stop_process_group

_TIMEOUT_SECONDS = 3600
_FILE_WIDTH = 130


def compared_schedules(eps: float) -> dict[str, NoiseSchedule]:
    """What is compared, by name; the first is the published one."""
    published = NoiseSchedule(low=eps)
    by_block = replace(published, level_per="block", sampling="stratified")
    return {
        "document": published,
        "document, stratified": replace(published, sampling="stratified"),
        "block": replace(published, level_per="block"),
        "block, stratified": by_block,
        "document, p from 0.3 to 0.8": replace(published, low=0.3, high=0.8),
        "block, stratified, p from 0.1": replace(by_block, low=0.1),
        "document, flat": replace(published, loss_weight="flat"),
        "block, stratified, flat": replace(by_block, loss_weight="flat"),
    }


@dataclass(frozen=True)
class ScheduleFigures:
    """One schedule.

    Attributes:
        variance: trace of the gradient's covariance over noise, for given documents.
        signal: squared norm of the gradient without noise, for given documents.
        relative_noise: variance over signal, in units of the published schedule's.
        relative_flops: of a step, over the published schedule's.
        efficiency: published relative_noise times FLOPs over this schedule's.
        *_error: standard errors, jackknife over draws.
    """

    schedule: str
    variance: float
    signal: float
    relative_noise: float
    relative_noise_error: float
    relative_flops: float
    efficiency: float
    efficiency_error: float


@dataclass(frozen=True)
class SchedulesFigures:
    """What `measure_schedules` finds; schedules in the order of `compared_schedules`."""

    schedules: tuple[ScheduleFigures, ...]
    draws: int
    documents: int
    block_length: int
    num_parameters: int
    warmup_loss: float | None

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def measure_schedules(options: ViewsOptions, corpus: Corpus, say: Say) -> SchedulesFigures:
    """Train, draw, measure.

    Args:
        options: what is measured; its draws are documents, noise is drawn twice for each.
        corpus: documents; their own noise is not used.
        say: called with what is being done.

    Raises:
        ValueError: bad options or too few documents.
    """
    check_corpus(options, corpus)
    start_process_group(LaunchInfo(0, 0, 1), "cpu", "gloo", _TIMEOUT_SECONDS)
    try:
        model = StillModel(options, corpus, say)
        warmup_loss = model.warm_up()
        table = np.array(
            [_draw(model, options, corpus, draw, say) for draw in range(options.draws)]
        )
    finally:
        stop_process_group()
    return SchedulesFigures(
        measured_figures(table, list(compared_schedules(options.noise_eps))),
        options.draws,
        options.documents,
        options.block_length,
        model.num_parameters,
        warmup_loss,
    )


def _draw(
    model: StillModel, options: ViewsOptions, corpus: Corpus, draw: int, say: Say
) -> list[float]:
    """Variance, signal and FLOPs under every schedule, flat, of the draw's documents."""
    first = draw * options.documents
    numbers = range(first, first + options.documents)
    documents = [corpus.documents[number] for number in numbers]
    gradients = torch.empty(2, model.num_parameters)
    figures: list[float] = []
    for schedule in compared_schedules(options.noise_eps).values():
        flops = 0
        for number, gradient in enumerate(gradients):
            # Two epochs of the draw's own: a stratified epoch has one random shift.
            epoch = 2 * draw + number
            noises = draw_schedule(documents, numbers, schedule, options, epoch)
            rows = model.rows(numbers, noises)
            flops += model.flops(rows)
            model.write_gradient(rows, gradient)
        one, two = gradients
        figures += [float((one - two).square().sum()) / 2, float(one @ two), flops / 2]
    if (draw + 1) % max(1, options.draws // 8) == 0:
        say(f"  draw {draw + 1} of {options.draws}")
    return figures


def measured_figures(
    table: NDArray[np.float64], names: Sequence[str]
) -> tuple[ScheduleFigures, ...]:
    """Figures of each schedule.

    Args:
        table: float64 [draws, 3 * schedules]: variance, signal and FLOPs of each.
        names: of the schedules; the first is what all are compared with.
    """
    values, errors = with_errors(table, _statistics)
    rows = zip(names, values.reshape(-1, 5).tolist(), errors.reshape(-1, 5).tolist(), strict=True)
    return tuple(
        ScheduleFigures(
            schedule=name,
            variance=value[0],
            signal=value[1],
            relative_noise=value[2],
            relative_noise_error=error[2],
            relative_flops=value[3],
            efficiency=value[4],
            efficiency_error=error[4],
        )
        for name, value, error in rows
    )


def _statistics(means: NDArray[np.float64]) -> NDArray[np.float64]:
    variance, signal, flops = means.reshape(-1, 3).T
    noise = variance / signal / (variance[0] / signal[0])
    cost = flops / flops[0]
    return np.stack([variance, signal, noise, cost, 1 / (noise * cost)], axis=1).ravel()


def show_schedules(figures: SchedulesFigures, console: Console | None = None) -> None:
    """Print the table and what it means."""
    console = console or Console(
        highlight=False, width=None if sys.stdout.isatty() else _FILE_WIDTH
    )
    table = Table("schedule", "variance", "signal", "noise x first", "FLOPs x first", "efficiency")
    for each in figures.schedules:
        table.add_row(
            each.schedule,
            f"{each.variance:.4g}",
            f"{each.signal:.4g}",
            f"{each.relative_noise:.3f} +- {each.relative_noise_error:.3f}",
            f"{each.relative_flops:.3f}",
            f"{each.efficiency:.3f} +- {each.efficiency_error:.3f}",
        )
    console.print(table)
    for line in _notes(figures):
        console.print(f"- {line}")


def _notes(figures: SchedulesFigures) -> Sequence[str]:
    loss = figures.warmup_loss
    state = "untrained" if loss is None else f"loss {loss:.3f} at the end of warm-up"
    return (
        f"Model: {figures.num_parameters / 1e6:.1f} M parameters, {state}. {figures.draws} draws "
        f"of {figures.documents} documents, block length {figures.block_length}. Errors: jackknife "
        "over draws.",
        "variance: trace of the covariance of the step's gradient over noise; signal: squared norm "
        "of its mean; both for given documents. noise: variance over signal. efficiency: above 1, "
        "the same compute leaves less noise.",
        "Ranges and flat weights change what is learned, not only its noise: their gradients do "
        "not have the published mean.",
    )
