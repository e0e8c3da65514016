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
from megatron_sdar.training.summary import describe_stop

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


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({}, "has everything; the same command goes on from there"),
        ({"overwrite_output_dir": True}, "to go on from there add overwrite_output_dir=false"),
        ({"resume_from_checkpoint": "x"}, "to go on from there add overwrite_output_dir=false"),
        ({"job_id": "j", "overwrite_output_dir": True}, "a start with the same job_id (j) goes on"),
        ({"save_only_model": True}, "the weights alone (save_only_model); train on from it as a"),
    ],
)
def test_who_was_stopped_is_told_how_to_go_on(
    tmp_path: Path, keys: dict[str, object], words: str
) -> None:
    path = tmp_path / "config.yaml"
    path.write_text("model_name_or_path: m\noutput_dir: o\ndataset: d\n")
    config = load_config([str(path), *(f"{name}={value}" for name, value in keys.items())])
    text = describe_stop(config, 3, 9, Path("o/checkpoint-3"))
    assert text.startswith("stopped after step 3 of 9: o/checkpoint-3 h")
    assert words in text
    assert "nothing was trained" in describe_stop(config, 0, 9, None)


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
