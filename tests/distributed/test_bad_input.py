"""A user's mistake gives one readable message and exit code 1 on every rank, without a hang."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from distributed.command import error_lines, exit_codes, train

from tools import make_demo_data, preprocess_data


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("bad_input")
    make_demo_data.main(["--output-dir", str(directory), "--num-documents", "40"])
    preprocess_data.main(
        [
            *("--input", str(directory / "train.jsonl")),
            *("--tokenizer", str(directory / "model")),
            *("--output-prefix", str(directory / "tokens")),
        ]
    )
    lines = (directory / "train.jsonl").read_text().splitlines()
    lines[6] = lines[6][: len(lines[6]) // 2]
    (directory / "broken.jsonl").write_text("\n".join(lines) + "\n")
    return directory


def config(demo: Path, tmp_path: Path, **changes: object) -> str:
    keys = {
        "model_name_or_path": str(demo / "model"),
        "train_from_scratch": True,
        "data_path": str(demo / "tokens"),
        "cutoff_len": 128,
        "per_device_train_batch_size": 1,
        "max_steps": 2,
        "output_dir": str(tmp_path / "output"),
        "device": "cpu",
        **changes,
    }
    path = tmp_path / "config.yaml"
    path.write_text("".join(f"{k}: {json.dumps(v)}\n" for k, v in keys.items() if v is not None))
    return str(path)


CASES = {
    "unknown_key": ({"leraning_rate": 1e-3}, ["config.yaml:9", "leraning_rate", "learning_rate"]),
    "wrong_world_size": (
        {"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 2},
        ["2 processes", "launch 4"],
    ),
    "missing_token_files": ({"data_path": "nowhere/tokens"}, ["nowhere/tokens"]),
    "missing_dataset": (
        {"data_path": None, "dataset": "nowhere/train.jsonl"},
        ["nowhere/train.jsonl"],
    ),
    "malformed_record": ({"data_path": None, "dataset": "BROKEN"}, ["broken.jsonl:7"]),
    "nothing_fits": ({"cutoff_len": 8, "truncate_mode": "drop"}, ["cutoff_len", "8"]),
    "missing_checkpoint": (
        {"resume_from_checkpoint": "nowhere/checkpoint-3"},
        ["nowhere/checkpoint-3"],
    ),
    "missing_model": ({"model_name_or_path": "nowhere/model"}, ["nowhere/model"]),
    "flex_on_cpu": (
        {"attention_backend": "flex"},
        ["attention_backend", "no CPU backward", "use attention_backend: auto"],
    ),
}


# One for each place where a run refuses: every rank by itself, the main rank, all in the run.
BY_DEFAULT = {"wrong_world_size", "malformed_record", "flex_on_cpu"}


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=() if name in BY_DEFAULT else pytest.mark.torture) for name in CASES],
)
def test_one_message_and_exit_code_one(name: str, demo: Path, tmp_path: Path) -> None:
    changes, expected = CASES[name]
    if changes.get("dataset") == "BROKEN":
        changes = {**changes, "dataset": str(demo / "broken.jsonl")}
    result = train(2, [config(demo, tmp_path, **changes)])
    assert result.returncode == 1
    messages = error_lines(result.stderr)
    assert len(messages) == 1, result.stderr[-3000:]
    for part in expected:
        assert part in result.stderr
    assert exit_codes(result.stderr) == {1}, result.stderr[-3000:]
    assert "Traceback" not in result.stderr.split("error: ")[0]


def test_overlong_documents_are_counted_and_reported(demo: Path, tmp_path: Path) -> None:
    path = config(demo, tmp_path, cutoff_len=60, block_length=4, truncate_mode="drop")
    result = train(2, [path])
    assert result.returncode == 0, result.stderr[-3000:]
    assert "longer than cutoff_len=60" in result.stdout
    assert "documents dropped" in result.stdout
