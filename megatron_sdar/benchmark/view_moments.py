"""Second moments of gradients of noisy views, summed draw by draw.

A draw is two complementary pairs of views of the same documents, so of its four gradients each
has one mate and two strangers. Strangers share documents only and are independent given them:
what own products exceed products of strangers by is variance of the noise, without knowing the
mean gradient. Memory: two vectors of the gradient's size, whatever the number of draws.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

NUM_GRADIENTS = 4
# Elements that are widened to fp64 at a time.
_CHUNK = 1 << 20

Statistic = Callable[[NDArray[np.float64]], NDArray[np.float64]]


@dataclass(frozen=True)
class DrawMoments:
    """What one draw says; the expectation of each is the moment of its name.

    Attributes:
        noise: trace of the covariance of one view's gradient, for given documents.
        mates: trace of the cross-covariance of a view and its complement, likewise.
        spread: trace of the covariance of the mean of a draw's gradients, documents included;
            nan for the first draw, which has nothing to differ from.
    """

    noise: float
    mates: float
    spread: float


class PairMoments:
    """Takes the gradients of one draw after the other.

    Args:
        size: P, elements of a gradient.
    """

    def __init__(self, size: int) -> None:
        self._mean = torch.zeros(size, dtype=torch.float64)
        self._difference = torch.zeros(size, dtype=torch.float64)
        self._differences_squared = 0.0
        self.draws: list[DrawMoments] = []

    def add(self, gradients: Tensor) -> None:
        """One draw: [4, P], a view, its complement, another view, its complement."""
        count = len(self.draws) + 1
        gram = torch.zeros(NUM_GRADIENTS, NUM_GRADIENTS, dtype=torch.float64)
        increment = differences_squared = 0.0
        for start in range(0, self._mean.numel(), _CHUNK):
            part = gradients[:, start : start + _CHUNK].double()
            gram += part @ part.T
            first, second, third, fourth = part
            difference = (first - second + third - fourth) / 2
            self._difference[start : start + _CHUNK] += difference
            differences_squared += float(difference @ difference)
            mean = self._mean[start : start + _CHUNK]
            before = part.mean(dim=0) - mean
            mean += before / count
            # Welford's increment is (1 - 1/count) of the squared distance to the mean before.
            increment += float(before @ before) * (count - 1) / count
        self._differences_squared += differences_squared
        own = float(gram.trace()) / NUM_GRADIENTS
        mates = float(gram[0, 1] + gram[2, 3]) / 2
        strangers = float(gram[:2, 2:].mean())
        spread = increment if count > 1 else float("nan")
        self.draws.append(DrawMoments(own - strangers, mates - strangers, spread))

    def table(self) -> NDArray[np.float64]:
        """float64 [draws, 3]: noise, mates, spread."""
        return np.array([[each.noise, each.mates, each.spread] for each in self.draws])

    def mean_squared(self) -> float:
        """Squared norm of the mean gradient, freed of what the noise of the mean adds to it."""
        spread = float(np.nanmean(self.table()[:, 2]))
        return float(self._mean @ self._mean) - spread / len(self.draws)

    def mean_difference(self) -> float:
        """How far the mean gradients of views and of their complements are apart.

        In units of what their own noise leads to expect: about 1 when both have the same mean,
        growing with the root of the number of draws when they do not.
        """
        count = len(self.draws)
        squared = float(self._difference @ self._difference) / count**2
        variance = (self._differences_squared - count * squared) / (count - 1)
        return (squared / (variance / count)) ** 0.5


def with_errors(
    table: NDArray[np.float64], statistic: Statistic
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """A function of column means, and its standard error by the jackknife over rows.

    Args:
        table: float64 [R, C], at least 3 rows; nan entries are left out of their column's mean.
        statistic: from column means [C] to figures [F].
    """
    count = table.shape[0]
    assert count >= 3, "leaving one draw out leaves two"
    left_out = np.array(
        [statistic(np.nanmean(np.delete(table, row, axis=0), axis=0)) for row in range(count)]
    )
    squares = ((left_out - left_out.mean(axis=0)) ** 2).mean(axis=0)
    return statistic(np.nanmean(table, axis=0)), np.sqrt((count - 1) * squares)
