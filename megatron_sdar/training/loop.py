"""The training run: steps, logging, evaluations, checkpoints, export, summary.

State that must survive a restart is the step count, the loader's position, the sums behind the
next log line and what evaluated best; all of it is in the checkpoint's JSON. Everything else
follows from the configuration.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from megatron_sdar.architecture import Architecture
from megatron_sdar.checkpoint.adapter_export import export_adapter
from megatron_sdar.checkpoint.hf_export import export_hf
from megatron_sdar.checkpoint.native import checkpoint_path
from megatron_sdar.checkpoint.resumption import resume_candidates
from megatron_sdar.checkpoint.run_directory import complete_checkpoints, incomplete_checkpoints
from megatron_sdar.checkpoint.stored_fit import AdapterOrigin
from megatron_sdar.config import SdarConfig
from megatron_sdar.data.loading.loader import RowLoader
from megatron_sdar.parallel.launch import run_on_main
from megatron_sdar.parallel.mesh import ParallelMesh
from megatron_sdar.training.best_model import make_best_model
from megatron_sdar.training.checkpoints import CheckpointWriter, adapter_origin, resume
from megatron_sdar.training.evaluation import SAMPLES_NAME, Evaluator
from megatron_sdar.training.metrics import LOG_NAME, Reporter, trim_log
from megatron_sdar.training.nonfinite import SkippedSteps
from megatron_sdar.training.parallel_check import check_parallel
from megatron_sdar.training.plan import StepPlan, make_plan
from megatron_sdar.training.plot import plot_loss
from megatron_sdar.training.preparation import prepare, prepare_evaluator
from megatron_sdar.training.reporting import evaluate, open_reporter, write_train_results
from megatron_sdar.training.results import replace_json
from megatron_sdar.training.setup import check_block_lengths
from megatron_sdar.training.stall_watch import make_watchdog
from megatron_sdar.training.step import NonFiniteStepError, TrainingStep
from megatron_sdar.training.step_log import StepLog
from megatron_sdar.training.summary import describe_run, summarize_run
from megatron_sdar.training.trackers import wanted_trackers
from megatron_sdar.training.trainer_state import (
    TRAINER_STATE_NAME,
    own_state_of,
    restore_log,
    trainer_state,
)
from megatron_sdar.training.weight_check import WeightCheck


class TrainingRun:
    """One run on this rank.

    Args:
        config: validated configuration.
        arch: from setup.resolve_architecture.
        mesh: the rank grid.
    """

    def __init__(self, config: SdarConfig, arch: Architecture, mesh: ParallelMesh) -> None:
        self.config = config
        self.arch = arch
        self.mesh = mesh
        self.output_dir = Path(config.training.output_dir)
        self.say: Callable[[str], None] = _print_line if mesh.is_main else _stay_quiet
        self.done = 0
        self.damaged: tuple[Path, ...] = ()
        self.adapter: AdapterOrigin | None = None
        self.best = make_best_model(config)
        self.skipped = SkippedSteps(config, mesh)
        self.first_loss = self.last_loss = math.nan
        self.watchdog = make_watchdog(config.parallel, self.output_dir, mesh)

    def run(self) -> None:
        """Train to the last step and leave checkpoints, log, plot and export behind.

        Raises:
            ValueError, OSError: a user's error.
            FloatingPointError: too many steps were not finite, on every rank.
            StalledError: a rank is gone or does not come, where a collective said so.

        Collectives: all of training.
        """
        with self.watchdog:
            self._run()

    def _run(self) -> None:
        started = time.monotonic()
        self._begins("preparations")
        training = self.config.training
        candidates = run_on_main(self._choose_start, self.mesh)
        parts = prepare(self.config, self.arch, self.mesh, bool(candidates), self.say)
        self.adapter = adapter_origin(self.config, self.arch, self.mesh)
        step, loader = parts.step, parts.loader
        log = StepLog(self.config, self.arch, self.mesh, loader)
        resumed = self._resume(candidates, step, loader, log) if candidates else None
        check_parallel(self.config, self.mesh, parts, resumed, self.say)
        plan = make_plan(self.config, loader, self.mesh)
        check_block_lengths(self.config, plan.total)
        self.say(describe_run(self.config, self.mesh, loader, plan.total))
        evaluator = prepare_evaluator(self.config, self.arch, self.mesh, parts, self.say)
        epoch_before, began = loader.epoch, time.monotonic()
        try:
            last = self._train(step, loader, log, plan, evaluator, resumed)
        finally:
            loader.close()
        rows = (loader.epoch - epoch_before) * loader.num_rows
        took = time.monotonic() - began
        run_on_main(lambda: self._write_results(plan, loader, log, rows, took), self.mesh)
        self._begins("the export")
        exported = self._best_checkpoint() or last
        if training.export_hf:
            run_on_main(lambda: self._export(exported), self.mesh)
        if training.plot_loss:
            image = self.output_dir / "training_loss.png"
            run_on_main(lambda: plot_loss(self.output_dir / LOG_NAME, image), self.mesh)
        seconds, losses = time.monotonic() - started, (self.first_loss, self.last_loss)
        text = summarize_run(
            self.config, self.done, seconds, losses, log, self.best, last, exported, self.skipped
        )
        self.say(text)

    def _choose_start(self) -> list[Path]:
        """Make output_dir; the checkpoints to resume from, best first (rank 0)."""
        training = self.config.training
        wanted_trackers(self.config.reporting.report_to)  # refused here, not after preparations
        self.output_dir.mkdir(parents=True, exist_ok=True)
        for line in incomplete_checkpoints(self.output_dir):
            self.say(f"passed over: {line}")
        return resume_candidates(
            self.output_dir, training.resume_from_checkpoint, training.overwrite_output_dir
        )

    def _resume(
        self, candidates: list[Path], step: TrainingStep, loader: RowLoader, log: StepLog
    ) -> Path:
        resumed = resume(candidates, self.config.training, step, self.say, self.adapter)
        state, self.damaged = own_state_of(resumed.state), resumed.damaged
        self.done = int(resumed.state["step"])
        if "loader" in state:  # a checkpoint converted from a model directory has weights only
            loader.load_state_dict(state["loader"])
            log.load_state_dict(state["interval"])
            first_loss = state["first_loss"]
            self.first_loss = math.nan if first_loss is None else first_loss
        if "skipped" in state:
            self.skipped.load_state_dict(state["skipped"])
            step.optimizer.set_step_count(self.done - len(self.skipped.steps))
        if "best" in state:
            self.best.load_state_dict(state["best"])
            self._forget_lost_best()
        run_on_main(lambda: restore_log(self.output_dir / LOG_NAME, resumed.state), self.mesh)
        self.say(f"resumed from {resumed.path}: step {self.done}, epoch {loader.epoch:.3f}")
        return resumed.path

    def _train(
        self,
        step: TrainingStep,
        loader: RowLoader,
        log: StepLog,
        plan: StepPlan,
        evaluator: Evaluator | None,
        resumed: Path | None,
    ) -> Path:
        """Run the remaining steps; returns the last step's checkpoint."""
        checkpoint = resumed
        if checkpoint is not None and (self.done >= plan.total or self.best.stops):
            why = "" if self.done >= plan.total else " (early_stopping_steps)"
            self.say(f"step {self.done} of {plan.total} is done{why}: nothing left to train")
            return checkpoint
        run_on_main(self._trim_logs, self.mesh)
        self.say(log.describe())
        step.progress = self.watchdog.beat
        writer = CheckpointWriter(
            self.config,
            self.arch,
            self.mesh,
            step,
            plan.saves_before_end(self.done),
            self.damaged,
            self.say,
            self.adapter,
            lambda: self.best.saved_step,
        )
        check = WeightCheck(self.config, self.arch, self.mesh, step, self.done, self.say)
        with (
            open_reporter(self.config, self.mesh, plan.total, self.done, self.say) as reporter,
            writer,
        ):
            if evaluator is not None and self.config.evaluation.eval_on_start and not self.done:
                self._evaluate(evaluator, loader, reporter)
            log.begin(self.watchdog)
            while self.done < plan.total and not self.best.stops:
                lr = plan.learning_rate(self.done)
                is_skipped = not self._step(step, loader, lr, log, checkpoint)
                self.done += 1
                check.after_step(self.done)
                if reporter is not None:
                    reporter.advance(self.done)
                if plan.logs(self.done):
                    self._log(log, reporter, lr)
                if is_skipped and self.skipped.is_exceeded:
                    raise FloatingPointError(self._stop(writer, plan, loader, log))
                if evaluator is not None and plan.evaluates(self.done):
                    with log.paused():
                        metrics = self._evaluate(evaluator, loader, reporter)
                    self.best.update(self.done, metrics, plan.saves(self.done))
                    if self.best.stops and not plan.logs(self.done):
                        self._log(log, reporter, lr)  # the last step is always logged
                if plan.saves(self.done) or self.best.stops:
                    is_last = self.done == plan.total or self.best.stops
                    self.watchdog.beat("saving")
                    with log.paused():
                        state = self._state(plan, loader, log)
                        checkpoint = writer.save(self.done, state, is_last)
        assert checkpoint is not None, "the last step is always saved"
        return checkpoint

    def _begins(self, phase: str) -> None:
        """A phase in which ranks wait for another as long as it takes."""
        self.watchdog.beat(phase, self.done, limited=False)

    def _step(
        self,
        step: TrainingStep,
        loader: RowLoader,
        lr: float,
        log: StepLog,
        checkpoint: Path | None,
    ) -> bool:
        """Run the next step; False: it was skipped, the weights are as before."""
        self.watchdog.beat("waiting for rows", self.done + 1)
        rows = loader.next_step()
        try:
            result = step.run(rows, lr)
        except NonFiniteStepError as error:
            log.skip(rows)
            self.say(self.skipped.add(self.done + 1, error, step, loader, lr, checkpoint))
            return False
        log.add(rows, result)
        if math.isnan(self.first_loss):
            self.first_loss = result.loss
        self.last_loss = result.loss
        return True

    def _stop(
        self, writer: CheckpointWriter, plan: StepPlan, loader: RowLoader, log: StepLog
    ) -> str:
        """Save behind the step that was one too many; returns why the run ends."""
        checkpoint = None
        if self.config.guards.save_skipped_step:
            checkpoint = writer.save(self.done, self._state(plan, loader, log), is_last=True)
        return self.skipped.message(checkpoint)

    def _log(self, log: StepLog, reporter: Reporter | None, lr: float) -> None:
        """Collective: all_reduce (dp)."""
        self.watchdog.beat("logging")
        record = log.record(self.done, lr, len(self.skipped.steps))
        if reporter is not None:
            reporter.log(record)

    def _evaluate(
        self, evaluator: Evaluator, loader: RowLoader, reporter: Reporter | None
    ) -> dict[str, float]:
        self._begins("an evaluation")
        return evaluate(evaluator, reporter, self.output_dir, self.done, loader.epoch)

    def _best_checkpoint(self) -> Path | None:
        """The one that load_best_model_at_end asks for."""
        if not self.config.evaluation.load_best_model_at_end or self.best.saved_step is None:
            return None
        return checkpoint_path(self.output_dir, self.best.saved_step)

    def _forget_lost_best(self) -> None:
        """Only what lies in output_dir can be exported; a resume may have come from elsewhere.

        Collective: broadcast_object_list (world), with load_best_model_at_end.
        """
        path = self._best_checkpoint()
        if path is None or run_on_main(
            lambda: path in complete_checkpoints(self.output_dir), self.mesh
        ):
            return
        self.say(f"{path}, the best so far, is not there: the best from now on will be exported")
        self.best.forget_saved()

    def _trim_logs(self) -> None:
        for name in (LOG_NAME, SAMPLES_NAME):
            trim_log(self.output_dir / name, self.done)
        self.skipped.forget_records_after(self.done)

    def _state(self, plan: StepPlan, loader: RowLoader, log: StepLog) -> dict[str, Any]:
        """What a checkpoint holds beside tensors; empty but on rank 0, which writes it.

        Collectives: all_reduce (dp), broadcast_object_list (world).
        """
        own = {
            "loader": loader.state_dict(),
            "interval": log.state_dict(),
            "first_loss": None if math.isnan(self.first_loss) else self.first_loss,
            "best": self.best.state_dict(),
            "skipped": self.skipped.state_dict(),
        }
        state: dict[str, Any] = {}
        run_on_main(lambda: state.update(self._trainer_state(plan, loader, log, own)), self.mesh)
        return state

    def _trainer_state(
        self, plan: StepPlan, loader: RowLoader, log: StepLog, own: Mapping[str, Any] | None
    ) -> dict[str, Any]:
        best, flops = self.best, log.total_flops
        return trainer_state(self.config, plan, loader, best, self.done, flops, own)

    def _write_results(
        self, plan: StepPlan, loader: RowLoader, log: StepLog, rows: float, seconds: float
    ) -> None:
        if log.steps:
            write_train_results(self.config, self.mesh, loader, log, rows, seconds)
        state = self._trainer_state(plan, loader, log, None)
        replace_json(self.output_dir / TRAINER_STATE_NAME, state)

    def _export(self, checkpoint: Path) -> None:
        export = export_hf if self.adapter is None else export_adapter
        self.say(export(checkpoint, self.output_dir, into_existing=True).format())


def _print_line(text: str) -> None:
    print(text + "\n", end="", flush=True)  # in one piece: a save's thread prints too


def _stay_quiet(text: str) -> None:
    del text
