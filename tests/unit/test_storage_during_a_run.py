"""Storage that fails under a run that is going on: named, and nothing goes into the void.

The fault happens behind a step of a real run in a forked process; torture does it to two ranks
under torchrun from outside.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from distributed.command import exit_codes
from unit.test_full_disk import disk, fill_up
from unit.test_full_disk_tools import refused, torture
from unit.test_run_lock import hold
from unit.tool_runs import run_tool
from unit.tool_workplace import Workplace

from megatron_sdar.training.output_files import LogFile, replace_json
from megatron_sdar.training.plot import plot_loss, read_log
from megatron_sdar.training.weight_check import WeightCheck

__all__ = ["disk"]

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def place(workplace: Workplace, tmp_path: Path) -> Workplace:
    copy = workplace.copy(tmp_path / "place")
    for path in copy.root.glob("tokens*"):  # cut below, which its hard links would feel
        path.write_bytes(copy.spoil(path.name, path.read_bytes()).read_bytes())
    return copy


@pytest.fixture
def behind_step(monkeypatch: pytest.MonkeyPatch) -> Callable[[int, Callable[[], Any]], None]:
    """Makes a fault happen once a step is done."""

    after_step = WeightCheck.after_step

    def arrange(number: int, fault: Callable[[], Any]) -> None:
        def faulty(check: WeightCheck, done: int) -> None:
            after_step(check, done)  # before anything of the step is logged
            if done == number:
                fault()

        monkeypatch.setattr(WeightCheck, "after_step", faulty)

    return arrange


def run_of(steps: int, save_steps: int, *more: str) -> list[str]:
    return ["run.yaml", "output_dir=new", f"max_steps={steps}", f"save_steps={save_steps}", *more]


@pytest.mark.parametrize(
    ("logged", "background"),
    [(True, True), *(torture(*pair) for pair in ((True, False), (False, True), (False, False)))],
)
def test_output_dir_goes_away(
    place: Workplace, behind_step: Callable, logged: bool, background: bool
) -> None:
    """Renamed; the next log line notices, or else the next save."""

    def move() -> None:
        while not (place.root / "new/checkpoint-2/COMMITTED").exists():
            time.sleep(0.01)  # the save of step 2 may go on in the background
        (place.root / "new").rename(place.root / "moved")

    behind_step(3, move)
    more = (f"logging_steps={1 if logged else 10}", f"async_save={str(background).lower()}")
    outcome = run_tool("pretrain", run_of(6, 2, *more), place.root)
    refused(outcome, "new", "gone, removed or renamed while", "start again", "newest")
    assert not (place.root / "new").exists(), "not begun anew"
    (place.root / "moved").rename(place.root / "new")
    behind_step(0, move)
    again = run_tool("pretrain", run_of(4, 2, "logging_steps=1"), place.root)
    assert again.code == 0, again.text
    assert "checkpoint-2: step 2" in again.stdout
    assert [record["step"] for record in read_log(place.root / "new/trainer_log.jsonl")][-1] == 4


def test_another_run_writes_there(place: Workplace) -> None:
    """It neither resumes nor forgets, moves or logs anything of the other's."""
    assert run_tool("pretrain", run_of(2, 2), place.root).code == 0
    log = (place.root / "new/trainer_log.jsonl").read_bytes()
    again = run_of(4, 2, "overwrite_output_dir=true")
    with hold(place.root / "new") as other:
        outcome = run_tool("pretrain", again, place.root)
        refused(outcome, "another run writes into new", f"process {other.pid} on", "wait until")
        other.kill()
    assert (place.root / "new/trainer_log.jsonl").read_bytes() == log
    assert run_tool("pretrain", again, place.root).code == 0


def test_the_log_alone_goes_away(place: Workplace, behind_step: Callable) -> None:
    behind_step(3, lambda: (place.root / "new/trainer_log.jsonl").unlink())
    outcome = run_tool("pretrain", run_of(6, 2), place.root)
    assert outcome.code == 0, outcome.text
    assert "trainer_log.jsonl: was removed or replaced; a new one is begun" in outcome.stdout
    steps = [record["step"] for record in read_log(place.root / "new/trainer_log.jsonl")]
    assert steps == [3, 4, 5, 6]


@pytest.mark.parametrize(
    ("suffix", "workers"),
    [
        ("bin", 0),
        ("idx", 1),
        *(
            torture(*pair)
            for pair in (("bin", 1), ("idx", 0), ("labels.bin", 0), ("labels.idx", 0))
        ),
    ],
)
def test_token_files_are_cut_short(
    place: Workplace, behind_step: Callable, suffix: str, workers: int
) -> None:
    """A page of a memory map that is gone would end the process by SIGBUS, without a word."""
    path = place.root / f"tokens.{suffix}"
    behind_step(1, lambda: os.truncate(path, 0))
    arguments = run_of(60, 60, f"dataloader_num_workers={workers}")
    outcome = run_tool("pretrain", arguments, place.root)
    refused(outcome, str(path.name), "cut short while it was in use")


