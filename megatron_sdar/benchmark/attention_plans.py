"""What attention prepares per row, measured: pairs computed in vain, and the BlockMask's cost."""

from __future__ import annotations

import time
import tracemalloc
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

import numpy as np
import torch
from sdar_kernels import tile_plan
from sdar_kernels.block_mask import AttentionMask
from sdar_kernels.flex_attention import FLEX_BLOCK, interval_mask_mod, make_block_mask
from sdar_kernels.head_layout import HeadLayout
from sdar_kernels.self_check import document_intervals
from sdar_kernels.tile_runs import make_key_tiles, make_query_tiles
from sdar_kernels.triton_configs import attention_config
from torch.nn.attention.flex_attention import create_block_mask

# The GPU whose tile sizes the Triton plan is counted with, and the heads that it is counted for:
# groups of 2, 4 and 8 (SDAR 1.7B; 4B and 8B; 30B-A3B), and those that the benchmark times.
_ARCHITECTURE = "sm_90"
COUNTED_HEADS = (
    HeadLayout(16, 8, 128), HeadLayout(32, 8, 128), HeadLayout(32, 4, 128), HeadLayout(8, 4, 64),
)  # fmt: skip


@dataclass(frozen=True)
class PlanFigures:
    """Computed over allowed pairs of one row, per plan; of several head layouts the largest."""

    tiled: float
    triton: float

    @property
    def waste(self) -> float:
        return max(self.tiled, self.triton)


@dataclass(frozen=True)
class BlockMaskFigures:
    """Building FlexAttention's BlockMask for a row of one document.

    Attributes:
        milliseconds: ours, median.
        peak_mb: MiB that Python and numpy held beyond the mask's intervals at the peak.
        create_tokens, create_milliseconds: torch's `create_block_mask` for a row of fewer tokens.
    """

    milliseconds: float
    peak_mb: float
    create_tokens: int
    create_milliseconds: float


def packed_lengths(capacity: int, shortest: int, longest: int, block_length: int) -> list[int]:
    """Lengths of documents that fill a row, uniform between two limits, whole blocks."""
    rng = np.random.default_rng(0)
    lengths: list[int] = []
    while (room := capacity - sum(lengths)) >= block_length:
        length = int(rng.integers(shortest, longest + 1)) // block_length * block_length
        lengths.append(min(max(length, block_length), room // block_length * block_length))
    return lengths


def plan_figures(
    lengths: list[int], block_length: int, layouts: Sequence[HeadLayout]
) -> PlanFigures:
    """Waste of our plans on one row of these documents."""
    mask = AttentionMask.build(document_intervals(lengths, block_length))
    triton = max(triton_waste(mask, heads) for heads in layouts)
    return PlanFigures(tile_plan.waste(mask), triton)


def triton_waste(mask: AttentionMask, heads: HeadLayout) -> float:
    """The largest of the three Triton kernels' ratios, with the tile sizes of an H100."""
    group = heads.num_heads // heads.num_kv_heads
    config = attention_config(_ARCHITECTURE, heads.head_dim, torch.bfloat16, group)
    pairs = [
        make_query_tiles(mask, launch.rows // group, launch.keys, launch.masked).num_pairs
        for launch in (config.forward, config.backward_queries)
    ]
    launch = config.backward_keys
    keys = make_key_tiles(mask, launch.rows // group, launch.keys, launch.masked // group)
    return max(*pairs, keys.num_pairs) / mask.num_pairs


def block_mask_figures(length: int, create_length: int, block_length: int) -> BlockMaskFigures:
    """Measure on the host, rows of 2 * length and 2 * create_length tokens."""
    mask = AttentionMask.build(document_intervals([length], block_length))
    small = AttentionMask.build(document_intervals([create_length], block_length))
    # Gradient mode would make create_block_mask remember every step.
    with torch.no_grad():
        ours = _milliseconds(lambda: make_block_mask(mask), 5)
        tokens = small.num_tokens
        mask_mod = interval_mask_mod(small.key_intervals)
        theirs = _milliseconds(
            lambda: create_block_mask(
                mask_mod, None, None, tokens, tokens, device="cpu", BLOCK_SIZE=FLEX_BLOCK
            ),
            1,
        )
    tracemalloc.start()
    make_block_mask(mask)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return BlockMaskFigures(ours, peak / 2**20, create_length, theirs)


def _milliseconds(work: Callable[[], Any], rounds: int) -> float:
    """Median of the process's time, after one call that does not count."""
    work()
    times = []
    for _ in range(rounds):
        started = time.process_time()
        work()
        times.append(time.process_time() - started)
    return median(times) * 1000
