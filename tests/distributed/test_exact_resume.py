"""A run that is killed after any of its steps ends as if nothing had happened.

Everything that a run leaves is compared with what the uninterrupted run left: weights, moments,
exports, logs, evaluations and answers, trainer_state.json, what is best, records of skipped steps,
tensorboard. Bit for bit in the same layout, to 1e-9 in fp64 in others.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from distributed.resumed_runs import (
    KilledError,
    bits,
    checkpoints,
    exported,
    lines,
    make_folder,
    plotted,
    record,
    state,
    tensors,
    train,
    write,
)
from distributed.skipped_runs import Faults
from distributed.world import run_world

from megatron_sdar.training.run import TrainingRun
from megatron_sdar.training.trainer_state import restore_log

pytestmark = pytest.mark.usefixtures("single_process")


@dataclass(frozen=True)
class Case:
    """A run.

    Attributes:
        keys: of its configuration.
        last: its last step.
        faults: of its steps.
    """

    keys: Mapping[str, Any]
    last: int = 8
    faults: Faults | None = None


CASES = {
    # Every kind of noise and schedule at once, beside frozen weights and with dropout.
    "lora_blend": Case(
        {
            "dataset": "arithmetic,arithmetic_test", "mix_strategy": "blend",
            "blend_weights": "0.7,0.3; 0.4,0.6 @4", "block_length_schedule": "4; 8 @3; 16 @6",
            "noise_level_per": "block", "noise_sampling": "stratified", "noisy_views": 2,
            "complementary_views": True, "finetuning_type": "lora", "lora_rank": 2,
            "lora_dropout": 0.2, "train_from_scratch": False, "val_size": 0,
            "eval_dataset": "arithmetic_test", "eval_max_documents": 3,
        },
    ),
    # Several epochs packed anew, rows built by processes, steps that are skipped.
    "skipping_epochs": Case(
        {
            "per_device_train_batch_size": 2, "dataloader_num_workers": 2, "cutoff_len": 128,
            "preset": "recommended", "eval_generate_samples": 2, "eval_generate_max_new_tokens": 4,
            "save_total_limit": 3, "load_best_model_at_end": True, "eval_steps": 1,
        },
        faults=Faults(poisoned={2: 0, 5: 0}),
    ),
    # The learning rate ruins the model: training stops early, the best checkpoint is exported.
    "stopping_early": Case(
        {
            "learning_rate": 0.3, "lr_scheduler_type": "constant", "warmup_steps": 0,
            "max_steps": 40, "early_stopping_steps": 3, "load_best_model_at_end": True,
            "eval_steps": 1, "save_total_limit": 2, "async_save": False,
        },
        last=5,
    ),
    "published": Case(
        {
            "preset": "paper", "max_steps": -1, "num_train_epochs": 0.75, "save_total_limit": 1,
            "cutoff_len": 128, "lr_scheduler_type": "cosine", "save_steps": 0.1, "eval_steps": 0.3,
        },
    ),
}  # fmt: skip


def arguments(folder: Path, case: str, name: str, **changes: Any) -> list[str]:
    keys = dict(CASES[case].keys)
    if "finetuning_type" in keys:
        keys["model_name_or_path"] = str(folder / "base")
    return write(folder, name, **(keys | changes))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, single_process: None) -> Path:
    folder = make_folder(tmp_path_factory.mktemp("resume"))
    train(write(folder, "base", max_steps=1, eval_strategy="no", val_size=0))
    return folder


@pytest.fixture(scope="module")
def whole(folder: Path, request: pytest.FixtureRequest) -> str:
    """The case whose uninterrupted run is there."""
    case: str = request.param
    train(arguments(folder, case, case), CASES[case].faults)
    return case


def assert_same_run(found: Path, expected: Path, last: int) -> None:
    """All that two runs of one layout leave is the same, but for the time it took."""
    assert checkpoints(found) == checkpoints(expected)
    assert checkpoints(expected)[-1] == last
    for step in checkpoints(expected):
        assert bits(found, step) == bits(expected, step), step
        folder = f"checkpoint-{step}"
        assert state(found, folder) == state(expected, folder), step
    assert state(found) == state(expected)
    weights = exported(expected)
    assert exported(found).keys() == weights.keys()
    assert all(torch.equal(tensor, weights[name]) for name, tensor in exported(found).items())
    for name in ("trainer_log.jsonl", "eval_samples.jsonl"):
        assert lines(found, name) == lines(expected, name)
    logged = [line["step"] for line in lines(found) if "loss" in line]
    assert len(set(logged)) == len(logged), "no step is logged twice"
    assert plotted(found) == plotted(expected)
    results = [record(run, "eval_results.json") for run in (found, expected)]
    for each in results:
        each.pop("eval_runtime")
    assert results[0] == results[1]
    skipped = [
        sorted(path.name for path in run.glob("skipped_steps/*")) for run in (found, expected)
    ]
    assert skipped[0] == skipped[1]
    for name in skipped[0]:
        assert record(found, "skipped_steps", name) == record(expected, "skipped_steps", name)


# `make test` has no time for all.
NAMES = [
    pytest.param(name, marks=[pytest.mark.torture] if name == "published" else []) for name in CASES
]


@pytest.mark.parametrize("whole", NAMES, indirect=True)
def test_killed_after_every_step_it_ends_like_the_whole_run(folder: Path, whole: str) -> None:
    """A start for each step: it does the step again that was lost, and loses the next."""
    case, name = CASES[whole], f"{whole}-killed"
    told = arguments(folder, whole, name)
    for step in range(2, case.last + 1):
        train(told, case.faults, killed_at=step)
        assert checkpoints(folder / name)[-1] == step - 1
    train(told, case.faults)
    assert_same_run(folder / name, folder / whole, case.last)


@pytest.mark.torture
@pytest.mark.parametrize(
    ("whole", "step"),
    [(name, step) for name, case in CASES.items() for step in range(1, case.last)],
    indirect=["whole"],
)
def test_killed_once_it_ends_like_the_whole_run(folder: Path, whole: str, step: int) -> None:
    case, name = CASES[whole], f"{whole}-{step}"
    told = arguments(folder, whole, name)
    train(told, case.faults, killed_at=step + 1)
    train(told, case.faults)
    assert_same_run(folder / name, folder / whole, case.last)


def test_killed_behind_its_last_save_it_still_leaves_what_it_should(folder: Path) -> None:
    """The same command has nothing left to train: it exports, and the run's state is there."""
    whole, name = folder / "last", "last-killed"
    keys = {"max_steps": 2, "report_to": "none"}
    train(write(folder, "last", **keys))
    told = write(folder, name, **keys)
    ends = mock.patch.object(TrainingRun, "_write_results", side_effect=KilledError)
    with ends, pytest.raises(KilledError):
        train(told)
    assert not (folder / name / "trainer_state.json").exists()
    train(told)
    assert state(folder / name) == state(whole)
    assert exported(folder / name).keys() == exported(whole).keys()
    before = state(folder / name)
    train([*told, "overwrite_output_dir=false"])
    assert state(folder / name) == before
    first = folder / name / "checkpoint-1"
    train([*told, f"resume_from_checkpoint={first}", "max_steps=1"])
    shorter = state(folder / name)
    assert {entry["step"] for entry in shorter["log_history"]} == {shorter["global_step"]} == {1}


