"""Eager reference of every op: the specification that the fast paths are tested against.

Written for clarity, usable in fp64, quadratic in memory. Nothing in the training path imports
this file; tests and the `reference` attention backend do. Invariant: an op here has no option
that its fast form lacks.

Shape legend: T queries, S keys, N query heads, K key/value heads, H head_dim, V vocabulary.
Queries and keys are mostly the same tokens, but S may differ from T.
"""

from __future__ import annotations

import torch
from torch import Tensor


def dense_mask(key_intervals: Tensor, num_keys: int | None = None) -> Tensor:
    """Expand per-query key intervals into the boolean mask they stand for.

    Args:
        key_intervals: int [T, 4]; query i sees keys [lo1, hi1) and [lo2, hi2).
        num_keys: S; default: as many as queries.

    Returns:
        bool [T, S], True where the query (row) may see the key (column).
    """
    num_keys = key_intervals.shape[0] if num_keys is None else num_keys
    keys = torch.arange(num_keys, device=key_intervals.device)
    lo1, hi1, lo2, hi2 = key_intervals.unsqueeze(-1).unbind(1)
    return ((keys >= lo1) & (keys < hi1)) | ((keys >= lo2) & (keys < hi2))


def attention(q_TNH: Tensor, k_SKH: Tensor, v_SKH: Tensor, key_intervals: Tensor) -> Tensor:
    """Softmax attention under the interval mask, scale 1/sqrt(H), grouped-query heads.

    Args:
        q_TNH: queries; N is a multiple of K, query head n reads key head n // (N // K).
        k_SKH, v_SKH: keys and values.
        key_intervals: int [T, 4]; every query must see at least one key.

    Returns:
        [T, N, H] in the dtype of q.
    """
    groups = q_TNH.shape[1] // k_SKH.shape[1]
    k_SNH = k_SKH.repeat_interleave(groups, dim=1)
    v_SNH = v_SKH.repeat_interleave(groups, dim=1)
    scores = torch.einsum("qnh,knh->nqk", q_TNH, k_SNH) * q_TNH.shape[-1] ** -0.5
    hidden = ~dense_mask(key_intervals, k_SKH.shape[0])
    scores = scores.masked_fill(hidden, float("-inf"))
    return torch.einsum("nqk,knh->qnh", scores.softmax(dim=-1), v_SNH)


def weighted_cross_entropy(
    hidden_MD: Tensor, weight_VD: Tensor, targets_M: Tensor, loss_weights_M: Tensor
) -> Tensor:
    """sum_i w_i * CE(hidden_i @ weight^T, target_i), a scalar; logits stored whole."""
    losses = torch.nn.functional.cross_entropy(hidden_MD @ weight_VD.T, targets_M, reduction="none")
    return (losses * loss_weights_M).sum()


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """weight * x / sqrt(mean(x^2, last dim) + eps), as Hugging Face's Qwen3: x [..., D].

    Statistics are fp32 at least; the normed value is rounded to the dtype of x before it meets
    the weight.
    """
    wide = x if x.dtype == torch.float64 else x.float()
    normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return weight * normed.to(x.dtype)


def apply_rotary(x_TNH: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the two halves of each head: x * cos + rotate_half(x) * sin; tables [T, 1, H]."""
    first, second = x_TNH.chunk(2, dim=-1)
    return x_TNH * cos + torch.cat((-second, first), dim=-1) * sin


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up, elementwise."""
    return torch.nn.functional.silu(gate) * up
