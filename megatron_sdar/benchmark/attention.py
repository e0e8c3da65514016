"""Attention measured: our backends beside dense and per-document SDPA, forward and backward.

The paths and a matrix product run in turn in one process, so figures are ratios of neighbours:
to dense attention, and to the time that the allowed pairs would take at the product's rate.
Memory, waste of our plans and the cost of a BlockMask stand beside them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from statistics import median

import torch
from sdar_kernels.head_layout import HeadLayout

from megatron_sdar.benchmark.attention_paths import (
    DENSE,
    PER_DOCUMENT,
    AttentionProblem,
    forward_and_backward,
    gemm,
    make_path,
    own_paths,
    peak_mb,
    seconds,
)
from megatron_sdar.benchmark.attention_plans import (
    COUNTED_HEADS,
    PlanFigures,
    block_mask_figures,
    packed_lengths,
    plan_figures,
)


@dataclass(frozen=True)
class AttentionOptions:
    """What is measured.

    Attributes:
        length: tokens of a copy; rows hold a clean and a noisy one.
        documents: how many share `length` in the packed case.
        num_heads, num_kv_heads, head_dim, block_length, dtype, device: as in training.
        num_threads: of torch on a CPU; one is the least disturbed.
        rounds: how often all paths run in turn, after one round that does not count.
        gemm_size: of the square product that sets the limit.
        row_length, create_length: tokens of a copy for waste and BlockMask, and for
            torch's create_block_mask, which is quadratic.
    """

    length: int = 2048
    documents: int = 16
    num_heads: int = 8
    num_kv_heads: int = 4
    head_dim: int = 64
    block_length: int = 4
    dtype: torch.dtype = torch.float32
    device: str = "cpu"
    num_threads: int = 1
    rounds: int = 5
    gemm_size: int = 2048
    row_length: int = 20480
    create_length: int = 2048

    def problem(self, documents: int) -> AttentionProblem:
        heads = HeadLayout(self.num_heads, self.num_kv_heads, self.head_dim)
        lengths = (self.length // documents,) * documents
        device = torch.device(self.device)
        return AttentionProblem(
            lengths, heads, self.block_length, self.dtype, device, self.num_threads
        )


@dataclass(frozen=True)
class PathFigures:
    """One path on one row.

    Attributes:
        documents: of the row.
        path: its name.
        milliseconds, best_milliseconds: median and least of the rounds.
        speedup_vs_dense: median over the rounds.
        limit_share: time at the product's rate over time taken, the same.
        teraflops: of allowed pairs, per second.
        peak_mb: memory beyond the inputs.
    """

    documents: int
    path: str
    milliseconds: float
    best_milliseconds: float
    speedup_vs_dense: float
    limit_share: float
    teraflops: float
    peak_mb: float


@dataclass(frozen=True)
class AttentionFigures:
    """What `measure_attention` finds.

    Attributes:
        speedup_vs_dense_*, limit_share_*: of our fastest backend, on one and on several documents.
        waste_*: computed over allowed pairs in rows of documents of that many tokens, and of one;
            the larger of our two plans.
        block_mask_ms_20480: building FlexAttention's mask for such a row, both copies.
        block_mask_peak_mb, create_block_mask_ms, create_block_mask_tokens: its memory, and torch's
            own builder on a smaller row.
        limit_teraflops: rate of the matrix product.
        paths: every path on every row; plans: waste of each plan, by row.
    """

    speedup_vs_dense_1doc: float
    speedup_vs_dense_16docs: float
    limit_share_1doc: float
    limit_share_16docs: float
    waste_128_1024: float
    waste_256_2048: float
    waste_long: float
    block_mask_ms_20480: float
    block_mask_peak_mb: float
    create_block_mask_ms: float
    create_block_mask_tokens: int
    limit_teraflops: float
    paths: tuple[PathFigures, ...]
    plans: dict[str, PlanFigures]


def measure_attention(options: AttentionOptions, say: Callable[[str], None]) -> AttentionFigures:
    """Measure attention on one device.

    Args:
        options: the problem.
        say: called with what is being measured.

    Raises:
        ValueError: if documents are not whole blocks, or no backend of ours can train here.
    """
    step = options.documents * options.block_length
    if options.length % step:
        raise ValueError(
            f"length {options.length} is not {options.documents} documents of whole blocks of "
            f"{options.block_length}: choose a multiple of {step}"
        )
    threads = torch.get_num_threads()
    torch.set_num_threads(options.num_threads)
    try:
        one, rate = _measure_row(options, 1, say)
        several, _ = _measure_row(options, options.documents, say)
        say(f"plans and masks of {options.row_length}-token rows")
        plans = _plans(options)
        mask = block_mask_figures(options.row_length, options.create_length, options.block_length)
    finally:
        torch.set_num_threads(threads)
    best_one, best_several = _fastest_own(one), _fastest_own(several)
    return AttentionFigures(
        speedup_vs_dense_1doc=best_one.speedup_vs_dense,
        speedup_vs_dense_16docs=best_several.speedup_vs_dense,
        limit_share_1doc=best_one.limit_share,
        limit_share_16docs=best_several.limit_share,
        waste_128_1024=plans["128-1024"].waste,
        waste_256_2048=plans["256-2048"].waste,
        waste_long=plans["long"].waste,
        block_mask_ms_20480=mask.milliseconds,
        block_mask_peak_mb=mask.peak_mb,
        create_block_mask_ms=mask.create_milliseconds,
        create_block_mask_tokens=2 * mask.create_tokens,
        limit_teraflops=rate / 1e12,
        paths=(*one, *several),
        plans=plans,
    )


def _measure_row(
    options: AttentionOptions, documents: int, say: Callable[[str], None]
) -> tuple[list[PathFigures], float]:
    """All paths on one row, and the FLOP rate of the matrix product beside them."""
    problem = options.problem(documents)
    say(f"{documents} document(s) of {problem.documents[0]} tokens, {options.rounds} rounds")
    own = own_paths(problem, say)
    if not own:
        raise ValueError(f"no attention backend of ours can train on {options.device}")
    names = [*own, DENSE, PER_DOCUMENT]
    paths, inputs = {name: make_path(name, problem) for name in names}, problem.inputs()
    product, product_flops = gemm(problem, options.gemm_size)
    times: dict[str, list[float]] = {name: [] for name in (*names, "product")}
    for _ in range(options.rounds + 1):
        times["product"].append(seconds(product, problem.device, options.num_threads))
        for name, path in paths.items():
            # Twice, as layers follow each other: the second call does not pay for the memory
            # and caches that another path left behind.
            twice = [
                seconds(
                    lambda path=path: forward_and_backward(path, inputs),  # type: ignore[misc]
                    problem.device,
                    options.num_threads,
                )
                for _ in range(2)
            ]
            times[name].append(twice[1])
    times = {name: values[1:] for name, values in times.items()}
    flops = problem.flops(problem.mask())
    limits = [taken * flops / product_flops for taken in times["product"]]
    figures = [
        PathFigures(
            documents=documents,
            path=name,
            milliseconds=median(times[name]) * 1000,
            best_milliseconds=min(times[name]) * 1000,
            speedup_vs_dense=_median_ratio(times[DENSE], times[name]),
            limit_share=_median_ratio(limits, times[name]),
            teraflops=flops / median(times[name]) / 1e12,
            peak_mb=peak_mb(name, problem),
        )
        for name in names
    ]
    return figures, product_flops / median(times["product"])


def _median_ratio(ours: list[float], theirs: list[float]) -> float:
    return median(a / b for a, b in zip(ours, theirs, strict=True))


def _fastest_own(paths: list[PathFigures]) -> PathFigures:
    own = [figures for figures in paths if figures.path not in (DENSE, PER_DOCUMENT)]
    return min(own, key=lambda figures: figures.milliseconds)


def _plans(options: AttentionOptions) -> dict[str, PlanFigures]:
    rows = {
        "128-1024": packed_lengths(options.row_length, 128, 1024, options.block_length),
        "256-2048": packed_lengths(options.row_length, 256, 2048, options.block_length),
        "long": [options.row_length],
    }
    return {
        name: plan_figures(lengths, options.block_length, COUNTED_HEADS)
        for name, lengths in rows.items()
    }
