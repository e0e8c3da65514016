"""Clocks of the step benchmark: of one optimizer step, and of the product that sets the limit."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median

import torch

# Of one measurement: a busy machine's rate wanders within a second, so as many products as fill
# about two, but a handful of slow ones are enough.
_LEAST_PRODUCTS, _MOST_PRODUCTS, _SECONDS = 5, 15, 2.0


@dataclass(frozen=True)
class StepTime:
    """Attributes: wall seconds, CPU seconds of all threads of the process, the step's loss."""

    seconds: float
    cpu_seconds: float
    loss: float


def time_step(step: Callable[[], float]) -> StepTime:
    """Run and time one step, which returns its loss."""
    wall, cpu = time.perf_counter(), time.process_time()
    loss = step()
    return StepTime(time.perf_counter() - wall, time.process_time() - cpu, loss)


class ProductRate:
    """FLOPs per second of a square product: the limit of a dtype on this machine.

    Measured before and after every step. A machine's rate may wander by a third within minutes, so
    a step is compared with the product beside it, and with the best of the run as well.
    """

    def __init__(self, size: int, dtype: torch.dtype) -> None:
        self._left, self._right = (torch.randn(size, size).to(dtype) for _ in range(2))
        self._out = torch.empty_like(self._left)
        self._flops = 2 * size**3
        self.rounds: list[float] = []

    def measure(self) -> float:
        """The rate now."""
        times: list[float] = []
        while len(times) < _LEAST_PRODUCTS or (
            len(times) < _MOST_PRODUCTS and sum(times) < _SECONDS
        ):
            start = time.perf_counter()
            torch.mm(self._left, self._right, out=self._out)
            times.append(time.perf_counter() - start)
        self.rounds.append(self._flops / median(times))
        return self.rounds[-1]

    def around(self, step: Callable[[], StepTime]) -> tuple[StepTime, float]:
        """Run a timed step; returns its times and the mean of the rates before and after it."""
        before = self.measure()
        taken = step()
        return taken, (before + self.measure()) / 2

    @property
    def best(self) -> float:
        return max(self.rounds)
