"""A run whose newest checkpoint was damaged on disk, end to end as a user meets it."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest
import yaml
from distributed.command import error_lines, exit_codes, train

from megatron_sdar.checkpoint.run_directory import damaged_files, read_marker
from megatron_sdar.data.demo import make_demo_data

STEPS = 6


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the data and a run of six steps, saved every second step."""
    folder = tmp_path_factory.mktemp("damaged")
    make_demo_data(folder, 200)
    result = train(2, [settings(folder, "whole")])
    assert result.returncode == 0, result.stderr
    saves = re.findall(r"^saved \S+/checkpoint-(\d) \(\d+\.\d MB in ", result.stdout, re.M)
    assert saves == ["2", "4", "6"]
    assert len(re.findall(r"^async_save: .* of host memory", result.stdout, re.M)) == 1
    return folder


def settings(folder: Path, name: str, **changes: object) -> str:
    config = {
        "model_name_or_path": str(folder / "model"),
        "train_from_scratch": True,
        "dataset_dir": str(folder),
        "dataset": "arithmetic",
        "tokenized_path": str(folder / "tokens"),
        "cutoff_len": 128,
        "block_length": 4,
        "per_device_train_batch_size": 1,
        "max_steps": STEPS,
        "save_steps": 2,
        "logging_steps": 1,
        "preprocessing_num_workers": 1,
        "output_dir": str(folder / name),
        "device": "cpu",
        "learning_rate": 1e-3,
    } | changes
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(config))
    return str(path)


def interrupted(runs: Path, name: str) -> Path:
    """The run as it was after step 4, with a bit of that step's moments flipped since."""
    run = runs / name
    shutil.copytree(runs / "whole", run, ignore=shutil.ignore_patterns("checkpoint-6", "*.safet*"))
    for step in (2, 4):
        shutil.copytree(
            runs / f"whole/checkpoint-{step}", run / f"checkpoint-{step}", dirs_exist_ok=True
        )
    shard = run / "checkpoint-4/optimizer/shard-00001.safetensors"
    content = bytearray(shard.read_bytes())
    content[-100] ^= 4
    shard.write_bytes(bytes(content))
    return run


def test_it_goes_on_from_the_older_one_and_ends_with_the_same_weights(runs: Path) -> None:
    run = interrupted(runs, "again")
    result = train(2, [settings(runs, "again")])
    assert result.returncode == 0, result.stderr
    damaged = run / "checkpoint-4/optimizer/shard-00001.safetensors"
    (line,) = [line for line in result.stdout.splitlines() if line.startswith("passed over")]
    assert line.startswith(f"passed over: {damaged}: damaged")
    assert f"\nresumed from {run / 'checkpoint-2'}: step 2" in result.stdout
    assert re.findall(r"^saved \S+/checkpoint-(\d)", result.stdout, re.M) == ["4", "6"]
    for step in (4, 6):
        ours, theirs = run / f"checkpoint-{step}", runs / f"whole/checkpoint-{step}"
        files = read_marker(ours).files
        assert damaged_files(ours, files) == []
        shards = [name for name in files if name.endswith(".safetensors")]
        assert len(shards) == 4
        for name in (*shards, "trainer_state.json"):
            assert (ours / name).read_bytes() == (theirs / name).read_bytes(), name
    exported = "model-00001-of-00001.safetensors", "model.safetensors"
    (weights,) = [path for name in exported if (path := run / name).exists()]
    assert weights.read_bytes() == (runs / "whole" / weights.name).read_bytes()


def test_one_that_is_asked_for_by_path_is_an_error(runs: Path) -> None:
    run = interrupted(runs, "asked")
    asked = run / "checkpoint-4"
    result = train(2, [settings(runs, "asked", resume_from_checkpoint=str(asked))])
    (line,) = error_lines(result.stderr)
    assert line.startswith(f"error: resume_from_checkpoint: {asked}/optimizer/shard-00001")
    assert line.endswith(f"; {run / 'checkpoint-2'} is complete")
    assert exit_codes(result.stderr) == {1}


def test_unverified_it_is_resumed_as_it_is(runs: Path) -> None:
    run = interrupted(runs, "unverified")
    result = train(2, [settings(runs, "unverified", verify_checkpoints=False, async_save=False)])
    assert result.returncode == 0, result.stderr
    assert f"\nresumed from {run / 'checkpoint-4'}: step 4" in result.stdout
    assert "async_save" not in result.stdout
