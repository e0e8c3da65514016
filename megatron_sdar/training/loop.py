"""The training loop: steps, logging, evaluations and checkpoints, until the last step or a signal.

What must survive a restart is run_state's to know; everything else follows from the
configuration.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from megatron_sdar.architecture import Architecture
from megatron_sdar.checkpoint.stored_fit import AdapterOrigin
from megatron_sdar.config import SdarConfig
from megatron_sdar.parallel.mesh import ParallelMesh
from megatron_sdar.parallel.stop_signal import StopSignal
from megatron_sdar.parallel.watchdog import Watchdog
from megatron_sdar.training.checkpoints import CheckpointWriter
from megatron_sdar.training.evaluation import Evaluator
from megatron_sdar.training.evaluation_loss import EvaluationStoppedError
from megatron_sdar.training.metrics import Reporter
from megatron_sdar.training.plan import StepPlan
from megatron_sdar.training.preparation import Parts
from megatron_sdar.training.reporting import evaluate, open_reporter
from megatron_sdar.training.run_state import RunState
from megatron_sdar.training.step import NonFiniteStepError
from megatron_sdar.training.step_log import StepLog
from megatron_sdar.training.weight_check import WeightCheck

Say = Callable[[str], None]


@dataclass(frozen=True)
class Outcome:
    """How the loop ended.

    Attributes:
        checkpoint: the last one; None: it was asked to stop before the first step was done.
        stopped: who was asked to stop, in words; None: nobody, the run is complete.
    """

    checkpoint: Path | None
    stopped: str | None = None


class TrainingLoop:
    """Trains from where the state is; for one call of `run`.

    Args:
        parts: of the run.
        plan: what is due when.
        state: of the run, resumed or fresh.
        log: sums of the steps.
        evaluator: None: nothing is evaluated.
        watchdog: told what this rank does.
        say: tells the user; on rank 0 something, elsewhere nothing.
        adapter: of a LoRA run.
        damaged: checkpoints that save_total_limit does not count.
    """

    def __init__(
        self,
        config: SdarConfig,
        arch: Architecture,
        mesh: ParallelMesh,
        parts: Parts,
        plan: StepPlan,
        state: RunState,
        log: StepLog,
        evaluator: Evaluator | None,
        watchdog: Watchdog,
        say: Say,
        adapter: AdapterOrigin | None = None,
        damaged: tuple[Path, ...] = (),
    ) -> None:
        self._config, self._mesh, self._plan, self._say = config, mesh, plan, say
        self._step, self._loader = parts.step, parts.loader
        self._state, self._log_sums, self._evaluator = state, log, evaluator
        self._watchdog = watchdog
        self._stop = StopSignal(mesh, watchdog.silent_ranks)
        self._output_dir = Path(config.training.output_dir)
        self._checkpoint: Path | None = None
        self._reporter: Reporter | None = None
        self._writer = CheckpointWriter(
            config,
            arch,
            mesh,
            parts.step,
            plan.saves_before_end(state.done),
            damaged,
            say,
            adapter,
            lambda: state.best.saved_step,
        )
        self._check = WeightCheck(config, arch, mesh, parts.step, state.done, say)

    def run(self, resumed: Path | None) -> Outcome:
        """Run the remaining steps.

        Args:
            resumed: the checkpoint that was gone on from.

        Raises:
            FloatingPointError: too many steps were not finite.

        Collectives: all of training.
        """
        self._checkpoint = resumed
        self._step.progress = self._watchdog.beat
        self._step.asked_to_stop = lambda: self._stop.is_asked
        if self._evaluator is not None:
            self._evaluator.stops = self._stop.anybody_asked
        total, done = self._plan.total, self._state.done
        with (
            self._stop,
            open_reporter(self._config, self._mesh, total, done, self._say) as reporter,
            self._writer,
        ):
            self._reporter = reporter
            stopped = self._run()
        return Outcome(self._checkpoint, stopped)

    def _run(self) -> str | None:
        """Who asked all to stop; None: nobody."""
        state, plan = self._state, self._plan
        eval_on_start = self._config.evaluation.eval_on_start and not state.done
        try:
            if self._evaluator is not None and eval_on_start:
                self._evaluate(self._evaluator)
            if state.evaluation_is_due:
                self._evaluate_step()
                self._save()  # what was evaluated belongs to the checkpoint
            self._log_sums.begin(self._watchdog)
            while state.done < plan.total and not state.best.stops:
                if self._do_step() and state.done < plan.total:
                    state.evaluation_is_due = self._is_evaluation_due
                    return self._leave()
                is_saved = plan.saves(state.done)
                if self._is_evaluation_due:
                    is_saved = self._evaluate_step()
                if is_saved or state.best.stops:
                    self._save()
        except EvaluationStoppedError:
            state.evaluation_is_due = state.done > 0
            return self._leave()
        return None

    @property
    def _is_evaluation_due(self) -> bool:
        return self._evaluator is not None and self._plan.evaluates(self._state.done)

    def _do_step(self) -> bool:
        """Run the next step and log it, if that is due; True: some rank was asked to stop."""
        state, lr = self._state, self._plan.learning_rate(self._state.done)
        self._watchdog.beat("waiting for rows", state.done + 1)
        rows, skipped = self._loader.next_step(), None
        try:
            result = self._step.run(rows, lr)
        except NonFiniteStepError as error:
            skipped, result = error, error.result
            self._log_sums.skip(rows)
            number, before = state.done + 1, self._checkpoint
            self._say(state.skipped.add(number, error, self._step, self._loader, lr, before))
        else:
            self._log_sums.add(rows, result)
            state.first_loss = result.loss if math.isnan(state.first_loss) else state.first_loss
            state.last_loss = result.loss
        state.done += 1
        self._check.after_step(state.done)
        if self._reporter is not None:
            self._reporter.advance(state.done)
        if self._plan.logs(state.done):
            self._log()
        if skipped is not None and state.skipped.is_exceeded:
            raise FloatingPointError(self._give_up())
        return result.stops

    def _log(self) -> None:
        """Log the steps since the last line. Collective: all_reduce (dp)."""
        self._watchdog.beat("logging")
        done = self._state.done
        lr = self._plan.learning_rate(done - 1)
        record = self._log_sums.record(done, lr, len(self._state.skipped.steps))
        if self._reporter is not None:
            self._reporter.log(record)

    def _evaluate(self, evaluator: Evaluator) -> dict[str, float]:
        self._watchdog.beat("an evaluation", self._state.done, limited=False)
        done, epoch = self._state.done, self._loader.epoch
        return evaluate(evaluator, self._reporter, self._output_dir, done, epoch)

    def _evaluate_step(self) -> bool:
        """Evaluate the weights after the latest step; returns whether they are saved."""
        assert self._evaluator is not None, "an evaluation is due"
        state, done = self._state, self._state.done
        with self._log_sums.paused():
            metrics = self._evaluate(self._evaluator)
        state.evaluation_is_due = False
        is_saved = state.best.update(done, metrics, self._plan.saves(done))
        if state.best.stops and not self._plan.logs(done):
            self._log()  # the last step is always logged
        return is_saved

    def _save(self) -> None:
        state = self._state
        is_last = state.done == self._plan.total or state.best.stops
        self._watchdog.beat("saving")
        with self._log_sums.paused():
            self._checkpoint = self._writer.save(state.done, state.to_save(self._plan), is_last)

    def _leave(self) -> str:
        """Save where all ranks stop; returns who was asked to. Collectives: those of saving."""
        asked = self._stop.agree()
        self._say(f"asked to stop ({asked}): after step {self._state.done}")
        if self._state.done:
            self._watchdog.beat("saving, to stop", limited=False)
            state = self._state.to_save(self._plan)
            self._checkpoint = self._writer.save(self._state.done, state, is_last=True)
            if self._stop.is_asked:
                self._say(f"saved {self._stop.seconds:.1f} s after the signal")
        return asked

    def _give_up(self) -> str:
        """Save behind the step that was one too many; returns why the run ends."""
        checkpoint = None
        if self._config.guards.save_skipped_step:
            state = self._state.to_save(self._plan)
            checkpoint = self._writer.save(self._state.done, state, is_last=True)
        return self._state.skipped.message(checkpoint)
