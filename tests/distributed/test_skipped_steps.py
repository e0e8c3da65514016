"""Steps whose gradient is not finite on one rank: skipped by all, counted, recorded, resumed.

A run that skips a step must end with the bits of one that never computed it, and so must a run
that was resumed behind it, or that stopped at it and went on.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from distributed.skipped_runs import Faults, keep_only, keep_text, run_with_faults
from distributed.world import run_world

from megatron_sdar.checkpoint.run_directory import read_marker
from megatron_sdar.data.demo import make_demo_data

STEPS = 6
SETTINGS = {
    "train_from_scratch": True, "dataset": "arithmetic", "cutoff_len": 128, "max_steps": STEPS,
    "per_device_train_batch_size": 1, "gradient_accumulation_steps": 2, "logging_steps": 1,
    "save_steps": 2, "device": "cpu", "learning_rate": 1e-2, "preprocessing_num_workers": 1,
    "export_hf": False, "report_mfu": False,
}  # fmt: skip
LAYOUTS = {
    "fsdp": (2, {"data_parallel_sharding_strategy": "optim_grads"}),
    "replicated": (2, {"data_parallel_sharding_strategy": "no_shard"}),
    "tp2_pp2": (4, {"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 2}),
}
# `make test` has no time for all.
NAMES = [
    pytest.param(name, marks=[pytest.mark.torture] if name == "replicated" else [])
    for name in LAYOUTS
]
SKIPPED = Faults(poisoned={3: 1, 4: 0})
TIMES = ("elapsed_time", "remaining_time", "label_tokens_per_s", "row_tokens_per_s",
         "data_wait_share", "memory_mb", "own_time_slowest_rank", "own_time_s", "own_time_factor",
         "products_slowest_rank", "products_s", "products_factor")  # fmt: skip


def arguments(folder: Path, name: str, **changes: Any) -> list[str]:
    config = {
        "model_name_or_path": str(folder / "model"), "dataset_dir": str(folder),
        "tokenized_path": str(folder / "tokens"), "output_dir": str(folder / name),
    }  # fmt: skip
    (folder / name).mkdir(exist_ok=True)
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(config | SETTINGS | changes))
    return [str(path)]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("skipped")
    make_demo_data(folder, 60)
    run_world(2, jobs_of(folder, "fsdp") + jobs_that_stop(folder), folder)
    run_world(4, jobs_of(folder, "tp2_pp2"), folder)
    return folder


@pytest.fixture(scope="module")
def replicated_runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("skipped-replicated")
    make_demo_data(folder, 60)
    run_world(2, jobs_of(folder, "replicated"), folder)
    return folder


@pytest.fixture
def runs_of(name: str, request: pytest.FixtureRequest) -> Path:
    """The folder of one layout's runs."""
    return request.getfixturevalue("replicated_runs" if name == "replicated" else "runs")


def jobs_of(folder: Path, name: str) -> list[Any]:
    _, layout = LAYOUTS[name]
    skipping = arguments(folder, f"{name}-skipping", **layout)
    never = arguments(folder, f"{name}-never", **layout)
    resumed = arguments(folder, f"{name}-resumed", **layout)
    return [
        (run_with_faults, (skipping, SKIPPED)),
        (run_with_faults, (never, Faults(left_out=(3, 4)))),
        (keep_only, (folder, f"{name}-skipping", f"{name}-resumed", 4)),
        (run_with_faults, (resumed, Faults())),
    ]


def jobs_that_stop(folder: Path) -> list[Any]:
    never = arguments(folder, "never", save_strategy="no")
    stopping = arguments(folder, "stopping", save_strategy="no", max_skipped_steps=1)
    strict = arguments(
        folder, "strict", save_strategy="no", max_skipped_steps=0, save_skipped_step=False
    )
    nothing = arguments(folder, "nothing", max_steps=2)
    return [
        (run_with_faults, (never, Faults(left_out=(2, 4)))),
        (run_with_faults, (stopping, Faults(poisoned={2: 1, 4: 1, 5: 0}))),
        (keep_text, (folder / "stopping",)),
        (run_with_faults, (stopping, Faults())),
        (run_with_faults, (strict, Faults(poisoned={2: 0}))),
        (run_with_faults, (nothing, Faults(poisoned={1: 0, 2: 0}))),
    ]


def bits(run: Path, step: int = STEPS) -> dict[str, bytes]:
    """Weights and moments of a checkpoint."""
    folder = run / f"checkpoint-{step}"
    names = [name for name in read_marker(folder).files if name.endswith(".safetensors")]
    assert {name.split("/")[0] for name in names} == {"model", "optimizer"}
    return {name: (folder / name).read_bytes() for name in names}


def log(run: Path) -> list[dict[str, Any]]:
    def refuse(word: str) -> None:
        raise AssertionError(f"{word} is not JSON")

    lines = (run / "trainer_log.jsonl").read_text().splitlines()
    return [json.loads(line, parse_constant=refuse) for line in lines]


def said(run: Path, size: int, prefix: str = "") -> list[str]:
    """What each rank was told; all the same."""
    texts = [(run / f"{prefix}said-{rank}.txt").read_text() for rank in range(size)]
    told = {tuple(line for line in text.splitlines() if "not finite" in line) for text in texts}
    assert len(told) == 1, "ranks differ in what they know"
    return texts[0].splitlines()