def test_elsewhere_the_log_has_all_that_the_checkpoint_knows(folder: Path) -> None:
    """A run that goes on from another directory's checkpoint: no step is missing in its log."""
    keys = {"max_steps": 5, "report_to": "none", "eval_on_start": True, "logging_steps": 1}
    train(write(folder, "here", **keys))
    source = folder / "here" / "checkpoint-3"
    train(write(folder, "there", **keys, resume_from_checkpoint=str(source)))
    found, expected = lines(folder / "there"), lines(folder / "here")
    kept = ("step", "epoch", "loss", "grad_norm", "lr")
    for ours, theirs in zip(found, expected, strict=True):
        same = {k: v for k, v in theirs.items() if k in kept or k.startswith("eval_")}
        assert {k: v for k, v in ours.items() if k in same} == same
    assert found[-3:] == expected[-3:], "steps that were done there have the whole line"
    assert state(folder / "there")["log_history"] == state(folder / "here")["log_history"]


def test_a_log_that_lost_its_end_gets_it_back(tmp_path: Path) -> None:
    path = tmp_path / "trainer_log.jsonl"
    history = [
        {"epoch": 0.0, "step": 0, "eval_loss": 3.0},
        {"loss": 2.0, "grad_norm": 1.0, "learning_rate": 0.1, "epoch": 0.5, "step": 1},
        {"epoch": 0.5, "step": 1, "eval_loss": 2.5},
        {"learning_rate": 0.2, "epoch": 1.0, "step": 2},
    ]
    first = {"step": 0, "epoch": 0.0, "eval_loss": 3.0, "eval_runtime": 7.0}
    trained = {"step": 1, "loss": 2.0, "grad_norm": 1.0, "lr": 0.1, "epoch": 0.5}
    later = {"step": 3, "loss": 1.0, "lr": 0.3, "epoch": 1.5}
    path.write_text("".join(json.dumps(line) + "\n" for line in (first, later)) + '{"step": 4')
    restore_log(path, {"log_history": history})
    assert lines(tmp_path) == [
        {"step": 0, "epoch": 0.0, "eval_loss": 3.0}, trained,
        {"step": 1, "epoch": 0.5, "eval_loss": 2.5}, {"step": 2, "lr": 0.2, "epoch": 1.0}, later,
    ]  # fmt: skip
    whole = path.read_bytes()
    assert b"eval_runtime" in whole, "lines that are there stay as they are"
    restore_log(path, {"log_history": history})
    restore_log(path, {})
    assert path.read_bytes() == whole


