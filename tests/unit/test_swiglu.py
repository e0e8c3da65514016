"""swiglu is Qwen3's gated activation; its Triton form is proved in the interpreter."""

from __future__ import annotations

import pytest
import torch
from sdar_kernels.swiglu import swiglu
from unit.interpreted import run_interpreted


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_swiglu_is_torchs(dtype: torch.dtype) -> None:
    gate, up = torch.randn(2, 5, 48, generator=torch.Generator().manual_seed(0)).to(dtype)
    assert torch.equal(swiglu(gate, up), torch.nn.functional.silu(gate) * up)


def test_an_unresolved_name_is_refused() -> None:
    with pytest.raises(AssertionError, match="unresolved fused_kernels 'auto'"):
        swiglu(torch.ones(3), torch.ones(3), "auto")


def test_triton_form_in_the_interpreter() -> None:
    run_interpreted("interpreted_swiglu.py")
