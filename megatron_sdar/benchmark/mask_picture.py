"""The picture in DESIGN.md: one small row's mask, its key intervals, and the tiles made of them.

Everything drawn is computed by the product's own functions from the row's intervals.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from sdar_kernels.block_mask import AttentionMask, tile_counts
from sdar_kernels.reference import dense_mask
from sdar_kernels.self_check import document_intervals
from sdar_kernels.tile_runs import make_query_tiles

DOCUMENTS, BLOCK, PADDING, TILE = (20, 12), 4, 2, 8
_FIRST, _SECOND, _FULL, _PARTIAL = "#4878a8", "#d98c3f", "#8fb98b", "#e3c76f"


def draw_mask_picture(path: Path) -> None:
    """Write the picture as PNG."""
    mask = AttentionMask.build(document_intervals(DOCUMENTS, BLOCK, padding=PADDING))
    figure = Figure(figsize=(13, 13.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(2, 2)
    panels = (
        (axes[0, 0], _draw_mask, "The mask (never stored): dark where a query sees a key"),
        (axes[0, 1], _draw_intervals, "Its four integers per query: two ranges of keys"),
        (axes[1, 0], _draw_grid, f"On a grid of {TILE} x {TILE} tiles, as FlexAttention has them"),
        (axes[1, 1], _draw_runs, f"Tiles of {TILE} queries that begin with documents and copies"),
    )
    for axis, draw, title in panels:
        _frame(axis, mask.num_tokens)
        note = draw(axis, mask)
        axis.set_title(f"{title}\n{note}", fontsize=10)
    figure.savefig(path, dpi=80)


def _frame(axis: Axes, num_tokens: int) -> None:
    total = sum(DOCUMENTS)
    borders = np.cumsum([0, *DOCUMENTS, *DOCUMENTS, PADDING])
    names = [f"clean {i + 1}" for i in range(len(DOCUMENTS))]
    names += [f"noisy {i + 1}" for i in range(len(DOCUMENTS))] + ["pad"]
    middles = (borders[1:] + borders[:-1]) / 2
    axis.set(xlim=(0, num_tokens), ylim=(num_tokens, 0), aspect="equal")
    axis.set_xticks(middles, names)
    axis.set_yticks(middles, names, rotation=90, va="center")
    axis.set_xlabel("keys")
    axis.set_ylabel("queries")
    axis.tick_params(length=0)
    for border in borders[1:-1]:
        width = 1.4 if border == total else 0.6
        axis.axhline(border, color="black", linewidth=width)
        axis.axvline(border, color="black", linewidth=width)


def _draw_mask(axis: Axes, mask: AttentionMask) -> str:
    dense = dense_mask(mask.key_intervals).numpy()
    axis.imshow(dense, extent=(0, len(dense), len(dense), 0), cmap="Greys", vmax=1.6)
    return f"{mask.num_pairs} of {dense.size} pairs"


def _draw_intervals(axis: Axes, mask: AttentionMask) -> str:
    for query, (lo1, hi1, lo2, hi2) in enumerate(mask.host_intervals.tolist()):
        for low, high, color in ((lo1, hi1, _FIRST), (lo2, hi2, _SECOND)):
            axis.add_patch(Rectangle((low, query + 0.15), high - low, 0.7, facecolor=color))
    return "blue: clean keys of its document; orange: its own noisy block (or itself)"


def _draw_grid(axis: Axes, mask: AttentionMask) -> str:
    counts = tile_counts(mask.host_intervals, TILE, TILE)
    for row, column in np.argwhere(counts > 0).tolist():
        color = _FULL if counts[row, column] == TILE * TILE else _PARTIAL
        _tile(axis, column * TILE, row * TILE, TILE, TILE, color)
    _dots(axis, mask)
    computed = int((counts > 0).sum()) * TILE * TILE
    return f"green: no mask needed; yellow: with the mask. {_waste(computed, mask)}"


def _draw_runs(axis: Axes, mask: AttentionMask) -> str:
    masked = TILE // 2
    plan = make_query_tiles(mask, TILE, TILE, masked)
    for start, end, lo, open_end, hi, lo2, hi2 in plan.tiles.tolist():
        for low in range(lo, open_end, TILE):
            _tile(axis, low, start, TILE, end - start, _FULL)
        for begin, stop in ((open_end, hi), (lo2, hi2)):
            for low in range(begin, stop, masked):
                _tile(axis, low, start, masked, end - start, _PARTIAL)
    _dots(axis, mask)
    return f"steps of {TILE} keys, with the mask of {masked}. {_waste(plan.num_pairs, mask)}"


def _waste(computed: int, mask: AttentionMask) -> str:
    return f"Computed / allowed: {computed / mask.num_pairs:.2f}"


def _tile(axis: Axes, x: int, y: int, width: int, height: int, color: str) -> None:
    axis.add_patch(Rectangle((x, y), width, height, facecolor=color, edgecolor="white"))


def _dots(axis: Axes, mask: AttentionMask) -> None:
    queries, keys = np.nonzero(dense_mask(mask.key_intervals).numpy())
    axis.plot(keys + 0.5, queries + 0.5, ".", color="black", markersize=2)
