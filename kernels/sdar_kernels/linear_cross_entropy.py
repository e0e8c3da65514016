"""Weighted cross-entropy of a linear head, in chunks of tokens, over one shard of the vocabulary.

The logits of a chunk exist only while the chunk is computed, in one buffer that all chunks share,
in the dtype of the hidden states; statistics are fp32 (fp64 for fp64). The loss is a scalar, so
the gradients of hidden states and head are formed in the same pass: three matmuls per chunk, not
four; two where the head is frozen. What ranks exchange is injected by the caller; nothing here
communicates.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sdar_kernels.cross_entropy_rows import (
    row_statistics_torch,
    scale_exponentials,
    write_gradient_torch,
)

_LOGIT_BYTES = 32 * 2**20
_HEAD_ROWS = 16384
# Matmuls are most of the work here: inductor is the torch form.
_IMPLS = ("torch", "triton", "inductor")


def _same(x: Tensor) -> Tensor:
    return x


@dataclass(frozen=True)
class Reductions:
    """How statistics are combined over the ranks that share the vocabulary.

    Each function takes a tensor of any shape and returns its elementwise maximum or sum over the
    ranks, in place or not. The default is one rank that holds the whole vocabulary.
    """

    maximum: Callable[[Tensor], Tensor] = _same
    total: Callable[[Tensor], Tensor] = _same


ALONE = Reductions()


def linear_cross_entropy(
    hidden_MD: Tensor,
    weight_VD: Tensor,
    targets_M: Tensor,
    loss_weights_M: Tensor,
    *,
    first_token: int = 0,
    num_valid: int | None = None,
    reductions: Reductions = ALONE,
    chunk_tokens: int | None = None,
    weight_grad_sum: Tensor | None = None,
    impl: str = "torch",
) -> Tensor:
    """sum_i w_i * CE_i over M tokens, a scalar in fp32 (fp64 for fp64).

    Backward scales the gradients that forward formed, in place: it runs once. A factor of the
    whole loss costs least inside loss_weights. Hidden states get the gradient of this shard's
    part of the vocabulary only.

    Args:
        hidden_MD: [M, D], the same on every rank that shares the vocabulary.
        weight_VD: head rows of this shard [V, D]; V is the same on every rank.
        targets_M: token ids of the whole vocabulary [M].
        loss_weights_M: [M]; no gradient.
        first_token: token id of the shard's first row.
        num_valid: leading rows that are real tokens; default: all. The rest is padding, which
            takes no part in the softmax.
        reductions: called once per chunk each, in forward: maximum with [m], total with [2, m].
        chunk_tokens: tokens whose logits exist at once; default: see `default_chunk_tokens`.
        weight_grad_sum: [V, D], fp32 or wider. If given, the head's gradient is added to it, in
            forward already, instead of going to weight_VD. Then nothing may stand between the loss
            and backward: the upstream gradient must be 1; and hidden states must have a gradient.
        impl: one of _IMPLS; "triton" where sdar_kernels.fused_kernels says that it runs.
    """
    assert impl in _IMPLS, f"unresolved fused_kernels {impl!r}"
    wants_grad = torch.is_grad_enabled() and (hidden_MD.requires_grad or weight_VD.requires_grad)
    assert weight_grad_sum is None or hidden_MD.requires_grad, "backward would not be run"
    wants_weight_grad = wants_grad and (weight_grad_sum is not None or weight_VD.requires_grad)
    grad_sum = weight_grad_sum if wants_grad else None
    shard = _Shard(
        first_token, weight_VD.shape[0] if num_valid is None else num_valid, reductions, impl
    )
    chunk = chunk_tokens or default_chunk_tokens(weight_VD, hidden_MD.dtype)
    return _LinearCrossEntropy.apply(
        hidden_MD,
        weight_VD,
        targets_M,
        loss_weights_M,
        shard,
        chunk,
        wants_grad and hidden_MD.requires_grad,
        wants_weight_grad,
        grad_sum,
    )


@torch.no_grad()
def linear_token_losses(
    hidden_MD: Tensor,
    weight_VD: Tensor,
    targets_M: Tensor,
    *,
    first_token: int = 0,
    num_valid: int | None = None,
    reductions: Reductions = ALONE,
    chunk_tokens: int | None = None,
    impl: str = "torch",
) -> Tensor:
    """CE_i of every token, and 1 where no token has a greater logit than the target: [2, M].

    Arguments and collectives as in `linear_cross_entropy`; fp32 (fp64 for fp64), no gradients.
    """
    assert impl in _IMPLS, f"unresolved fused_kernels {impl!r}"
    wide = torch.float64 if hidden_MD.dtype == torch.float64 else torch.float32
    shard = _Shard(
        first_token, weight_VD.shape[0] if num_valid is None else num_valid, reductions, impl
    )
    used = weight_VD[: shard.num_valid]
    chunk = chunk_tokens or default_chunk_tokens(weight_VD, hidden_MD.dtype)
    out = torch.empty((2, hidden_MD.shape[0]), dtype=wide, device=hidden_MD.device)
    for start in range(0, hidden_MD.shape[0], chunk):
        rows = slice(start, start + chunk)
        local_targets = targets_M[rows] - shard.first_token
        statistics = _statistics(hidden_MD[rows] @ used.T, local_targets, shard, wide)
        peak, normalizer, target = _combine(*statistics, shard.reductions)
        out[0, rows] = normalizer.log() + (peak - target)
        out[1, rows] = target == peak
    return out


def default_chunk_tokens(weight_VD: Tensor, dtype: torch.dtype) -> int:
    """Tokens per chunk, a multiple of 64: their logits take 32 MiB at most, or three eighths of
    the head's fp32 gradient where that is more.

    The gradient exists in any case, and every chunk reads and writes all of it once.
    """
    budget = max(_LOGIT_BYTES, weight_VD.numel() * 3 // 2)
    return max(1, budget // (weight_VD.shape[0] * dtype.itemsize * 64)) * 64


@dataclass(frozen=True)
class _Shard:
    first_token: int
    num_valid: int
    reductions: Reductions
    impl: str


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        loss_weights: Tensor,
        shard: _Shard,
        chunk_tokens: int,
        wants_hidden_grad: bool,
        wants_weight_grad: bool,
        grad_sum: Tensor | None,
    ) -> Tensor:
        wide = torch.float64 if hidden.dtype == torch.float64 else torch.float32
        used = weight[: shard.num_valid]
        buffer = hidden.new_empty(min(chunk_tokens, hidden.shape[0]), shard.num_valid)
        loss = torch.zeros((), dtype=wide, device=hidden.device)
        grad_hidden = torch.empty_like(hidden) if wants_hidden_grad else None
        grad_weight = grad_sum
        if wants_weight_grad and grad_weight is None:
            grad_weight = torch.empty_like(weight, dtype=wide)
            # The first chunk writes the rest.
            grad_weight[shard.num_valid if hidden.shape[0] else 0 :].zero_()
        for start in range(0, hidden.shape[0], chunk_tokens):
            rows = slice(start, start + chunk_tokens)
            weights, local_targets = loss_weights[rows].to(wide), targets[rows] - shard.first_token
            logits = torch.mm(hidden[rows], used.T, out=buffer[: weights.shape[0]])
            own_peak, own_sum, own_target = _statistics(logits, local_targets, shard, wide)
            peak, normalizer, target = _combine(own_peak, own_sum, own_target, shard.reductions)
            loss += ((normalizer.log() + (peak - target)) * weights).sum()
            if grad_hidden is None and grad_weight is None:
                continue
            scale = weights / normalizer
            if _makes_exponentials(logits, shard, wide):
                scale_exponentials(logits, local_targets, scale * (own_peak - peak).exp(), weights)
            else:
                _write_gradient(logits, local_targets, peak, scale, weights, shard)
            if grad_hidden is not None:
                torch.mm(logits, used, out=grad_hidden[rows])
            if grad_weight is not None:
                fresh = start == 0 and grad_sum is None
                _add_product(grad_weight[: shard.num_valid], logits, hidden[rows], fresh)
        ctx.sums = grad_sum is not None
        own_weight = None if ctx.sums or grad_weight is None else grad_weight.to(weight.dtype)
        ctx.save_for_backward(grad_hidden, own_weight)
        return loss

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        # In place: a second gradient of the head would double the peak memory. Autograd refuses
        # a second backward, because saved tensors changed.
        grad_hidden, grad_weight = ctx.saved_tensors
        if grad.device.type != "cpu" or grad.item() != 1.0:
            assert not ctx.sums or grad.device.type != "cpu", (
                "the head's gradient is summed already"
            )
            for each in (grad_hidden, grad_weight):
                if each is not None:
                    each.mul_(grad)
        return grad_hidden, grad_weight, None, None, None, None, None, None, None


def _statistics(
    logits: Tensor, targets: Tensor, shard: _Shard, wide: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """Each row's maximum, sum of exp(logit - maximum), target logit or 0; [m] each.

    Where `_makes_exponentials` says so, exp(logit - maximum) is left in place of the logits.
    """
    if shard.num_valid == 0:
        nothing = logits.new_zeros(logits.shape[0], dtype=wide)
        return torch.full_like(nothing, torch.finfo(wide).min), nothing, nothing
    if shard.impl == "triton":
        from sdar_kernels.triton_cross_entropy import row_statistics

        return row_statistics(logits, targets, wide)
    in_place = _makes_exponentials(logits, shard, wide)
    return row_statistics_torch(logits, targets, wide, in_place=in_place)


def _makes_exponentials(logits: Tensor, shard: _Shard, wide: torch.dtype) -> bool:
    """Whether they can stand where the logits stood: nothing is rounded, and torch computes."""
    return shard.impl != "triton" and logits.dtype == wide and shard.num_valid > 0


def _write_gradient(
    logits: Tensor, targets: Tensor, peak: Tensor, scale: Tensor, weights: Tensor, shard: _Shard
) -> None:
    if shard.impl == "triton" and shard.num_valid:
        from sdar_kernels.triton_cross_entropy import write_gradient

        write_gradient(logits, targets, peak, scale, weights)
    elif shard.num_valid:
        write_gradient_torch(logits, targets, peak, scale, weights)


def _combine(
    peak: Tensor, normalizer: Tensor, target: Tensor, reductions: Reductions
) -> tuple[Tensor, Tensor, Tensor]:
    """The statistics of the whole vocabulary from each shard's."""
    if reductions is ALONE:
        return peak, normalizer, target
    overall = reductions.maximum(peak.clone())
    normalizer, target = reductions.total(
        torch.stack((normalizer * (peak - overall).exp(), target))
    )
    return overall, normalizer, target


def _add_product(total_VD: Tensor, grad_logits_MV: Tensor, hidden_MD: Tensor, fresh: bool) -> None:
    """total += grad_logits^T @ hidden (= if fresh), the sum in the dtype of total."""
    if total_VD.dtype == hidden_MD.dtype:
        total_VD.addmm_(grad_logits_MV.T, hidden_MD, beta=0 if fresh else 1)
        return
    for start in range(0, total_VD.shape[0], _HEAD_ROWS):
        rows = slice(start, start + _HEAD_ROWS)
        product = grad_logits_MV[:, rows].T @ hidden_MD
        if fresh:
            total_VD[rows] = product
        else:
            total_VD[rows] += product
