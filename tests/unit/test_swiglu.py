"""swiglu is Qwen3's gated activation; its Triton form is proved in the interpreter."""

from __future__ import annotations

import pytest
import torch
from sdar_kernels import reference
from sdar_kernels import swiglu as swiglu_module
from sdar_kernels.swiglu import swiglu, swiglu_gradients
from unit.interpreted import run_interpreted


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_swiglu_is_torchs(dtype: torch.dtype) -> None:
    gate, up = torch.randn(2, 5, 48, generator=torch.Generator().manual_seed(0)).to(dtype)
    assert torch.equal(swiglu(gate, up), torch.nn.functional.silu(gate) * up)


@pytest.mark.parametrize("tile", [7, 1 << 16])
def test_gradients_are_those_of_the_plain_form(tile: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(swiglu_module, "_TILE_ELEMENTS", tile)
    generator = torch.Generator().manual_seed(0)
    gate, up, upstream = torch.randn(3, 5, 48, generator=generator, dtype=torch.float64)
    # gate and up may be views of one product.
    leaves = [gate.t().requires_grad_(), up.t().requires_grad_()]
    found = swiglu_gradients(upstream.t(), gate.t(), up.t())
    product = reference.swiglu(*leaves)
    expected = torch.autograd.grad(product, leaves, upstream.t())
    for ours, plain in zip(found, (*expected, product), strict=True):
        assert ours.shape == plain.shape
        assert (ours - plain).abs().max() < 1e-14


def test_an_unresolved_name_is_refused() -> None:
    with pytest.raises(AssertionError, match="unresolved fused_kernels 'auto'"):
        swiglu(torch.ones(3), torch.ones(3), "auto")
    with pytest.raises(AssertionError, match="unresolved fused_kernels 'auto'"):
        swiglu_gradients(torch.ones(3), torch.ones(3), torch.ones(3), "auto")


def test_gate_and_up_must_agree() -> None:
    with pytest.raises(AssertionError, match="same width"):
        swiglu(torch.ones(3), torch.ones(4))
    with pytest.raises(AssertionError, match="one dtype"):
        swiglu(torch.ones(3), torch.ones(3, dtype=torch.float64))


def test_triton_form_in_the_interpreter() -> None:
    run_interpreted("interpreted_swiglu.py")
