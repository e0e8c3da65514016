"""Whole runs and runs that go on from one of their checkpoints, and what both leave behind."""

from __future__ import annotations

import json
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
import yaml
from distributed.skipped_runs import Faults, in_place
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor

from megatron_sdar.checkpoint.run_directory import read_marker
from megatron_sdar.checkpoint.safetensors_files import full_ranges
from megatron_sdar.checkpoint.shards import ShardedTensors
from megatron_sdar.config import load_config, validate
from megatron_sdar.data.demo import make_demo_data
from megatron_sdar.parallel.mesh import build_mesh
from megatron_sdar.training.checkpoints import CheckpointWriter
from megatron_sdar.training.run import TrainingRun
from megatron_sdar.training.setup import resolve_architecture

STEPS = 8
SETTINGS = {
    "train_from_scratch": True, "dataset": "arithmetic", "cutoff_len": 64, "max_steps": STEPS,
    "per_device_train_batch_size": 1, "gradient_accumulation_steps": 2, "logging_steps": 3,
    "logging_first_step": True, "save_steps": 1, "device": "cpu", "learning_rate": 1e-2,
    "warmup_steps": 3, "preprocessing_num_workers": 1, "report_mfu": False, "val_size": 4,
    "eval_strategy": "steps", "eval_steps": 2, "eval_noise_levels": 2, "report_to": "tensorboard",
}  # fmt: skip
# Numbers that no two runs share.
TIMES = {
    "elapsed_time", "remaining_time", "label_tokens_per_s", "row_tokens_per_s", "data_wait_share",
    "memory_mb", "eval_runtime", "own_time_slowest_rank", "own_time_s", "own_time_factor",
    "products_slowest_rank", "products_s", "products_factor",
}  # fmt: skip


def make_folder(folder: Path, documents: int = 30) -> Path:
    """The data that `write` names."""
    make_demo_data(folder, documents)
    return folder


def write(folder: Path, name: str, **changes: Any) -> list[str]:
    """The configuration of run NAME; the arguments of the entry script."""
    config = {
        "model_name_or_path": str(folder / "model"), "dataset_dir": str(folder),
        "output_dir": str(folder / name),
    }  # fmt: skip
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(config | SETTINGS | changes))
    return [str(path)]


class KilledError(RuntimeError):
    """The run ends here."""


def train(arguments: list[str], faults: Faults | None = None, killed_at: int | None = None) -> None:
    """What the entry script does, on every rank of the world there is.

    Args:
        killed_at: the step that is logged and evaluated, but not saved any more.
    """
    config = load_config(arguments)
    arch = resolve_architecture(config)
    validate(config, arch, dist.get_world_size())
    parallel = config.parallel
    mesh = build_mesh(
        torch.device("cpu"),
        parallel.tensor_model_parallel_size,
        parallel.pipeline_model_parallel_size,
        parallel.data_parallel_sharding_strategy == "no_shard",
    )
    save = CheckpointWriter.save

    def save_or_end(writer: CheckpointWriter, done: int, *others: Any) -> Path:
        if done == killed_at:
            raise KilledError
        return save(writer, done, *others)

    with (
        in_place(faults) if faults is not None else nullcontext(),
        mock.patch.object(CheckpointWriter, "save", save_or_end),
        nullcontext() if killed_at is None else suppress(KilledError),
    ):
        TrainingRun(config, arch, mesh).run()


def lines(run: Path, name: str = "trainer_log.jsonl") -> list[dict[str, Any]]:
    """The records of a log without TIMES."""
    path = run / name
    if not path.exists():
        return []
    records = [json.loads(line) for line in path.read_text().splitlines()]
    return [{k: v for k, v in record.items() if k not in TIMES} for record in records]


def checkpoints(run: Path) -> list[int]:
    return sorted(int(path.name.split("-")[1]) for path in run.glob("checkpoint-*"))


def bits(run: Path, step: int) -> dict[str, bytes]:
    """All files of a checkpoint that say something of the run."""
    folder = run / f"checkpoint-{step}"
    names = [name for name in read_marker(folder).files if name.endswith(".safetensors")]
    assert {name.split("/")[0] for name in names} >= {"model", "optimizer"}
    return {name: (folder / name).read_bytes() for name in names}


def state(run: Path, *folders: str) -> dict[str, Any]:
    """A trainer_state.json, in which nothing depends on where and when the run was."""
    found = record(run, *folders, "trainer_state.json")
    for entry in found["log_history"]:
        for name in TIMES & set(entry):
            del entry[name]
    return found


def record(run: Path, *names: str) -> dict[str, Any]:
    """A JSON file of a run, in which the run's place is RUN."""
    found: dict[str, Any] = json.loads(run.joinpath(*names).read_text().replace(str(run), "RUN"))
    return found


def plotted(run: Path) -> dict[str, list[tuple[int, float]]]:
    """(step, value) by name, as tensorboard shows them."""
    events = EventAccumulator(str(run / "runs"))
    events.Reload()
    return {
        name: [(event.step, event.value) for event in events.Scalars(name)]
        for name in events.Tags()["scalars"]
        if name.split("/")[1] not in TIMES and name != "eval/runtime"
    }


def tensors(run: Path, step: int) -> dict[str, Tensor]:
    """Weights and moments of a checkpoint, in whichever layout."""
    found = {}
    for part in ("model", "optimizer"):
        stored = ShardedTensors(run / f"checkpoint-{step}" / part)
        for name, info in stored.tensors.items():
            found[name] = stored.read(name, full_ranges(info.shape))
    return found


def exported(run: Path) -> dict[str, Tensor]:
    """What the run ends with, model or adapter."""
    files = sorted([*run.glob("model*.safetensors"), *run.glob("adapter_model.safetensors")])
    assert files
    return {name: tensor for path in files for name, tensor in load_file(path).items()}
