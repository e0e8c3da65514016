"""The training run: where it starts, its parts, the loop, results, export and summary."""

from __future__ import annotations

import time
from pathlib import Path

from megatron_sdar.architecture import Architecture
from megatron_sdar.checkpoint.adapter_export import export_adapter
from megatron_sdar.checkpoint.hf_export import export_hf
from megatron_sdar.checkpoint.native import checkpoint_path
from megatron_sdar.checkpoint.resumption import resume_candidates
from megatron_sdar.checkpoint.run_directory import (
    STATE_NAME,
    complete_checkpoints,
    incomplete_checkpoints,
)
from megatron_sdar.checkpoint.run_lock import RUN_LOCK_NAME, RunLock
from megatron_sdar.checkpoint.run_mark import RUN_MARK_NAME, begin_run
from megatron_sdar.checkpoint.stored_fit import AdapterOrigin
from megatron_sdar.config import SdarConfig
from megatron_sdar.parallel.launch import launch_name, run_on_main
from megatron_sdar.parallel.mesh import ParallelMesh
from megatron_sdar.training.checkpoints import Resumed, adapter_origin, resume
from megatron_sdar.training.evaluation import SAMPLES_NAME
from megatron_sdar.training.loop import Outcome, Say, TrainingLoop
from megatron_sdar.training.metrics import LOG_NAME, trim_log
from megatron_sdar.training.output_files import replace_json, written
from megatron_sdar.training.parallel_check import check_parallel
from megatron_sdar.training.plan import StepPlan, make_plan
from megatron_sdar.training.plot import plot_loss
from megatron_sdar.training.preparation import Parts, prepare, prepare_evaluator
from megatron_sdar.training.reporting import write_train_results
from megatron_sdar.training.run_state import RunState
from megatron_sdar.training.setup import check_block_lengths
from megatron_sdar.training.stall_watch import make_watchdog
from megatron_sdar.training.step_log import StepLog
from megatron_sdar.training.summary import describe_run, describe_stop, summarize_run
from megatron_sdar.training.trackers import wanted_trackers
from megatron_sdar.training.trainer_state import TRAINER_STATE_NAME, restore_log, state_of


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
        self.say: Say = _print_line if mesh.is_main else _stay_quiet
        self.adapter: AdapterOrigin | None = None
        self.lock = RunLock(self.output_dir)
        self.watchdog = make_watchdog(config.parallel, self.output_dir, mesh)

    def run(self) -> None:
        """Train to the last step and leave checkpoints, log, plot and export behind.

        Asked to stop (SIGTERM, SIGUSR1) it leaves a checkpoint of the latest step.

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
        job, candidates = run_on_main(self._choose_start, self.mesh)
        parts = prepare(self.config, self.arch, self.mesh, bool(candidates), self.say)
        self.adapter = adapter_origin(self.config, self.arch, self.mesh)
        loader = parts.loader
        log = StepLog(self.config, self.arch, self.mesh, loader)
        state = RunState(self.config, self.mesh, loader, log)
        resumed = self._resume(candidates, parts, state) if candidates else None
        start = resumed.path if resumed is not None else None
        check_parallel(self.config, self.mesh, parts, start, self.say)
        plan = make_plan(self.config, loader, self.mesh)
        check_block_lengths(self.config, plan.total)
        self.say(describe_run(self.config, self.mesh, loader, plan.total))
        epoch_before, began = loader.epoch, time.monotonic()
        try:
            outcome = self._train(parts, state, log, plan, resumed, job)
        finally:
            loader.close()
        if outcome.stopped is not None:
            self.say(describe_stop(self.config, state.done, plan.total, outcome.checkpoint))
            return
        rows = (loader.epoch - epoch_before) * loader.num_rows
        took = time.monotonic() - began
        run_on_main(lambda: self._write_results(plan, state, parts, log, rows, took), self.mesh)
        last = outcome.checkpoint
        assert last is not None, "the last step is always saved"
        exported = self._best_checkpoint(state) or last
        self._finish(exported)
        seconds, losses = time.monotonic() - started, (state.first_loss, state.last_loss)
        best, skipped = state.best, state.skipped
        self.say(
            summarize_run(
                self.config, state.done, seconds, losses, log, best, last, exported, skipped
            )
        )

    def _choose_start(self) -> tuple[str, list[Path]]:
        """Take output_dir; the job, and the checkpoints to resume from, best first (rank 0)."""
        training = self.config.training
        wanted_trackers(self.config.reporting.report_to)  # refused here, not after preparations
        with written(self.output_dir):
            self.output_dir.mkdir(parents=True, exist_ok=True)
        job = training.job_id or launch_name()
        with written(self.output_dir / RUN_LOCK_NAME):
            shared = self.lock.take(job)
        if shared is not None:
            self.say(f"warning: {shared}")
        for line in incomplete_checkpoints(self.output_dir):
            self.say(f"passed over: {line}")
        candidates = resume_candidates(
            self.output_dir, training.resume_from_checkpoint, training.overwrite_output_dir, job
        )
        return job, candidates

    def _resume(self, candidates: list[Path], parts: Parts, state: RunState) -> Resumed:
        resumed = resume(candidates, self.config.training, parts.step, self.say, self.adapter)
        with state_of(resumed.path / STATE_NAME):
            state.load(resumed.state, parts.step.optimizer, self.say)
        self._forget_lost_best(state)
        run_on_main(lambda: restore_log(self.output_dir / LOG_NAME, resumed.state), self.mesh)
        epoch = parts.loader.epoch
        self.say(f"resumed from {resumed.path}: step {state.done}, epoch {epoch:.3f}")
        return resumed

    def _train(
        self,
        parts: Parts,
        state: RunState,
        log: StepLog,
        plan: StepPlan,
        resumed: Resumed | None,
        job: str,
    ) -> Outcome:
        """Run the remaining steps, if there are any."""
        evaluator = prepare_evaluator(self.config, self.arch, self.mesh, parts, self.say)
        is_done = state.done >= plan.total or state.best.stops
        if resumed is not None and is_done and not state.evaluation_is_due:
            why = "" if state.done >= plan.total else " (early_stopping_steps)"
            self.say(f"step {state.done} of {plan.total} is done{why}: nothing left to train")
            return Outcome(resumed.path)
        run_on_main(lambda: self._begin(state, resumed, job), self.mesh)
        self.say(log.describe())
        loop = TrainingLoop(
            self.config,
            self.arch,
            self.mesh,
            parts,
            plan,
            state,
            log,
            evaluator,
            self.watchdog,
            self.say,
            self.adapter,
            resumed.damaged if resumed is not None else (),
        )
        return loop.run(resumed.path if resumed is not None else None)

    def _begins(self, phase: str) -> None:
        """A phase in which ranks wait for another as long as it takes."""
        self.watchdog.beat(phase, limited=False)

    def _begin(self, state: RunState, resumed: Resumed | None, job: str) -> None:
        """Mark whose the next checkpoints are, and forget what will be logged again (rank 0)."""
        if resumed is None or isinstance(self.config.training.resume_from_checkpoint, str):
            with written(self.output_dir / RUN_MARK_NAME):
                begin_run(self.output_dir, job, is_fresh=resumed is None)
        for name in (LOG_NAME, SAMPLES_NAME):
            trim_log(self.output_dir / name, state.done, state.evaluation_is_due)
        state.skipped.forget_records_after(state.done)

    def _best_checkpoint(self, state: RunState) -> Path | None:
        """The one that load_best_model_at_end asks for."""
        step = state.best.saved_step
        if not self.config.evaluation.load_best_model_at_end or step is None:
            return None
        return checkpoint_path(self.output_dir, step)

    def _forget_lost_best(self, state: RunState) -> None:
        """Only what lies in output_dir can be exported; a resume may have come from elsewhere.

        Collective: broadcast_object_list (world), with load_best_model_at_end.
        """
        path = self._best_checkpoint(state)
        if path is None or run_on_main(
            lambda: path in complete_checkpoints(self.output_dir), self.mesh
        ):
            return
        self.say(f"{path}, the best so far, is not there: the best from now on will be exported")
        state.best.forget_saved()

    def _write_results(
        self,
        plan: StepPlan,
        state: RunState,
        parts: Parts,
        log: StepLog,
        rows: float,
        seconds: float,
    ) -> None:
        if log.steps:
            write_train_results(self.config, self.mesh, parts.loader, log, rows, seconds)
        replace_json(self.output_dir / TRAINER_STATE_NAME, state.trainer_state(plan, None))

    def _finish(self, checkpoint: Path) -> None:
        """Export the model of a checkpoint and draw the loss. Collectives: broadcasts (world)."""
        self._begins("the export")
        if self.config.training.export_hf:
            run_on_main(lambda: self._export(checkpoint), self.mesh)
        if self.config.training.plot_loss:
            image = self.output_dir / "training_loss.png"
            run_on_main(lambda: plot_loss(self.output_dir / LOG_NAME, image), self.mesh)

    def _export(self, checkpoint: Path) -> None:
        is_adapter = self.config.finetuning.finetuning_type == "lora"
        export = export_adapter if is_adapter else export_hf
        self.say(export(checkpoint, self.output_dir, into_existing=True).format())


def _print_line(text: str) -> None:
    print(text + "\n", end="", flush=True)  # in one piece: a save's thread prints too


def _stay_quiet(text: str) -> None:
    del text
