"""Deliberate defects, each of the kind that parallel trainers have shipped.

A mutant patches the product inside the spawned ranks; the equality suite must then go red.
Each one names the complaint it stands for (NeMo-RL 3716: missed q/k-norm reduce; per-micro-batch
denominators; Megatron-Bridge 2952: middle stages without packing metadata; and others).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from unittest import mock

import numpy as np
import torch
from distributed.layouts import BLOCK, Layout, run_layout
from sdar_kernels import tile_runs
from sdar_kernels.block_mask import AttentionMask
from sdar_kernels.rms_norm import residual_rms_norm
from sdar_kernels.swiglu import swiglu_gradients
from torch import Tensor

from megatron_sdar.diffusion import savings
from megatron_sdar.model import decoder_layer, recomputation
from megatron_sdar.model.attention import SelectedTokens, TokenLayout
from megatron_sdar.model.sdar import SdarStage
from megatron_sdar.parallel import collectives, joint_products, local_weights, projections
from megatron_sdar.training import batch as training_batch
from megatron_sdar.training import step as training_step

Patch = Callable[[], mock._patch]


def _no_partial_sum() -> mock._patch:
    return mock.patch.object(training_step, "sum_partial_gradients", return_value=None)


def _no_qk_norm_sum() -> mock._patch:
    original = training_step.sum_partial_gradients

    def skipping(gradients: dict, names: set, mesh: object) -> None:
        original(gradients, {n for n in names if "q_norm" not in n and "k_norm" not in n}, mesh)

    return mock.patch.object(training_step, "sum_partial_gradients", skipping)


def _denominator_per_micro_batch() -> mock._patch:
    def scales(counts: list, total: int, normalization: str, dp_size: int) -> list[float]:
        del total, normalization
        return [1.0 / (max(count, 1) * len(counts) * dp_size) for count in counts]

    return mock.patch.object(training_step, "micro_batch_scales", scales)


def _local_denominator() -> mock._patch:
    return mock.patch.object(
        training_step, "sum_over_data_parallel", lambda value, mesh: value * mesh.dp_size
    )


def _middle_stage_without_metadata() -> mock._patch:
    original = SdarStage.forward

    def forward(
        self: SdarStage, hidden: object, batch: object, return_logits: bool = False
    ) -> object:
        if not self.stage.is_first and not self.stage.is_last:
            # What a stage without packing metadata computes: plain causal attention.
            tokens = batch.num_tokens
            intervals = np.zeros((tokens, 4), dtype=np.int32)
            intervals[:, 1] = np.arange(1, tokens + 1)
            batch = replace(batch, mask=AttentionMask.build(intervals))
        return original(self, hidden, batch, return_logits)

    return mock.patch.object(SdarStage, "forward", forward)


def _middle_stage_without_positions() -> mock._patch:
    original = SdarStage.forward

    def forward(
        self: SdarStage, hidden: object, batch: object, return_logits: bool = False
    ) -> object:
        if not self.stage.is_first and not self.stage.is_last:
            batch = replace(batch, position_ids=batch.position_ids * 0)
        return original(self, hidden, batch, return_logits)

    return mock.patch.object(SdarStage, "forward", forward)


def _no_tied_sum() -> mock._patch:
    return mock.patch.object(training_step, "sum_tied_gradients", return_value=None)


def _norm_counts_replicas_twice() -> mock._patch:
    return mock.patch("megatron_sdar.parallel.gradients.replication", return_value=1)


def _no_input_gradient_sum() -> mock._patch:
    return mock.patch.object(
        collectives._CopyToRegion, "backward", staticmethod(lambda ctx, grad: (grad, None))
    )


def _projections_without_input_sum() -> mock._patch:
    original = decoder_layer.joint_column_parallel_projection

    def alone(x: Tensor, weights: object, group: object, split: bool) -> object:
        del group, split
        return original(x, weights, None, False)

    return mock.patch.object(decoder_layer, "joint_column_parallel_projection", alone)


def _blocks_with_one_mask_left_out() -> mock._patch:
    def masked_blocks(masked: np.ndarray, block_length: int) -> np.ndarray:
        return np.flatnonzero(masked.reshape(-1, block_length).sum(axis=1) > 1)

    return mock.patch.object(savings, "masked_blocks", masked_blocks)


def _stale_recomputation() -> mock._patch:
    """Selective recomputation returns the first tensor that was asked for again and again."""
    kept: dict[torch.Size, Tensor] = {}

    def unpack(packed: object) -> Tensor:
        if isinstance(packed, Tensor):
            return packed
        with torch.no_grad():
            base = kept.setdefault(packed.shape, packed.make())
        return base.as_strided(packed.shape, packed.stride, packed.offset)

    return mock.patch.object(recomputation, "_unpack", unpack)


def _stale_activation() -> mock._patch:
    """The projection behind SwiGLU is given the activation of the layer that was first."""
    kept: dict[torch.Size, Tensor] = {}

    def gradients(*arguments: object) -> tuple[Tensor, ...]:
        of_input, activated = swiglu_gradients(*arguments)
        return of_input, kept.setdefault(activated.shape, activated)

    return mock.patch.object(projections, "swiglu_gradients", gradients)


def _gate_and_up_exchanged() -> mock._patch:
    """gate and up, seen as one matrix, are exchanged."""
    original = joint_products.rows_as_one

    def exchanged(parts: Sequence[Tensor]) -> Tensor | None:
        whole = original(parts)
        return None if whole is None or len(parts) != 2 else whole.roll(parts[0].shape[0], 0)

    return mock.patch.object(joint_products, "rows_as_one", exchanged)


def _stream_past_the_norm_has_no_gradient() -> mock._patch:
    def detached(*arguments: object) -> tuple[Tensor, Tensor]:
        stream, normed = residual_rms_norm(*arguments)
        return stream.detach(), normed

    return mock.patch.object(decoder_layer, "residual_rms_norm", detached)


def _first_ranks_residual() -> mock._patch:
    """Every tp rank adds the residual of the first rank's share of the trimmed tokens."""
    return mock.patch.object(
        decoder_layer,
        "_own_part",
        lambda positions, rank, num_ranks: positions.view(num_ranks, -1)[0],
    )


