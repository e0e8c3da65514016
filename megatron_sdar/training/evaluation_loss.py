"""The evaluation loss: a bound of the likelihood, per label token, with fixed noise.

For each noise level: the sum over masked tokens of CE / p, over the label tokens of all documents,
masked or not; eval_loss is the mean over the levels. Sums are taken in float64 over whole sets,
so no number depends on rows, micro-batches or the layout.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from megatron_sdar.diffusion.evaluation_noise import level_edges
from megatron_sdar.model.batch import DeviceBatch
from megatron_sdar.model.sdar import SdarStage
from megatron_sdar.parallel.data_parallel import free_gathered
from megatron_sdar.parallel.forward_pipeline import ForwardPipeline
from megatron_sdar.parallel.mesh import ParallelMesh, sum_over_world
from megatron_sdar.parallel.pipeline import ActivationFormat
from megatron_sdar.training.batch import to_device
from megatron_sdar.training.evaluation_rows import EvaluationRows, LevelRow, deal

Advance = Callable[[int], None]
_MICRO_BATCHES_AT_ONCE = 16


class EvaluationStoppedError(Exception):
    """A rank was asked to stop: on every rank, in mid-evaluation."""


def never_stops() -> bool:
    """Nobody asks an evaluation to stop."""
    return False


@dataclass(frozen=True)
class LossSums:
    """Sums over a set of documents; float64 [N] each, one entry per noise level.

    Attributes:
        weighted: sum of CE / p over masked tokens.
        correct: masked tokens whose true id was the most probable one.
        masked: masked tokens.
        num_label_tokens: label tokens of the documents.
    """

    weighted: NDArray[np.float64]
    correct: NDArray[np.float64]
    masked: NDArray[np.float64]
    num_label_tokens: int

    def __add__(self, other: LossSums) -> LossSums:
        return LossSums(
            self.weighted + other.weighted,
            self.correct + other.correct,
            self.masked + other.masked,
            self.num_label_tokens + other.num_label_tokens,
        )

    @property
    def loss(self) -> float:
        """CE / p per label token, the mean over the noise levels."""
        return float(self.weighted.mean() / self.num_label_tokens)

    @property
    def accuracy(self) -> float:
        """The share of masked tokens that the model would fill in rightly."""
        return float(self.correct.sum() / max(1.0, self.masked.sum()))

    def by_level(self) -> Iterator[tuple[str, float, float]]:
        """(name of the level, its loss, its accuracy)."""
        edges = level_edges(self.weighted.size)
        losses = self.weighted / self.num_label_tokens
        accuracies = self.correct / np.maximum(1.0, self.masked)
        for edge, loss, accuracy in zip(edges, losses.tolist(), accuracies.tolist(), strict=True):
            yield f"t{edge:g}", loss, accuracy


class LossEvaluation:
    """Runs the model forward over evaluation rows and adds up losses.

    Args:
        stages: this rank's stages, materialised and filled; their state is left as it is.
        mesh: the grid they were built on.
        rows_per_micro_batch: per_device_eval_batch_size.
        stops: asked again and again, on all ranks at the same places, with the same answer.

    Collectives: opens the pipeline's channels.
    """

    def __init__(
        self,
        stages: Sequence[SdarStage],
        mesh: ParallelMesh,
        rows_per_micro_batch: int,
        stops: Callable[[], bool] = never_stops,
    ) -> None:
        self._stages, self._mesh, self._stops = stages, mesh, stops
        self._size = rows_per_micro_batch
        options = stages[0].options
        split = mesh.tp_size if stages[0].sequence_parallel else 1
        self._selects = any(stage.trims for stage in stages)
        self._pipeline = ForwardPipeline(
            stages,
            mesh,
            ActivationFormat(
                stages[0].arch.hidden_size, split, options.compute_dtype or options.dtype
            ),
        )

    def run(self, rows: EvaluationRows, num_levels: int, advance: Advance) -> LossSums:
        """The sums of these rows, on every rank.

        Args:
            advance: called with the number of rows that all ranks together have done since.

        Raises:
            EvaluationStoppedError: on every rank.

        Collectives: every rank must call. Those of a forward for each micro-batch, all_reduce
        (world), those of `stops` for every few micro-batches.
        """
        was_training = [stage.training for stage in self._stages]
        for stage in self._stages:
            stage.eval()
        try:
            sums = self._sums(rows, num_levels, advance)
        finally:
            for stage, training in zip(self._stages, was_training, strict=True):
                stage.train(training)
                free_gathered(stage)
        weighted, correct, masked = sum_over_world(sums).cpu().numpy()
        return LossSums(weighted, correct, masked, rows.num_label_tokens)

    def _sums(self, rows: EvaluationRows, num_levels: int, advance: Advance) -> Tensor:
        """This rank's part of (weighted, correct, masked), [3, N]."""
        number = -(-len(rows) // self._size)
        mesh = self._mesh
        todo = deal(number, mesh.dp_rank, mesh.dp_size)
        total = np.zeros((3, num_levels))
        # Pieces that the pipeline's ends hardly cost anything.
        size = _MICRO_BATCHES_AT_ONCE * mesh.pp_size
        for first in range(0, len(todo), size):
            if self._stops():
                raise EvaluationStoppedError
            for values, levels in self._losses(rows, todo[first : first + size], advance):
                for place, each in enumerate(values):
                    total[place] += np.bincount(levels, each, num_levels)
        return torch.from_numpy(total).to(mesh.device)

    def _losses(
        self, rows: EvaluationRows, todo: Sequence[tuple[int, bool]], advance: Advance
    ) -> Iterator[tuple[tuple[NDArray[np.float64], ...], NDArray[np.int64]]]:
        """((weighted, correct, masked) per masked token, their noise levels) by micro-batch.

        Args:
            todo: (micro-batch, whether this replica counts it).
        """
        taken: list[tuple[LevelRow, bool]] = []

        def batches() -> Iterator[DeviceBatch]:
            for index, counts in todo:
                built = rows.micro_batch(index * self._size, self._size)
                taken.append((built, counts))
                yield self._batch(built)

        for output in self._pipeline.run(batches()):
            built, counts = taken.pop(0)
            advance(self._size * self._mesh.dp_size)
            # Every tp rank of the last stage has the same: only the first one's counts.
            if output is not None and counts and self._mesh.tp_rank == 0:
                losses, correct = output[:, : built.levels.size].double().cpu().numpy()
                weighted = losses * built.row.loss_weights
                yield (weighted, correct, np.ones_like(losses)), built.levels

    def _batch(self, built: LevelRow) -> DeviceBatch:
        row = built.row
        multiple = self._stages[0].options.loss_multiple(row.num_tokens, self._mesh.tp_size)
        batch = to_device(row, self._mesh.device, 1.0, multiple_of=multiple, selects=self._selects)
        return replace(batch, per_token=True)


def loss_metrics(
    sums: Mapping[tuple[str, int], LossSums], block_lengths: Sequence[int], each_set: bool
) -> dict[str, float]:
    """Metrics by name.

    Args:
        sums: of every (set, block length).
        block_lengths: those evaluated with; the first one's loss is eval_loss.
        each_set: whether sets are reported apart, too.
    """
    names = list(dict.fromkeys(name for name, _ in sums))
    metrics: dict[str, float] = {}
    for number, length in enumerate(block_lengths):
        total = sums[names[0], length]
        for name in names[1:]:
            total += sums[name, length]
        if number == 0:
            metrics |= {"eval_loss": total.loss, "eval_accuracy": total.accuracy}
            for level, loss, accuracy in total.by_level():
                metrics |= {f"eval_loss_{level}": loss, f"eval_accuracy_{level}": accuracy}
        if len(block_lengths) > 1:
            metrics[f"eval_loss_b{length}"] = total.loss
    if each_set:
        for name in names:
            own = sums[name, block_lengths[0]]
            metrics |= {f"eval_{name}_loss": own.loss, f"eval_{name}_accuracy": own.accuracy}
    return metrics
