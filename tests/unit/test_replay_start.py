"""Which weights a replay takes, what it says of them, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from megatron_sdar.config import load_config
from megatron_sdar.parallel.mesh import LaunchInfo
from megatron_sdar.training import replay_start
from megatron_sdar.training.replay_start import ReplayStart, find_start, read_record
from megatron_sdar.training.step_replay import MicroBatchReport, ReplayRequest, resolve_replay

RECORD = {
    "step": 5, "skipped_before": [], "loss": "nan", "grad_norm": "nan", "label_tokens": 10,
    "rows_per_micro_batch": 1, "data_parallel_size": 2, "micro_batches": [{}, {}, {}],
    "loader": {"rows_taken": 12},
}  # fmt: skip


def write(output: Path, **changes: Any) -> Path:
    path = output / "skipped_steps/step-5.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(RECORD | changes))
    return path


def start(
    monkeypatch: pytest.MonkeyPatch, output: Path, checkpoints: dict[int, list[int]], **changes: Any
) -> ReplayStart:
    """Of step 5, where checkpoints (step -> the steps skipped until then) lie."""
    paths = {output / f"checkpoint-{step}": step for step in checkpoints}
    for path, step in paths.items():
        path.mkdir(parents=True)
        own = {"skipped": {"steps": checkpoints[step]}}
        state = {"stateful_callbacks": {"megatron_sdar": own}}
        (path / "trainer_state.json").write_text(json.dumps(state))
    monkeypatch.setattr(replay_start, "complete_checkpoints", lambda output: list(paths))
    monkeypatch.setattr(replay_start, "read_marker", lambda path: SimpleNamespace(step=paths[path]))
    return find_start(read_record(write(output, **changes)))


def test_the_step_before_is_exact(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    found = start(monkeypatch, tmp_path, {2: [], 4: [], 6: [5]})
    assert found == ReplayStart(tmp_path / "checkpoint-4", 4, True)
    assert found.describe(5).endswith("checkpoint-4, exactly those of step 5")


def test_the_step_itself_is_exact_since_it_was_skipped(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    assert start(monkeypatch, tmp_path, {2: [], 5: [5]}).step == 5


def test_later_ones_are_exact_while_all_between_was_skipped(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    assert start(monkeypatch, tmp_path, {6: [5, 6]}) == ReplayStart(
        tmp_path / "checkpoint-6", 6, True
    )


def test_a_later_one_that_was_trained_further_is_not(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    found = start(monkeypatch, tmp_path, {2: [], 7: [5, 7]})
    assert found == ReplayStart(tmp_path / "checkpoint-2", 2, False)
    assert "checkpoint-2, 2 steps before those of step 5; --train-from" in found.describe(5)


def test_skipped_steps_before_do_not_count(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert start(monkeypatch, tmp_path, {2: []}, skipped_before=[3, 4]).is_exact


def test_without_a_checkpoint_it_is_the_first_weights(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    found = start(monkeypatch, tmp_path, {9: [5]})
    assert found == ReplayStart(None, 0, False)
    assert "the run's first weights, 4 steps before" in found.describe(5)
    assert start(monkeypatch, tmp_path / "b", {}, skipped_before=[1, 2, 3, 4]).is_exact


def test_what_is_no_record_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"step-7\.json: there is no such file; give OUTPUT_DIR/s"):
        read_record(tmp_path / "step-7.json")
    (tmp_path / "other.json").write_text('{"step": 3, "loss": 1.0}')
    with pytest.raises(ValueError, match="not the record of a skipped step: it has no skipped_bef"):
        read_record(tmp_path / "other.json")
    (tmp_path / "torn.json").write_text('{"step": 3, ')
    with pytest.raises(ValueError, match=r"torn\.json"):
        read_record(tmp_path / "torn.json")


def test_micro_batches_that_cannot_be_dealt_are_refused(tmp_path: Path) -> None:
    config = tmp_path / "c.yaml"
    config.write_text(f"model_name_or_path: m\noutput_dir: {tmp_path}\ndata_path: [d]\n")
    load_config([str(config)])
    request = ReplayRequest([str(config)], write(tmp_path))
    with pytest.raises(ValueError, match="the step's 3 micro-batches cannot be dealt to 2 data-"):
        resolve_replay(request, LaunchInfo(0, 0, 2), print)


def test_a_report_is_finite_when_both_numbers_are() -> None:
    good = MicroBatchReport(0, [], 1, 1.0, 2.0, None, [])
    assert good.is_finite
    assert not MicroBatchReport(0, [], 1, 1.0, float("inf"), None, ["w"]).is_finite
