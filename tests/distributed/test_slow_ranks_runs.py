"""One of four ranks is slow: the log names it, and what is slow; nobody is named when none is."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from distributed.slow_runs import SECONDS, run_alike, run_with_slow_rank
from distributed.world import run_world

from megatron_sdar.data.demo import make_demo_data

STEPS = 5
SETTINGS = {
    "train_from_scratch": True, "dataset": "arithmetic", "cutoff_len": 64, "max_steps": STEPS,
    "per_device_train_batch_size": 1, "logging_steps": 1, "save_strategy": "no", "device": "cpu",
    "preprocessing_num_workers": 1, "export_hf": False, "report_mfu": False,
}  # fmt: skip
LAYOUTS: dict[str, dict[str, Any]] = {
    "dp4": {},
    "tp2_dp2": {"tensor_model_parallel_size": 2},
    # Comparing weights is a collective behind the update: no rank's own work.
    "tp2_pp2": {
        "tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 2,
        "check_weight_hash_interval": 1,
    },
}  # fmt: skip
# Layout, slow rank, what is slow; and how the log says both.
CASES = {
    "dp4-2-rows": "rank 2 (pp 0, dp 2, tp 0; ",
    "tp2_dp2-1-moving": "rank 1 (pp 0, dp 0, tp 1; ",
    "tp2_pp2-3-update": "rank 3 (pp 1, dp 0, tp 1; ",
    "dp4-0-products": "rank 0 (pp 0, dp 0, tp 0; ",
}
WORDS = {
    "rows": "most of the difference: waiting for rows",
    "moving": "most of the difference: moving rows to the device",
    "update": "most of the difference: update of weights and host work",
    "products": "matrix products take ",
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("slow-ranks")
    make_demo_data(folder, 60)

    def write(name: str, **changes: Any) -> list[str]:
        config = {
            "model_name_or_path": str(folder / "model"), "dataset_dir": str(folder),
            "tokenized_path": str(folder / "tokens"), "output_dir": str(folder / name),
        }  # fmt: skip
        path = folder / f"{name}.yaml"
        path.write_text(yaml.safe_dump(config | SETTINGS | changes))
        return [str(path)]

    jobs: list[Any] = []
    for name in CASES:
        layout, rank, what = name.split("-")
        jobs.append((run_with_slow_rank, (write(name, **LAYOUTS[layout]), int(rank), what)))
    jobs.append((run_alike, (write("alike"),)))
    jobs.append((run_with_slow_rank, (write("off", slow_rank_factor=0), 2, "rows")))
    run_world(4, jobs, folder)
    return folder


def log(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "trainer_log.jsonl").read_text().splitlines()]


def warnings(run: Path) -> list[str]:
    lines = (run / "printed.txt").read_text().splitlines()
    return [line for line in lines if line.startswith("slow: ")]


@pytest.mark.parametrize("name", CASES)
def test_the_log_names_the_slow_rank_and_what_is_slow(runs: Path, name: str) -> None:
    what, rank = name.split("-")[2], int(name.split("-")[1])
    kind = "products" if what == "products" else "own_time"
    found = [line for line in warnings(runs / name) if WORDS[what] in line]
    assert found, "it is slow in every step"
    assert all(line.startswith(f"slow: {CASES[name]}") for line in found)
    # What products take on ranks that share two cores is anybody's guess.
    named = [line for line in warnings(runs / name) if "the others wait for it" in line]
    assert [line for line in named if line not in found] == []
    for line in log(runs / name)[kind == "products" :]:
        assert line[f"{kind}_slowest_rank"] == rank
        assert line[f"{kind}_factor"] > 2
        if kind == "own_time":
            assert line["own_time_s"] >= SECONDS


def test_nobody_is_named_when_all_clocks_go_alike(runs: Path) -> None:
    assert warnings(runs / "alike") == []
    lines = log(runs / "alike")
    assert [line["own_time_factor"] for line in lines] == [1.0] * STEPS
    assert [line["own_time_s"] for line in lines] == [3.0] * STEPS, "a tick for each own phase"
    assert ["products_factor" in line for line in lines] == [False] + [True] * (STEPS - 1)
    assert [line["products_factor"] for line in lines[1:]] == [1.0] * (STEPS - 1)


def test_it_can_be_turned_off(runs: Path) -> None:
    assert warnings(runs / "off") == []
    assert not {"own_time_s", "products_s"} & set(log(runs / "off")[-1])


def test_it_changes_no_bit_of_the_weights(runs: Path) -> None:
    folders = [runs / name / f"checkpoint-{STEPS}" for name in ("off", "dp4-2-rows", "alike")]
    shards = sorted(path.relative_to(folders[0]) for path in folders[0].rglob("*.safetensors"))
    assert len(shards) > 1
    for shard in shards:
        assert len({(folder / shard).read_bytes() for folder in folders}) == 1, shard
