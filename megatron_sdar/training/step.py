"""One optimizer step: denominator, forwards and backwards, gradient sums, clip, update.

Invariant: the label count is summed over data-parallel ranks before the first backward, so the
loss and every gradient are those of one process that saw all rows of the step.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from megatron_sdar.architecture import Architecture
from megatron_sdar.diffusion.loss import micro_batch_scales
from megatron_sdar.diffusion.rows import Row
from megatron_sdar.model.batch import DeviceBatch
from megatron_sdar.model.sdar import EMBEDDING, HEAD, SdarStage
from megatron_sdar.optim.adamw import ShardedAdamW
from megatron_sdar.parallel.data_parallel import is_data_parallel, mark_backward
from megatron_sdar.parallel.gradients import (
    global_grad_norm,
    local_gradients,
    scale_gradients,
    sum_partial_gradients,
    sum_tied_gradients,
)
from megatron_sdar.parallel.layers import partial_gradient_names
from megatron_sdar.parallel.mesh import ParallelMesh, sum_over_data_parallel, sum_over_world
from megatron_sdar.parallel.pipeline import ActivationFormat, PipelineExecutor, ignore
from megatron_sdar.training.batch import row_seed, to_device
from megatron_sdar.training.rank_times import MOVING, UPDATING


@dataclass(frozen=True)
class StepResult:
    """What one step reports, the same on every rank.

    Attributes:
        loss: the step's loss.
        grad_norm: global gradient norm before clipping.
        label_tokens: label tokens of the step over all data-parallel ranks.
        stops: some rank was asked to stop before its backward was over.
    """

    loss: float
    grad_norm: float
    label_tokens: int
    stops: bool = False


class NonFiniteStepError(FloatingPointError):
    """Loss or gradient norm is not finite: on every rank, before any weight changed.

    Attributes:
        result: of the step. Its gradients are left in place until the next one.
    """

    def __init__(self, result: StepResult) -> None:
        super().__init__(f"loss {result.loss}, gradient norm {result.grad_norm}")
        self.result = result


def named_parameters(stages: Sequence[nn.Module]) -> dict[str, nn.Parameter]:
    """All parameters of this rank's stages by global (Hugging Face) name."""
    return {name: p for stage in stages for name, p in stage.named_parameters()}


def trained_parameters(stages: Sequence[nn.Module]) -> dict[str, nn.Parameter]:
    """Those that are not frozen."""
    return {name: p for name, p in named_parameters(stages).items() if p.requires_grad}


