"""Schedules end to end: what a user writes in the YAML, across layouts, a resume and the export."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from distributed.command import run_python, train

from megatron_sdar.data.demo import make_demo_data

ROOT = Path(__file__).resolve().parents[2]
SCHEDULE = "4; 8 @3; 16 @5"


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("demo")
    make_demo_data(folder, 200)
    return folder


def settings(demo: Path, output: Path, **changes: object) -> list[str]:
    """The config file of a tiny run in float64 with CHANGES, written beside its output."""
    config = {
        "model_name_or_path": str(demo / "model"),
        "train_from_scratch": True,
        "dataset": "arithmetic",
        "dataset_dir": str(demo),
        "tokenized_path": str(demo / "tokens"),
        "preset": "recommended",
        "block_length_schedule": SCHEDULE,
        "cutoff_len": 128,
        "per_device_train_batch_size": 1,
        "max_steps": 7,
        "logging_steps": 1,
        "save_strategy": "no",
        "preprocessing_num_workers": 1,
        "fp64": True,
        "output_dir": str(output),
        "device": "cpu",
        "learning_rate": 1e-3,
    } | changes
    path = output.with_suffix(".yaml")
    path.write_text(yaml.safe_dump(config))
    return [str(path)]


def log(output: Path) -> list[dict[str, float]]:
    lines = (output / "trainer_log.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def test_a_growing_block_length_is_the_same_in_another_layout_and_after_a_resume(
    demo: Path, tmp_path: Path
) -> None:
    straight = run_python(
        [
            str(ROOT / "pretrain_sdar.py"),
            *settings(demo, tmp_path / "one", gradient_accumulation_steps=2),
        ]
    )
    assert straight.returncode == 0, straight.stderr
    assert "preset recommended: semantics exact, noise_level_per " in straight.stdout
    expected = [line["loss"] for line in log(tmp_path / "one")]
    assert len(expected) == 7
    # Steps 4 and 6 begin other phases; the checkpoint of step 4 lies inside the second.
    split = settings(demo, tmp_path / "two", save_strategy="steps", save_steps=4, export_hf=False)
    both = train(2, split)
    assert both.returncode == 0, both.stderr
    assert [line["loss"] for line in log(tmp_path / "two")] == pytest.approx(expected, rel=1e-9)
    resume = f"resume_from_checkpoint={tmp_path / 'two' / 'checkpoint-4'}"
    again = train(2, [*split, resume])
    assert again.returncode == 0, again.stderr
    assert "checkpoint-4: step 4" in again.stdout
    assert [line["loss"] for line in log(tmp_path / "two")] == pytest.approx(expected, rel=1e-9)
    exported = json.loads((tmp_path / "one" / "config.json").read_text())
    assert exported["block_size"] == 16
    assert json.loads((demo / "model" / "config.json").read_text())["block_size"] == 4


def test_a_schedule_that_epochs_do_not_reach_is_refused(demo: Path, tmp_path: Path) -> None:
    few = settings(
        demo,
        tmp_path / "few",
        max_steps=-1,
        num_train_epochs=0.1,
        block_length_schedule="4; 8 @900",
    )
    result = run_python([str(ROOT / "pretrain_sdar.py"), *few])
    assert result.returncode == 1
    assert "error: block_length_schedule: 8 would begin at step 900, but" in result.stderr
