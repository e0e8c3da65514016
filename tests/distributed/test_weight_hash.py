"""Copies of a weight on several ranks: equal after training, and one flipped bit is found."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from distributed.layouts import Layout
from distributed.weight_copies_jobs import compare_copies, run_with_a_flipped_bit
from distributed.world import run_world

from megatron_sdar.data.demo import make_demo_data
from megatron_sdar.parallel.weight_hash import bit_hash

NORM = "model.layers.1.input_layernorm.weight"
EMBEDDING = "model.embed_tokens.weight"
# Layout, the parameter and the rank whose copy is broken, who holds copies, how many are shared.
CASES = {
    "no_shard": (Layout("copies_no_shard", dp=2, strategy="no_shard"),
                 "model.layers.0.mlp.up_proj.weight", 1, "rank 0 and rank 1"),
    "tp2": (Layout("copies_tp2", tp=2, sequence_parallel=True), NORM, 1, "rank 0 and rank 1"),
    "tp2_few_heads": (Layout("copies_kv", tp=2, kv_heads=1),
                      "model.layers.0.self_attn.k_proj.weight", 0, "rank 0 and rank 1"),
    "zero3": (Layout("copies_zero3", dp=2, strategy="optim_grads_params"), NORM, 1, None),
    "tp2_pp2_tied": (Layout("copies_tied", tp=2, pp=2, tied=True), EMBEDDING, 3,
                     "rank 1 and rank 3"),
    "tp2_dp2_no_shard": (Layout("copies_four", tp=2, dp=2, strategy="no_shard"), NORM, 2,
                         "ranks 0, 1, 3 and rank 2"),
}  # fmt: skip


# `make test` has no time for worlds of four.
NAMES = [
    pytest.param(name, marks=[pytest.mark.torture] if case[0].world == 4 else [])
    for name, case in CASES.items()
]


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("copies")
    make_demo_data(folder, 60)
    run_world(
        2, [*comparisons(2, folder), (run_with_a_flipped_bit, (flipped_run(folder), 3, 1))], folder
    )
    return folder


@pytest.fixture(scope="module")
def four(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("copies-four")
    run_world(4, comparisons(4, folder), folder)
    return folder


@pytest.fixture
def results(case: str, request: pytest.FixtureRequest) -> Path:
    return request.getfixturevalue("two" if CASES[case][0].world == 2 else "four")


def comparisons(world: int, folder: Path) -> list[tuple[Any, tuple[object, ...]]]:
    return [
        (compare_copies, (layout, name, rank, folder))
        for layout, name, rank, _ in CASES.values()
        if layout.world == world
    ]


def flipped_run(folder: Path) -> list[str]:
    (folder / "flipped").mkdir()
    path = folder / "flipped.yaml"
    config = {
        "model_name_or_path": str(folder / "model"), "train_from_scratch": True,
        "dataset_dir": str(folder), "dataset": "arithmetic", "cutoff_len": 128,
        "tokenized_path": str(folder / "tokens"), "output_dir": str(folder / "flipped"),
        "per_device_train_batch_size": 1, "max_steps": 8, "save_steps": 2, "logging_steps": 8,
        "device": "cpu", "preprocessing_num_workers": 1, "export_hf": False, "report_mfu": False,
        "data_parallel_sharding_strategy": "no_shard", "check_weight_hash_interval": 2,
    }  # fmt: skip
    path.write_text(yaml.safe_dump(config))
    return [str(path)]


@pytest.mark.parametrize("case", NAMES)
def test_a_flipped_bit_is_found_on_every_rank(results: Path, case: str) -> None:
    layout, name, _, holders = CASES[case]
    texts = [(results / f"{layout.name}-{rank}.json").read_text() for rank in range(layout.world)]
    assert len(set(texts)) == 1, "all ranks know the same"
    content = json.loads(texts[0])
    assert content["found"][:2] == [[], []], "equal before and after a step"
    if holders is None:
        assert content == {"shared": 0, "found": [[], [], []]}
        return
    assert content["shared"] > 0
    (line,) = content["found"][2]
    left, _, right = holders.partition(" and ")
    assert line in (f"{name} differs between {left} and {right}",
                    f"{name} differs between {right} and {left}")  # fmt: skip


def test_the_run_ends_before_the_wrong_weights_are_saved(two: Path) -> None:
    for rank in (0, 1):
        said = (two / f"flipped/said-{rank}.txt").read_text()
        assert "weights lie on several processes; their bits are compared every 2 steps" in said
        error = said[said.index("error: ") :]
        assert error.startswith("error: step 4: copies of weights that must be equal are not; they "
                                "were after step 2:\n  model.norm.weight differs between rank 0 "
                                "and rank 1\n")  # fmt: skip
    assert [path.name for path in (two / "flipped").glob("checkpoint-*")] == ["checkpoint-2"]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_every_bit_and_every_place_counts(dtype: torch.dtype) -> None:
    bits = torch.finfo(dtype).bits
    words = {16: torch.int16, 32: torch.int32, 64: torch.int64}[bits]
    # More than one chunk, the last of them not full.
    tensor = torch.arange((1 << 20) + 1000, dtype=torch.float32).to(dtype)
    whole = bit_hash(tensor)
    assert torch.equal(whole, bit_hash(tensor.clone()))
    for place in (0, 1, (1 << 20) - 1, 1 << 20, tensor.numel() - 1):
        for bit in range(0, bits, bits // 4 - 1):
            changed = tensor.clone()
            flip = 1 << bit if bit < bits - 1 else -(1 << bit)
            changed.view(words)[place] ^= flip
            assert not torch.equal(bit_hash(changed), whole), (place, bit)
        sign = tensor.clone()
        sign.view(words)[place] ^= -(1 << (bits - 1))
        assert not torch.equal(bit_hash(sign), whole), place
    swapped = tensor.clone()
    swapped[[3, 5]] = tensor[[5, 3]]
    assert not torch.equal(bit_hash(swapped), whole), "the same values in other places"
