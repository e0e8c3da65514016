"""A rank that stops: the run ends in a report that names it. Prints how long that took (-s)."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from distributed.command import ROOT

from megatron_sdar.data.demo import make_demo_data

TIMEOUT = 4


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("stalls")
    make_demo_data(folder, 60)
    return folder


class Run:
    """torchrun with two ranks that share each layer, in the background."""

    def __init__(self, demo: Path, output: Path, script: Path, **environment: str) -> None:
        self.output = output
        arguments = {
            "model_name_or_path": demo / "model", "train_from_scratch": True,
            "dataset": demo / "train.jsonl", "cutoff_len": 256, "per_device_train_batch_size": 1,
            "max_steps": 100_000, "output_dir": output, "device": "cpu", "logging_steps": 1,
            "tensor_model_parallel_size": 2, "watchdog_timeout": TIMEOUT, "save_strategy": "no",
        }  # fmt: skip
        config = output.with_suffix(".yaml")
        config.write_text("".join(f"{name}: {value}\n" for name, value in arguments.items()))
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        self.process = subprocess.Popen(
            [*command, "--nproc_per_node", "2", str(script), str(config)],
            cwd=ROOT,
            env={
                **os.environ,
                "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'kernels'}",
                "OMP_NUM_THREADS": "1",
                **environment,
            },
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def wait_for(self, word: str) -> None:
        """Read the output up to a line with this word."""
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if word in line:
                return
        raise AssertionError(f"no {word!r}: {self.process.communicate()[1]}")

    def pid_of(self, rank: int) -> int:
        """The process of a rank, found among the children of torchrun."""
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children")
        for pid in children.read_text().split():
            if f"RANK={rank}\0" in Path(f"/proc/{pid}/environ").read_text().replace("LOCAL_", "X"):
                return int(pid)
        raise AssertionError(f"no process has RANK={rank}")

    def report(self) -> tuple[str, float]:
        """Standard error up to the report, and when it came."""
        assert self.process.stderr is not None
        lines = []
        for line in self.process.stderr:
            lines.append(line)
            if "missing: " in line:
                return "".join(lines), time.monotonic()
        raise AssertionError("no report:\n" + "".join(lines))

    def end(self) -> int:
        self.process.communicate(timeout=60)
        return self.process.returncode


@pytest.fixture
def runs(demo: Path, tmp_path: Path) -> Iterator[list[Run]]:
    started: list[Run] = []
    yield started
    for run in started:
        if run.process.poll() is None:
            run.process.kill()
            run.process.communicate()


def stacks(output: Path) -> dict[int, str]:
    (folder,) = output.glob("stalled-*")
    return {int(path.stem.split("-")[1]): path.read_text() for path in folder.iterdir()}


def test_a_sleeping_rank_is_named_with_its_phase(
    demo: Path, tmp_path: Path, runs: list[Run]
) -> None:
    script = ROOT / "tests/distributed/sleepy_rank.py"
    run = Run(demo, tmp_path / "run", script, SLEEPY_RANK="1", SLEEPY_STEP="3")
    runs.append(run)
    run.wait_for("asleep")
    asleep = time.monotonic()
    text, reported = run.report()
    print(f"named {reported - asleep:.1f} s after it fell asleep, timeout {TIMEOUT} s")
    assert run.end() == 1
    assert re.search(
        r"missing: rank 1: \(pp 0, dp 0, tp 1; .*\) step 3, waiting for rows for \d+ s, "
        r"in no collective; last collective: gloo:",
        text,
    )
    written = stacks(tmp_path / "run")
    assert "in sleepy" in written[1]
    assert "forward of micro-batch 0" in written[0]
    assert re.search("waits_in: (?!None)", written[0]), "rank 0 waits in a collective"
    assert '"profiling_name"' in written[0]


def test_a_stopped_process_is_named(demo: Path, tmp_path: Path, runs: list[Run]) -> None:
    run = Run(demo, tmp_path / "run", ROOT / "pretrain_sdar.py")
    runs.append(run)
    run.wait_for("step      2/")
    stopped = run.pid_of(1)
    os.kill(stopped, signal.SIGSTOP)
    at = time.monotonic()
    text, reported = run.report()
    os.kill(stopped, signal.SIGCONT)
    print(f"named {reported - at:.1f} s after it was stopped, timeout {TIMEOUT} s")
    assert run.end() == 1
    assert re.search(r"missing: rank 1 is silent for \d+ s: its process is stopped or gone", text)
    assert 0 in stacks(tmp_path / "run")
