"""Vocabulary-parallel weighted cross-entropy over masked positions.

The tensor math, in chunks of tokens, is sdar_kernels.linear_cross_entropy; here stand the shard
of the vocabulary that a rank holds and the collectives that combine the ranks' statistics.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

from sdar_kernels.linear_cross_entropy import (
    ALONE,
    Reductions,
    linear_cross_entropy,
    linear_token_losses,
)
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from megatron_sdar.parallel.collectives import all_reduce_max, all_reduce_sum


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
    chunk_tokens: int | None = None,
    weight_grad_sum: Tensor | None = None,
    impl: str = "torch",
) -> Tensor:
    """sum_i w_i * CE_i over M masked positions, a scalar in fp32 or wider.

    Args:
        hidden_MD: [M, D], the same on every tp rank; its gradient is partial over tp, so the
            caller must have entered the parallel region.
        weight_VD: local head rows [padded V / tp, D].
        targets_M: global token ids [M].
        loss_weights_M: [M].
        chunk_tokens: tokens whose logits exist at once; default: from a byte budget that is the
            same on every rank.
        weight_grad_sum: local rows that the head's gradient is added to in forward; None: it goes
            to weight_VD. See `sdar_kernels.linear_cross_entropy`.
        impl: resolved `fused_kernels`.

    Collectives per chunk, forward: all_reduce max [m] and sum [2, m]; backward: none.
    """
    return linear_cross_entropy(
        hidden_MD,
        weight_VD,
        targets_M,
        loss_weights_M,
        first_token=shard.start,
        num_valid=shard.num_valid,
        reductions=_reductions(shard.tp),
        chunk_tokens=chunk_tokens,
        weight_grad_sum=weight_grad_sum,
        impl=impl,
    )


def vocab_parallel_token_losses(
    hidden_MD: Tensor, weight_VD: Tensor, targets_M: Tensor, shard: VocabShard, impl: str = "torch"
) -> Tensor:
    """[2, M]: every position's cross-entropy, and 1 where its target is the most probable token.

    Arguments and collectives as in `vocab_parallel_cross_entropy`; no gradients.
    """
    return linear_token_losses(
        hidden_MD,
        weight_VD,
        targets_M,
        first_token=shard.start,
        num_valid=shard.num_valid,
        reductions=_reductions(shard.tp),
        impl=impl,
    )


def _reductions(tp: DeviceMesh) -> Reductions:
    if tp.size() == 1:
        return ALONE
    group = tp.get_group()
    return Reductions(
        maximum=partial(all_reduce_max, group=group), total=partial(all_reduce_sum, group=group)
    )
