"""Whether a CPU multiplies bfloat16 matrices at a useful speed.

With bf16 units (AVX512_BF16, AMX, Arm's BF16) a product takes half the time of a float32 one or
less. Without, torch falls back to plain loops that take fifty times as long, and says nothing.
"""

from __future__ import annotations

import time

import torch

_SIZE = 256
_TIMES = 3
# Units of any kind stay below 2, plain loops are above 20.
_SLOW = 4.0


def bf16_slowdown() -> float:
    """Seconds of a bfloat16 product on this CPU over those of a float32 product; takes 0.1 s."""
    seconds = []
    for dtype in (torch.bfloat16, torch.float32):
        left, right = (torch.ones(_SIZE, _SIZE, dtype=dtype) for _ in range(2))
        torch.mm(left, right)
        times = []
        for _ in range(_TIMES):
            start = time.perf_counter()
            torch.mm(left, right)
            times.append(time.perf_counter() - start)
        seconds.append(min(times))
    return seconds[0] / seconds[1]


def bf16_is_slow(slowdown: float) -> bool:
    """Whether products in bfloat16 are to be avoided."""
    return slowdown > _SLOW
