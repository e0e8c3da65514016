"""What the user is told of a run before its first step and after its last."""

from __future__ import annotations

import math
from pathlib import Path

from megatron_sdar.config import SdarConfig
from megatron_sdar.data.loading.loader import RowLoader
from megatron_sdar.parallel.mesh import ParallelMesh
from megatron_sdar.training.best_model import BestModel
from megatron_sdar.training.evaluation import SAMPLES_NAME
from megatron_sdar.training.metrics import LOG_NAME
from megatron_sdar.training.nonfinite import SKIPPED_DIR, SkippedSteps
from megatron_sdar.training.step_log import StepLog
from megatron_sdar.training.work_meter import memory_mb


def describe_run(config: SdarConfig, mesh: ParallelMesh, loader: RowLoader, total: int) -> str:
    """Layout, rows per step, steps and epochs."""
    parallel = config.parallel
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
            f"{config.data.cutoff_len} document tokens fit in one "
            "(semantics: paper has room for 1)"
        )
    return "\n".join(lines)


def summarize_run(
    config: SdarConfig,
    done: int,
    seconds: float,
    losses: tuple[float, float],
    log: StepLog,
    best: BestModel,
    checkpoint: Path,
    exported: Path,
    skipped: SkippedSteps,
) -> str:
    """The table at the end.

    Args:
        losses: of the first and the last step; nan when nothing was trained.
        checkpoint: the last one.
        exported: the one that the model in output_dir was made from.
        skipped: steps of the whole run that were not finite.
    """
    output_dir = Path(config.training.output_dir)
    first, last = losses
    trained = f"loss {first:.4f} -> {last:.4f}"
    if not math.isfinite(last):
        trained = "nothing was left to train"
    rows = [*_figures(log), ("checkpoint", str(checkpoint))]
    rows.append(("log", str(output_dir / LOG_NAME)))
    if skipped.steps:
        rows.append(
            ("skipped steps", f"{len(skipped.steps)}, not finite: {output_dir / SKIPPED_DIR}")
        )
    if best.value is not None:
        rows.append(("best evaluation", f"{best.metric} {best.value:.4f} at step {best.step}"))
    if best.stops:
        rows.append(
            ("stopped early", f"{best.without_better} evaluations in a row were not better")
        )
    if config.evaluation.eval_generate_samples and best.value is not None:
        rows.append(("generated answers", str(output_dir / SAMPLES_NAME)))
    if config.training.plot_loss:
        rows.append(("loss plot", str(output_dir / "training_loss.png")))
    if config.training.export_hf:
        is_adapter = config.finetuning.finetuning_type == "lora"
        origin = "" if exported == checkpoint else f", from {exported.name}, the best"
        rows.append(
            (
                "PEFT adapter" if is_adapter else "HF model",
                f"{output_dir} ({'adapter_' * is_adapter}config.json, safetensors{origin})",
            )
        )
    lines = ["", f"done: {done} steps, {seconds:.0f} s; {trained}"]
    return "\n".join(lines + [f"  {name:<17} {text}" for name, text in rows])


def describe_stop(config: SdarConfig, done: int, total: int, checkpoint: Path | None) -> str:
    """Where a run that was asked to stop will go on.

    Args:
        checkpoint: the last one; None: no step was done.
    """
    training = config.training
    if checkpoint is None:
        return "stopped before the first step: nothing was trained, nothing is lost"
    onward = "has everything; the same command goes on from there"
    if training.save_only_model:
        onward = "holds the weights alone (save_only_model); train on from it as a model"
    elif training.job_id is not None:
        onward = (
            f"has everything; a start with the same job_id ({training.job_id}) goes on from there"
        )
    elif training.overwrite_output_dir or isinstance(training.resume_from_checkpoint, str):
        onward = (
            "has everything; to go on from there add overwrite_output_dir=false "
            "resume_from_checkpoint=null to the command"
        )
    return f"stopped after step {done} of {total}: {checkpoint} {onward}"


def _figures(log: StepLog) -> list[tuple[str, str]]:
    """Means and sums over the steps that this start of the run trained; nothing if there are none.

    Memory is this process's.
    """
    done = log.logged
    if not done.seconds:
        return []
    work, seconds = done.work, done.seconds
    speed = (
        f"{done.label_tokens / seconds:,.0f} answer tok/s of {work.tokens / seconds:,.0f} "
        f"in {seconds:.0f} s of training"
    )
    mfu = log.mfu(done)
    if mfu is not None:
        speed += f", MFU {mfu:.0%}"
    tokens = f"{work.noisy:,} noisy, {work.clean:,} clean, {work.padding:,} padding"
    if log.left_out:
        tokens += f"; {log.left_out:,} left out"
    return [
        ("speed", speed),
        ("tokens", tokens),
        ("memory", f"{memory_mb(log.device) / 1024:.1f} GiB"),
    ]
