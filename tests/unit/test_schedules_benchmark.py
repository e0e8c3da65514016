"""The schedules benchmark: its estimator on known gradients, and a run at toy size."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from distributed.command import run_python

from megatron_sdar.benchmark.schedules import compared_schedules, measured_figures

ROOT = Path(__file__).resolve().parents[2]


def test_figures_of_known_draws() -> None:
    """Variance, signal and FLOPs of two schedules over draws that do not vary."""
    table = np.tile([8.0, 2.0, 10.0, 3.0, 1.5, 20.0], (5, 1))
    first, second = measured_figures(table, ["one", "two"])
    assert (first.relative_noise, first.relative_flops, first.efficiency) == (1.0, 1.0, 1.0)
    assert second.schedule == "two"
    assert (second.variance, second.signal) == (3.0, 1.5)
    assert second.relative_noise == pytest.approx(0.5)
    assert second.efficiency == pytest.approx(1.0), "half the noise at twice the work"
    assert second.efficiency_error == pytest.approx(0.0)


def test_the_tool_measures_every_schedule(tmp_path: Path) -> None:
    command = ["tools/benchmark.py", "schedules", "--quick", "--draws", "3",
               "--json", str(tmp_path / "figures.json")]  # fmt: skip
    done = run_python(command)
    assert done.returncode == 0, done.stderr
    figures = json.loads((tmp_path / "figures.json").read_text(encoding="utf-8"))
    schedules = {each["schedule"]: each for each in figures["schedules"]}
    assert list(schedules) == list(compared_schedules(1e-3))
    assert all(name in done.stdout for name in schedules)
    assert all(each["variance"] > 0 for each in schedules.values())
    # The published noise in other units: the same tokens are masked.
    assert schedules["document, flat"]["relative_flops"] == pytest.approx(1.0)
    assert schedules["document, p from 0.3 to 0.8"]["relative_flops"] > 1.0
    assert figures["draws"] == 3
    assert "jackknife over draws" in " ".join(done.stdout.split())


def test_errors_end_the_tool_with_one_line() -> None:
    command = ["tools/benchmark.py", "schedules", "--quick", "--draws", "2"]
    done = run_python(command)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == "error: --draws 2: a variance and its error need at least 3\n"
