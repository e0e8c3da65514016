"""Bin packing over a histogram of sizes: how many bins of which contents.

Owns the search for full bins. Items of equal size are interchangeable, so the work grows with
the number of different sizes and of different bins, not with the number of items: ten million
documents take as long as ten thousand.
"""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

# A last triple is looked for among this many of the largest sizes that fit.
_TRIPLE_CANDIDATES = 16


class Pattern(NamedTuple):
    """TIMES bins that each hold `items[size]` items of every size in ITEMS."""

    items: dict[int, int]
    times: int


def fill_bins(counts: NDArray[np.int64], capacity: int) -> list[Pattern]:
    """Bins of CAPACITY for COUNTS[s] items of each size s in 1..CAPACITY, as few as it finds.

    Every bin opens with the largest item left and is closed exactly where one, two or three
    items left sum to the rest. What is put in between decides which sizes remain for later bins:
    the largest items first, or the most numerous size first (which keeps many sizes alive until
    the end). A last search never looks for exact ends, which is first-fit decreasing with its
    bound of 11/9 of the optimum. It stops early at the lower bound ceil(total / capacity).
    """
    bound = -(-int(counts @ np.arange(len(counts))) // capacity)
    best: list[Pattern] = []
    for most_numerous, exact in ((False, True), (True, True), (False, False)):
        found = _Search(counts, capacity, most_numerous, exact).run()
        if not best or num_bins(found) < num_bins(best):
            best = found
        if num_bins(best) == bound:
            break
    return best


def num_bins(patterns: list[Pattern]) -> int:
    """Bins of all PATTERNS together."""
    return sum(pattern.times for pattern in patterns)


class _Search:
    """One greedy pass. Invariant: present[s] says whether counts[s] > 0."""

    def __init__(
        self, counts: NDArray[np.int64], capacity: int, most_numerous: bool, exact: bool
    ) -> None:
        self.counts = np.zeros(capacity + 1, dtype=np.int64)
        self.counts[: len(counts)] = counts
        self.present = self.counts > 0
        self.left = int(self.counts.sum())
        self.capacity = capacity
        self.most_numerous = most_numerous
        self.exact = exact
        self.bin: dict[int, int] = {}

    def run(self) -> list[Pattern]:
        """Bins until no item is left."""
        patterns = []
        while self.left:
            patterns.append(self._next_pattern())
        return patterns

    def _next_pattern(self) -> Pattern:
        self.bin = {}
        rest = self.capacity
        while rest and not (self.exact and self._close(rest)):
            fitting = np.flatnonzero(self.present[: rest + 1])
            if not fitting.size:
                break
            size = int(fitting[-1])
            if self.bin and self.most_numerous:
                size = int(fitting[np.argmax(self.counts[fitting])])
            # Far from the edge several go in at once; the last ones are chosen with care.
            spare = (rest - 3 * size) // size
            number = max(1, min(int(self.counts[size]), spare)) if rest > 4 * size else 1
            self._take(size, number)
            rest -= number * size
        more = min(int(self.counts[size]) // each for size, each in self.bin.items())
        for size, each in self.bin.items():
            self._remove(size, each * more)
        return Pattern(self.bin, 1 + more)

    def _close(self, rest: int) -> bool:
        """Fill REST exactly with one to three items, if there are such."""
        if self.present[rest]:
            self._take(rest)
            return True
        if not self.bin:
            return False
        large = self._pair(rest)
        if large:
            self._take(large)
            self._take(rest - large)
            return True
        for size in np.flatnonzero(self.present[:rest])[: -_TRIPLE_CANDIDATES - 1 : -1].tolist():
            self._remove(size, 1)
            large = self._pair(rest - size)
            self._remove(size, -1)
            if large:
                for each in (size, large, rest - size - large):
                    self._take(each)
                return True
        return False

    def _pair(self, rest: int) -> int:
        """The larger of two items left that sum to REST, as large as possible; 0 if none do."""
        if rest < 2:
            return 0
        both = self.present[1:rest] & self.present[rest - 1 : 0 : -1]
        if rest % 2 == 0 and self.counts[rest // 2] < 2:
            both[rest // 2 - 1] = False
        found = np.flatnonzero(both)
        return int(found[-1]) + 1 if found.size else 0

    def _take(self, size: int, number: int = 1) -> None:
        self._remove(size, number)
        self.bin[size] = self.bin.get(size, 0) + number

    def _remove(self, size: int, number: int) -> None:
        self.counts[size] -= number
        self.left -= number
        self.present[size] = self.counts[size] > 0
