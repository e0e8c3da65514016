"""What one rank can tell of its own speed, although all ranks take equally long for a step.

In every collective the fast wait for the slow, so only two things differ between ranks: how long
one works in the phases in which there is no collective, and how long a product takes that waits
for nobody.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from statistics import median

import torch

# As the main thread calls them when they begin; no collective lies in them.
WAITING, MOVING, UPDATING = "waiting for rows", "moving rows to the device", "update of weights"
OWN_PHASES = (WAITING, MOVING, UPDATING)

_BURSTS = 3


class PhaseClock:
    """Adds up the time that this rank spends in OWN_PHASES.

    Args:
        clock: the time in seconds.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._now = clock
        self._phase, self._since = "", clock()
        self._steps, self._seconds = 0, dict.fromkeys(OWN_PHASES, 0.0)

    def begin(self, phase: str) -> None:
        """The phase before ends here."""
        now = self._now()
        if self._phase in self._seconds:
            self._seconds[self._phase] += now - self._since
        self._steps += phase == WAITING  # every step begins so
        self._phase, self._since = phase, now

    def take(self) -> tuple[int, list[float]]:
        """Steps since the last call, and the mean seconds of a step in each of OWN_PHASES."""
        steps, seconds = self._steps, list(self._seconds.values())
        self._steps, self._seconds = 0, dict.fromkeys(OWN_PHASES, 0.0)
        return steps, [each / max(1, steps) for each in seconds]


def measure_products(device: torch.device, dtype: torch.dtype) -> float:
    """Seconds of a burst of square products on this device; the median of three.

    A few milliseconds. It is comparable between ranks that begin together, since processes that
    share cores slow each other down.
    """
    size, count = (2048, 32) if device.type == "cuda" else (256, 4)
    if device.type == "cpu":
        dtype = torch.float32  # bfloat16 may take a hundred times as long
    left, right, product = (torch.ones(size, size, dtype=dtype, device=device) for _ in range(3))
    torch.mm(left, right, out=product)
    float(product[0, 0])  # waits for the device
    seconds = []
    for _ in range(_BURSTS):
        started = time.perf_counter()
        for _ in range(count):
            torch.mm(left, right, out=product)
        float(product[0, 0])
        seconds.append(time.perf_counter() - started)
    return median(seconds)
