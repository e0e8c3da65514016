"""Lengths of documents as bars and as an image."""

from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_sdar.data.length_histogram import bars, count_lengths, length_edges, write_image


def test_edges_are_two_per_doubling():
    assert length_edges(0) == [0, 1]
    assert length_edges(1) == [0, 1, 2]
    assert length_edges(12) == [0, 1, 2, 3, 4, 6, 8, 12, 16]


@given(lengths=st.lists(st.lists(st.integers(0, 5000), max_size=30), min_size=1, max_size=3))
def test_every_length_is_counted_once(lengths):
    edges, numbers = count_lengths(np.array(part, np.int32) for part in lengths)
    flat = [length for part in lengths for length in part]
    assert len(edges) == len(numbers) + 1
    for (start, stop), number in zip(pairwise(edges), numbers, strict=True):
        assert number == sum(start <= length < stop for length in flat)
    assert sum(numbers) == len(flat)
    assert not flat or numbers[0] > 0


@given(numbers=st.lists(st.integers(0, 10**7), min_size=1, max_size=20), width=st.integers(60, 200))
def test_bars_fit_and_a_range_that_is_not_empty_shows(numbers, width):
    lines = [line.plain for line in bars(length_edges(2**20)[: len(numbers) + 1], numbers, width)]
    sizes = [line.count("\u2588") for line in lines]
    for line, size, number in zip(lines, sizes, numbers, strict=True):
        assert len(line) <= width
        assert (size > 0) == (number > 0)
        assert f" {number:,} (" in line
    if max(numbers):
        assert sizes.index(max(sizes)) in [
            i for i, n in enumerate(numbers) if n * 1.2 >= max(numbers)
        ]


def test_lines_of_bars():
    lines = [line.plain for line in bars([2, 3, 4, 6], [1, 0, 3], 26)]
    assert lines == [
        "    2 " + "\u2588" * 4 + " 1 (25.0%)",
        "    3 0 (0.0%)",
        "  4-5 " + "\u2588" * 10 + " 3 (75.0%)",
    ]


def test_image(tmp_path: Path):
    for name in ("a.png", "b.PNG", "c.svg"):
        write_image(tmp_path / name, [2, 3, 4, 6], [1, 0, 3], 4, "title")
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.PNG").read_bytes()
    assert (tmp_path / "c.svg").read_text().startswith("<?xml")
    for name in ("d.txt", "e"):
        with pytest.raises(ValueError, match=f"--plot .*{name}: no known image format"):
            write_image(tmp_path / name, [2, 3], [1], 4, "title")
    with pytest.raises(OSError, match="absent"):
        write_image(tmp_path / "absent" / "f.png", [2, 3], [1], 4, "title")