def record(run: Path, step: int) -> dict[str, Any]:
    return json.loads((run / f"skipped_steps/step-{step}.json").read_text())


@pytest.mark.parametrize("name", NAMES)
def test_all_ranks_skip_and_end_with_the_bits_of_a_run_without_these_steps(
    runs_of: Path, name: str
) -> None:
    size, _ = LAYOUTS[name]
    skipping = runs_of / f"{name}-skipping"
    lines = said(skipping, size)
    told = [line for line in lines if "is not finite" in line]
    assert [line.split(" is")[0] for line in told] == ["step 3", "step 4"]
    assert "gradient norm nan; no weight was changed" in told[0]
    assert told[1].endswith("(2 skipped, max_skipped_steps: 3)")
    assert any(line.split() == ["skipped", "steps", "2,", "not", "finite:",
                                str(skipping / "skipped_steps")] for line in lines)  # fmt: skip
    assert bits(skipping) == bits(runs_of / f"{name}-never")
    assert bits(skipping, 2) == bits(skipping, 4), "the steps between were skipped"
    assert bits(skipping, 4) != bits(skipping, 6)


@pytest.mark.parametrize("name", NAMES)
def test_a_resume_behind_a_skipped_step_is_bitwise_and_goes_on_counting(
    runs_of: Path, name: str
) -> None:
    skipping, resumed = runs_of / f"{name}-skipping", runs_of / f"{name}-resumed"
    assert bits(resumed) == bits(skipping)
    logs = [
        [{key: value for key, value in line.items() if key not in TIMES} for line in log(run)]
        for run in (skipping, resumed)
    ]
    assert logs[0] == logs[1]
    assert [line["skipped_steps"] for line in logs[0]] == [0, 0, 1, 2, 2, 2]
    assert [("loss" in line, "grad_norm" in line) for line in logs[0]] == [
        (step not in (3, 4),) * 2 for step in range(1, 7)
    ]
    for run in (skipping, resumed):
        state = json.loads((run / "checkpoint-6/trainer_state.json").read_text())
        assert state["stateful_callbacks"]["megatron_sdar"]["skipped"] == {"steps": [3, 4]}
        assert [entry["learning_rate"] for entry in state["log_history"]] == [
            line["lr"] for line in logs[0]
        ]


@pytest.mark.parametrize("name", NAMES)
def test_the_record_names_rows_documents_and_gradients(runs_of: Path, name: str) -> None:
    size, layout = LAYOUTS[name]
    run = runs_of / f"{name}-skipping"
    assert sorted(path.name for path in (run / "skipped_steps").iterdir()) == [
        "step-3.json", "step-4.json"]  # fmt: skip
    found = record(run, 4)
    assert (found["grad_norm"], found["seed"], found["skipped_before"]) == ("nan", 42, [3])
    assert isinstance(found["loss"], float)
    assert found["learning_rate"] == log(run)[3]["lr"]
    assert found["checkpoint"] == str(run / "checkpoint-2")
    dp = 1 if "tensor_model_parallel_size" in layout else size
    assert found["data_parallel_size"] == dp
    rows = [batch["rows"] for batch in found["micro_batches"]]
    assert rows == [[first, first + 1] for first in range(6 * dp, 8 * dp)]
    assert sum(batch["loss"] for batch in found["micro_batches"]) == pytest.approx(found["loss"])
    for batch in found["micro_batches"]:
        assert {document["dataset"] for document in batch["documents"]} == {str(runs_of / "tokens")}
    (parameter,) = found["not_finite_gradients"]
    assert 0 in found["not_finite_gradients"][parameter]
    assert found["loader"]["rows_taken"] == 6 * dp


def test_the_run_stops_behind_the_limit_and_the_same_command_goes_on(runs: Path) -> None:
    run = runs / "stopping"
    first = said(run, 2, "first-")
    error = [line for line in first if line.startswith("error: ")]
    assert error[0].startswith("error: step 4 is not finite: loss ")
    assert "Steps of the run that were not finite: [2, 4]; max_skipped_steps is 1." in first[-1]
    assert f"{run / 'checkpoint-4'} holds the weights: the same command goes on" in first[-1]
    again = said(run, 2)
    assert f"resumed from {run / 'checkpoint-4'}: step 4" in "\n".join(again)
    assert not [line for line in again if line.startswith("error")]
    assert bits(run) == bits(runs / "never")
    assert log(run)[-1]["skipped_steps"] == 2


def test_without_a_limit_the_first_one_stops_and_nothing_is_saved(runs: Path) -> None:
    lines = said(runs / "strict", 2)
    assert any(line.startswith("error: step 2 is not finite") for line in lines)
    assert "save_skipped_step: true" in lines[-1]
    assert not list((runs / "strict").glob("checkpoint-*"))
    assert (runs / "strict/skipped_steps/step-2.json").is_file()


def test_a_run_that_skipped_everything_leaves_valid_files(runs: Path) -> None:
    run = runs / "nothing"
    assert [line["skipped_steps"] for line in log(run)] == [1, 2]
    assert bits(run, 2)
    for name in ("checkpoint-2/trainer_state.json",):
        assert "NaN" not in (run / name).read_text()
