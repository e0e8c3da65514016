"""SIGKILL at random moments, to one rank or to the whole host: the run ends as if nothing had been.

Three kills by default, fifty under `make torture`; -s shows what each of them hit.
"""

from __future__ import annotations

import os
import random
import re
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
from distributed.test_restarts import log, settings, shards
from distributed.torchrun import TorchRun

from megatron_sdar.checkpoint.run_directory import (
    checkpoint_directories,
    complete_checkpoints,
    damaged_files,
    read_marker,
)
from megatron_sdar.data.demo import make_demo_data

RANKS = 2
SAVED = 3  # save_steps
PATIENCE = 300.0


@dataclass
class Tally:
    """What was killed, and in which moment by the last line that was said."""

    kills: list[str]
    resumed_after: list[float]
    unusable: int = 0


@pytest.mark.parametrize(
    ("kills", "steps"), [(3, 40), pytest.param(50, 500, marks=pytest.mark.torture)]
)
def test_killed_runs_end_like_others(tmp_path: Path, kills: int, steps: int) -> None:
    make_demo_data(tmp_path, 120)
    keys = settings(
        tmp_path, fp64=False, max_steps=steps, save_steps=SAVED, save_total_limit=4, eval_steps=10,
        job_id="of this test",
    )  # fmt: skip
    whole = TorchRun(RANKS, keys, tmp_path / "whole")
    assert whole.end(600) == 0, whole.text
    spread = [SAVED + 1 + int(0.8 * steps * number / kills) for number in range(kills)]
    tally = run_with_kills(keys, tmp_path / "killed", spread, random.Random(kills))
    print(f"{kills} kills: {tally.unusable} unusable checkpoints")
    for line in tally.kills:
        print("  ", line)
    seconds = sorted(tally.resumed_after)
    print(f"resumed after {seconds[0]:.1f} to {seconds[-1]:.1f} s")
    assert tally.unusable == 0
    assert shards(tmp_path / "killed", steps) == shards(tmp_path / "whole", steps)
    assert log(tmp_path / "killed") == log(tmp_path / "whole")


def run_with_kills(
    keys: dict[str, object], output: Path, steps: list[int], chance: random.Random
) -> Tally:
    """Kill a run so many times, every second time behind that step, then let it end."""
    tally = Tally([], [])
    victims = [number % (RANKS + 1) for number in range(len(steps))]
    chance.shuffle(victims)
    run, seen = start(keys, output), 0
    try:
        for number, victim in enumerate(victims):
            if number % 2:
                time.sleep(chance.uniform(0.5, 5.0))  # while it starts, as a rule
            else:
                wait_for_step(run, steps[number])
                time.sleep(chance.uniform(0.0, 2.0))
            assert run.process.poll() is None, f"over before all kills, or failed:\n{run.text}"
            ranks = run.ranks()
            last = run.text.rstrip().rpartition("\n")[2][:60]
            tally.kills.append(f"{'host' if victim == RANKS else f'rank {victim}'}: {last}")
            killed = time.monotonic()
            if victim == RANKS or victim not in ranks:  # between two starts there are no ranks
                run.kill()
                tally.unusable += unusable(output)
                run, seen = start(keys, output), 0
            else:
                os.kill(ranks[victim], signal.SIGKILL)
                wait_until_gone(run, set(ranks.values()))
                tally.unusable += unusable(output)
            if complete_checkpoints(output):
                seen += 1
                wait_for(run, "^resumed from", seen)
                tally.resumed_after.append(time.monotonic() - killed)
        assert run.end(600) == 0, run.text
    finally:
        run.kill()
    return tally


def start(keys: dict[str, object], output: Path) -> TorchRun:
    options = ("--standalone", "--max-restarts", "1000")
    return TorchRun(RANKS, keys, output, options, script=Path(__file__).with_name("slow_steps.py"))


def wait_until_gone(run: TorchRun, processes: set[int]) -> None:
    deadline = time.monotonic() + 60
    while processes & set(run.ranks().values()):
        assert time.monotonic() < deadline, run.text
        time.sleep(0.05)


def wait_for(run: TorchRun, pattern: str, number: int) -> None:
    """Until the run has said this so many times."""
    wait_until(run, lambda: len(re.findall(pattern, run.text, re.M)) >= number)


def wait_for_step(run: TorchRun, step: int) -> None:
    """Until the last step that the run has said is this one or a later one."""
    wait_until(run, lambda: int(re.findall(r"^step +(\d+)/|\A", run.text, re.M)[-1] or 0) >= step)


def wait_until(run: TorchRun, true: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE
    while not true():
        assert time.monotonic() < deadline, run.text
        assert run.process.poll() is None, run.text
        time.sleep(0.05)


def unusable(output: Path) -> int:
    """Checkpoints by name that are not complete or not what was saved; nobody writes now."""
    complete = complete_checkpoints(output)
    damaged = [path for path in complete if damaged_files(path, read_marker(path).files)]
    return len(checkpoint_directories(output)) - len(complete) + len(damaged)
