"""What of a run survives a restart, and what is said when it cannot be the same."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from megatron_sdar.config import load_config
from megatron_sdar.training.metrics import trim_log
from megatron_sdar.training.run_state import RunState

SAVED = {"step": 4, "stateful_callbacks": {"megatron_sdar": {"rows_per_step": 8}}}


@pytest.mark.parametrize(("rows", "is_said"), [(8, False), (4, True)])
def test_a_changed_batch_is_said(tmp_path: Path, rows: int, is_said: bool) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(f"model_name_or_path: m\noutput_dir: {tmp_path}\ndataset: d\n")
    nothing: Any = SimpleNamespace(rows_per_step=rows)
    state = RunState(load_config([str(path)]), nothing, nothing, nothing)
    said: list[str] = []
    state.load(SAVED, nothing, said.append)
    assert state.done == 4
    assert not state.evaluation_is_due
    assert [line.startswith("a step took 8 rows") for line in said] == [True] * is_said


def test_an_evaluation_that_is_repeated_is_logged_once(tmp_path: Path) -> None:
    log = tmp_path / "trainer_log.jsonl"
    records = [
        {"step": 2, "eval_loss": 1.0},
        {"step": 4, "loss": 2.0, "lr": 0.1},
        {"step": 4, "eval_loss": 1.0},
        {"step": 5, "loss": 2.0, "lr": 0.1},
    ]
    log.write_text("".join(json.dumps(record) + "\n" for record in records))
    trim_log(log, 4)
    assert [json.loads(line) for line in log.read_text().splitlines()] == records[:3]
    trim_log(log, 4, evaluates_again=True)
    assert [json.loads(line) for line in log.read_text().splitlines()] == records[:2]
