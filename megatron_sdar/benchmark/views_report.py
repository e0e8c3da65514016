"""The figures of noisy views as tables with what they mean, and as a bar chart."""

from __future__ import annotations

import sys
from pathlib import Path

from rich.console import Console
from rich.table import Table

from megatron_sdar.benchmark.views import ViewsFigures

_FILE_WIDTH = 130


def show_views(figures: ViewsFigures, console: Console | None = None) -> None:
    """Print forms, checks and notes."""
    console = console or Console(
        highlight=False, width=None if sys.stdout.isatty() else _FILE_WIDTH
    )
    table = Table(
        "form", "variance", "x one view", "GFLOP", "x one view", "efficiency",
        "with documents drawn anew",
    )  # fmt: skip
    for form in figures.forms:
        table.add_row(
            form.form,
            f"{form.variance:.4g}",
            f"{form.relative_variance:.3f} +- {form.relative_variance_error:.3f}",
            f"{form.flops / 1e9:,.2f}",
            f"{form.relative_flops:.3f}",
            f"{form.efficiency:.3f} +- {form.efficiency_error:.3f}",
            f"{form.total_efficiency:.3f} +- {form.total_efficiency_error:.3f}",
        )
    console.print(table)
    for line in _notes(figures):
        console.print(f"- {line}")


def _notes(figures: ViewsFigures) -> list[str]:
    one = figures.forms[0]
    warmup = "untrained"
    if figures.warmup_loss is not None:
        warmup = f"loss {figures.warmup_loss:.3f} at the end of warm-up"
    notes = [
        f"Model: {figures.num_parameters / 1e6:.1f} M parameters, {warmup}. {figures.draws} draws "
        f"of {figures.documents} documents, each with documents of its own; "
        f"{figures.label_tokens:,.0f} label tokens a step and view; "
        f"p in [{figures.noise_eps:g}, 1]. Errors: jackknife over draws. The weight 1/p has a "
        "heavy tail: a draw with one masked token at small p weighs as much as many others.",
        "variance: trace of the covariance of the step's gradient over noise, for given documents. "
        "Views but for complements are independent by construction, so theirs is one view's over "
        "their number. efficiency: variance x FLOPs of one view over those of the form.",
        f"Gradients of a view and its complement: correlation {figures.mate_correlation:.3f} +- "
        f"{figures.mate_correlation_error:.3f}.",
        f"Over the choice of {figures.documents} documents the noise-free gradient has variance "
        f"{figures.document_variance:.4g} +- {figures.document_variance_error:.2g}, "
        f"{figures.document_variance / one.variance:.2f} of one view's noise. More views of the "
        "same documents do not reduce it, more documents do: the last column counts both.",
        f"Squared norm of the mean gradient: {figures.mean_squared:.4g}. Means of views and of "
        f"complements differ by {figures.mean_difference:.2f} of what noise leads to expect "
        "(about 1: both have the same mean).",
        "The gradient of rows with several views on one clean copy is the mean of the views' "
        f"gradients to {figures.same_gradient:.1e} of its norm (first draw).",
    ]
    if figures.num_folded:
        notes.append(
            f"{figures.num_folded} token ids of the input were folded into the model's "
            "vocabulary: lengths and labels are real, ids are not."
        )
    return notes


def plot_views(figures: ViewsFigures, path: Path) -> None:
    """Write a bar chart of both efficiencies with their errors as PNG."""
    from matplotlib.figure import Figure

    forms = figures.forms
    chart = Figure(figsize=(10.0, 3.0), layout="constrained")
    left, right = chart.subplots(1, 2, sharey=True)
    for axes, title, values, errors in (
        (
            left,
            "noise, for given documents",
            [form.efficiency for form in forms],
            [form.efficiency_error for form in forms],
        ),
        (
            right,
            f"noise and choice of {figures.documents} documents",
            [form.total_efficiency for form in forms],
            [form.total_efficiency_error for form in forms],
        ),
    ):
        bars = axes.barh([form.form for form in forms], values, xerr=errors, capsize=3)
        axes.bar_label(bars, [f"{value:.2f}" for value in values], padding=3)
        axes.axvline(1.0, color="black", linestyle="--")
        axes.set(xlabel="1 / (variance x FLOPs), one view = 1", title=title)
        axes.margins(x=0.2)
    left.invert_yaxis()
    chart.savefig(path, dpi=150)
