"""Evaluation of a model on disk, by itself: what tools/evaluate.py runs."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from megatron_sdar.architecture import Architecture
from megatron_sdar.checkpoint.model_source import ModelSource
from megatron_sdar.config import (
    DataConfig,
    DiffusionConfig,
    EvaluationConfig,
    ModelConfig,
    OptimConfig,
    ParallelConfig,
    SdarConfig,
    TrainingConfig,
)
from megatron_sdar.generation.loading import check_layout, load_stages, model_tokenizer, open_model
from megatron_sdar.generation.text import DTYPES
from megatron_sdar.parallel.devices import check_launch, device_type
from megatron_sdar.parallel.launch import run_on_main
from megatron_sdar.parallel.mesh import (
    LaunchInfo,
    ParallelMesh,
    build_mesh,
    start_process_group,
    stop_process_group,
)
from megatron_sdar.training.evaluation import SAMPLES_NAME, Evaluator
from megatron_sdar.training.evaluation_data import prepare_evaluation_sets
from megatron_sdar.training.metrics import LOG_NAME, Advance
from megatron_sdar.training.results import EVAL_RESULTS_NAME, write_results

_TIMEOUT_SECONDS = 600

Say = Callable[[str], None]


@dataclass(frozen=True)
class ModelEvaluationRequest:
    """What tools/evaluate.py was asked for.

    Attributes:
        model_dir: a Hugging Face directory, a native checkpoint or a run's output_dir.
        output_dir: where results, answers and token files go.
        data, evaluation: as in a run's configuration.
        block_length: None: what config.json says.
        device: auto, cpu or cuda. dtype: auto or one of generation.text.DTYPES.
    """

    model_dir: Path
    output_dir: Path
    data: DataConfig
    evaluation: EvaluationConfig
    block_length: int | None = None
    rows_per_micro_batch: int = 1
    tensor_parallel_size: int = 1
    pipeline_parallel_size: int = 1
    device: str = "auto"
    dtype: str = "auto"


def evaluate_model(
    request: ModelEvaluationRequest, launch: LaunchInfo, say: Say, advance: Advance
) -> dict[str, float]:
    """Evaluate; the metrics are written to output_dir/eval_results.json, too.

    What an earlier evaluation left there is replaced.

    Raises:
        ValueError: on every rank, for every mistake of the user.

    Starts and stops the process group.
    """
    started = time.monotonic()
    _refuse_run(request.output_dir)
    source = open_model(request.model_dir)
    arch = _resolve(source, request)
    tp, pp = request.tensor_parallel_size, request.pipeline_parallel_size
    check_layout(arch, launch.world_size, tp, pp)
    chosen = device_type(request.device)
    check_launch(launch, chosen, None)
    config = _config(source, request)
    device = start_process_group(launch, chosen, None, _TIMEOUT_SECONDS)
    try:
        metrics = _evaluate(
            request, config, source, arch, build_mesh(device, tp, pp, True), say, advance
        )
    except (ValueError, OSError):
        if launch.world_size == 1:  # several ranks need the group to leave together
            stop_process_group()
        raise
    stop_process_group()
    say(f"evaluated {source.directory} in {time.monotonic() - started:.1f} s")
    return metrics


def _evaluate(
    request: ModelEvaluationRequest,
    config: SdarConfig,
    source: ModelSource,
    arch: Architecture,
    mesh: ParallelMesh,
    say: Say,
    advance: Advance,
) -> dict[str, float]:
    run_on_main(lambda: _prepare_directory(request.output_dir), mesh)
    sets = prepare_evaluation_sets(config, arch, mesh, None, say)
    name = request.dtype
    if name == "auto":
        name = "bfloat16" if mesh.device.type == "cuda" else "float32"
    stages = load_stages(source, mesh, DTYPES[name])
    row_length = 2 * config.data.cutoff_len
    evaluator = Evaluator(config, arch, mesh, stages, sets, row_length, say)
    say(f"{evaluator.num_rows} rows of {row_length} tokens")
    metrics = evaluator.run(0, advance)
    run_on_main(lambda: write_results(request.output_dir, EVAL_RESULTS_NAME, metrics), mesh)
    return metrics


def _refuse_run(output_dir: Path) -> None:
    if (output_dir / LOG_NAME).exists():
        raise ValueError(
            f"--output-dir {output_dir} is a training run's, whose own evaluations would be "
            "overwritten; give another folder"
        )


def _prepare_directory(output_dir: Path) -> None:
    output_dir.mkdir(parents=True, exist_ok=True)
    (output_dir / SAMPLES_NAME).unlink(missing_ok=True)


def _resolve(source: ModelSource, request: ModelEvaluationRequest) -> Architecture:
    arch = source.arch
    if request.block_length is not None:
        arch = replace(arch, block_size=request.block_length)
    if arch.block_size is None:
        raise ValueError(
            f"{request.model_dir}/config.json has no block_size; give --block-length, the one the "
            "model was trained with"
        )
    if request.data.cutoff_len % arch.block_size:
        raise ValueError(
            f"--cutoff-len {request.data.cutoff_len} is no multiple of the block length "
            f"{arch.block_size}"
        )
    return replace(arch, mask_token_id=arch.mask_token_id or model_tokenizer(source).mask_token_id)


def _config(source: ModelSource, request: ModelEvaluationRequest) -> SdarConfig:
    return SdarConfig(
        model=ModelConfig(
            model_name_or_path=str(source.directory),
            tokenizer_name_or_path=str(source.tokenizer_directory),
        ),
        data=request.data,
        diffusion=DiffusionConfig(),
        parallel=ParallelConfig(),
        optim=OptimConfig(),
        training=TrainingConfig(
            output_dir=str(request.output_dir),
            per_device_train_batch_size=request.rows_per_micro_batch,
        ),
        evaluation=request.evaluation,
    )