def _trimmed_queries_at_the_row_start() -> mock._patch:
    """Trimmed queries are rotated as if they were the row's first tokens."""

    def of(positions: Tensor, mask: AttentionMask, layout: TokenLayout) -> SelectedTokens:
        cos, sin = (table[: positions.shape[0]] for table in (layout.cos, layout.sin))
        return SelectedTokens(positions, TokenLayout(mask, cos, sin))

    return mock.patch.object(SelectedTokens, "of", staticmethod(of))


def _loss_padding_with_weight() -> mock._patch:
    def padded(values: np.ndarray, num_padding: int) -> np.ndarray:
        return np.concatenate((values, np.ones(num_padding, dtype=values.dtype)))

    return mock.patch.object(training_batch, "_padded", padded)


def _later_micro_batches_are_lost() -> mock._patch:
    """Gradients of all micro-batches but the first are added to a copy."""
    original = local_weights.held_gradient

    def copied(weight: Tensor) -> Tensor | None:
        held = original(weight)
        return None if held is None else held.clone()

    return mock.patch.object(local_weights, "held_gradient", copied)


MUTANTS: dict[str, tuple[Patch, Layout]] = {
    "no_partial_sum": (_no_partial_sum, Layout("m1", tp=2, sequence_parallel=True)),
    "no_qk_norm_sum": (_no_qk_norm_sum, Layout("m2", tp=2)),
    "denominator_per_micro_batch": (_denominator_per_micro_batch, Layout("m3", dp=2)),
    "local_denominator": (_local_denominator, Layout("m4", dp=2)),
    "no_tied_sum": (_no_tied_sum, Layout("m5", pp=2, tied=True)),
    "norm_counts_replicas_twice": (_norm_counts_replicas_twice, Layout("m6", tp=2)),
    "no_input_gradient_sum": (_no_input_gradient_sum, Layout("m7", tp=2)),
    "projections_without_input_sum": (_projections_without_input_sum, Layout("m13", tp=2)),
    "blocks_with_one_mask_left_out": (_blocks_with_one_mask_left_out, Layout("m14")),
    "stale_recomputation": (_stale_recomputation, Layout("m15", recompute="selective")),
    "stale_activation": (_stale_activation, Layout("m17", tp=2, sequence_parallel=True)),
    "gate_and_up_exchanged": (_gate_and_up_exchanged, Layout("m19")),
    "stream_past_the_norm_has_no_gradient": (
        _stream_past_the_norm_has_no_gradient,
        Layout("m18"),
    ),
    "middle_stage_without_metadata": (_middle_stage_without_metadata, Layout("m8", pp=4)),
    "middle_stage_without_positions": (_middle_stage_without_positions, Layout("m9", pp=4)),
    "first_ranks_residual": (_first_ranks_residual, Layout("m10", tp=2, sequence_parallel=True)),
    "trimmed_queries_at_the_row_start": (_trimmed_queries_at_the_row_start, Layout("m11")),
    "later_micro_batches_are_lost": (_later_micro_batches_are_lost, Layout("m16", dp=2)),
    "loss_padding_with_weight": (
        _loss_padding_with_weight,
        Layout("m12", tp=2, sequence_parallel=True),
    ),
}


