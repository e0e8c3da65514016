"""Counting and recording skipped steps: files, state, and a disk that refuses."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from distributed.layouts import Layout, build, make_steps, micro_batches
from unit.token_lists import make_loader

from megatron_sdar.config_sections.guards import GuardConfig
from megatron_sdar.data.loading.loader import RowLoader
from megatron_sdar.parallel.mesh import build_mesh
from megatron_sdar.training.nonfinite import SkippedSteps, number_or_word, record_path
from megatron_sdar.training.step import NonFiniteStepError, TrainingStep

pytestmark = pytest.mark.usefixtures("single_process")


@pytest.fixture
def failed() -> tuple[NonFiniteStepError, TrainingStep, RowLoader]:
    """A step whose third micro-batch has an infinite weight, and a loader of four."""
    layout = Layout("nonfinite")
    step, _ = build(layout, build_mesh(torch.device("cpu"), 1, 1))
    rows = micro_batches(layout, make_steps(False)[0], 0)
    rows[2] = replace(rows[2], loss_weights=rows[2].loss_weights * math.inf)
    with pytest.raises(NonFiniteStepError) as caught:
        step.run(rows, 1e-3)
    loader = make_loader()
    loader.next_step()
    return caught.value, step, loader


def skipped(output: Path, **guards: Any) -> SkippedSteps:
    training = SimpleNamespace(output_dir=str(output), seed=7)
    config = SimpleNamespace(training=training, guards=GuardConfig(**guards))
    return SkippedSteps(config, build_mesh(torch.device("cpu"), 1, 1))  # type: ignore[arg-type]


def test_the_record_is_json_and_names_the_micro_batch(tmp_path: Path, failed: Any) -> None:
    steps = skipped(tmp_path)
    line = steps.add(9, *failed, 1e-3, None)
    assert line.startswith("step 9 is not finite: loss ")
    assert line.endswith("(1 skipped, max_skipped_steps: 3)")
    text = record_path(tmp_path, 9).read_text()
    assert "NaN" not in text
    assert "Infinity" not in text
    record = json.loads(text)
    finite = [isinstance(batch["loss"], float) for batch in record["micro_batches"]]
    assert finite == [True, True, False, True]
    assert set(record["not_finite_gradients"]) == set(failed[1].parameters)
    assert (record["checkpoint"], record["seed"]) == (None, 7)


def test_the_limit_and_the_state(tmp_path: Path, failed: Any) -> None:
    steps = skipped(tmp_path, max_skipped_steps=1)
    steps.add(2, *failed, 1e-3, None)
    assert not steps.is_exceeded
    again = skipped(tmp_path, max_skipped_steps=1)
    again.load_state_dict(json.loads(json.dumps(steps.state_dict())))
    again.add(5, *failed, 1e-3, tmp_path / "checkpoint-4")
    assert again.is_exceeded
    assert steps.steps == [2]
    assert json.loads(record_path(tmp_path, 5).read_text())["skipped_before"] == [2]
    assert "not finite: [2, 5]; max_skipped_steps is 1." in again.message(tmp_path / "checkpoint-5")
    assert "The same command meets these rows again" in again.message(None)


def test_a_disk_that_refuses_the_record_does_not_end_the_run(tmp_path: Path, failed: Any) -> None:
    (tmp_path / "skipped_steps").write_text("a file in the way")
    line = skipped(tmp_path).add(3, *failed, 1e-3, None)
    assert "step-3.json could not be written: " in line


def test_records_of_steps_to_come_are_removed(tmp_path: Path, failed: Any) -> None:
    steps = skipped(tmp_path)
    for number in (2, 5, 12):
        steps.add(number, *failed, 1e-3, None)
    (tmp_path / "skipped_steps/notes.txt").write_text("mine")
    steps.forget_records_after(5)
    left = sorted(path.name for path in (tmp_path / "skipped_steps").iterdir())
    assert left == ["notes.txt", "step-2.json", "step-5.json"]
    skipped(tmp_path / "elsewhere").forget_records_after(0)


def test_words_stand_for_what_json_lacks() -> None:
    assert [number_or_word(x) for x in (1.5, math.nan, math.inf, -math.inf)] == [
        1.5, "nan", "inf", "-inf"]  # fmt: skip
