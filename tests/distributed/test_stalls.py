"""A rank that stops: the run ends in a report that names it. Prints how long that took (-s)."""

from __future__ import annotations

import os
import re
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from distributed.command import ROOT
from distributed.torchrun import TorchRun

from megatron_sdar.data.demo import make_demo_data

TIMEOUT = 4


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("stalls")
    make_demo_data(folder, 60)
    return folder


def start(demo: Path, output: Path, **options: Any) -> TorchRun:
    """Two ranks that share each layer."""
    config = {
        "model_name_or_path": str(demo / "model"), "train_from_scratch": True,
        "dataset": str(demo / "train.jsonl"), "cutoff_len": 256, "per_device_train_batch_size": 1,
        "max_steps": 100_000, "device": "cpu", "logging_steps": 1, "save_strategy": "no",
        "tensor_model_parallel_size": 2, "watchdog_timeout": TIMEOUT,
    }  # fmt: skip
    return TorchRun(2, config, output, **options)


@pytest.fixture
def runs(demo: Path) -> Iterator[list[TorchRun]]:
    started: list[TorchRun] = []
    yield started
    for run in started:
        run.kill()


def stacks(output: Path) -> dict[int, str]:
    (folder,) = output.glob("stalled-*")
    return {int(path.stem.split("-")[1]): path.read_text() for path in folder.iterdir()}


def test_a_sleeping_rank_is_named_with_its_phase(
    demo: Path, tmp_path: Path, runs: list[TorchRun]
) -> None:
    script = ROOT / "tests/distributed/sleepy_rank.py"
    environment = {"SLEEPY_RANK": "1", "SLEEPY_STEP": "3"}
    run = start(demo, tmp_path / "run", script=script, environment=environment)
    runs.append(run)
    run.wait_for("asleep")
    asleep = time.monotonic()
    run.wait_for("missing: ")
    print(f"named {time.monotonic() - asleep:.1f} s after it fell asleep, timeout {TIMEOUT} s")
    assert run.end() == 1
    assert re.search(
        r"missing: rank 1: \(pp 0, dp 0, tp 1; .*\) step 3, waiting for rows for \d+ s, "
        r"in no collective; last collective: gloo:",
        run.text,
    )
    written = stacks(tmp_path / "run")
    assert "in sleepy" in written[1]
    assert "forward of micro-batch 0" in written[0]
    assert re.search("waits_in: (?!None)", written[0]), "rank 0 waits in a collective"
    assert '"profiling_name"' in written[0]


def test_a_stopped_process_is_named(demo: Path, tmp_path: Path, runs: list[TorchRun]) -> None:
    run = start(demo, tmp_path / "run")
    runs.append(run)
    run.wait_for("step      2/")
    stopped = run.ranks()[1]
    os.kill(stopped, signal.SIGSTOP)
    at = time.monotonic()
    run.wait_for("missing: ")
    print(f"named {time.monotonic() - at:.1f} s after it was stopped, timeout {TIMEOUT} s")
    os.kill(stopped, signal.SIGCONT)
    assert run.end() == 1
    assert re.search(r"missing: rank 1 is silent for \d+ s: its process is stopped", run.text)
    assert 0 in stacks(tmp_path / "run")
