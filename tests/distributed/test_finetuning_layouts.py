"""LoRA and freeze: the numbers of a plain oracle in every layout, and what is frozen stays."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from distributed.finetuning_layouts import (
    DROPOUT,
    FIRST_AND_HEAD,
    HEAD_ONLY,
    LAST_TWO,
    LORA,
    NORMS,
    SOME,
    Case,
    expected,
    run_case,
)
from distributed.layouts import Layout, mismatches, read_result
from distributed.world import run_world

ZERO3 = "optim_grads_params"
CASES = [
    Case(Layout("lora_one_process"), LORA),
    Case(Layout("lora_one_process_recompute", recompute="full"), LORA),
    Case(Layout("lora_one_process_selective", recompute="selective"), LORA),
    Case(Layout("lora_one_process_untrimmed", trim=False), LORA),
    Case(Layout("some_one_process"), SOME),
    Case(Layout("last_two_one_process", recompute="full"), LAST_TWO),
    Case(Layout("first_and_head_one_process", recompute="selective"), FIRST_AND_HEAD),
    Case(Layout("head_only_one_process"), HEAD_ONLY),
    Case(Layout("lora_tp2", tp=2), LORA),
    Case(Layout("lora_tp2_sp", tp=2, sequence_parallel=True), LORA),
    Case(Layout("some_tp2_sp_full", tp=2, sequence_parallel=True, recompute="full"), SOME),
    Case(
        Layout("lora_tp2_kv_heads_below_tp", tp=2, kv_heads=1, sequence_parallel=True,
               recompute="selective"),
        LORA,
    ),
    Case(Layout("lora_pp2_interleaved", pp=2, vpp=2), LORA),
    Case(Layout("some_pp2", pp=2), SOME),
    Case(Layout("lora_dp2_zero2", dp=2), LORA),
    Case(Layout("lora_dp2_zero3", dp=2, strategy=ZERO3, recompute="full"), LORA),
    Case(Layout("some_dp2_zero3", dp=2, strategy=ZERO3), SOME),
    Case(Layout("lora_dp2_no_shard", dp=2, strategy="no_shard"), LORA),
    Case(Layout("last_two_tp2_sp", tp=2, sequence_parallel=True), LAST_TWO),
    Case(Layout("norms_tp2_sp", tp=2, sequence_parallel=True, recompute="selective"), NORMS),
    Case(Layout("norms_pp2_interleaved", pp=2, vpp=2), NORMS),
    Case(Layout("last_two_pp2", pp=2), LAST_TWO),
    Case(Layout("first_and_head_pp2_interleaved", pp=2, vpp=2), FIRST_AND_HEAD),
    Case(Layout("head_only_pp2_interleaved", pp=2, vpp=2), HEAD_ONLY),
    Case(Layout("last_two_dp2_zero2", dp=2, recompute="full"), LAST_TWO),
    Case(Layout("last_two_dp2_zero3", dp=2, strategy=ZERO3), LAST_TWO),
    Case(Layout("head_only_dp2_no_shard", dp=2, strategy="no_shard"), HEAD_ONLY),
    Case(Layout("lora_tp2_pp2", tp=2, pp=2, sequence_parallel=True), LORA),
    Case(Layout("lora_tp2_dp2_zero3", tp=2, dp=2, strategy=ZERO3), LORA),
    Case(Layout("last_two_pp2_dp2", pp=2, dp=2), LAST_TWO),
]  # fmt: skip
DROPPING = [
    Case(Layout("dropout_one_process"), DROPOUT),
    Case(Layout("dropout_one_process_recompute", recompute="full"), DROPOUT),
    Case(Layout("dropout_tp2_sp", tp=2, sequence_parallel=True, recompute="selective"), DROPOUT),
    Case(Layout("dropout_pp2", pp=2), DROPOUT),
    Case(Layout("dropout_dp2_zero3", dp=2, strategy=ZERO3), DROPOUT),
]
BF16 = [
    Case(Layout("bf16_lora_one_process", bf16=True, recompute="selective"), LORA),
    Case(Layout("bf16_lora_tp2_sp", tp=2, sequence_parallel=True, bf16=True), LORA),
    Case(Layout("bf16_some_dp2_zero3", dp=2, strategy=ZERO3, bf16=True), SOME),
    Case(Layout("bf16_head_only_pp2", pp=2, bf16=True), HEAD_ONLY),
]
pytestmark = pytest.mark.usefixtures("single_process")


@pytest.fixture(scope="module")
def worlds(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """Where the runs of each number of processes left their results, made on first use."""
    return _Worlds(tmp_path_factory)


class _Worlds(dict[int, Path]):
    def __init__(self, factory: pytest.TempPathFactory) -> None:
        super().__init__()
        self.factory = factory

    def __missing__(self, size: int) -> Path:
        directory = self.factory.mktemp(f"finetuning{size}")
        cases = [case for case in (*CASES, *DROPPING, *BF16) if case.world == size]
        run_world(size, [(run_case, (case, directory)) for case in cases], directory)
        self[size] = directory
        return directory


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_equals_oracle(case: Case, worlds: dict[int, Path]) -> None:
    result = read_result(case.layout, worlds[case.world])
    assert mismatches(result, expected(case.finetuning, case.layout.kv_heads)) == []
    _assert_frozen(case, result)


@pytest.mark.parametrize("case", DROPPING[1:], ids=lambda case: case.name)
def test_dropout_is_the_same_everywhere(case: Case, worlds: dict[int, Path]) -> None:
    alone = read_result(DROPPING[0].layout, worlds[1])
    assert mismatches(read_result(case.layout, worlds[case.world]), alone) == []
    # It does something, and something else in every step.
    assert mismatches(alone, expected(LORA, 2)) != []


@pytest.mark.parametrize("case", BF16, ids=lambda case: case.name)
def test_bf16_is_close_to_the_oracle(case: Case, worlds: dict[int, Path]) -> None:
    result = read_result(case.layout, worlds[case.world])
    right = expected(case.finetuning, case.layout.kv_heads)
    assert result["losses"][0] == pytest.approx(right["losses"][0], rel=0.01)
    assert result["norms"][0] == pytest.approx(right["norms"][0], rel=0.03)
    for name, gradient in result["gradients"].items():
        assert gradient.dtype == torch.float32, "gradients are kept in the parameters' dtype"
        ours, theirs = gradient.double().flatten(), right["gradients"][name].flatten()
        assert torch.nn.functional.cosine_similarity(ours, theirs, dim=0) > 0.98, name
    _assert_frozen(case, result)


def _assert_frozen(case: Case, result: dict[str, object]) -> None:
    """Bitwise, and without a gradient that anybody made."""
    for name, weight in result["weights"].items():
        trained = case.finetuning.trains(name)
        assert torch.equal(weight, result["initial"][name]) != trained, name
        assert (name in result["gradients"]) == trained, name
