"""The figures of attention as tables beside their goals, and as a bar chart."""

from __future__ import annotations

import sys
from pathlib import Path

from rich.console import Console
from rich.table import Table

from megatron_sdar.benchmark.attention import AttentionFigures

_FILE_WIDTH = 120
_GOALS = {
    "speedup_vs_dense_1doc": ">= 3",
    "speedup_vs_dense_16docs": ">= 25",
    "limit_share_1doc": ">= 0.60",
    "limit_share_16docs": ">= 0.36",
    "waste_128_1024": "<= 1.25",
    "waste_256_2048": "<= 1.12",
    "waste_long": "<= 1.02",
    "block_mask_ms_20480": "<= 5",
}


def show_attention(figures: AttentionFigures, console: Console | None = None) -> None:
    """Print the paths, the plans, and the figures beside the goals."""
    console = console or Console(
        highlight=False, width=None if sys.stdout.isatty() else _FILE_WIDTH
    )
    table = Table(
        "documents", "path", "ms", "best ms", "x dense", "% of limit", "TFLOP/s", "peak MiB"
    )
    for path in figures.paths:
        table.add_row(
            str(path.documents),
            path.path,
            f"{path.milliseconds:,.1f}",
            f"{path.best_milliseconds:,.1f}",
            f"{path.speedup_vs_dense:.2f}",
            f"{100 * path.limit_share:.1f}",
            f"{path.teraflops:.3f}",
            f"{path.peak_mb:,.0f}",
        )
    console.print(table)
    console.print(f"The limit is a matrix product's rate: {figures.limit_teraflops:.3f} TFLOP/s.")
    plans = Table("documents of", "tiled: computed / allowed", "triton: computed / allowed, worst")
    for name, plan in figures.plans.items():
        plans.add_row(name, f"{plan.tiled:.3f}", f"{plan.triton:.3f}")
    console.print(plans)
    console.print(
        f"BlockMask: {figures.block_mask_ms_20480:.1f} ms, {figures.block_mask_peak_mb:.1f} MiB; "
        f"create_block_mask on {figures.create_block_mask_tokens} tokens: "
        f"{figures.create_block_mask_ms:,.0f} ms."
    )
    goals = Table("figure", "measured", "goal (1 CPU thread, fp32)")
    for name, goal in _GOALS.items():
        goals.add_row(name, f"{getattr(figures, name):.3f}", goal)
    console.print(goals)


def plot_attention(figures: AttentionFigures, path: Path) -> None:
    """Write a bar chart of milliseconds per path as PNG."""
    from matplotlib.figure import Figure

    rows = sorted({entry.documents for entry in figures.paths})
    chart = Figure(figsize=(4.5 * len(rows), 3.2), layout="constrained")
    for axes, documents in zip(chart.subplots(1, len(rows), squeeze=False)[0], rows, strict=True):
        entries = [entry for entry in figures.paths if entry.documents == documents]
        values = [entry.milliseconds for entry in entries]
        bars = axes.barh([entry.path for entry in entries], values)
        axes.bar_label(bars, [f"{value:,.0f}" for value in values], padding=3)
        axes.set(xlabel="ms, forward + backward", title=f"{documents} document(s)")
        axes.invert_yaxis()
        axes.margins(x=0.25)
        limit = entries[0].milliseconds * entries[0].limit_share
        axes.axvline(limit, color="black", linestyle="--", label=f"limit {limit:,.0f}")
        axes.legend(loc="upper right")
    chart.savefig(path, dpi=150)
