"""Matrix-multiply FLOPs of a training step, counted exactly from its rows.

What is counted is the work that the loss needs ("model FLOPs"): every product once forward and
twice backward (for its input and for its weight), attention for allowed pairs only, the head for
masked tokens only. Not counted: recomputed activations, the fifth product that flash attention's
backward repeats, tiles that are computed and masked away, padding of the vocabulary, and
everything that is no product (norms, softmax, optimizer). An add and a multiply are 2 FLOPs.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from megatron_sdar.architecture import Architecture
from megatron_sdar.diffusion.rows import Row

# Forward, and backward for input and weight.
_PASSES = 3


@dataclass(frozen=True)
class RowWork:
    """What decides the products of one row.

    Attributes:
        num_tokens: T, padding included: a row is computed as it is.
        num_pairs: allowed (query, key) pairs of all queries.
        num_loss_positions: M, masked tokens.
        num_loss_pairs: the pairs of the queries at loss positions.
    """

    num_tokens: int
    num_pairs: int
    num_loss_positions: int
    num_loss_pairs: int

    @classmethod
    def of(cls, row: Row) -> RowWork:
        """The work of a packed row (or of several on one token axis)."""
        lo1, hi1, lo2, hi2 = row.key_intervals.astype(np.int64).T
        seen = hi1 - lo1 + hi2 - lo2
        return cls(
            num_tokens=row.num_tokens,
            num_pairs=int(seen.sum()),
            num_loss_positions=int(row.loss_positions.size),
            num_loss_pairs=int(seen[row.loss_positions].sum()),
        )


@dataclass(frozen=True)
class StepFlops:
    """FLOPs of forward and backward.

    Attributes:
        projections: q, k, v and o.
        attention: scores and weighted values of allowed pairs.
        mlp: gate, up and down.
        head: logits of masked tokens.
    """

    projections: int
    attention: int
    mlp: int
    head: int

    @property
    def total(self) -> int:
        return self.projections + self.attention + self.mlp + self.head


def step_flops(arch: Architecture, works: Iterable[RowWork], *, trimmed: bool) -> StepFlops:
    """FLOPs of forward and backward of the rows of one optimizer step.

    Args:
        arch: the model; its vocabulary counts without padding.
        works: one per row; zeros for a step without rows.
        trimmed: the last layer computes keys and values for all T tokens, everything else for
            the M loss positions only (False: everything for all T).

    Formulas, forward, D hidden, N and K heads of size H, I intermediate, V vocabulary:
    q and o 4 D N H, k and v 4 D K H, mlp 6 D I per token, attention 4 N H per pair, head 2 D V.
    """
    hidden, layers = arch.hidden_size, arch.num_hidden_layers
    query_size = arch.num_attention_heads * arch.head_dim
    key_size = arch.num_key_value_heads * arch.head_dim
    tokens = queries = pairs = positions = 0
    for work in works:
        last_queries = work.num_loss_positions if trimmed else work.num_tokens
        last_pairs = work.num_loss_pairs if trimmed else work.num_pairs
        tokens += layers * work.num_tokens
        queries += (layers - 1) * work.num_tokens + last_queries
        pairs += (layers - 1) * work.num_pairs + last_pairs
        positions += work.num_loss_positions
    return StepFlops(
        projections=_PASSES * 4 * hidden * (query_size * queries + key_size * tokens),
        attention=_PASSES * 4 * query_size * pairs,
        mlp=_PASSES * 6 * hidden * arch.intermediate_size * queries,
        head=_PASSES * 2 * hidden * arch.vocab_size * positions,
    )
