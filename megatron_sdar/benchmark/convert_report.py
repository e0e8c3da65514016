"""The conversion benchmark's table."""

from __future__ import annotations

from collections.abc import Mapping

from rich.console import Console
from rich.table import Table

from megatron_sdar.benchmark.convert import ConvertFigures

_PEAK_GOALS_MB: Mapping[str, float] = {"4b": 1000, "8b": 1500}
_LOAD_SHAPE = "4b"


def show_convert(figures: ConvertFigures) -> None:
    """Print the figures beside their goals."""
    table = Table(title=f"conversion of {figures.shape}, {figures.model_bytes / 1e9:.1f} GB")
    for column in ("figure", "measured", "goal"):
        table.add_column(column, justify="left" if column == "figure" else "right")
    values = figures.to_json()
    goals = {"async_block_share": "0.10 or less"}
    if figures.shape in _PEAK_GOALS_MB:
        goals["speed_vs_cp_to_native"] = goals["speed_vs_cp_to_hf"] = "0.70 or more"
        goals["peak_rss_mb"] = f"below {_PEAK_GOALS_MB[figures.shape]:.0f}"
    if figures.shape == _LOAD_SHAPE:
        goals["load_rss_vs_model"] = "1.30 or less"
    for name, value in values.items():
        if isinstance(value, float):
            text = f"{value:.0f}" if name.endswith("_mb") else f"{value:.3f}"
            table.add_row(name, text, goals.get(name, ""))
    Console().print(table)
