"""The training run: steps, logging, checkpoints, export, summary.

State that must survive a restart is the step count, the loader's position and the sums behind
the next log line; all of it is in the checkpoint's JSON. Everything else follows from the
configuration.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_sdar.architecture import Architecture
from megatron_sdar.checkpoint.hf_export import export_hf
from megatron_sdar.checkpoint.hf_import import load_hf_weights
from megatron_sdar.checkpoint.native import load_checkpoint, save_checkpoint
from megatron_sdar.checkpoint.run_directory import (
    incomplete_checkpoints,
    prune_checkpoints,
    resolve_resume,
)
from megatron_sdar.config import SdarConfig
from megatron_sdar.data.loading.loader import RowLoader
from megatron_sdar.model.sdar import SdarStage
from megatron_sdar.model.weights import initialize
from megatron_sdar.optim.schedules import lr_multiplier, resolve_warmup_steps
from megatron_sdar.parallel.launch import run_on_main
from megatron_sdar.parallel.mesh import ParallelMesh, sum_over_data_parallel
from megatron_sdar.training.data import (
    describe_pack,
    make_loader,
    pack,
    prepare_documents,
    tokenizer_path,
)
from megatron_sdar.training.kernels import choose_kernels
from megatron_sdar.training.metrics import LOG_NAME, Reporter, StepRecord, trim_log
from megatron_sdar.training.plot import plot_loss
from megatron_sdar.training.setup import make_stages, make_step
from megatron_sdar.training.step import StepResult, TrainingStep


@dataclass
class Interval:
    """Sums since the last logged step."""

    steps: int = 0
    loss: float = 0.0
    label_tokens: int = 0

    def add(self, result: StepResult) -> None:
        self.steps += 1
        self.loss += result.loss
        self.label_tokens += result.label_tokens


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
    """logging_steps or save_steps: a step count, or below 1 a fraction of all steps."""
    return max(1, math.ceil(value * total) if value < 1 else int(value))


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
        self.interval = Interval()
        self.first_loss = self.last_loss = math.nan

    def run(self) -> None:
        """Train to the last step and leave checkpoints, log, plot and export behind.

        Raises:
            ValueError, OSError: a user's error.
            FloatingPointError: loss or gradients are not finite, on every rank.

        Collectives: all of training.
        """
        started = time.monotonic()
        training = self.config.training
        resume = run_on_main(self._choose_start, self.mesh)
        documents = prepare_documents(self.config, self.mesh, self.say)
        indexes = pack(self.config, self.arch, documents)
        self.say(describe_pack(documents, indexes, self.config))
        loader = make_loader(self.config, self.arch, self.mesh, documents, indexes)
        kernels = choose_kernels(self.config, self.arch, self.mesh)
        self.say(kernels.description)
        stages = make_stages(self.config, self.arch, self.mesh, kernels)
        if resume is None:
            self._start_weights(stages)
        step = make_step(self.config, self.arch, self.mesh, stages)
        if resume is not None:
            self._resume(resume, step, loader)
        total = total_steps(self.config, loader, self.mesh)
        self.say(self._describe(loader, total))
        try:
            last_checkpoint = self._train(step, loader, total, resume)
        finally:
            loader.close()
        if training.export_hf:
            run_on_main(lambda: self._export(last_checkpoint), self.mesh)
        if training.plot_loss:
            run_on_main(self._plot, self.mesh)
        self.say(self._summary(total, time.monotonic() - started, last_checkpoint))

    def _choose_start(self) -> Path | None:
        """Make output_dir; the checkpoint to resume from, None to start afresh (rank 0)."""
        training = self.config.training
        self.output_dir.mkdir(parents=True, exist_ok=True)
        for line in incomplete_checkpoints(self.output_dir):
            self.say(f"passed over: {line}")
        return resolve_resume(
            self.output_dir, training.resume_from_checkpoint, training.overwrite_output_dir
        )

    def _start_weights(self, stages: list[SdarStage]) -> None:
        model = self.config.model
        if model.train_from_scratch:
            initialize(stages, self.config.training.seed)
            self.say(f"weights: random (seed {self.config.training.seed})")
        else:
            report = load_hf_weights(
                stages,
                self.arch,
                model.model_name_or_path,
                model.mask_token_init,
                seed=self.config.training.seed,
            )
            self.say(report.format())

    def _resume(self, path: Path, step: TrainingStep, loader: RowLoader) -> None:
        state = load_checkpoint(path, step.stages, step.optimizer)
        self.done = int(state["step"])
        if "loader" in state:  # a checkpoint converted from a model directory has weights only
            loader.load_state_dict(state["loader"])
            self.interval = Interval(**state["interval"])
            first_loss = state["first_loss"]
            self.first_loss = math.nan if first_loss is None else first_loss
        self.say(f"resumed from {path}: step {self.done}, epoch {loader.epoch:.3f}")

    def _train(
        self, step: TrainingStep, loader: RowLoader, total: int, resumed: Path | None
    ) -> Path:
        """Run the remaining steps; returns the last step's checkpoint."""
        training, optim = self.config.training, self.config.optim
        log_every = steps_between(training.logging_steps, total)
        save_every = steps_between(training.save_steps, total)
        warmup = resolve_warmup_steps(optim.warmup_steps, optim.warmup_ratio, total)
        checkpoint = resumed
        if checkpoint is not None and self.done >= total:
            self.say(f"step {self.done} of {total} is done already: nothing left to train")
            return checkpoint
        run_on_main(lambda: trim_log(self.output_dir, self.done), self.mesh)
        with self._reporting(total) as reporter:
            logged_at, waited = time.monotonic(), loader.wait_seconds
            while self.done < total:
                lr = optim.learning_rate * lr_multiplier(
                    optim.lr_scheduler_type,
                    self.done,
                    total,
                    warmup,
                    optim.lr_scheduler_kwargs,
                    optim.learning_rate,
                )
                result = self._step(step, loader, lr)
                self.done += 1
                self.interval.add(result)
                if reporter is not None:
                    reporter.advance(self.done)
                if self.done % log_every == 0 or self.done == total:
                    now = time.monotonic()
                    if reporter is not None:
                        waiting = loader.wait_seconds - waited
                        reporter.log(self._record(result, lr, loader, now - logged_at, waiting))
                    logged_at, waited = now, loader.wait_seconds
                    self.interval = Interval()
                periodic = training.save_strategy == "steps" and self.done % save_every == 0
                if periodic or self.done == total:
                    saving_at = time.monotonic()
                    checkpoint = self._save(step, loader)
                    logged_at += time.monotonic() - saving_at  # rates leave saving out
        assert checkpoint is not None, "the last step is always saved"
        return checkpoint

    def _reporting(self, total: int) -> AbstractContextManager[Reporter | None]:
        if self.mesh.is_main:
            return Reporter(self.output_dir, total, self.done)
        return nullcontext()

    def _step(self, step: TrainingStep, loader: RowLoader, lr: float) -> StepResult:
        position = loader.position
        try:
            result = step.run(loader.next_step(), lr)
        except FloatingPointError as error:
            raise FloatingPointError(
                f"step {self.done + 1} (rows {position} to {loader.position - 1} of the stream) "
                f"is not finite: {error}; no weight was changed. Lower learning_rate, or resume "
                "from an earlier checkpoint with another seed"
            ) from error
        if math.isnan(self.first_loss):
            self.first_loss = result.loss
        self.last_loss = result.loss
        return result

    def _record(
        self, result: StepResult, lr: float, loader: RowLoader, seconds: float, waiting: float
    ) -> StepRecord:
        steps = self.interval.steps
        positions = loader.row_length * loader.rows_per_step * steps
        return StepRecord(
            step=self.done,
            loss=self.interval.loss / steps,
            grad_norm=result.grad_norm,
            lr=lr,
            epoch=loader.epoch,
            label_tokens_per_s=self.interval.label_tokens / seconds,
            row_tokens_per_s=positions / seconds,
            data_wait_share=waiting / seconds,
        )

    def _save(self, step: TrainingStep, loader: RowLoader) -> Path:
        state: dict[str, Any] = {
            "step": self.done,
            "loader": loader.state_dict(),
            "interval": vars(self.interval),
            "first_loss": self.first_loss,
        }
        training = self.config.training
        path = save_checkpoint(
            self.output_dir,
            self.done,
            step.stages,
            None if training.save_only_model else step.optimizer,
            state,
            self.config,
            self.arch,
            self.mesh,
            [self.config.model.model_name_or_path, tokenizer_path(self.config)],
        )
        if training.save_total_limit is not None:
            limit = training.save_total_limit
            run_on_main(lambda: prune_checkpoints(self.output_dir, limit), self.mesh)
        return path

    def _export(self, checkpoint: Path) -> None:
        self.say(export_hf(checkpoint, self.output_dir, into_existing=True).format())

    def _plot(self) -> None:
        plot_loss(self.output_dir / LOG_NAME, self.output_dir / "training_loss.png")

    def _describe(self, loader: RowLoader, total: int) -> str:
        mesh, parallel = self.mesh, self.config.parallel
        rows = total * loader.rows_per_step
        lines = [
            f"layout: tp {mesh.tp_size} x pp {mesh.pp_size} x dp {mesh.dp_size}"
            f" (vpp {parallel.virtual_pipeline_model_parallel_size},"
            f" {parallel.data_parallel_sharding_strategy}); "
            f"{loader.rows_per_step} rows of {loader.row_length} tokens per step, {total} steps, "
            f"{rows * loader.packed_rows_per_row / loader.num_rows:.2f} epochs"
        ]
        if loader.grouped is not None:
            lines.append(
                f"exact savings: {loader.packed_rows_per_row:.2f} rows of "
                f"{self.config.data.cutoff_len} document tokens fit in one "
                "(semantics: paper has room for 1)"
            )
        return "\n".join(lines)

    def _summary(self, total: int, seconds: float, checkpoint: Path) -> str:
        losses = "nothing was left to train"
        if math.isfinite(self.last_loss):
            losses = f"loss {self.first_loss:.4f} -> {self.last_loss:.4f}"
        lines = [
            "",
            f"done: {total} steps, {seconds:.0f} s; {losses}",
            f"  checkpoint        {checkpoint}",
            f"  log               {self.output_dir / LOG_NAME}",
        ]
        if self.config.training.plot_loss:
            lines.append(f"  loss plot         {self.output_dir / 'training_loss.png'}")
        if self.config.training.export_hf:
            lines.append(f"  HF model          {self.output_dir} (config.json, safetensors)")
        return "\n".join(lines)


def _print_line(text: str) -> None:
    print(text, flush=True)


def _stay_quiet(text: str) -> None:
    del text