def _changed_plan(name: str, change: Callable[[Tensor], None]) -> mock._patch:
    """A plan of the Triton kernels whose tile table is changed before they read it."""
    original = getattr(tile_runs, name)

    def make(*arguments: object) -> object:
        plan = original(*arguments)
        change(plan.tiles)
        return plan

    return mock.patch(f"sdar_kernels.triton_attention.{name}", make)


def _own_block_cut_short() -> mock._patch:
    def change(tiles: Tensor) -> None:
        # A noisy tile misses the first token of its own blocks. (Padding would become NaN.)
        noisy = (tiles[:, 6] - tiles[:, 5] > 1) & (tiles[:, 4] > tiles[:, 2])
        tiles[:, 5] += noisy.int()

    return _changed_plan("make_query_tiles", change)


def _last_keys_unseen() -> mock._patch:
    def change(tiles: Tensor) -> None:
        tiles[:, 4] -= torch.where(tiles[:, 4] - tiles[:, 3] > BLOCK, BLOCK, 0).int()

    return _changed_plan("make_query_tiles", change)


def _keys_miss_a_run() -> mock._patch:
    def change(tiles: Tensor) -> None:
        tiles[:, 3] -= (tiles[:, 3] - tiles[:, 2] > 1).int()  # one copy sends no gradient back

    return _changed_plan("make_key_tiles", change)


KERNEL_MUTANTS: dict[str, tuple[Patch, Layout]] = {
    "own_block_cut_short": (_own_block_cut_short, Layout("k1", backend="triton")),
    "keys_miss_a_run": (_keys_miss_a_run, Layout("k2", backend="triton")),
    "last_keys_unseen": (_last_keys_unseen, Layout("k3", backend="triton")),
}


@contextmanager
def _applied(name: str) -> Iterator[None]:
    with ExitStack() as stack:
        stack.enter_context({**MUTANTS, **KERNEL_MUTANTS}[name][0]())
        yield


def run_mutant(name: str, directory: Path) -> None:
    """Run the mutant's layout with its defect in place (on every rank of the world)."""
    with _applied(name):
        run_layout({**MUTANTS, **KERNEL_MUTANTS}[name][1], directory)
