"""Inputs, outputs and errors of an attention in the tests of tiled and native attention."""

from __future__ import annotations

from collections.abc import Callable

import torch
from sdar_kernels import reference
from sdar_kernels.block_mask import AttentionMask
from sdar_kernels.tile_groups import TileSizes
from torch import Tensor

# Cuts everything that can be cut: tiles, batches of documents and blocks, and rows of a tile.
SMALL = TileSizes(
    3, 5, 16, batch_keys=8, batch_scores=64, row_scores=600, section_rows=40, kept_keys=7
)
LARGE = TileSizes(64, 128, 48, batch_keys=4096, kept_keys=0)

Attention = Callable[[Tensor, Tensor, Tensor, AttentionMask], Tensor]


def attention_inputs(
    seed: int,
    num_tokens: int,
    heads: tuple[int, int, int],
    dtype: torch.dtype,
    num_keys: int | None = None,
) -> tuple[Tensor, ...]:
    """q, k, v and an upstream gradient; as many keys as queries unless told."""
    generator = torch.Generator().manual_seed(seed)
    num_heads, num_kv_heads, head_dim = heads
    return tuple(
        torch.randn(size, count, head_dim, generator=generator, dtype=torch.float64).to(dtype)
        for size, count in (
            (num_tokens, num_heads),
            (num_keys or num_tokens, num_kv_heads),
            (num_keys or num_tokens, num_kv_heads),
            (num_tokens, num_heads),
        )
    )


def run_attention(
    attention: Attention, mask: AttentionMask, tensors: tuple[Tensor, ...]
) -> list[Tensor]:
    """Output and the gradients of q, k and v."""
    *leaves, upstream = (tensor.detach().clone() for tensor in tensors)
    for leaf in leaves:
        leaf.requires_grad_()
    out = attention(*leaves, mask)
    return [out.detach(), *torch.autograd.grad(out, leaves, upstream)]


def reference_results(mask: AttentionMask, tensors: tuple[Tensor, ...]) -> list[Tensor]:
    """The same by the reference."""
    return run_attention(_reference, mask, tensors)


def worst_error(attention: Attention, mask: AttentionMask, tensors: tuple[Tensor, ...]) -> float:
    """Largest difference from the reference, in output and gradients."""
    ours, theirs = run_attention(attention, mask, tensors), reference_results(mask, tensors)
    worst = 0.0
    for left, right in zip(ours, theirs, strict=True):
        assert left.shape == right.shape
        assert left.dtype == right.dtype
        error = (left - right).abs().max().item()
        assert error == error, "not a number"
        worst = max(worst, error)
    return worst


def _reference(q: Tensor, k: Tensor, v: Tensor, mask: AttentionMask) -> Tensor:
    return reference.attention(q, k, v, mask.key_intervals)
