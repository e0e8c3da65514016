"""Timing of attention configurations on the device at hand (attention_autotune).

The kernels are searched one after the other: the forward pass first, then each backward kernel
beside the best so far. A configuration that does not compile or launch is passed over.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, replace

import numpy as np
import torch

from sdar_kernels.block_mask import AttentionMask
from sdar_kernels.head_layout import HeadLayout
from sdar_kernels.self_check import document_intervals
from sdar_kernels.triton_configs import AttentionConfig, KernelConfig, default_config

# Milliseconds of one call.
Timer = Callable[[Callable[[], None]], float]

_SEED = 0
_DOCUMENT_LENGTHS = (128, 1024)


@dataclass(frozen=True)
class SearchResult:
    """The fastest configuration and what was seen.

    Attributes:
        config: the fastest.
        milliseconds, default_milliseconds: forward and backward with it, and with the default.
        num_timed, num_failed: configurations that ran, and that did not.
    """

    config: AttentionConfig
    milliseconds: float
    default_milliseconds: float
    num_timed: int
    num_failed: int


def candidates(default: KernelConfig) -> Iterator[KernelConfig]:
    """The default, then its neighbours: half and double tiles, other warps and stages."""
    yield default
    for rows in (default.rows // 2, default.rows, default.rows * 2):
        for keys in (default.keys // 2, default.keys, default.keys * 2):
            for num_warps in (4, 8):
                for num_stages in (1, 2, 3):
                    config = KernelConfig(rows, keys, default.masked, num_warps, num_stages)
                    if min(rows, keys) >= 16 and config != default:
                        yield config


def search_config(
    device: torch.device,
    dtype: torch.dtype,
    heads: HeadLayout,
    num_tokens: int,
    timer: Timer,
    propose: Callable[[KernelConfig], Iterator[KernelConfig]] = candidates,
) -> SearchResult:
    """Time configurations on one row of both copies of documents of 128 to 1024 tokens.

    Args:
        device, dtype, heads: what attention will compute with.
        num_tokens: clean tokens of the row (cutoff_len).
        timer: milliseconds of a call, `triton.testing.do_bench` on a GPU.
        propose: configurations of one kernel, from its default.
    """
    from triton.errors import TritonError

    from sdar_kernels.triton_attention import triton_attention

    mask = AttentionMask.build(_row(num_tokens), device)
    generator = torch.Generator(device).manual_seed(_SEED)
    counts = (heads.num_heads, heads.num_kv_heads, heads.num_kv_heads, heads.num_heads)
    q, k, v, upstream = (
        torch.randn(
            mask.num_tokens, n, heads.head_dim, generator=generator, device=device, dtype=dtype
        )
        for n in counts
    )
    leaves = [x.requires_grad_() for x in (q, k, v)]

    def measure(config: AttentionConfig) -> float:
        def call() -> None:
            out = triton_attention(q, k, v, mask, config)
            torch.autograd.grad(out, leaves, upstream)

        return timer(call)

    group = heads.num_heads // heads.num_kv_heads
    best = default = default_config(device, heads.head_dim, dtype, group)
    fastest = default_time = measure(default)
    num_timed, num_failed = 1, 0
    for kernel in fields(AttentionConfig):
        for choice in propose(getattr(default, kernel.name)):
            config = replace(best, **{kernel.name: choice})
            if config == best:
                continue
            try:
                time = measure(config)
            except (TritonError, RuntimeError):  # the compiler's, or out of shared memory
                num_failed += 1
                continue
            num_timed += 1
            if time < fastest:
                best, fastest = config, time
    return SearchResult(best, fastest, default_time, num_timed, num_failed)


def _row(num_tokens: int) -> np.ndarray:
    rng = np.random.default_rng(_SEED)
    lengths: list[int] = []
    while (room := num_tokens - sum(lengths)) > 0:
        low, high = _DOCUMENT_LENGTHS
        lengths.append(min(room, int(rng.integers(low, high + 1))))
    return document_intervals(lengths, block=4)
