"""The view of a terminal: bars, the last step's figures below, and a picture of it."""

from __future__ import annotations

import io
import json
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console
from unit.test_step_guards import NOBODY, RECORD

from megatron_sdar.training.metrics import Reporter
from tools.draw_progress import main as draw


def shown(reporter: Reporter, width: int = 70) -> str:
    console = Console(width=width, file=io.StringIO())
    console.print(reporter.view())
    return console.file.getvalue()  # type: ignore[attr-defined]


def test_a_terminal_shows_bars_and_figures_that_fit(tmp_path: Path) -> None:
    console = Console(file=io.StringIO(), force_terminal=True, width=70)
    with Reporter(tmp_path, 200, 0, NOBODY, console) as reporter:
        reporter.log(replace(RECORD, step=50, loss=1.25))
        text = shown(reporter)
        assert "training" in text
        assert "50/200" in text
        assert "evaluation" not in text
        for figure in ("loss 1.2500", "MFU 25%", "100 answer tok/s of 300", "0.5 GiB"):
            assert figure in " ".join(text.split()), text
        assert max(map(len, text.splitlines())) <= 70
        with reporter.evaluating(8) as advance:
            advance(2)
            assert "2/8" in shown(reporter)
        assert "2/8" not in shown(reporter)
        reporter.log_evaluation(50, 0.5, {"eval_loss": 2.5, "eval_loss_t0.5": 9.0})
    assert "eval  50/200  eval_loss 2.5000\n" in console.file.getvalue()  # type: ignore[attr-defined]


def test_elsewhere_lines_are_plain(tmp_path: Path) -> None:
    console = Console(file=io.StringIO(), width=70)
    with Reporter(tmp_path, 200, 0, NOBODY, console) as reporter:
        reporter.log(replace(RECORD, step=50, mfu=None))
        with reporter.evaluating(8) as advance:
            advance(2)
        assert reporter.view() == ""
    (line,) = console.file.getvalue().splitlines()  # type: ignore[attr-defined]
    assert line.startswith("step  50/200  epoch 0.500  loss 2.5000")
    assert "MFU" not in line
    assert "\x1b" not in line


def test_the_picture_is_of_half_the_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert draw([str(tmp_path)]) == 1
    assert "trainer_log.jsonl is missing" in capsys.readouterr().err
    console = Console(file=io.StringIO())
    with Reporter(tmp_path, 4, 0, NOBODY, console) as reporter:
        for step in (1, 2, 3, 4):
            reporter.log(replace(RECORD, step=step, loss=float(step)))
            reporter.log_evaluation(step, 1.0, {"eval_loss": 1.0})
    lines = [json.loads(line) for line in (tmp_path / "trainer_log.jsonl").open()]
    assert lines[0]["step"] == 1
    for line in lines:
        line["elapsed_time"] = f"0:{line['step']:02d}:30"
    (tmp_path / "trainer_log.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    assert draw([str(tmp_path), "--output", str(tmp_path / "view.svg")]) == 0
    picture = (tmp_path / "view.svg").read_text()
    assert "2/4" in picture
    assert "2.0000" in picture
    assert "0:02:30" in picture, "the run's clock, not that of the drawing"
    (tmp_path / "trainer_log.jsonl").write_text("")
    assert draw([str(tmp_path)]) == 1
    assert "holds no logged step" in capsys.readouterr().err
