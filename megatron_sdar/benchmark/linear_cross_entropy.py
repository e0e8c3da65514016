"""The chunked linear cross-entropy measured against the plain form, on the CPU.

Forward and backward, gradients of hidden states and head included on both sides. Time: the two
forms run in turn in one process. Memory: each form runs in a process of its own, whose peak
resident memory is compared with what was resident once the inputs existed.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from statistics import median

import torch
from rich.console import Console
from rich.table import Table
from sdar_kernels.linear_cross_entropy import linear_cross_entropy
from sdar_kernels.reference import weighted_cross_entropy
from torch import Tensor

from megatron_sdar.training.resident_memory import resident_mb

_FORMS: dict[str, Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]] = {
    "plain": weighted_cross_entropy,
    "chunked": linear_cross_entropy,
}


@dataclass(frozen=True)
class LinearCrossEntropySize:
    """The problem: logits would be [num_tokens, vocab_size]."""

    num_tokens: int = 2048
    hidden_size: int = 512
    vocab_size: int = 151_936
    dtype: torch.dtype = torch.float32


@dataclass(frozen=True)
class LinearCrossEntropyFigures:
    """What `measure_linear_cross_entropy` finds.

    Attributes:
        time_ratio: seconds of the chunked form over those of the plain one; median of rounds.
        memory_ratio: the same of the peak memory beyond the inputs.
        seconds_plain, seconds_chunked: medians.
        peak_mb_plain, peak_mb_chunked: peak memory beyond the inputs, MiB.
    """

    time_ratio: float
    memory_ratio: float
    seconds_plain: float
    seconds_chunked: float
    peak_mb_plain: float
    peak_mb_chunked: float


def measure_linear_cross_entropy(
    size: LinearCrossEntropySize | None = None, *, rounds: int = 3
) -> LinearCrossEntropyFigures:
    """Measure with the threads that torch has here. Linux only (reads /proc/self/status)."""
    size = size or LinearCrossEntropySize()
    with ProcessPoolExecutor(1, get_context("spawn"), max_tasks_per_child=1) as process:
        threads = torch.get_num_threads()
        peak = {name: process.submit(_peak_mb, name, size, threads).result() for name in _FORMS}
    seconds = _seconds(size, rounds)
    return LinearCrossEntropyFigures(
        time_ratio=median(
            ours / plain for ours, plain in zip(seconds["chunked"], seconds["plain"], strict=True)
        ),
        memory_ratio=peak["chunked"] / peak["plain"],
        seconds_plain=median(seconds["plain"]),
        seconds_chunked=median(seconds["chunked"]),
        peak_mb_plain=peak["plain"],
        peak_mb_chunked=peak["chunked"],
    )


def _seconds(size: LinearCrossEntropySize, rounds: int) -> dict[str, list[float]]:
    """Seconds of each form in each round, after one round that does not count."""
    inputs = _inputs(size)
    seconds: dict[str, list[float]] = {name: [] for name in _FORMS}
    for _ in range(rounds + 1):
        for name in _FORMS:
            start = time.perf_counter()
            _run(name, inputs)
            seconds[name].append(time.perf_counter() - start)
    return {name: values[1:] for name, values in seconds.items()}


def _peak_mb(name: str, size: LinearCrossEntropySize, num_threads: int) -> float:
    """MiB that one forward and backward adds to this process, at its peak."""
    torch.set_num_threads(num_threads)
    _run(name, _inputs(LinearCrossEntropySize(64, 16, 128, size.dtype)))
    inputs = _inputs(size)
    before = resident_mb("VmRSS")
    _run(name, inputs)
    return resident_mb("VmHWM") - before


def _inputs(size: LinearCrossEntropySize) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Hidden states, head, targets, loss weights."""
    generator = torch.Generator().manual_seed(0)

    def normal(rows: int, std: float) -> Tensor:
        values = torch.empty(rows, size.hidden_size, dtype=size.dtype)
        return values.normal_(0, std, generator=generator).requires_grad_()

    return (
        normal(size.num_tokens, 1.0),
        normal(size.vocab_size, size.hidden_size**-0.5),
        torch.randint(0, size.vocab_size, (size.num_tokens,), generator=generator),
        torch.rand(size.num_tokens, generator=generator) + 1,
    )


def _run(name: str, inputs: tuple[Tensor, Tensor, Tensor, Tensor]) -> None:
    """Forward and backward; the gradients are dropped."""
    _FORMS[name](*inputs).backward()
    for tensor in inputs:
        tensor.grad = None


def show_linear_cross_entropy(figures: LinearCrossEntropyFigures) -> None:
    """Print the figures beside their goals."""
    table = Table(title="Linear cross-entropy, forward and backward: chunked / plain")
    for column in ("", "plain", "chunked", "ratio", "goal"):
        table.add_column(column, justify="left" if not column else "right")
    table.add_row(
        "time, s",
        f"{figures.seconds_plain:.2f}",
        f"{figures.seconds_chunked:.2f}",
        f"{figures.time_ratio:.2f}",
        "<= 1.15",
    )
    table.add_row(
        "peak memory beyond the inputs, MiB",
        f"{figures.peak_mb_plain:.0f}",
        f"{figures.peak_mb_chunked:.0f}",
        f"{figures.memory_ratio:.3f}",
        "<= 0.2",
    )
    Console().print(table)
