"""Run a skipped step again, micro-batch by micro-batch, to find where it stops being finite.

Rows follow from the record alone, weights from a checkpoint. Every data-parallel rank runs the
same micro-batch, so each one's loss and gradient can be told apart in any layout.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from megatron_sdar.architecture import Architecture
from megatron_sdar.checkpoint.native import load_checkpoint
from megatron_sdar.checkpoint.run_directory import STATE_NAME
from megatron_sdar.config import SdarConfig, load_config, validate
from megatron_sdar.diffusion.loss import micro_batch_scales
from megatron_sdar.parallel.devices import check_launch, device_type
from megatron_sdar.parallel.gradients import local_gradients
from megatron_sdar.parallel.launch import gather_from_all, run_on_main
from megatron_sdar.parallel.mesh import (
    LaunchInfo,
    ParallelMesh,
    build_mesh,
    start_process_group,
    stop_process_group,
)
from megatron_sdar.training.checkpoints import adapter_origin
from megatron_sdar.training.finite_outputs import OutputWatch, not_finite_parameters
from megatron_sdar.training.nonfinite import not_finite_gradients
from megatron_sdar.training.plan import make_plan
from megatron_sdar.training.preparation import Parts, prepare
from megatron_sdar.training.replay_start import ReplayStart, StepRecord, find_start, read_record
from megatron_sdar.training.setup import check_schedule, resolve_architecture
from megatron_sdar.training.step import NonFiniteStepError
from megatron_sdar.training.trainer_state import own_state_of, state_of

Say = Callable[[str], None]


@dataclass(frozen=True)
class ReplayRequest:
    """What the user asks for.

    Attributes:
        arguments: CONFIG.yaml key=value ..., as the run was started.
        record: OUTPUT_DIR/skipped_steps/step-N.json.
        train_from_checkpoint: run the steps between the checkpoint and the step first.
    """

    arguments: Sequence[str]
    record: Path
    train_from_checkpoint: bool = False


@dataclass(frozen=True)
class MicroBatchReport:
    """One micro-batch of the step.

    Attributes:
        number: in the order of the stream.
        documents: as the record names them.
        label_tokens: of these documents.
        loss: its share of the step's loss.
        grad_norm: of its own gradient.
        module: the first one whose output is not finite; None: all are.
        parameters: with a gradient that is not finite.
    """

    number: int
    documents: Sequence[Mapping[str, Any]]
    label_tokens: int
    loss: float
    grad_norm: float
    module: str | None
    parameters: Sequence[str]

    @property
    def is_finite(self) -> bool:
        return math.isfinite(self.loss) and math.isfinite(self.grad_norm)


def replay_step(request: ReplayRequest, launch: LaunchInfo, say: Say) -> list[MicroBatchReport]:
    """Run the step again; the reports are the same on every rank.

    Args:
        say: called with lines for the user, on every rank.

    Raises:
        ValueError, OSError: on every rank, for every mistake of the user.

    Starts and stops the process group.
    """
    record, config, arch = resolve_replay(request, launch, say)
    parallel = config.parallel
    chosen = device_type(config.training.device)
    check_launch(launch, chosen, parallel.ddp_backend)
    device = start_process_group(launch, chosen, parallel.ddp_backend, parallel.ddp_timeout)
    try:
        mesh = build_mesh(
            device,
            parallel.tensor_model_parallel_size,
            parallel.pipeline_model_parallel_size,
            parallel.data_parallel_sharding_strategy == "no_shard",
        )
        reports = replay_micro_batches(request, config, arch, mesh, record, say)
    except (ValueError, OSError):
        if launch.world_size == 1:  # several ranks need the group to leave together
            stop_process_group()
        raise
    stop_process_group()
    return reports


def resolve_replay(
    request: ReplayRequest, launch: LaunchInfo, say: Say
) -> tuple[StepRecord, SdarConfig, Architecture]:
    """The record, and the validated configuration that gives its rows on these processes.

    Raises:
        ValueError, OSError: for every mistake of the user.
    """
    record = read_record(request.record)
    config = _same_step(_one_process(load_config(request.arguments), launch, say), record, launch)
    arch = resolve_architecture(config)
    validate(config, arch, launch.world_size)
    check_schedule(config)
    return record, config, arch


def _one_process(config: SdarConfig, launch: LaunchInfo, say: Say) -> SdarConfig:
    """In one process the model is whole, whatever the layout of the run."""
    parallel = config.parallel
    sizes = (parallel.tensor_model_parallel_size, parallel.pipeline_model_parallel_size)
    if launch.world_size > 1 or sizes == (1, 1):
        return config
    say(f"one process: tp {sizes[0]} x pp {sizes[1]} become 1 x 1; torchrun keeps the run's layout")
    whole = replace(
        parallel,
        tensor_model_parallel_size=1,
        pipeline_model_parallel_size=1,
        virtual_pipeline_model_parallel_size=1,
        num_layers_per_pipeline_stage=None,
    )
    return replace(config, parallel=whole)


def _same_step(config: SdarConfig, record: StepRecord, launch: LaunchInfo) -> SdarConfig:
    """The configuration whose steps take as many rows as the recorded one, on these processes."""
    parallel, total = config.parallel, len(record.micro_batches)
    group = parallel.tensor_model_parallel_size * parallel.pipeline_model_parallel_size
    replicas = max(1, launch.world_size // group)
    if total % replicas:
        raise ValueError(
            f"{record.path}: the step's {total} micro-batches cannot be dealt to {replicas} "
            f"data-parallel ranks; start {group} processes"
        )
    training = replace(
        config.training,
        per_device_train_batch_size=record.rows_per_micro_batch,
        gradient_accumulation_steps=total // replicas,
        global_batch_size=None,
    )
    return replace(config, training=training)


def replay_micro_batches(
    request: ReplayRequest,
    config: SdarConfig,
    arch: Architecture,
    mesh: ParallelMesh,
    record: StepRecord,
    say: Say,
) -> list[MicroBatchReport]:
    """`replay_step` on a mesh that exists, with what `resolve_replay` gave.

    Collectives: those of `prepare`, of a load, and of a step per micro-batch.
    """
    start = run_on_main(lambda: find_start(record), mesh)
    parts = prepare(config, arch, mesh, start.checkpoint is not None, say)
    trains = request.train_from_checkpoint and not start.is_exact
    try:
        if start.checkpoint is not None:
            _load(start, config, arch, mesh, parts, trains)
        if trains:
            say(f"running steps {start.step + 1} to {record.step - 1} first")
            _train(start, config, mesh, parts, record)
            start = replace(start, is_exact=True)
        say(start.describe(record.step))
    finally:
        parts.loader.close()
    names = sorted({n for found in gather_from_all(_broken(parts), mesh) for n in found})
    if names:
        say(f"these weights are not finite: {', '.join(names)}")
    with state_of(record.path):
        parts.loader.load_state_dict(record.loader)
    return [
        _run_micro_batch(number, config, mesh, parts, record)
        for number in range(len(record.micro_batches))
    ]


def _broken(parts: Parts) -> list[str]:
    return not_finite_parameters(parts.stages)


def _load(
    start: ReplayStart,
    config: SdarConfig,
    arch: Architecture,
    mesh: ParallelMesh,
    parts: Parts,
    trains: bool,
) -> None:
    assert start.checkpoint is not None, "the caller knows"
    adapter = adapter_origin(config, arch, mesh)
    optimizer, verify = parts.step.optimizer if trains else None, config.training.verify_checkpoints
    state = load_checkpoint(start.checkpoint, parts.stages, optimizer, verify, adapter)
    if trains:
        with state_of(start.checkpoint / STATE_NAME):
            own = own_state_of(state)
            skipped = own.get("skipped", {}).get("steps", ())
            parts.step.optimizer.set_step_count(start.step - len(skipped))
            parts.loader.load_state_dict(own["loader"])


def _train(
    start: ReplayStart, config: SdarConfig, mesh: ParallelMesh, parts: Parts, record: StepRecord
) -> None:
    """Run the steps up to the recorded one, skipping what is not finite, as the run did."""
    plan = make_plan(config, parts.loader, mesh)
    for done in range(start.step, record.step - 1):
        try:
            parts.step.run(parts.loader.next_step(), plan.learning_rate(done))
        except NonFiniteStepError as error:
            if done + 1 not in record.skipped_before:
                raise ValueError(
                    f"step {done + 1} is not finite here ({error}), but was not skipped then; use "
                    "the run's own layout and settings"
                ) from error


def _run_micro_batch(
    number: int, config: SdarConfig, mesh: ParallelMesh, parts: Parts, record: StepRecord
) -> MicroBatchReport:
    """Forward and backward of one micro-batch on all ranks."""
    step = parts.step
    row = parts.loader.micro_batch_at(int(record.loader["rows_taken"]), number)
    (scale,) = micro_batch_scales(
        [row.num_label_tokens],
        record.label_tokens,
        config.diffusion.loss_normalization,
        record.data_parallel_size,
    )
    watch = OutputWatch(parts.stages)
    step.zero_grad()
    with watch.watching():
        # Each data-parallel rank adds the same, so that their sum is the micro-batch's own.
        loss = step.backward_scaled([row], [scale / mesh.dp_size])
    norm = step.grad_norm(local_gradients(step.parameters))
    found = gather_from_all((watch.take(), not_finite_gradients(step)), mesh)
    modules = [module for module, _ in found if module is not None]
    return MicroBatchReport(
        number,
        record.micro_batches[number]["documents"],
        row.num_label_tokens,
        loss.item(),
        norm.item(),
        min(modules).name if modules else None,
        sorted({name for _, names in found for name in names}),
    )
