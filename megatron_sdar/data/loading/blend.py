"""Rows of several datasets in given proportions that may change at a row of the stream.

`BlendSchedule` is a pure function of the position, in closed form: which dataset gives the row
and which of its rows that is, at position 10^12 as fast as at 0. Every prefix of a segment holds
each dataset's share to within two rows, whatever their number and weights (see `_split`); two
datasets to within half a row. A new segment goes on in each dataset where the one before
stopped, so changing later weights never changes earlier rows.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import accumulate


@dataclass(frozen=True)
class _Fork:
    """Two groups of datasets that share rows left_weight : total_weight - left_weight."""

    left: _Fork | int
    right: _Fork | int
    left_weight: int
    total_weight: int

    def left_rows(self, rows: int) -> int:
        """How many of this fork's first `rows` rows are the left side's: their share, rounded.

        Integers throughout: exact at any position, and one more row adds 0 or 1.
        """
        return (2 * rows * self.left_weight + self.total_weight) // (2 * self.total_weight)


class BlendSchedule:
    """Which dataset gives each row.

    Args:
        segments: (first_row, weights), the first at row 0, ascending. Weights are relative;
            a dataset of weight 0 rests until a later segment gives it rows.

    Raises:
        ValueError: segments out of order, weights that are negative, not finite or all 0, or
            not one per dataset.
    """

    def __init__(self, segments: Sequence[tuple[int, Sequence[float]]]) -> None:
        self.segments = [(int(first), [float(w) for w in weights]) for first, weights in segments]
        self._firsts = [first for first, _ in self.segments]
        if not self._firsts or self._firsts[0] != 0:
            raise ValueError(
                f"blend: the segments begin at rows {self._firsts}; the first must begin at 0"
            )
        if any(later <= first for first, later in zip(self._firsts, self._firsts[1:])):  # noqa: B905
            raise ValueError(f"blend: the segments' first rows {self._firsts} must ascend")
        self.num_datasets = len(self.segments[0][1])
        for first, weights in self.segments:
            if len(weights) != self.num_datasets:
                raise ValueError(
                    f"blend: {len(weights)} weights from row {first} on, {self.num_datasets} "
                    "from row 0 on; give one weight per dataset (0 lets it rest)"
                )
            if not all(math.isfinite(w) and w >= 0 for w in weights) or not any(weights):
                raise ValueError(
                    f"blend: weights {weights} from row {first} on; give finite numbers of at "
                    "least 0, not all 0"
                )
        self._roots = [_split_weights(weights) for _, weights in self.segments]
        self._before = [[0] * self.num_datasets]
        for number in range(1, len(self.segments)):
            rows = self._firsts[number] - self._firsts[number - 1]
            self._before.append(self._counts_in(number - 1, rows))

    def locate(self, position: int) -> tuple[int, int]:
        """(dataset, which of its rows, counted from 0 over all epochs) at a position."""
        segment = bisect_right(self._firsts, position) - 1
        node, rows = self._roots[segment], position - self._firsts[segment]
        while isinstance(node, _Fork):
            left = node.left_rows(rows)
            if node.left_rows(rows + 1) > left:
                node, rows = node.left, left
            else:
                node, rows = node.right, rows - left
        return node, self._before[segment][node] + rows

    def counts(self, position: int) -> list[int]:
        """Rows of each dataset among the first `position` rows."""
        segment = bisect_right(self._firsts, position) - 1
        return self._counts_in(segment, position - self._firsts[segment])

    def until(self, position: int) -> list[tuple[int, list[float]]]:
        """The segments that the first `position` rows depend on (at least the first)."""
        return [
            (first, weights) for first, weights in self.segments if first < position or not first
        ]

    def _counts_in(self, segment: int, rows: int) -> list[int]:
        counts = list(self._before[segment])
        open_nodes: list[tuple[_Fork | int, int]] = [(self._roots[segment], rows)]
        while open_nodes:
            node, share = open_nodes.pop()
            if isinstance(node, _Fork):
                left = node.left_rows(share)
                open_nodes += [(node.left, left), (node.right, share - left)]
            else:
                counts[node] += share
        return counts


def _split_weights(weights: Sequence[float]) -> _Fork | int:
    """The tree of one segment; resting datasets are not in it."""
    exact = {number: Fraction(weight) for number, weight in enumerate(weights) if weight}
    scale = math.lcm(*(weight.denominator for weight in exact.values()))
    heaviest_first = sorted(exact, key=lambda number: (-exact[number], number))
    return _split([(int(exact[number] * scale), number) for number in heaviest_first])


def _split(items: list[tuple[int, int]]) -> _Fork | int:
    """A tree over (weight, dataset), heaviest first, divided as evenly as their order allows.

    Then a side that is divided again has at most 2/3 of its fork's weight w: either the heaviest
    has over half and stands alone, or some prefix has between 1/3 and 2/3. Rounding costs half a
    row a fork and a parent's error counts in proportion, so errors stay below
    1/2 + 2/3 (1/2 + 2/3 (...)) = 3/2 at forks and 1/2 + 3/2 = 2 at a dataset.
    """
    if len(items) == 1:
        return items[0][1]
    sums = list(accumulate(weight for weight, _ in items))
    cut = min(range(1, len(items)), key=lambda k: max(sums[k - 1], sums[-1] - sums[k - 1]))
    return _Fork(_split(items[:cut]), _split(items[cut:]), sums[cut - 1], sums[-1])
