"""How long a save stops training: written at once beside written in the background.

Both take turns within a run that takes real steps. A background save is awaited before the next
one begins. It blocks training while `save` runs and where the step waits for the copy before its
update; what the copying and writing beside it cost the step is reported apart.
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median

import numpy as np

from megatron_sdar.benchmark.step_data import NOISE_EPS, Document
from megatron_sdar.benchmark.step_options import StepOptions
from megatron_sdar.benchmark.step_own import make_own_step
from megatron_sdar.checkpoint.async_save import AsyncSaver
from megatron_sdar.checkpoint.native import CheckpointOrigin, write_checkpoint
from megatron_sdar.checkpoint.snapshot import Snapshot, take_snapshot
from megatron_sdar.config import (
    DataConfig,
    DiffusionConfig,
    ModelConfig,
    OptimConfig,
    ParallelConfig,
    SdarConfig,
    TrainingConfig,
)
from megatron_sdar.diffusion.noise import NoiseKey, draw_noise
from megatron_sdar.diffusion.rows import Row
from megatron_sdar.parallel.mesh import (
    LaunchInfo,
    ParallelMesh,
    mesh_for_thread,
    start_process_group,
    stop_process_group,
)

_TIMEOUT_SECONDS = 3600
_DOCUMENT_TOKENS = 512  # a step of a second or two: many times what copying takes


@dataclass(frozen=True)
class SaveTimes:
    """Seconds of each save.

    Attributes:
        state_bytes: weights and moments.
        synchronous: of a save that is written at once.
        blocked: that training waits for a save in the background.
        background: from its beginning until it is committed.
        step, step_beside_save: of a step alone, and of one while a save is written.
    """

    state_bytes: int
    synchronous: tuple[float, ...]
    blocked: tuple[float, ...]
    background: tuple[float, ...]
    step: tuple[float, ...]
    step_beside_save: tuple[float, ...]

    @property
    def block_share(self) -> float:
        """Blocked time over that of the synchronous save beside it, median of the rounds."""
        pairs = zip(self.blocked, self.synchronous, strict=True)
        return median(blocked / synchronous for blocked, synchronous in pairs)

    @property
    def delay_share(self) -> float:
        """All that a step is longer for beside a save, over the synchronous save."""
        columns = zip(self.step_beside_save, self.step, self.synchronous, strict=True)
        return median((beside - alone) / saving for beside, alone, saving in columns)


def measure_saves(folder: Path, rounds: int, say: Callable[[str], None]) -> SaveTimes:
    """Save the step benchmark's model into `folder`, `rounds` times in each way."""
    start_process_group(LaunchInfo(0, 0, 1), "cpu", "gloo", _TIMEOUT_SECONDS)
    try:
        times = _measure(folder, rounds)
    finally:
        stop_process_group()
        shutil.rmtree(folder, ignore_errors=True)
    size = times.state_bytes / 2**20
    say(
        f"saving {size:.0f} MiB: at once {median(times.synchronous):.2f} s, in the background "
        f"{median(times.background):.2f} s, blocking training for {median(times.blocked):.4f} s; "
        f"a step takes {median(times.step):.2f} s, beside a save "
        f"{median(times.step_beside_save):.2f} s"
    )
    return times


def _measure(folder: Path, rounds: int) -> SaveTimes:
    options = StepOptions()
    step = make_own_step(options.arch, options.optim, options.seed, trimmed=False)
    rows = [_random_row(options)]
    model = folder / "model"
    model.mkdir(parents=True)
    arch = replace(options.arch, block_size=4, mask_token_id=options.mask_token_id)
    origin = CheckpointOrigin(folder / "run", _config(folder, model), arch, [model])
    own_mesh = mesh_for_thread(step.mesh)
    saver = AsyncSaver(
        take_snapshot(0, step.stages, step.optimizer, {}),
        lambda snapshot: _write(snapshot, origin, own_mesh),
        step.mesh.device,
    )
    step.before_update = saver.wait_until_copied

    def train() -> None:
        step.run(rows, options.optim.learning_rate)

    columns: list[tuple[float, ...]] = []
    for number in range(rounds + 1):
        _settle(origin.output_dir)
        snapshot = take_snapshot(number, step.stages, step.optimizer, {})
        started = time.monotonic()
        _write(snapshot, origin, step.mesh)
        synchronous = time.monotonic() - started
        _settle(origin.output_dir)
        started = time.monotonic()
        train()
        alone = time.monotonic() - started
        snapshot = take_snapshot(number, step.stages, step.optimizer, {})
        started = time.monotonic()
        saver.save(snapshot)
        train()
        beside = time.monotonic() - started
        blocked = saver.waited
        saver.wait()
        background = time.monotonic() - started
        columns.append((synchronous, blocked, background, alone, beside))
    state_bytes = saver.num_bytes
    saver.close()
    return SaveTimes(state_bytes, *zip(*columns[1:], strict=True))  # the first warms up


def _write(snapshot: Snapshot, origin: CheckpointOrigin, mesh: ParallelMesh) -> None:
    write_checkpoint(snapshot, origin, mesh)


def _random_row(options: StepOptions) -> Row:
    """Both copies of one document, whole."""
    length = _DOCUMENT_TOKENS // options.block_length * options.block_length
    generator = np.random.default_rng(options.seed)
    ids = generator.integers(0, options.mask_token_id, size=length).astype(np.int32)
    noise = draw_noise(NoiseKey(options.seed, 0), 0, np.ones(length, bool), NOISE_EPS)
    document = Document(ids, ids, noise)
    return options.shape(length).whole_rows([document])[0]


def _settle(output_dir: Path) -> None:
    """No checkpoint is there and nothing waits to be written."""
    shutil.rmtree(output_dir, ignore_errors=True)
    os.sync()


def _config(folder: Path, model: Path) -> SdarConfig:
    return SdarConfig(
        ModelConfig(model_name_or_path=str(model)),
        DataConfig(),
        DiffusionConfig(),
        ParallelConfig(),
        OptimConfig(),
        TrainingConfig(output_dir=str(folder / "run")),
    )
