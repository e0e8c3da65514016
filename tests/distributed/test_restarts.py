"""Runs that are killed or asked to stop, as torchrun and schedulers do it. -s shows times."""

from __future__ import annotations

import json
import os
import shutil
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from distributed.torchrun import TorchRun

from megatron_sdar.checkpoint.run_directory import complete_checkpoints, damaged_files, read_marker
from megatron_sdar.data.demo import make_demo_data

STEPS = 14


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The data, and `whole`: a run of two data-parallel ranks that nobody disturbs."""
    folder = tmp_path_factory.mktemp("restarts")
    make_demo_data(folder, 120)
    run = TorchRun(2, settings(folder), folder / "whole")
    assert run.end() == 0, run.text
    return folder


def settings(folder: Path, **changes: object) -> dict[str, object]:
    return {
        "model_name_or_path": str(folder / "model"), "train_from_scratch": True,
        "dataset": str(folder / "train.jsonl"), "cutoff_len": 128, "fp64": True,
        "tokenized_path": str(folder / "tokens"), "val_size": 12, "eval_strategy": "steps",
        "eval_steps": 4, "eval_noise_levels": 2, "per_device_train_batch_size": 1,
        "global_batch_size": 4, "max_steps": STEPS, "save_steps": 2, "logging_steps": 1,
        "overwrite_output_dir": True, "export_hf": False, "device": "cpu", "report_mfu": False,
        "learning_rate": 1e-3, "async_save": True, "preprocessing_num_workers": 1,
    } | changes  # fmt: skip


@pytest.fixture
def started() -> Iterator[list[TorchRun]]:
    runs: list[TorchRun] = []
    yield runs
    for run in runs:
        run.kill()


def log(output: Path) -> list[dict[str, Any]]:
    """The records of a run's log without its times."""
    kept = ("step", "loss", "grad_norm", "lr", "epoch", "eval_loss", "eval_accuracy")
    lines = (output / "trainer_log.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k in kept} for line in lines]


def shards(output: Path, step: int) -> dict[str, bytes]:
    """Weights and moments as they lie on disk, bit for bit."""
    checkpoint = output / f"checkpoint-{step}"
    return {
        name: (checkpoint / name).read_bytes()
        for name in read_marker(checkpoint).files
        if name.endswith(".safetensors")
    }


def assert_like_whole(folder: Path, output: Path) -> None:
    assert shards(output, STEPS) == shards(folder / "whole", STEPS)
    assert log(output) == log(folder / "whole")
    ours, theirs = (
        json.loads((run / f"checkpoint-{STEPS}/trainer_state.json").read_text())
        for run in (output, folder / "whole")
    )
    assert ours["stateful_callbacks"] == theirs["stateful_callbacks"]


def test_a_killed_rank_goes_on_from_what_this_run_saved(
    folder: Path, started: list[TorchRun]
) -> None:
    output = folder / "killed"
    shutil.copytree(folder / "whole", output)  # an earlier run's, further on than this one
    run = TorchRun(2, settings(folder), output, ("--standalone", "--max-restarts", "2"))
    started.append(run)
    run.wait_for(r"saved \S+/checkpoint-4 ")
    os.kill(run.ranks()[1], signal.SIGKILL)
    killed = time.monotonic()
    run.wait_for(rf"resumed from {output}/checkpoint-(4|6|8)")
    resumed = time.monotonic()
    print(f"resumed {resumed - killed:.1f} s after a rank was killed")
    assert run.end() == 0, run.text
    assert_like_whole(folder, output)
    for path in complete_checkpoints(output):
        assert damaged_files(path, read_marker(path).files) == []


def test_a_signal_saves_and_fewer_ranks_go_on(folder: Path, started: list[TorchRun]) -> None:
    """Rank 1 and all loader workers get it, rank 0 does not; then one rank takes all rows."""
    output = folder / "asked"
    keys = settings(folder, dataloader_num_workers=1, job_id="17", save_steps=100)
    run = TorchRun(2, keys, output, script=Path(__file__).with_name("slow_steps.py"))
    started.append(run)
    run.wait_for(r"step +5/")
    asked = time.monotonic()
    for pid in set(run.descendants()) - {run.ranks()[0]}:
        os.kill(pid, signal.SIGUSR1)
    assert run.end() == 0, run.text
    print(f"left {time.monotonic() - asked:.1f} s after the signal")
    step = int(run.wait_for(r"asked to stop \(SIGUSR1 to rank 1\): after step (\d+)")[1])
    assert 5 <= step < 8, "not only when step 8 is evaluated"
    assert complete_checkpoints(output) == [output / f"checkpoint-{step}"]
    assert "a start with the same job_id (17) goes on from there" in run.text
    again = TorchRun(1, keys, output)
    assert again.end() == 0, again.text
    assert f"resumed from {output}/checkpoint-{step}: step {step}" in again.text
    assert "gradient_accumulation_steps" not in again.text
    ours, whole = log(output), log(folder / "whole")
    assert [record["step"] for record in ours] == [record["step"] for record in whole]
    for mine, theirs in zip(ours, whole, strict=True):
        assert mine == pytest.approx(theirs, rel=1e-9)


def test_a_signal_in_an_evaluation_repeats_it_after_the_restart(
    folder: Path, started: list[TorchRun]
) -> None:
    output = folder / "in-evaluation"
    keys = settings(folder, overwrite_output_dir=False)
    script = Path(__file__).with_name("slow_evaluation.py")
    run = TorchRun(2, keys, output, script=script)
    started.append(run)
    run.wait_for("evaluating")
    os.kill(run.ranks()[1], signal.SIGTERM)
    assert run.end() == 0, run.text
    assert "asked to stop (SIGTERM to rank 1): after step 4" in run.text
    assert "the same command goes on from there" in run.text
    assert [record["step"] for record in log(output) if "eval_loss" in record] == []
    again = TorchRun(2, keys, output)
    assert again.end() == 0, again.text
    assert_like_whole(folder, output)


def test_torchrun_passes_sigterm_on(folder: Path, started: list[TorchRun]) -> None:
    output = folder / "terminated"
    run = TorchRun(2, settings(folder, max_steps=10_000, save_strategy="no"), output)
    started.append(run)
    run.wait_for(r"step +2/")
    os.kill(run.process.pid, signal.SIGTERM)
    run.end()
    step = int(run.wait_for(r"stopped after step (\d+) of 10000")[1])
    assert complete_checkpoints(output) == [output / f"checkpoint-{step}"]
