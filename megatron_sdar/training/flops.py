"""Matrix-multiply FLOPs of a training step, counted exactly from its rows.

What is counted is the work that the loss needs ("model FLOPs"): every product once forward and
twice backward (for its input and for its weight, as far as they have gradients), attention for
allowed pairs only, the head for masked tokens only. Not counted: recomputed activations, the fifth
product that flash attention's backward repeats, tiles that are computed and masked away, padding of
the vocabulary, and everything that is no product (norms, softmax, optimizer). An add and a multiply
are 2 FLOPs.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import astuple, dataclass

import numpy as np

from megatron_sdar.architecture import Architecture
from megatron_sdar.checkpoint.safetensors_files import volume
from megatron_sdar.checkpoint.tensor_names import EMBEDDING, model_tensor_shapes
from megatron_sdar.diffusion.rows import Row
from megatron_sdar.model.finetuning import DOWN, EVERYTHING, UP, Finetuning


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


def step_flops(
    arch: Architecture,
    works: Iterable[RowWork],
    *,
    trimmed: bool,
    finetuning: Finetuning = EVERYTHING,
) -> StepFlops:
    """FLOPs of forward and backward of the rows of one optimizer step.

    Args:
        arch: the model; its vocabulary counts without padding.
        works: one per row; zeros for a step without rows.
        trimmed: the last layer computes keys and values for all T tokens, everything else for
            the M loss positions only (False: everything for all T).
        finetuning: what is trained.

    Formulas, forward, D hidden, N and K heads of size H, I intermediate, V vocabulary:
    q and o 4 D N H, k and v 4 D K H, mlp 6 D I per token, attention 4 N H per pair, head 2 D V.
    """
    total = RowWork(*map(sum, zip((0, 0, 0, 0), *map(astuple, works), strict=True)))
    walk = _Walk(finetuning, finetuning.adapted(model_tensor_shapes(arch)))
    projections = attention = mlp = 0
    for layer in range(arch.num_hidden_layers):
        shortened = trimmed and layer == arch.num_hidden_layers - 1
        tokens = total.num_tokens
        queries = total.num_loss_positions if shortened else tokens
        pairs = total.num_loss_pairs if shortened else total.num_pairs
        name = f"model.layers.{layer}"
        walk.passed(f"{name}.input_layernorm")
        q, k, v, o = (f"{name}.self_attn.{part}_proj" for part in "qkvo")
        projections += walk.product(queries, q) + walk.product(tokens, k, v)
        walk.passed(q, k, v, f"{name}.self_attn.q_norm", f"{name}.self_attn.k_norm")
        attention += walk.passes * 4 * arch.num_attention_heads * arch.head_dim * pairs
        projections += walk.product(queries, o)
        walk.passed(o, f"{name}.post_attention_layernorm")
        gate, up, down = (f"{name}.mlp.{part}_proj" for part in ("gate", "up", "down"))
        mlp += walk.product(queries, gate, up)
        walk.passed(gate, up)
        mlp += walk.product(queries, down)
        walk.passed(down)
    walk.passed("model.norm")
    return StepFlops(projections, attention, mlp, walk.product(total.num_loss_positions, "lm_head"))


class _Walk:
    """Goes through the model in the order of forward and knows what backward leaves out.

    A frozen weight has no gradient, and in front of all that is trained nothing has one.
    """

    def __init__(self, finetuning: Finetuning, shapes: Mapping[str, tuple[int, ...]]) -> None:
        self._finetuning, self._shapes = finetuning, shapes
        self._learns = finetuning.trains(EMBEDDING)

    @property
    def passes(self) -> int:
        """How often a product without a weight is made: backward has two for its two factors."""
        return 3 if self._learns else 1

    def product(self, rows: int, *modules: str) -> int:
        """FLOPs of so many rows times each of these weights, and their low-rank updates."""
        total = 0
        for module in modules:
            for name in self._names(module):
                if name not in self._shapes:
                    continue
                # Through its second factor an update's gradient goes in any case.
                has_input_gradient = self._learns or name.endswith(f".{UP}.weight")
                passes = 1 + has_input_gradient + self._finetuning.trains(name)
                total += passes * 2 * rows * volume(self._shapes[name])
        return total

    def passed(self, *modules: str) -> None:
        """What follows these modules needs an input gradient if any of them is trained."""
        self._learns = self._learns or any(
            name in self._shapes and self._finetuning.trains(name)
            for module in modules
            for name in self._names(module)
        )

    @staticmethod
    def _names(module: str) -> tuple[str, ...]:
        return tuple(f"{module}{factor}.weight" for factor in ("", f".{DOWN}", f".{UP}"))
