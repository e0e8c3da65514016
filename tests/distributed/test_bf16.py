"""bf16 compute over fp32 parameters: close to fp64, gradients accumulated and reduced in fp32.

Rounding differs between layouts, so equality is not asked for; a wrong scale, a missing sum or
bf16 accumulation over micro-batches is far outside these bounds.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from distributed.layouts import Layout, read_result, reference, run_layout
from distributed.world import run_world

LAYOUTS = [
    Layout("bf16_tp2_sp", tp=2, sequence_parallel=True, bf16=True),
    Layout("bf16_pp2_recompute", pp=2, recompute=True, bf16=True),
    Layout("bf16_dp2_zero2", dp=2, bf16=True),
    Layout("bf16_dp2_zero3", dp=2, strategy="optim_grads_params", bf16=True),
    Layout("bf16_dp2_no_shard", dp=2, strategy="no_shard", bf16=True),
]


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("bf16")
    run_world(2, [(run_layout, (layout, target)) for layout in LAYOUTS], target)
    return target


@pytest.mark.usefixtures("single_process")
@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.name)
def test_bf16_is_close_to_the_oracle(layout: Layout, directory: Path) -> None:
    result = read_result(layout, directory)
    expected = reference(layout.arch, layout.silent_half)
    assert result["losses"][0] == pytest.approx(expected["losses"][0], rel=0.01)
    assert result["norms"][0] == pytest.approx(expected["norms"][0], rel=0.03)
    for name, gradient in result["gradients"].items():
        assert gradient.dtype == torch.float32, "gradients are kept in the parameters' dtype"
        theirs = expected["gradients"][name].flatten()
        ours = gradient.double().flatten()
        cosine = torch.nn.functional.cosine_similarity(ours, theirs, dim=0).item()
        assert cosine > 0.99, f"{name}: cosine {cosine}"
