"""check_parallel passes where a layout is right, leaves no trace, and names what is wrong."""

from __future__ import annotations

import json
import math
import re
import shutil
from collections.abc import Sequence
from dataclasses import replace
from itertools import takewhile
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist
import yaml
from distributed.mutants import MUTANTS
from distributed.skipped_runs import Faults, run_with_faults
from distributed.world import run_world

from megatron_sdar.checkpoint.run_directory import read_marker
from megatron_sdar.config import load_config
from megatron_sdar.data.demo import make_demo_data
from megatron_sdar.training import parallel_check
from megatron_sdar.training.step_numbers import StepNumbers, differences, format_differences

SETTINGS = {
    "train_from_scratch": True, "dataset": "arithmetic", "cutoff_len": 128, "max_steps": 2,
    "per_device_train_batch_size": 1, "gradient_accumulation_steps": 3, "logging_steps": 1,
    "save_strategy": "no", "device": "cpu", "learning_rate": 1e-2, "preprocessing_num_workers": 1,
    "export_hf": False, "report_mfu": False,
}  # fmt: skip
TP2 = {"tensor_model_parallel_size": 2}
TP2_PP2 = {"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 2}
PRECISIONS = {"bf16": {"bf16": True}, "fp64": {"fp64": True}}
FOUR = {
    "tp2_pp2": TP2_PP2,
    "tp2_pp2_interleaved": TP2_PP2 | {"virtual_pipeline_model_parallel_size": 2},
    "tp2_dp2_zero3": TP2 | {"data_parallel_sharding_strategy": "optim_grads_params"},
    "pp2_dp2_published_norm": {
        "pipeline_model_parallel_size": 2, "loss_normalization": "llamafactory",
        "data_parallel_sharding_strategy": "no_shard",
    },
    "tp2_pp2_lora": TP2_PP2 | {
        "finetuning_type": "lora", "lora_target": "all", "lora_rank": 4, "lora_dropout": 0.2,
        "additional_target": "lm_head",
    },
    **{f"tp2_pp2_{name}": TP2_PP2 | keys for name, keys in PRECISIONS.items()},
}  # fmt: skip
# The layout of each mutant, and what the parameters that it breaks are called.
BROKEN = {
    "no_qk_norm_sum": (TP2 | {"sequence_parallel": False}, r"[qk]_norm"),
    "local_denominator": ({}, r"."),
    "no_partial_sum": (TP2, r"norm"),
    "no_input_gradient_sum": (TP2 | {"sequence_parallel": False}, r"."),
}


def arguments(folder: Path, name: str, **changes: Any) -> list[str]:
    config = {
        "model_name_or_path": str(folder / "model"), "dataset_dir": str(folder),
        "tokenized_path": str(folder / "tokens"), "output_dir": str(folder / name),
    }  # fmt: skip
    (folder / name).mkdir(exist_ok=True)
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(config | SETTINGS | changes))
    return [str(path)]


def run_mutated(given: Sequence[str], mutant: str) -> None:
    """Train with a defect in this world; the one process beside it has none."""
    with MUTANTS[mutant][0]():
        run_with_faults(given, Faults())


def start_from(folder: Path, source: str, target: str) -> None:
    """Start TARGET where SOURCE ended (on rank 0)."""
    if dist.get_rank() == 0:
        shutil.copytree(folder / source / "checkpoint-2", folder / target / "checkpoint-2")
    dist.barrier()


def both(folder: Path, name: str, **layout: Any) -> list[Any]:
    """A run with the check and one without."""
    return [
        (run_with_faults, (arguments(folder, f"{name}-{word}", check_parallel=checks, **layout),
                           Faults()))
        for word, checks in (("plain", False), ("checked", True))
    ]  # fmt: skip


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("check")
    make_demo_data(folder, 60)
    run_world(2, [*both(folder, "dp2"), broken(folder, "no_qk_norm_sum")], folder)
    return folder


def broken(folder: Path, mutant: str) -> Any:
    layout, _ = BROKEN[mutant]
    return (run_mutated, (arguments(folder, mutant, check_parallel=True, **layout), mutant))


