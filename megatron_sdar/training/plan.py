"""When a run does what: its last step, and the steps at which it logs, evaluates and saves."""

from __future__ import annotations

import math
from dataclasses import dataclass

from megatron_sdar.config import SdarConfig
from megatron_sdar.config_rules_evaluation import evaluates
from megatron_sdar.data.loading.loader import RowLoader
from megatron_sdar.optim.schedules import lr_multiplier, resolve_warmup_steps
from megatron_sdar.parallel.mesh import ParallelMesh, sum_over_data_parallel


@dataclass(frozen=True)
class StepPlan:
    """Steps are counted from 1, as "steps done".

    Attributes:
        total: the last step.
        log_every, save_every, eval_every: periods; None: never but where the run ends. What
            save_strategy: best saves is decided by the evaluations.
        logs_first: whether the first step is logged, too.
        warmup: steps of the learning rate's warmup.
        evaluates_at_end: whether the last weights are evaluated.
    """

    config: SdarConfig
    total: int
    log_every: int
    logs_first: bool
    save_every: int | None
    eval_every: int | None
    warmup: int
    evaluates_at_end: bool

    def logs(self, done: int) -> bool:
        return (
            _is_due(done, self.log_every) or done == self.total or (self.logs_first and done == 1)
        )

    def saves(self, done: int) -> bool:
        return done == self.total or _is_due(done, self.save_every)

    def evaluates(self, done: int) -> bool:
        if done == self.total:
            return self.evaluates_at_end
        return _is_due(done, self.eval_every)

    def saves_before_end(self, done: int) -> bool:
        """Whether a checkpoint is due, or may be, between `done` and the last step."""
        every = self.save_every
        if self.config.training.save_strategy == "best":
            every = self.eval_every
        return every is not None and every * (done // every + 1) < self.total

    def learning_rate(self, done: int) -> float:
        """Of the step that follows `done` steps."""
        optim = self.config.optim
        return optim.learning_rate * lr_multiplier(
            optim.lr_scheduler_type,
            done,
            self.total,
            self.warmup,
            optim.lr_scheduler_kwargs,
            optim.learning_rate,
        )


def make_plan(config: SdarConfig, loader: RowLoader, mesh: ParallelMesh) -> StepPlan:
    """The plan of a run over these rows. Collectives: those of total_steps."""
    training, evaluation, optim = config.training, config.evaluation, config.optim
    total = total_steps(config, loader, mesh)
    eval_steps = evaluation.eval_steps or training.logging_steps
    save_every = eval_every = None
    if training.save_strategy == "steps":
        save_every = steps_between(training.save_steps, total)
    if evaluation.eval_strategy == "steps":
        eval_every = steps_between(eval_steps, total)
    if evaluation.load_best_model_at_end and save_every and eval_every:
        # Two fractions are rounded apart; every checkpoint must be evaluated.
        save_every = eval_every * round(training.save_steps / eval_steps)
    return StepPlan(
        config,
        total,
        log_every=steps_between(training.logging_steps, total),
        logs_first=config.reporting.logging_first_step,
        save_every=save_every,
        eval_every=eval_every,
        warmup=resolve_warmup_steps(optim.warmup_steps, optim.warmup_ratio, total),
        evaluates_at_end=evaluates(config),
    )


def total_steps(config: SdarConfig, loader: RowLoader, mesh: ParallelMesh) -> int:
    """max_steps, or the steps that num_train_epochs passes take, rounded up.

    The noise of all epochs decides how many rows they become, so every rank counts a part.

    Collective: all_reduce (dp) unless max_steps is given.
    """
    if config.training.max_steps > 0:
        return config.training.max_steps
    share = loader.count_rows(config.training.num_train_epochs, mesh.dp_rank, mesh.dp_size)
    rows = sum_over_data_parallel(share, mesh)
    return max(1, math.ceil(round(rows / loader.rows_per_step, 6)))


def steps_between(value: float, total: int) -> int:
    """logging_steps, save_steps, eval_steps: a step count, or below 1 a fraction of all steps."""
    return max(1, math.ceil(value * total) if value < 1 else int(value))


def _is_due(done: int, every: int | None) -> bool:
    return every is not None and done % every == 0
