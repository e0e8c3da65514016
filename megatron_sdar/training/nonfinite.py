"""Steps whose loss or gradient is not finite: counted, recorded, and how many a run may skip.

Such a step changes neither weights nor moments; the learning rate's schedule and the data go on
behind it. Invariant: all ranks hold the same list of skipped steps, which a checkpoint keeps.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megatron_sdar.config import SdarConfig
from megatron_sdar.data.loading.loader import DocumentName, RowLoader
from megatron_sdar.parallel.gradients import local_gradients
from megatron_sdar.parallel.launch import gather_from_all
from megatron_sdar.parallel.mesh import ParallelMesh
from megatron_sdar.training.output_files import replace_json
from megatron_sdar.training.step import NonFiniteStepError, TrainingStep

SKIPPED_DIR = "skipped_steps"
_RECORD = re.compile(r"step-(\d+)\.json")


def record_path(output_dir: Path, number: int) -> Path:
    """Where the record of a skipped step lies."""
    return output_dir / SKIPPED_DIR / f"step-{number}.json"


def number_or_word(value: float) -> float | str:
    """A number that JSON has, or nan, inf, -inf as text."""
    return value if math.isfinite(value) else str(value)


@dataclass(frozen=True)
class _RankFindings:
    """What one rank knows of a step that is not finite.

    losses: by micro-batch, its share of the step's loss; on the last stage's first tp ranks only.
    """

    dp_rank: int
    parameters: Sequence[str]
    losses: Sequence[float]


class SkippedSteps:
    """The steps that a run has skipped.

    Attributes:
        steps: their numbers, counted from 1.
    """

    def __init__(self, config: SdarConfig, mesh: ParallelMesh) -> None:
        self._config = config
        self._mesh = mesh
        self._output_dir = Path(config.training.output_dir)
        self._last = ""
        self.steps: list[int] = []

    @property
    def is_exceeded(self) -> bool:
        """Whether the run must end; asked behind a step that was skipped."""
        return len(self.steps) > self._config.guards.max_skipped_steps

    def add(
        self,
        number: int,
        error: NonFiniteStepError,
        step: TrainingStep,
        loader: RowLoader,
        lr: float,
        weights_from: Path | None,
    ) -> str:
        """Count the step and write its record; returns a line for the user.

        Args:
            number: of the step, whose gradients `step` still holds and whose rows `loader` gave
                last.
            weights_from: the checkpoint that lies before it; None: there is none.

        Collective: all_gather_object (world).
        """
        findings = gather_from_all(_find(step, self._mesh), self._mesh)
        before, path = list(self.steps), record_path(self._output_dir, number)
        self.steps.append(number)
        self._last = f"step {number} is not finite: {error}; no weight was changed"
        where = f"{path}: which documents, losses and parameters"
        if self._mesh.is_main:
            record = {
                "step": number,
                "loss": number_or_word(error.result.loss),
                "grad_norm": number_or_word(error.result.grad_norm),
                "learning_rate": lr,
                "seed": self._config.training.seed,
                "label_tokens": error.result.label_tokens,
                "skipped_before": before,
                "checkpoint": None if weights_from is None else str(weights_from),
                "not_finite_gradients": _ranks_by_parameter(findings),
                "rows_per_micro_batch": loader.rows_per_micro_batch,
                "data_parallel_size": loader.dp_size,
                "micro_batches": _micro_batches(loader, findings),
                "loader": loader.last_step_state(),
            }
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                replace_json(path, record)
            except (OSError, ValueError) as problem:
                where = f"{path} could not be written: {problem}"
        limit = self._config.guards.max_skipped_steps
        self._last += f". {where}"
        return f"{self._last} ({len(self.steps)} skipped, max_skipped_steps: {limit})"

    def message(self, checkpoint: Path | None) -> str:
        """Why the run ends.

        Args:
            checkpoint: saved behind the step; None: save_skipped_step is off.
        """
        limit, number = self._config.guards.max_skipped_steps, self.steps[-1]
        if checkpoint is None:
            onward = (
                "The same command meets these rows again; with save_skipped_step: true it would "
                "have gone on behind them"
            )
        else:
            onward = (
                f"{checkpoint} holds the weights: the same command goes on from there, behind "
                "these rows (with overwrite_output_dir: false; a larger max_skipped_steps skips "
                "more)"
            )
        return (
            f"{self._last}\n"
            f"Steps of the run that were not finite: {self.steps}; max_skipped_steps is {limit}. "
            f"`tools/replay_step.py CONFIG.yaml "
            f"{record_path(self._output_dir, number)}` finds the micro-batch and the module. "
            f"If it is the learning rate, lower it and resume from an earlier checkpoint. {onward}"
        )

    def forget_records_after(self, done: int) -> None:
        """Remove records of steps that this start of the run will do (again); on rank 0."""
        for path in (self._output_dir / SKIPPED_DIR).glob("step-*.json"):
            found = _RECORD.fullmatch(path.name)
            if found is not None and int(found[1]) > done:
                path.unlink()

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        return {"steps": list(self.steps)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a checkpoint."""
        self.steps = [int(number) for number in state["steps"]]


def not_finite_gradients(step: TrainingStep) -> list[str]:
    """Names of this rank's parameters whose gradient has an element that is not finite."""
    return [
        name
        for name, gradient in local_gradients(step.parameters).items()
        if not bool(torch.isfinite(gradient).all())
    ]


def _find(step: TrainingStep, mesh: ParallelMesh) -> _RankFindings:
    losses: list[float] = []
    if mesh.tp_rank == 0:
        outputs = step.executor.micro_batch_outputs
        losses = [outputs[number].item() for number in sorted(outputs)]
    return _RankFindings(mesh.dp_rank, not_finite_gradients(step), losses)


def _ranks_by_parameter(findings: Sequence[_RankFindings]) -> dict[str, list[int]]:
    """Global name -> the ranks on which its gradient is not finite."""
    ranks: dict[str, list[int]] = {}
    for rank, found in enumerate(findings):
        for name in found.parameters:
            ranks.setdefault(name, []).append(rank)
    return ranks


def _micro_batches(loader: RowLoader, findings: Sequence[_RankFindings]) -> list[dict[str, Any]]:
    """Of all data-parallel ranks, in the order of the stream."""
    losses = {
        number * loader.dp_size + found.dp_rank: loss
        for found in findings
        for number, loss in enumerate(found.losses)
    }
    first, size = loader.position - loader.rows_per_step, loader.rows_per_micro_batch
    return [
        {
            "data_parallel_rank": number % loader.dp_size,
            "micro_batch": number // loader.dp_size,
            "rows": [first + number * size, first + (number + 1) * size],
            "loss": number_or_word(losses[number]),
            "documents": [_document(name) for name in documents],
        }
        for number, documents in enumerate(loader.last_step_documents())
    ]


def _document(name: DocumentName) -> dict[str, Any]:
    return name._asdict() if name.piece else {"dataset": name.dataset, "document": name.document}