@pytest.fixture(scope="module")
def more_broken(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("check-broken")
    make_demo_data(folder, 60)
    rest = [mutant for mutant in BROKEN if mutant != "no_qk_norm_sum"]
    run_world(2, [broken(folder, mutant) for mutant in rest], folder)
    return folder


@pytest.fixture(scope="module")
def runs_of_four(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("check-four")
    make_demo_data(folder, 60)
    base = arguments(folder, "base", max_steps=1, export_hf=True, **TP2_PP2)
    jobs: list[Any] = [(run_with_faults, (base, Faults()))]
    for name, layout in FOUR.items():
        if "finetuning_type" in layout:
            keys = {"model_name_or_path": str(folder / "base"), "train_from_scratch": False}
            layout = layout | keys
        jobs += both(folder, name, **layout)
    resumed = arguments(folder, "resumed", check_parallel=True, max_steps=4, **TP2_PP2)
    jobs += [
        (start_from, (folder, "tp2_pp2-plain", "resumed")),
        (run_with_faults, (resumed, Faults())),
    ]
    run_world(4, jobs, folder)
    return folder


def said(run: Path) -> str:
    return (run / "said-0.txt").read_text()


def bits(run: Path) -> dict[str, bytes]:
    folder = run / "checkpoint-2"
    names = [name for name in read_marker(folder).files if name.endswith(".safetensors")]
    return {name: (folder / name).read_bytes() for name in names}


def losses(run: Path) -> list[float]:
    lines = (run / "trainer_log.jsonl").read_text().splitlines()
    return [json.loads(line)["loss"] for line in lines]


def passed_without_a_trace(runs: Path, name: str) -> None:
    text = said(runs / f"{name}-checked")
    assert re.search(r"^check_parallel: passed in \d+ s$", text, re.MULTILINE), text
    assert "check_parallel" not in said(runs / f"{name}-plain")
    assert bits(runs / f"{name}-checked") == bits(runs / f"{name}-plain")
    assert losses(runs / f"{name}-checked") == losses(runs / f"{name}-plain")
    worst = max(float(line.split()[-1]) for line in table(text))
    assert worst < 0.5, f"{name}: the tolerance is near: {table(text)}"


def table(text: str) -> list[str]:
    """Its lines, without the header."""
    lines = text.partition("of tolerance\n")[2].splitlines()
    return list(takewhile(lambda line: line.startswith("  "), lines))


def test_a_right_layout_passes_and_the_run_is_the_same(runs: Path) -> None:
    passed_without_a_trace(runs, "dp2")
    text = said(runs / "dp2-checked")
    assert "check_parallel: 2 micro-batches on each of 2 data-parallel ranks" in text
    assert len(table(text)) == 10, "loss, norm and the worst eight"


def test_a_defect_ends_the_run_by_name_before_it_trains(runs: Path) -> None:
    ended_by_name(runs, "no_qk_norm_sum")


@pytest.mark.torture
@pytest.mark.parametrize("mutant", list(BROKEN)[1:])
def test_other_defects_too(more_broken: Path, mutant: str) -> None:
    ended_by_name(more_broken, mutant)


def ended_by_name(runs: Path, mutant: str) -> None:
    _, names = BROKEN[mutant]
    for rank in (0, 1):
        text = (runs / mutant / f"said-{rank}.txt").read_text()
        assert "error: check_parallel: this layout does not compute what one process" in text
        (line,) = (line for line in text.splitlines() if line.startswith("beyond the tolerance"))
        wrong = [name for name in line.split(": ")[1].split(", ") if name != "gradient norm"]
        assert wrong
        assert all(re.search(names, name) for name in wrong), wrong
    assert not list((runs / mutant).glob("checkpoint-*"))
    assert not (runs / mutant / "trainer_log.jsonl").exists()


@pytest.mark.torture
@pytest.mark.parametrize("name", FOUR)
def test_layouts_of_four_pass(runs_of_four: Path, name: str) -> None:
    passed_without_a_trace(runs_of_four, name)


@pytest.mark.torture
def test_a_resume_is_checked_with_the_checkpoints_weights(runs_of_four: Path) -> None:
    text = said(runs_of_four / "resumed")
    assert "resumed from" in text
    assert "check_parallel: passed in" in text
    first = {line.split()[0]: line for line in table(said(runs_of_four / "tp2_pp2-checked"))}
    again = {line.split()[0]: line for line in table(text)}
    assert first["loss"] != again["loss"], "the weights have moved since"


@pytest.mark.torture
def test_what_the_one_process_says_is_told(tmp_path: Path) -> None:
    config = load_config([*arguments(tmp_path, "absent"), "tokenized_path=null"])
    with pytest.raises(ValueError, match=r"the one process ended with 1: error: .*model.*cannot r"):
        parallel_check._run_one_process(parallel_check.one_process(config, 2), 2, None)


def test_a_model_that_is_not_finite_anyway_is_not_blamed_on_the_layout(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = load_config(arguments(tmp_path, "nan"))
    broken = replace(numbers(weight=1.0), loss=math.nan)
    monkeypatch.setattr(parallel_check, "_run_one_process", lambda *arguments: broken)
    with pytest.raises(ValueError, match="one process has loss nan, gradient norm 1"):
        parallel_check._compare(broken, 2, config, 1, None)


def numbers(**norms: float) -> StepNumbers:
    return StepNumbers(2.0, math.sqrt(sum(n**2 for n in norms.values())), norms)


def test_differences_are_judged_relative_to_each_and_to_the_whole() -> None:
    one = numbers(large=1.0, small=1e-9)
    found, unmatched = differences(one, one, 1e-4)
    assert [each.excess for each in found] == [0.0] * 4
    assert unmatched == []
    found, _ = differences(numbers(large=1.0, small=2e-9), one, 1e-4)
    assert found[0].name == "small"
    assert found[0].excess < 1, "rounding of the whole hides in it"
    found, _ = differences(numbers(large=1.001, small=1e-9), one, 1e-4)
    assert [each.name for each in found if each.excess > 1] == ["gradient norm", "large"]
    broken = replace(one, norms={"large": math.nan, "small": 1e-9})
    found, _ = differences(broken, one, 1e-4)
    assert (found[0].name, found[0].excess) == ("large", math.inf)
    assert "nan" in format_differences(found)
    _, unmatched = differences(numbers(large=1.0), one, 1e-4)
    assert unmatched == ["small"]