@pytest.mark.torture
def test_token_files_that_are_removed_are_read_to_the_end(
    place: Workplace, behind_step: Callable
) -> None:
    def remove() -> None:
        for path in place.root.glob("tokens*"):
            path.unlink()

    behind_step(1, remove)
    outcome = run_tool("pretrain", run_of(30, 30), place.root)
    assert outcome.code == 0, outcome.text


@pytest.mark.parametrize("what", [torture("log"), "save"])
def test_the_disk_fills_up(place: Workplace, disk: Path, behind_step: Callable, what: str) -> None:
    (place.root / "new").symlink_to(disk)
    subprocess.run(["mount", "-o", "remount,size=60m", str(disk)], check=True)
    behind_step(3, lambda: fill_up(disk, 0))
    # Log lines fit into what the last page of the log has left, for a while.
    steps, words = {
        "log": (60, ("new/trainer_log.jsonl", "No space left", "make room")),
        "save": (4, ("cannot save new/checkpoint-4", "No space left", "start again")),
    }[what]
    arguments = run_of(steps, max(2, steps - 2), "async_save=false", "overwrite_output_dir=false")
    refused(run_tool("pretrain", arguments, place.root), *words)
    before = read_log(disk / "trainer_log.jsonl")
    assert [record["step"] for record in before] == list(range(1, len(before) + 1))
    (disk / "ballast").unlink()
    behind_step(0, print)
    again = run_tool("pretrain", arguments, place.root)
    assert again.code == 0, again.text
    assert ("checkpoint-2: step 2" in again.stdout) == (what == "save")
    logged = [record["step"] for record in read_log(disk / "trainer_log.jsonl")]
    assert logged == list(range(1, steps + 1)), "no line twice, none torn"


# The parts.


def test_log_and_results_on_a_full_disk(disk: Path) -> None:
    log = LogFile(disk / "trainer_log.jsonl", print)
    log.append({"step": 1, "loss": 1.0})
    replace_json(disk / "all_results.json", {"a": 1})
    ballast = fill_up(disk, 0)
    long = {"step": 2, "loss": 1.0, "text": "x" * 5000}
    for write in (
        lambda: log.append(long),
        lambda: replace_json(disk / "all_results.json", long),
        lambda: plot_loss(disk / "trainer_log.jsonl", disk / "loss.png"),
    ):
        with pytest.raises(ValueError, match=rf"{disk}/.*No space left.*make room"):
            write()
    ballast.unlink()
    assert [record["step"] for record in read_log(disk / "trainer_log.jsonl")] == [1]
    assert json.loads((disk / "all_results.json").read_text()) == {"a": 1}
    assert sorted(path.name for path in disk.iterdir()) >= ["all_results.json"]
    assert not list(disk.glob("*.tmp"))


@pytest.mark.torture
@pytest.mark.parametrize("fault", ["cut", "gone"])
def test_two_ranks(place: Workplace, fault: str) -> None:
    """From outside, while both run: one message, exit code 1 on every rank."""
    environment = {
        **os.environ,
        "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'kernels'}",
        "OMP_NUM_THREADS": "1",
    }
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    arguments = ["--nproc_per_node", "2", str(ROOT / "pretrain_sdar.py"),
                 *run_of(100_000, 100_000)]  # fmt: skip
    with (place.root / "out.txt").open("w") as out, (place.root / "err.txt").open("w") as err:
        run = subprocess.Popen(
            [*launcher, *arguments], cwd=place.root, env=environment, stdout=out, stderr=err
        )
    until = time.monotonic() + 100
    while "step      3/" not in (place.root / "out.txt").read_text() and time.monotonic() < until:
        assert run.poll() is None, (place.root / "err.txt").read_text()
        time.sleep(0.1)
    if fault == "cut":
        os.truncate(place.root / "tokens.bin", 100)
    else:
        shutil.move(place.root / "new", place.root / "moved")
    assert run.wait(timeout=120) == 1
    said = (place.root / "err.txt").read_text()
    words = "cut short while it was in use" if fault == "cut" else "is gone, removed or renamed"
    assert re.search(rf"error: .*{words}", said), said[-3000:]
    assert "Traceback" not in said.partition("error: ")[0], said[-3000:]
    # Only rank 0 writes the log: it waits a while for the other, which torchrun then ends.
    assert exit_codes(said) <= ({1} if fault == "cut" else {1, -15})
