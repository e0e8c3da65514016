"""What a run leaves in output_dir and in its checkpoints, and that a resume goes on with it.

One process runs to the end; two go on from its first checkpoint, in the middle of an interval
between two log lines. Their logs must not differ, but for the times.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml
from distributed.command import run_python, train
from transformers.trainer_callback import TrainerState

from megatron_sdar.checkpoint.run_directory import read_marker
from megatron_sdar.data.demo import make_demo_data

ROOT = Path(__file__).resolve().parents[2]
SETTINGS = {
    "train_from_scratch": True, "dataset": "arithmetic", "cutoff_len": 128, "max_steps": 6,
    "per_device_train_batch_size": 1, "gradient_accumulation_steps": 2, "logging_steps": 4,
    "logging_first_step": True, "save_strategy": "steps", "save_steps": 3, "fp64": True,
    "device": "cpu", "learning_rate": 1e-2, "preprocessing_num_workers": 1, "export_hf": False,
    "include_effective_tokens_per_second": True, "peak_tflops_per_device": 0.1,
}  # fmt: skip
COUNTS = ("noisy_tokens", "clean_tokens", "padding_tokens", "left_out_tokens")


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("outputs")
    make_demo_data(folder, 60)
    return folder


def write(demo: Path, output: Path, **changes: Any) -> list[str]:
    config = {
        "model_name_or_path": str(demo / "model"), "dataset_dir": str(demo),
        "tokenized_path": str(demo / "tokens"), "output_dir": str(output),
    }  # fmt: skip
    path = output.with_suffix(".yaml")
    path.write_text(yaml.safe_dump(config | SETTINGS | changes))
    return [str(path)]


def run_alone(arguments: list[str]) -> str:
    done = run_python([str(ROOT / "pretrain_sdar.py"), *arguments])
    assert done.returncode == 0, done.stderr
    return done.stdout


def log(output: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (output / "trainer_log.jsonl").read_text().splitlines()]


def results(output: Path, name: str = "train_results.json") -> dict[str, Any]:
    return json.loads((output / name).read_text())


@pytest.fixture(scope="module")
def whole(demo: Path) -> Path:
    run_alone(write(demo, demo / "whole"))
    return demo / "whole"


@pytest.fixture(scope="module")
def resumed(demo: Path, whole: Path) -> Path:
    output = demo / "resumed"
    shutil.copytree(whole / "checkpoint-3", output / "checkpoint-3")
    shutil.copy(whole / "trainer_log.jsonl", output)  # lines of steps yet to come, too
    done = train(2, write(demo, output, gradient_accumulation_steps=1))
    assert done.returncode == 0, done.stderr
    assert "resumed from" in done.stdout
    return output


def test_transformers_reads_every_trainer_state(whole: Path) -> None:
    logged = {line["step"]: line for line in log(whole)}
    assert list(logged) == [1, 4, 6]
    for folder, step, steps in (("checkpoint-3", 3, [1]), ("checkpoint-6", 6, [1, 4, 6])):
        path = whole / folder / "trainer_state.json"
        assert "trainer_state.json" in read_marker(path.parent).files
        state = TrainerState.load_from_json(str(path))
        assert (state.global_step, state.max_steps) == (step, 6)
        assert (state.logging_steps, state.save_steps, state.train_batch_size) == (4, 3, 1)
        assert [entry["step"] for entry in state.log_history] == steps
        for entry in state.log_history:
            line = logged[entry["step"]]
            assert entry["loss"] == line["loss"]
            assert entry["learning_rate"] == line["lr"]
            assert entry["epoch"] == line["epoch"]
    final = TrainerState.load_from_json(str(whole / "trainer_state.json"))
    assert final.log_history == state.log_history
    assert (final.epoch, final.total_flos) == (state.epoch, state.total_flos)
    assert final.num_input_tokens_seen == state.num_input_tokens_seen > 0
    assert final.stateful_callbacks == {}


def test_a_resumed_log_is_that_of_the_whole_run(whole: Path, resumed: Path) -> None:
    expected, found = log(whole), log(resumed)
    assert [line["step"] for line in found] == [1, 4, 6], "no step is logged twice"
    for theirs, ours in zip(expected, found, strict=True):
        assert [ours[name] for name in COUNTS] == [theirs[name] for name in COUNTS]
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-9)
        assert (ours["lr"], ours["epoch"]) == (theirs["lr"], theirs["epoch"])
        assert ours["left_out_tokens"] > 0
        assert ours["mfu"] > 0
    computed = [sum(line[name] for name in COUNTS[:3]) for line in found]
    assert computed[1] == 3 * computed[0], "three steps since the first"
    states = [results(output, "trainer_state.json") for output in (whole, resumed)]
    for state in states:
        assert isinstance(state.pop("log_history"), list)
    assert states[0] == states[1]


def test_results_are_of_the_steps_that_were_trained(whole: Path, resumed: Path) -> None:
    state, trained, later = results(whole, "trainer_state.json"), results(whole), results(resumed)
    assert trained["total_flos"] == state["total_flos"]
    assert 0 < later["total_flos"] < trained["total_flos"]
    tokens = trained["effective_tokens_per_sec"] * trained["train_runtime"]
    assert tokens == pytest.approx(state["num_input_tokens_seen"], rel=1e-3)
    assert results(whole, "all_results.json") == trained
    assert trained["epoch"] == later["epoch"]
    assert trained["train_steps_per_second"] * trained["train_runtime"] == pytest.approx(6, 0.01)
    assert later["train_steps_per_second"] * later["train_runtime"] == pytest.approx(3, 0.01)


def test_a_run_that_stops_early_between_two_log_lines_logs_its_last_step(demo: Path) -> None:
    output = demo / "early"
    said = run_alone(
        write(
            demo, output, logging_steps=30, logging_first_step=False, max_steps=40,
            learning_rate=0.3, lr_scheduler_type="constant", save_strategy="no",
            eval_dataset="arithmetic_test", eval_max_documents=5, eval_noise_levels=3,
            eval_strategy="steps", eval_steps=1, early_stopping_steps=1,
        )
    )  # fmt: skip
    assert "stopped early" in said
    lines = log(output)
    (last,) = (line for line in lines if "loss" in line)
    assert last["step"] == lines[-1]["step"] < 30
    assert last["step"] == max(line["step"] for line in lines)
    assert results(output)["train_loss"] == pytest.approx(last["loss"])
    state = results(output / f"checkpoint-{last['step']}", "trainer_state.json")
    assert state["log_history"] == results(output, "trainer_state.json")["log_history"]
    assert len(state["log_history"]) == len(lines)
    assert state["best_global_step"] == last["step"] - 1