class TrainingStep:
    """Runs optimizer steps over this rank's stages.

    Args:
        stages: materialised stages of this rank.
        optimizer: over the stages' trained parameters.
        normalization: loss_normalization.
        sharding_strategy: data_parallel_sharding_strategy.
        max_grad_norm: 0 turns clipping off.
        activation_dtype: of hidden states between pipeline stages.
        dropout_seed: of all dropout; None turns it off.

    Attributes:
        parameters: those of this rank that are trained, by global name.
        before_update: called in every step when weights and moments are about to change.
        asked_to_stop: whether this rank was; what any rank says reaches all with the loss.
        progress: told in words what begins.
    """

    def __init__(
        self,
        arch: Architecture,
        mesh: ParallelMesh,
        stages: Sequence[SdarStage],
        optimizer: ShardedAdamW,
        *,
        normalization: str = "global",
        sharding_strategy: str = "optim_grads",
        max_grad_norm: float = 1.0,
        activation_dtype: torch.dtype = torch.float32,
        dropout_seed: int | None = None,
    ) -> None:
        self.mesh = mesh
        self.stages = stages
        self.optimizer = optimizer
        self.normalization = normalization
        self.max_grad_norm = max_grad_norm
        self.before_update: Callable[[], None] = _nothing
        self.asked_to_stop: Callable[[], bool] = _never
        self._votes = torch.zeros((), dtype=torch.float64, device=mesh.device)
        self.progress: Callable[[str], None] = ignore
        self.parameters = trained_parameters(stages)
        self.dropout_seed = dropout_seed
        self.partial_names = set().union(*(partial_gradient_names(s) for s in stages))
        self.tied_name = self._tied_copy(arch)
        self.selects = any(stage.trims for stage in stages)
        self.keeps_gradients = not any(is_data_parallel(stage) for stage in stages)
        split = mesh.tp_size if stages[0].sequence_parallel else 1
        self.executor = PipelineExecutor(
            stages,
            mesh,
            ActivationFormat(arch.hidden_size, split, activation_dtype),
            lambda chunk, is_last: mark_backward(
                stages[chunk], is_last, sharding_strategy, stages[chunk].learns
            ),
            [stage.trained_before for stage in stages],
        )

    def _tied_copy(self, arch: Architecture) -> str | None:
        """The tied weight's name on this rank when two stages hold a copy each and train it."""
        if not arch.tie_word_embeddings or self.mesh.pp_size == 1:
            return None
        return next((name for name in (EMBEDDING, HEAD) if name in self.parameters), None)

    def backward(self, micro_batches: Sequence[Row]) -> tuple[Tensor, int]:
        """Forward and backward of all micro-batches; gradients are left summed everywhere.

        Args:
            micro_batches: this data-parallel rank's rows of the step, one per micro-batch.

        Returns:
            The step's loss (scalar tensor, the same on every rank) and its label tokens.
        """
        counts = [row.num_label_tokens for row in micro_batches]
        total_labels = int(sum_over_data_parallel(sum(counts), self.mesh))
        scales = micro_batch_scales(counts, total_labels, self.normalization, self.mesh.dp_size)
        return self.backward_scaled(micro_batches, scales), total_labels

    def backward_scaled(self, micro_batches: Sequence[Row], scales: Sequence[float]) -> Tensor:
        """`backward` with each micro-batch's factor in the loss given; returns the loss."""
        self.progress(MOVING)
        batches = [
            self._batch(row, scale) for row, scale in zip(micro_batches, scales, strict=True)
        ]
        self.executor.progress = self.progress
        local_loss = self.executor.run(batches)
        self.progress("sums of gradients")
        gradients = local_gradients(self.parameters)
        sum_partial_gradients(gradients, self.partial_names, self.mesh)
        sum_tied_gradients(gradients, self.tied_name, self.mesh)
        return self._share_loss(local_loss)

    def _batch(self, row: Row, scale: float) -> DeviceBatch:
        multiple = self.stages[0].options.loss_multiple(row.num_tokens, self.mesh.tp_size)
        seed = None if self.dropout_seed is None else row_seed(row, self.dropout_seed)
        return to_device(
            row,
            self.mesh.device,
            scale,
            multiple_of=multiple,
            selects=self.selects,
            dropout_seed=seed,
        )

    def _share_loss(self, local_loss: Tensor) -> Tensor:
        # Every tp rank of the last stage holds the same loss: only the first one's counts.
        if self.mesh.tp_rank > 0:
            local_loss = torch.zeros_like(local_loss)
        vote = torch.full_like(local_loss, float(self.asked_to_stop()))
        loss, self._votes = sum_over_world(torch.stack((local_loss, vote))).unbind()
        return loss

    def zero_grad(self) -> None:
        """Forget the gradients of an earlier step."""
        self.optimizer.zero_grad(keep=self.keeps_gradients)

    @property
    def counted_elsewhere(self) -> set[str]:
        """Parameters of this rank whose gradient another stage counts: a tied weight's copy."""
        return {HEAD} if self.tied_name == HEAD else set()

    def grad_norm(self, gradients: Mapping[str, Tensor]) -> Tensor:
        """Norm over the whole model, float64. Collective: all_reduce (world)."""
        device = self.mesh.device
        return global_grad_norm(self.parameters, gradients, self.counted_elsewhere, device)

    def run(self, micro_batches: Sequence[Row], lr: float) -> StepResult:
        """One optimizer step.

        Raises:
            NonFiniteStepError: on every rank, before any weight changes, when the loss or the
                gradient norm is not finite.
        """
        self.progress("count of labels")
        self.zero_grad()
        loss_tensor, label_tokens = self.backward(micro_batches)
        gradients = local_gradients(self.parameters)
        numbers = (loss_tensor.double(), self.grad_norm(gradients), self._votes)
        loss, grad_norm, votes = torch.stack(numbers).tolist()
        result = StepResult(loss, grad_norm, label_tokens, votes > 0)
        if not (math.isfinite(loss) and math.isfinite(grad_norm)):
            raise NonFiniteStepError(result)
        if self.max_grad_norm > 0 and grad_norm > self.max_grad_norm:
            scale_gradients(gradients, self.max_grad_norm / (grad_norm + 1e-6))
        self.progress(UPDATING)
        self.before_update()
        self.optimizer.step(gradients, lr)
        if not self.keeps_gradients:
            self.optimizer.zero_grad()
        return result


def _never() -> bool:
    return False


def _nothing() -> None:
    """Nobody has anything to do before an update."""
