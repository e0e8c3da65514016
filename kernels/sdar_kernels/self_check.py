"""A short numerical check of an attention backend against the reference.

Two rows of one length are run, forward and backward: [clean | noisy] copies of several ragged
documents with padding, and the published [noisy | clean] order. The second has the shape of the
first, so a backend that keeps the mask it was compiled with is caught too. Then half of the first
row's noisy tokens as the only queries over all keys, as the last layer has it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from sdar_kernels import reference
from sdar_kernels.block_mask import AttentionMask, IntArray
from sdar_kernels.head_layout import HeadLayout

Attention = Callable[[Tensor, Tensor, Tensor, AttentionMask], Tensor]

_NAMES = ("output", "query gradient", "key gradient", "value gradient")
# Largest error relative to a token's own largest element. Rounding of inputs and probabilities
# gives about a tenth of this; a wrong mask or a missing term gives 0.1 to 1.
_TOLERANCE = {
    torch.bfloat16: 4e-2,
    torch.float16: 1e-2,
    torch.float32: 1e-4,
    torch.float64: 1e-9,
}
_TF32_TOLERANCE = 1e-2
# Tokens whose gradient is small beside the others' are held to this share of the largest.
_FLOOR = 0.1


def attention_problem(
    attention: Attention,
    device: torch.device,
    dtype: torch.dtype,
    heads: HeadLayout,
    *,
    training: bool = True,
    short: bool = False,
) -> str | None:
    """What is wrong with a backend in one line, or None.

    Args:
        attention: the backend.
        device, dtype, heads: of its inputs.
        training: whether gradients are checked too.
        short: use the smallest rows that still show a wrong mask.
    """
    for mask in _masks((20, 12) if short else (148, 36, 84), device):
        inputs = _inputs(mask, device, dtype, heads)
        try:
            ours = _outputs(attention, inputs, mask, training)
        except Exception as error:  # whatever a compiler or a driver raises
            text = " ".join(str(error).split())
            return f"{type(error).__name__}: {text[:200]}"
        exact = _outputs(_reference, [x.double() for x in inputs], mask, training)
        for name, actual, expected in zip(_NAMES, ours, exact, strict=False):
            problem = _difference(name, actual, expected, _tolerance(dtype))
            if problem is not None:
                return problem
    return None


def _masks(documents: Sequence[int], device: torch.device) -> Iterator[AttentionMask]:
    for noisy_first in (False, True):
        intervals = document_intervals(documents, 4, noisy_first=noisy_first, padding=5)
        yield AttentionMask.build(intervals, device)
    clean_first = document_intervals(documents, 4, padding=5)
    noisy = sum(documents) + np.random.default_rng(0).permutation(sum(documents))
    # A clean token behind them, as the model pads its queries with.
    chosen = np.append(np.sort(noisy[: noisy.size // 2]), 0)
    yield AttentionMask.build(clean_first, device).select(chosen)


def _reference(q: Tensor, k: Tensor, v: Tensor, mask: AttentionMask) -> Tensor:
    return reference.attention(q, k, v, mask.key_intervals)


def _tolerance(dtype: torch.dtype) -> float:
    if dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32":
        return _TF32_TOLERANCE
    return _TOLERANCE[dtype]


def _difference(name: str, actual: Tensor, expected: Tensor, tolerance: float) -> str | None:
    if not bool(torch.isfinite(actual).all()):
        return f"{name} is not finite"
    error = (actual.double() - expected).abs().flatten(1).amax(dim=1)
    size = expected.abs().flatten(1).amax(dim=1)
    worst = (error / size.clamp_min(_FLOOR * float(size.max()))).max().item()
    if worst > tolerance:
        return f"{name} is off by {worst:.1e} of its size (allowed {tolerance:.0e})"
    return None


def _inputs(
    mask: AttentionMask, device: torch.device, dtype: torch.dtype, heads: HeadLayout
) -> list[Tensor]:
    """q, k, v and an upstream gradient, from numpy: the run's own generators stay untouched."""
    rng = np.random.default_rng(0)
    queries = (mask.num_tokens, heads.num_heads, heads.head_dim)
    keys = (mask.num_keys, heads.num_kv_heads, heads.head_dim)
    return [
        torch.from_numpy(rng.standard_normal(shape)).to(device, dtype)
        for shape in (queries, keys, keys, queries)
    ]


def _outputs(
    attention: Attention, inputs: Sequence[Tensor], mask: AttentionMask, training: bool
) -> list[Tensor]:
    """The output, and in training the gradients of q, k and v."""
    q, k, v, upstream = inputs
    if not training:
        with torch.no_grad():
            return [attention(q, k, v, mask)]
    q, k, v = (leaf.clone().requires_grad_() for leaf in (q, k, v))
    with torch.enable_grad():
        out = attention(q, k, v, mask)
        return [out.detach(), *torch.autograd.grad(out, (q, k, v), upstream)]


def document_intervals(
    documents: Sequence[int], block: int, *, noisy_first: bool = False, padding: int = 0
) -> IntArray:
    """Key intervals int32 [T, 4] of a row of both copies of documents, and padding.

    Args:
        documents: lengths; the last block of each may be short.
        block: tokens of a diffusion block.
        noisy_first: the published order [noisy | clean]; else [clean | noisy].
        padding: tokens at the end, each a document of its own.
    """
    total = sum(documents)
    intervals = np.zeros((2 * total + padding, 4), dtype=np.int32)
    clean_base, noisy_base = (total, 0) if noisy_first else (0, total)
    start = 0
    for length in documents:
        begins = np.arange(length) // block * block
        ends = np.minimum(begins + block, length)
        clean = slice(clean_base + start, clean_base + start + length)
        noisy = slice(noisy_base + start, noisy_base + start + length)
        intervals[clean, 0] = intervals[noisy, 0] = clean.start
        intervals[clean, 1] = clean.start + ends
        intervals[noisy, 1] = clean.start + begins
        intervals[noisy, 2] = noisy.start + begins
        intervals[noisy, 3] = noisy.start + ends
        start += length
    tail = np.arange(2 * total, 2 * total + padding)
    intervals[tail, :2] = 2 * total
    intervals[tail, 2], intervals[tail, 3] = tail, tail + 1
    return intervals
