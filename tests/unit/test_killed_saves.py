"""SIGKILL at random moments of saves: whatever looks complete is whole, and nothing piles up."""

from __future__ import annotations

import os
import random
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from unit.killed_saver import LIMIT
from unit.tiny_hf import local_weights, make_optimizer, make_stages, write_model

from megatron_sdar.checkpoint.native import load_checkpoint
from megatron_sdar.checkpoint.run_directory import (
    checkpoint_directories,
    complete_checkpoints,
    damaged_files,
    latest_checkpoint,
    read_marker,
)

pytestmark = pytest.mark.usefixtures("single_process")

TRIALS = 20
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def saver(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    write_model(tmp_path / "model")
    (tmp_path / "run").mkdir()
    paths = [str(ROOT), str(ROOT / "kernels"), str(ROOT / "tests")]
    process = subprocess.Popen(
        [sys.executable, "-m", "unit.killed_saver", str(tmp_path / "model"), str(tmp_path / "run")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"},
    )
    with process:
        yield process
        assert process.stdin is not None
        process.stdin.close()
        assert process.wait(60) == 0


def ask(saver: subprocess.Popen[str], line: str) -> float:
    assert saver.stdin is not None
    assert saver.stdout is not None
    saver.stdin.write(line + "\n")
    saver.stdin.flush()
    return float(saver.stdout.readline())


def leftovers(run: Path) -> set[str]:
    return {path.name for path in run.iterdir()} - {p.name for p in checkpoint_directories(run)}


def check_everything(run: Path, model_dir: Path) -> None:
    """What is called checkpoint-N is complete, undamaged, and holds step N and nothing else."""
    assert checkpoint_directories(run) == sorted(complete_checkpoints(run))
    for path in complete_checkpoints(run):
        assert damaged_files(path, read_marker(path).files) == []
        stages, _, _ = make_stages(model_dir)
        optimizer = make_optimizer(stages)
        state = load_checkpoint(path, stages, optimizer)
        number = state["number"]
        assert path.name == f"checkpoint-{number}"
        assert all((tensor == number).all() for tensor in local_weights(stages).values())
        assert all((m._local_tensor == number).all() for m in optimizer.moments().values())


def test_killed_at_random_points(saver: subprocess.Popen[str], tmp_path: Path) -> None:
    run, model_dir = tmp_path / "run", tmp_path / "model"
    one_save = ask(saver, "first")
    assert latest_checkpoint(run) == run / "checkpoint-1"
    dice, hit, newest = random.Random(), [], 1
    for _ in range(TRIALS):
        ask(saver, f"{dice.uniform(0, 4 * one_save):.4f}")
        hit.append(leftovers(run))
        check_everything(run, model_dir)
        latest = latest_checkpoint(run)
        assert latest is not None
        number = int(latest.name.rpartition("-")[2])
        assert number >= newest, "a committed checkpoint was lost"
        newest = number
    in_saves = sum(any(name.endswith(".tmp") for name in names) for names in hit)
    assert in_saves >= TRIALS // 4, f"the kills missed the saves: {hit}"
    ask(saver, "first")
    assert leftovers(run) == set(), "the next save cleans up"
    check_everything(run, model_dir)
    assert len(complete_checkpoints(run)) == LIMIT
