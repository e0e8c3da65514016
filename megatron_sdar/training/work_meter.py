"""What a step's rows hold and cost, summed between two log lines.

Rows lie on the host, so counting needs neither the device nor, until a line is logged, the other
ranks.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

import numpy as np
import torch
from numpy.typing import NDArray

from megatron_sdar.architecture import Architecture
from megatron_sdar.diffusion.rows import Row
from megatron_sdar.model.finetuning import EVERYTHING, Finetuning
from megatron_sdar.parallel.mesh import ParallelMesh, sum_over_world, sums_over_data_parallel
from megatron_sdar.training.flops import RowWork, step_flops
from megatron_sdar.training.resident_memory import resident_mb

_PRODUCTS = 5


@dataclass(frozen=True)
class WorkCounts:
    """Sums over all data-parallel ranks.

    Attributes:
        noisy, clean, padding: tokens that were computed.
        flops: model FLOPs, see training/flops.py.
    """

    noisy: int
    clean: int
    padding: int
    flops: int

    @property
    def tokens(self) -> int:
        return self.noisy + self.clean + self.padding

    def __add__(self, other: WorkCounts) -> WorkCounts:
        return WorkCounts(
            self.noisy + other.noisy,
            self.clean + other.clean,
            self.padding + other.padding,
            self.flops + other.flops,
        )


class WorkMeter:
    """Adds up the rows of this rank.

    Args:
        trimmed: whether the last layer is trimmed (semantics: exact).
        finetuning: what is trained.
    """

    def __init__(
        self, arch: Architecture, *, trimmed: bool, finetuning: Finetuning = EVERYTHING
    ) -> None:
        self._arch = arch
        self._trimmed, self._finetuning = trimmed, finetuning
        self._sums = _zeros()

    def add(self, rows: Sequence[Row]) -> None:
        """Count the micro-batches of a step."""
        for row in rows:
            self._sums += count_row(row)

    def take(self, mesh: ParallelMesh) -> WorkCounts:
        """The sums of all replicas since the last call. Collective: all_reduce (dp)."""
        noisy, clean, padding, pairs, positions, loss_pairs = (
            int(value) for value in sums_over_data_parallel(self._sums.tolist(), mesh)
        )
        self._sums = _zeros()
        work = RowWork(noisy + clean + padding, pairs, positions, loss_pairs)
        flops = step_flops(
            self._arch, [work], trimmed=self._trimmed, finetuning=self._finetuning
        ).total
        return WorkCounts(noisy, clean, padding, flops)


def count_row(row: Row) -> NDArray[np.int64]:
    """[noisy, clean, padding tokens, pairs, loss positions, their pairs] of a row."""
    work = RowWork.of(row)
    # Only noisy tokens and padding have a second interval: their own block.
    own_block = row.key_intervals[:, 3] > row.key_intervals[:, 2]
    noisy = int(np.count_nonzero(own_block)) - row.num_padding
    clean = row.num_tokens - row.num_padding - noisy
    return np.array(
        [
            *(noisy, clean, row.num_padding),
            *(work.num_pairs, work.num_loss_positions, work.num_loss_pairs),
        ],
        dtype=np.int64,
    )


def measure_peak(mesh: ParallelMesh, dtype: torch.dtype) -> float:
    """FLOPs per second that square products reach, all ranks computing at once, summed over them.

    Processes that share cores slow each other down, as they do in training. A median of five:
    about a second.

    Collective: all_reduce (world), twice.
    """
    size = 1024 if mesh.device.type == "cpu" else 8192
    left, right = (torch.ones(size, size, dtype=dtype, device=mesh.device) for _ in range(2))
    torch.mm(left, right)
    sum_over_world(torch.zeros((), device=mesh.device)).item()  # all begin together
    seconds = []
    for _ in range(_PRODUCTS):
        started = time.perf_counter()
        float(torch.mm(left, right)[0, 0])  # waits for the device
        seconds.append(time.perf_counter() - started)
    own = torch.tensor(2 * size**3 / median(seconds), dtype=torch.float64, device=mesh.device)
    return float(sum_over_world(own))


def memory_mb(device: torch.device) -> float:
    """MiB that this process has held at most: of the GPU, or resident on the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    return resident_mb("VmHWM")


def _zeros() -> NDArray[np.int64]:
    return np.zeros(6, dtype=np.int64)
