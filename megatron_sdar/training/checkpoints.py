"""The run's checkpoints: where it starts from, and saving while it goes on.

Owns what the user is told of both. How a checkpoint is written, verified and loaded is
checkpoint/'s to know.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from megatron_sdar.architecture import Architecture
from megatron_sdar.checkpoint.adapter_config import AdapterConfig
from megatron_sdar.checkpoint.agreement import together
from megatron_sdar.checkpoint.async_save import AsyncSaver
from megatron_sdar.checkpoint.base_model import base_model
from megatron_sdar.checkpoint.native import (
    CheckpointOrigin,
    checkpoint_path,
    load_checkpoint,
    write_checkpoint,
)
from megatron_sdar.checkpoint.resumption import none_left, refusal
from megatron_sdar.checkpoint.run_directory import DamagedCheckpointError, prune_checkpoints
from megatron_sdar.checkpoint.snapshot import Snapshot, take_snapshot
from megatron_sdar.checkpoint.stored_fit import AdapterOrigin
from megatron_sdar.config import SdarConfig, TrainingConfig
from megatron_sdar.parallel.launch import run_on_main
from megatron_sdar.parallel.mesh import ParallelMesh, mesh_for_thread
from megatron_sdar.training.finetuning import resolve_finetuning
from megatron_sdar.training.step import TrainingStep
from megatron_sdar.training.token_files import tokenizer_path

Say = Callable[[str], None]


@dataclass(frozen=True)
class Resumed:
    """What a run goes on from.

    Attributes:
        path: the checkpoint.
        state: what it was saved with.
        damaged: newer ones that were passed over.
    """

    path: Path
    state: Mapping[str, Any]
    damaged: tuple[Path, ...]


def adapter_origin(
    config: SdarConfig, arch: Architecture, mesh: ParallelMesh
) -> AdapterOrigin | None:
    """What a LoRA run trains and beside which model; None for other runs.

    Raises:
        ValueError: on every rank, when the model cannot be read.

    Collective: broadcast_object_list (world).
    """
    finetuning = resolve_finetuning(config.finetuning, arch.num_hidden_layers)
    if finetuning.lora is None:
        return None
    path = config.model.model_name_or_path
    base = run_on_main(lambda: base_model(path, arch), mesh)
    return AdapterOrigin(AdapterConfig(finetuning, path), base)


def resume(
    candidates: Sequence[Path],
    training: TrainingConfig,
    step: TrainingStep,
    say: Say,
    adapter: AdapterOrigin | None = None,
) -> Resumed:
    """Load the first of the candidates that is not damaged.

    Args:
        adapter: see `load_checkpoint`.

    Raises:
        ValueError: on every rank; the one that resume_from_checkpoint names is damaged, or all
            of them are, or one cannot be resumed for another reason.

    Collectives: those of `load_checkpoint`, once per candidate.
    """
    problems: list[str] = []
    for index, path in enumerate(candidates):
        try:
            state = load_checkpoint(
                path, step.stages, step.optimizer, training.verify_checkpoints, adapter
            )
        except DamagedCheckpointError as error:
            asked = training.resume_from_checkpoint
            if isinstance(asked, str) and path == Path(asked):
                raise ValueError(refusal(path, error)) from error
            first, *others = str(error).splitlines()
            problems += [first, *others]
            more = f" (and {len(others)} more)" if others else ""
            say(f"passed over: {first}{more}")
        else:
            return Resumed(path, state, tuple(candidates[:index]))
    raise ValueError(none_left(Path(training.output_dir), problems))


class CheckpointWriter:
    """Saves the run's checkpoints; a context manager, which waits for a save under way.

    With async_save a save that training goes on after runs in the background. The last one does
    not: nothing is left to do meanwhile, so it is written from the weights themselves.

    Args:
        step: whose weights and moments are saved.
        several: whether there will be saves before the last.
        damaged: checkpoints that save_total_limit does not count.
        say: tells the user; on rank 0 something, elsewhere nothing.
        adapter: of a LoRA run.
        best_step: whose checkpoint save_total_limit must spare, asked on rank 0.

    Raises:
        ValueError: on every rank, when one has too little host memory for async_save.

    Collectives: when saves run in the background, all_gather_object (world), and it creates a
    process group.
    """

    def __init__(
        self,
        config: SdarConfig,
        arch: Architecture,
        mesh: ParallelMesh,
        step: TrainingStep,
        several: bool,
        damaged: Sequence[Path],
        say: Say,
        adapter: AdapterOrigin | None = None,
        best_step: Callable[[], int | None] = lambda: None,
    ) -> None:
        training = config.training
        self._best_step = best_step
        assets = [config.model.model_name_or_path, tokenizer_path(config)]
        self._origin = CheckpointOrigin(Path(training.output_dir), config, arch, assets, adapter)
        self._mesh = mesh
        if mesh.is_main:  # from here on it is there, or somebody took it away
            self._origin.output_dir.mkdir(parents=True, exist_ok=True)
        self._step = step
        self._optimizer = None if training.save_only_model else step.optimizer
        self._limit = training.save_total_limit
        self._damaged = set(damaged)
        self._say = say
        self._said_waiting = False
        self._newest: Path | None = None
        self._saver = self._make_saver() if training.async_save and several else None

    def _make_saver(self) -> AsyncSaver:
        own_mesh = mesh_for_thread(self._mesh)

        def write(snapshot: Snapshot) -> None:
            self._write(snapshot, own_mesh, saver)

        saver = together(lambda: AsyncSaver(self._snapshot(0, {}), write, self._mesh.device))
        self._step.before_update = saver.wait_until_copied
        size = size_text(saver.num_bytes)
        self._say(f"async_save: {size} of host memory hold what this process saves")
        return saver

    def _snapshot(self, done: int, state: Mapping[str, Any]) -> Snapshot:
        return take_snapshot(done, self._step.stages, self._optimizer, state)

    def save(self, done: int, state: Mapping[str, Any], is_last: bool) -> Path:
        """Save step `done`; returns where it lies, at the latest when this writer is left.

        Raises:
            ValueError: on every rank, when this save failed, or the one before it and this is
                not the last (of which the user is told only: the last weights must not be lost).

        Collectives: those of `write_checkpoint`, unless it runs in the background.
        """
        snapshot, earlier = self._snapshot(done, state), self._newest
        self._newest = checkpoint_path(self._origin.output_dir, done)
        if self._saver is not None and not is_last:
            waited = self._saver.save(snapshot)
            self._tell_of_waiting(waited, earlier)
        else:
            self._tell_of_waiting(self._wait_for(earlier), earlier)
            self._write(snapshot, self._mesh, None)
        return self._newest

    def _wait_for(self, earlier: Path | None) -> float:
        """Seconds until the save under way was over; its failure is said."""
        if self._saver is None:
            return 0.0
        try:
            return self._saver.wait()
        except ValueError as error:
            self._say(f"{earlier} was not saved: {error}")
            return 0.0

    def _tell_of_waiting(self, seconds: float, earlier: Path | None) -> None:
        if seconds == 0 or self._said_waiting:
            return
        self._said_waiting = True
        self._say(
            f"training waited {seconds:.2f} s for {earlier} to be saved: that takes longer than "
            "the steps between two saves (said once; save_steps sets them)"
        )

    def _write(self, snapshot: Snapshot, mesh: ParallelMesh, saver: AsyncSaver | None) -> None:
        """Write it and remove what exceeds save_total_limit; `saver` is None in the foreground."""
        started = time.monotonic()
        output_dir, limit = self._origin.output_dir, self._limit
        path = checkpoint_path(output_dir, snapshot.step)
        run_on_main(self._check_output_dir, mesh)
        size = write_checkpoint(snapshot, self._origin, mesh)
        self._damaged.discard(path)  # just replaced
        if limit is not None:
            run_on_main(lambda: self._prune(output_dir, limit), mesh)
        seconds = time.monotonic() - started
        blocked = seconds if saver is None else saver.waited
        self._say(
            f"saved {path} ({size_text(size)} in {seconds:.1f} s, training waited {blocked:.2f} s)"
        )

    def _check_output_dir(self) -> None:
        """The run made it; a folder that went away meanwhile is not quietly begun anew."""
        output_dir = self._origin.output_dir
        if not output_dir.is_dir():
            raise ValueError(
                f"cannot save in {output_dir}: the folder is gone, removed or renamed while the "
                "run was going on; put it back and start again from its newest checkpoint"
            )

    def _prune(self, output_dir: Path, limit: int) -> None:
        best = self._best_step()
        spared = None if best is None else checkpoint_path(output_dir, best)
        prune_checkpoints(output_dir, limit, self._damaged, spared)

    def __enter__(self) -> CheckpointWriter:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._saver is None:
            return
        if self._saver.is_busy:
            self._say(f"waiting for {self._newest} to be saved")
        try:
            self._saver.close()
        except Exception as failure:
            if error is None:
                raise
            self._say(f"moreover: {failure}")  # what ends the run is the other error


def size_text(num_bytes: int) -> str:
    """Bytes for people: 1.2 GB, 3.4 MB."""
    return f"{num_bytes / 1e9:.1f} GB" if num_bytes >= 1e8 else f"{num_bytes / 1e6:.1f} MB"
