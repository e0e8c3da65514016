"""How long the documents are: counts per range of lengths, as bars or as an image.

Owns the ranges (two per doubling, so that short and long corpora both fill a screen) and the two
drawings of them. Lengths are read a piece at a time: memory does not grow with the dataset.
"""

from collections.abc import Iterable
from itertools import pairwise
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from rich.text import Text

_CHUNK = 1 << 20
_BAR = "\N{FULL BLOCK}"


def length_edges(longest: int) -> list[int]:
    """Edges of the ranges 0, 1, 2, 3, 4, 6, 8, 12, 16, ...; the last edge is above LONGEST."""
    edges = [0, 1]
    while edges[-1] <= longest:
        power = 1 << (edges[-1].bit_length() - 1)
        edges.append(power * 3 // 2 if edges[-1] == power and power > 1 else power * 2)
    return edges


def count_lengths(parts: Iterable[NDArray[np.int32]]) -> tuple[list[int], list[int]]:
    """(edges, documents per range) over the lengths of all PARTS; leading empty ranges left out."""
    counts = np.zeros(1, np.int64)
    for lengths in parts:
        for start in range(0, len(lengths), _CHUNK):
            found = np.bincount(lengths[start : start + _CHUNK])
            counts = np.pad(counts, (0, max(0, len(found) - len(counts))))
            counts[: len(found)] += found
    edges = length_edges(len(counts) - 1)
    numbers = [int(counts[start:stop].sum()) for start, stop in pairwise(edges)]
    first = next((place for place, number in enumerate(numbers) if number), 0)
    return edges[first:], numbers[first:]


def bars(edges: list[int], numbers: list[int], width: int) -> list[Text]:
    """One line of at most WIDTH characters per range: its tokens, a bar, its documents."""
    total = sum(numbers)
    labels = [f"{a:,}-{b - 1:,}" if b - a > 1 else f"{a:,}" for a, b in pairwise(edges)]
    counts = [f"{number:,} ({100 * number / max(1, total):.1f}%)" for number in numbers]
    side = max(map(len, labels))
    room = max(1, width - side - max(map(len, counts)) - 4)
    longest = max(numbers)
    lines = []
    for label, number, count in zip(labels, numbers, counts, strict=True):
        # A range that is not empty never looks empty.
        size = -(-number * room // max(1, longest))
        line = Text(f"  {label:>{side}} ", no_wrap=True, overflow="crop")
        line.append(_BAR * size, "cyan").append(f" {count}" if size else count)
        lines.append(line)
    return lines


def write_image(
    path: Path, edges: list[int], numbers: list[int], cutoff_len: int, title: str
) -> None:
    """Draw the counts as an image file, with a line at CUTOFF_LEN.

    Raises ValueError for a suffix that is no image format, OSError when it cannot be written.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    known = FigureCanvasAgg(figure).get_supported_filetypes()
    if path.suffix[1:].lower() not in known:
        raise ValueError(f"--plot {path}: no known image format; name it something.png")
    axes = figure.add_subplot()
    axes.bar(range(len(numbers)), numbers, width=0.9, align="edge", color="tab:blue")
    axes.set_xticks(range(len(edges)), [f"{edge:,}" for edge in edges], rotation=45, ha="right")
    axes.set(xlabel="tokens of a document", ylabel="documents", title=title)
    if edges[0] <= cutoff_len <= edges[-1]:
        place = float(np.interp(cutoff_len, edges, range(len(edges))))
        axes.axvline(place, color="tab:red", linestyle="--", label=f"cutoff_len {cutoff_len:,}")
        axes.legend()
    axes.grid(axis="y", alpha=0.3)
    figure.savefig(path, dpi=120)
