"""bf16 compute over fp32 parameters: close to fp64, gradients added up in fp32.

Two claims. A bf16 step is near the fp64 oracle: rounding differs between layouts, so only a
wrong scale or a missing sum shows there. And gradients are accumulated over micro-batches and
reduced over ranks in fp32: their exact sum is known, and a bf16 sum is far from it.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from distributed.bf16_jobs import run_accumulation, summation_errors
from distributed.layouts import Layout, read_result, reference, run_layout
from distributed.world import run_world

LAYOUTS = [
    Layout("bf16_tp2_sp", tp=2, sequence_parallel=True, bf16=True),
    Layout("bf16_pp2_recompute", pp=2, recompute=True, bf16=True),
    Layout("bf16_dp2_zero2", dp=2, bf16=True),
    Layout("bf16_dp2_zero3", dp=2, strategy="optim_grads_params", bf16=True),
    Layout("bf16_dp2_no_shard", dp=2, strategy="no_shard", bf16=True),
]
SUMS = [
    Layout("sum_dp1_pp2_zero2", pp=2, bf16=True),
    Layout("sum_dp2_zero2", dp=2, bf16=True),
    Layout("sum_dp2_zero3", dp=2, strategy="optim_grads_params", bf16=True),
    Layout("sum_dp2_no_shard", dp=2, strategy="no_shard", bf16=True),
]
# ZeRO-3 reduces after every micro-batch into fp32 shards. With one rank there is nothing to add
# before that, so a bf16 reduction changes no bit and the defect cannot show.
SUM_DP1_ZERO3 = Layout("sum_dp1_pp2_zero3", pp=2, strategy="optim_grads_params", bf16=True)
# Measured over all parameters, relative to a gradient's largest element, 8 micro-batches a rank:
# in fp32 every error is at most 5e-8; in bf16 every error is at least 7e-4, the largest 9e-3.
FP32_SUM, BF16_SUM = 1e-6, 1e-4


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("bf16")
    closeness = [(run_layout, (layout, target)) for layout in LAYOUTS]
    sums = [(run_accumulation, (layout, target)) for layout in (*SUMS, SUM_DP1_ZERO3)]
    run_world(2, [*closeness, *sums], target)
    return target


@pytest.mark.usefixtures("single_process")
@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.name)
def test_bf16_is_close_to_the_oracle(layout: Layout, directory: Path) -> None:
    result = read_result(layout, directory)
    expected = reference(layout.arch, layout.silent_half, layout.views)
    assert result["losses"][0] == pytest.approx(expected["losses"][0], rel=0.01)
    assert result["norms"][0] == pytest.approx(expected["norms"][0], rel=0.03)
    for name, gradient in result["gradients"].items():
        assert gradient.dtype == torch.float32, "gradients are kept in the parameters' dtype"
        theirs = expected["gradients"][name].flatten()
        ours = gradient.double().flatten()
        cosine = torch.nn.functional.cosine_similarity(ours, theirs, dim=0).item()
        assert cosine > 0.99, f"{name}: cosine {cosine}"


@pytest.mark.parametrize("layout", [*SUMS, SUM_DP1_ZERO3], ids=lambda layout: layout.name)
def test_gradients_are_added_up_in_fp32(layout: Layout, directory: Path) -> None:
    for name, error in summation_errors(layout, directory, "product").items():
        assert error <= FP32_SUM, f"{name}: relative error {error:.1e}"


@pytest.mark.parametrize("layout", SUMS, ids=lambda layout: layout.name)
def test_adding_up_in_bf16_would_be_noticed(layout: Layout, directory: Path) -> None:
    for name, error in summation_errors(layout, directory, "defective").items():
        assert error >= BF16_SUM, f"{name}: relative error {error:.1e}"
