"""Vocabulary-parallel weighted cross-entropy over masked positions, in chunks.

The logits of a chunk exist only while the chunk is computed, and never as [tokens, vocabulary]
at once. Gradients of hidden states and head are formed in the same pass, since the loss is a
scalar: three matmuls per chunk instead of four. The matmul runs in the hidden states' dtype; its
logits are widened to fp32 (or stay fp64) before any statistic is taken.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from megatron_sdar.parallel.collectives import all_reduce_max, all_reduce_sum

CHUNK_TOKENS = 1024


@dataclass(frozen=True)
class VocabShard:
    """This rank's part of the vocabulary.

    Attributes:
        tp: the tp axis.
        start: first token id of the shard.
        num_valid: leading rows of the shard that are real tokens (the rest is padding, which
            takes no part in the softmax).
    """

    tp: DeviceMesh
    start: int
    num_valid: int

    @classmethod
    def of(cls, tp: DeviceMesh, vocab_size: int, padded_vocab_size: int) -> VocabShard:
        rows = padded_vocab_size // tp.size()
        start = tp.get_local_rank() * rows
        return cls(tp, start, max(0, min(rows, vocab_size - start)))


def vocab_parallel_cross_entropy(
    hidden_MD: Tensor,
    weight_VD: Tensor,
    targets_M: Tensor,
    loss_weights_M: Tensor,
    shard: VocabShard,
    chunk_tokens: int = CHUNK_TOKENS,
) -> Tensor:
    """sum_i w_i * CE_i over M masked positions, a scalar in fp32 or wider.

    Args:
        hidden_MD: [M, D], the same on every tp rank; its gradient is partial over tp, so the
            caller must have entered the parallel region.
        weight_VD: local head rows [padded V / tp, D].
        targets_M: global token ids [M].
        loss_weights_M: [M].

    Collectives per chunk, forward: all_reduce max [m] and sum [2, m]; backward: none.
    """
    wants_grad = torch.is_grad_enabled() and (hidden_MD.requires_grad or weight_VD.requires_grad)
    return _WeightedCrossEntropy.apply(
        hidden_MD, weight_VD, targets_M, loss_weights_M, shard, chunk_tokens, wants_grad
    )


class _WeightedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        loss_weights: Tensor,
        shard: VocabShard,
        chunk_tokens: int,
        wants_grad: bool,
    ) -> Tensor:
        wide = torch.float64 if hidden.dtype == torch.float64 else torch.float32
        total = torch.zeros((), dtype=wide, device=hidden.device)
        grad_hidden = grad_weight = None
        if wants_grad:
            grad_hidden = torch.empty_like(hidden)
            grad_weight = torch.zeros_like(weight, dtype=wide)
        used = weight[: shard.num_valid]
        for start in range(0, hidden.shape[0], chunk_tokens):
            rows = slice(start, start + chunk_tokens)
            weights = loss_weights[rows].to(wide)
            losses, grad_logits = _chunk(hidden[rows] @ used.T, targets[rows], shard, wide)
            total += (losses * weights).sum()
            if grad_hidden is not None and grad_weight is not None:
                grad_logits = grad_logits.mul_(weights.unsqueeze(-1)).to(hidden.dtype)
                grad_hidden[rows] = grad_logits @ used
                grad_weight[: shard.num_valid] += grad_logits.T @ hidden[rows]
        if grad_hidden is not None and grad_weight is not None:
            ctx.save_for_backward(grad_hidden, grad_weight.to(weight.dtype))
        return total

    @staticmethod
    def backward(  # type: ignore[override]
        ctx: Any, grad: Tensor
    ) -> tuple[Tensor, Tensor, None, None, None, None, None]:
        grad_hidden, grad_weight = ctx.saved_tensors
        return grad_hidden * grad, grad_weight * grad, None, None, None, None, None


def _chunk(
    logits: Tensor, targets: Tensor, shard: VocabShard, wide: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Losses [m] and d loss / d local logits [m, valid] of one chunk."""
    group = shard.tp.get_group()
    logits = logits.to(wide)
    if shard.num_valid:
        peak = logits.amax(dim=-1)
    else:
        peak = logits.new_full((logits.shape[0],), torch.finfo(wide).min)
    peak = all_reduce_max(peak, group)
    logits = logits.sub_(peak.unsqueeze(-1))
    local_targets = targets - shard.start
    rows = torch.nonzero((local_targets >= 0) & (local_targets < shard.num_valid)).squeeze(-1)
    columns = local_targets[rows]
    sums = logits.new_zeros(2, logits.shape[0])
    sums[1, rows] = logits[rows, columns]
    exponentials = logits.exp_()
    sums[0] = exponentials.sum(dim=-1)
    normalizer, target_logits = all_reduce_sum(sums, group)
    losses = normalizer.log() - target_logits
    grad_logits = exponentials.div_(normalizer.unsqueeze(-1))
    grad_logits[rows, columns] -= 1.0
    return losses, grad_logits