# In the order in which a run moves through them; each is killed at a step and the next goes on.
MOVES: list[tuple[dict[str, Any], int | None]] = [
    ({"gradient_accumulation_steps": 1, "data_parallel_sharding_strategy": "optim_grads"}, 3),
    ({"tensor_model_parallel_size": 2, "sequence_parallel": True}, 5),
    ({"pipeline_model_parallel_size": 2}, 7),
    ({"gradient_accumulation_steps": 1, "data_parallel_sharding_strategy": "no_shard"}, None),
]
MOVED = ["lora_blend", pytest.param("skipping_epochs", marks=pytest.mark.torture)]


@pytest.fixture(scope="module")
def moved(folder: Path, request: pytest.FixtureRequest) -> str:
    """A case in float64: one process from begin to end, and two that move through layouts."""
    case: str = request.param
    exact = {"fp64": True, "report_to": "none", "dataloader_num_workers": 0}
    faults = CASES[case].faults
    train(arguments(folder, case, f"{case}-fp64", **exact), faults)
    jobs: list[Any] = []
    for number, (layout, killed_at) in enumerate(MOVES):
        told = arguments(folder, case, f"{case}-moved", **exact, **layout)
        own = folder / f"{case}-moved-{number}.yaml"
        Path(told[0]).rename(own)
        jobs.append((train, ([str(own)], faults, killed_at)))
    run_world(2, jobs, folder / f"world-{case}")
    return case


def near(value: Any) -> Any:
    """To 1e-9 where it is a number, whatever it is in."""
    if isinstance(value, dict):
        return {key: near(each) for key, each in value.items()}
    if isinstance(value, list):
        return [near(each) for each in value]
    return pytest.approx(value, rel=1e-9, abs=1e-12) if isinstance(value, float) else value


@pytest.mark.parametrize("moved", MOVED, indirect=True)
def test_moved_through_layouts_it_ends_like_the_whole_run(folder: Path, moved: str) -> None:
    found, expected, last = folder / f"{moved}-moved", folder / f"{moved}-fp64", CASES[moved].last
    assert checkpoints(found) == checkpoints(expected)
    weights = tensors(expected, last)
    assert tensors(found, last).keys() == weights.keys()
    for name, tensor in tensors(found, last).items():
        scale = float(weights[name].abs().max())
        assert float((tensor - weights[name]).abs().max()) <= 1e-9 * scale, name
    for name in ("trainer_log.jsonl", "eval_samples.jsonl"):
        assert lines(found, name) == near(lines(expected, name))
    states = [state(run, f"checkpoint-{last}") for run in (found, expected)]
    assert states[0] == near(states[1])
    assert len(lines(found)) > last / 2
