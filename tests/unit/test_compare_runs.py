"""Comparing runs by their logs: means, errors and differences on logs whose figures are known."""

from __future__ import annotations

import json
import math
import subprocess
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from distributed.command import run_python

from megatron_sdar.training.run_comparison import (
    RunLosses,
    compare_runs,
    plot_comparison,
    read_losses,
    running_mean,
)

ROOT = Path(__file__).resolve().parents[2]


def _run(folder: Path, losses: Sequence[float], every: int = 1) -> Path:
    folder.mkdir()
    records = [{"step": every * (i + 1), "loss": loss} for i, loss in enumerate(losses)]
    text = "".join(json.dumps(record) + "\n" for record in records)
    (folder / "trainer_log.jsonl").write_text(text, encoding="utf-8")
    return folder


def test_means_errors_and_differences(tmp_path: Path) -> None:
    # The first two losses lie before the last four steps and must not count.
    one = read_losses(_run(tmp_path / "one", [90, 80, 1, 3, 1, 3]))
    two = read_losses(_run(tmp_path / "two", [70, 60, 4, 8, 8, 4]))
    first, second = compare_runs([one, two], last=4)
    assert (first.name, first.mean, first.difference) == ("one", 2.0, 0.0)
    assert math.isnan(first.errors_apart)
    # Squared deviations: four times 1, four times 4, over 3, over 4.
    assert first.error == pytest.approx(math.sqrt(1 / 3))
    assert second.error == pytest.approx(math.sqrt(4 / 3))
    assert (second.mean, second.difference) == (6.0, 4.0)
    assert second.difference_error == pytest.approx(math.sqrt(5 / 3))
    assert second.errors_apart == pytest.approx(4 / math.sqrt(5 / 3))


def test_only_steps_that_all_runs_have_are_compared(tmp_path: Path) -> None:
    long = read_losses(_run(tmp_path / "long", [5, 1, 3, 100, 100]))
    short = read_losses(_run(tmp_path / "short", [5, 2, 4]))
    compared = compare_runs([long, short], last=2)
    assert [each.mean for each in compared] == [2.0, 3.0]
    assert [each.last_step for each in compared] == [5, 3]
    assert {(each.first_compared, each.last_compared) for each in compared} == {(2, 3)}


def test_last_counts_steps_not_records(tmp_path: Path) -> None:
    run = read_losses(_run(tmp_path / "run", [9, 9, 1, 3], every=10))
    assert compare_runs([run], last=20)[0].mean == 2.0


def test_a_difference_of_noise_alone_is_within_its_error() -> None:
    rng = np.random.default_rng(0)
    steps = np.arange(1, 101)
    apart = []
    for _ in range(300):
        pair = [RunLosses("run", steps, rng.normal(3, 1, size=100)) for _ in range(2)]
        apart.append(compare_runs(pair, last=100)[1].errors_apart)
    assert np.std(apart) == pytest.approx(1.0, abs=0.15)


def test_running_means_stand_at_their_middle() -> None:
    run = RunLosses("run", np.arange(1, 8), np.arange(7, dtype=np.float64) ** 2)
    steps, means = running_mean(run, 3)
    assert steps.tolist() == [2, 3, 4, 5, 6]
    assert means == pytest.approx([(i**2 + (i + 1) ** 2 + (i + 2) ** 2) / 3 for i in range(5)])
    assert [part.size for part in running_mean(run, 8)] == [0, 0]


def test_the_plot_is_small(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    runs = [
        RunLosses(name, np.arange(1, 301), rng.normal(3, 1, size=300)) for name in ("a", "b", "c")
    ]
    plot_comparison(runs, 20, tmp_path / "runs.png")
    image = (tmp_path / "runs.png").read_bytes()
    assert image.startswith(b"\x89PNG")
    assert len(image) < 60_000


def test_the_tool_prints_the_table(tmp_path: Path) -> None:
    one, two = _run(tmp_path / "one", [1, 3]), _run(tmp_path / "two", [5, 7])
    done = _tool(str(one), str(two), "--last", "2", "--plot", str(tmp_path / "runs.png"))
    assert done.returncode == 0, done.stderr
    for words in ("one", "two", "steps 1-2", "2.0000 +- 1.0000", "+4.0000 +- 1.4142", "+2.83"):
        assert words in done.stdout
    assert (tmp_path / "runs.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "trainer_log.jsonl is missing: give the output_dir of a run"),
        ("", "trainer_log.jsonl holds no logged step: train further"),
        ('{"step": 1, "loss": 2}\n{"step": 2}\n', "trainer_log.jsonl:2: a record needs step and"),
        ("[1]\n", "trainer_log.jsonl:1: not a log record"),
        ("nonsense\n", "trainer_log.jsonl:1: not a log record"),
        ('{"step": 1, "loss": 2}\n', "run has 1 logged losses in steps 1 to 1"),
    ],
)
def test_logs_that_cannot_be_compared(tmp_path: Path, text: str | None, message: str) -> None:
    run = tmp_path / "run"
    run.mkdir()
    if text is not None:
        (run / "trainer_log.jsonl").write_text(text, encoding="utf-8")
    with pytest.raises(ValueError) as error:
        compare_runs([read_losses(run)], last=100)
    assert message in str(error.value)


def test_errors_end_the_tool_with_one_line(tmp_path: Path) -> None:
    done = _tool(str(tmp_path))
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith(f"error: {tmp_path}/trainer_log.jsonl is missing")
    assert _tool(str(tmp_path), "--window", "0").stderr == "error: --window must be at least 1\n"


def _tool(*arguments: str) -> subprocess.CompletedProcess[str]:
    return run_python(["tools/compare_runs.py", *arguments])
