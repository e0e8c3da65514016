"""The figures of the step benchmark as tables with their denominators, and as a bar chart."""

from __future__ import annotations

import sys
from pathlib import Path

from rich.console import Console
from rich.table import Table

from megatron_sdar.benchmark.step import StepFigures
from megatron_sdar.benchmark.step_forms import EXACT

_FILE_WIDTH = 150


def show_step(figures: StepFigures, console: Console | None = None) -> None:
    """Print forms, layouts, ratios and notes."""
    console = console or Console(
        highlight=False, width=None if sys.stdout.isatty() else _FILE_WIDTH
    )
    console.print(_forms_table(figures))
    rates = ", ".join(f"{rate:,.0f} ({name})" for name, rate in figures.product_gflops.items())
    console.print(f"Best rate of a matrix product, GFLOP/s: {rates}.")
    layouts = Table(
        "layout", "CPU s, all ranks", "CPU s, one process", "ratio", "over apart2", "seconds"
    )
    for each in figures.layouts:
        layouts.add_row(
            each.layout,
            f"{each.cpu_seconds:,.2f}",
            f"{each.one_process_seconds:,.2f}",
            f"{each.cpu_ratio:.3f}",
            f"{each.over_apart:.3f}",
            f"{each.seconds:,.2f}",
        )
    if figures.layouts:
        console.print(layouts)
    ratios = Table("figure", "measured")
    for name, value in figures.ratios.items():
        ratios.add_row(name, "not measured" if value is None else f"{value:.3f}")
    console.print(ratios)
    for length, speedup in figures.cpu_speedups.items():
        console.print(
            f"- exact over peer by CPU time, 2 x {length}: {speedup:.2f}. If this is far from the "
            "speedup by the clock, other programs were running, or one form leaves cores idle."
        )
    for note in figures.notes:
        console.print(f"- {note}")


def _forms_table(figures: StepFigures) -> Table:
    table = Table(
        "rows of", "form", "rows", "fill", "s/step", "rounds", "CPU s", "answer tok/s", "row tok/s",
        "TFLOP", "MFU", "of best", "peak MiB", "beyond state", "process",
    )  # fmt: skip
    for form in figures.forms:
        memory = form.memory
        table.add_row(
            f"2 x {form.length}",
            form.form,
            str(form.rows),
            f"{form.fill:.3f}",
            f"{form.seconds:,.2f}",
            str(form.rounds),
            f"{form.cpu_seconds:,.2f}",
            f"{form.answer_tokens_per_s:,.1f}",
            f"{form.row_tokens_per_s:,.0f}",
            f"{form.flops / 1e12:.3f}",
            f"{form.mfu:.3f}",
            f"{form.mfu_of_best:.3f}",
            *(
                ["", "", ""]
                if memory is None
                else [
                    f"{memory.total_mb:,.0f}",
                    f"{memory.activations_mb:,.0f}",
                    f"{memory.process_mb:,.0f}",
                ]
            ),
        )
    return table


def plot_step(figures: StepFigures, path: Path) -> None:
    """Write a bar chart of answer tokens per second, and the fp32 floor, as PNG."""
    from matplotlib.figure import Figure

    lengths = sorted({form.length for form in figures.forms})
    chart = Figure(figsize=(5.0 * len(lengths), 3.0), layout="constrained")
    for axes, length in zip(
        chart.subplots(1, len(lengths), squeeze=False)[0], lengths, strict=True
    ):
        forms = [form for form in figures.forms if form.length == length]
        values = [form.answer_tokens_per_s for form in forms]
        exact = figures.form(length, EXACT)
        floor = exact.answer_tokens / (exact.flops / figures.product_gflops["float32"] / 1e9)
        bars = axes.barh([form.form for form in forms], values)
        # White behind the numbers, where the floor's line crosses one.
        white = {"facecolor": "white", "edgecolor": "none", "pad": 0.5}
        axes.bar_label(bars, [f"{value:,.0f}" for value in values], padding=3, bbox=white)
        axes.axvline(
            floor, color="black", linestyle="--", label=f"fp32 floor of exact {floor:,.0f}"
        )
        axes.set(xlabel="answer tokens per second", title=f"rows of 2 x {length}")
        axes.invert_yaxis()
        axes.margins(x=0.2)
        axes.legend(loc="upper right")
    chart.savefig(path, dpi=150)
